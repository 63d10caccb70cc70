"""Each extra that is missing is one sentence that names it; a plain run imports none of them."""

import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from vit_scaling import UserError, paths
from vit_scaling.data.sources import parquet, tars
from vit_scaling.interop import hub, serving
from vit_scaling.training import loggers

ROOT = Path(__file__).parent.parent
# Packages that only some commands need; what each does where its package is missing.
NEEDED: dict[str, dict[str, Callable[[], object]]] = {
    "serving": {
        "flatbuffers": lambda: serving.require("stablehlo"),
        "onnx": lambda: serving.require("onnx"),
        "onnxruntime": lambda: serving.require("onnx"),
    },
    "parquet": {"pyarrow": lambda: list(parquet._open("train.parquet"))},
    "zstd": {"zstandard": lambda: tars.open_shard("train-0.tar.zst")},
    "gcs": {"gcsfs": lambda: paths.place("gs://bucket/run")},
    "hub": {"huggingface_hub": lambda: hub.place("hf://birds/vit9")},
    "wandb": {"wandb": lambda: loggers.check(("jsonl", "wandb"))},
    "trackio": {"trackio": lambda: loggers.check(("jsonl", "trackio"))},
}
NOT_OF_COMMANDS = {"test", "docs", "benchmark", "cuda", "tpu"}


def test_every_extra_is_here() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras.keys() - NOT_OF_COMMANDS == NEEDED.keys()
    for extra, packages in NEEDED.items():
        assert {requirement.split(">")[0] for requirement in extras[extra]} == packages.keys()


@pytest.mark.parametrize(
    ("extra", "package"), [(extra, package) for extra, packages in NEEDED.items() for package in packages]
)
def test_an_extra_that_is_missing_is_named(
    extra: str, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train-0.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(10))
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError) as raised:
        NEEDED[extra][package]()
    assert f"pip install 'vit_scaling[{extra}]'" in str(raised.value)
    assert "\n" not in str(raised.value)


# tests/training/test_loop.py asserts in a process of a whole run that it has imported none of these. JAX itself imports
# flatbuffers and zstandard where they are installed.
OPTIONAL = {"tensorflow", "torch", *(package for packages in NEEDED.values() for package in packages)}
OPTIONAL -= {"flatbuffers", "zstandard"}

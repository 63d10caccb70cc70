"""Programs for serving give the model's logits, without this package, for every family and any batch size."""

import dataclasses
import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

from vit_scaling import UserError, interop, models
from vit_scaling.data import mixing
from vit_scaling.interop import onnx_rules, serving
from vit_scaling.interop import weights as weights_lib
from vit_scaling.interop.normalisation import IMAGENET
from vit_scaling.models import attention_cnn, resnet, swin, vit

STATISTICS = {"mean": IMAGENET[0], "std": IMAGENET[1]}
VIT = vit.ViTConfig(width=16, depth=2, mlp=24, heads=2, patch=(8, 8), pool="token", registers=1, **STATISTICS)
FAMILIES: dict[str, tuple[Any, tuple[int, int]]] = {
    "vit": (VIT, (16, 24)),
    "swin": (
        swin.SwinConfig(version=2, width=8, depths=(2,), heads=(2,), window=2, patch=2, **STATISTICS),
        (12, 8),
    ),
    "sasa": (resnet.ResNetConfig(depth=14, width=8, spatial="attention", groups=(4,), kernel_size=3), (32, 32)),
    "attention_cnn": (attention_cnn.AttentionCNNConfig(width=18, depth=2, heads=9, mlp=8), (8, 8)),
}


def filled(name: str) -> weights_lib.Weights:
    """Returns weights away from their initial values, so that every parameter counts."""
    config, size = FAMILIES[name]
    shapes = models.split(weights_lib.abstract(config, size, 5))[1:]
    generator = np.random.default_rng(0)
    draw = lambda leaf: generator.uniform(0.1, 0.5, leaf.shape).astype(np.float32)  # noqa: E731
    parameters, statistics = jax.tree.map(draw, shapes)
    return dataclasses.replace(weights_lib.of_trees(config, size, parameters, statistics), class_names=tuple("abcde"))


def expected(weights: weights_lib.Weights, images: np.ndarray) -> np.ndarray:
    model, config = weights.module(), weights.config
    description, *arrays = models.split(model)
    run = lambda arrays, x: models.merge(description, *arrays)(mixing.to_float(x, config.mean, config.std))  # noqa: E731
    return np.asarray(jax.jit(run)(arrays, images))


def pixels(weights: weights_lib.Weights, count: int, dtype: str) -> np.ndarray:
    return np.random.default_rng(count).uniform(0, 255, (count, *weights.image_size, 3)).astype(dtype)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("default::DeprecationWarning")
def test_an_onnx_file_gives_the_logits(name: str, tmp_path: pathlib.Path) -> None:
    """In float32, whatever the model's dtype, and with the mean and std that are known of the weights."""
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    weights = filled(name)
    config = dataclasses.replace(weights.config, dtype="bfloat16", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    written = dataclasses.replace(weights, config=config)
    serving.write(written, tmp_path / "x", layout="onnx", input_type="uint8", texts={"README.md": "hello"})
    assert {path.name for path in (tmp_path / "x").iterdir()} == {"model.onnx", "serving.json", "README.md"}
    session = onnxruntime.InferenceSession(tmp_path / "x" / "model.onnx")
    images = pixels(weights, 4, "uint8")
    (actual,) = session.run(None, {"images": images})
    wanted = expected(weights, images)
    assert np.ptp(wanted) > 0.01
    np.testing.assert_allclose(actual, wanted, atol=2e-5, rtol=2e-5)


READER = """
import json, sys, jax, numpy as np
from jax import export
folder, images = sys.argv[1], np.load(sys.argv[2])
program = export.deserialize(bytearray(open(folder + "/model.stablehlo", "rb").read()))
np.save(sys.argv[2], jax.jit(program.call)(dict(np.load(folder + "/weights.npz")), images))
assert program.platforms == ("cpu", "cuda", "rocm", "tpu")
assert not [name for name in sys.modules if name.split(".")[0] in ("vit_scaling", "flax")]
"""


def test_a_stablehlo_program_runs_with_jax_alone(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("flatbuffers")
    weights = filled("vit")
    serving.write(weights, tmp_path / "x", layout="stablehlo", input_type="float32", texts={})
    told = json.loads((tmp_path / "x" / "serving.json").read_text())
    assert told["input"] == {"name": "images", "type": "float32", "shape": ["batch", 16, 24, 3]}
    assert told["class_names"] == list("abcde")
    images = pixels(weights, 5, "float32")  # not whole numbers, and another batch than the writer's
    np.save(tmp_path / "images.npy", images)
    arguments = [sys.executable, "-I", "-c", READER, str(tmp_path / "x"), str(tmp_path / "images.npy")]
    subprocess.run(arguments, check=True, timeout=120, cwd=tmp_path)
    np.testing.assert_allclose(np.load(tmp_path / "images.npy"), expected(weights, images), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("layout", "package"), [("stablehlo", "flatbuffers"), ("onnx", "onnx")])
def test_a_missing_package_is_named(
    layout: str, package: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"package {package}, .* pip install 'vit_scaling\[serving\]'"):
        serving.write(filled("vit"), tmp_path / "x", layout=layout, input_type="uint8", texts={})
    assert not list(tmp_path.iterdir())


def test_a_program_of_other_logits_is_not_written(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = lambda function, arrays, *_: lambda images: np.asarray(jax.jit(function)(arrays, images)) + 0.01  # noqa: E731
    monkeypatch.setitem(serving.LAYOUTS, "stablehlo", wrong)
    with pytest.raises(RuntimeError, match="differ from the model's"):
        serving.write(filled("vit"), tmp_path / "x", layout="stablehlo", input_type="uint8", texts={})
    assert not list(tmp_path.iterdir())


def test_a_network_that_onnx_cannot_express_is_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.delitem(onnx_rules.ELEMENTWISE, "tanh")
    with pytest.raises(UserError, match=r"cannot express this network: the model uses tanh.*--layout=stablehlo can"):
        interop.write(filled("vit"), tmp_path / "out", layout="onnx")
    assert not (tmp_path / "out").exists()


def test_an_unknown_input_type_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="choose one of uint8, float32"):
        interop.write(filled("vit"), tmp_path / "x", layout="stablehlo", input_type="int8")

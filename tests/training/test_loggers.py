"""Trackers get every row once, the result and the files; what they cannot do never ends a run.

A stand-in implements the part of wandb's interface that is used. Where wandb or trackio is installed, the last tests
write with the real package, offline.
"""

import contextlib
import importlib.util
import json
import logging as std_logging
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from vit_scaling import UserError
from vit_scaling.training import loggers, telemetry

ROOT = Path(__file__).parent.parent.parent
TOLD = ("project", "0123abcd", {"seed": 3})
RESULT = {"step": 4, "accuracy": 0.5, "checkpoint": "c", "metrics": {"validation/loss": 1.5}, "seconds": {"step": 1.0}}


class Run:
    """What wandb.init returns."""

    def __init__(self, fails: bool, **arguments: Any):
        self.id, self.fails, self.arguments = arguments["id"], fails, arguments
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.summary: dict[str, Any] = {}
        self.files: list[str] = []
        self.finished = False

    def log(self, values: dict[str, float], step: int) -> None:
        if self.fails:
            raise ConnectionError("no route to host")
        self.rows.append((step, values))

    def log_artifact(self, artifact: Any) -> None:
        self.files += artifact.files

    def finish(self) -> None:
        self.finished = True


class Artifact:
    def __init__(self, name: str, type: str):
        self.files: list[str] = []

    def add_file(self, path: str, name: str) -> None:
        assert Path(path).is_file()
        self.files.append(name)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = types.ModuleType("wandb")
    module.runs = []  # type: ignore[attr-defined]
    module.fails = False  # type: ignore[attr-defined]

    def init(**arguments: Any) -> Run:
        module.runs.append(Run(module.fails, **arguments))  # type: ignore[attr-defined]
        return module.runs[-1]  # type: ignore[attr-defined]

    module.init, module.Artifact = init, Artifact  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def write(workdir: Path, resume_step: int | None, rows: list[tuple[int, dict[str, float]]], end: bool = False) -> None:
    writer = telemetry.create_writer(workdir, resume_step, ("jsonl", "wandb"), *TOLD)
    with contextlib.closing(writer):
        for step, values in rows:
            writer.write_scalars(step, values)
        if end:
            writer.finish(RESULT)


def test_a_run_that_goes_on_sends_every_row_once(wandb: Any, tmp_path: Path) -> None:
    """Killed after step 3, it goes on from the checkpoint of step 2 and writes step 3 again."""
    rows = [(1, {"loss": 3.0}), (2, {"loss": 2.0}), (2, {"validation/loss": 2.5}), (3, {"loss": 1.0})]
    write(tmp_path, None, rows)
    (tmp_path / "figure.png").write_text("picture")
    write(
        tmp_path, 2, [(3, {"loss": 1.0}), (3, {"validation/loss": 1.1}), (4, {"loss": 0.5, "bad": float("nan")})], True
    )
    first, second = wandb.runs
    assert first.rows == rows
    assert second.rows == [(3, {"validation/loss": 1.1}), (4, {"loss": 0.5})]
    assert first.id == second.id == "0123abcd"
    assert second.arguments["resume"] == "allow"
    assert second.arguments["config"] == {"seed": 3}
    assert second.arguments["project"] == "project"
    assert second.summary == {"step": 4, "accuracy": 0.5, "checkpoint": "c", "validation/loss": 1.5}
    assert second.files == ["figure.png"]
    assert first.finished
    assert second.finished
    assert [row["step"] for row in telemetry.read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 2, 3, 3, 4]
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("fails", ["init", "log"])
def test_a_tracker_that_fails_is_one_warning(
    fails: str, wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wandb.fails = fails == "log"
    if fails == "init":
        monkeypatch.setattr(wandb, "init", lambda **_: 1 / 0)
    with caplog.at_level(std_logging.WARNING):
        write(tmp_path, None, [(step, {"loss": 1.0}) for step in range(1, 6)], True)
    assert [record.message.split(" failed")[0] for record in caplog.records] == ["wandb"] * 2
    assert f"failed {5 if fails == 'log' else 1} times" in caplog.records[1].message
    assert len(telemetry.read_jsonl(tmp_path / "metrics.jsonl")) == 5


def test_unknown_and_missing_writers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"log\.writers has 'csv'; choose of jsonl, tensorboard, wandb, trackio"):
        loggers.check(("jsonl", "csv"))
    with pytest.raises(UserError, match=r"pip install 'vit_scaling\[trackio\]'"):
        loggers.check(("jsonl", "trackio"))
    with pytest.raises(UserError, match="lacks 'jsonl'"):
        loggers.check(("tensorboard",))
    loggers.check(("jsonl",))


REAL = """
import sys
from pathlib import Path
from vit_scaling.training import telemetry
workdir, name = Path(sys.argv[1]), sys.argv[2]
told = ("project", "0123abcd", {"seed": 3})
result = {"step": 4, "accuracy": 0.5, "metrics": {"validation/loss": 1.5}}
for resumed, steps in ((None, (1, 2, 3)), (2, (3, 4))):
    writer = telemetry.create_writer(workdir, resumed, ("jsonl", name), *told)
    for step in steps:
        writer.write_scalars(step, {"loss": float(step)})
    if steps[-1] == 4:
        (workdir / "figure.png").write_bytes(b"picture")
        writer.finish(result)
    writer.close()
"""


@pytest.mark.parametrize("name", loggers.TRACKERS)
def test_the_real_package_offline(name: str, tmp_path: Path) -> None:
    pytest.importorskip(name, reason=f"the extra {name} is not installed")
    environment = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", REAL, str(tmp_path), name]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{name} failed" not in done.stderr
    assert json.loads((tmp_path / f"{name}.json").read_text()) == {"step": 4, "names": ["loss"]}
    if name == "wandb":
        runs = sorted((tmp_path / "wandb").glob("offline-run-*-0123abcd"))
        assert sum(len(list(run.glob("*.wandb"))) for run in runs) == len(runs) >= 1
    else:
        code = (
            "from trackio.sqlite_storage import SQLiteStorage as S; import json\n"
            "run, = S.get_runs('project'); print(json.dumps([run, S.get_logs('project', run)]))"
        )
        told = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
        )
        run, rows = json.loads(told.stdout.splitlines()[-1])
        assert run == f"{tmp_path.name}-0123abcd"
        assert [(row["step"], row["loss"]) for row in rows if "loss" in row] == [(s, float(s)) for s in (1, 2, 3, 4)]

"""A run that a person watches on a terminal of 80 columns, and the exports at its end."""

import dataclasses
import json
import logging
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import absl.logging
import jax
import pytest

from tests import tiny
from vit_scaling import UserError, interop
from vit_scaling import config as c
from vit_scaling.parallel import mesh as mesh_lib
from vit_scaling.training import export, loop, step_log, telemetry

CONFIG = tiny.config(
    4,
    export=("vit_scaling",),
    optim=c.OptimConfig(lr=3e-3),
    evaluation=c.EvaluationConfig(every=c.Duration(2), validation=tiny.digits("validation[:40]")),
    checkpoint=c.CheckpointConfig(every=c.Duration(2)),
)


class Terminal:
    """A pseudo-terminal of 80 columns in the place of stdout and stderr; `text` is what was written to it."""

    def __init__(self) -> None:
        self.text = ""
        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 80))
        self._file = os.fdopen(slave, "w")
        self._reader = threading.Thread(target=self._read)

    def _read(self) -> None:
        data = b""
        while True:
            try:
                part = os.read(self._master, 4096)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            data += part
        self.text = data.decode()

    def __enter__(self) -> "Terminal":
        self._reader.start()
        self._streams = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = self._file
        return self

    def __exit__(self, *error: object) -> None:
        sys.stdout, sys.stderr = self._streams
        self._file.close()
        self._reader.join()
        os.close(self._master)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, Path]]:
    """Returns what the terminal showed of a run that was stopped after step 3, of its continuation, and the workdir."""
    workdir = tmp_path_factory.mktemp("runs") / "watched"
    create, dispatched, show = mesh_lib.create, step_log.StepLog.dispatched, warnings.showwarning

    def interrupt(self: Any, step: int, metrics: Any) -> None:
        dispatched(self, step, metrics)
        for number in range(5):
            logging.getLogger("library").warning("retry %d of step %d", number, step)
            absl.logging.warning("it is %s", "slow")
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.warn("it is old", stacklevel=1)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh_lib, "create", lambda config: create(config, jax.devices()[:1]))
        with patch.context() as inner, Terminal() as first:
            inner.setattr(step_log.StepLog, "dispatched", interrupt)
            handler = logging.StreamHandler(sys.stderr)  # as absl has one
            inner.setattr(logging.getLogger(), "handlers", [handler, *logging.getLogger().handlers])
            assert loop.train(CONFIG, workdir) == {"interrupted": 3}
            assert warnings.showwarning is show
            assert handler in logging.getLogger().handlers
        with Terminal() as second:
            loop.train(CONFIG, workdir)
        yield first.text, second.text, workdir


def lines_of(text: str) -> list[str]:
    """Returns everything that a terminal showed in one line at one moment."""
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
    return [part.rstrip() for line in plain.split("\n") for part in line.split("\r")]


def test_a_watched_run_says_what_it_does_within_80_columns(watched: tuple[str, str, Path]) -> None:
    first, second, workdir = watched
    shown = [line.replace(str(workdir), "WORKDIR") for line in lines_of(first + second)]
    assert [line for line in shown if len(line) > 80] == []
    words = [found[1] for line in shown if (found := re.match(r"([a-z, ]+): +\d+%\|", line))]
    order = [word for word, before in zip(words, [None, *words], strict=False) if word != before]
    assert order[:2] == ["compiling", "evaluating"]
    assert {"training", "saving", "stopping, saving"} <= set(order)
    # Evaluations are lines that stay, with the number of examples and an interval.
    kept = [line for line in re.split("[\r\n]", first) if line.startswith("step 2: validation")]
    assert len(kept) == 1
    assert re.search(r"accuracy \d+\.\d\d% \(n = 40, 95%: \d+\.\d to \d+\.\d\)", kept[0])


def test_warnings_are_whole_lines_above_the_bar_once_with_their_count(watched: tuple[str, str, Path]) -> None:
    first, second, _ = watched
    lines = [
        line.split("\r")[-1] for line in re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", first).replace("\r\n", "\n").split("\n")
    ]
    said = [line for line in lines if "warning" in line]
    texts = ["warning: retry 0 of step 1", "warning: it is slow", "warning: it is old"]
    more = ["1 of step 1 (2", "3 of step 1 (4", "2 of step 2 (8"]
    said_more = [f"warning: retry {text} like it)" for text in more]
    assert said == [*texts, *said_more, *(f"15 times: {text}" for text in texts)]
    assert first.count("retry 0 of step 1") == 2
    assert "warning" not in second
    assert not any(isinstance(handler, telemetry.Warnings) for handler in logging.getLogger().handlers)


def test_a_run_exports_its_weights_at_its_end(watched: tuple[str, str, Path]) -> None:
    _, text, workdir = watched
    assert f"exported {workdir}/export/vit_scaling" in text.replace("\r\n", "\n")
    assert {path.name for path in (workdir / "export").iterdir()} == {"vit_scaling"}
    own, exported = (interop.read(path) for path in (workdir, workdir / "export" / "vit_scaling"))
    assert own.config == exported.config
    for name, leaf in own.leaves.items():
        assert (exported.leaves[name] == leaf).all()


def test_an_export_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """And the others are written: with an average of the parameters both."""
    calls = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command[4:])
        if "--layout=timm" in command:
            return subprocess.CompletedProcess(command, 2, "", "warning\nerror: timm has no such network\n")
        if "--ema" in command:
            raise OSError("no memory")
        (tmp_path / "export" / "huggingface").mkdir(parents=True)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(export.subprocess, "run", run)
    config = dataclasses.replace(tiny.config(), export=("timm", "huggingface"))
    export.write_all(config, tmp_path, Path("checkpoints/8"))
    assert len(calls) == 4
    text = capsys.readouterr().err
    assert text.count("\n") == 3
    again = "weights export --input=checkpoints/8 --layout=timm --output=DIR writes it"
    assert f"the export timm failed (error: timm has no such network); {again}" in text
    assert "the export huggingface_ema failed (no memory); " in text
    export.write_all(config, tmp_path, Path("checkpoints/8"))
    assert len(calls) == 7  # what is there is not written again


def test_layouts_are_checked_before_the_run_begins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="export has 'tensorrt'; choose of huggingface, timm, vit_scaling, stablehlo"):
        loop.train(dataclasses.replace(CONFIG, export=("tensorrt",)), tmp_path / "run")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"onnx needs the package onnxruntime, .* pip install 'vit_scaling\[serving\]'"):
        loop.train(dataclasses.replace(CONFIG, export=("onnx",)), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_the_result_counts_the_examples_of_each_set(watched: tuple[str, str, Path]) -> None:
    result = json.loads((watched[2] / "result.json").read_text())
    assert result["set_sizes"] == {"validation": 40}

"""Experiment trackers behind the writer interface: Weights & Biases and trackio, both optional.

A tracker is handed what metrics.jsonl holds, and at the end the result and the files of the run. It is the same run
there after each restart. `Tracked` keeps a note of the last row that was sent, so a run that goes back to a checkpoint
sends none twice; and it turns every failure of a tracker into one warning, because none is a reason to end a run.
"""

import importlib
import importlib.util
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from absl import logging

from vit_scaling import UserError, paths

FILES = ("jsonl", "tensorboard")
TRACKERS = ("wandb", "trackio")
ARTIFACTS = ("config.json", "result.json", "figure.png", "report.html")


class Tracker(Protocol):
    """What `Tracked` needs of a tracker."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None: ...
    def finish(self, result: Mapping[str, Any], files: Sequence[Path]) -> None: ...
    def close(self) -> None: ...


class Wandb:
    """Weights & Biases; WANDB_MODE=offline writes to workdir/wandb alone, for `wandb sync`."""

    def __init__(self, workdir: Path, project: str, identity: str, config: Mapping[str, Any]):
        import wandb

        self._wandb = wandb
        folder = None if paths.in_bucket(workdir) else str(workdir)
        self._run = wandb.init(
            project=project, name=workdir.name, id=identity, resume="allow", config=dict(config), dir=folder
        )

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def finish(self, result: Mapping[str, Any], files: Sequence[Path]) -> None:
        self._run.summary.update(dict(result))
        artifact = self._wandb.Artifact(f"run-{self._run.id}", type="run")
        for file in files:
            artifact.add_file(str(file), name=file.name)
        self._run.log_artifact(artifact)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """trackio, which keeps runs in TRACKIO_DIR on this machine, or where TRACKIO_SPACE_ID says."""

    def __init__(self, workdir: Path, project: str, identity: str, config: Mapping[str, Any]):
        import trackio

        self._trackio = trackio
        # trackio knows a run by its name.
        name = f"{workdir.name}-{identity}"
        trackio.init(project, name=name, resume="allow", config=dict(config), auto_log_gpu=False, auto_log_cpu=False)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._trackio.log(dict(scalars), step=step)

    def finish(self, result: Mapping[str, Any], files: Sequence[Path]) -> None:
        numbers = {name: value for name, value in result.items() if isinstance(value, int | float)}
        self._trackio.log({f"result/{name}": value for name, value in numbers.items()}, step=int(result["step"]))
        for file in files:
            self._trackio.log_artifact(file, name=f"{file.stem}-{file.suffix[1:]}", type="run")

    def close(self) -> None:
        self._trackio.finish()


_KINDS: dict[str, Callable[..., Tracker]] = {"wandb": Wandb, "trackio": Trackio}


def check(writers: Sequence[str]) -> None:
    """Raises UserError unless log.writers names writers that are there."""
    for name in writers:
        if name not in FILES + TRACKERS:
            raise UserError(f"log.writers has {name!r}; choose of {', '.join(FILES + TRACKERS)}")
        if name in TRACKERS and importlib.util.find_spec(name) is None:
            raise UserError(f"log.writers has {name!r}, which needs an extra: pip install 'vit_scaling[{name}]'")
    if "jsonl" not in writers:
        raise UserError("log.writers lacks 'jsonl': a run resumes from metrics.jsonl, and its report is made of it")


class Tracked:
    """A writer that hands rows to one tracker, each once, and never raises.

    Args:
        name: of the tracker.
        workdir: of the run; <name>.json in it says which row was the last.
        project: under which the tracker files the run.
        identity: of the run; the same after each restart.
        config: the resolved config.
    """

    def __init__(self, name: str, workdir: Path, project: str, identity: str, config: Mapping[str, Any]):
        self._name, self._note, self._workdir = name, workdir / f"{name}.json", workdir
        self._last: dict[str, Any] = {"step": -1, "names": []}
        self._tracker: Tracker | None = None
        self._failures = 0

        def begin() -> None:
            if self._note.exists():
                self._last = json.loads(self._note.read_text())
            self._tracker = _KINDS[name](workdir, project, identity, config)

        self._safely(begin)

    def _safely(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._failures += 1
            if self._failures == 1:
                logging.warning("%s failed (%s: %s); the run goes on", self._name, type(error).__name__, error)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        new = {name: value for name, value in scalars.items() if math.isfinite(value)}
        if step == self._last["step"]:
            new = {name: value for name, value in new.items() if name not in self._last["names"]}
        tracker = self._tracker
        if tracker is None or not new or step < self._last["step"]:
            return
        earlier = self._last["names"] if step == self._last["step"] else []
        self._last = {"step": step, "names": sorted({*earlier, *new})}

        def send() -> None:
            # Noted first: a process that is killed in between leaves a row out rather than send it twice.
            if not paths.in_bucket(self._note):
                paths.write(self._note, json.dumps(self._last))
            tracker.log(step, new)

        self._safely(send)

    def flush(self) -> None:
        if paths.in_bucket(self._note):
            self._safely(lambda: paths.write(self._note, json.dumps(self._last)))

    def finish(self, result: Mapping[str, Any]) -> None:
        """Sends the result of the run and its files."""
        if (tracker := self._tracker) is not None:
            files = [file for name in ARTIFACTS if (file := self._workdir / name).exists()]
            flat = {name: value for name, value in result.items() if not isinstance(value, dict)}
            self._safely(lambda: tracker.finish(flat | result["metrics"], [paths.fetched(file) for file in files]))

    def close(self) -> None:
        if (tracker := self._tracker) is not None:
            self.flush()
            self._safely(tracker.close)
        if self._failures:
            logging.warning("%s failed %d times; metrics.jsonl has every row", self._name, self._failures)

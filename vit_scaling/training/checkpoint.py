"""Checkpoints of a run, through Orbax: saved asynchronously and sharded, restored onto the mesh that the run has now.

A checkpoint is one train state and one small JSON record with a digest of every array. `interop/run.py` decides which
ones are complete and intact; nothing else reads a checkpoint.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from vit_scaling import UserError, paths
from vit_scaling.interop import run
from vit_scaling.interop.run import RECORD, STATE, complete, leaves, steps
from vit_scaling.parallel import processes

# Orbax measures its timeout with the wall clock, which may jump. The watchdog ends a save that is stuck.
_NO_TIMEOUT = 10**9


def restore(checkpoint: Path, state_shape: Any) -> tuple[Any, dict[str, Any]]:
    """Returns (state, record) of one checkpoint, each array with the sharding that `state_shape` gives it.

    Args:
        checkpoint: a directory `.../<step>`.
        state_shape: the expected state as ShapeDtypeStructs with shardings.

    Raises:
        UserError: there is no complete checkpoint, or it holds another model's or optimizer's arrays; the sentence
            names some that differ.
        DamagedError: it cannot be read, or is not what was written.
    """
    run.require(checkpoint)
    path = epath.Path(paths.absolute(checkpoint))
    with run.reading(checkpoint):
        # The handler itself, without Checkpointer: that one waits for processes whose part may have failed.
        handler = ocp.CompositeCheckpointHandler(**run.handlers())
        stored = {name: tuple(leaf.shape) for name, leaf in leaves(_tree(handler, path)).items()}
        _refuse_other_model(checkpoint, stored, {k: tuple(leaf.shape) for k, leaf in leaves(state_shape).items()})
        # A field that a version added later is absent from an older checkpoint; where it is off here, it is not wanted.
        there = _tree(handler, path)
        fields = {field.name: getattr(state_shape, field.name) for field in dataclasses.fields(state_shape)}
        wanted = {name: value for name, value in fields.items() if value is not None or name in there}
        args = {STATE: ocp.args.StandardRestore(wanted), RECORD: ocp.args.JsonRestore()}
        item = handler.restore(path, args=ocp.args.Composite(**args))
        handler.close()
    state, record = dataclasses.replace(state_shape, **item[STATE]), item[RECORD]
    run.verify(checkpoint, record, run.digests(state))
    step = int(jax.device_get(state.step))
    if step != int(checkpoint.name):
        raise run.DamagedError(f"{checkpoint} holds the state of step {step}, not of the step that it is named after")
    return state, record


def _tree(handler: Any, path: Any) -> Any:
    metadata = handler.metadata(path)
    return getattr(metadata, "item_metadata", metadata)[STATE].tree


def restore_newest(
    directory: Path, state_shape: Any, identity: str | None = None
) -> tuple[Path, Any, dict[str, Any]] | None:
    """Returns (checkpoint, state, record) of the newest intact checkpoint; None where there is no complete one.

    Damaged ones are named and kept aside as `<step>.damaged`. All processes call it and agree.

    Args:
        directory: where the checkpoints lie.
        state_shape: as in `restore`.
        identity: of the run, as its checkpoints have it; those of another run count as damaged.

    Raises:
        UserError: no checkpoint is intact, and nothing was changed; or as `restore`.
    """
    failures: dict[int, str] = {}
    for step in reversed(processes.first(lambda: steps(directory))):
        restored = None
        try:
            restored = restore(directory / str(step), state_shape)
            if identity is not None and restored[1].get("run", identity) != identity:
                raise run.DamagedError(f"{directory / str(step)} was written by another run")
            failure = None
        except run.DamagedError as error:
            failure = str(error)
        answers = [answer for answer in processes.gather(failure) if answer]
        if restored is not None and not answers:
            for damaged, sentence in failures.items():
                processes.say(f"{sentence}; it is kept as {damaged}.damaged, and the run continues from step {step}")
                processes.first(functools.partial(_set_aside, directory / str(damaged), "damaged"))
            return directory / str(step), *restored
        failures[step] = answers[0]
    if failures:
        raise UserError(f"no checkpoint in {directory} is intact, nothing was changed: {'; '.join(failures.values())}")
    return None


def _set_aside(folder: Path, why: str) -> None:
    paths.move_folder(folder, folder.with_name(f"{folder.name}.{why}"))


def _refuse_other_model(checkpoint: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    differing = [
        f"{name} is {stored.get(name, 'absent')} there and {wanted.get(name, 'absent')} here"
        for name in sorted(stored.keys() | wanted.keys(), key=lambda name: (not name.startswith("params/"), name))
        if stored.get(name) != wanted.get(name)
    ]
    if differing:
        more = f"; and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise UserError(f"{checkpoint} belongs to another model or optimizer: {'; '.join(differing[:5])}{more}")


@functools.cache
def _one_line_of_each_failure() -> None:
    """Shortens what Orbax and TensorStore print of a save that failed: hundreds of lines, and then they raise it."""
    unraisable = sys.unraisablehook

    def shorten(record: logging.LogRecord) -> bool:
        if "orbax" in record.pathname and record.levelno >= logging.ERROR:
            record.msg, record.args = (record.getMessage().splitlines() or [""])[0][:300], ()
            record.exc_info = record.exc_text = None
        return True

    def leave_out(found: Any) -> None:
        # TensorStore answers for the arrays that Orbax gave up when the first one failed.
        if str(found.exc_value) != "Event loop is closed":
            unraisable(found)

    logging.getLogger("absl").addFilter(shorten)
    sys.unraisablehook = leave_out


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: where they lie; made if absent.
        keep: how many of the latest stay.
        permanent: every checkpoint whose step this divides is kept; 0 for none.
    """

    def __init__(self, directory: Path, *, keep: int, permanent: int):
        _one_line_of_each_failure()
        self.directory = paths.absolute(directory)
        processes.first(self._set_unfinished_aside)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=permanent or None,
            async_options=ocp.AsyncOptions(timeout_secs=_NO_TIMEOUT),
            # Not a rename, which a mounted bucket makes object by object.
            atomicity_options=ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE),
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=run.handlers())

    def _set_unfinished_aside(self) -> None:
        """Keeps the newest unfinished save as `<step>.unfinished`: it would block the next save of that step."""
        entries = list(self.directory.iterdir()) if self.directory.is_dir() else []
        unfinished = [entry for entry in entries if entry.name.isdigit() and not complete(entry)]
        if unfinished:
            for entry in entries:
                if entry.name.endswith(".unfinished") and entry.is_dir():
                    paths.remove_folder(entry)
            for entry in unfinished:
                processes.say(f"{entry} was never finished; it is kept as {entry.name}.unfinished")
                _set_aside(entry, "unfinished")

    def save(self, step: int, state: Any, record: Mapping[str, Any]) -> None:
        """Starts to write a checkpoint; returns once the state's memory may be reused."""
        record = run.seal({**record, "step": step}, run.digests(state))
        args = {STATE: ocp.args.StandardSave(state), RECORD: ocp.args.JsonSave(record)}
        self._manager.save(step, args=ocp.args.Composite(**args), force=True)

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()


class Best:
    """The checkpoint of the evaluation that was best by one metric: `directory/<step>`, and best.json beside it.

    It is apart from the run's own checkpoints, because a run continues from the latest of those.

    Args:
        workdir: of the run.
        metric: one of the evaluations' names, or None.
        measured_on: identity of the sets that it is measured on; the best of another set or metric is not compared.
    """

    def __init__(self, workdir: Path, metric: str | None, measured_on: str = ""):
        self._metric, self._record, self._set = metric, workdir / "best.json", measured_on
        self._directory = workdir / "best"
        self._sign = -1.0 if metric is not None and lower_is_better(metric) else 1.0
        self.value = -self._sign * math.inf
        self.step: int | None = None
        if metric is not None and self._record.exists():
            self._read()

    def _read(self) -> None:
        try:
            record = json.loads(self._record.read_text())
            metric, measured_on = record["metric"], record.get("measured_on", self._set)
            value, step = float(record["value"]), int(record["step"])
        except (ValueError, KeyError, TypeError, AttributeError):
            processes.say(f"{self._record} is damaged; the best checkpoint is chosen anew from here on")
            return
        if (metric, measured_on) != (self._metric, self._set):
            processes.say(f"{self._record} is of {metric} on another set or by another metric; it is chosen anew")
        elif complete(self._directory / str(step)):
            self.value, self.step = value, step

    def offer(self, step: int, state: Any, values: Mapping[str, float]) -> None:
        """Saves the state if its metric, one of `values`, is better than all before; waits until it is written."""
        if self._metric is None or not self._sign * values[self._metric] > self._sign * self.value:
            return
        if self.step is None:  # what is there was chosen by another metric or on another set
            processes.first(lambda: paths.remove_folder(self._directory))
        self.value, self.step = values[self._metric], step
        with contextlib.closing(Checkpoints(self._directory, keep=1, permanent=0)) as checkpoints:
            checkpoints.save(step, state, {self._metric: self.value})
        if processes.is_first():
            record = {"metric": self._metric, "value": self.value, "step": step, "measured_on": self._set}
            record["checkpoint"] = str(self._directory / str(step))
            paths.write(self._record, json.dumps(record) + "\n")


def lower_is_better(metric: str) -> bool:
    """Whether a metric is an error: a loss, a deviation or a calibration error."""
    return metric.endswith(("loss", "_std", "error", "ece"))

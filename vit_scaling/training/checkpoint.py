"""Checkpoints: Orbax behind one small face.

A checkpoint is one train state and one small JSON record, written asynchronously and sharded, restored onto whatever
mesh the new run has. `directory/<step>` is complete or it is not read: Orbax writes beside it and renames.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from vit_scaling import UserError
from vit_scaling.parallel import processes

STATE, RECORD = "state", "record"


def steps(directory: Path) -> list[int]:
    """Returns the steps of all complete checkpoints below `directory`, in order."""
    if not directory.is_dir():
        return []
    return sorted(int(entry.name) for entry in directory.iterdir() if entry.name.isdigit() and _complete(entry))


def _complete(checkpoint: Path) -> bool:
    return (checkpoint / "_CHECKPOINT_METADATA").exists() and (checkpoint / STATE).is_dir()


def require(checkpoint: Path) -> None:
    """Raises UserError unless `checkpoint` is a complete one."""
    if not _complete(checkpoint):
        raise UserError(f"{checkpoint} holds no complete checkpoint; name a directory <workdir>/checkpoints/<step>")


def _handlers() -> dict[str, ocp.CheckpointHandler]:
    return {STATE: ocp.StandardCheckpointHandler(), RECORD: ocp.JsonCheckpointHandler()}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Returns {path: shape} of any pytree, by the names under which Orbax stores its leaves."""
    names = {}
    for key_path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        parts = [getattr(key, "key", getattr(key, "name", getattr(key, "idx", ""))) for key in key_path]
        names["/".join(str(part) for part in parts)] = tuple(leaf.shape)
    return names


def restore(checkpoint: Path, state_shape: Any) -> tuple[Any, dict[str, Any]]:
    """Returns (state, record) of one checkpoint, each array with the sharding that `state_shape` gives it.

    Args:
        checkpoint: a directory `.../<step>`.
        state_shape: the expected state as ShapeDtypeStructs with shardings.

    Raises:
        UserError: there is no complete checkpoint, or it holds another model's or optimizer's arrays; the sentence
            names some that differ.
    """
    require(checkpoint)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**_handlers())) as checkpointer:
        path = checkpoint.absolute()
        metadata = checkpointer.metadata(path)
        stored = _shapes(getattr(metadata, "item_metadata", metadata)[STATE].tree)
        _refuse_other_model(checkpoint, stored, _shapes(state_shape))
        item = checkpointer.restore(
            path,
            args=ocp.args.Composite(**{STATE: ocp.args.StandardRestore(state_shape), RECORD: ocp.args.JsonRestore()}),
        )
    return item[STATE], item[RECORD]


def restore_arrays(checkpoint: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Returns parts of a state as nested dicts of NumPy arrays, whatever run they are of; {} for one that is empty.

    Args:
        checkpoint: a directory `.../<step>`.
        names: of "params", "statistics", "ema".

    Raises:
        UserError: there is no complete checkpoint.
    """
    require(checkpoint)
    path = checkpoint.absolute()
    handler = ocp.CompositeCheckpointHandler(**(_handlers() | {STATE: ocp.PyTreeCheckpointHandler()}))
    with ocp.Checkpointer(handler) as checkpointer:
        metadata = checkpointer.metadata(path)
        tree = getattr(metadata, "item_metadata", metadata)[STATE].tree
        part = {name: tree[name] for name in names if tree.get(name)}
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), part)
        args = ocp.args.PyTreeRestore(item=part, restore_args=kinds, partial_restore=True)
        restored = checkpointer.restore(path, args=ocp.args.Composite(**{STATE: args}))[STATE]
    return {name: restored.get(name, {}) for name in names}


def _refuse_other_model(checkpoint: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    differing = [
        f"{name} is {_shape(stored, name)} there and {_shape(wanted, name)} here"
        for name in sorted(stored.keys() | wanted.keys(), key=lambda name: (not name.startswith("params/"), name))
        if stored.get(name) != wanted.get(name)
    ]
    if differing:
        shown = "; ".join(differing[:5])
        more = f"; and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise UserError(f"{checkpoint} belongs to another model or optimizer: {shown}{more}")


def _shape(shapes: dict[str, Any], name: str) -> str:
    return str(shapes[name]) if name in shapes else "absent"


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: where they lie; made if absent.
        keep: how many of the latest stay.
        permanent: every checkpoint whose step this divides stays for good; 0 for none.
    """

    def __init__(self, directory: Path, *, keep: int, permanent: int):
        self.directory = directory.absolute()
        processes.first(self._remove_unfinished)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=permanent or None, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=_handlers())

    def _remove_unfinished(self) -> None:
        """Removes what a crash left behind: it would stand in the way of the same step's next save."""
        for entry in self.directory.iterdir() if self.directory.is_dir() else ():
            if entry.name.isdigit() and not _complete(entry):
                logging.warning("removing the unfinished checkpoint %s", entry)
                shutil.rmtree(entry)

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Starts to write a checkpoint; returns once the state's memory may be reused."""
        args = {STATE: ocp.args.StandardSave(state), RECORD: ocp.args.JsonSave(record)}
        self._manager.save(step, args=ocp.args.Composite(**args), force=True)

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()


class Best:
    """The checkpoint of the evaluation that was best by one metric: `directory/<step>`, and best.json beside it.

    Apart from the run's own checkpoints, which must be the latest ones to go on from.
    """

    def __init__(self, workdir: Path, metric: str | None):
        self._metric, self._record = metric, workdir / "best.json"
        self._directory = workdir / "best"
        self.value, self.step = -math.inf, None
        if metric is not None and self._record.exists():
            record = json.loads(self._record.read_text())
            if _complete(self._directory / str(record["step"])):
                self.value, self.step = record["value"], record["step"]

    def offer(self, step: int, state: Any, values: Mapping[str, float]) -> None:
        """Saves the state if its metric, one of `values`, is higher than all before; waits until it is written."""
        if self._metric is None or not values[self._metric] > self.value:
            return
        self.value, self.step = values[self._metric], step
        with contextlib.closing(Checkpoints(self._directory, keep=1, permanent=0)) as checkpoints:
            checkpoints.save(step, state, {self._metric: self.value})
        if jax.process_index() == 0:
            record = {"metric": self._metric, "value": self.value, "step": step}
            temporary = self._record.with_suffix(".tmp")
            temporary.write_text(json.dumps(record | {"checkpoint": str(self._directory / str(step))}) + "\n")
            temporary.replace(self._record)

"""Checkpoints: Orbax behind one small face.

A checkpoint is one train state and one small JSON record, written asynchronously and sharded, restored onto whatever
mesh the new run has. `directory/<step>` is complete or it is not read: Orbax writes beside it and renames.
"""

import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

STATE, RECORD = "state", "record"


def steps(directory: Path) -> list[int]:
    """Returns the steps of all complete checkpoints below `directory`, in order."""
    if not directory.is_dir():
        return []
    return sorted(int(entry.name) for entry in directory.iterdir() if entry.name.isdigit() and _complete(entry))


def _complete(checkpoint: Path) -> bool:
    return (checkpoint / "_CHECKPOINT_METADATA").exists() and (checkpoint / STATE).is_dir()


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
        ValueError: there is no complete checkpoint, or it holds another model's or optimizer's arrays; the sentence
            names some that differ.
    """
    if not _complete(checkpoint):
        raise ValueError(f"{checkpoint} holds no complete checkpoint; name a directory <workdir>/checkpoints/<step>")
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


def _refuse_other_model(checkpoint: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    differing = [
        f"{name} is {_shape(stored, name)} there and {_shape(wanted, name)} here"
        for name in sorted(stored.keys() | wanted.keys(), key=lambda name: (not name.startswith("params/"), name))
        if stored.get(name) != wanted.get(name)
    ]
    if differing:
        shown = "; ".join(differing[:5])
        more = f"; and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise ValueError(f"{checkpoint} belongs to another model or optimizer: {shown}{more}")


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
        if jax.process_index() == 0 and self.directory.is_dir():
            for entry in self.directory.iterdir():
                if entry.name.isdigit() and not _complete(entry):
                    # What a crash left behind would stand in the way of the same step's next save.
                    logging.warning("removing the unfinished checkpoint %s", entry)
                    shutil.rmtree(entry)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=permanent or None, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=_handlers())

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Starts to write a checkpoint; returns once the state's memory may be reused."""
        args = {STATE: ocp.args.StandardSave(state), RECORD: ocp.args.JsonSave(record)}
        self._manager.save(step, args=ocp.args.Composite(**args), force=True)

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()

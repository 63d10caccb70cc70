"""Checkpoints of runs: which are complete, whether they are intact, and what they hold.

`<workdir>/checkpoints/<step>` is complete once it holds `commit_success.txt`, which Orbax writes last. Its record holds
a digest of every array and of itself, so that a checkpoint damaged by a disk, a copy or a hand is noticed when it is
read. `training/checkpoint.py` writes them.

The digest of an array is 64 bits and does not depend on how the array is sharded. Any change within one element is
noticed; other damage is missed with a probability of about 2^-64.
"""

import functools
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from vit_scaling import UserError, paths

STATE, RECORD = "state", "record"
MARKER = "commit_success.txt"
_MAX_JSON = 1 << 26  # bytes
_CHUNK = 1 << 14  # elements that the NumPy digest hashes at a time: few enough for the caches
# Odd multipliers of two independent mixes (the constants of MurmurHash3 and xxHash).
_MIXES = ((0x9E3779B1, 0x85EBCA6B), (0xC2B2AE35, 0x27D4EB2F))
# Words of errors that come from the machine and not from the checkpoint.
_TRANSIENT = ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "CANCELLED")
_damaged: set[Path] = set()  # found in this process


class DamagedError(UserError):
    """A checkpoint that cannot be read or does not hold what was written."""


# ---- Which checkpoints there are


def steps(directory: Path) -> list[int]:
    """Returns the steps of all complete checkpoints below `directory`, in order."""
    if not directory.is_dir():
        return []
    return sorted(int(entry.name) for entry in directory.iterdir() if entry.name.isdigit() and complete(entry))


def complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    return (checkpoint / MARKER).is_file() and (checkpoint / STATE).is_dir()


def require(checkpoint: Path) -> None:
    """Raises UserError unless `checkpoint` is a complete one."""
    if not complete(checkpoint):
        raise UserError(f"{checkpoint} holds no complete checkpoint; name a directory <workdir>/checkpoints/<step>")


def find_checkpoint(path: Path) -> Path | None:
    """Returns the checkpoint that a path names, `<workdir>/checkpoints/<step>` or a workdir's newest; None if none.

    A newest checkpoint that `read_arrays` found damaged is passed over.

    Raises:
        UserError: a workdir without a complete checkpoint.
    """
    if path.name.isdigit() and (path.parent.parent / "config.json").exists():
        return path
    if not (path / "config.json").exists() or not (path / "checkpoints").is_dir():
        return None
    if not (found := steps(path / "checkpoints")):
        raise UserError(f"the run {path} has no complete checkpoint yet")
    checkpoints = [path / "checkpoints" / str(step) for step in found]
    return next((each for each in reversed(checkpoints) if each not in _damaged), checkpoints[-1])


def record_of(checkpoint: Path) -> dict[str, Any]:
    """Returns what config.json of a checkpoint's run says.

    Raises:
        UserError: it is damaged.
    """
    return read_config(checkpoint.parent.parent)


def read_config(workdir: Path) -> dict[str, Any]:
    """Returns what config.json of a run says.

    Raises:
        UserError: it is damaged.
    """
    path = workdir / "config.json"
    try:
        with path.open("rb") as file:
            record = json.loads(file.read(_MAX_JSON))  # of a larger file, which is none, the beginning
        if isinstance(record["config"], dict):
            return record
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(f"{path} is damaged: it is not the JSON of a run's config; restore it from a copy")


# ---- What a checkpoint holds


def read_arrays(path: Path, names: tuple[str, ...]) -> tuple[Path, dict[str, Any]]:
    """Returns (checkpoint, parts of its state as nested dicts of NumPy arrays, {} for one that is empty).

    Args:
        path: `<workdir>/checkpoints/<step>`, or a workdir, of which the newest intact checkpoint is read.
        names: of "params", "statistics", "ema".

    Raises:
        UserError: the checkpoint is not complete or damaged; of a workdir, every one is.
    """
    found = find_checkpoint(path) or path
    require(found)
    if found == path:
        return found, _read_arrays(found, names)
    failures = []
    for step in reversed(steps(path / "checkpoints")):
        found = path / "checkpoints" / str(step)
        try:
            return found, _read_arrays(found, names)
        except DamagedError as error:
            logging.warning("%s; the checkpoint before it is used", error)
            _damaged.add(found)
            failures.append(str(error))
    raise UserError(f"the run {path} has no intact checkpoint: {'; '.join(failures)}")


def _read_arrays(checkpoint: Path, names: tuple[str, ...]) -> dict[str, Any]:
    with reading(checkpoint):
        handler = ocp.CompositeCheckpointHandler(**(handlers() | {STATE: ocp.PyTreeCheckpointHandler()}))
        with ocp.Checkpointer(handler) as checkpointer:
            metadata = checkpointer.metadata(paths.absolute(checkpoint))
            tree = getattr(metadata, "item_metadata", metadata)[STATE].tree
            part = {name: tree[name] for name in names if tree.get(name)}
            kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), part)
            args = ocp.args.PyTreeRestore(item=part, restore_args=kinds, partial_restore=True)
            read = ocp.args.Composite(**{STATE: args, RECORD: ocp.args.JsonRestore()})
            item = checkpointer.restore(paths.absolute(checkpoint), args=read)
    verify(checkpoint, item[RECORD], {path: numpy_digest(leaf) for path, leaf in leaves(item[STATE]).items()})
    return {name: item[STATE].get(name, {}) for name in names}


def handlers() -> dict[str, Any]:
    """Returns Orbax's handlers of a checkpoint's two items."""
    return {STATE: ocp.StandardCheckpointHandler(), RECORD: ocp.JsonCheckpointHandler()}


class reading:  # noqa: N801 (used as a function)
    """A context that turns what a library raises on a damaged checkpoint into DamagedError."""

    def __init__(self, checkpoint: Path):
        self._checkpoint = checkpoint

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        chain: list[BaseException] = []
        while error is not None:
            chain.append(error)
            error = error.__cause__
        damage = (ValueError, KeyError, TypeError, AttributeError, IndexError, FileNotFoundError, NotADirectoryError)
        if not chain or isinstance(chain[0], UserError) or not isinstance(chain[-1], damage):
            return
        # Orbax wraps TensorStore's error in a bare Exception.
        if type(chain[0]) is not Exception and not isinstance(chain[0], damage):
            return
        text = str(chain[-1])
        if not any(word in text for word in _TRANSIENT):
            first = " ".join((text.splitlines() or [type(chain[-1]).__name__])[0].split())[:200]
            raise DamagedError(f"{self._checkpoint} is damaged and cannot be read ({first})") from chain[0]


def leaves(tree: Any) -> dict[str, Any]:
    """Returns {path: leaf} of any pytree, by the names under which Orbax stores its leaves."""
    named = {}
    for key_path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        parts = [getattr(key, "key", getattr(key, "name", getattr(key, "idx", ""))) for key in key_path]
        named["/".join(str(part) for part in parts)] = leaf
    return named


# ---- Digests


def seal(record: Mapping[str, Any], digests: Mapping[str, str]) -> dict[str, Any]:
    """Returns a checkpoint's record with the digests of its arrays and of the record itself."""
    # A copy: the record is written in the background, while its owner goes on changing it.
    whole = json.loads(json.dumps({**record, "digests": dict(digests)}))
    return whole | {"sha256": _sha256(whole)}


def verify(checkpoint: Path, record: Any, digests: Mapping[str, str]) -> None:
    """Raises DamagedError unless the record is as written and these digests are those in it.

    A record of a version that had no digests passes, with a warning.
    """
    if not isinstance(record, dict):
        raise DamagedError(f"{checkpoint} is damaged: its record is no JSON object")
    if record and not record.keys() & {"digests", "sha256", "step"}:
        logging.warning("%s was written without digests, so damage to it would not be noticed", checkpoint)
        return
    whole = {name: value for name, value in record.items() if name != "sha256"}
    if record.get("sha256") != _sha256(whole):
        raise DamagedError(f"{checkpoint} is damaged: its record is not what was written")
    differing = [path for path, digest in digests.items() if record["digests"].get(path) != digest]
    if differing:
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise DamagedError(f"{checkpoint} is damaged: the array {differing[0]}{more} is not what was written")


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digests(tree: Any) -> dict[str, str]:
    """Returns {path: digest} of arrays on the devices, each computed where it lies; the same in every process."""
    named = leaves(tree)
    if not named:
        return {}
    values = jax.device_get(_on_devices(_replicated(next(iter(named.values()))))(list(named.values())))
    return {path: _hex(row) for path, row in zip(named, values, strict=True)}


def _replicated(leaf: Any) -> jax.sharding.Sharding | None:
    on = getattr(leaf, "sharding", None)  # NumPy arrays have none
    return jax.sharding.NamedSharding(on.mesh, jax.P()) if isinstance(on, jax.sharding.NamedSharding) else None


@functools.cache
def _on_devices(replicated: jax.sharding.Sharding | None) -> Any:
    def digest(arrays: list[jax.Array]) -> jax.Array:
        return jnp.stack([_device_digest(array) for array in arrays])

    return jax.jit(digest, out_shardings=replicated)


@jax.jit  # traced once for all arrays of one shape
def _device_digest(array: jax.Array) -> jax.Array:
    """Returns the digest as two uint32: over all elements, the sums of a mix of an element's bits and its index."""
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}")).astype(jnp.uint32)
    index = jnp.zeros(array.shape, jnp.uint32)
    for dim in range(array.ndim):
        stride = jnp.uint32(math.prod(array.shape[dim + 1 :]) & 0xFFFFFFFF)
        index += jax.lax.broadcasted_iota(jnp.uint32, array.shape, dim) * stride
    mixes = []
    for first, second in _MIXES:
        mixed = (bits ^ (index * jnp.uint32(first))) * jnp.uint32(second)
        mixes.append(mixed ^ (mixed >> jnp.uint32(15)))
    # One reduction of both mixes: on the CPU it is vectorized, and seven times as fast as two of one mix each.
    zero = jnp.uint32(0)
    sums = jax.lax.reduce(mixes, [zero, zero], lambda a, b: [a[0] + b[0], a[1] + b[1]], range(array.ndim))
    return jnp.stack(sums)


def numpy_digest(array: np.ndarray) -> str:
    """Returns the digest of an array on the host."""
    flat = np.ascontiguousarray(array).reshape(-1)
    flat = flat.view(f"uint{8 * flat.dtype.itemsize}")
    sums = [0, 0]
    for start in range(0, flat.size, _CHUNK):
        bits = flat[start : start + _CHUNK].astype(np.uint32)
        index = np.arange(start, start + bits.size, dtype=np.uint64).astype(np.uint32)
        for lane, (first, second) in enumerate(_MIXES):
            mixed = (bits ^ (index * np.uint32(first))) * np.uint32(second)
            sums[lane] += int(np.sum(mixed ^ (mixed >> np.uint32(15)), dtype=np.uint64))
    return _hex(np.array([value & 0xFFFFFFFF for value in sums], np.uint32))


def _hex(row: np.ndarray) -> str:
    return "".join(f"{int(value):08x}" for value in row)

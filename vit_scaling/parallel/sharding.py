"""How arrays are sharded: one table for parameters, one constraint for activations.

Parameters are known by their paths (see vit_scaling.names). The table names, for the last axes of a parameter, the
mesh axis that splits each. Leading axes that the table does not name, the stacked layers, are never split.
"""

import functools
import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, Sharding
from jax.sharding import Mesh as DeviceMesh

from vit_scaling import UserError, names

# A mesh of devices, or an abstract one, which is enough to plan.
Mesh = DeviceMesh | AbstractMesh

BATCH_AXES = ("replica", "data", "fold")
STORAGE_AXES = ("data", "fold")

# A leaf of fewer elements is replicated: sharding it saves little and costs a gather.
MIN_SHARDED_SIZE = 2**16

# "data" is storage (gathered before use), "model" is tensor parallelism (each device computes its heads or hidden
# units). Width is an input of query, key, value, up and gate, and an output of out and down.
RULES: tuple[tuple[str, tuple[str | None, ...] | None], ...] = (
    # Relative positions in windows: an odd number of rows and few heads, small beside the kernels. They stay whole.
    (r".*/(relative_position_bias_table|cpb_mlp/.*)", None),
    (r".*/(query|key|value)/kernel", ("data", "model", None)),
    (r".*/(query|key|value)/bias", ("model", None)),
    (r".*/out/kernel", ("model", None, "data")),
    (r".*/(up|gate)/kernel", ("data", "model")),
    (r".*/(up|gate)/bias", ("model",)),
    (r".*/down/kernel", ("model", "data")),
    (r"head/kernel", ("data", "model")),
    (r"head/bias", ("model",)),
)

# The number of classes is given by the data: where `model` does not divide it, the classifier is not split over it.
CLASSES = ("head/kernel", "head/bias")


def constrain(x: jax.Array) -> jax.Array:
    """Keeps the leading axis of an activation split over the batch axes of the mesh; without a mesh, the identity.

    One such constraint at each block's entry is what keeps XLA from gathering the batch under FSDP.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES, *(None,) * (x.ndim - 1)))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its leading axis over BATCH_AXES."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


@functools.lru_cache(maxsize=8)
def batch_parts(on: Sharding) -> tuple[tuple[int, ...], int]:
    """Returns (parts, count): a batch lies on the mesh in `count` equal parts, of which this process holds `parts`.

    Processes along `model` hold the same parts; on a torus, the parts of one process need not be neighbours.
    """
    start = {device: index[0].start or 0 for device, index in on.devices_indices_map((on.num_devices,)).items()}
    starts = sorted(set(start.values()))
    own = sorted({start[device] for device in on.addressable_devices})
    return tuple(starts.index(place) for place in own), len(starts)


def put_batch(local: dict[str, np.ndarray], on: Sharding) -> dict[str, jax.Array]:
    """Returns the global batch, of which `local` is what `batch_parts` says, in order, on the devices."""
    parts, count = batch_parts(on)

    def put(value: np.ndarray) -> jax.Array:
        size = len(value) // len(parts)
        rows = {part * size: value[place * size : (place + 1) * size] for place, part in enumerate(parts)}

        def rows_at(index: Any) -> np.ndarray:
            return rows[index[0].start or 0]

        with jax.transfer_guard_host_to_device("allow"):  # the one transfer that is intended
            return jax.make_array_from_callback((count * size, *value.shape[1:]), on, rows_at)

    return {name: put(value) for name, value in local.items()}


def check_batch(batch_size: int, mesh: Mesh, accumulate: int = 1, name: str = "data.batch_size") -> None:
    """Raises ValueError unless every microbatch can be divided evenly over the devices that share it."""
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % (shards * accumulate):
        steps = f" in each of {accumulate} accumulation steps" if accumulate > 1 else ""
        raise UserError(
            f"{name} {batch_size} cannot be divided over {shards} devices{steps}; "
            f"choose a multiple of {shards * accumulate}"
        )


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Returns how the leaf `path` of this shape is split over the mesh.

    `data` and `fold` together go to the axis that the rule names for `data`, or where they do not divide that or no
    rule names the leaf, to the largest axis that they divide. Where they divide none, each goes to an axis of its own.
    Small leaves are not split over them.

    Raises:
        UserError: a layer of the leaf is large and no mesh axis divides any of its axes, or `model` does not divide
            the heads or hidden units that it is to split.
    """
    # An axis of length one is one over which a factored second moment was averaged: nothing to split.
    stacked = names.stacked_dims(path)
    free = [dim for dim in range(stacked, len(shape)) if shape[dim] > 1]
    spec: list[str | tuple[str, ...] | None] = [None] * len(shape)
    rank = len(shape) - stacked
    rules = (axes for pattern, axes in RULES if re.fullmatch(pattern, path))
    named = next((axes for axes in rules if axes is None or len(axes) == rank), ())
    if named is None:
        return PartitionSpec(*spec)
    preferred = {axis: stacked + dim for dim, axis in enumerate(named) if axis}
    dim = preferred.get("model")
    if dim in free and mesh.shape["model"] > 1:
        if shape[dim] % mesh.shape["model"] == 0:
            spec[dim] = "model"
            free.remove(dim)
        elif not path.endswith(CLASSES):
            raise UserError(
                f"mesh.model={mesh.shape['model']} does not divide axis {dim} of {path} with shape {shape}; "
                f"choose a size of the model axis that divides {shape[dim]}"
            )

    def place(size: int) -> int | None:
        """Returns the axis that so many devices split: the rule's, or the largest that they divide, or none."""
        divisible = [dim for dim in free if shape[dim] % size == 0]
        dim = preferred.get("data")
        return dim if dim in divisible else max(divisible, key=lambda dim: shape[dim], default=None)

    sizes = {axis: mesh.shape[axis] for axis in STORAGE_AXES if mesh.shape[axis] > 1}
    if math.prod(shape) < MIN_SHARDED_SIZE or not sizes:
        return PartitionSpec(*spec)
    dim = place(math.prod(sizes.values()))
    if dim is not None:
        spec[dim] = tuple(sizes) if len(sizes) > 1 else next(iter(sizes))
        return PartitionSpec(*spec)
    for axis, size in sizes.items():
        dim = place(size)
        if dim is not None:
            spec[dim] = axis
            free.remove(dim)
    if not any(spec) and math.prod(shape[stacked:]) >= MIN_SHARDED_SIZE:
        raise UserError(
            f"{path} with shape {shape} is large and mesh.data={math.prod(sizes.values())} divides no axis of it; "
            "choose a data axis that divides one, and put the rest of the devices on mesh.replica"
        )
    return PartitionSpec(*spec)


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns a NamedSharding for every leaf of a pytree of arrays or shapes: parameters, or a whole train state.

    A leaf of the optimizer's state is known by the parameter's path, which is the tail of its own, so it is split
    as its parameter; factored moments, which have fewer axes, go by size.
    """

    def sharding(key_path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        path = "/".join(str(key.key) for key in key_path if isinstance(key, jax.tree_util.DictKey))
        return NamedSharding(mesh, partition_spec(path, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, tree)


class Row(NamedTuple):
    """How one parameter is split."""

    path: str
    shape: tuple[int, ...]
    spec: PartitionSpec
    bytes_per_device: int

    @property
    def split(self) -> str:
        """Which mesh axes split which axes, as "data 0, model 1"; "-" where none does."""
        named = [
            (axis if isinstance(axis, str) else " x ".join(axis), dim) for dim, axis in enumerate(self.spec) if axis
        ]
        return ", ".join(f"{axis} {dim}" for axis, dim in named) or "-"


def describe(tree: Any, mesh: Mesh) -> list[Row]:
    """Returns a row for every leaf of nested dicts of arrays or shapes."""
    rows = []
    for path, leaf in names.flatten(tree).items():
        on = NamedSharding(mesh, partition_spec(path, leaf.shape, mesh))
        size = math.prod(on.shard_shape(leaf.shape))
        rows.append(Row(path, tuple(leaf.shape), on.spec, size * leaf.dtype.itemsize))
    return rows

"""What is sharded how: one table for parameters, one constraint for activations.

Parameters are known by their paths (see vit_scaling.paths). The table names, for the last axes of a parameter, the
mesh axis that splits each. Leading axes that the table does not name, the stacked layers, are never split.
"""

import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from vit_scaling import paths

BATCH_AXES = ("replica", "data")

# A leaf of fewer elements than this stays whole on every device: splitting it saves nothing and costs a gather.
MIN_SHARDED_SIZE = 2**16

# "data" is storage (gathered before use), "model" is tensor parallelism (each device computes its heads or hidden
# units). Width is an input of query, key, value and up, and an output of out and down.
RULES: tuple[tuple[str, tuple[str | None, ...] | None], ...] = (
    # Relative positions in windows: an odd number of rows and few heads, small beside the kernels. They stay whole.
    (r".*/(relative_position_bias_table|cpb_mlp/.*)", None),
    (r".*/(query|key|value)/kernel", ("data", "model", None)),
    (r".*/(query|key|value)/bias", ("model", None)),
    (r".*/out/kernel", ("model", None, "data")),
    (r".*/up/kernel", ("data", "model")),
    (r".*/up/bias", ("model",)),
    (r".*/down/kernel", ("model", "data")),
    (r"head/kernel", ("data", "model")),
    (r"head/bias", ("model",)),
)


def constrain(x: jax.Array) -> jax.Array:
    """Keeps the leading axis of an activation split over the batch axes of the mesh; without a mesh, the identity.

    One such constraint at each block's entry is what keeps XLA from gathering the batch under FSDP.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES, *(None,) * (x.ndim - 1)))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its leading axis over `replica` and `data`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def put_batch(local: dict[str, np.ndarray], on: Sharding) -> dict[str, jax.Array]:
    """Returns the global batch of which `local` is this process's part, on the devices."""
    return {name: jax.make_array_from_process_local_data(on, value) for name, value in local.items()}


def check_batch(batch_size: int, mesh: Mesh, accumulate: int = 1, name: str = "data.batch_size") -> None:
    """Raises ValueError unless every microbatch can be divided evenly over the devices that share it."""
    shards = mesh.shape["replica"] * mesh.shape["data"]
    if batch_size % (shards * accumulate):
        steps = f" in each of {accumulate} accumulation steps" if accumulate > 1 else ""
        raise ValueError(
            f"{name} {batch_size} cannot be divided over {shards} devices{steps}; "
            f"choose a multiple of {shards * accumulate}"
        )


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Returns how the leaf `path` of this shape is split over the mesh.

    `data` goes to the axis that the rule names, or where it does not divide that or no rule names the leaf, to the
    largest axis that it divides. Small leaves are not split over `data`.

    Raises:
        ValueError: the leaf is large and no mesh axis divides any of its axes, or `model` does not divide the heads or
            hidden units that it is to split.
    """
    # An axis of length one is one over which a factored second moment was averaged: nothing to split.
    free = [dim for dim in range(paths.stacked_dims(path), len(shape)) if shape[dim] > 1]
    spec: list[str | None] = [None] * len(shape)
    rank = len(shape) - paths.stacked_dims(path)
    rules = (axes for pattern, axes in RULES if re.fullmatch(pattern, path))
    named = next((axes for axes in rules if axes is None or len(axes) == rank), ())
    if named is None:
        return PartitionSpec(*spec)
    preferred = {axis: len(shape) - rank + dim for dim, axis in enumerate(named) if axis}
    dim = preferred.get("model")
    if dim in free and mesh.shape["model"] > 1:
        if shape[dim] % mesh.shape["model"]:
            raise ValueError(
                f"mesh.model={mesh.shape['model']} does not divide axis {dim} of {path} with shape {shape}; "
                f"choose a size of the model axis that divides {shape[dim]}"
            )
        spec[dim] = "model"
        free.remove(dim)
    if math.prod(shape) >= MIN_SHARDED_SIZE and mesh.shape["data"] > 1:
        divisible = [dim for dim in free if shape[dim] % mesh.shape["data"] == 0]
        if divisible:
            dim = preferred.get("data")
            spec[dim if dim in divisible else max(divisible, key=lambda dim: shape[dim])] = "data"
        elif "model" not in spec:
            raise ValueError(
                f"{path} with shape {shape} is large and mesh.data={mesh.shape['data']} divides no axis of it; "
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
    bytes_a_device: int


def describe(tree: Any, mesh: Mesh) -> list[Row]:
    """Returns a row for every leaf of nested dicts of arrays or shapes."""
    rows = []
    for path, leaf in paths.flatten(tree).items():
        spec = partition_spec(path, leaf.shape, mesh)
        parts = math.prod(mesh.shape[axis] for axis in spec if axis)
        rows.append(Row(path, tuple(leaf.shape), spec, leaf.size * leaf.dtype.itemsize // parts))
    return rows

"""What every hand-written kernel needs: the platform it is traced for, and each device's share of the arrays."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array


def platform() -> str:
    """Returns the platform that a trace is for, "cpu", "gpu" or "tpu": that of the mesh in use, else JAX's default."""
    mesh = jax.sharding.get_abstract_mesh()
    name = jax.default_backend() if mesh.empty else mesh.abstract_device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def per_device(
    function: Callable[..., Any], *args: Array, heads: int, head_axis: int, shared: tuple[Array, ...] = ()
) -> Any:
    """Calls `function` on each device's share of batch and heads: to XLA's partitioner a kernel is a black box.

    The leading axis of every array is the batch, and `head_axis` that of the heads, of arguments and results alike. An
    axis of the mesh called "model" splits heads, all others split the batch; what they do not divide stays whole.
    `shared` are further arguments without the axis of the batch: every example has the same.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh.are_all_axes_auto:
        return function(*args, *shared)
    batch_axes = tuple(axis for axis in mesh.axis_names if axis != "model")
    spec: list[Any] = [None] * args[0].ndim
    if args[0].shape[0] % math.prod(mesh.shape[axis] for axis in batch_axes) == 0:
        spec[0] = batch_axes
    if "model" in mesh.axis_names and heads % mesh.shape["model"] == 0:
        spec[head_axis] = "model"
    on, on_shared = PartitionSpec(*spec), PartitionSpec(*spec[1:])
    in_specs = (on,) * len(args) + (on_shared,) * len(shared)
    return jax.shard_map(function, in_specs=in_specs, out_specs=on, check_vma=False)(*args, *shared)

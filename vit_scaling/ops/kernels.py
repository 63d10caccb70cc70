"""What every hand-written kernel needs: the platform it is traced for, and each device's share of the arrays."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

# A GPU older than this has no fused attention in cuDNN and no bfloat16.
_CAPABILITY = (8, 0)


def platform() -> str:
    """Returns the platform that a trace is for, "cpu", "gpu" or "tpu": that of the mesh in use, else JAX's default."""
    mesh = jax.sharding.get_abstract_mesh()
    name = jax.default_backend() if mesh.empty else mesh.abstract_device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def refused_by_gpu() -> str | None:
    """Returns why this machine's GPU runs no kernel that is made for NVIDIA's; None where it does.

    None also where there is no GPU: then a program is compiled for devices that are only described.
    """
    if jax.default_backend() != "gpu":
        return None
    capability = getattr(jax.local_devices(backend="gpu")[0], "compute_capability", None)
    if capability is None or "." not in capability:
        return "this GPU is not NVIDIA's"
    if tuple(int(part) for part in capability.split(".")) < _CAPABILITY:
        return f"a GPU of compute capability {capability} is older than what it needs, 8.0"
    return None


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


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Returns the product of two matrices inside a kernel, summed in float32 over these axes of a and of b."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)

"""What every hand-written kernel needs: the platform it is traced for, and each device's share of the arrays."""

import math
import warnings
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


def runs_on_gpu(what: str, dtype: jnp.dtype) -> bool:
    """Returns whether kernels that are made for NVIDIA's GPUs run: on these, in half precision.

    On another GPU a warning says once that `what` runs as XLA's operations.
    """
    if platform() != "gpu" or dtype not in (jnp.bfloat16, jnp.float16):
        return False
    refusal = refused_by_gpu()
    if refusal is not None:
        warnings.warn(f"{what} runs as plain XLA operations instead of a kernel: {refusal}", stacklevel=1)
    return refusal is None


def splits_heads() -> bool:
    """Returns whether the mesh in use has more than one device along its axis "model"."""
    return jax.sharding.get_abstract_mesh().shape.get("model", 1) > 1


def per_device(
    function: Callable[..., Any],
    *args: Array,
    heads: int | None = None,
    head_axis: int = 0,
    shared: tuple[Array, ...] = (),
) -> Any:
    """Calls `function` on each device's share of batch and heads: to XLA's partitioner a kernel is a black box.

    The leading axis of every array is the batch, and `head_axis` that of the heads, of arguments and results alike. An
    axis of the mesh called "model" splits heads, all others split the batch; what they do not divide stays whole.
    Without `heads` only the batch is split. `shared` are further arguments without the axis of the batch: every example
    has the same.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh.are_all_axes_auto:
        return function(*args, *shared)
    batch_axes = tuple(axis for axis in mesh.axis_names if axis != "model")
    spec: list[Any] = [None] * (head_axis + 1)  # what comes after it stays whole
    if args[0].shape[0] % math.prod(mesh.shape[axis] for axis in batch_axes) == 0:
        spec[0] = batch_axes
    if heads is not None and "model" in mesh.axis_names and heads % mesh.shape["model"] == 0:
        spec[head_axis] = "model"
    on, on_shared = PartitionSpec(*spec), PartitionSpec(*spec[1:])
    in_specs = (on,) * len(args) + (on_shared,) * len(shared)
    return jax.shard_map(function, in_specs=in_specs, out_specs=on, check_vma=False)(*args, *shared)


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Returns the product of two matrices inside a kernel, summed in float32 over these axes of a and of b."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)

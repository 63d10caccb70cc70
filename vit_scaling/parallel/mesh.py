"""The devices of a run, arranged as a mesh.

Axes, slowest network first:
  replica  across slices (DCN) or hosts: gradients are averaged over it, parameters repeated
  data     within a slice (ICI): shards the batch and the parameters (fully sharded data parallelism)
  fold     the part of a `data` axis that is beyond what divides the widths of models, see MAX_DATA
  model    nearest neighbours: splits heads and hidden units (tensor parallelism)
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

from vit_scaling import UserError
from vit_scaling.parallel import processes

AXES = ("replica", "data", "fold", "model")

# The widths of vision transformers are multiples of 128 and rarely of more: 1152, 1408 and 1664 are 9, 11 and 13 times
# 128. Where a config asks for more devices on `data`, the rest becomes `fold`, and a parameter that `data` and `fold`
# together do not divide is split by each along a dimension of its own (parallel/sharding.py).
MAX_DATA = 128


@dataclasses.dataclass
class MeshConfig:
    """How many devices each axis gets; at most one may be -1, for all the remaining devices."""

    replica: int = 1
    data: int = -1
    model: int = 1


def shape(config: MeshConfig, num_devices: int) -> tuple[int, int, int, int]:
    """Returns the size of each of AXES for this many devices; those of the config's `data` are `data` times `fold`.

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    sizes = [config.replica, config.data, config.model]
    names = [field.name for field in dataclasses.fields(config)]
    for axis, size in zip(names, sizes, strict=True):
        if size < 1 and size != -1:
            raise UserError(
                f"mesh.{axis} is {size}; it must be a positive number of devices, or -1 for all that remain"
            )
    if sizes.count(-1) > 1:
        raise UserError(f"mesh has {sizes.count(-1)} axes of -1; only one axis can take all the remaining devices")
    known = math.prod(size for size in sizes if size != -1)
    if num_devices % known or (-1 not in sizes and known != num_devices):
        axes = ", ".join(f"{axis}={size}" for axis, size in zip(names, sizes, strict=True))
        raise UserError(f"a mesh of {axes} does not fit {num_devices} devices: the sizes must multiply to that number")
    replica, data, model = (num_devices // known if size == -1 else size for size in sizes)
    main = math.gcd(data, MAX_DATA)
    return (replica, data, 1, model) if data <= MAX_DATA else (replica, main, data // main, model)


def create(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Arranges `devices` (all of the run's by default) so that nearby axes use nearby links.

    Raises:
        UserError: JAX finds no devices, the sizes do not fit them, or `replica` does not span the slices.
    """
    devices = processes.devices() if devices is None else devices
    sizes = shape(config, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes[0] % slices:
        raise UserError(
            f"mesh.replica is {sizes[0]} on {slices} slices; only the replica axis may cross the slow network (DCN) "
            f"between slices: give it a multiple of {slices}"
        )
    if devices[0].platform == "cpu":
        grid = np.asarray(devices).reshape(sizes)  # CPU devices have no links
    elif slices > 1:
        within = (sizes[0] // slices, *sizes[1:])
        grid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1, 1), devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


@contextlib.contextmanager
def tracing(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, dtype: str) -> Iterator[None]:
    """Shows the mesh to what is traced inside, with matrix products in the dtype of the computation.

    In "float32", products are computed in float32 on every platform, where JAX would let TPUs round the operands to
    bfloat16 and GPUs to TensorFloat-32.
    """
    precision = "float32" if dtype == "float32" else None
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), jax.default_matmul_precision(precision):
        yield


def compiler_options(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> dict[str, str] | None:
    """Returns the XLA options of every program on this mesh.

    XLA for TPU can multiply with a sharded kernel shard by shard while the next shard is in transfer, and prefers that
    for large batches. The partial sums then lie in the device's memory, in the dtype of the computation. With kernels
    gathered first, a ViT-B/16 step on 16 v5e chips moves 55 instead of 142 GB through each chip's memory, and no sum is
    rounded to bfloat16 sixteen times.
    """
    if isinstance(mesh, jax.sharding.AbstractMesh) or mesh.devices.flat[0].platform != "tpu":
        return None
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}

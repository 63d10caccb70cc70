"""The devices of a run, arranged as a mesh.

Axes, slowest network first:
  replica  across slices or hosts: gradients are averaged over it, parameters repeated
  data     within a slice: shards the batch and the parameters (fully sharded data parallelism)
  model    nearest neighbours: splits heads and hidden units (tensor parallelism)
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

AXES = ("replica", "data", "model")


@dataclasses.dataclass
class MeshConfig:
    """How many devices each axis gets; at most one may be -1, "all that are left"."""

    replica: int = 1
    data: int = -1
    model: int = 1


def shape(config: MeshConfig, num_devices: int) -> tuple[int, int, int]:
    """Returns the size of each axis for this many devices.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    sizes = [config.replica, config.data, config.model]
    for axis, size in zip(AXES, sizes, strict=True):
        if size < 1 and size != -1:
            raise ValueError(f"mesh.{axis} is {size}; it must be a positive number of devices, or -1 for all the rest")
    if sizes.count(-1) > 1:
        raise ValueError(f"mesh has {sizes.count(-1)} axes of -1; only one axis can take all the devices that are left")
    known = math.prod(size for size in sizes if size != -1)
    if num_devices % known or (-1 not in sizes and known != num_devices):
        axes = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ValueError(f"a mesh of {axes} does not fit {num_devices} devices: the sizes must multiply to that number")
    replica, data, model = (num_devices // known if size == -1 else size for size in sizes)
    return replica, data, model


def create(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Arranges `devices` (all of the run's by default) so that nearby axes use nearby links."""
    devices = jax.devices() if devices is None else devices
    sizes = shape(config, len(devices))
    if devices[0].platform == "cpu":
        grid = np.asarray(devices).reshape(sizes)  # host devices have no links to respect
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))

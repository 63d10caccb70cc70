"""Machines that are not here: their descriptions, and devices for which programs can be compiled but not run."""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from vit_scaling import UserError
from vit_scaling.parallel.chips import CHIPS, GPUS, TPUS, Chip

# Settings of libtpu where there is no TPU: several processes may compile at once, and neither the metadata server
# of the cloud nor this host is asked what it is. They do not say which machine is compiled for.
_LIBTPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
}

# Two-dimensional slices come in these shapes; three-dimensional ones in these or with all sides multiples of 4.
_SHAPES_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16", "16x32", "32x32")
_SHAPES_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine: `slices` slices of `shape`, or a number of GPUs in nodes of eight."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    def __str__(self) -> str:
        size = "x".join(str(side) for side in self.shape)
        if not self.chip.dims:
            return f"gpu:{self.chip.name}x{size}"
        return f"{self.slices} x {self.chip.name}:{size}" if self.slices > 1 else f"{self.chip.name}:{size}"


def topology(text: str, slices: int = 1) -> Topology:
    """Reads a description such as "v5e:4x4", "v5p:8x8x8", "gpu:h100x8", or Cloud TPU's own such as "v5litepod-16".

    Raises:
        UserError: there is no such chip, or it does not come in this shape; the sentence names those that there are.
    """
    kind, _, size = _of_accelerator_type(text).partition(":")
    if slices < 1:
        raise UserError(f"the number of slices is {slices}; it must be at least 1")
    if kind == "gpu":
        match = re.fullmatch(r"([\w\-]+?)x(\d+)", size)
        if match is None or match[1] not in GPUS or not int(match[2]):
            raise UserError(
                f"there are no GPUs {size!r}; write gpu:NAMExNUMBER, such as gpu:h100x8, with one of {', '.join(GPUS)}"
            )
        if slices > 1:
            raise UserError(
                f"{text} has no slices; the network between nodes of {CHIPS[match[1]].largest} GPUs is the slow one"
            )
        return Topology(CHIPS[match[1]], (int(match[2]),))
    if kind not in TPUS:
        raise UserError(f"there is no chip {kind!r}; write NAME:SHAPE with one of {', '.join(TPUS)}, or gpu:h100x8")
    chip = CHIPS[kind]
    shape = tuple(int(side) for side in size.split("x")) if re.fullmatch(r"\d+(x\d+)*", size) else ()
    if not _comes_in(chip, size, shape):
        if chip.dims == 2:
            legal = [s for s in _SHAPES_2D if math.prod(int(side) for side in s.split("x")) <= chip.largest]
            choices = f"its shapes are {', '.join(legal)}"
        else:
            choices = (
                f"its shapes are {', '.join(_SHAPES_3D)}, and AxBxC with A <= B <= C, all multiples of 4, up to "
                f"{chip.largest} chips, such as 4x4x8"
            )
        raise UserError(f"{kind} does not come as {size!r}; {choices}")
    return Topology(chip, shape, slices)


def _of_accelerator_type(text: str) -> str:
    """Returns NAME:SHAPE for one of Cloud TPU's accelerator types, in its default shape; any other text as it is.

    The number counts TensorCores up to v5p, of which a chip has two, and chips for v5litepod and v6e.

    Raises:
        UserError: no slice has so many chips.
    """
    found = re.fullmatch(r"(v2|v3|v4|v5litepod|v5p|v6e)-(\d+)", text)
    if found is None:
        return text
    chip = CHIPS[found[1].replace("v5litepod", "v5e")]
    per_chip = 1 if chip.name in ("v5e", "v6e") else 2
    chips, rest = divmod(int(found[2]), per_chip)
    if chip.dims == 2:
        shapes = [tuple(map(int, shape.split("x"))) for shape in _SHAPES_2D]
    else:
        sides = range(4, 4 * chip.largest, 4)
        shapes = [tuple(map(int, shape.split("x"))) for shape in _SHAPES_3D]
        shapes += [
            (a, b, chips // (a * b))
            for a in sides
            if a**3 <= chips
            for b in range(a, math.isqrt(chips // a) + 1, 4)
            if chips % (4 * a * b) == 0
        ]
    fitting = [shape for shape in shapes if not rest and math.prod(shape) == chips <= chip.largest]
    if not fitting:
        raise UserError(
            f"there is no {text}: no {chip.name} slice has {int(found[2]) / per_chip:g} chips; write NAME:SHAPE"
        )
    return f"{chip.name}:{'x'.join(map(str, min(fitting, key=sum)))}"  # the most compact


def _comes_in(chip: Chip, size: str, shape: tuple[int, ...]) -> bool:
    if len(shape) != chip.dims or math.prod(shape) > chip.largest:
        return False
    if chip.dims == 2:
        return size in _SHAPES_2D
    return size in _SHAPES_3D or (all(side and side % 4 == 0 for side in shape) and shape == tuple(sorted(shape)))


def compiler(machine: Topology) -> str | None:
    """Returns the package that compiles for a machine's devices, where it is installed."""
    packages = ("libtpu",) if machine.chip.dims else ("jax_cuda12_plugin", "jax_cuda13_plugin")
    return next((package for package in packages if importlib.util.find_spec(package)), None)


def describe_devices(machine: Topology) -> Sequence[jax.Device]:
    """Returns devices that are not here, for which programs can be compiled and not run.

    Raises:
        UserError: the compiler is not installed.
        RuntimeError: the compiler does not know the machine.
    """
    if compiler(machine) is None:
        package = "libtpu, the TPU compiler," if machine.chip.dims else "the CUDA compiler"
        wanted = '"jax[tpu]"' if machine.chip.dims else "jax-cuda12-plugin"
        raise UserError(f"{package} is not installed; it comes with: pip install {wanted}")
    from jax.experimental import topologies

    platform, name, options = _tpus(machine) if machine.chip.dims else _gpus(machine)
    try:
        found = topologies.get_topology_desc(platform=platform, topology_name=name, **options).devices
    except Exception as error:
        raise RuntimeError(f"the compiler cannot describe {machine}: {str(error).splitlines()[0]}") from error
    assert len(found) == machine.devices, f"{machine}: {len(found)} devices, not {machine.devices}"
    return found


def _tpus(machine: Topology) -> tuple[str, str, dict[str, Any]]:
    """Returns the platform, name and options by which libtpu knows a machine."""
    for name, value in _LIBTPU.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {}
    if machine.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip are one device, as in real jobs
    if machine.shape == (1, 1):
        options["chips_per_host_bounds"] = (1, 1, 1)
    if machine.slices > 1:
        options["num_slices"] = machine.slices
    return "tpu", f"{machine.chip.name}:{'x'.join(str(side) for side in machine.shape)}", options


def _gpus(machine: Topology) -> tuple[str, str, dict[str, Any]]:
    """Returns the same for XLA's CUDA compiler, which needs a description of the GPU."""
    chip = machine.chip
    nodes, rest = divmod(machine.devices, chip.largest)
    hosts = f"1x{nodes}x{chip.largest}" if nodes and not rest else f"1x1x{machine.devices}"
    major, minor = chip.capability
    target = f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          core_count: {chip.sms} fpus_per_core: {64 if major == 8 else 128} clock_rate_ghz: 1.5
          shared_memory_per_block: {48 * 1024} shared_memory_per_block_optin: {(chip.shared - 1) * 1024}
          shared_memory_per_core: {chip.shared * 1024} l2_cache_size: {chip.l2 * 2**20}
          memory_bandwidth: {int(chip.bandwidth)} device_memory_size: {int(chip.memory)}
          cuda_compute_capability {{ major: {major} minor: {minor} }}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }}
        runtime_version {{ major: 12 minor: 8 }}
        device_description_str: "{chip.device_kind}"
    """
    return "cuda", chip.name, {"target_config": target, "topology": hosts}

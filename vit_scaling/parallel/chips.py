"""The table of accelerators: peak FLOP/s, memory and network speed of each.

Peaks are the vendors' published ones: Google Cloud's pages of each TPU version, Jouppi et al. 2020 (v2 and v3) and
NVIDIA's data sheets, for dense bfloat16. The memory of a TPU is what its compiler will fill, by its own error message.
Network speeds count one direction, what a device can receive. Between slices and nodes (DCN) it is the device's share
of the host's network card as the larger clouds offer it.
"""

import dataclasses
from typing import Any

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator; rates and memory are per JAX device, of which a chip may have two."""

    name: str
    device_kind: str  # jax.Device.device_kind
    devices: int  # JAX devices per chip
    flops: float  # FLOP/s, dense bfloat16
    memory: float  # bytes that a program can use, per device
    bandwidth: float  # bytes/s, device memory
    ici: float  # bytes/s received over all links within a slice (ICI) or a node (NVLink)
    dcn: float  # bytes/s received between slices (DCN) or nodes
    dims: int = 0  # axes of a TPU slice; 0 for GPUs
    largest: int = 8  # chips of the largest slice, or GPUs of a node
    sms: int = 0  # of a GPU: streaming multiprocessors,
    capability: tuple[int, int] = (0, 0)  # compute capability,
    shared: int = 0  # KiB of shared memory on each multiprocessor,
    l2: int = 0  # and MiB of L2 cache


def _gpu(
    name: str, kind: str, flops: float, memory: float, bandwidth: float, ici: float, dcn: float, *own: Any
) -> Chip:
    """Returns a GPU; `own` are sms, capability, shared and l2."""
    return Chip(name, kind, 1, flops, memory, bandwidth, ici, dcn, 0, 8, *own)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v2", "TPU v2", 2, 22.5e12, 7.48 * GIB, 350e9, 124e9, 1.5e9, 2, 256),
        Chip("v3", "TPU v3", 2, 61.5e12, 15.48 * GIB, 450e9, 164e9, 1.5e9, 2, 1024),
        Chip("v4", "TPU v4", 1, 275e12, 30.75 * GIB, 1228e9, 300e9, 6.25e9, 3, 4096),
        Chip("v5e", "TPU v5 lite", 1, 197e12, 15.75 * GIB, 819e9, 200e9, 3.125e9, 2, 256),
        Chip("v5p", "TPU v5", 1, 459e12, 95.73 * GIB, 2765e9, 600e9, 6.25e9, 3, 8960),
        Chip("v6e", "TPU v6 lite", 1, 918e12, 31.24 * GIB, 1640e9, 400e9, 12.5e9, 2, 256),
        Chip("tpu7x", "TPU7x", 2, 1153.5e12, 94.74 * GIB, 3690e9, 300e9, 6.25e9, 3, 9216),
        _gpu("a100-40gb", "NVIDIA A100-SXM4-40GB", 312e12, 40e9, 1555e9, 300e9, 25e9, 108, (8, 0), 164, 40),
        _gpu("a100", "NVIDIA A100-SXM4-80GB", 312e12, 80e9, 2039e9, 300e9, 25e9, 108, (8, 0), 164, 40),
        _gpu("h100", "NVIDIA H100 80GB HBM3", 989e12, 80e9, 3350e9, 450e9, 50e9, 132, (9, 0), 228, 50),
        _gpu("h200", "NVIDIA H200", 989e12, 141e9, 4800e9, 450e9, 50e9, 132, (9, 0), 228, 50),
        _gpu("b200", "NVIDIA B200", 2250e12, 180e9, 7700e9, 900e9, 50e9, 148, (10, 0), 228, 126),
    )
}
TPUS = tuple(chip.name for chip in CHIPS.values() if chip.dims)
GPUS = tuple(chip.name for chip in CHIPS.values() if not chip.dims)


def peak_flops(device: jax.Device, given: float | None = None) -> float | None:
    """Returns the FLOP/s of a device against which MFU is measured: as given, else published; None if neither."""
    known = {chip.device_kind: chip.flops for chip in CHIPS.values()}
    return given if given is not None else known.get(device.device_kind)

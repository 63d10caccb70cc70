"""Machines by Cloud TPU's own names: what each number counts, and the shape of a slice."""

import pytest

from vit_scaling import UserError
from vit_scaling.planner import machines


@pytest.mark.parametrize(
    ("accelerator", "machine", "devices"),
    [  # TensorCores up to v5p, two on each chip; a v4 or v5p chip is one device and a v2 or v3 chip two
        ("v2-8", "v2:2x2", 8),
        ("v3-32", "v3:4x4", 32),
        ("v4-8", "v4:2x2x1", 4),
        ("v4-4096", "v4:8x16x16", 2048),
        ("v5p-128", "v5p:4x4x4", 64),
        ("v5p-3072", "v5p:8x12x16", 1536),
        # chips
        ("v5litepod-1", "v5e:1x1", 1),
        ("v5litepod-256", "v5e:16x16", 256),
        ("v6e-8", "v6e:2x4", 8),
    ],
)
def test_accelerator_types_of_cloud_tpu(accelerator: str, machine: str, devices: int) -> None:
    assert str(machines.topology(accelerator)) == machine
    assert machines.topology(accelerator) == machines.topology(machine)
    assert machines.topology(accelerator).devices == devices


@pytest.mark.parametrize(
    ("accelerator", "sentence"),
    [
        ("v5litepod-512", "no v5e slice has 512 chips; write NAME:SHAPE"),
        ("v5p-9", "no v5p slice has 4.5 chips"),
        ("v4-0", "no v4 slice has 0 chips"),
        ("v9-8", "there is no chip 'v9-8'"),
    ],
)
def test_accelerator_types_that_do_not_exist(accelerator: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        machines.topology(accelerator)

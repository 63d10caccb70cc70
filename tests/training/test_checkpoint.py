"""Checkpoints: complete or not read, this model's or refused, and at home on any mesh."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests import tiny
from vit_scaling import config as c
from vit_scaling.parallel import mesh as mesh_lib
from vit_scaling.parallel import sharding
from vit_scaling.training import checkpoint
from vit_scaling.training.step import Program, build


def program(devices: int, config: c.Config | None = None, **axes: int) -> Program:
    config = c.resolve(config or tiny.config(), 100)
    mesh = mesh_lib.create(c.MeshConfig(**axes), jax.devices()[:devices])
    return build(config, num_classes=10, total_steps=8, mesh=mesh)


@pytest.fixture(autouse=True)
def split_small_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The state of eight devices, (replica, data, model) = (1, 4, 2), saved at steps 1 to 5."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
        state = program(8, data=4, model=2).init()
    writer = checkpoint.Checkpoints(directory, keep=2, permanent=2)
    for step in range(1, 6):
        writer.save(step, state, {"seconds": {"step": float(step)}})
    writer.close()
    return directory, jax.device_get(state)


def test_the_last_few_and_the_permanent_ones_stay(saved: tuple[Path, Any]) -> None:
    assert checkpoint.steps(saved[0]) == [2, 4, 5]
    assert checkpoint.steps(saved[0] / "nowhere") == []


@pytest.mark.parametrize(("devices", "axes"), [(8, {"data": 8}), (4, {"data": 2, "model": 2}), (1, {})])
def test_eight_devices_state_on_other_meshes(saved: tuple[Path, Any], devices: int, axes: dict[str, int]) -> None:
    built = program(devices, **axes)
    state, record = checkpoint.restore(saved[0] / "5", built.state_shape)
    assert record == {"seconds": {"step": 5.0}}
    for leaf, shape, old in zip(
        jax.tree.leaves(state), jax.tree.leaves(built.state_shape), jax.tree.leaves(saved[1]), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)
        np.testing.assert_array_equal(leaf, old)


def test_unfinished_checkpoints_are_ignored(saved: tuple[Path, Any], tmp_path: Path) -> None:
    import shutil

    directory = tmp_path / "checkpoints"
    shutil.copytree(saved[0], directory)
    (directory / "9").mkdir()  # made, nothing in it
    (directory / "10.orbax-checkpoint-tmp-1" / "state").mkdir(parents=True)  # being written
    shutil.copytree(directory / "5", directory / "11")
    shutil.rmtree(directory / "11" / "state")  # half gone
    assert checkpoint.steps(directory) == [2, 4, 5]
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        checkpoint.restore(directory / "9", program(1).state_shape)
    # The next run saves that very step.
    built = program(1)
    state, _ = checkpoint.restore(directory / "5", built.state_shape)
    writer = checkpoint.Checkpoints(directory, keep=2, permanent=2)
    writer.save(9, state, {})
    writer.close()
    assert checkpoint.steps(directory) == [2, 4, 5, 9] or checkpoint.steps(directory) == [2, 4, 9]


def test_another_models_checkpoint_is_refused_by_name(saved: tuple[Path, Any]) -> None:
    wide = dataclasses.replace(tiny.config(), model=tiny.model(mlp=64))
    with pytest.raises(ValueError, match=r"params/blocks/mlp/\w+/\w+ is \(2, .*\) there and \(2, .*\) here"):
        checkpoint.restore(saved[0] / "5", program(1, wide).state_shape)
    gap = dataclasses.replace(tiny.config(), model=tiny.model(pool="gap"))
    with pytest.raises(ValueError, match=r"params/pool/.* there and absent here|ema/pool/.* there and absent here"):
        checkpoint.restore(saved[0] / "5", program(1, gap).state_shape)
    adam = dataclasses.replace(tiny.config(), optim=c.OptimConfig(name="adam", ema=0.9))
    with pytest.raises(ValueError, match=r"another model or optimizer: .*opt_state/"):
        checkpoint.restore(saved[0] / "5", program(1, adam).state_shape)

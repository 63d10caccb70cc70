"""Statistics of batch norm through the train step: over the parts of an accumulated batch, and over a restart."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vit_scaling import config as c
from vit_scaling import models, names
from vit_scaling.data import mixing
from vit_scaling.data.mixing import MixingConfig
from vit_scaling.models.resnet import ResNetConfig
from vit_scaling.parallel import mesh as mesh_lib
from vit_scaling.parallel import sharding
from vit_scaling.training import checkpoint
from vit_scaling.training import step as step_lib
from vit_scaling.training.step import Program, build

DECAY = 0.75
MODEL = ResNetConfig(depth=14, width=4, stem="small", bn_decay=DECAY)
BATCHES = [tiny.batch(seed=seed) for seed in range(4)]


@pytest.fixture(scope="module")
def program() -> Program:
    """A ResNet's step of 16 images in two parts, compiled once for this file."""
    config = tiny.config(model=MODEL, optim=c.OptimConfig(name="sgd", lr=0.1, accumulate=2))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, mixing=MixingConfig()))
    mesh = mesh_lib.create(c.MeshConfig(), jax.devices()[:1])
    return build(c.resolve(config, 100), num_classes=10, total_steps=8, mesh=mesh)


def advance(program: Program, state: Any, batches: list[dict[str, np.ndarray]]) -> Any:
    for batch in batches:
        on = sharding.batch_sharding(program.mesh)
        state, metrics = program.train_step(state, sharding.put_batch(batch, on))
        assert np.isfinite(metrics["loss"])
    return state


def test_accumulation_updates_them_by_each_part_in_turn(program: Program) -> None:
    """Part p of two holds the images p, p + 2, ...; both see the parameters from before the step."""
    start = program.init()
    got = jax.device_get(advance(program, program.init(), BATCHES[:1])).statistics

    images = mixing.to_float(jnp.asarray(BATCHES[0]["image"]))
    model = models.build(MODEL, image_size=(28, 28), num_classes=10, key=jax.random.key(0))
    description, _, statistics = models.split(model)

    @jax.jit
    def train(statistics: Any, images: jax.Array) -> Any:
        merged = models.merge(description, start.params, statistics)
        merged(images, jax.random.key(0))
        return models.statistics(merged)

    for part in (images[0::2], images[1::2]):
        statistics = train(statistics, part)
    for ours, expected in zip(jax.tree.leaves(got), jax.tree.leaves(statistics), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=1e-6)

    # And the first norm's by the formula, from the stem's convolution alone: r <- d r + (1 - d) m, twice.
    kernel = start.params["stem"]["kernel"]
    maps = jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    first, second = (np.asarray(maps[p::2], np.float64).reshape(-1, 4) for p in (0, 1))
    mean = DECAY * (1 - DECAY) * first.mean(0) + (1 - DECAY) * second.mean(0)
    variance = DECAY**2 + DECAY * (1 - DECAY) * first.var(0) + (1 - DECAY) * second.var(0)
    np.testing.assert_allclose(got["stem_norm"]["mean"], mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got["stem_norm"]["variance"], variance, rtol=1e-4)


def test_frozen_norms_keep_them_and_normalize_by_them() -> None:
    """As the network of the train step is built: the first groups are frozen, the last is trained."""
    config = tiny.config(model=MODEL, optim=c.OptimConfig(freeze=("stem.*", "group[123]/.*")))
    mesh = mesh_lib.create(c.MeshConfig(), jax.devices()[:1])
    recipes: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_lib, "jit_in", lambda mesh, dtype, function, recipe, **_: recipes.append(recipe) or function)
        build(c.resolve(config, 100), num_classes=10, total_steps=8, mesh=mesh)
    recipe = recipes[-1]
    model = models.build(MODEL, image_size=(28, 28), num_classes=10, key=jax.random.key(0))
    _, params, statistics = models.split(model)
    params["head"]["kernel"] += jnp.sin(jnp.arange(1280, dtype=jnp.float32)).reshape(128, 10)  # it starts at zero
    images = mixing.to_float(jnp.asarray(BATCHES[0]["image"]))
    targets = jax.nn.one_hot(BATCHES[0]["label"], 10)
    step = jax.jit(functools.partial(step_lib._loss, recipe, None))
    loss, moved = step(params, statistics, images, targets, jax.random.key(0))
    kept = {
        path.rpartition("/")[0]
        for path, leaf in names.flatten(moved).items()
        if np.array_equal(leaf, names.flatten(statistics)[path])
    }
    norms = {path.rpartition("/")[0] for path in names.flatten(statistics)}
    assert kept == {path for path in norms if not path.startswith("group4")}
    assert kept != norms
    # The trained group normalizes by its batch; its inputs are those of evaluation.
    statistics["stem_norm"]["mean"] += 1.0
    assert abs(float(step(params, statistics, images, targets, jax.random.key(0))[0]) - float(loss)) > 1e-4


def test_statistics_that_are_not_finite_leave_the_update_out(program: Program) -> None:
    """A training step normalizes by the batch, so that an infinite average shows in the statistics alone."""
    state = program.init()
    leaves, structure = jax.tree.flatten(state.statistics)
    state = dataclasses.replace(state, statistics=structure.unflatten([jnp.full_like(leaves[0], jnp.inf), *leaves[1:]]))
    before = jax.device_get(state)
    after = jax.device_get(advance(program, state, BATCHES[:1]))
    assert int(after.skipped) == 1
    for a, b in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(before.statistics), jax.tree.leaves(after.statistics), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_restart_changes_no_bit_of_them(program: Program, tmp_path: Path) -> None:
    """Four steps are two steps, a checkpoint, and two steps."""
    whole = jax.device_get(advance(program, program.init(), BATCHES))
    writer = checkpoint.Checkpoints(tmp_path / "checkpoints", keep=1, permanent=0)
    writer.save(2, advance(program, program.init(), BATCHES[:2]), {})
    writer.close()
    state, _ = checkpoint.restore(tmp_path / "checkpoints" / "2", program.state_shape)
    resumed = jax.device_get(advance(program, state, BATCHES[2:]))
    first = jax.device_get(program.init())
    for name in ("statistics", "params"):
        leaves = [jax.tree.leaves(getattr(tree, name)) for tree in (whole, resumed, first)]
        for expected, ours, untrained in zip(*leaves, strict=True):
            np.testing.assert_array_equal(ours, expected)
            assert name == "params" or np.all(expected != untrained)

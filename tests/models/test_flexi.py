"""FlexiViT: kernels and positions for other patch sizes beside NumPy, and training with a size drawn in each step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.test_step import BATCHES, assert_close, plain, program, run
from vit_scaling import UserError, flops, models, names
from vit_scaling.models import adapt, flexi, vit
from vit_scaling.parallel import sharding
from vit_scaling.training import checkpoint
from vit_scaling.training import step as step_lib

IMAGES = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 12, 12, 3)), jnp.float32)
SMALL = {"width": 16, "depth": 1, "mlp": 16, "heads": 2, "patch": (6, 6), "remat": "none", "patches": (3, 4)}


def built(**fields):
    config = vit.ViTConfig(**(SMALL | fields))

    @jax.jit
    def build():
        model = models.build(config, image_size=(12, 12), num_classes=3, key=jax.random.key(0))
        model.head.kernel[...] = jnp.sin(jnp.arange(48.0)).reshape(16, 3)  # it starts from zero
        return model

    return build()


@functools.partial(jax.jit, static_argnums=2)
def outputs(model, images, patch=None):
    return model(images, None, patch)


def resized(image, side):
    """Bilinear with half-pixel centres and repeated edges, pixel by pixel."""
    old = image.shape[0]
    out = np.zeros((side, side))
    at = [min(max((i + 0.5) * old / side - 0.5, 0), old - 1) for i in range(side)]
    for i, y in enumerate(at):
        for j, x in enumerate(at):
            for a in range(old):
                for b in range(old):
                    out[i, j] += max(0, 1 - abs(y - a)) * max(0, 1 - abs(x - b)) * image[a, b]
    return out


@pytest.mark.parametrize("side", [3, 8])
def test_the_kernel_is_the_pseudo_inverse_of_resizing(side):
    """Section 3.4: with the matrix B of the resizing of a whole patch, w' = pinv(B^T) w."""
    old = 6
    matrix = np.stack([resized(unit.reshape(old, old), side).ravel() for unit in np.eye(old * old)], axis=1)
    kernel = np.random.default_rng(1).normal(size=(old, old, 3, 2)).astype(np.float32)
    expected = np.einsum("nm,mxd->nxd", np.linalg.pinv(matrix.T), kernel.reshape(old * old, 3, 2))
    found = flexi.resize_kernel(jnp.asarray(kernel), (side, side))
    np.testing.assert_allclose(found, expected.reshape(side, side, 3, 2), atol=2e-5)
    assert flexi.resize_kernel(jnp.asarray(kernel), (old, old)) is not None
    np.testing.assert_array_equal(flexi.resize_kernel(jnp.asarray(kernel), (old, old)), kernel)


@pytest.mark.parametrize("new", [2, 6])
def test_positions_are_resampled_linearly_with_antialiasing(new):
    """A triangle as wide as a new point where points become fewer, its weights shared out at the edges."""
    old, scale = 4, max(4 / new, 1.0)
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.maximum(0, 1 - np.abs(centre[:, None] - np.arange(old)[None]) / scale)
    weights /= weights.sum(axis=1, keepdims=True)
    positions = np.random.default_rng(2).normal(size=(old, old, 5)).astype(np.float32)
    expected = np.einsum("ay,bx,yxd->abd", weights, weights, positions).reshape(new * new, 5)
    found = flexi.resize_positions(jnp.asarray(positions.reshape(16, 5)), (old, old), (new, new))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_another_patch_equals_the_adapted_network():
    """What a step computes for a size is what weights adapted to it compute."""
    model = built()
    leaves = {path: np.asarray(leaf) for path, leaf in names.flatten(models.split(model)[1]).items()}
    for side in (3, 4):
        target = dataclasses.replace(model.config, patch=(side, side))
        new = adapt.adapt(leaves, model.config, (12, 12), target=target, target_image_size=(12, 12))
        shape = jax.eval_shape(
            lambda target=target: models.build(target, image_size=(12, 12), num_classes=3, key=jax.random.key(0))
        )
        other = models.merge(models.split(shape)[0], jax.tree.map(jnp.asarray, names.unflatten(new)), {})
        found = outputs(model, IMAGES, (side, side))
        np.testing.assert_allclose(found, outputs(other, IMAGES), rtol=1e-4, atol=1e-5)
        assert not np.allclose(found, outputs(model, IMAGES), rtol=1e-2)
    np.testing.assert_array_equal(outputs(model, IMAGES, (6, 6)), outputs(model, IMAGES))


def flexible(**fields):
    config = plain(optim=step_lib.optimizer.OptimConfig(name="sgd", lr=0.1, moment_dtype="float32"))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, patches=(7, 14), **fields))


def test_each_step_trains_with_the_size_that_seed_and_step_draw():
    """Each step's loss is that of its size; the sizes are uniform, and the same at every start from any step."""
    config = flexible()
    built = program(config)
    on = sharding.batch_sharding(built.mesh)
    state = built.init()
    state.params["head"]["kernel"] = jnp.sin(jnp.arange(160.0)).reshape(16, 10)
    graphdef = models.split(
        jax.eval_shape(lambda: models.build(config.model, image_size=(28, 28), num_classes=10, key=jax.random.key(0)))
    )[0]
    network = models.merge(graphdef, jax.tree.map(jnp.copy, state.params), {})
    images = jnp.asarray(BATCHES[0]["image"], jnp.float32) / 127.5 - 1
    losses = {}
    for side in (7, 14):
        logits = np.asarray(outputs(network, images, (side, side)), np.float64)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        losses[side] = -log_p[np.arange(16), BATCHES[0]["label"]].mean()
    assert abs(losses[7] - losses[14]) > 1e-3
    drawn = []
    for step in range(12):
        again = dataclasses.replace(jax.tree.map(jnp.copy, state), step=jnp.int32(step))
        loss = float(built.train_step(again, sharding.put_batch(BATCHES[0], on))[1]["loss"])
        drawn.append(min(losses, key=lambda side, loss=loss: abs(losses[side] - loss)))
        assert loss == pytest.approx(losses[drawn[-1]], rel=1e-4)
    assert 3 <= drawn.count(7) <= 9


def test_a_run_from_disk_continues_with_the_sizes_that_it_would_have_had(tmp_path):
    """Six steps, and three, a checkpoint on disk and three: equal to the last bit."""
    built = program(flexible())
    batches = [BATCHES[i % 3] for i in range(6)]

    def advance(state, batches):
        losses = []
        for batch in batches:
            state, metrics = built.train_step(state, sharding.put_batch(batch, sharding.batch_sharding(built.mesh)))
            losses.append(float(metrics["loss"]))
        return state, losses

    whole, losses = advance(built.init(), batches)
    half, first = advance(built.init(), batches[:3])
    writer = checkpoint.Checkpoints(tmp_path / "checkpoints", keep=1, permanent=0)
    writer.save(3, half, {})
    writer.close()
    again, second = advance(checkpoint.restore(tmp_path / "checkpoints" / "3", built.state_shape)[0], batches[3:])
    assert first + second == losses
    for one, other in zip(jax.tree.leaves(jax.device_get(again)), jax.tree.leaves(jax.device_get(whole)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_sharded_and_accumulated_steps_equal_whole_ones(monkeypatch):
    config = flexible()
    state, rows = run(program(config), BATCHES)
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
    split = dataclasses.replace(config, optim=dataclasses.replace(config.optim, accumulate=2))
    other, other_rows = run(program(split, devices=8, data=4, model=2), BATCHES)
    assert [row["loss"] for row in other_rows] == pytest.approx([row["loss"] for row in rows], rel=1e-5)
    assert_close(other.params, state.params)


def test_flops_are_the_mean_over_the_sizes():
    config = vit.ViTConfig(**(SMALL | {"patches": ()}))
    cost = lambda **fields: flops.count(  # noqa: E731
        dataclasses.replace(config, **fields), image_size=(12, 12), num_classes=3
    )
    small, large = cost(patch=(3, 3)), cost(patch=(6, 6))
    found = cost(patches=(3, 6))
    assert found.train_flops == (small.train_flops + large.train_flops) / 2
    assert found.forward_flops == large.forward_flops
    assert found.activation_bytes == small.activation_bytes
    assert found.params == large.params


def test_sizes_that_cannot_be():
    with pytest.raises(UserError, match=r"model.patches is \(4, 4\); give each side once"):
        built(patches=(4, 4))
    with pytest.raises(UserError, match="smaller than one patch of 13x13"):
        jax.eval_shape(lambda model: model(IMAGES, None, (13, 13)), jax.eval_shape(built))

"""Each optimizer in training: on a mesh, in microbatches and unrolled at once, and continued from disk."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.training.test_step import BATCHES, plain
from vit_scaling import config as c
from vit_scaling import models, names
from vit_scaling.evaluation.network import jit_in, to_float
from vit_scaling.optim import optimizer
from vit_scaling.parallel import mesh as mesh_lib
from vit_scaling.parallel import sharding
from vit_scaling.training import checkpoint
from vit_scaling.training import step as step_lib


class Way:
    """One way to train; the gradients are compiled once for all optimizers, and so are their updates."""

    def __init__(self, devices: int, accumulate: int, scan: bool, **axes: int):
        config = plain()
        config = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, scan=scan),
            optim=dataclasses.replace(config.optim, accumulate=accumulate),
        )
        self.mesh = mesh_lib.create(c.MeshConfig(**axes), jax.devices()[:devices])
        build = lambda: models.build(config.model, image_size=(28, 28), num_classes=10, key=jax.random.key(0))  # noqa: E731
        graphdef, shapes, _ = models.split(jax.eval_shape(build))
        self.shapes = shapes
        self.recipe = step_lib._Recipe(config, 10, (28, 28), graphdef, optax.identity(), jnp.float32, False, None)
        self.optimizers = {
            name: optimizer.create(c.OptimConfig(name=name, moment_dtype="float32"), shapes) for name in optimizer.NAMES
        }
        on = sharding.tree_shardings(shapes, self.mesh)
        start = lambda: {name: each.init(zeros(shapes)) for name, each in self.optimizers.items()}  # noqa: E731
        states_on = sharding.tree_shardings(jax.eval_shape(start), self.mesh)
        self.start = jit_in(self.mesh, "float32", start, out_shardings=states_on)
        self.gradient = jit_in(self.mesh, "float32", self._gradient, out_shardings=on)
        directions_on = dict.fromkeys(self.optimizers, on)
        self.update = jit_in(self.mesh, "float32", self._update, out_shardings=(directions_on, states_on))
        self.put = lambda tree: jax.device_put(tree, on)

    def _gradient(self, params: Any, batch: Any) -> Any:
        state = step_lib.TrainState(0, params, {}, None, None, 0, 0)
        targets = jax.nn.one_hot(batch["label"], 10)
        images = to_float(self.recipe.config.model, batch["image"])
        return step_lib._accumulated(self.recipe, None, state, images, targets, jax.random.key(0))[2]

    def _update(self, grads: Any, states: Any, params: Any) -> Any:
        both = {name: each.update(grads, states[name], params) for name, each in self.optimizers.items()}
        return {name: one for name, (one, _) in both.items()}, {name: state for name, (_, state) in both.items()}

    def run(self, params: Any) -> tuple[list[Any], list[Any]]:
        """Returns each optimizer's directions for two batches in turn, and its states after them."""
        params, states, directions, after = self.put(params), self.start(), [], []
        for batch in BATCHES[:2]:
            grads = self.gradient(params, sharding.put_batch(batch, sharding.batch_sharding(self.mesh)))
            direction, states = self.update(grads, states, params)
            directions.append(jax.device_get(direction))
            after.append(states)
        return directions, after


def zeros(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """Directions of the plain way; of eight devices, two microbatches and unrolled layers; and after a restart."""
    one = Way(1, accumulate=1, scan=True)
    rng = np.random.default_rng(0)  # not as initialised: a head of zeros would hide the body from its gradient
    params = jax.tree.map(lambda leaf: (0.2 * rng.normal(size=leaf.shape)).astype(np.float32), one.shapes)
    directions, states = one.run(params)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "MIN_SHARDED_SIZE", 64)  # so that a tiny model is split as a large one would be
        other, _ = Way(8, accumulate=2, scan=False, data=4, model=2).run(params)
    folder = tmp_path_factory.mktemp("states")
    zero = jnp.int32(0)
    state = step_lib.TrainState(jnp.int32(1), one.put(params), {}, states[0], None, zero, zero)
    writer = checkpoint.Checkpoints(folder, keep=1, permanent=0)
    writer.save(1, state, {})
    writer.close()
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    restored, _ = checkpoint.restore(folder / "1", like)
    on = sharding.batch_sharding(one.mesh)
    grads = one.gradient(one.put(params), sharding.put_batch(BATCHES[1], on))
    return directions, other, jax.device_get(one.update(grads, restored.opt_state, one.put(params))[0])


@pytest.mark.parametrize("name", optimizer.NAMES)
def test_a_mesh_and_microbatches_and_unrolled_layers_change_nothing(name: str, trained: Any) -> None:
    for whole, other in zip(trained[0], trained[1], strict=True):
        for path, leaf in names.flatten(whole[name]).items():
            # By norm: where a gradient nearly vanishes, dividing it by its own size makes much of rounding.
            difference = np.linalg.norm(names.flatten(other[name])[path] - leaf) / np.linalg.norm(leaf)
            assert difference < 2e-4, (path, difference)


@pytest.mark.parametrize("name", optimizer.NAMES)
def test_a_restored_state_continues_to_the_last_bit(name: str, trained: Any) -> None:
    for path, leaf in names.flatten(trained[0][1][name]).items():
        np.testing.assert_array_equal(names.flatten(trained[2][name])[path], leaf, err_msg=path)
        assert not np.array_equal(names.flatten(trained[0][0][name])[path], leaf), path

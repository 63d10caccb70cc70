"""The train step: what it computes, what it leaves alone, and that a mesh changes nothing."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import tiny
from vit_scaling import config as c
from vit_scaling import models, names
from vit_scaling.data import mixing
from vit_scaling.data.mixing import MixingConfig
from vit_scaling.parallel import mesh as mesh_lib
from vit_scaling.parallel import sharding
from vit_scaling.training import loop
from vit_scaling.training import step as step_lib
from vit_scaling.training.step import Program, TrainState, build

PROGRAMS: dict[str, Program] = {}


def program(config: c.Config, devices: int = 1, **axes: int) -> Program:
    """The program of a config, made once for all tests."""
    key = repr((config, devices, axes, sharding.MIN_SHARDED_SIZE, mesh_lib.MAX_DATA))
    if key not in PROGRAMS:
        config = c.resolve(config, 100)
        mesh = mesh_lib.create(c.MeshConfig(**axes), jax.devices()[:devices])
        PROGRAMS[key] = build(config, num_classes=10, total_steps=int(config.duration.amount), mesh=mesh)
    return PROGRAMS[key]


def run(program: Program, batches: list[dict[str, np.ndarray]]) -> tuple[TrainState, list[dict[str, Any]]]:
    state, rows = program.init(), []
    for batch in batches:
        state, metrics = program.train_step(state, sharding.put_batch(batch, sharding.batch_sharding(program.mesh)))
        rows.append({name: float(value) for name, value in jax.device_get(metrics).items()})
    return jax.device_get(state), rows


def plain(**fields: Any) -> c.Config:
    """Without the randomness of the step, so that it can be computed another way.

    And without biases of the keys: their true gradient is zero, of which Adafactor makes the sign of rounding errors.
    """
    config = tiny.config(**fields)
    model = tiny.model(drop_path=0.0, qkv_bias=False, pool="gap")
    return dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, mixing=MixingConfig()))


BATCHES = [tiny.batch(seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def whole() -> tuple[TrainState, list[dict[str, Any]]]:
    """Three steps of the plain step on one device."""
    return run(program(plain()), BATCHES)


def assert_close(found: Any, expected: Any, tolerance: float = 2e-5) -> None:
    for path, leaf in names.flatten(expected).items():
        np.testing.assert_allclose(names.flatten(found)[path], leaf, rtol=1e-3, atol=tolerance, err_msg=path)


def test_three_steps_by_hand() -> None:
    """SGD without momentum, clip 1, decay of the head, rsqrt with warmup: every number from its definition."""
    config = plain(
        optim=c.OptimConfig(
            name="sgd", lr=0.5, beta1=0.0, moment_dtype="float32", weight_decay=0.1, head_weight_decay=0.2
        )
    )
    config.model.mean, config.model.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    state, rows = run(program(config), BATCHES)

    built = program(config)
    params = jax.device_get(built.init().params)
    shape = jax.eval_shape(
        lambda key: models.build(config.model, image_size=(28, 28), num_classes=10, key=key), jax.random.key(0)
    )
    description = models.split(shape)[0]

    @jax.jit
    def loss(params: Any, batch: Any) -> jax.Array:
        logits = models.merge(description, params, {})(
            mixing.to_float(batch["image"], config.model.mean, config.model.std)
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    mask = np.ones(16, bool)
    assert built.classify(params, {}, BATCHES[0] | {"mask": mask})["loss"].mean() == pytest.approx(
        float(loss(params, jax.tree.map(jnp.asarray, BATCHES[0]))), rel=1e-5
    )
    gradient = jax.jit(jax.value_and_grad(loss))
    for step, batch in enumerate(BATCHES):
        value, grads = gradient(params, jax.tree.map(jnp.asarray, batch))
        norm = float(np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads))))
        multiplier = min(step / 2, 1.0) * (1 + max(0, step - 2) / 2) ** -0.5 * min(1.0, (8 - step) / 2)
        assert rows[step]["loss"] == pytest.approx(float(value), rel=1e-5)
        assert rows[step]["gradient_norm"] == pytest.approx(norm, rel=1e-4)
        assert rows[step]["learning_rate"] == pytest.approx(0.5 * multiplier)
        new = {}
        for path, p in names.flatten(params).items():
            decay = 0.2 if path == "head/kernel" else 0.1 if path.endswith("/kernel") else 0.0
            g = np.asarray(names.flatten(grads)[path]) / max(norm, 1.0)
            new[path] = p - 0.5 * multiplier * (g + decay * p)
        moved = np.sqrt(sum(np.sum(np.square(new[path] - p)) for path, p in names.flatten(params).items()))
        assert rows[step]["update_norm"] == pytest.approx(float(moved), rel=1e-3, abs=1e-6)
        params = names.unflatten(new)
    assert_close(state.params, params)
    assert int(state.step) == 3


def test_accumulation_equals_the_large_batch(whole: Any) -> None:
    config = plain()
    state, rows = run(
        program(dataclasses.replace(config, optim=dataclasses.replace(config.optim, accumulate=4))), BATCHES
    )
    assert [r["loss"] for r in rows] == pytest.approx([r["loss"] for r in whole[1]], rel=1e-5)
    assert [r["gradient_norm"] for r in rows] == pytest.approx([r["gradient_norm"] for r in whole[1]], rel=1e-4)
    assert_close(state.params, whole[0].params)


@pytest.mark.parametrize(
    ("axes", "max_data"), [({"data": 8}, 128), ({"data": 8}, 4), ({"replica": 2, "data": 2, "model": 2}, 128)]
)
def test_sharded_equals_unsharded(
    whole: Any, axes: dict[str, int], max_data: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)  # so that a tiny model is split as a large one would be
    monkeypatch.setattr(mesh_lib, "MAX_DATA", max_data)
    built = program(plain(), devices=8, **axes)
    assert (built.mesh.shape["fold"] > 1) == (max_data < 8)
    split = [leaf for leaf in jax.tree.leaves(built.state_shape) if not leaf.sharding.is_fully_replicated]
    assert len(split) > 20
    state, rows = run(built, BATCHES)
    assert [r["loss"] for r in rows] == pytest.approx([r["loss"] for r in whole[1]], rel=1e-5)
    assert_close(state.params, whole[0].params)


def test_randomness_of_the_step_does_not_depend_on_the_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.config(model=tiny.model(drop_path=0.5))
    _, one = run(program(config), BATCHES)
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
    _, eight = run(program(config, devices=8, data=4, model=2), BATCHES)
    assert [r["loss"] for r in eight] == pytest.approx([r["loss"] for r in one], rel=1e-5)


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_loss_that_is_not_finite_leaves_everything_as_it_was() -> None:
    built = program(plain())
    on = sharding.batch_sharding(built.mesh)
    state, _ = built.train_step(built.init(), sharding.put_batch(BATCHES[0], on))
    state.params["head"]["kernel"] = state.params["head"]["kernel"].at[0, 0].set(jnp.inf)
    before = jax.device_get(state)
    state, metrics = built.train_step(state, sharding.put_batch(BATCHES[1], on))
    after = jax.device_get(state)
    assert not np.isfinite(metrics["loss"])
    for name in ("params", "opt_state", "ema", "statistics"):
        for a, b in zip(jax.tree.leaves(getattr(before, name)), jax.tree.leaves(getattr(after, name)), strict=True):
            np.testing.assert_array_equal(a, b)
    assert (int(after.step), int(after.skipped), int(after.skipped_in_row)) == (2, 1, 1)
    assert float(metrics["update_norm"]) == 0


def with_leaf(tree: Any, parts: tuple[str, ...], dtype: Any, value: float) -> Any:
    """Returns a tree in which the leaves of a dtype whose path has all `parts` are filled with a value."""
    found = []

    def fill(path: Any, leaf: Any) -> Any:
        if leaf.dtype == dtype and leaf.size > 1 and all(part in jax.tree_util.keystr(path) for part in parts):
            found.append(path)
            return jnp.full_like(leaf, value)
        return leaf

    filled = jax.tree_util.tree_map_with_path(fill, tree)
    assert found, parts
    return filled


def assert_left_out(program: Program, state: TrainState, gradient_is_finite: bool = True) -> None:
    """The loss of the next step is finite, and yet its update is left out and everything stays as it was."""
    before = jax.device_get(state)
    after, metrics = program.train_step(state, sharding.put_batch(BATCHES[0], sharding.batch_sharding(program.mesh)))
    assert np.isfinite(metrics["loss"])
    assert np.isfinite(metrics["gradient_norm"]) == gradient_is_finite
    after = jax.device_get(after)
    for name in ("params", "opt_state", "ema", "statistics"):
        for a, b in zip(jax.tree.leaves(getattr(before, name)), jax.tree.leaves(getattr(after, name)), strict=True):
            np.testing.assert_array_equal(a, b)
    assert (int(after.skipped), int(after.skipped_in_row)) == (1, 1)


def test_an_optimizer_state_that_is_not_finite_leaves_the_update_out() -> None:
    """An infinite second moment makes an update of zero, so that only the state itself shows it."""
    built = program(plain())
    state = built.init()
    # After the first step, at which the old moment has the weight zero.
    state, _ = built.train_step(state, sharding.put_batch(BATCHES[0], sharding.batch_sharding(built.mesh)))
    moments = with_leaf(state.opt_state, ("head", "bias"), jnp.float32, jnp.inf)  # not factored
    assert_left_out(built, dataclasses.replace(state, opt_state=moments))


def test_parameters_that_overflow_leave_the_update_out() -> None:
    """Softmax does not see a bias that all classes share, so the loss is finite beside the largest float32."""
    built = program(plain())
    state = built.init()
    state = dataclasses.replace(
        state,
        step=jnp.int32(2),  # after the warmup
        params=with_leaf(state.params, ("head", "bias"), jnp.float32, 3.4028e38),
        opt_state=with_leaf(state.opt_state, ("head", "bias"), jnp.bfloat16, -3.0e38),
    )
    assert_left_out(built, state)


def test_a_gradient_that_is_not_finite_leaves_the_update_out() -> None:
    """Features of zero hide a head of 1e25 from the loss; the gradient behind it has a norm beyond float32.

    Clipped to a norm of one it would be an update of zero, so that only the norm shows it.
    """
    built = program(plain())
    state = built.init()
    signs = jnp.where(jnp.arange(10) % 2, 1e25, -1e25)
    state.params["head"]["kernel"] = jnp.broadcast_to(signs, state.params["head"]["kernel"].shape)
    for leaf in ("scale", "bias"):
        state.params["norm"][leaf] = jnp.zeros_like(state.params["norm"][leaf])
    assert_left_out(built, state, gradient_is_finite=False)


def test_each_step_draws_its_own_randomness() -> None:
    """Of the same parameters and the same batch: drop path and mixup depend on the step."""
    built = program(tiny.config(model=tiny.model(drop_path=0.5)))
    batch = sharding.put_batch(BATCHES[0], sharding.batch_sharding(built.mesh))
    lost = []
    for step in (0, 0, 1, 2):
        state = dataclasses.replace(built.init(), step=jnp.int32(step))
        state.params["head"]["kernel"] = jnp.sin(jnp.arange(160.0)).reshape(16, 10)  # it starts from zero
        lost.append(float(built.train_step(state, batch)[1]["loss"]))
    assert lost[0] == lost[1]
    assert len(set(lost)) == 3


def test_the_evaluation_loss_is_without_label_smoothing() -> None:
    built = program(plain(loss=c.LossConfig(label_smoothing=0.3)))
    params = built.init().params
    params["head"]["kernel"] = jnp.sin(jnp.arange(160.0)).reshape(16, 10)  # it starts from zero
    batch = BATCHES[0] | {"mask": np.ones(16, bool)}
    expected = optax.softmax_cross_entropy_with_integer_labels(
        built.logits(params, {}, batch["image"]), jnp.asarray(batch["label"])
    )
    np.testing.assert_allclose(built.classify(params, {}, batch)["loss"], expected, rtol=1e-5)


def test_evaluations_measure_the_average_under_its_own_name() -> None:
    state = program(plain()).init()
    measured = loop.measured(state)
    assert measured.keys() == {"", "_ema"}
    assert measured[""] is state.params
    assert measured["_ema"] is state.ema
    assert loop.measured(dataclasses.replace(state, ema=None)).keys() == {""}


def test_a_loss_spike_is_left_out_and_counted() -> None:
    guard = c.GuardConfig(spike_deviation=3.0, spike_window=4)
    spikes = {"losses": jnp.full(4, jnp.nan), "count": jnp.int32(0)}
    answers = []
    for loss in (1.0, 2.0, 1.0, 2.0, 3.5, 2.9, jnp.nan, 1.0):
        finite = jnp.asarray(np.isfinite(loss))
        applied, spikes = step_lib._without_spikes(guard, jnp.float32(loss), finite, spikes)
        answers.append(bool(applied))
    # The mean of 1, 2, 1, 2 is 1.5 and their deviation 0.5, so the limit is 3.0 until another loss is applied.
    assert answers == [True, True, True, True, False, True, False, True]
    assert int(spikes["count"]) == 1
    np.testing.assert_allclose(spikes["losses"], [1.0, 2.0, 2.9, 1.0], rtol=1e-6)


def test_a_finite_step_ends_the_row_of_skipped_ones() -> None:
    built = program(plain())
    on = sharding.batch_sharding(built.mesh)
    state = dataclasses.replace(built.init(), skipped=jnp.int32(3), skipped_in_row=jnp.int32(2))
    state, _ = built.train_step(state, sharding.put_batch(BATCHES[0], on))
    assert (int(state.skipped), int(state.skipped_in_row)) == (3, 0)


def test_average_of_the_parameters() -> None:
    built = program(plain())
    on = sharding.batch_sharding(built.mesh)
    state = built.init()
    average = jax.device_get(state.params)
    for batch in BATCHES:
        state, _ = built.train_step(state, sharding.put_batch(batch, on))
        average = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * np.asarray(p), average, jax.device_get(state.params))
    assert_close(jax.device_get(state.ema), average, 1e-6)
    assert program(plain(optim=c.OptimConfig(ema=None))).state_shape.ema is None


def test_a_linear_probe_trains_the_classifier_on_the_features_of_evaluation() -> None:
    """Nothing else moves, and drop path, of half of the second block's residuals, is off."""
    config = plain(optim=c.OptimConfig(name="sgd", lr=1.0, freeze=(r"(?!head/).*",)))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, drop_path=0.5))
    built = program(config)
    start = jax.device_get(built.init().params)
    state, rows = run(built, BATCHES)
    for path, leaf in names.flatten(state.params).items():
        same = np.array_equal(leaf, names.flatten(start)[path])
        assert same != path.startswith("head/"), path
    before, _ = run(built, BATCHES[:2])
    assert np.abs(before.params["head"]["kernel"]).max() > 1e-3
    images = sharding.put_batch(BATCHES[2], sharding.batch_sharding(built.mesh))["image"]
    logits = built.logits(before.params, before.statistics, images)
    expected = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), BATCHES[2]["label"]).mean()
    assert rows[2]["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_the_head_bias_starts_where_the_loss_wants_it() -> None:
    state = program(plain(loss=c.LossConfig(kind="sigmoid", head_bias=-10.0))).init()
    np.testing.assert_array_equal(state.params["head"]["bias"], np.full(10, -10.0, np.float32))


def test_bfloat16_trains_and_learns() -> None:
    config = plain(optim=c.OptimConfig(name="adam", lr=1e-2))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))
    _, rows = run(program(config), [BATCHES[0]] * 6)
    assert np.isfinite([row["loss"] for row in rows]).all()
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_state_is_not_copied_by_a_step() -> None:
    built = program(plain())
    state = built.init()
    kernel = state.params["blocks"]["mlp"]["up"]["kernel"]
    built.train_step(state, sharding.put_batch(BATCHES[0], sharding.batch_sharding(built.mesh)))
    assert kernel.is_deleted()


def test_a_batch_that_the_devices_cannot_divide() -> None:
    with pytest.raises(
        ValueError, match=r"data.batch_size 16 cannot be divided over 3 devices; choose a multiple of 3"
    ):
        program(plain(), devices=3)
    config = plain()
    with pytest.raises(ValueError, match="in each of 3 accumulation steps; choose a multiple of 24"):
        program(dataclasses.replace(config, optim=dataclasses.replace(config.optim, accumulate=3)), devices=8)

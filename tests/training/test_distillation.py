"""Distillation: the student's targets are the teacher's predictions for what the student sees."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.training.test_step import BATCHES, assert_close, program
from vit_scaling import UserError, flops, interop, models, names
from vit_scaling import config as c
from vit_scaling.data import mixing
from vit_scaling.data.sources import open_source
from vit_scaling.optim import losses
from vit_scaling.parallel import sharding
from vit_scaling.planner import machines, plan
from vit_scaling.training import checkpoint, initial, teacher

# Another network than the student's, and another normalisation.
TEACHER = tiny.model(width=24, pool="gap", drop_path=0.5, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that is sure of some images."""
    model = models.build(TEACHER, image_size=(28, 28), num_classes=10, key=jax.random.key(5))
    model.head.kernel[...] = 2 * jnp.sin(jnp.arange(240.0)).reshape(24, 10)
    path = tmp_path_factory.mktemp("teacher") / "weights"
    interop.save(model, path, layout="vit_scaling")
    return path


def config(weights: Path, **loss: Any) -> c.Config:
    whole = tiny.config(loss=c.LossConfig(teacher=str(weights), **loss), optim=c.OptimConfig(name="sgd", lr=0.1))
    model = tiny.model(drop_path=0.0, qkv_bias=False)
    return dataclasses.replace(whole, model=model, data=dataclasses.replace(whole.data, mixing=c_mixing()))


def c_mixing() -> mixing.MixingConfig:
    return mixing.MixingConfig(mixup=0.5, cutmix=1.0)


def begun(built: Any) -> Any:
    state = initial.begin(built, None)
    kernel = np.cos(np.arange(160.0, dtype=np.float32)).reshape(16, 10)
    state.params["head"]["kernel"] = jax.device_put(kernel, state.params["head"]["kernel"].sharding)
    return state


def test_the_loss_is_that_of_the_teachers_predictions_for_the_same_view(weights: Path) -> None:
    """In NumPy, from the logits of both for the mixed images, each under its own normalisation."""
    built = program(config(weights, temperature=2.0))
    state = begun(built)
    mix_key, _ = jax.random.split(jax.random.fold_in(jax.random.split(jax.random.key(0))[1], 0))
    student = tiny.model(drop_path=0.0, qkv_bias=False)
    build = lambda: models.build(student, image_size=(28, 28), num_classes=10, key=jax.random.key(0))  # noqa: E731
    graphdef = models.split(jax.eval_shape(build))[0]
    logits = []
    for network in (interop.load(weights), models.merge(graphdef, jax.tree.map(jnp.copy, state.params), {})):
        view = mixing.to_float(jnp.asarray(BATCHES[0]["image"]), network.config.mean, network.config.std)
        seen, _ = mixing.mix(c_mixing(), mix_key, view, jnp.zeros((16, 10)))
        assert not np.allclose(seen, view)
        logits.append(np.asarray(jax.jit(lambda model, x: model(x))(network, seen), np.float64) / 2)
    teacher_p, student_p = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in logits)
    expected = -(teacher_p * np.log(student_p)).sum(axis=1).mean()
    _, metrics = built.train_step(state, sharding.put_batch(BATCHES[0], sharding.batch_sharding(built.mesh)))
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-4)


def test_targets_of_each_kind() -> None:
    logits = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    soft = np.exp(logits / 3) / np.exp(logits / 3).sum(axis=1, keepdims=True)
    for fields, expected in (
        ({"temperature": 3.0}, soft),
        ({"teacher_labels": "hard"}, np.eye(5)[logits.argmax(axis=1)]),
        ({"kind": "sigmoid"}, 1 / (1 + np.exp(-logits))),
    ):
        own = c.LossConfig(teacher="somewhere", **fields)
        losses.check(own)
        np.testing.assert_allclose(losses.teacher_targets(own, jnp.asarray(logits)), expected, rtol=1e-5)


def test_the_gradient_is_that_of_the_kl_divergence() -> None:
    """Of logits s: softmax(s) - softmax(t), so it is zero for a student that is its teacher."""
    student, taught = (np.random.default_rng(seed).normal(size=(3, 4)).astype(np.float32) for seed in (0, 1))
    own = c.LossConfig(teacher="somewhere")
    targets = losses.teacher_targets(own, jnp.asarray(taught))
    gradient = jax.grad(lambda s: losses.loss(own, s, targets).sum())(jnp.asarray(student))
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (student, taught))
    np.testing.assert_allclose(gradient, p - q, atol=1e-6)


def test_bad_teachers_are_named(weights: Path) -> None:
    with pytest.raises(UserError, match="has 10 classes, and the training set 7"):
        teacher.read(config(weights), 7)
    with pytest.raises(UserError, match=r"label_smoothing has no meaning for a teacher's labels"):
        losses.check(c.LossConfig(teacher="x", label_smoothing=0.1))
    with pytest.raises(UserError, match=r"loss.temperature is 2.0; it is for soft labels of a loss.teacher"):
        losses.check(c.LossConfig(temperature=2.0))
    with pytest.raises(UserError, match=r"loss.teacher_labels is 'firm'; choose soft or hard"):
        losses.check(c.LossConfig(teacher_labels="firm"))
    read = teacher.read(config(weights), 10)
    assert read is not None
    source = open_source(tiny.digits("train[:100]"))
    named = dataclasses.replace(read, class_names=tuple(source.class_names or ())[::-1])
    with pytest.raises(UserError, match="class 0 is '9' there and '0' here"):
        teacher.check_classes(named, source)
    teacher.check_classes(read, source)


def test_the_plan_counts_the_teachers_forward_pass(weights: Path) -> None:
    own = c.resolve(config(weights), 100)
    machine = machines.topology("v5e:2x2")
    built = program(config(weights))
    found = plan._plan(own, machine, built.mesh, built.state_shape, 10, teacher=built.teacher)
    taught = flops.count(TEACHER, image_size=(28, 28), num_classes=10).forward_flops * 16
    student = flops.count(own.model, image_size=(28, 28), num_classes=10).train_flops * 16
    assert found.model_flops == student
    assert found.executed_flops == student + taught
    assert found.state_bytes > 4 * flops.count(TEACHER, image_size=(28, 28), num_classes=10).params


def test_sharded_accumulated_and_continued_runs_are_the_same_and_the_teacher_stays(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = config(weights, temperature=2.0)
    built = program(own)
    on = sharding.batch_sharding(built.mesh)

    def trained(built: Any) -> tuple[Any, list[float]]:
        state, lost = begun(built), []
        for batch in BATCHES:
            state, metrics = built.train_step(state, sharding.put_batch(batch, sharding.batch_sharding(built.mesh)))
            lost.append(float(metrics["loss"]))
        return state, lost

    whole, lost = trained(built)
    assert_close(whole.teacher[0], interop.read(weights).parameters, 0)
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
    split = dataclasses.replace(own, optim=dataclasses.replace(own.optim, accumulate=2))
    eight = program(split, devices=8, data=4, model=2)
    parts = [leaf for leaf in jax.tree.leaves(eight.state_shape.teacher) if not leaf.sharding.is_fully_replicated]
    assert len(parts) > 5
    other, other_lost = trained(eight)
    assert other_lost == pytest.approx(lost, rel=1e-5)
    assert_close(jax.device_get(other.params), jax.device_get(whole.params))

    state = begun(built)
    state, _ = built.train_step(state, sharding.put_batch(BATCHES[0], on))
    writer = checkpoint.Checkpoints(tmp_path / "checkpoints", keep=1, permanent=0)
    writer.save(1, state, {})
    writer.close()
    state, _ = checkpoint.restore(tmp_path / "checkpoints" / "1", built.state_shape)
    for batch in BATCHES[1:]:
        state, _ = built.train_step(state, sharding.put_batch(batch, on))
    for path, leaf in names.flatten(jax.device_get(state.params)).items():
        np.testing.assert_array_equal(leaf, names.flatten(jax.device_get(whole.params))[path])

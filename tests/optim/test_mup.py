"""muP: the rates by hand, and the coordinate check: activations change alike at every width, and not without muP."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import mup as benchmark
from tests import tiny
from vit_scaling import UserError, models, names
from vit_scaling.models import vit
from vit_scaling.optim import mup, optimizer
from vit_scaling.optim.optimizer import OptimConfig


def config(width, base_width=None, **fields):
    sizes = {"width": width, "depth": 2, "mlp": 2 * width, "heads": width // 8, "patch": (14, 14), "pool": "map"}
    return vit.ViTConfig(**(sizes | {"base_width": base_width, "remat": "none"} | fields))


def built(own, seed=0):
    return models.build(own, image_size=(28, 28), num_classes=10, key=jax.random.key(seed))


def shapes(own):
    return models.split(jax.eval_shape(lambda: built(own)))[1]


@pytest.mark.parametrize(("name", "hidden"), [("adam", 1 / 4), ("adafactor", 1 / 4), ("lion", 1 / 4), ("muon", 1 / 2)])
def test_rates_of_four_times_the_base_width(name, hidden):
    found = mup.rates(name, shapes(config(64, 16)), 4.0)
    for path, rate in found.items():
        if path == "head/kernel":
            assert rate == 1 / 4
        elif path.endswith("kernel") and path != "embedding/kernel":
            assert rate == hidden, path
        else:
            assert rate == 1, path
    rows = {row.path: row for row in optimizer.describe(OptimConfig(name=name), shapes(config(64, 16)), 4.0)}
    assert rows["blocks/mlp/down/kernel"].rates == (hidden, hidden)


def test_rates_scale_the_gradients_part_and_not_the_decay():
    own = config(32, 16)
    params = jax.jit(lambda: models.split(built(own))[1])()
    grads = jax.tree.map(lambda p: jnp.ones_like(p), params)
    optim = OptimConfig(name="adam", weight_decay=0.1, head_weight_decay=0.1, moment_dtype="float32", clip=None)

    def directions(ratio):
        update = optimizer.create(optim, params, ratio)
        return names.flatten(jax.jit(lambda g, p: update.update(g, update.init(p), p)[0])(grads, params))

    one, two = directions(1.0), directions(2.0)
    for path, param in names.flatten(params).items():
        is_kernel = path.endswith("kernel")
        decay = 0.1 * param if is_kernel else 0.0 * param
        rate = 0.5 if is_kernel and path != "embedding/kernel" else 1.0
        np.testing.assert_allclose(two[path] - decay, rate * (one[path] - decay), rtol=1e-4, atol=1e-6)


def test_vectors_start_as_large_as_at_the_base_width_and_all_else_as_without():
    plain, own = (names.flatten(jax.jit(lambda c=c: models.split(built(c))[1])()) for c in (config(64), config(64, 16)))
    for path, leaf in plain.items():
        if path == "position_embedding":
            np.testing.assert_allclose(own[path], leaf * 2, rtol=1e-6)
        elif path == "pool/probe":
            np.testing.assert_allclose(own[path], leaf * (65 / 17) ** 0.5, rtol=1e-6)
        else:
            np.testing.assert_array_equal(own[path], leaf)


@pytest.mark.parametrize(("name", "lr"), [("adafactor", 5e-3), ("muon", 5e-3)])
def test_coordinate_check(name, lr):
    """Eight times the width: with muP the change of logits stays within a factor of 1.6, without it grows by 2.5."""
    batch = tiny.batch()
    images, labels = jnp.asarray(batch["image"], jnp.float32) / 127.5 - 1, jnp.asarray(batch["label"])

    def changes(width, base_width):
        return benchmark.changes(images, labels, name=name, lr=lr, width=width, base_width=base_width)

    base, flat, grown = changes(16, 16), changes(128, 16), changes(128, None)
    for found, wanted in zip(flat, base, strict=True):
        assert 1 / 1.6 < found / wanted < 1.6
    assert grown[1] / base[1] > 2.5


def test_what_has_no_rule_is_refused():
    with pytest.raises(UserError, match=r"optim.name is 'lamb', and model.base_width needs one of adafactor, adam"):
        optimizer.create(OptimConfig(name="lamb"), shapes(config(64, 16)), 4.0)
    with pytest.raises(UserError, match=r"model.base_width is 12; muP keeps the width of a head, here 8"):
        built(config(32, 12))
    assert models.width_ratio(config(64, 16)) == 4
    assert models.width_ratio(dataclasses.replace(config(64, 16), base_width=None)) == 1

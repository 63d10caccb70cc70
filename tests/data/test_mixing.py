"""Mixup and cutmix: against the definition, and the same on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vit_scaling.data import mixing
from vit_scaling.data.mixing import MixingConfig

B, H, W, C = 16, 12, 10, 5


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (B, H, W, 3)).astype(np.float32)
    return jnp.asarray(images), jax.nn.one_hot(rng.integers(0, C, B), C)


def run(batch, seed=0, **fields):
    return mixing.mix(MixingConfig(**fields), jax.random.key(seed), *batch)


def test_to_float_maps_the_ends_of_the_range():
    images = jnp.array([0, 51, 255], jnp.uint8).reshape(1, 1, 3, 1)
    np.testing.assert_allclose(mixing.to_float(images).ravel(), [-1, -0.6, 1], atol=1e-6)


def test_to_float_uses_each_channels_mean_and_std():
    """ImageNet's, as torchvision writes them; by hand: (0 - 0.485) / 0.229, (255/255 - 0.406) / 0.225."""
    images = jnp.array([[0, 0, 0], [51, 102, 255]], jnp.uint8).reshape(2, 1, 1, 3)
    got = mixing.to_float(images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)).reshape(2, 3)
    want = [[-2.117904, -2.035714, -1.804444], [(0.2 - 0.485) / 0.229, (0.4 - 0.456) / 0.224, 2.64]]
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_the_default_of_to_float_is_bitwise_the_division_by_127_5():
    images = jnp.arange(256, dtype=jnp.uint8).reshape(1, 256, 1, 1)
    got = jax.jit(lambda x: mixing.to_float(x, (0.5,) * 3, (0.5,) * 3))(images)
    np.testing.assert_array_equal(got, jax.jit(lambda x: x.astype(jnp.float32) / 127.5 - 1.0)(images))


def test_without_mixing_the_batch_is_untouched(batch):
    images, targets = run(batch)
    np.testing.assert_array_equal(images, batch[0])
    np.testing.assert_array_equal(targets, batch[1])


@pytest.mark.parametrize("per", ["batch", "example"])
def test_mixup_is_one_convex_combination_of_image_and_target(batch, per):
    images, targets = (np.asarray(x) for x in run(batch, mixup=0.8, per=per))
    own, other = np.asarray(batch[0]), np.roll(batch[0], 1, axis=0)
    weights = ((images - other) * (own - other)).sum((1, 2, 3)) / ((own - other) ** 2).sum((1, 2, 3))
    expected = own * weights[:, None, None, None] + other * (1 - weights)[:, None, None, None]
    np.testing.assert_allclose(images, expected, atol=1e-5)
    labels = np.asarray(batch[1])
    np.testing.assert_allclose(
        targets, labels * weights[:, None] + np.roll(labels, 1, 0) * (1 - weights)[:, None], atol=1e-5
    )
    assert (np.ptp(weights) < 1e-5) == (per == "batch")
    assert 0 <= weights.min() <= weights.max() <= 1


@pytest.mark.parametrize("per", ["batch", "example"])
def test_cutmix_pastes_one_box_and_counts_its_pixels(batch, per):
    images, targets = (np.asarray(x) for x in run(batch, seed=3, cutmix=1.0, per=per))
    own, other = np.asarray(batch[0]), np.roll(batch[0], 1, axis=0)
    pasted = (images == other).all(-1)
    np.testing.assert_array_equal(np.where(pasted[..., None], other, own), images)
    for b in range(B):
        rows, columns = pasted[b].any(1), pasted[b].any(0)
        np.testing.assert_array_equal(pasted[b], rows[:, None] & columns[None, :])  # the pasted pixels form a box,
        assert np.abs(np.diff(rows.astype(int))).sum() <= 2  # without gaps
    share = pasted.mean((1, 2))
    labels = np.asarray(batch[1])
    np.testing.assert_allclose(
        targets, labels * (1 - share)[:, None] + np.roll(labels, 1, 0) * share[:, None], atol=1e-6
    )
    assert share.max() > 0


@pytest.mark.parametrize("fields", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0, "per": "example"}])
def test_two_keys_mix_differently_and_one_key_alike(batch, fields):
    first, again, other = (np.asarray(run(batch, seed=seed, **fields)[0]) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_box_of_cutmix_moves_in_both_directions_by_its_own(batch):
    """Row and column of the box have keys of their own: shared, all boxes would lie on the diagonal."""
    images = jnp.broadcast_to((jnp.arange(64) % 2)[:, None, None, None], (64, 30, 30, 1)).astype(jnp.float32)
    config = MixingConfig(cutmix=1.0, per="example")
    mixed = np.asarray(mixing.mix(config, jax.random.key(0), images, jax.nn.one_hot(jnp.arange(64) % 2, 2))[0])[..., 0]
    pasted = mixed != np.asarray(images)[..., 0]
    small = [p for p in pasted if 0 < p.mean() < 0.3]
    rows, columns = (np.array([np.flatnonzero(p.any(axis)).mean() for p in small]) for axis in (1, 0))
    assert len(small) > 20
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.5


N = 2000  # one shape for all statistics, so that the sampler is compiled once


@pytest.fixture(scope="module")
def many():
    """Many small examples; black and white, class 0 and 1 take turns."""
    white = jnp.arange(N) % 2
    return jnp.broadcast_to(white[:, None, None, None], (N, 16, 16, 1)).astype(jnp.float32), jax.nn.one_hot(white, 2)


def weights(mixed) -> np.ndarray:
    """How much of each example stayed, from its target."""
    return np.asarray(mixed[1])[np.arange(N), np.arange(N) % 2]


def test_coefficients_follow_their_distributions(many):
    """Over many draws: mixup's weight is Beta(a, a), cutmix's box is as large as 1 - Beta where it is not cut."""
    weight = weights(run(many, mixup=0.2, per="example"))
    assert abs(weight.mean() - 0.5) < 0.03
    assert abs(weight.var() - 1 / (4 * (2 * 0.2 + 1))) < 0.01  # variance of Beta(a, a)
    weight = weights(run(many, cutmix=1.0, per="example"))
    # A side s around a uniform centre covers s - s^2/4 of the length on average, and s^2 is uniform for alpha 1.
    sides = np.sqrt((np.arange(10_000) + 0.5) / 10_000)
    assert abs((1 - weight).mean() - ((sides - sides**2 / 4) ** 2).mean()) < 0.015


def test_switch_and_probability_choose_how_often(many):
    images, _ = run(many, mixup=1.0, cutmix=1.0, switch=0.25, probability=0.5, per="example")
    images = np.asarray(images)[..., 0].reshape(N, -1)
    same = np.ptp(images, axis=1) == 0
    untouched = same & np.isin(images[:, 0], (0, 1))
    pasted = ~same  # black and white side by side; mixup leaves one grey
    assert abs(1 - untouched.mean() - 0.5) < 0.05
    assert abs(pasted.mean() - 0.125) < 0.03


def test_the_result_does_not_depend_on_the_sharding(batch):
    config = MixingConfig(mixup=0.8, cutmix=1.0, per="example")
    step = jax.jit(lambda key, *batch: mixing.mix(config, key, *batch))
    expected = step(jax.random.key(1), *batch)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "model"))
    sharded = (jax.device_put(x, NamedSharding(mesh, PartitionSpec(("data", "model")))) for x in batch)
    for got, want in zip(step(jax.random.key(1), *sharded), expected, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"mixup": -1.0}, "mixing.mixup"), ({"switch": 2.0}, "mixing.switch"), ({"per": "device"}, "batch, example")],
)
def test_bad_fields_are_named(batch, fields, message):
    with pytest.raises(ValueError, match=message):
        mixing.mix(MixingConfig(**fields), jax.random.key(0), *batch)

"""Patch dropout: which patches stay, that off changes nothing, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_scaling import UserError, models
from vit_scaling.models import vit

IMAGES = np.random.default_rng(0).uniform(-1, 1, (6, 8, 8, 3)).astype(np.float32)
SMALL = {"width": 16, "depth": 2, "mlp": 16, "heads": 2, "patch": (2, 2), "remat": "none", "scan": False}


def built(**fields):
    config = vit.ViTConfig(**(SMALL | fields))
    return models.build(config, image_size=(8, 8), num_classes=3, key=jax.random.key(0))


@pytest.fixture(scope="module")
def half():
    return built(patch_dropout=0.5, registers=2, class_token=True)


def test_each_image_keeps_its_own_patches_in_order_and_all_other_tokens(half):
    found = np.asarray(half._kept_tokens(500, 3 + 16, jax.random.key(1)))
    assert found.shape == (500, 3 + 8)
    assert (found[:, :3] == [0, 1, 2]).all()
    patches = found[:, 3:]
    assert (np.diff(patches, axis=1) > 0).all()
    assert patches.min() == 3
    assert len({tuple(row) for row in patches.tolist()}) > 400
    share = np.bincount(patches.astype(int).ravel(), minlength=19)[3:] / 500
    np.testing.assert_allclose(share, 0.5, atol=0.1)  # 4.5 standard deviations


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_blocks_see_the_kept_tokens_and_no_others(half, position):
    model = half if position == "learned" else built(patch_dropout=0.5, registers=2, class_token=True, position="rope")
    key, images = jax.random.key(2), jnp.asarray(IMAGES)
    kept, tokens, angles = model._kept_tokens(6, 19, jax.random.fold_in(key, 2)), model._tokens(images), None
    found = model.encode(images, key)
    for index in (0, 5):  # one image at a time, its tokens and their angles picked by hand
        x = tokens[index, kept[index]][None]
        if position == "rope":
            angles = model._angles(8, 8)[kept[index]]
        for layer in range(2):
            x = jax.tree.map(lambda leaf, i=layer: leaf[i], model.blocks)(x, jnp.float32(0), None, angles)
        np.testing.assert_allclose(found[index], model.norm(x)[0], rtol=1e-5, atol=1e-5)


def test_without_a_key_or_a_rate_nothing_is_dropped(half):
    whole = built(registers=2, class_token=True)
    images = jnp.asarray(IMAGES)
    np.testing.assert_array_equal(half.encode(images), whole.encode(images))
    np.testing.assert_array_equal(whole.encode(images, jax.random.key(1)), whole.encode(images))


def test_bad_rates_are_named():
    with pytest.raises(UserError, match=r"model.patch_dropout"):
        built(patch_dropout=1.0)
    assert vit.kept_patches(vit.ViTConfig(patch_dropout=0.99), 16) == 1

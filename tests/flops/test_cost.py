"""Every term of the count of a ViT, against numbers worked out by hand."""

import dataclasses

import pytest

from vit_scaling import UserError, flops
from vit_scaling.flops import cost
from vit_scaling.models import vit

# 4 x 4 pixels in patches of 2 x 2: 4 tokens.
TINY = vit.ViTConfig(width=8, depth=2, mlp=16, heads=2, patch=(2, 2), pool="gap", dtype="float32", remat="none")


def count(**fields: object) -> flops.Cost:
    return flops.count(dataclasses.replace(TINY, **fields), image_size=(4, 4), num_classes=3)


def test_flops_by_hand() -> None:
    """A layer: projections 4 x 4 x 64, MLP 4 x 2 x 8 x 16, attention 2 x 16 x 8 multiply-adds; patches; classifier."""
    layer = 4 * 4 * 64 + 4 * 2 * 8 * 16 + 2 * 16 * 8
    macs = 2 * layer + 4 * (2 * 2 * 3) * 8 + 8 * 3
    assert count().forward_flops == 2 * macs == 10_032
    assert count().train_flops == 3 * 10_032


def test_the_map_head_by_hand() -> None:
    """S/16: keys and values of 196 tokens, query and output of the probe, its MLP, its attention."""
    costs = {
        pool: flops.count(vit.variant("S/16", pool=pool), image_size=(224, 224), num_classes=1000).forward_flops
        for pool in ("map", "gap")
    }
    by_hand = 2 * (196 * 2 * 384**2 + 2 * 384**2 + 2 * 384 * 1536 + 2 * 196 * 384)
    assert costs["map"] - costs["gap"] == by_hand == 118_855_680


def test_activation_memory_by_hand() -> None:
    """float32. Kept: 8 widths and 2 hidden of 4 tokens, and 2 x 16 attention weights twice; or a part; or the input."""
    inside = 8 * 4 * 8 * 4 + 2 * 4 * 16 * 4 + 2 * 16 * (4 + 4)
    assert inside == 1_792
    assert count().activation_bytes == 2 * inside
    assert count(remat="full").activation_bytes == 2 * (4 * 8 * 4) + inside  # one layer is recomputed at a time


def test_a_model_without_a_formula_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(cost.FORWARD, vit.ViTConfig)
    with pytest.raises(
        UserError, match=r"ViTConfig has no formula for its FLOPs; add one to FORWARD in flops/cost\.py"
    ):
        count()


def test_training_without_some_patches_costs_less() -> None:
    """Half of the 4 tokens in the blocks of a training step; every patch is embedded; evaluation sees them all."""
    layer = 2 * 4 * 64 + 2 * 2 * 8 * 16 + 2 * 4 * 8
    found = count(patch_dropout=0.5)
    assert found.forward_flops == count().forward_flops
    assert found.train_flops == 3 * 2 * (2 * layer + 4 * (2 * 2 * 3) * 8 + 8 * 3)
    assert found.activation_bytes < count().activation_bytes / 1.9

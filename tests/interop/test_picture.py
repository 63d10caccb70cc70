"""`weights show` draws what was understood; nothing is left out in silence."""

import dataclasses
import pathlib

import numpy as np

from tests.interop.test_interop import CASES, reference_file
from vit_scaling import interop
from vit_scaling.interop import picture

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def test_a_backbone_from_pixels_to_features() -> None:
    weights = interop.read(GOLDEN / "onnx" / "dinov2.onnx")
    drawn = picture.picture(weights, "--image_size=24x32")
    for line in (
        "image 24 x 32",
        "6 x 8 patches",
        "of 4 x 4 pixels",
        "+ class token",
        "2 blocks of width 16",
        "4 heads, MLP 32 (GELU exact)",
        "(no classifier)",
    ):
        assert f" {line} " in drawn
    facts = dict(line.split("  ", 1) for line in drawn.split("\n\n")[-1].splitlines())
    assert (
        facts["network"].strip()
        == f"ViT of no published size, patch 4, {sum(v.size for v in weights.leaves.values()):,} parameters"
    )
    assert "0.485 0.456 0.406" in facts["normalisation"]
    assert facts["left out"].strip() == "the prefix backbone. was removed from the names"
    assert facts["asked for"].strip() == "--image_size=24x32"
    assert "4, 4, 3, 16" in picture.table(weights)


def test_a_swin_and_a_text_tower(tmp_path: pathlib.Path) -> None:
    drawn = picture.picture(interop.read(reference_file("timm Swin", tmp_path / "swin")))
    assert "stage 2: 8 x 8" in drawn
    assert "4 heads, window 4" in drawn
    clip = interop.read(reference_file("hf CLIP, both towers", tmp_path / "clip"))
    assert "7 tensors beside vision_model.* were left out: logit_scale, text_model.embeddings." in picture.picture(clip)
    named = dataclasses.replace(clip, class_names=("a", "b", "c", "d"))
    assert "a, b, c, ..." in picture.picture(named)


def test_a_backbone_is_kept_and_exported_without_a_classifier(tmp_path: pathlib.Path) -> None:
    """As this project's folder, and as timm's and transformers' networks without a classifier."""
    name = "timm ViT"
    weights = interop.read(reference_file(name, tmp_path / "file"))
    bare = dataclasses.replace(
        weights,
        num_classes=0,
        leaves=weights.leaves | {"head/kernel": np.zeros((192, 0), np.float32), "head/bias": np.zeros(0, np.float32)},
    )
    assert CASES[name]["num_classes"] == 7
    for layout in ("vit_scaling", "timm", "huggingface"):
        interop.write(bare, tmp_path / layout, layout=layout)
        again = interop.read(tmp_path / layout)
        assert again.num_classes == 0
        np.testing.assert_array_equal(again.leaves["embedding/kernel"], weights.leaves["embedding/kernel"])
        assert interop.read(tmp_path / layout, interop.Target(num_classes=3)).leaves["head/kernel"].shape == (192, 3)

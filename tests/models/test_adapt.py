"""Weights for another size are those of the same function as far as there is one, and whatever cannot be is said."""

import dataclasses
import pathlib

import numpy as np
import pytest

from tests.golden import fill
from tests.interop.test_interop import CASES, LOGITS, SIZE, VIT, flax_names, leaves, make, outputs, reference_file
from vit_scaling import interop, models, names
from vit_scaling.models import adapt, flexi, swin


def parameters(model):
    return {path: np.asarray(leaf) for path, leaf in names.flatten(models.split(model)[1]).items()}


@pytest.mark.parametrize("new", [(12, 12), (9, 16)])
def test_larger_patches_see_resized_images_alike(new):
    """Kernel and patch resized together give the token of before, exactly (FlexiViT, section 3.4)."""
    kernel, patch = fill.normal("kernel", (8, 8, 3, 5)), fill.normal("patch", (8, 8, 3))
    grown = adapt.resize_patch(kernel, new)
    rows, columns = (flexi.linear_weights(8, side) for side in new)
    larger = np.einsum("ar,bc,rcx->abx", rows, columns, patch)
    before = np.einsum("rcx,rcxD->D", patch, kernel)
    np.testing.assert_allclose(np.einsum("rcx,rcxD->D", larger, grown), before, atol=1e-10)
    plain = np.einsum("ar,bc,rcxD->abxD", rows, columns, kernel)
    assert np.abs(np.einsum("rcx,rcxD->D", larger, plain) - before).max() > 0.5  # resizing the kernel itself does not
    np.testing.assert_array_equal(adapt.resize_patch(kernel, (8, 8)), kernel)


def test_smaller_patches_are_the_least_squares_answer():
    """Of all kernels none is nearer on patches of independent pixels: the residual is orthogonal to every change."""
    kernel = fill.normal("kernel", (6, 4, 3, 1))
    small = adapt.resize_patch(kernel, (4, 4))
    rows = flexi.linear_weights(6, 4)
    residual = np.einsum("ar,acxD->rcxD", rows, small) - kernel
    np.testing.assert_allclose(np.einsum("ar,rcxD->acxD", rows, residual), 0, atol=1e-10)


def test_linear_weights():
    np.testing.assert_allclose(flexi.linear_weights(2, 4), [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    for old, new in ((7, 16), (16, 7), (1, 3), (3, 1)):
        np.testing.assert_allclose(flexi.linear_weights(old, new).sum(axis=1), 1)


def test_positions_for_a_rectangle():
    """A plane of positions stays a plane: rows and columns are told apart."""
    model = make(dataclasses.replace(VIT, pool="gap"), (64, 64))
    own = parameters(model)
    rows, columns = np.mgrid[:8, :8]
    own["position_embedding"] = np.stack([rows, columns] * 8, axis=-1).reshape(64, 16).astype(np.float32)
    grown = adapt.adapt(own, model.config, (64, 64), target=model.config, target_image_size=(64, 128))
    table = grown["position_embedding"].reshape(8, 16, 16)
    np.testing.assert_allclose(table[:, 3, 0], np.arange(8), atol=1e-6)
    # Cubic convolution with a = -0.75, that of published checkpoints, bends a line by 3/64 between its points.
    np.testing.assert_allclose(table[3, 4:12, 1], (np.arange(4, 12) + 0.5) / 2 - 0.5, atol=0.0470)


def test_a_class_token_can_be_left_out_for_the_mean(tmp_path: pathlib.Path):
    interop.save(make(dataclasses.replace(VIT, gelu="exact")), tmp_path / "token", layout="timm")
    target = dataclasses.replace(VIT, gelu="exact", pool="gap")
    model = interop.load(tmp_path / "token", target)
    assert "class_token" not in leaves(model)
    assert outputs(model, fill.images("x", (1, *SIZE, 3))).shape == (1, 5)
    with pytest.raises(ValueError, match="pools by 'token' cannot pool by 'map'"):
        interop.load(tmp_path / "token", dataclasses.replace(target, pool="map"))


def test_classes(tmp_path: pathlib.Path):
    """The same classes stay, others start from zero, mapped ones keep their row."""
    model = make(dataclasses.replace(VIT, pool="gap"))
    np.savez(tmp_path / "w.npz", **flax_names(model, "params"))
    images = fill.images("x", (2, *SIZE, 3))
    before = outputs(model, images)
    np.testing.assert_allclose(outputs(interop.load(tmp_path / "w.npz", trained_size=SIZE), images), before, atol=1e-6)
    fresh = interop.load(tmp_path / "w.npz", trained_size=SIZE, num_classes=3)
    np.testing.assert_array_equal(outputs(fresh, images), np.zeros((2, 3)))
    mapped = interop.load(tmp_path / "w.npz", trained_size=SIZE, class_map=(4, 0, 4))
    np.testing.assert_allclose(outputs(mapped, images), before[:, [4, 0, 4]], atol=1e-6)
    with pytest.raises(ValueError, match="names class 5; the weights have classes 0 to 4"):
        interop.load(tmp_path / "w.npz", trained_size=SIZE, class_map=(0, 5))
    with pytest.raises(ValueError, match="class map has 2 entries"):
        interop.load(tmp_path / "w.npz", trained_size=SIZE, num_classes=3, class_map=(0, 1))


def test_swin_v2_keeps_its_positions_in_other_windows(tmp_path: pathlib.Path):
    """Loaded for another image size, it remembers its windows; with another window it must be told them."""
    name = "hf Swinv2, rectangular, padded"
    path, size = reference_file(name, tmp_path / "v2"), tuple(CASES[name]["image_size"])
    other = interop.load(path, image_size=(24, 24))
    assert other.config.pretrained_windows == (4, 4)
    again = interop.load(path, other.config, image_size=size)
    actual = outputs(again, fill.images(name, (2, *size, 3)))
    np.testing.assert_allclose(actual, LOGITS[name], atol=2e-5)
    wider = dataclasses.replace(other.config, window=6)
    assert outputs(interop.load(path, wider), fill.images(name, (1, *size, 3))).shape == (1, 5)
    with pytest.raises(ValueError, match=r"set model.pretrained_windows to \(4, 4\)"):
        interop.load(path, dataclasses.replace(wider, pretrained_windows=None))


def test_swin_v1_in_another_window(tmp_path: pathlib.Path):
    path = reference_file("timm Swin", tmp_path / "v1")
    model = interop.load(
        path, swin.SwinConfig(width=16, depths=(4, 2), heads=(2, 4), window=6, shift_rule="timm"), image_size=(96, 72)
    )
    assert model.stage1.blocks.plain.attention.relative_position_bias_table.shape == (2, 121, 2)
    assert np.isfinite(outputs(model, fill.images("x", (1, 96, 72, 3)))).all()


def test_what_cannot_be_adapted():
    config = dataclasses.replace(VIT, pool="gap")
    own = parameters(make(config))
    for change, sentence in (
        ({"width": 32}, "the weights' model.width is 16, and 32 is asked for; set it to 16"),
        ({"position": "sincos2d"}, "the weights' model.position is 'learned'"),
        ({"pre_logits": True}, "the weights have no such layer"),
    ):
        with pytest.raises(ValueError, match=sentence):
            adapt.adapt(own, config, SIZE, target=dataclasses.replace(config, **change), target_image_size=SIZE)
    with pytest.raises(ValueError, match="a ViTConfig cannot become those of a SwinConfig"):
        adapt.adapt(own, config, SIZE, target=swin.SwinConfig(), target_image_size=SIZE)

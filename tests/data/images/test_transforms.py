"""Crops and augmentations, each against an independent reference or its definition.

The references are Pillow, NumPy written out, and figures measured with TensorFlow where the definition is its sampler.
"""

import dataclasses
import io
import itertools

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from tests.data.images.common import distance, encode
from vit_scaling.data.images import codec, pixels, randaugment, transforms
from vit_scaling.data.images.transforms import TransformConfig, transform


def rng(seed=0):
    return np.random.default_rng(seed)


# ---- crops and resizing ----------------------------------------------------------------------------------------------


def bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear interpolation with pixel centres at .5 and no antialiasing, as tf.image.resize's default."""
    out = image.astype(np.float64)
    for axis, size in ((0, height), (1, width)):
        length = out.shape[axis]
        position = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
        low = np.floor(position).astype(int)
        high = np.minimum(low + 1, length - 1)
        weight = (position - low).reshape([-1 if i == axis else 1 for i in range(3)])
        out = out.take(low, axis) * (1 - weight) + out.take(high, axis) * weight
    return out


@pytest.mark.parametrize("size", [(224, 224), (64, 100), (500, 600)])
def test_linear_resize_is_bilinear_without_antialiasing(photograph, size):
    assert distance(transforms.resize(photograph, size, "linear"), np.round(bilinear(photograph, *size))) <= (1, 0.2)


@pytest.mark.parametrize("size", [(64, 100), (500, 600)])
@pytest.mark.parametrize(
    ("method", "pillows"), [("antialias", "BILINEAR"), ("bicubic", "BICUBIC"), ("lanczos", "LANCZOS")]
)
def test_antialiased_resizes_are_pillows(photograph, size, method, pillows):
    reference = Image.fromarray(photograph).resize(size[::-1], Image.Resampling[pillows])
    assert distance(transforms.resize(photograph, size, method), reference) == (0, 0.0)


def test_area_resize_averages(photograph):
    image = photograph[:300, :400]
    reference = image.reshape(100, 3, 100, 4, 3).mean((1, 3))
    assert distance(transforms.resize(image, (100, 100), "area"), np.round(reference)) <= (1, 0.1)


def test_central_and_square_crops_take_the_middle(photograph):
    central = transform(TransformConfig((100, 80), crop="central", resize_to=150, resize="antialias"), train=False)
    # 403 * 150 / 301 = 200.8, which torchvision cuts.
    reference = Image.fromarray(photograph).resize((200, 150), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(
        central({"image": photograph, "label": 0}, None)["image"], np.asarray(reference)[25:125, 60:140]
    )
    even = transform(
        TransformConfig((100, 77), crop="central_torchvision", resize_to=150, resize="antialias"), train=False
    )({"image": photograph, "label": 0}, None)["image"]
    np.testing.assert_array_equal(even, np.asarray(reference)[25:125, 62:139])  # half of 200 - 77 is 61.5
    square = transform(
        TransformConfig((100, 80), crop="square_central", resize_to=150, resize="antialias"), train=False
    )
    reference = Image.fromarray(photograph).resize((150, 150), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(
        square({"image": photograph, "label": 0}, None)["image"], np.asarray(reference)[25:125, 35:115]
    )


def test_published_evaluation_has_pillows_pixels(photograph):
    """Of a large JPEG with colours, whose decoding is halved and quick for any other resize."""
    large = np.asarray(Image.fromarray(photograph).resize((806, 602), Image.Resampling.BICUBIC))
    data = encode(large, quality=90)
    reference = Image.open(io.BytesIO(data)).convert("RGB").resize((80, 80), Image.Resampling.BICUBIC)
    for resize, equal in (("bicubic", True), ("area", False)):
        config = TransformConfig((80, 80), crop="resize", resize=resize)
        shown = transform(config, train=False)({"image": data, "label": 0}, None)["image"]
        assert np.array_equal(shown, np.asarray(reference)) == equal
    central = TransformConfig((64, 60), crop="central", resize="bicubic", resize_to=64)
    shown = transform(central, train=False)({"image": data, "label": 0}, None)["image"]
    reference = Image.open(io.BytesIO(data)).convert("RGB").resize((85, 64), Image.Resampling.BICUBIC)  # 85.7
    np.testing.assert_array_equal(shown, np.asarray(reference)[:, 12:72])


def test_a_crop_of_a_large_jpeg_is_decoded_small_and_looks_the_same(photograph, monkeypatch):
    large = np.asarray(Image.fromarray(photograph).resize((1612, 1204), Image.Resampling.BICUBIC))
    asked = []
    decode = codec.decode
    monkeypatch.setattr(codec, "decode", lambda *args, **kw: asked.append(kw["reduce"]) or decode(*args, **kw))
    config = TransformConfig((64, 64), area=(0.03, 0.9), resize="area")
    off, one_pixel_off = [], []
    for seed in range(12):
        got = transform(config, train=True)({"image": encode(large, quality=95), "label": 0}, rng(seed))["image"]
        want = transform(config, train=True)({"image": large, "label": 0}, rng(seed))["image"]
        off.append(distance(got, want)[1])
        one_pixel_off.append(min(distance(np.roll(want, 1, axis), want)[1] for axis in (0, 1)))
    # The box is in whole pixels of the small image, so it may be off by half a pixel, and a quarter on average.
    assert np.mean(off) < 0.5 * np.mean(one_pixel_off)
    assert set(asked) <= {2, 4, 8}
    assert len(set(asked)) > 1


def test_a_jpeg_is_reduced_by_the_smaller_of_both_ratios(monkeypatch):
    """300 x 4000 to 64 x 64: 4.7 times as high, 62 times as wide; at 1/8 there would be 37 rows for 64."""
    asked = []
    decode = codec.decode
    monkeypatch.setattr(codec, "decode", lambda *args, **kw: asked.append(kw["reduce"]) or decode(*args, **kw))
    for shape, size in (
        ((300, 4000), (64, 64)),
        ((4000, 300), (64, 64)),
        ((128, 128), (64, 64)),
        ((127, 200), (64, 64)),
    ):
        data = encode(np.zeros((*shape, 3), np.uint8))
        transform(TransformConfig(size, crop="resize"), train=False)({"image": data, "label": 0}, None)
    assert asked == [4, 4, 2, 1]


@pytest.mark.parametrize(
    ("sampler", "median"), [(transforms.inception_box, 2.0), (transforms.inception_box_torchvision, 3**0.5)]
)
def test_aspect_is_width_over_height_and_not_symmetric(sampler, median):
    """TensorFlow's aspect is uniform, torchvision's log-uniform."""
    boxes = [sampler(4000, 4000, (0.05, 0.3), (2.0, 2.0), rng(seed)) for seed in range(20)]
    assert {round(w / h, 1) for _, _, h, w in boxes} == {2.0}
    _, _, h, w = np.array([sampler(4000, 4000, (0.05, 0.1), (1.0, 3.0), rng(seed)) for seed in range(600)]).T
    assert abs(np.median(w / h) - median) < 0.12
    assert 0.99 < (w / h).min() < 1.1
    assert 2.8 < (w / h).max() < 3.01


# Means over 60,000 draws of tf.image.sample_distorted_bounding_box (TensorFlow 2.21, area 5 to 100%, aspect 0.75 to
# 1.33): (image size): share of the area and its 10, 50, 90% quantiles, height and top over the image's, aspect, left.
TENSORFLOW = {
    (375, 500): (0.3432, 0.083, 0.300, 0.671, 0.6280, 0.1850, 1.0409, 0.2540),
    (400, 200): (0.2331, 0.072, 0.208, 0.427, 0.3247, 0.3366, 1.0403, 0.1674),
    (28, 28): (0.3797, 0.080, 0.327, 0.763, 0.5725, 0.1961, 1.0409, 0.1884),
}


@pytest.mark.parametrize("size", TENSORFLOW)
def test_inception_crops_are_drawn_as_tensorflow_draws_them(size):
    height, width = size
    generator = rng()
    boxes = np.array([transforms.inception_box(*size, (0.05, 1.0), (0.75, 1.33), generator) for _ in range(20_000)])
    top, left, h, w = boxes.T
    share = h * w / (height * width)
    assert (top + h <= height).all()
    assert (left + w <= width).all()
    got = [share.mean(), *np.quantile(share, [0.1, 0.5, 0.9]), h.mean() / height, top.mean() / height]
    got += [(w / h).mean(), left.mean() / width]
    np.testing.assert_allclose(got, TENSORFLOW[size], atol=0.008)


def test_torchvision_crops_are_uniform_in_area_and_log_aspect():
    generator = rng()
    boxes = np.array(
        [
            transforms.inception_box_torchvision(4000, 4000, (0.08, 0.5), (3 / 4, 4 / 3), generator)
            for _ in range(20_000)
        ]
    )
    top, left, h, w = boxes.T
    share, log_aspect = np.sort(h * w / 16e6), np.sort(np.log(w / h))
    uniform = (np.arange(20_000) + 0.5) / 20_000  # Kolmogorov-Smirnov: 1.63 / sqrt(n) = 0.0115 at one in a hundred
    assert np.abs((share - 0.08) / 0.42 - uniform).max() < 0.0115
    assert np.abs((log_aspect / np.log(4 / 3) + 1) / 2 - uniform).max() < 0.0115
    assert abs((top / (4000 - h)).mean() - 0.5) < 0.01
    assert abs((left / (4000 - w)).mean() - 0.5) < 0.01


def test_torchvision_crops_fall_back_to_the_centre():
    box = transforms.inception_box_torchvision(10, 1000, (0.9, 1.0), (3 / 4, 4 / 3), rng())
    assert box == (0, 493, 10, 13)


def test_padding_shifts_uniformly_and_fills_with_black():
    image = np.full((8, 8), 255, np.uint8)
    shift = transform(TransformConfig((8, 8), crop="pad", pad=2), train=True)
    offsets = []
    generator = rng()
    for _ in range(2_000):
        out = shift({"image": image, "label": 0}, generator)["image"][..., 0]
        rows, columns = out.any(1), out.any(0)
        assert (out == np.outer(rows, columns) * 255).all()
        offsets.append((rows.argmax() - rows[::-1].argmax(), columns.argmax() - columns[::-1].argmax()))
    values, counts = np.unique(offsets, return_counts=True, axis=0)
    assert len(values) == 25
    assert counts.min() > 40  # 80 expected of each
    assert counts.max() < 125


# ---- augmentations ---------------------------------------------------------------------------------------------------


def test_flip_mirrors_at_its_rate(photograph):
    image = photograph[:20, :20]
    flip = transform(TransformConfig((20, 20), crop="none", flip=0.3), train=True)
    generator = rng()
    results = [flip({"image": image, "label": 0}, generator)["image"] for _ in range(3_000)]
    mirrored = [np.array_equal(result, image[:, ::-1]) for result in results]
    assert all(m or np.array_equal(result, image) for m, result in zip(mirrored, results, strict=True))
    assert abs(np.mean(mirrored) - 0.3) < 0.03


def test_small_affine_is_pillows_affine(photograph):
    class Ends(np.random.Generator):  # draws the ends of the ranges
        def random(self, count):
            return np.array([1.0, 1.0, 0.0, 1.0, 0.0][:count])

    config = TransformConfig(rotate=10.0, scale=0.1, shear=0.2, shift=3.0)
    got = transforms.small_affine(config, photograph, Ends(np.random.PCG64()))
    angle, size, shear, dy, dx = np.radians(10), 1.1, -0.2, 3, -3
    forward = size * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ [[1, shear], [0, 1]]
    inverse = np.linalg.inv(forward)
    centre = np.array([403 / 2, 301 / 2])
    offset = centre - inverse @ (centre + np.array([dx, dy]))
    reference = Image.fromarray(photograph).transform(
        (403, 301), Image.Transform.AFFINE, (*inverse[0], offset[0], *inverse[1], offset[1]), Image.Resampling.BILINEAR
    )
    inside = (slice(60, -60), slice(60, -60))
    assert distance(got[inside], np.asarray(reference)[inside])[1] < 1.0


def enhance(kind):
    return lambda image, factor: kind(image).enhance(factor)


def affine(image, matrix, fill):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=fill)


# Operation, its argument, the same by Pillow, and the largest and mean difference that is allowed.
PILLOW = {
    "autocontrast": (pixels.autocontrast, (), ImageOps.autocontrast, (1, 0.5)),
    "equalize": (pixels.equalize, (), ImageOps.equalize, (0, 0.0)),
    "invert": (pixels.invert, (), ImageOps.invert, (0, 0.0)),
    "posterize 4": (pixels.posterize, (4,), ImageOps.posterize, (0, 0.0)),
    "posterize 1": (pixels.posterize, (1,), ImageOps.posterize, (0, 0.0)),
    "solarize 110": (pixels.solarize, (110,), ImageOps.solarize, (0, 0.0)),
    "solarize 256": (pixels.solarize, (256,), ImageOps.solarize, (0, 0.0)),
    "solarize 0": (pixels.solarize, (0,), ImageOps.solarize, (0, 0.0)),
    "brightness 1.9": (pixels.brightness, (1.9,), enhance(ImageEnhance.Brightness), (1, 0.5)),
    "brightness 0.3": (pixels.brightness, (0.3,), enhance(ImageEnhance.Brightness), (1, 0.5)),
    "contrast 1.9": (pixels.contrast, (1.9,), enhance(ImageEnhance.Contrast), (2, 0.8)),
    "contrast 0.3": (pixels.contrast, (0.3,), enhance(ImageEnhance.Contrast), (2, 0.8)),
    "color 1.9": (pixels.color, (1.9,), enhance(ImageEnhance.Color), (2, 0.8)),
    "color 0.3": (pixels.color, (0.3,), enhance(ImageEnhance.Color), (2, 0.8)),
    "sharpness 1.9": (pixels.sharpness, (1.9,), enhance(ImageEnhance.Sharpness), (2, 0.8)),
    "sharpness 0.1": (pixels.sharpness, (0.1,), enhance(ImageEnhance.Sharpness), (2, 0.8)),
}


@pytest.mark.parametrize("name", PILLOW)
def test_operations_mean_what_pillow_means(photograph, name):
    operation, arguments, reference, allowed = PILLOW[name]
    worst, mean = distance(operation(photograph, *arguments), reference(Image.fromarray(photograph), *arguments))
    assert worst <= allowed[0]
    assert mean <= allowed[1]


GREY = pixels.GREY
WARPS = {
    "shear_x": (lambda x: pixels.shear_x(x, 0.25, GREY), lambda im: affine(im, (1, 0.25, 0, 0, 1, 0), GREY)),
    "shear_y": (lambda x: pixels.shear_y(x, -0.25, GREY), lambda im: affine(im, (1, 0, 0, -0.25, 1, 0), GREY)),
    "translate": (lambda x: pixels.translate(x, 30, -50, GREY), lambda im: affine(im, (1, 0, -50, 0, 1, 30), GREY)),
    "rotate": (lambda x: pixels.rotate(x, 25, GREY), lambda im: im.rotate(25, fillcolor=GREY)),
}


@pytest.mark.parametrize("name", WARPS)
def test_warps_move_pixels_where_pillow_does(photograph, name):
    ours, reference = WARPS[name]
    same = (ours(photograph) == np.asarray(reference(Image.fromarray(photograph)))).all(-1)
    assert same.mean() > 0.98  # nearest neighbours: a tie may go the other way


def test_hue_turns_as_pillows_hsv(photograph):
    h, s, v = Image.fromarray(photograph).convert("HSV").split()
    turned = Image.fromarray(np.asarray(h) + np.uint8(round(0.2 * 256)))
    reference = Image.merge("HSV", (turned, s, v)).convert("RGB")
    assert distance(pixels.hue(photograph, 0.2), reference)[1] < 2.5
    assert distance(pixels.hue(photograph, 0.0), photograph)[1] < 1.5


def test_cutout_and_solarize_add_against_their_definitions(photograph):
    out = pixels.cutout(photograph, 20, rng(3), (1, 2, 3))
    changed = (out == (1, 2, 3)).all(-1)
    np.testing.assert_array_equal(np.where(changed[..., None], out, photograph), out)
    assert changed.sum() <= 40 * 40
    assert changed.sum() == changed.any(1).sum() * changed.any(0).sum()
    reference = np.where(photograph < 128, np.minimum(photograph.astype(int) + 110, 255), photograph)
    np.testing.assert_array_equal(pixels.solarize_add(photograph, 110), reference)


# Strength at one magnitude and sign: (set, operation, magnitude, sign) against the same call written out.
FILL = pixels.IMAGENET_MEAN
LINEAR = cv2.INTER_LINEAR
MAGNITUDES = {
    ("big_vision", "Rotate", 10, 1): lambda x: pixels.rotate(x, 30, GREY),
    ("big_vision", "Rotate", 10, -1): lambda x: pixels.rotate(x, -30, GREY),
    ("big_vision", "Posterize", 10, 1): lambda x: pixels.posterize(x, 4),
    ("big_vision", "Solarize", 10, 1): lambda x: x,
    ("big_vision", "Solarize", 5, 1): lambda x: pixels.solarize(x, 128),
    ("big_vision", "SolarizeAdd", 10, 1): lambda x: pixels.solarize_add(x, 110),
    ("big_vision", "Contrast", 10, -1): lambda x: pixels.contrast(x, 1.9),
    ("big_vision", "Color", 10, -1): lambda x: pixels.color(x, 1.9),
    ("big_vision", "Brightness", 5, -1): lambda x: pixels.brightness(x, 1.0),
    ("big_vision", "Sharpness", 10, -1): lambda x: pixels.sharpness(x, 1.9),
    ("big_vision", "ShearX", 10, -1): lambda x: pixels.shear_x(x, -0.3, GREY),
    ("big_vision", "ShearY", 10, -1): lambda x: pixels.shear_y(x, -0.3, GREY),
    ("big_vision", "TranslateX", 10, 1): lambda x: pixels.translate(x, 0, 100, GREY),
    ("big_vision", "TranslateX", 10, -1): lambda x: pixels.translate(x, 0, -100, GREY),
    ("big_vision", "TranslateY", 10, -1): lambda x: pixels.translate(x, -100, 0, GREY),
    ("big_vision", "Cutout", 10, 1): lambda x: pixels.cutout(x, 40, rng(), GREY),
    ("torchvision", "Identity", 9, 1): lambda x: x,
    ("torchvision", "ShearX", 30, -1): lambda x: pixels.shear_x(x, -0.3, pixels.BLACK),
    ("torchvision", "ShearY", 30, -1): lambda x: pixels.shear_y(x, -0.3, pixels.BLACK),
    ("torchvision", "Rotate", 9, -1): lambda x: pixels.rotate(x, -9, pixels.BLACK),
    ("torchvision", "Posterize", 30, 1): lambda x: pixels.posterize(x, 4),
    ("torchvision", "Solarize", 9, 1): lambda x: pixels.solarize(x, 178.5),
    ("torchvision", "Brightness", 10, 1): lambda x: pixels.brightness(x, 1.3),
    ("torchvision", "Brightness", 10, -1): lambda x: pixels.brightness(x, 0.7),
    ("torchvision", "Color", 10, -1): lambda x: pixels.color(x, 0.7),
    ("torchvision", "Contrast", 10, -1): lambda x: pixels.contrast(x, 0.7),
    ("torchvision", "Sharpness", 10, -1): lambda x: pixels.sharpness(x, 0.7),
    ("torchvision", "TranslateX", 30, 1): lambda x: pixels.translate(x, 0, 182, pixels.BLACK),
    ("torchvision", "TranslateX", 30, -1): lambda x: pixels.translate(x, 0, -182, pixels.BLACK),
    ("torchvision", "TranslateY", 30, -1): lambda x: pixels.translate(x, -136, 0, pixels.BLACK),
    ("timm", "Rotate", 9, -1): lambda x: pixels.rotate(x, -27, FILL, LINEAR),
    ("timm", "Posterize", 9, 1): lambda x: pixels.posterize(x, 1),
    ("timm", "Solarize", 9, 1): lambda x: pixels.solarize(x, 26),
    ("timm", "SolarizeAdd", 9, 1): lambda x: pixels.solarize_add(x, 99),
    ("timm", "Sharpness", 9, 1): lambda x: pixels.sharpness(x, 1.81),
    ("timm", "Sharpness", 9, -1): lambda x: pixels.sharpness(x, 0.19),
    ("timm", "Brightness", 10, -1): lambda x: pixels.brightness(x, 0.1),
    ("timm", "Contrast", 9, -1): lambda x: pixels.contrast(x, 0.19),
    ("timm", "Color", 9, -1): lambda x: pixels.color(x, 0.19),
    ("timm", "ShearX", 9, -1): lambda x: pixels.shear_x(x, -0.27, FILL, LINEAR),
    ("timm", "ShearY", 9, -1): lambda x: pixels.shear_y(x, -0.27, FILL, LINEAR),
    ("timm", "TranslateX", 10, -1): lambda x: pixels.translate(x, 0, -0.45 * 403, FILL, LINEAR),
    ("timm", "TranslateY", 10, -1): lambda x: pixels.translate(x, -0.45 * 301, 0, FILL, LINEAR),
}


@pytest.mark.parametrize(("kind", "operation", "magnitude", "sign"), MAGNITUDES)
def test_magnitudes_are_the_published_ones(photograph, kind, operation, magnitude, sign):
    got = randaugment.SETS[kind][operation](photograph, magnitude, float(sign), rng())
    np.testing.assert_allclose(got, MAGNITUDES[kind, operation, magnitude, sign](photograph), atol=1)


def test_the_sets_have_their_published_size():
    assert {name: len(table) for name, table in randaugment.SETS.items()} == {
        "big_vision": 16,
        "torchvision": 14,
        "timm": 15,
        "three_augment": 3,
    }


def test_three_augment_is_pillows_grey_solarize_or_blur(photograph):
    image = Image.fromarray(photograph)
    grey = np.repeat(np.asarray(image.convert("L"))[..., None], 3, axis=2)
    np.testing.assert_allclose(randaugment.THREE_AUGMENT["Grey"](photograph, 0, 1, rng()), grey, atol=1)
    got = randaugment.THREE_AUGMENT["Solarize"](photograph, 0, 1, rng())
    np.testing.assert_array_equal(got, ImageOps.solarize(image))
    radius = 0.1 + 1.9 * rng().random()
    got = randaugment.THREE_AUGMENT["Blur"](photograph, 0, 1, rng())
    np.testing.assert_array_equal(got, image.filter(ImageFilter.GaussianBlur(radius)))
    assert not np.array_equal(got, photograph)
    drawn = [randaugment.apply(photograph, rng(), operations="three_augment", layers=1, magnitude=0.0)]
    assert not np.array_equal(drawn[0], photograph)


def test_the_simple_random_crop_reflects_at_the_border():
    """DeiT III: shorter side to the size, 4 pixels reflected on each side, a random window."""
    image = np.arange(8 * 8, dtype=np.uint8).reshape(8, 8)
    padded = np.pad(image, 4, mode="reflect")
    windows = {padded[y : y + 8, x : x + 8].tobytes() for y in range(9) for x in range(9)}
    config = TransformConfig((8, 8), crop="random", resize_to=8, pad=4)
    generator = rng()
    found = {transforms.crop(config, image, generator).tobytes() for _ in range(300)}
    assert found <= windows
    assert len(found) > 60


def test_randaugment_draws_layers_operations_and_magnitudes(monkeypatch):
    """With operations that write down how they were called: all are drawn alike, signs are fair, timm's act half."""
    calls = []
    names = list(randaugment.TIMM)
    table = {n: (lambda x, m, s, r, n=n: calls.append((n, m, s)) or x) for n in names}
    monkeypatch.setitem(randaugment.SETS, "timm", table)
    monkeypatch.setitem(randaugment.SETS, "big_vision", table)
    image, generator = np.zeros((4, 4, 3), np.uint8), rng()
    for _ in range(4_000):
        randaugment.apply(image, generator, operations="big_vision", layers=2, magnitude=7.0)
    assert len(calls) == 8_000
    counts = np.array([sum(call[0] == name for call in calls) for name in names])
    assert np.abs(counts / 8_000 - 1 / 15).max() < 0.012
    assert {call[1] for call in calls} == {7.0}
    assert abs(np.mean([call[2] for call in calls])) < 0.05
    calls.clear()
    for _ in range(4_000):
        randaugment.apply(image, generator, operations="timm", layers=2, magnitude=9.0, std=0.5)
    assert abs(len(calls) / 8_000 - 0.5) < 0.03
    levels = np.array([call[1] for call in calls])
    assert levels.max() == 10.0
    assert abs(np.median(levels) - 9.0) < 0.05
    assert abs(np.quantile(levels, 0.1587) - 8.5) < 0.06  # one deviation below


def test_erasing_has_its_rate_area_aspect_and_noise():
    config = TransformConfig((100, 100), crop="none", erase=0.25)
    erase = transform(config, train=True)
    black = np.zeros((100, 100, 3), np.uint8)
    generator = rng()
    shares, aspects, rate = [], [], 0
    for _ in range(3_000):
        out = erase({"image": black, "label": 0}, generator)["image"]
        hit = out.any(-1)
        if hit.any():
            rate += 1
            h, w = hit.any(1).sum(), hit.any(0).sum()
            shares.append(h * w / 10_000)
            aspects.append(np.log(h / w))
    assert abs(rate / 3_000 - 0.25) < 0.03
    assert min(shares) > 0.015
    assert max(shares) < 0.345
    assert abs(np.mean(shares) - (0.02 + 1 / 3) / 2) < 0.015
    assert abs(np.mean(aspects)) < 0.1
    tall = [pixels.erase(black, (0.1, 0.1), (2.0, 4.0), generator).any(-1) for _ in range(200)]
    ratios = np.array([hit.any(1).sum() / hit.any(0).sum() for hit in tall if hit.any()])  # height over width
    assert 1.9 < ratios.min() < ratios.max() < 4.3
    assert abs(np.median(ratios) - 8**0.5) < 0.2  # log-uniform
    whole = pixels.erase(np.zeros((400, 400, 3), np.uint8), (0.3, 0.3), (1.0, 1.0), rng())
    noise = whole[whole.any(-1)]
    np.testing.assert_allclose(noise.mean(0), pixels.IMAGENET_MEAN, atol=2)
    np.testing.assert_allclose(noise.std(0), pixels.IMAGENET_STD, atol=4)  # cut at 0 and 255


def test_jitter_draws_factors_from_its_ranges(photograph, monkeypatch):
    drawn = []
    for name in ("brightness", "contrast", "color", "hue"):
        monkeypatch.setattr(pixels, name, lambda x, f, n=name: drawn.append((n, f)) or x)
    generator = rng()
    for _ in range(1_000):
        pixels.jitter(photograph, (0.4, 0.2, 0.0, 0.1), generator)
    factors = {
        name: np.array([f for n, f in drawn if n == name]) for name in ("brightness", "contrast", "color", "hue")
    }
    assert len(factors["color"]) == 0
    for name, low, high in (("brightness", 0.6, 1.4), ("contrast", 0.8, 1.2), ("hue", -0.1, 0.1)):
        assert len(factors[name]) == 1_000
        assert low <= factors[name].min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < factors[name].max() <= high
    order = [n for n, _ in drawn[::3]]
    assert 250 < order.count("brightness") < 420  # any of the three comes first


# ---- the whole -------------------------------------------------------------------------------------------------------

EVERYTHING = TransformConfig(
    (48, 40), flip=0.5, rotate=5.0, randaugment="timm", randaugment_std=0.5, jitter=(0.4, 0.4, 0.4, 0.1), erase=0.5
)


@pytest.mark.parametrize("crop", transforms.CROPS)
def test_every_crop_gives_uint8_rgb_of_the_size_from_any_record(photograph, crop):
    config = TransformConfig((48, 40), crop=crop, resize_to=50, pad=2)
    train = crop in transforms.RANDOM_CROPS
    small = photograph[:48, :40]
    for image in (small, small[..., 0], small[..., :1], encode(small), encode(small, "png")):
        out = transform(config, train)({"image": image, "label": 3}, rng())
        assert out["image"].shape == (48, 40, 3)
        assert out["image"].dtype == np.uint8
        assert out["label"] == 3


def test_an_image_is_a_function_of_record_and_generator(photograph):
    record = {"image": encode(photograph), "label": 0}
    function = transform(EVERYTHING, train=True)
    images = [function(record, rng(seed))["image"] for seed in (1, 1, 2)]
    np.testing.assert_array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])


@pytest.mark.parametrize("crop", transforms.CROPS)
@pytest.mark.parametrize("grey", [False, True])
def test_an_image_is_the_same_wherever_it_is_written(photograph, crop, grey):
    """With a place for it or without, mirrored or not, resized there or copied; the place's neighbours stay."""
    image = photograph[:60, :80] if crop != "none" else photograph[:48, :40]
    image = image[..., 0].copy() if grey else image
    train = crop in transforms.RANDOM_CROPS
    flips = (0.0, 0.5) if train else (0.0,)
    for flip, erase, data, seed in itertools.product(flips, flips, (image, encode(image)), range(6)):
        config = TransformConfig((48, 40), crop=crop, resize_to=50, pad=2, flip=flip, erase=erase)
        record = {"image": data, "label": 0}
        batch = np.full((3, 48, 40, 3), 77, np.uint8)
        place = batch[1]
        result = transform(config, train)(record, rng(seed), place)["image"]
        if result is not place:
            batch[1] = result
        np.testing.assert_array_equal(batch[1], transform(config, train)(record, rng(seed))["image"])
        assert (batch[[0, 2]] == 77).all()


def test_a_training_image_is_written_straight_into_its_place(photograph):
    place = np.empty((48, 40, 3), np.uint8)
    for seed in range(8):
        config = TransformConfig((48, 40), flip=0.5)
        assert (
            transform(config, train=True)({"image": encode(photograph), "label": 0}, rng(seed), place)["image"] is place
        )


def test_the_record_is_left_as_it_was(photograph):
    image = photograph[:48, :40].copy()
    config = dataclasses.replace(EVERYTHING, crop="none")
    for seed in range(20):
        for out in (None, np.empty_like(image)):
            transform(config, train=True)({"image": image, "label": 0}, rng(seed), out)
    np.testing.assert_array_equal(image, photograph[:48, :40])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop": "centre"}, "choose one of inception"),
        ({"resize": "cubic"}, "choose one of linear"),
        ({"randaugment": "tf"}, "choose one of none, big_vision"),
        ({"size": (0, 8)}, "size"),
        ({"area": (0.5, 0.1)}, "area"),
        ({"aspect": (0.0, 1.0)}, "aspect"),
        ({"erase_area": (0.1, 2.0)}, "erase_area"),
        ({"flip": 1.5}, "flip 1.5 is a probability"),
        ({"scale": 1.0}, "scale"),
        ({"pad": -1}, "pad -1 cannot be negative"),
        ({"jitter": (0.1, 0.1, 0.1, 0.7)}, "hue"),
        ({"crop": "random", "resize_to": 100}, "resize_to 100 is smaller than size"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        transform(TransformConfig(**fields), train=True)


def test_evaluation_cannot_be_random():
    with pytest.raises(ValueError, match=r"flip, erase, crop='inception', randaugment, jitter is set"):
        transform(TransformConfig(flip=0.5, erase=0.1, randaugment="timm", jitter=(0.1, 0, 0, 0)), train=False)


def test_crops_that_cannot_be_say_so(photograph):
    record = {"image": photograph, "label": 0}
    with pytest.raises(ValueError, match="301 x 403"):
        transform(TransformConfig((28, 28), crop="none"), train=False)(record, None)
    with pytest.raises(ValueError, match="pad 1"):
        transform(TransformConfig((310, 310), crop="pad", pad=1), train=True)(record, rng())

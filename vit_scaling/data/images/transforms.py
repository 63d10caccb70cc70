"""From one record to one training or evaluation image: uint8 RGB of a fixed size, on the host.

The order is fixed: decode, crop, flip, small affine, RandAugment, colour jitter, erase. Each step has its own fields
in `TransformConfig` and is off by default. Every random number comes from the generator that the caller
passes, so an image is a pure function of (record, generator). Normalisation happens on the device (`mixing.to_float`).

Crops:

    inception               area and aspect as TensorFlow's sample_distorted_bounding_box draws them: the aspect
                            uniformly, then the height uniformly between the smallest and the largest that `area`
                            allows, 100 attempts, then the whole image
    inception_torchvision   as torchvision's RandomResizedCrop: the area uniformly, the aspect log-uniformly,
                            10 attempts, then the largest central crop of an allowed aspect
    random                  resize the shorter side to `resize_to`, reflect `pad` pixels on every side, then a random
                            window; with resize_to of `size` and pad 4 the simple random crop of DeiT III
    pad                     pad `pad` black pixels on every side, then a random window: a random shift
    central                 resize the shorter side to `resize_to`, then the central window
    central_torchvision     as central, but half a pixel is rounded to an even one, as torchvision's CenterCrop does
    square_central          resize to a square of `resize_to`, then the central window (the few-shot protocol)
    resize                  resize to `size`, whatever the aspect
    none                    the image must have `size` already

The first four are random. Resizing: "linear" is OpenCV's bilinear without antialiasing, as TensorFlow's and
big_vision's training crops; "area" averages when it shrinks (big_vision's resize_small); "antialias" is Pillow's
bilinear, whose filter widens when it shrinks, as torchvision's; "bicubic" and "lanczos" are Pillow's too. With these
three, crops that are not random give the pixels of transformers' evaluation, central_torchvision those of torchvision's
and timm's: the longer side is cut to whole pixels, and JPEGs are decoded at their whole size by the slow exact way.
"""

import dataclasses
import functools
import math
from typing import Any, Protocol, runtime_checkable

import cv2
import numpy as np
from PIL import Image

from vit_scaling import UserError
from vit_scaling.data.images import codec, pixels, randaugment
from vit_scaling.data.images.codec import Box

RANDOM_CROPS = ("inception", "inception_torchvision", "random", "pad")
CROPS = (*RANDOM_CROPS, "central", "central_torchvision", "square_central", "resize", "none")
_PILLOW = {
    "antialias": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
RESIZES = ("linear", "area", "antialias", "bicubic", "lanczos")


@dataclasses.dataclass
class TransformConfig:
    """The steps from record to image, in their order. The head of this file explains crops and resizing."""

    size: tuple[int, int] = (224, 224)
    """Height and width of what comes out."""
    alpha: str = "white"
    """What is behind transparent pixels: white or black; drop keeps the colours that alpha hides."""
    crop: str = "inception"
    area: tuple[float, float] = (0.05, 1.0)
    """Inception crops: the share of the image's area that the crop may cover."""
    aspect: tuple[float, float] = (0.75, 1.33)
    """Inception crops: width over height."""
    resize_to: int = 256
    """Length of the shorter side (square_central: of both) before the window of random, central, square_central."""
    pad: int = 0
    resize: str = "linear"
    flip: float = 0.0
    """Probability of a left-right mirror image."""
    rotate: float = 0.0
    """Small affine, one warp about the centre: up to this many degrees either way."""
    scale: float = 0.0
    """Up to this share larger or smaller."""
    shear: float = 0.0
    """Up to this horizontal shear, in width per height."""
    shift: float = 0.0
    """Up to this many pixels in each direction."""
    randaugment: str = "none"
    """Operation set: none, big_vision, torchvision, timm or three_augment (randaugment.py)."""
    randaugment_layers: int = 2
    randaugment_magnitude: float = 10.0
    randaugment_std: float = 0.0
    """Standard deviation of the magnitude, drawn for each operation."""
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Colour jitter's strengths: brightness, contrast, saturation, hue."""
    erase: float = 0.0
    """Probability of random erasing: a rectangle of noise."""
    erase_area: tuple[float, float] = (0.02, 1 / 3)
    erase_aspect: tuple[float, float] = (0.3, 10 / 3)


def transform(config: TransformConfig, train: bool) -> "Transform":
    """Returns the function (record, generator) -> {"image": uint8 [height, width, 3], "label": ...} of `config`.

    Args:
        config: the steps.
        train: False promises that nothing is random; the generator is then ignored and may be None.

    Raises:
        UserError: a field is out of range, or `train` is False and a step is random.
    """
    return _ConfiguredTransform(config, train)


@runtime_checkable
class Transform(Protocol):
    """From one record to one example; any such callable can replace the one of this file.

    `out` is where the example's image will end up: uint8 [height, width, 3]. A transform may write the image there and
    return `out` itself as the image, or ignore it.
    """

    size: tuple[int, int]

    def __call__(
        self, record: dict[str, Any], rng: np.random.Generator | None, out: np.ndarray | None = None
    ) -> dict[str, Any]: ...


class _ConfiguredTransform:
    """What `transform` returns. It can be pickled."""

    def __init__(self, config: TransformConfig, train: bool):
        validate(config, train)
        self.config = config
        self.size = config.size

    def __call__(
        self, record: dict[str, Any], rng: np.random.Generator | None, out: np.ndarray | None = None
    ) -> dict[str, Any]:
        config = self.config
        draw = np.random.default_rng(0) if rng is None else rng  # without one nothing is drawn: `validate` saw to it
        image = crop(config, record["image"], draw, out)
        if config.flip and draw.random() < config.flip:
            image = cv2.flip(image, 1, out)  # in place where the crop has written there
        if config.rotate or config.scale or config.shear or config.shift:
            image = small_affine(config, image, draw)
        image = np.ascontiguousarray(image)
        if image.ndim == 2:
            image = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
        if config.randaugment != "none":
            image = randaugment.apply(
                image,
                draw,
                operations=config.randaugment,
                layers=config.randaugment_layers,
                magnitude=config.randaugment_magnitude,
                std=config.randaugment_std,
            )
        if any(config.jitter):
            image = pixels.jitter(image, config.jitter, draw)
        if config.erase and draw.random() < config.erase:
            image = pixels.erase(image, config.erase_area, config.erase_aspect, draw)
        return {"image": image, "label": record["label"]}


def validate(config: TransformConfig, train: bool) -> None:
    """Raises ValueError, naming the field, if `config` cannot be meant."""

    def need(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(message)

    choices_of = {"crop": CROPS, "resize": RESIZES, "randaugment": ("none", *randaugment.SETS), "alpha": codec.ALPHA}
    for name, choices in choices_of.items():
        value = getattr(config, name)
        need(value in choices, f"{name} {value!r} is unknown; choose one of {', '.join(choices)}")
    need(min(config.size) >= 1, f"size {config.size} must be a height and a width of at least 1")
    for name in ("area", "erase_area"):
        low, high = getattr(config, name)
        need(0 < low <= high <= 1, f"{name} {(low, high)} must be two shares with 0 < low <= high <= 1")
    for name in ("aspect", "erase_aspect"):
        low, high = getattr(config, name)
        need(0 < low <= high, f"{name} {(low, high)} must be two ratios with 0 < low <= high")
    for name in ("flip", "erase"):
        value = getattr(config, name)
        need(0 <= value <= 1, f"{name} {value} is a probability; give a number from 0 to 1")
    for name in ("pad", "rotate", "scale", "shear", "shift", "randaugment_magnitude", "randaugment_std"):
        value = getattr(config, name)
        need(value >= 0, f"{name} {value} cannot be negative")
    need(config.scale < 1, f"scale {config.scale} must be below 1: the image would vanish")
    need(min(config.jitter) >= 0, f"jitter {config.jitter} cannot be negative")
    need(config.jitter[3] <= 0.5, f"jitter {config.jitter} turns the hue by more than half a circle, which is 0.5")
    if config.crop == "random" or "central" in config.crop:
        need(
            config.resize_to >= max(config.size),
            f"resize_to {config.resize_to} is smaller than size {config.size}: the window does not fit",
        )
    if not train:
        random = [name for name in ("flip", "rotate", "scale", "shear", "shift", "erase") if getattr(config, name)]
        random += [f"crop={config.crop!r}"] if config.crop in RANDOM_CROPS else []
        random += ["randaugment"] if config.randaugment != "none" else []
        random += ["jitter"] if any(config.jitter) else []
        need(not random, f"an evaluation transform cannot be random, and {', '.join(random)} is set")


def crop(
    config: TransformConfig, image: bytes | np.ndarray, rng: np.random.Generator, out: np.ndarray | None = None
) -> np.ndarray:
    """Decodes, crops and resizes to `config.size`, into `out` where that can be done.

    Grey arrays stay grey ([H, W]) until the end, which is faster.
    """
    height, width = config.size
    if isinstance(image, bytes):
        header = codec.read_header(image)
        h, w = header.height, header.width
        decode = functools.partial(codec.decode, image, header, alpha=config.alpha)
    else:
        array = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
        h, w = array.shape[:2]
        decode = functools.partial(_as_it_is, array)

    if config.crop == "none":
        if (h, w) != config.size:
            raise UserError(f"crop='none' leaves an image of {h} x {w} as it is, and size is {height} x {width}")
        return decode()
    if config.crop == "pad":
        pad = config.pad
        if h + 2 * pad < height or w + 2 * pad < width:
            raise UserError(f"crop='pad' cannot cut {height} x {width} from an image of {h} x {w} with pad {pad}")
        padded = cv2.copyMakeBorder(decode(), pad, pad, pad, pad, cv2.BORDER_CONSTANT, value=(0, 0, 0))
        return _window(padded, config.size, rng)

    # Every other crop is a box of the image and the size it is resized to; then, for some, a window of that.
    box: Box = (0, 0, h, w)
    target = config.size
    as_published = config.resize in _PILLOW and config.crop not in RANDOM_CROPS
    if config.crop == "inception":
        box = inception_box(h, w, config.area, config.aspect, rng)
    elif config.crop == "inception_torchvision":
        box = inception_box_torchvision(h, w, config.area, config.aspect, rng)
    elif config.crop == "square_central":
        target = (config.resize_to, config.resize_to)
    elif config.crop in ("central", "central_torchvision", "random"):
        ratio = config.resize_to / min(h, w)
        target = (max(round(h * ratio), config.resize_to), max(round(w * ratio), config.resize_to))
        if as_published:
            target = (config.resize_to * h // min(h, w), config.resize_to * w // min(h, w))

    # The JPEG codec can shrink by 2, 4 or 8 inside the inverse DCT: the smallest image that still covers the target.
    covers = min(box[2] // target[0], box[3] // target[1])
    reduce = 1
    if covers > 1 and not as_published and isinstance(image, bytes) and header.format == "jpeg":
        reduce = min(1 << covers.bit_length() - 1, 8)
        box = _reduced(box, reduce)
    resized = resize(decode(reduce=reduce, crop=box, exact=as_published), target, config.resize, out)
    if config.crop == "random" and config.pad:
        resized = cv2.copyMakeBorder(resized, *(config.pad,) * 4, cv2.BORDER_REFLECT_101)
    if target == config.size and config.crop != "random":
        return resized
    return _window(resized, config.size, rng if config.crop == "random" else None, config.crop == "central_torchvision")


def _as_it_is(array: np.ndarray, reduce: int = 1, crop: Box | None = None, exact: bool = False) -> np.ndarray:
    return array if crop is None else array[crop[0] : crop[0] + crop[2], crop[1] : crop[1] + crop[3]]


def resize(image: np.ndarray, size: tuple[int, int], method: str, out: np.ndarray | None = None) -> np.ndarray:
    """Resizes [H, W] or [H, W, 3] uint8 to `size` (height, width); the head of this file explains the methods.

    Where `out` has the result's shape, OpenCV writes there.
    """
    if image.shape[:2] == size:
        return image
    if method in _PILLOW:
        return np.asarray(Image.fromarray(image).resize(size[::-1], _PILLOW[method]))
    return cv2.resize(image, size[::-1], out, interpolation=cv2.INTER_AREA if method == "area" else cv2.INTER_LINEAR)


def inception_box(
    height: int, width: int, area: tuple[float, float], aspect: tuple[float, float], rng: np.random.Generator
) -> Box:
    """Draws a crop as TensorFlow's sample_distorted_bounding_box does for an image without boxes, 100 attempts."""
    smallest, largest = area[0] * height * width, area[1] * height * width
    for _ in range(100):
        ratio = aspect[0] + (aspect[1] - aspect[0]) * rng.random()
        low = round(math.sqrt(smallest / ratio))
        high = round(math.sqrt(largest / ratio))
        if round(high * ratio) > width:  # the tallest whose width still fits
            high = int((width + 0.5 - 1e-7) / ratio)
            high -= round(high * ratio) > width
        high = min(high, height)
        low = min(low, high)
        h = low + int(rng.random() * (high - low + 1))
        w = round(h * ratio)
        if h * w < smallest:  # rounding may have left the range: one row is tried on either side
            h += 1
            w = round(h * ratio)
        if h * w > largest:
            h -= 1
            w = round(h * ratio)
        if smallest <= h * w <= largest and 0 < h <= height and 0 < w <= width:
            # TensorFlow draws the corner below height - h, so the last row and column of positions never occur.
            top = int(rng.random() * (height - h)) if h < height else 0
            left = int(rng.random() * (width - w)) if w < width else 0
            return top, left, h, w
    return 0, 0, height, width


def inception_box_torchvision(
    height: int, width: int, area: tuple[float, float], aspect: tuple[float, float], rng: np.random.Generator
) -> Box:
    """Draws a crop as torchvision's RandomResizedCrop does."""
    log_low, log_high = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(10):
        pixels = height * width * (area[0] + (area[1] - area[0]) * rng.random())
        ratio = math.exp(log_low + (log_high - log_low) * rng.random())
        h, w = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.random() * (height - h + 1)), int(rng.random() * (width - w + 1)), h, w
    h, w = height, width
    if width / height < aspect[0]:
        h = round(width / aspect[0])
    elif width / height > aspect[1]:
        w = round(height * aspect[1])
    return (height - h) // 2, (width - w) // 2, h, w


def small_affine(config: TransformConfig, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rotates, scales, shears and shifts about the centre in one bilinear warp; what comes in from outside is black."""
    angle, scale, shear, dy, dx = 2 * rng.random(5) - 1
    angle, shear = math.radians(config.rotate * angle), config.shear * shear
    scale = 1 + config.scale * scale
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    y, x = (image.shape[0] - 1) / 2, (image.shape[1] - 1) / 2
    a, b, c, d = cos, cos * shear - sin, sin, sin * shear + cos
    matrix = np.array([[a, b, x - a * x - b * y + config.shift * dx], [c, d, y - c * x - d * y + config.shift * dy]])
    return cv2.warpAffine(np.ascontiguousarray(image), matrix, image.shape[1::-1], flags=cv2.INTER_LINEAR)


def _window(
    image: np.ndarray, size: tuple[int, int], rng: np.random.Generator | None, to_even: bool = False
) -> np.ndarray:
    """Cuts `size` from the image: a random window, or without a generator the central one.

    to_even: whether half of an odd margin is rounded to an even number, and not down.
    """
    rows, columns = image.shape[0] - size[0], image.shape[1] - size[1]
    if rng is None:
        top, left = (round(rows / 2), round(columns / 2)) if to_even else (rows // 2, columns // 2)
    else:
        top, left = int(rng.random() * (rows + 1)), int(rng.random() * (columns + 1))
    return image[top : top + size[0], left : left + size[1]]


def _reduced(box: Box, reduce: int) -> Box:
    """The box in the image's copy at 1/reduce of the size, to whole pixels."""
    top, left, bottom, right = (round(x / reduce) for x in (box[0], box[1], box[0] + box[2], box[1] + box[3]))
    return top, left, bottom - top, right - left

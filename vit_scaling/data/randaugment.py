"""RandAugment (arXiv 1909.13719) on one uint8 RGB image, with the three operation sets that recipes mean by the name.

    big_vision    16 operations, of TensorFlow's reference for EfficientNet, as in the recipes of Scaling ViT's
                  authors; magnitude 10 is an enhancement factor of 1.9, 30 degrees, 100 pixels; what a warp uncovers
                  is grey
    torchvision   the paper's 14 operations, Identity among them, as torchvision implements them; magnitude 30 is
                  full, uncovered is black
    timm          15 "increasing" operations, as in DeiT's and Swin's recipes (rand-m9-mstd0.5-inc1): every operation
                  acts with probability 1/2, more magnitude is more change; uncovered is ImageNet's mean colour

Operations have Pillow's meaning, also where TensorFlow's reference errs: contrast blends with the mean grey (the
reference uses the image's area divided by 256), and solarize inverts the values from the threshold on, for thresholds
up to 256 too (the reference compares in uint8, where 256 does not exist): in the set big_vision, magnitude 10 makes
solarize the identity.
"""

from collections.abc import Callable

import cv2
import numpy as np

Colour = tuple[int, int, int]
GREY: Colour = (128, 128, 128)
BLACK: Colour = (0, 0, 0)
IMAGENET_MEAN: Colour = (124, 116, 104)


def apply(
    image: np.ndarray, rng: np.random.Generator, *, operations: str, layers: int, magnitude: float, std: float = 0.0
) -> np.ndarray:
    """Applies `layers` operations, drawn with replacement from a set, one after the other.

    Args:
        image: uint8 [H, W, 3].
        rng: source of every random choice.
        operations: a key of `SETS`.
        layers: how many operations, the paper's N.
        magnitude: the paper's M on the set's scale (10 is full for big_vision and timm, 30 for torchvision).
        std: standard deviation of a normal draw around `magnitude` for each operation, cut to [0, 10]; 0: no draw.
    """
    table = list(SETS[operations].values())
    probability = 0.5 if operations == "timm" else 1.0
    for _ in range(layers):
        operation = table[int(rng.random() * len(table))]
        sign = 1.0 if rng.random() < 0.5 else -1.0
        level = min(max(rng.normal(magnitude, std), 0.0), 10.0) if std else magnitude
        if rng.random() < probability:
            image = operation(image, level, sign, rng)
    return image


# ---- operations ------------------------------------------------------------------------------------------------------


def autocontrast(image: np.ndarray) -> np.ndarray:
    """Stretches every channel to [0, 255]."""
    ramp = np.arange(256, dtype=np.float64)
    tables = []
    for channel in range(3):
        low, high, _, _ = cv2.minMaxLoc(image[..., channel])
        tables.append(np.clip((ramp - low) * (255.0 / (high - low)), 0, 255) if high > low else ramp)
    return _lookup(image, np.stack(tables, -1))


def equalize(image: np.ndarray) -> np.ndarray:
    """Makes every channel's histogram flat, by Pillow's integer rule."""
    tables = []
    for channel in range(3):
        histogram = cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel().astype(np.int64)
        filled = histogram[histogram > 0]
        step = (filled.sum() - filled[-1]) // 255
        before = np.cumsum(histogram) - histogram
        tables.append(np.clip((before + step // 2) // step, 0, 255) if step else np.arange(256))
    return _lookup(image, np.stack(tables, -1))


def invert(image: np.ndarray) -> np.ndarray:
    return 255 - image


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
    """Keeps the upper `bits` (0 to 8) of every value."""
    return image & np.uint8(256 - 2 ** (8 - bits))


def solarize(image: np.ndarray, threshold: float) -> np.ndarray:
    """Inverts every value at or above `threshold`."""
    ramp = np.arange(256)
    return _lookup(image, np.where(ramp < threshold, ramp, 255 - ramp))


def solarize_add(image: np.ndarray, addition: int) -> np.ndarray:
    """Adds to every value below 128."""
    ramp = np.arange(256)
    return _lookup(image, np.where(ramp < 128, np.clip(ramp + addition, 0, 255), ramp))


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with black: 0 is black, 1 the image, more is brighter."""
    return _lookup(image, np.clip(np.arange(256) * factor, 0, 255))


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with the image's mean grey value."""
    mean = int(cv2.mean(_grey(image))[0] + 0.5)
    return _lookup(image, np.clip(mean + (np.arange(256) - mean) * factor, 0, 255))


def color(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with the grey image: 0 is grey, 1 the image, more is more saturated."""
    return _blend(cv2.cvtColor(_grey(image), cv2.COLOR_GRAY2RGB), image, factor)


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with the smoothed image: below 1 blurs, above 1 sharpens. The outermost pixels stay."""
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
    smooth = image.copy()
    smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, kernel)[1:-1, 1:-1]
    return _blend(smooth, image, factor)


def rotate(image: np.ndarray, degrees: float, fill: Colour, interpolation: int = cv2.INTER_NEAREST) -> np.ndarray:
    """Turns about the centre, counter-clockwise."""
    height, width = image.shape[:2]
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    x, y = width / 2, height / 2
    return _warp(image, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y), fill, interpolation)


def shear_x(image: np.ndarray, shear: float, fill: Colour, interpolation: int = cv2.INTER_NEAREST) -> np.ndarray:
    """Row y moves left by shear * y."""
    return _warp(image, (1, shear, 0, 0, 1, 0), fill, interpolation)


def shear_y(image: np.ndarray, shear: float, fill: Colour, interpolation: int = cv2.INTER_NEAREST) -> np.ndarray:
    """Column x moves up by shear * x."""
    return _warp(image, (1, 0, 0, shear, 1, 0), fill, interpolation)


def translate(
    image: np.ndarray, dy: float, dx: float, fill: Colour, interpolation: int = cv2.INTER_NEAREST
) -> np.ndarray:
    """Moves the content up by dy and left by dx pixels."""
    return _warp(image, (1, 0, dx, 0, 1, dy), fill, interpolation)


def cutout(image: np.ndarray, half: int, rng: np.random.Generator, fill: Colour) -> np.ndarray:
    """Fills a square of side 2 * half around a uniform centre (arXiv 1708.04552), cut at the border."""
    y, x = int(rng.random() * image.shape[0]), int(rng.random() * image.shape[1])
    image = image.copy()
    image[max(y - half, 0) : y + half, max(x - half, 0) : x + half] = fill
    return image


def _grey(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)  # ITU-R 601 luma, as Pillow's "L"


def _lookup(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Maps every value through a table of 256, or of [256, 3] for the three channels; fractions are cut off."""
    table = np.ascontiguousarray(table.astype(np.uint8))
    return cv2.LUT(np.ascontiguousarray(image), table if table.ndim == 1 else table.reshape(1, 256, 3))


def _blend(zero: np.ndarray, one: np.ndarray, factor: float) -> np.ndarray:
    """zero + factor * (one - zero), beyond both ends too, cut to uint8."""
    return cv2.addWeighted(one, factor, zero, 1 - factor, 0)


def _warp(image: np.ndarray, matrix: tuple[float, ...], fill: Colour, interpolation: int) -> np.ndarray:
    """Fetches for the output point (x, y) the input point (a x + b y + c, d x + e y + f); pixel centres are at .5."""
    a, b, c, d, e, f = matrix
    inverse = np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]])
    return cv2.warpAffine(
        np.ascontiguousarray(image),
        inverse,
        image.shape[1::-1],
        flags=interpolation | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=fill,
    )


# ---- sets: m is the magnitude, s a random sign ------------------------------------------------------------------------

Operation = Callable[[np.ndarray, float, float, np.random.Generator], np.ndarray]


def _bits(kept: float) -> int:
    return min(max(int(kept), 0), 8)


BIG_VISION: dict[str, Operation] = {
    "AutoContrast": lambda x, m, s, rng: autocontrast(x),
    "Equalize": lambda x, m, s, rng: equalize(x),
    "Invert": lambda x, m, s, rng: invert(x),
    "Rotate": lambda x, m, s, rng: rotate(x, s * 3 * m, GREY),
    "Posterize": lambda x, m, s, rng: posterize(x, _bits(0.4 * m)),
    "Solarize": lambda x, m, s, rng: solarize(x, int(25.6 * m)),
    "SolarizeAdd": lambda x, m, s, rng: solarize_add(x, int(11 * m)),
    "Color": lambda x, m, s, rng: color(x, 0.18 * m + 0.1),
    "Contrast": lambda x, m, s, rng: contrast(x, 0.18 * m + 0.1),
    "Brightness": lambda x, m, s, rng: brightness(x, 0.18 * m + 0.1),
    "Sharpness": lambda x, m, s, rng: sharpness(x, 0.18 * m + 0.1),
    "ShearX": lambda x, m, s, rng: shear_x(x, s * 0.03 * m, GREY),
    "ShearY": lambda x, m, s, rng: shear_y(x, s * 0.03 * m, GREY),
    "TranslateX": lambda x, m, s, rng: translate(x, 0, s * 10 * m, GREY),
    "TranslateY": lambda x, m, s, rng: translate(x, s * 10 * m, 0, GREY),
    "Cutout": lambda x, m, s, rng: cutout(x, int(4 * m), rng, GREY),
}

TORCHVISION: dict[str, Operation] = {
    "Identity": lambda x, m, s, rng: x,
    "ShearX": lambda x, m, s, rng: shear_x(x, s * 0.01 * m, BLACK),
    "ShearY": lambda x, m, s, rng: shear_y(x, s * 0.01 * m, BLACK),
    "TranslateX": lambda x, m, s, rng: translate(x, 0, s * int(150 / 331 * x.shape[1] * m / 30), BLACK),
    "TranslateY": lambda x, m, s, rng: translate(x, s * int(150 / 331 * x.shape[0] * m / 30), 0, BLACK),
    "Rotate": lambda x, m, s, rng: rotate(x, s * m, BLACK),
    "Brightness": lambda x, m, s, rng: brightness(x, 1 + s * 0.03 * m),
    "Color": lambda x, m, s, rng: color(x, 1 + s * 0.03 * m),
    "Contrast": lambda x, m, s, rng: contrast(x, 1 + s * 0.03 * m),
    "Sharpness": lambda x, m, s, rng: sharpness(x, 1 + s * 0.03 * m),
    "Posterize": lambda x, m, s, rng: posterize(x, _bits(8 - round(m / 7.5))),
    "Solarize": lambda x, m, s, rng: solarize(x, 255 - 8.5 * m),
    "AutoContrast": lambda x, m, s, rng: autocontrast(x),
    "Equalize": lambda x, m, s, rng: equalize(x),
}

TIMM: dict[str, Operation] = {
    "AutoContrast": lambda x, m, s, rng: autocontrast(x),
    "Equalize": lambda x, m, s, rng: equalize(x),
    "Invert": lambda x, m, s, rng: invert(x),
    "Rotate": lambda x, m, s, rng: rotate(x, s * 3 * m, IMAGENET_MEAN, cv2.INTER_LINEAR),
    "Posterize": lambda x, m, s, rng: posterize(x, _bits(4 - int(0.4 * m))),
    "Solarize": lambda x, m, s, rng: solarize(x, 256 - int(25.6 * m)),
    "SolarizeAdd": lambda x, m, s, rng: solarize_add(x, min(int(11 * m), 128)),
    "Color": lambda x, m, s, rng: color(x, max(1 + s * 0.09 * m, 0.1)),
    "Contrast": lambda x, m, s, rng: contrast(x, max(1 + s * 0.09 * m, 0.1)),
    "Brightness": lambda x, m, s, rng: brightness(x, max(1 + s * 0.09 * m, 0.1)),
    "Sharpness": lambda x, m, s, rng: sharpness(x, max(1 + s * 0.09 * m, 0.1)),
    "ShearX": lambda x, m, s, rng: shear_x(x, s * 0.03 * m, IMAGENET_MEAN, cv2.INTER_LINEAR),
    "ShearY": lambda x, m, s, rng: shear_y(x, s * 0.03 * m, IMAGENET_MEAN, cv2.INTER_LINEAR),
    "TranslateX": lambda x, m, s, rng: translate(x, 0, s * 0.045 * m * x.shape[1], IMAGENET_MEAN, cv2.INTER_LINEAR),
    "TranslateY": lambda x, m, s, rng: translate(x, s * 0.045 * m * x.shape[0], 0, IMAGENET_MEAN, cv2.INTER_LINEAR),
}

SETS = {"big_vision": BIG_VISION, "torchvision": TORCHVISION, "timm": TIMM}

"""What can be done to the pixels of one uint8 RGB image, [H, W, 3]: each function returns a new one.

Operations mean what Pillow's of the same name mean; the tests compare them. Tables of 256 values and
OpenCV do the work.
"""

import math

import cv2
import numpy as np
from PIL import Image, ImageFilter

Colour = tuple[int, int, int]
GREY: Colour = (128, 128, 128)
BLACK: Colour = (0, 0, 0)
IMAGENET_MEAN: Colour = (124, 116, 104)
IMAGENET_STD = (58, 57, 57)


def autocontrast(image: np.ndarray) -> np.ndarray:
    """Stretches every channel to [0, 255]."""
    return cv2.merge([_stretch(channel) for channel in cv2.split(image)])


def _stretch(channel: np.ndarray) -> np.ndarray:
    low, high, _, _ = cv2.minMaxLoc(channel)
    return _lookup(channel, np.clip((np.arange(256) - low) * (255.0 / (high - low)), 0, 255)) if high > low else channel


def equalize(image: np.ndarray) -> np.ndarray:
    """Makes every channel's histogram flat, by Pillow's integer rule."""
    return cv2.merge([_flatten(channel) for channel in cv2.split(image)])


def _flatten(channel: np.ndarray) -> np.ndarray:
    histogram = cv2.calcHist([channel], [0], None, [256], [0, 256]).ravel().astype(np.int64)
    filled = histogram[histogram > 0]
    step = (filled.sum() - filled[-1]) // 255
    before = np.cumsum(histogram) - histogram
    return _lookup(channel, np.clip((before + step // 2) // step, 0, 255)) if step else channel


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


def hue(image: np.ndarray, turn: float) -> np.ndarray:
    """Turns the hue by `turn` (1 is all the way round)."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(turn * 256) % 256)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with the smoothed image: below 1 blurs, above 1 sharpens. The outermost pixels stay."""
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
    smooth = image.copy()
    smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, kernel)[1:-1, 1:-1]
    return _blend(smooth, image, factor)


def blur(image: np.ndarray, radius: float) -> np.ndarray:
    """Blurs as Pillow's GaussianBlur of a standard deviation of `radius` pixels."""
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


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


def jitter(image: np.ndarray, strengths: tuple[float, float, float, float], rng: np.random.Generator) -> np.ndarray:
    """Changes brightness, contrast, saturation and hue, in random order, as torchvision's ColorJitter.

    Args:
        strengths: in that order; s draws a factor from [max(0, 1 - s), 1 + s], and for hue a turn from [-s, s].
    """
    for kind in rng.permutation(4):
        strength = strengths[kind]
        if strength:
            low = -strength if kind == 3 else max(0.0, 1.0 - strength)
            high = strength if kind == 3 else 1.0 + strength
            image = (brightness, contrast, color, hue)[kind](image, low + (high - low) * rng.random())
    return image


def erase(
    image: np.ndarray, area: tuple[float, float], aspect: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """Fills a random rectangle with noise (random erasing, arXiv 1708.04896): 10 attempts to draw one that fits.

    The share of the area is uniform and the aspect (height over width) log-uniform. The noise of every pixel is normal
    with ImageNet's mean and deviation.
    """
    height, width = image.shape[:2]
    for _ in range(10):
        pixels = height * width * (area[0] + (area[1] - area[0]) * rng.random())
        ratio = math.exp(math.log(aspect[0]) + math.log(aspect[1] / aspect[0]) * rng.random())
        h, w = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < h < height and 0 < w < width:
            top, left = int(rng.random() * (height - h + 1)), int(rng.random() * (width - w + 1))
            noise = rng.standard_normal((h, w, 3), np.float32) * np.array(IMAGENET_STD, np.float32) + IMAGENET_MEAN
            image = image.copy()
            image[top : top + h, left : left + w] = np.clip(noise + 0.5, 0, 255)
            break
    return image


def _grey(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)  # ITU-R 601 luma, as Pillow's "L"


def _lookup(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Maps every value through a table of 256; fractions are cut off."""
    return cv2.LUT(np.ascontiguousarray(image), table.astype(np.uint8))


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

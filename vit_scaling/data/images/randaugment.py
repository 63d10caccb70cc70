"""RandAugment (arXiv 1909.13719) on one uint8 RGB image, with the three operation sets that recipes mean by the name.

A fourth set is 3-Augment.

    big_vision    16 operations, of TensorFlow's reference for EfficientNet, as in the recipes of Scaling ViT's
                  authors; magnitude 10 is an enhancement factor of 1.9, 30 degrees, 100 pixels; what a warp uncovers
                  is grey
    torchvision   the paper's 14 operations, Identity among them, as torchvision implements them; magnitude 30 is
                  full, uncovered is black
    timm          15 "increasing" operations, as in DeiT's and Swin's recipes (rand-m9-mstd0.5-inc1): every operation
                  acts with probability 1/2, more magnitude is more change; uncovered is ImageNet's mean colour
    three_augment  grey, solarize or a Gaussian blur, the 3-Augment of DeiT III (arXiv 2204.07118), for one layer; there
                  is no magnitude

Operations have Pillow's meaning (pixels.py), also where TensorFlow's reference errs: contrast blends with the mean grey
(the reference uses the image's area divided by 256), and solarize inverts the values from the threshold on, for
thresholds up to 256 too (the reference compares in uint8, where 256 does not exist): in the set big_vision, magnitude
10 makes solarize the identity.
"""

from collections.abc import Callable

import cv2
import numpy as np

from vit_scaling.data.images.pixels import (
    BLACK,
    GREY,
    IMAGENET_MEAN,
    autocontrast,
    blur,
    brightness,
    color,
    contrast,
    cutout,
    equalize,
    invert,
    posterize,
    rotate,
    sharpness,
    shear_x,
    shear_y,
    solarize,
    solarize_add,
    translate,
)


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


# The sets. x is the image, m the magnitude, s a random sign.

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

THREE_AUGMENT: dict[str, Operation] = {
    "Grey": lambda x, m, s, rng: color(x, 0.0),
    "Solarize": lambda x, m, s, rng: solarize(x, 128),
    "Blur": lambda x, m, s, rng: blur(x, 0.1 + 1.9 * rng.random()),
}

SETS = {"big_vision": BIG_VISION, "torchvision": TORCHVISION, "timm": TIMM, "three_augment": THREE_AUGMENT}

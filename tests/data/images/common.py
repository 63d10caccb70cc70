"""Images and comparisons that the tests of decoding and of transforms share."""

import io

import numpy as np
from PIL import Image


def encode(image, kind="jpeg", **options) -> bytes:
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **options)
    return stream.getvalue()


def distance(a, b) -> tuple[int, float]:
    """Largest and mean difference of two images."""
    difference = np.abs(np.asarray(a, int) - np.asarray(b, int))
    return int(difference.max()), float(difference.mean())

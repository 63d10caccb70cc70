"""Numbers as bytes for a page, with the error that they are drawn with.

Attention of one query and head is a row. A row is stored as its largest value and, for each entry, the square root of
its share of that value in `levels` equal steps: most weights are far below the largest, and the eye sees them by their
root. A weight of zero is exactly zero.
"""

from typing import NamedTuple

import numpy as np

# The largest weight of a row as a uint16: 2^(8 - 24 q / 65535), to within 0.013%. What is smaller than 2^-16 is zero.
OCTAVES, TOP = 24.0, 8.0
LEVELS = (255, 63, 31, 15)  # from fine to coarse; a page takes the first with which it is small enough


class Rows(NamedTuple):
    entries: np.ndarray  # uint8, or int8 where signed, of the shape of the values
    largest: np.ndarray  # uint16, or float32 where signed, of that shape without the last axis
    error: float  # largest difference between a value and what is drawn for it, as a share of its row's largest


def weights(values: np.ndarray, levels: int) -> Rows:
    """Quantizes rows [..., S] of weights that are not negative."""
    largest, scale = _largest(values)
    root = np.sqrt(np.divide(values, scale[..., None], out=np.zeros_like(values), where=scale[..., None] > 0))
    entries = np.minimum(np.rint(root * levels), levels).astype(np.uint8)
    return Rows(entries, largest, _error(values, weights_of(entries, largest, levels)))


def weights_of(entries: np.ndarray, largest: np.ndarray, levels: int) -> np.ndarray:
    """Returns the float32 values that a page draws."""
    return (np.square(entries.astype(np.float32) / levels) * _scale(largest)[..., None]).astype(np.float32)


def signed(values: np.ndarray) -> Rows:
    """Quantizes rows [..., S] of any sign and size, in 127 equal steps on each side of zero."""
    largest = np.abs(values).max(axis=-1).astype(np.float32)
    share = np.divide(values, largest[..., None], out=np.zeros_like(values), where=largest[..., None] > 0)
    entries = np.clip(np.rint(share * 127), -127, 127).astype(np.int8)
    return Rows(entries, largest, _error(values, signed_of(entries, largest)))


def signed_of(entries: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """Returns the float32 values that a page draws."""
    return (entries.astype(np.float32) / 127 * largest[..., None]).astype(np.float32)


def _largest(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    top = values.max(axis=-1)
    # Rounded down in q, so up in value: no entry exceeds its row's largest.
    q = np.floor((TOP - np.log2(np.maximum(top, 2.0 ** (TOP - OCTAVES)))) * 65535 / OCTAVES)
    q = np.where(top > 0, np.clip(q, 0, 65535), 65535).astype(np.uint16)
    return q, np.where(top > 0, _scale(q), np.float32(0))


def _scale(largest: np.ndarray) -> np.ndarray:
    return np.exp2(TOP - OCTAVES * largest.astype(np.float32) / 65535).astype(np.float32)


def _error(values: np.ndarray, drawn: np.ndarray) -> float:
    top = np.abs(values).max(axis=-1, keepdims=True)
    return float(np.max(np.abs(values - drawn) / np.maximum(top, 1e-30), initial=0.0))

"""A set without a validation split, divided by class, with near-duplicates on one side."""

import concurrent.futures
import os
from typing import Any

import numpy as np

from vit_scaling import UserError
from vit_scaling.data.images import codec
from vit_scaling.data.sources import Source, SourceConfig, open_source

SEED = 0
DISTANCE = 4  # images whose perceptual hashes differ in at most this many of 63 bits count as near-duplicates
HASHED = 20_000  # larger sets are divided without hashes
PARTS = ("train", "validation")


class HoldoutSource:
    """One side of a set: SourceConfig("holdout", split="train" or "validation", parts=(whole,), weights=(0.9, 0.1))."""

    def __init__(self, config: SourceConfig):
        if len(config.parts) != 1 or len(config.weights) != 2 or config.split not in PARTS or min(config.weights) <= 0:
            raise UserError("a holdout needs one part, two positive weights, and the split train or validation")
        self.whole = open_source(config.parts[0])
        sides = divide(self.whole, config.weights[1] / sum(config.weights), repr(config.parts[0]))
        self._indices = sides[PARTS.index(config.split)]
        self.num_classes = self.whole.num_classes
        self.class_names = self.whole.class_names
        self.multi_label = self.whole.multi_label

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.whole[int(self._indices[index])]

    def id(self, index: int) -> str:
        return self.whole.id(int(self._indices[index]))

    @staticmethod
    def splits(config: SourceConfig) -> list[str]:
        del config
        return list(PARTS)


def describe(images: int) -> str:
    """Says how a set of so many images is divided."""
    if images > HASHED:
        return f"held out at random, seed {SEED}: above {HASHED:,} images near-duplicates are not looked for"
    return f"held out by class, seed {SEED}, near-duplicates kept together"


_DIVIDED: dict[tuple[str, float, int], tuple[np.ndarray, np.ndarray]] = {}  # training and validation open the same set


def divide(whole: Source, share: float, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of training and validation images, both in the order of the set.

    Of every class, round(share * images) are held out, drawn by a fixed seed, but at least one of two and never all.
    Near-duplicates, directly or through others, stay together: a group larger than what is left of its class's share
    goes to training, so fewer may be held out. Sets of more than 20,000 images, which would take long to read, are
    divided at random alone.

    Args:
        whole: the set.
        share: to hold out, between 0 and 1.
        name: of the set, for the second call of a process.

    Raises:
        UserError: nothing can be held out.
    """
    key = (name, share, len(whole))
    if key not in _DIVIDED:
        _DIVIDED[key] = _divide(whole, share)
    return _DIVIDED[key]


def _divide(whole: Source, share: float) -> tuple[np.ndarray, np.ndarray]:
    count = len(whole)
    order = np.random.default_rng(SEED).permutation(count)
    if count > HASHED:
        held_out = np.zeros(count, bool)
        held_out[order[: round(share * count)]] = True
    else:
        labels, hashes = _read(whole)
        held_out = _hold_out(labels, _groups(hashes), order, share)
    if not held_out.any() or held_out.all():
        raise UserError(f"of {count} images none can be held out for validation; add images, or a validation split")
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _read(whole: Source) -> tuple[np.ndarray, list[np.uint64 | None]]:
    """Returns the label of every image (0 where there may be several) and its perceptual hash, None if corrupt."""
    from vit_scaling.data.prepare.shards import perceptual_hash  # which imports this package

    def read(index: int) -> tuple[int, np.uint64 | None]:
        label = 0
        try:
            record = whole[index]
            label = 0 if whole.multi_label else int(record["label"])
            image = record["image"]
            pixels = image if isinstance(image, np.ndarray) else codec.decode(image, reduce=_reduction(image))
        except codec.CorruptImageError:  # training and evaluation say what is wrong with it
            return label, None
        grey = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
        return label, perceptual_hash(grey)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:  # the decoders release Python's lock
        labels, hashes = zip(*threads.map(read, range(len(whole))), strict=True)
    return np.array(labels, np.int64), list(hashes)


def _reduction(data: bytes) -> int:
    """Returns by how much a JPEG can shrink while it is decoded and still have 64 pixels a side."""
    header = codec.read_header(data)
    return next((by for by in (8, 4, 2) if min(header.height, header.width) >= 64 * by), 1)


def _groups(hashes: list[np.uint64 | None]) -> np.ndarray:
    """Returns a group number for every image: equal for near-duplicates, and for near-duplicates of those."""
    group = np.arange(len(hashes))
    known = np.array([index for index, value in enumerate(hashes) if value is not None], np.int64)
    values = np.array([value for value in hashes if value is not None], np.uint64)
    for place, value in enumerate(values):
        near = known[place + 1 :][np.bitwise_count(values[place + 1 :] ^ value) <= DISTANCE]
        for other in {int(group[index]) for index in near} - {int(group[known[place]])}:
            group[group == other] = group[known[place]]
    return group


def _hold_out(labels: np.ndarray, group: np.ndarray, order: np.ndarray, share: float) -> np.ndarray:
    """Returns which images are held out: groups in a random order, until each class has its share."""
    sizes = np.bincount(labels)
    quota = np.minimum(np.maximum(np.round(share * sizes), sizes > 1), np.maximum(sizes - 1, 0)).astype(np.int64)
    members: dict[int, list[int]] = {}
    for index in order:
        members.setdefault(int(group[index]), []).append(int(index))
    held_out = np.zeros(len(labels), bool)
    for images in members.values():
        needed = np.bincount(labels[images], minlength=len(quota))
        if (needed <= quota).all():
            quota -= needed
            held_out[images] = True
    return held_out

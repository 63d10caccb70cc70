"""Folders of images."""

import os
from typing import Any

import numpy as np

from vit_scaling.data.sources import SourceConfig, listing, make_label, split_ranges


class FolderSource:
    """Image files in class folders, or listed in tables; `listing.py` describes the forms."""

    def __init__(self, config: SourceConfig):
        content = listing.list_folder(config.name)
        ranges = split_ranges(config.split, {split: len(rows) for split, rows in content.splits.items()})
        self.num_classes = content.num_classes
        self.class_names = content.class_names
        self.multi_label = content.multi_label
        self._prefix = os.path.join(config.name, "")
        self._files: list[tuple[str, int | list[int]]] = []
        for split, start, stop in ranges:
            rows = content.splits[split]
            order = np.random.default_rng(0).permutation(len(rows))
            self._files += [rows[i] for i in order[start:stop]]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, label = self._files[index]
        with open(self._prefix + file, "rb", buffering=0) as stream:
            return {"image": stream.readall(), "label": make_label(label, self.num_classes)}

    def id(self, index: int) -> str:
        return self._prefix + self._files[index][0]

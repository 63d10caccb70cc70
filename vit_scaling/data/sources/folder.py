"""Images that a listing names: files in folders, and members of uncompressed tar shards."""

import os
from typing import Any

import numpy as np

from vit_scaling import UserError, paths
from vit_scaling.data.sources import SourceConfig, folders, make_label, split_ranges, tars
from vit_scaling.data.sources.listing import Label, Listing, Place, shown


class ListedSource:
    """The images of a listing, each split shuffled once by a fixed rule."""

    def __init__(self, config: SourceConfig, listing: Listing):
        listing.report.log(config.name)
        ranges = split_ranges(config.split, {split: len(rows) for split, rows in listing.splits.items()})
        self.num_classes = listing.num_classes
        self.class_names = listing.class_names
        self.multi_label = listing.multi_label
        self._prefix = os.path.join(paths.expand(config.name), "")
        self._files: list[tuple[str, Label]] = []
        for split, start, stop in ranges:
            rows = listing.splits[split]
            order = np.random.default_rng(0).permutation(len(rows))
            self._files += [rows[i] for i in order[start:stop]]
        self._places: dict[str, Place] | None = None
        if listing.places is not None:
            self._places = {file: listing.places[file] for file, _ in self._files}

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, label = self._files[index]
        place = Place(self._prefix + file) if self._places is None else self._places[file]
        return {"image": place.read(), "label": make_label(label, self.num_classes)}

    def id(self, index: int) -> str:
        return shown(self._prefix + self._files[index][0])


class FolderSource(ListedSource):
    """Image files in class folders, or listed in tables; folders.py describes the forms."""

    def __init__(self, config: SourceConfig):
        super().__init__(config, folders.list_folder(paths.expand(config.name)))

    @staticmethod
    def splits(config: SourceConfig) -> list[str]:
        return list(folders.list_folder(paths.expand(config.name)).splits)


class WebdatasetSource(ListedSource):
    """Tar shards in webdataset's layout; tars.py describes it."""

    def __init__(self, config: SourceConfig):
        folder = paths.expand(config.name)
        if not os.path.isdir(folder) or not (shards := tars.find_shards(folder)):
            raise UserError(f"{shown(config.name)} holds no tar shards such as train-0000.tar")
        for shard in shards:
            if tars.compression(os.path.join(folder, shard)):
                raise UserError(
                    f"{shown(os.path.join(folder, shard))} is compressed, so its images cannot be read at random; "
                    f"decompress it, or write a set with `./run.sh prepare --input={shown(config.name)} --output=SET`"
                )
        try:
            listing = tars.list_tars(folder)
        except UserError as error:
            # Which images there are fixes the order of a run, so a read option such as on_corrupt cannot decide it.
            raise UserError(
                f"{error}; to go on without what is damaged, write a set with `./run.sh prepare "
                f"--input={shown(config.name)} --output=SET --on_corrupt=skip`"
            ) from None
        super().__init__(config, listing)

    @staticmethod
    def splits(config: SourceConfig) -> list[str]:
        return sorted(set(tars.find_shards(paths.expand(config.name)).values()))

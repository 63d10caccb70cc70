"""Which labelled images does a run read, and where are they? One interface, random access, no TensorFlow.

Start reading with `open_source` below; each kind of source has its own module, and folders.py says which files of a
folder are read. A source is a sequence: `source[i]` is {"image": encoded bytes or uint8 [H, W] or [H, W, C], "label":
int32 class index or float32 multi-hot [classes]}. It can be pickled and opens files only when they are read, so every
worker process has its own handles.

    kind          name                                            split
    builtin       mnist (5,000 digits that a wheel carries)       train, validation, test
    tfds          a TFDS builder: imagenet2012, cifar10:3.0.2     the builder's
    array_record  a folder or bucket that `prepare` wrote         the manifest's
    folder        a folder of images (see folders.py)             sub-folders, tables, or all
    webdataset    a folder of tar shards (see tars.py)            the shards' names without their numbers
    parquet       a folder of Hugging Face's parquet files        the files' names without their numbers
    idx           a folder of IDX files (the MNIST family)        train, test
    mixture       (none: see `parts` and `weights`)               (none)
    holdout       (none: `parts` names a set to divide)           train, validation (see holdout.py)

A split can be cut as in TFDS: "train[:99%]", "train[1000:2000]", "train+validation". The images of a folder
and of tar shards are shuffled once, by a fixed rule, so every cut holds images of every class. A label of -1 means
unlabelled: training and evaluation leave the image out and count it.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vit_scaling import UserError, paths


@dataclasses.dataclass
class SourceConfig:
    """Names a set of labelled images; the package docstring explains kinds, names and splits."""

    kind: str = "builtin"
    name: str = "mnist"
    split: str = "train"
    data_dir: str | None = None
    """TFDS: where its data sets lie, a local folder or a bucket; None: TFDS's own default."""
    label: str = ""
    """TFDS, parquet: the feature or column that holds the label; "": the usual one."""
    parts: tuple = ()
    """Mixture: the SourceConfigs of its parts, which must have the same classes."""
    weights: tuple[float, ...] = ()
    """Mixture: each part's share of the training examples, in any unit."""

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> "SourceConfig":
        """Returns the source that a run's config.json holds."""
        parts = tuple(SourceConfig.from_json(part) for part in fields.get("parts", ()))
        return SourceConfig(**{**fields, "parts": parts, "weights": tuple(fields.get("weights", ()))})


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
    return _kind(config)(config)


def list_splits(config: SourceConfig) -> list[str]:
    """Returns the splits of the set that `config` names, whatever its own split.

    Raises:
        UserError: as `open_source`.
    """
    return _kind(config).splits(config)


def parse(text: str, split: str = "train") -> SourceConfig:
    """Returns the source that a user names: PATH, whose content decides the kind, or KIND:NAME, such as tfds:cifar10.

    Raises:
        UserError: there is nothing at that path.
    """
    kind, colon, name = text.partition(":")
    if colon and kind in KINDS:
        return SourceConfig(kind, name, split)
    path = paths.place(text)
    if not path.exists():
        raise UserError(f"{text!r} is neither a file nor a folder, nor KIND:NAME with a kind of {', '.join(KINDS)}")
    return SourceConfig(find_kind(str(path)), str(path), split)


def find_kind(name: str) -> str:
    """Returns the kind of the set at a path, by what it holds: a folder of images if nothing else fits."""
    from vit_scaling.data import records
    from vit_scaling.data.sources import parquet, tars

    if (paths.place(name) / records.MANIFEST).exists():
        return "array_record"
    path = paths.local(name)  # only what `prepare` wrote is read from a bucket
    if parquet.find_parquet(name):
        return "parquet"
    if path.is_dir() and any(path.glob("*-idx?-ubyte*")):
        return "idx"
    return "webdataset" if path.is_dir() and tars.find_shards(path) else "folder"


KINDS = ("builtin", "tfds", "array_record", "folder", "webdataset", "parquet", "idx", "mixture", "holdout")


def _kind(config: SourceConfig) -> Any:
    # Imported here because the modules of the kinds import this one.
    from vit_scaling.data.sources import array_record, arrays, folder, holdout, mixture, parquet, tfds

    classes = (
        arrays.BuiltinSource,
        tfds.TfdsSource,
        array_record.ArrayRecordSource,
        folder.FolderSource,
        folder.WebdatasetSource,
        parquet.ParquetSource,
        arrays.IdxSource,
        mixture.MixtureSource,
        holdout.HoldoutSource,
    )
    if config.kind not in KINDS:
        raise UserError(f"source kind {config.kind!r} is unknown; choose one of {', '.join(KINDS)}")
    return dict(zip(KINDS, classes, strict=True))[config.kind]


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

"""Parquet files as Hugging Face `datasets` writes them: encoded images and labels in columns, read at random.

The image is a struct of bytes and path, or plain bytes, in the column image or img, or the one that the file's own
metadata calls an image. The label is the column that the config names, or label, labels, fine_label, or the only one
that the metadata calls classes. A read decodes a whole row group and keeps the last few: sequential reading is fast,
random reading is not, and `prepare` turns the set into ArrayRecord. Files are train-00000-of-00002.parquet and
the like, in the folder or in its folder data.
"""

import bisect
import collections
import itertools
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np

from vit_scaling import UserError, paths
from vit_scaling.data.sources import SourceConfig, make_label, open_source, split_ranges
from vit_scaling.data.sources.listing import Report, find_files, number_labels, shown, split_of_shard

MAX_GROUP_BYTES = 512 << 20
_KEPT = 2  # row groups


class ParquetSource:
    """A split of a folder of parquet files."""

    def __init__(self, config: SourceConfig):
        files = _files(config)
        self.config = config
        report = Report()
        self._rows: list[tuple[str, int, int]] = []  # for each row group: file, number, first example
        self._kept: collections.OrderedDict[tuple[str, int], Any] = collections.OrderedDict()
        self._lock = threading.Lock()
        written: dict[str, list[tuple[str, list[str]]]] = {}
        several, names = set(), None
        for split, tables in files.items():
            written[split] = []
            for path in tables:
                table = _open(path)
                features = _features(table)
                self._image, label = _columns(table, features, config, path)
                names = _names(features.get(label)) or names
                values = table.read(columns=[label]).column(0).to_pylist()
                several |= {isinstance(value, list) for value in values}
                written[split] += [(f"{path} row {i}", _written(value, path, i)) for i, value in enumerate(values)]
        if len(several) > 1:
            raise UserError(f"some images of {shown(config.name)} have one label and some a list of labels")
        listing = number_labels(written, several == {True}, config.name, report)
        report.log(config.name)
        self.multi_label = listing.multi_label
        self.class_names = names or listing.class_names
        self.num_classes = max(listing.num_classes, len(names or ()))
        self._examples: list[tuple[str, int, Any]] = []  # path, row, label
        for split, start, stop in split_ranges(config.split, {s: len(rows) for s, rows in listing.splits.items()}):
            for name, number in listing.splits[split][start:stop]:
                path, _, row = name.rpartition(" row ")
                self._examples.append((path, int(row), number))
        self._starts = {path: _group_starts(path) for path in dict.fromkeys(path for path, _, _ in self._examples)}

    def __reduce__(self):
        return open_source, (self.config,)

    @staticmethod
    def splits(config: SourceConfig) -> list[str]:
        return list(_files(config))

    @property
    def labels(self) -> list[Any]:
        """The class index, or the list of them, of every example."""
        return [label for _, _, label in self._examples]

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, row, label = self._examples[index]
        group = bisect.bisect_right(self._starts[path], row) - 1
        value = self._group(path, group)[row - self._starts[path][group]].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not data:
            raise UserError("the parquet file names the image's path and does not hold its bytes")
        return {"image": data, "label": make_label(label, self.num_classes)}

    def id(self, index: int) -> str:
        path, row, _ = self._examples[index]
        return f"row {row} of {shown(path)}"

    def _group(self, path: str, group: int) -> Any:
        with self._lock:
            if (path, group) not in self._kept:
                column = _open(path).read_row_group(group, columns=[self._image]).column(0)
                self._kept[path, group] = column.combine_chunks() if column.num_chunks > 1 else column.chunk(0)
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end((path, group))
            return self._kept[path, group]


def find_parquet(name: str) -> list[Path]:
    """Returns the parquet files of a folder, or of its folder data."""
    path = paths.local(name)
    if not path.is_dir():
        return [path] if path.suffix == ".parquet" and path.is_file() else []
    return [path / file for file in find_files(path, (".parquet",))]


def _files(config: SourceConfig) -> dict[str, list[str]]:
    if not (found := find_parquet(config.name)):
        raise UserError(f"{shown(config.name)} holds no parquet files such as train-00000-of-00001.parquet")
    splits: dict[str, list[str]] = {}
    for path in found:
        splits.setdefault(split_of_shard(path.name), []).append(str(path))
    return splits


def _open(path: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("reading parquet files needs the package pyarrow: pip install 'vit_scaling[parquet]'") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{shown(path)} is no parquet file, or cut off: {error}") from None
    for group in range(file.num_row_groups):
        if (size := file.metadata.row_group(group).total_byte_size) > MAX_GROUP_BYTES:
            raise UserError(
                f"row group {group} of {shown(path)} has {size:,} bytes, more than {MAX_GROUP_BYTES:,}; write the file "
                "with smaller row groups"
            )
    return file


def _group_starts(path: str) -> list[int]:
    metadata = _open(path).metadata
    return list(itertools.accumulate((metadata.row_group(g).num_rows for g in range(metadata.num_row_groups - 1)),
                                     initial=0))  # fmt: skip


def _features(file: Any) -> dict[str, Any]:
    """Returns the features that `datasets` describes in the file's metadata."""
    text = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    try:
        return json.loads(text).get("info", {}).get("features", {})
    except (ValueError, AttributeError):
        return {}


def _names(feature: Any) -> tuple[str, ...] | None:
    """Returns the class names of a feature that is a ClassLabel, or a list of them."""
    if isinstance(feature, list):
        feature = feature[0] if feature else None
    if isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
        feature = feature["feature"]
    names = feature.get("names") if isinstance(feature, dict) else None
    return tuple(names) if names else None


def _columns(file: Any, features: dict[str, Any], config: SourceConfig, path: str) -> tuple[str, str]:
    """Returns the columns of the image and of the label."""
    columns = file.schema_arrow.names
    images = [n for n in ("image", "img") if n in columns]
    images += [n for n, f in features.items() if isinstance(f, dict) and f.get("_type") == "Image" and n in columns]
    labels = [config.label] if config.label else [n for n in ("label", "labels", "fine_label") if n in columns]
    labels = labels or [name for name in columns if _names(features.get(name))]
    if not images or not labels or labels[0] not in columns:
        what = "image" if not images else f"label {config.label!r}" if config.label else "label"
        raise UserError(f"{shown(path)} has no column {what}, only {', '.join(map(shown, columns))}")
    return images[0], labels[0]


def _written(value: Any, path: str, row: int) -> list[str]:
    labels = value if isinstance(value, list) else [value]
    for label in labels:
        if isinstance(label, bool) or not isinstance(label, int | str | np.integer) or label == "":
            raise UserError(f"row {row} of {shown(path)} has the label {label!r}, neither a name nor a whole number")
    return [str(label) for label in labels]

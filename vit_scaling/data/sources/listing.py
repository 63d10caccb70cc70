"""What every listing shares: where an image's bytes are, how labels become class indices, and what was left out.

folders.py lists folders of images, tables.py tables of labels, tars.py webdataset's tar shards.

Class names are numbered in the order of their code points, or of their values if all of them are whole numbers. The
training split (train, training) fixes the classes; another split may lack some of them and must not add any.

Labels in tables and shards are class numbers if all of them are whole numbers, else class names. Class numbers are
kept as they are: the number of classes is the largest number plus one, and numbers in between that no image has are
classes without images. -1 means unlabelled: the image is left out and counted.
"""

import collections
import contextlib
import dataclasses
import os
import re
import stat
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from absl import logging

from vit_scaling import UserError
from vit_scaling.data.images.codec import CorruptImageError

MAX_BYTES = 100_000_000
"""Larger image files are not read."""
MAX_CLASSES = 1_000_000
"""Class numbers must be smaller."""
EXTENSIONS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp"}
"""Files with these extensions are images; their content decides the format when they are decoded."""
OTHER_EXTENSIONS = {".gif", ".apng", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".ppm", ".pgm"}
TRAINING = ("train", "training")
SPLITS = {*TRAINING, "val", "valid", "validation", "dev", "test", "testing", "all"}

Label = int | list[int]


class Place(NamedTuple):
    """Where the bytes of an image are: part of a file."""

    path: str
    offset: int = 0
    size: int | None = None  # None: to the end of the file

    def read(self, max_bytes: int = MAX_BYTES) -> bytes:
        """Returns the bytes; never waits for a device or a pipe, and never takes more memory than the limit.

        Raises:
            CorruptImageError: no regular file, or more than `max_bytes`.
            OSError: the file cannot be read.
        """
        descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise CorruptImageError("it is not a regular file")
            size = status.st_size - self.offset if self.size is None else self.size
            if size > max_bytes:
                raise CorruptImageError(f"its {size} bytes are more than max_bytes = {max_bytes}")
            parts, left = [], size
            while left > 0 and (part := os.pread(descriptor, left, self.offset + size - left)):
                parts.append(part)
                left -= len(part)
        finally:
            os.close(descriptor)
        if left > 0:
            raise OSError(f"{self.path} ended {left} bytes early: it was changed while it was read")
        return parts[0] if len(parts) == 1 else b"".join(parts)


@dataclasses.dataclass
class Report:
    """What looked like data and is not read, by reason, and what else the user should know."""

    left_out: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    ignored: list[str] = dataclasses.field(default_factory=list)
    """Hidden and system files and folders, and folders without images."""
    notes: list[str] = dataclasses.field(default_factory=list)

    def leave_out(self, reason: str, name: str) -> None:
        self.left_out.setdefault(reason, []).append(name)

    def lines(self) -> list[str]:
        """Returns one sentence for each reason."""
        lines = [f"left out {summary(names)}: {reason}" for reason, names in self.left_out.items()]
        if self.ignored:
            lines.append(f"ignored {summary(self.ignored)}: hidden or system files, or folders without images")
        return lines + self.notes

    def log(self, where: str) -> None:
        """Logs what was left out and noted, each line once in a process."""
        for line in self.lines():
            if (text := f"{shown(where)}: {line}") not in _LOGGED:
                _LOGGED.add(text)
                logging.warning("%s", text)


_LOGGED: set[str] = set()


@dataclasses.dataclass
class Listing:
    """The labelled images of a set, without their pixels."""

    class_names: tuple[str, ...] | None
    num_classes: int
    multi_label: bool
    splits: dict[str, list[tuple[str, Label]]]
    """For each split (name of the image relative to the folder, class index or indices)."""
    report: Report = dataclasses.field(default_factory=Report)
    places: dict[str, Place] | None = None
    """Where each image is, if it is not a file of its own."""


def shown(name: str) -> str:
    """Returns a file name for messages: control characters and bytes that are not UTF-8 are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def summary(names: list[str], most: int = 5) -> str:
    """Returns the number of names and the first of them."""
    return f"{len(names):,} ({', '.join(map(shown, names[:most]))}{', ...' if len(names) > most else ''})"


def split_of_shard(name: str) -> str:
    """Returns the split of a shard by its file name: without extension and numbering (train-00000-of-00002: train)."""
    stem = re.sub(r"\.(tar|tgz|parquet)(\.\w+)?$", "", name)
    return re.sub(r"[-_.]?\d*([-_.]?of[-_.]?\d+)?$", "", stem) or "all"


def find_files(folder: str | Path, suffixes: tuple[str, ...]) -> list[str]:
    """Returns the files with these suffixes in a folder or, if there are none, in its folders called data or a split.

    They are relative to the folder and sorted; hidden files are ignored.
    """
    root = Path(folder)
    found = [path.name for path in root.iterdir() if path.name.endswith(suffixes)]
    if not found:
        inner = [child for child in root.iterdir() if child.name.lower() in SPLITS | {"data"} and child.is_dir()]
        found = [f"{child.name}/{path.name}" for child in inner for path in child.iterdir()]
        found = [name for name in found if name.endswith(suffixes)]
    return sorted(name for name in found if not os.path.basename(name).startswith("."))


# ---- classes ---------------------------------------------------------------------------------------------------------


def class_order(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the distinct names in the order in which classes are numbered."""
    distinct = set(names)
    if all(re.fullmatch(r"[0-9]+", name) for name in distinct):  # 01 and 1 have one value: the text decides
        return tuple(sorted(distinct, key=lambda name: (len(name.lstrip("0")), name.lstrip("0"), name)))
    return tuple(sorted(distinct))


def unite_classes(splits: dict[str, set[str]], where: str, report: Report) -> tuple[str, ...]:
    """Returns the class names of all splits; those of the training split, if there is one.

    Raises:
        UserError: a split has a class that the training split lacks.
    """
    training = next((name for name in splits if name.lower() in TRAINING), None)
    if training is None:
        return class_order(set().union(*splits.values()))
    for split, names in splits.items():
        if unknown := sorted(names - splits[training]):
            raise UserError(
                f"split {split} of {shown(where)} has the class {shown(unknown[0])}, which {training} lacks; rename "
                f"or remove it ({len(unknown)} such in all)"
            )
        if missing := sorted(splits[training] - names):
            report.notes.append(f"split {split} lacks {summary(missing)} of the classes; the numbering is {training}'s")
    return class_order(splits[training])


def normal_name(name: str) -> str:
    """Returns a class name in Unicode's composed form, as file systems differ in the form they keep."""
    return unicodedata.normalize("NFC", name)


# ---- labels ----------------------------------------------------------------------------------------------------------


def number_labels(
    splits: dict[str, list[tuple[str, list[str]]]], multi_label: bool, where: str, report: Report
) -> Listing:
    """Turns written labels into class indices, by the rule in the module's docstring.

    Raises:
        UserError: an image is listed twice, a class number is out of range, or a split has a class of its own.
    """
    for split, rows in splits.items():
        if len(files := collections.Counter(file for file, _ in rows)) < len(rows):
            raise UserError(f"{shown(where)} lists {shown(files.most_common(1)[0][0])} twice in {split}")
    written = {label for rows in splits.values() for _, labels in rows for label in labels}
    if not written:
        raise UserError(f"{shown(where)} lists no labelled image")
    names: tuple[str, ...] | None = None
    if all(re.fullmatch(r"[+-]?[0-9]+", label) for label in written):
        index = {label: _class_number(label, multi_label, where) for label in written}
    elif all(_is_number(label) for label in written):
        raise UserError(
            f"{shown(where)} has labels such as {min(written, key=lambda x: (x.isdigit(), x))}; class numbers must be "
            "whole numbers, written as 0, 1, 2"
        )
    else:
        named = {split: {normal_name(x) for _, labels in rows for x in labels} for split, rows in splits.items()}
        names = unite_classes(named, where, report)
        numbers = {name: i for i, name in enumerate(names)}
        index = {label: numbers[normal_name(label)] for label in written}
    numbered: dict[str, list[tuple[str, Label]]] = {}
    for split, rows in splits.items():
        numbered[split] = []
        for file, labels in rows:
            if not multi_label and index[labels[0]] == -1:
                report.leave_out("unlabelled (label -1)", file)
            else:
                numbered[split].append((file, sorted({index[x] for x in labels}) if multi_label else index[labels[0]]))
    num_classes = max(index.values()) + 1
    if num_classes < 1:
        raise UserError(f"{shown(where)} lists no labelled image: every label is -1")
    if names is None and (gaps := num_classes - len({i for i in index.values() if i >= 0})):
        first = next(i for i in range(num_classes) if i not in index.values())
        report.notes.append(f"{gaps:,} of {num_classes:,} class numbers have no image (the first is {first})")
    return Listing(names, num_classes, multi_label, numbered, report)


def _class_number(label: str, multi_label: bool, where: str) -> int:
    number = int(label) if len(label) < 20 else MAX_CLASSES
    if number >= MAX_CLASSES or number < (0 if multi_label else -1):
        raise UserError(
            f"{shown(where)} has the label {label[:40]}; class numbers must be at least 0 and below {MAX_CLASSES:,}"
            + ("" if multi_label else ", or -1 for an unlabelled image")
        )
    return number


def _is_number(label: str) -> bool:
    with contextlib.suppress(ValueError):
        float(label)
        return True
    return False

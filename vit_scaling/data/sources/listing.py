"""Labelled image files as people keep them: folders of classes, tables of labels, IDX files. Plain listing, no pixels.

A folder of images has one of these forms, and its splits follow from it:

    FOLDER/train.csv, FOLDER/val.csv       every table is a split; columns file and label (or labels)
    FOLDER/train/cat/1.jpg, FOLDER/val/... every sub-folder that holds class folders is a split
    FOLDER/cat/1.jpg                       class folders themselves: one split, called "all"

Classes are numbered in the order of their names (names that are numbers in the order of the numbers), over all splits.
In tables labels are class indices if all of them are whole numbers, else class names; under the heading "labels" an
image has any number of them, separated by semicolons, and the set is multi-label. Files are relative to the folder.
"""

import collections
import csv
import gzip
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vit_scaling import UserError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


class Listing(NamedTuple):
    """What a folder of images holds."""

    class_names: tuple[str, ...] | None
    num_classes: int
    multi_label: bool
    splits: dict[str, list[tuple[str, int | list[int]]]]  # split: (file relative to the folder, label or labels)


def list_folder(folder: str | Path) -> Listing:
    """Lists a folder of images, in the order of file names.

    Raises:
        UserError: there is no such folder, it has none of the forms above, or a table cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; expected one that holds class folders of images, or tables of labels")
    tables = sorted(folder.glob("*.csv"))
    if tables:
        return _list_tables(tables)
    children = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    splits = {child: files for child in children if (files := _list_classes(folder, child))}
    splits = splits or {"all": _list_classes(folder, "")}
    names = class_order(name for files in splits.values() for _, name in files)
    if not names:
        raise UserError(
            f"{folder} holds no class folders of images such as {folder}/cat/1.jpg, and no tables of labels"
        )
    index = {name: number for number, name in enumerate(names)}
    numbered: dict = {split: [(file, index[name]) for file, name in files] for split, files in splits.items()}
    return Listing(names, len(names), False, numbered)


def class_order(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the distinct names in the order in which classes are numbered."""
    distinct = set(names)
    return tuple(sorted(distinct, key=int if all(name.isdecimal() for name in distinct) else None))


def _list_classes(folder: Path, split: str) -> list[tuple[str, str]]:
    """Returns (file relative to `folder`, class name) of every folder/split/class/**/image."""
    found = []
    for child in sorted(entry.name for entry in os.scandir(folder / split) if entry.is_dir()):
        for base, below, names in os.walk(folder / split / child):
            below.sort()
            relative = os.path.relpath(base, folder)
            found += [
                (f"{relative}/{name}", child) for name in sorted(names) if Path(name).suffix.lower() in EXTENSIONS
            ]
    return found


def _list_tables(tables: list[Path]) -> Listing:
    """Reads CSV tables with the columns file and label (or labels)."""
    splits: dict[str, list[tuple[str, list[str]]]] = {}
    headings = set()
    for table in tables:
        with table.open(newline="", encoding="utf-8") as stream:
            rows = csv.DictReader(stream, restval="")
            columns = set(rows.fieldnames or ())
            if "file" not in columns or len(heading := columns & {"label", "labels"}) != 1:
                raise UserError(f"{table} needs the columns file and label (or labels); it has {', '.join(columns)}")
            headings |= heading
            splits[table.stem] = []
            for row in rows:
                text = row[min(heading)]
                labels = (
                    [part.strip() for part in text.split(";") if part.strip()]
                    if "labels" in heading
                    else [text.strip()]
                )
                if not row["file"] or (heading == {"label"} and not labels[0]):
                    raise UserError(f"{table} line {rows.line_num} lacks its file or its label")
                splits[table.stem].append((row["file"], labels))
    if len(headings) > 1:
        raise UserError(f"of the tables {', '.join(map(str, tables))} some have the column label and some labels")
    return number_labels(splits, multi_label=headings == {"labels"}, where=str(tables[0].parent))


def number_labels(splits: dict[str, list[tuple[str, list[str]]]], multi_label: bool, where: str) -> Listing:
    """Turns labels as they are written into class indices: whole numbers are indices, anything else a class name."""
    written = {label for rows in splits.values() for _, labels in rows for label in labels}
    if not written:
        raise UserError(f"{where} lists no labelled image")
    for split, rows in splits.items():
        if len(files := collections.Counter(file for file, _ in rows)) < len(rows):
            raise UserError(f"{where} lists {files.most_common(1)[0][0]} twice in {split}")
    names = None if all(label.isdecimal() for label in written) else class_order(written)
    index = {label: int(label) for label in written} if names is None else {name: i for i, name in enumerate(names)}
    numbered: dict = {
        split: [(file, sorted(index[x] for x in labels) if multi_label else index[labels[0]]) for file, labels in rows]
        for split, rows in splits.items()
    }
    return Listing(names, max(index.values()) + 1, multi_label, numbered)


def read_idx_folder(folder: str | Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns {"train": (images, labels), "test": ...} of a folder of IDX files, whichever of the two are there.

    The files are named as MNIST's: train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-..., with .gz or without.

    Raises:
        UserError: there are none, or a file is not what its name says.
    """
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        found = [sorted(Path(folder).glob(f"{prefix}-{what}-idx?-ubyte*")) for what in ("images", "labels")]
        if all(found):
            images, labels = (_read_idx(files[0]) for files in found)
            if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
                raise UserError(f"{found[0][0]} holds {images.shape} images and its labels are {labels.shape}")
            splits[split] = images, labels
    if not splits:
        raise UserError(
            f"{folder} holds no IDX files such as train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz"
        )
    return splits


def _read_idx(path: Path) -> np.ndarray:
    """Reads one IDX file of bytes: two zeros, the type (8: uint8), the rank, big-endian sizes, then the values."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} cannot be decompressed: {error}") from None
    if data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise UserError(f"{path} is no IDX file of bytes: it begins with {data[:4]!r}")
    shape = tuple(np.frombuffer(data, ">u4", data[3], 4).astype(int))
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if values.size != np.prod(shape):
        raise UserError(f"{path} says {shape} values and holds {values.size}: it is cut off or damaged")
    return values.reshape(shape)

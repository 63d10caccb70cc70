"""Folders of images as people keep them, listed without decoding anything.

    FOLDER/cat/1.jpg, FOLDER/cat/a/b/2.jpg    class folders, images at any depth: one split, called all
    FOLDER/train/cat/1.jpg, FOLDER/val/...    splits, where *every* folder with images has a split's name
    FOLDER/train/cat/images/1.jpg,            tiny-imagenet: the validation labels are in a table
      FOLDER/val/images/2.jpg, FOLDER/val/val_annotations.txt
    FOLDER/train.csv, FOLDER/val.csv          tables of labels (tables.py): every table is a split

Split names are train, training, val, valid, validation, dev, test, testing and all, in any case, and ImageNet's
ILSVRC2012_img_train and _val. Hidden and system files and folders are ignored. An image is a file with a usual
extension (its content decides the format when it is read), or any other file that begins as an image format does.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

from vit_scaling import UserError
from vit_scaling.data.images import codec
from vit_scaling.data.sources import tables
from vit_scaling.data.sources.listing import (
    EXTENSIONS,
    OTHER_EXTENSIONS,
    SPLITS,
    TRAINING,
    Listing,
    Report,
    normal_name,
    number_labels,
    shown,
    unite_classes,
)

_SYSTEM = {"__macosx", "@eadir", "thumbs.db", "desktop.ini", "lost+found", "$recycle.bin", "icon\r"}
_SYSTEM |= {"system volume information", "ehthumbs.db", "__pycache__"}
_TEXT = {".txt", ".json", ".jsonl", ".xml", ".csv", ".tsv", ".md", ".html", ".yaml", ".yml", ".log", ".py", ".cfg"}
_DATA = {".zip", ".tar", ".gz", ".tgz", ".zst", ".7z", ".rar", ".npy", ".npz", ".parquet", ".tfrecord", ".mat"}


class Scan(NamedTuple):
    """The entries of one folder, sorted, without hidden and system files."""

    folders: list[str]
    files: list[str]


def list_folder(folder: str | Path) -> Listing:
    """Lists a folder of images.

    Raises:
        UserError: there is no such folder, it has none of the forms above, something in it cannot be read, is a device
            or a pipe, or a table is wrong.
    """
    root, report = str(folder), Report()
    if not os.path.isdir(root):
        raise UserError(f"{shown(root)} is no folder; expected one of class folders of images, or tables of labels")
    top = scan(root, "", report)
    if found := _tables(root, top):
        splits, multi_label = tables.read_tables(root, found)
        listing = number_labels(splits, multi_label, root, report)
        _compare_with_files(root, top, splits, report)
        return listing
    images = {child: paths for child in top.folders if (paths := _images_or_none(root, child, report)) is not None}
    for file in top.files:
        if is_image(root, file, report):
            report.leave_out("images outside of class folders", file)
    if images and all(_is_split(child) for child in images):
        named = {split: rows for split in images if (rows := _split(root, split, images[split], report))}
    else:
        named = {"all": [(path, normal_name(child)) for child, paths in images.items() for path in paths]}
        _note_odd_layouts(root, images, report)
    classes = {split: {name for _, name in rows} for split, rows in named.items()}
    if "all" in named:
        classes["all"] |= {normal_name(child) for child in images}  # a class all of whose images were left out
    names = unite_classes(classes, root, report) if any(named.values()) else ()
    if not names:
        left_out = "".join(f"; {line}" for line in report.lines())
        raise UserError(
            f"{shown(root)} holds no class folders of images such as {shown(root)}/cat/1.jpg, and no tables of labels"
            + left_out
        )
    index = {name: number for number, name in enumerate(names)}
    numbered: dict = {split: [(file, index[name]) for file, name in rows] for split, rows in named.items()}
    return Listing(names, len(names), False, numbered, report)


# ---- what a folder holds ---------------------------------------------------------------------------------------------


def scan(root: str, below: str, report: Report) -> Scan:
    """Lists one folder, `below` the root.

    Raises:
        UserError: it cannot be read, or an entry is a device, a pipe or a socket; the message names it.
    """
    folders, files = [], []
    try:
        with os.scandir(os.path.join(root, below)) as entries:
            for entry in entries:
                relative = os.path.join(below, entry.name)
                if entry.name.startswith(".") or entry.name.lower() in _SYSTEM:
                    report.ignored.append(relative)
                elif entry.is_dir():
                    if entry.is_symlink() and _is_loop(root, below, entry.path):
                        raise UserError(f"{shown(entry.path)} is a link to a folder that holds it; remove the link")
                    folders.append(entry.name)
                elif entry.is_file():
                    files.append(entry.name)
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    if _extension(entry.name) in EXTENSIONS | OTHER_EXTENSIONS:
                        raise UserError(f"{shown(entry.path)} is a link to a file that does not exist")
                    report.ignored.append(relative)
                else:
                    raise UserError(f"{shown(entry.path)} is a device, a pipe or a socket and not a regular file")
    except OSError as error:
        raise UserError(f"{shown(os.path.join(root, below))} cannot be read: {error.strerror}") from None
    return Scan(sorted(folders), sorted(files))


def images_below(root: str, below: str, report: Report) -> list[str]:
    """Returns the images at any depth, relative to the root: those of a folder first, then those of its folders."""
    entries = scan(root, below, report)
    found = [path for name in entries.files if is_image(root, path := os.path.join(below, name), report)]
    for child in entries.folders:
        found += images_below(root, os.path.join(below, child), report)
    return found


def is_image(root: str, relative: str, report: Report) -> bool:
    """Returns whether a file is an image that can be read; files that only look like data are reported.

    Raises:
        UserError: the file cannot be read.
    """
    extension = _extension(relative)
    if extension in EXTENSIONS or extension in _TEXT:
        return extension in EXTENSIONS
    path = os.path.join(root, relative)
    try:
        with open(path, "rb", buffering=0) as stream:
            format = codec.format_of(stream.read(32))
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be read: {error.strerror}") from None
    if format is not None and codec.readable(format):
        return True
    if format is not None:
        report.leave_out(f"{format.upper()} files, which cannot be decoded here", relative)
    elif extension in OTHER_EXTENSIONS:
        report.leave_out("not an image by its content", relative)
    elif extension in _DATA:
        report.leave_out("archives and arrays, which are not read from image folders", relative)
    return False


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _is_loop(root: str, below: str, link: str) -> bool:
    real, here = os.path.realpath(link), os.path.realpath(os.path.join(root, below))
    return here == real or here.startswith(real.rstrip("/") + "/")


def _images_or_none(root: str, child: str, report: Report) -> list[str] | None:
    """Returns the images below a top folder; None if the folder holds nothing that looks like data."""
    before = sum(map(len, report.left_out.values()))
    found = images_below(root, child, report)
    if not found and before == sum(map(len, report.left_out.values())):
        report.ignored.append(child)
        return None
    return found


# ---- layouts ---------------------------------------------------------------------------------------------------------


def _is_split(name: str) -> bool:
    return re.sub(r"^ilsvrc\d+_img_", "", name.lower()) in SPLITS


def _split(root: str, split: str, paths: list[str], report: Report) -> list[tuple[str, str]]:
    """Returns (file, class name) of a split's images."""
    annotations = os.path.join(split, f"{split}_annotations.txt")
    if os.path.isfile(os.path.join(root, annotations)):
        return _annotated(root, split, annotations, paths, report)
    rows, unlabelled = [], []
    for path in paths:
        parts = path.split(os.sep)
        if len(parts) > 2:
            rows.append((path, normal_name(parts[1])))
        else:
            unlabelled.append(path)
    if {name for _, name in rows} == {"images"} and not _is_training(split):
        unlabelled, rows = unlabelled + [path for path, _ in rows], []
    if unlabelled and not rows and _is_training(split):
        raise UserError(
            f"{shown(os.path.join(root, split))} holds images and no class folders, so their classes are unknown; sort "
            "them into one folder for each class, or list them in a table with the columns file and label"
        )
    for path in unlabelled:
        report.leave_out("unlabelled: in a split, and in no class folder", path)
    return rows


def _is_training(split: str) -> bool:
    return re.sub(r"^ilsvrc\d+_img_", "", split.lower()) in TRAINING


def _annotated(root: str, split: str, annotations: str, paths: list[str], report: Report) -> list[tuple[str, str]]:
    """Returns (file, class name) of tiny-imagenet's validation images; each line is file, class, and a box."""
    files = {os.path.basename(path): path for path in paths}
    rows = []
    for number, line in enumerate(tables.read_lines(os.path.join(root, annotations)), 1):
        name, *rest = line.rstrip("\r\n").split("\t")
        where = f"{shown(os.path.join(root, annotations))} line {number}"
        if not rest or not rest[0].strip():
            raise UserError(f"{where} is not a file name, a tab and a class")
        if name not in files:
            raise UserError(f"{where} lists {shown(name)}, which is not in {shown(os.path.join(root, split))}")
        rows.append((files.pop(name), normal_name(rest[0].strip())))
    for path in files.values():
        report.leave_out("images that no table lists", path)
    return rows


def _note_odd_layouts(root: str, images: dict[str, list[str]], report: Report) -> None:
    """Notes layouts that are read by the rule but may be meant otherwise."""
    splits = [child for child in images if _is_split(child)]
    if len(splits) > 1:
        others = [child for child in images if child not in splits]
        report.notes.append(
            f"{shown(' and '.join(splits))} look like splits, but {shown(others[0])} does not: all are read as classes"
        )
    for child, paths in images.items():
        inner = {path.split(os.sep)[1] for path in paths if path.count(os.sep) > 1}
        if len(images) == 1 and len(inner) > 1 and all(path.count(os.sep) > 1 for path in paths):
            report.notes.append(
                f"everything is in the one folder {shown(child)}, which becomes the only class; if its "
                f"{len(inner)} folders are the classes, name {shown(os.path.join(root, child))} instead"
            )


def _tables(root: str, top: Scan) -> list[tables.Table]:
    """Returns the tables of labels at the top of a folder, or in its split folders as Hugging Face writes them."""
    found = [tables.Table(name, "", _table_split(name)) for name in top.files if tables.is_table(root, name)]
    for child in top.folders:
        for name in ("metadata.csv", "metadata.jsonl"):
            if _is_split(child) and tables.is_table(root, path := os.path.join(child, name)):
                found.append(tables.Table(path, child, child))
    return found


def _table_split(name: str) -> str:
    stem = os.path.splitext(name)[0]
    return "train" if stem == "metadata" else stem  # Hugging Face's name for a set without splits


def _compare_with_files(root: str, top: Scan, splits: dict[str, list], report: Report) -> None:
    """Reports images that no table lists.

    Raises:
        UserError: a table lists a file that does not exist.
    """
    listed = {os.path.normpath(file) for rows in splits.values() for file, _ in rows}
    there = [file for file in top.files if is_image(root, file, report)]
    for child in top.folders:
        there += images_below(root, child, report)
    for file in there:
        if file not in listed:
            report.leave_out("images that no table lists", file)
    for file in sorted(listed.difference(there)):
        if not os.path.isfile(os.path.join(root, file)):
            raise UserError(f"a table of {shown(root)} lists {shown(file)}, which is not a file there")

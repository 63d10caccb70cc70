"""Tables of labels: CSV, TSV and JSON lines with one image in each row.

The columns are file (or file_name, filename) and label (or labels, for any number of them in an image). In CSV the
separator is a comma, a tab or a semicolon; several labels are separated by semicolons inside the field. In JSON lines
a label is a name or a whole number, and labels a list of them. Text is UTF-8, or UTF-16 with a byte order mark.
Metadata files of Hugging Face's image folders (metadata.csv, metadata.jsonl) name files relative to their own folder.
"""

import codecs
import csv
import itertools
import json
import os
import posixpath
from collections.abc import Iterator
from typing import NamedTuple

from vit_scaling import UserError
from vit_scaling.data.sources.listing import shown

_FILE = ("file", "file_name", "filename")
_LABEL = ("label", "labels")
_MAX_LINE = 1 << 20  # characters
_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


class Table(NamedTuple):
    """A table of labels: its path relative to the set, the folder that its files are relative to, and its split."""

    path: str
    folder: str
    split: str


def is_table(root: str, path: str) -> bool:
    """Returns whether a file is a table of labels, by its name; a metadata file is one only if it has labels."""
    name, full = os.path.basename(path), os.path.join(root, path)
    if not name.endswith((".csv", ".tsv", ".jsonl")) or not os.path.isfile(full):
        return False
    if not name.startswith("metadata."):
        return True
    first = next(_rows(full), (0, {}))[1]
    return any(column in first for column in _LABEL)


def read_tables(root: str, found: list[Table]) -> tuple[dict[str, list[tuple[str, list[str]]]], bool]:
    """Returns ({split: [(file relative to the root, labels as written)]}, whether images have several labels).

    Raises:
        UserError: a table cannot be read; the message gives file and line.
    """
    splits: dict[str, list[tuple[str, list[str]]]] = {}
    columns = set()
    for table in found:
        path = os.path.join(root, table.path)
        rows = splits.setdefault(table.split, [])
        for line, row in _rows(path):
            where = f"{shown(path)} line {line}"
            file = _column(row, _FILE, where)
            label = _column(row, _LABEL, where)
            columns.add(label)
            rows.append((_inside(table.folder, row[file], where), _labels(row[label], label == "labels", where)))
    if len(columns) > 1:
        names = ", ".join(shown(table.path) for table in found)
        raise UserError(f"of the tables {names} some have the column label and some labels")
    if not columns:
        raise UserError(f"{shown(root)} lists no labelled image")
    return splits, columns == {"labels"}


def read_lines(path: str) -> Iterator[str]:
    """Yields the lines of a text file, with their ends, without holding the file in memory.

    Raises:
        UserError: a line is too long, or the bytes are not the text they should be; the message gives line and byte.
    """
    with open(path, "rb") as binary:
        first = binary.read(1000)
    encoding = next((name for mark, name in _BOMS if first.startswith(mark)), "utf-8")
    if encoding == "utf-8" and b"\0" in first:
        raise UserError(f"{shown(path)} is not UTF-8 text: byte {first.index(0)} is zero; save it as UTF-8")
    number = 0
    try:
        with open(path, encoding=encoding, newline="") as stream:
            while line := stream.readline(_MAX_LINE):
                number += 1
                if len(line) == _MAX_LINE:
                    raise UserError(f"{shown(path)} line {number} is longer than {_MAX_LINE:,} characters")
                yield line
    except UnicodeDecodeError:
        where = _bad_byte(path) if encoding != "utf-16" else ""
        name = encoding.removesuffix("-sig").upper()
        raise UserError(f"{shown(path)}{where} is not {name} text; save the table as UTF-8") from None


def _bad_byte(path: str) -> str:
    """Returns where a file stops being UTF-8."""
    position = 0
    with open(path, "rb") as stream:
        for number, line in enumerate(iter(lambda: stream.readline(_MAX_LINE), b""), 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f" line {number}, byte {position + error.start} (0x{line[error.start]:02x}),"
            position += len(line)
    return ""


def _rows(path: str) -> Iterator[tuple[int, dict]]:
    """Yields (line, {column: value}) of a table."""
    lines = read_lines(path)
    if path.endswith(".jsonl"):
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (json.JSONDecodeError, RecursionError) as error:
                    raise UserError(f"{shown(path)} line {number} is not JSON: {error}") from None
                if not isinstance(row, dict):
                    raise UserError(f"{shown(path)} line {number} is not a JSON object")
                yield number, row
        return
    head = next(lines, "")
    separator = max(",\t;", key=lambda character: head.count(character))
    reader = csv.reader(itertools.chain([head], lines), delimiter=separator, strict=True)
    try:
        names = [name.strip().lower() for name in next(reader, [])]
        missing = not set(names) & set(_FILE) or len(set(names) & set(_LABEL)) != 1
        if missing and not os.path.basename(path).startswith("metadata."):
            have = ", ".join(map(shown, names))
            raise UserError(f"{shown(path)} needs the columns file and label (or labels); it has {have}")
        for row in reader:
            if row and len(row) != len(names):
                raise UserError(
                    f"{shown(path)} line {reader.line_num} has {len(row)} fields, and the first line has {len(names)}"
                )
            if row:
                yield reader.line_num, dict(zip(names, row, strict=True))
    except csv.Error as error:
        hint = "; is a quotation mark left open?" if "limit" in str(error) or "end of data" in str(error) else ""
        raise UserError(f"{shown(path)} line {reader.line_num} cannot be read: {error}{hint}") from None


def _column(row: dict, names: tuple[str, ...], where: str) -> str:
    found = [name for name in names if name in row]
    if len(found) != 1 or row[found[0]] in ("", None):
        if found == ["labels"]:
            return "labels"  # an image without any of the classes
        raise UserError(
            f"{where} lacks its {names[0]}" if len(found) < 2 else f"{where} has both {' and '.join(found)}"
        )
    return found[0]


def _inside(folder: str, file: object, where: str) -> str:
    """Returns a row's file relative to the set's folder; refuses what is outside of it."""
    if not isinstance(file, str) or "\0" in file:
        raise UserError(f"{where}: the file is {file!r} and must be a file name")
    path = posixpath.normpath(posixpath.join(folder, file.strip()))
    if path.startswith(("/", "../")) or path in ("..", "."):
        raise UserError(f"{where}: {shown(file)} is outside of the set's folder")
    return path


def _labels(value: object, several: bool, where: str) -> list[str]:
    """Returns labels as they are written."""
    if isinstance(value, str):
        parts = value.split(";") if several else [value]
        labels = [part.strip() for part in parts if part.strip()]
        if not labels and not several:
            raise UserError(f"{where} lacks its label")
        return labels
    return checked_labels(value, several, where)


def checked_labels(value: object, several: bool, where: str) -> list[str]:
    """Returns the label or labels of a JSON value as text.

    Raises:
        UserError: it is neither a name nor a whole number, or no list of them where `several`.
    """
    if several != isinstance(value, list):
        raise UserError(f"{where}: {'labels' if several else 'label'} is {json.dumps(value)[:60]} and must be "
                        + ("a list of names or whole numbers" if several else "a name or a whole number"))  # fmt: skip
    for label in value if isinstance(value, list) else [value]:
        if isinstance(label, bool) or not isinstance(label, str | int) or not str(label).strip():
            raise UserError(f"{where}: the label {json.dumps(label)[:60]} is neither a name nor a whole number")
    return [str(label).strip() for label in (value if isinstance(value, list) else [value])]

"""Any table of runs as a CSV file: which columns hold what, in which units, and which lines cannot be used."""

import csv
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vit_scaling import UserError
from vit_scaling.studies.table import SWEEP, Run

# Where the command line names no column, one of these is taken.
COLUMNS = {
    "compute": ("compute",),
    "error": ("error", "loss"),
    "params": ("params", "parameters"),
    "images": ("images", "examples"),
    "unique": ("unique", "data_images"),
    "deviation": ("deviation",),
}
_EXPRESSION = re.compile(r"(?P<column>.+?)(?:(?P<sign>[*/])(?P<number>[-+.\deE]+))?")


@dataclasses.dataclass(frozen=True)
class Points:
    """The runs of a table.

    Attributes:
        groups: {value of the group column: runs}; the key is "" without such a column.
        origin: rows of the report's checklist: which columns hold what, and what was left out.
    """

    groups: dict[str, list[Run]]
    origin: tuple[tuple[str, str], ...]


def read(path: Path, columns: Mapping[str, str | None], group: str | None = None) -> Points:
    """Reads a table of runs.

    Args:
        columns: {quantity of COLUMNS: "COLUMN", "COLUMN*NUMBER" or "COLUMN/NUMBER"}; None for the usual column, if it
            is there.
        group: column whose values separate the runs into tables with laws of their own.

    Raises:
        UserError: no such file or column, no error, neither compute nor size and images, or a cell that is not a
            positive number; the message names file, line and column.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file))
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (UnicodeDecodeError, csv.Error, IsADirectoryError) as error:
        raise UserError(f"{path} is no CSV file: {error}") from error
    if len(lines) < 2:
        raise UserError(f"{path} has {len(lines)} lines; give one with the names of the columns and one for each run")
    header = [name.strip() for name in lines[0]]
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise UserError(f"{path}, line 1: two columns are called {twice[0]!r}")
    taken = {what: _find(path, header, what, columns.get(what)) for what in COLUMNS}
    known = {what: each for what, each in taken.items() if each is not None}
    has = f"the columns are {', '.join(header)}"
    if "error" not in known:
        raise UserError(f"{path} has no column error; name it with --error=COLUMN: {has}")
    if "compute" not in known and not {"params", "images"} <= set(known):
        raise UserError(f"{path} has no column compute; name it with --compute=COLUMN, or --params and --images: {has}")
    if group is not None and group not in header:
        raise UserError(f"{path} has no column {group!r} to group by; {has}")
    groups: dict[str, list[Run]] = {}
    empty: dict[str, list[int]] = {}
    for number, cells in enumerate(lines[1:], 2):
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise UserError(f"{path}, line {number}: {len(cells)} cells under {len(header)} columns")
        row = dict(zip(header, cells, strict=True))
        if missing := [column for column, _ in known.values() if not row[column].strip()]:
            empty.setdefault(missing[0], []).append(number)
            continue
        values = {what: _number(path, number, row, column, factor) for what, (column, factor) in known.items()}
        groups.setdefault(row[group] if group is not None else "", []).append(_run(number, values))
    if not groups:
        raise UserError(f"{path}: every line has an empty cell in {' or '.join(empty)}")
    return Points(groups, _origin(path, known, empty, group))


def folder(group: str) -> str:
    """Returns the name of a group's folder."""
    return re.sub(r"[^\w.=+-]+", "_", group).strip(".") or "_"


def _find(path: Path, header: list[str], what: str, given: str | None) -> tuple[str, float] | None:
    """Returns the column of a quantity and the factor to its unit."""
    if given is None:
        return next(((name, 1.0) for name in COLUMNS[what] if name in header), None)
    if given in header:
        return given, 1.0
    match = _EXPRESSION.fullmatch(given)
    if match is None or match["column"] not in header:
        raise UserError(f"--{what}={given}: {path} has no such column; the columns are {', '.join(header)}")
    try:
        number = float(match["number"])
    except (TypeError, ValueError):
        raise UserError(f"--{what}={given}: {match['number']!r} is no number; write COLUMN*NUMBER") from None
    if not (number > 0 and np.isfinite(number)):
        raise UserError(f"--{what}={given}: the factor is {number:g}; it is positive")
    return match["column"], number if match["sign"] == "*" else 1 / number


def _number(path: Path, line: int, row: Mapping[str, str], column: str, factor: float) -> float:
    cell = row[column].strip()
    try:
        value = float(cell)
    except ValueError:
        raise UserError(f"{path}, line {line}: {column} is {cell!r}, which is no number") from None
    if not (np.isfinite(value) and value > 0):
        raise UserError(f"{path}, line {line}: {column} is {cell}; it must be positive and finite")
    return value * factor


def _run(line: int, values: Mapping[str, float]) -> Run:
    params, images = values.get("params", 0.0), values.get("images", 0.0)
    return Run(
        name=f"line {line}",
        group=SWEEP,
        size=0,
        params=params,
        data_images=values.get("unique", 0.0),
        images=images,
        compute=values["compute"] if "compute" in values else 6 * params * images,
        error=values["error"],
        fewshot_error=None,
        seconds=0.0,
        deviation=values.get("deviation"),
    )


def _origin(
    path: Path, known: Mapping[str, tuple[str, float]], empty: Mapping[str, list[int]], group: str | None
) -> tuple[tuple[str, str], ...]:
    used = [
        f"{what}: {column}" + (f" times {factor:g}" if factor != 1 else "") for what, (column, factor) in known.items()
    ]
    if "compute" not in known:
        used.append("compute: 6 times params times images")
    left = [f"{len(lines)} without {column} (lines {_few(lines)})" for column, lines in empty.items()]
    rows = [("table", str(path)), ("columns", "; ".join(used)), ("runs left out", "; ".join(left) or "none")]
    if absent := [what for what in COLUMNS if what not in known and what != "compute"]:
        rows.append(("not in the table", ", ".join(absent)))
    return (*rows, ("groups", f"one table for each value of {group}")) if group is not None else tuple(rows)


def _few(lines: list[int]) -> str:
    return ", ".join(map(str, lines[:5])) + (f" and {len(lines) - 5} more" if len(lines) > 5 else "")

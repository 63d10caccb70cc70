"""The table of a study: one row for each finished run, as a CSV file that anything can read."""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from vit_scaling import UserError


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        name: of the run within its study.
        group: "sweep" for the grid that the law is fitted to, or the name of a comparison.
        size: the dial's setting.
        params: parameters of the model.
        data_images: different images in its training set.
        images: images that it was shown.
        compute: training FLOPs, 2 for each multiply-add.
        error: share of the evaluation set that it gets wrong.
        fewshot_error: the same of few-shot classification on its features, or None.
        seconds: what its own part took; a cooldown's trunk is not in it.
    """

    name: str
    group: str
    size: int
    params: int
    data_images: int
    images: int
    compute: float
    error: float
    fewshot_error: float | None
    seconds: float


SWEEP = "sweep"
_TYPES = {"name": str, "group": str, "compute": float, "error": float, "seconds": float}


def write(path: Path, runs: Sequence[Run]) -> None:
    """Writes the table, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Run)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(run) for run in runs)
    temporary.replace(path)


def read(path: Path) -> list[Run]:
    """Reads a table that `write` wrote.

    Raises:
        UserError: a column is missing or a cell is not of its type; the message names line and column.
    """
    runs = []
    with path.open(newline="") as file:
        for line, row in enumerate(csv.DictReader(file), 2):
            values: dict = {}
            for field in dataclasses.fields(Run):
                cell = row.get(field.name)
                if cell is None:
                    raise UserError(f"{path}, line {line}: the column {field.name} is missing")
                try:
                    if field.name == "fewshot_error":
                        values[field.name] = float(cell) if cell else None
                    else:
                        values[field.name] = _TYPES.get(field.name, int)(cell)
                except ValueError:
                    raise UserError(f"{path}, line {line}: {field.name} is {cell!r}, which is no number") from None
            runs.append(Run(**values))
    return runs

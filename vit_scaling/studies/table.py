"""The table of a study: one row for each finished run, as a CSV file that anything can read."""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vit_scaling import UserError


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        name: of the run within its study.
        group: "sweep" for the grid that the law is fitted to, "seed" for one of its runs with another seed, or the
            name of a comparison.
        size: the dial's setting.
        params: parameters of the model.
        data_images: different images in its training set.
        images: images that it was shown.
        compute: training FLOPs, 2 for each multiply-add.
        error: share of the evaluation set that it gets wrong.
        fewshot_error: the same of few-shot classification on its features, or None.
        seconds: what its own part took; a cooldown's trunk is not in it.
        deviation: standard deviation of the error between seeds, where it is known.

    A table that is not of a study may lack size, parameters, images or different images; they are 0 then.
    """

    name: str
    group: str
    size: int
    params: float
    data_images: float
    images: float
    compute: float
    error: float
    fewshot_error: float | None
    seconds: float
    deviation: float | None = None

    @property
    def label(self) -> str:
        """What figures call the run's size."""
        if not self.params:
            return "runs"
        return f"depth {self.size}, {self.params:,} parameters" if self.size else f"{number(self.params)} parameters"


def number(count: float) -> str:
    """Returns a count written out; nothing for one that is not known, and four digits where it is no whole number."""
    return "" if not count else f"{count:,.0f}" if float(count).is_integer() else f"{count:.4g}"


class Unit(NamedTuple):
    """How errors are shown: fractions in percent, losses as they are."""

    factor: float
    name: str
    difference: str

    def show(self, error: float) -> str:
        return f"{self.factor * error:.2f}" if self.factor > 1 else f"{error:.4g}"


def unit(runs: Sequence[Run]) -> Unit:
    """Returns the unit in which to show the errors of these runs."""
    if all(run.error <= 1 for run in runs):
        return Unit(100.0, "error, %", "points")
    return Unit(1.0, "error", "units of the error")


SWEEP = "sweep"
SEED = "seed"  # of runs that differ from one of the sweep in the seed alone
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
                if cell is None and field.name == "deviation":
                    continue  # tables from before this column
                if cell is None:
                    raise UserError(f"{path}, line {line}: the column {field.name} is missing")
                try:
                    if field.name in ("fewshot_error", "deviation"):
                        values[field.name] = float(cell) if cell else None
                    else:
                        values[field.name] = _TYPES.get(field.name, int)(cell)
                except ValueError:
                    raise UserError(f"{path}, line {line}: {field.name} is {cell!r}, which is no number") from None
            runs.append(Run(**values))
    return runs

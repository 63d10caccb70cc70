"""A sweep: one experiment with every combination of some fields' values, the best chosen on held-out data.

Which runs those are, and the table of what came out. `runner.py` runs them, each in a process and folder of its own.
"""

import copy
import dataclasses
import itertools
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vit_scaling import UserError
from vit_scaling.config import Config
from vit_scaling.data.sources import open_source
from vit_scaling.evaluation import scores
from vit_scaling.names import render_table
from vit_scaling.studies import runner, scaling
from vit_scaling.studies.runner import Job


@dataclasses.dataclass
class GridConfig:
    """A sweep over fields of a config.

    Attributes:
        base: every run's config, but for the fields below.
        fields: pairs of a field, such as "optim.lr", and the values it takes.
        metric: by which the best run is chosen: held-out data, not the test set.
    """

    base: Config
    fields: tuple[tuple[str, tuple[Any, ...]], ...]
    metric: str = "validation/accuracy"


def plan(grid: GridConfig) -> list[Job]:
    """Returns one job for each combination, the last field changing fastest.

    Raises:
        UserError: a field without values, or the config has no such field.
    """
    if empty := [field for field, values in grid.fields if not values]:
        raise UserError(f"fields gives {empty[0]!r} no values")
    examples = len(open_source(grid.base.data.train))
    jobs = []
    for number, values in enumerate(itertools.product(*(values for _, values in grid.fields))):
        config = copy.deepcopy(grid.base)
        for (field, _), value in zip(grid.fields, values, strict=True):
            scaling.override(config, field, value)
        steps = config.duration.to_steps(config.data.batch_size, examples)
        jobs.append(Job(f"run{number:03d}", "grid", number, config, steps, steps, examples))
    return jobs


def table(grid: GridConfig, jobs: Sequence[Job], workdir: Path) -> str:
    """Returns the finished runs as a Markdown table, best first by the metric.

    Raises:
        UserError: a run did not measure the metric.
    """
    rows = _ranked(grid, jobs, workdir)
    measured = [grid.metric, *sorted({name for *_, metrics in rows for name in metrics} - {grid.metric})]
    header = ["run", *(field for field, _ in grid.fields), *measured]
    lines = []
    for _, job, metrics in rows:
        values = [str(scaling.value_of(job.config, field)) for field, _ in grid.fields]
        lines.append([job.name, *values, *(f"{metrics[name]:.4f}" if name in metrics else "" for name in measured)])
    return render_table(header, lines, markdown=True) + "\n"


def summary(grid: GridConfig, jobs: Sequence[Job], workdir: Path, show: int = 5) -> str:
    """Returns the best runs in 80 columns, for the terminal.

    Raises:
        UserError: as `table`.
    """
    rows, short = _ranked(grid, jobs, workdir), grid.metric.rpartition("/")[2]
    lines = [f"{len(rows)} of {len(jobs)} runs have finished; the best by {grid.metric}:"]
    for value, job, _ in rows[:show]:
        fields = ", ".join(f"{field}={scaling.value_of(job.config, field)}" for field, _ in grid.fields)
        lines += textwrap.wrap(
            f"{job.name}  {scores.number(short, value):>8s}  {fields}",
            80,
            initial_indent="  ",
            subsequent_indent=" " * 20,
        )
    return "\n".join(lines)


def _ranked(grid: GridConfig, jobs: Sequence[Job], workdir: Path) -> list[tuple[float, Job, dict[str, float]]]:
    """Returns (metric, job, all metrics) of each finished run, best first."""
    rows = []
    for job in jobs:
        if not runner.done(job, workdir):
            continue
        metrics = json.loads((runner.folder(workdir, job.name) / "result.json").read_text())["metrics"]
        if grid.metric not in metrics:
            raise UserError(f"metric is {grid.metric!r}, but runs measured {', '.join(sorted(metrics))}")
        rows.append((metrics[grid.metric], job, metrics))
    return sorted(rows, key=lambda row: (-row[0], row[1].name))

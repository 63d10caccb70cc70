"""What the files of a workdir say about a run, for the report and for comparisons."""

import bisect
import dataclasses
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit_scaling import UserError
from vit_scaling.evaluation import scores
from vit_scaling.training import telemetry

RECORD = "report.json"  # what the report shows and no other file of the workdir holds
# What happens to images when they are read: see `data.prefetch.Batches.counts`.
EVENTS = {
    "skipped": "found them corrupt, and the next record took their place",
    "unlabelled": "found no label, and the next record took their place",
    "alpha": "found transparency",
    "warning": "were decoded with a warning",
}
MOST_POINTS = 2000  # of a curve; longer ones are thinned, and the page says so
ALL_POINTS = 100_000  # of all curves of a run: with them its page stays below 2 MB


@dataclasses.dataclass(frozen=True)
class Run:
    """One run as a page shows it: JSON, and curves as arrays whose names begin with a prefix."""

    data: dict[str, Any]
    arrays: dict[str, np.ndarray]


def read(workdir: Path, prefix: str = "") -> Run:
    """Reads a workdir; whatever is not there yet is left out and named.

    Raises:
        UserError: the folder holds no run.
    """
    if not (workdir / "config.json").exists():
        raise UserError(f"{workdir} holds no run of this project: it has no config.json")
    config_record = _json(workdir / "config.json", {})
    config = config_record.get("config", {})
    record = _json(workdir / RECORD, {})
    result = _json(workdir / "result.json", None)
    clock = _json(workdir / "clock.json", {"step": 0, "seconds": {}})
    rows, starts = (telemetry.read_jsonl(workdir / f"{name}.jsonl") for name in ("metrics", "starts"))
    arrays, curves, thinned = curves_of(rows, prefix)
    total = int(config.get("duration", {}).get("amount", 0))
    step = max([int(clock["step"]), *(int(row["step"]) for row in rows)], default=0)
    command = record.get("command")
    flat = flatten(config)
    data = {
        "name": workdir.name,
        "workdir": str(workdir),
        "finished": result is not None,
        "step": step,
        "total_steps": total,
        "batch_size": config.get("data", {}).get("batch_size"),
        "headline": headline(rows, record.get("examples", {})),
        "seconds": clock["seconds"],
        "command": None if command is None else shlex.join(command),
        "notes": notes(rows, result is not None, step, total, record, starts),
        "curves": curves,
        "thinned": thinned,
        "starts": starts,
        "warnings": record.get("warnings", []),
        "environment": {name: value for name, value in config_record.items() if name != "config"},
        "config": [[name, json.dumps(value)] for name, value in flat.items()],
        "overridden": sorted(overridden(command or []) & set(flat)),
        "parameters": record.get("parameters"),
        "evaluation": record.get("evaluation"),
    }
    return Run(data, arrays)


def curves_of(
    rows: Sequence[Mapping[str, Any]], prefix: str = ""
) -> tuple[dict[str, np.ndarray], list[dict[str, Any]], int]:
    """Returns (arrays, curves, how many curves were thinned) of the rows of metrics.jsonl.

    Each curve is {"name", "steps", "values"}, the latter two names of arrays; seconds of training by step are one more
    pair. A value that was not finite is NaN.
    """
    names = sorted({name for row in rows for name in row if name != "step"})
    most = min(MOST_POINTS, ALL_POINTS // max(1, len(names)))
    arrays: dict[str, np.ndarray] = {}
    curves, thinned = [], 0
    for number, name in enumerate(names):
        points = [(row["step"], math.nan if row[name] is None else row[name]) for row in rows if name in row]
        steps = np.array([step for step, _ in points], np.int32)
        values = np.array([value for _, value in points], np.float32)
        kept = thin(values, most)
        thinned += len(kept) < len(values)
        keys = f"{prefix}{number}.steps", f"{prefix}{number}.values"
        arrays |= {keys[0]: steps[kept], keys[1]: values[kept]}
        curves.append({"name": name, "steps": keys[0], "values": keys[1]})
    timed = [(row["step"], row["step_seconds"]) for row in rows if row.get("step_seconds") is not None]
    steps = np.array([0, *(step for step, _ in timed)], np.float64)
    seconds = np.concatenate([[0.0], np.cumsum(np.diff(steps) * [each for _, each in timed])])
    kept = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MOST_POINTS)).astype(int))
    arrays |= {
        f"{prefix}clock.steps": steps[kept].astype(np.int32),
        f"{prefix}clock.seconds": seconds[kept].astype(np.float32),
    }
    return arrays, curves, thinned


def thin(values: np.ndarray, most: int) -> np.ndarray:
    """Returns the indices of at most `most` values: of each stretch the lowest and the highest, so that spikes stay."""
    if len(values) <= most:
        return np.arange(len(values))
    kept = {0, len(values) - 1}
    for stretch in np.array_split(np.arange(len(values)), (most - 2) // 2):
        part = values[stretch]
        if np.isfinite(part).any():
            kept |= {int(stretch[np.nanargmin(part)]), int(stretch[np.nanargmax(part)])}
        else:
            kept.add(int(stretch[0]))
    return np.array(sorted(kept))


def headline(rows: Sequence[Mapping[str, Any]], examples: Mapping[str, int]) -> dict[str, Any] | None:
    """Returns the accuracy that says how good the run is: on the test set, else the newest on the validation set."""
    for name in ("test/accuracy", "validation/accuracy", "test_ema/accuracy", "validation_ema/accuracy"):
        found = [row for row in rows if row.get(name) is not None]
        if found:
            accuracy, count = found[-1][name], examples.get("evaluation." + name.split("/")[0].removesuffix("_ema"))
            interval = None if count is None else list(scores.interval(accuracy, count))
            return {"name": name, "value": accuracy, "step": found[-1]["step"], "examples": count, "interval": interval}
    return None


def notes(
    rows: Sequence[Mapping[str, Any]],
    finished: bool,
    step: int,
    total: int,
    record: Mapping[str, Any],
    starts: Sequence[Mapping[str, Any]] = (),
) -> list[str]:
    """Returns one sentence for everything that is not as it should be, or not finished."""
    said = []
    if not finished:
        said.append(f"Not finished: step {step:,} of {total:,}. The same command continues from the newest checkpoint.")
        if record.get("ended"):
            said.append(f"The last start ended with an error: {record['ended']}")
    skipped = max((row["skipped"] for row in rows if row.get("skipped") is not None), default=0)
    if skipped:
        said.append(f"{int(skipped):,} updates were left out: something in them was not finite, or their loss spiked.")
    for event, words in EVENTS.items():
        if count := counted(rows, f"data/{event}", starts):
            said.append(f"{count:,} reads of training images {words} (process 0, batches read ahead included).")
    lost = sum(value is None for row in rows for value in row.values())
    if lost:
        said.append(f"{lost:,} logged values were not finite and are missing from the curves.")
    return said


def counted(rows: Sequence[Mapping[str, Any]], name: str, starts: Sequence[Mapping[str, Any]]) -> int:
    """Returns the sum over all starts of a count that begins at zero in each."""
    restarts = sorted(start["step"] for start in starts[1:])
    largest: dict[int, int] = {}
    for row in rows:
        if row.get(name) is not None:
            start = bisect.bisect_left(restarts, row["step"])
            largest[start] = max(largest.get(start, 0), int(row[name]))
    return sum(largest.values())


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns {"optim.lr": 0.001, ...} of a nested config; lists are values."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {
        path: value
        for name, child in tree.items()
        for path, value in flatten(child, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def command_of(workdir: Path) -> list[str] | None:
    """Returns the words of the command that a run was started with; None where its record holds none."""
    return _json(workdir / RECORD, {}).get("command")


def overridden(command: Sequence[str]) -> set[str]:
    """Returns the fields of the config that a command line sets by --config.FIELD=VALUE."""
    return {
        word.lstrip("-").removeprefix("config.").partition("=")[0]
        for word in command
        if word.lstrip("-").startswith("config.")
    }


def _json(path: Path, default: Any) -> Any:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # not written yet, or cut off by a crash
        return default

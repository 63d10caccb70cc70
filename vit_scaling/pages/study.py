"""The page of a scaling study or a table of runs: its runs, its laws with their bands, the answer for any budget."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit_scaling import UserError
from vit_scaling.laws.joint import JointLaw
from vit_scaling.laws.repeated import RepeatedLaw
from vit_scaling.pages import page
from vit_scaling.studies import checklist, findings
from vit_scaling.studies.findings import Findings
from vit_scaling.studies.table import SWEEP, Run, unit

PAGE = "report.html"
POINTS = 80, 41  # budgets of the curves and of the slider, up to the most expensive run and beyond it
BEYOND = 100.0  # the slider ends at this multiple of the most expensive run's compute
MORE_DATA = (1.0, 2.0, 4.0, 10.0, np.inf)  # multiples of the different images at hand
# The laws of `Findings` by attribute, their names and their forms.
LAWS = {
    "law": ("compute", "E = c + a (C + d)^-b"),
    "broken": ("compute, with a break", "E = c + a C^-b (1 + (C / turn)^(1 / 0.3))^(-0.3 s)"),
    "joint": ("size and images", "E = e + A N^-alpha + B T^-beta"),
    "repeated": (
        "repeated data",
        "E = e + (chance - e) h / (1 + h), h = A N^-alpha + B T^-beta + C N^gamma D^-delta",
    ),
}


def write(
    folder: Path,
    title: str,
    runs: Sequence[Run],
    unfinished: Mapping[str, str],
    found: Findings | None = None,
    origin: Sequence[tuple[str, str]] = (),
) -> Path:
    """Writes folder/report.html from the runs of a study or a table and returns its path.

    Args:
        unfinished: {run: reason} of those that did not finish.
        found: what `findings.find` makes of the runs, if it is known already.
        origin: rows of the checklist about where the table comes from.
    """
    found = found or findings.find(runs)
    sweep = [run for run in runs if run.group == SWEEP]
    own = {key: getattr(found, key) for key in LAWS if getattr(found, key) is not None}
    scale = unit(runs)
    data: dict[str, Any] = {
        "title": title,
        "percent": scale.factor > 1,
        "runs": _columns(runs),
        "sweep": [[run.label, run.params, run.images, run.data_images, run.compute, run.error] for run in sweep],
        "unfinished": sorted(unfinished.items()),
        "problems": [
            *found.problems,
            *(f"Law of {LAWS[key][0]}: {text}" for key, law in own.items() for text in getattr(law, "warnings", ())),
        ],
        "dearest": max((run.compute for run in sweep), default=None),
        "laws": [
            {
                "key": key,
                "name": LAWS[key][0],
                "form": LAWS[key][1],
                "level": law.level,
                "coefficients": [[name, getattr(law, name), *law.interval(name)] for name in law.COEFFICIENTS],
            }
            for key, law in own.items()
        ],
        "frontier": [] if found.law is None else np.stack([found.law.compute, found.law.error], axis=1).tolist(),
        "residuals": [
            [row.law, row.run.name, row.run.label, row.run.compute, row.run.error, row.fitted, row.relative]
            for row in findings.residuals(found, runs)
        ],
        "held_out": [list(each) for each in found.held_out],
        "checklist": [*origin, *(checklist.rows(found, sweep) if sweep else ())],
        "advice": [],
        "more_data": [],
        "rainbow": [],
    }
    arrays: dict[str, np.ndarray] = {}
    if sweep:
        least, most = min(run.compute for run in sweep), data["dearest"]
        inside, beyond = np.geomspace(least, most, POINTS[0]), np.geomspace(most, BEYOND * most, POINTS[1])
        budgets = np.concatenate([inside[:-1], beyond])
        arrays["budgets"] = budgets.astype(np.float32)
        for key in {"law", "broken"} & set(own):
            arrays |= _with_ends(key, own[key].predict(budgets), *own[key].band(budgets))
        if found.joint is not None:
            data["advice"] += _advice("joint", found.joint, budgets, arrays)
        if found.repeated is not None:
            data["advice"] += _advice("repeated", found.repeated, budgets, arrays)
            data["more_data"] = _more_data(found.repeated, data["dearest"])
        data["rainbow"] = _rainbow(found, budgets, data["dearest"], arrays)
    path = folder / PAGE
    page.write(path, page.page(f"{title}: report", ("study.js",), data, arrays))
    return path


def _columns(runs: Sequence[Run]) -> dict[str, Any]:
    """Returns header and rows of the table of runs, without the columns that say nothing."""
    names = [name for name in Run.__dataclass_fields__ if any(getattr(run, name) for run in runs)]
    return {"header": names, "rows": [[getattr(run, name) for name in names] for run in runs]}


def _advice(
    key: str, law: JointLaw | RepeatedLaw, budgets: np.ndarray, arrays: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Adds the best split of every budget to the arrays; returns its description, or nothing where there is none."""
    extra = (law.unique_range[1],) if isinstance(law, RepeatedLaw) else ()
    try:
        best = [law.optimum(float(budget), *extra) for budget in budgets]
    except UserError:  # size or images seen do not matter; the law's warnings say so
        return []
    for name in ("params", "images", "error"):
        spans = [getattr(each, f"{name}_interval") for each in best]
        arrays |= _with_ends(f"{key}.{name}", [getattr(each, name) for each in best], *zip(*spans, strict=True))
    title = LAWS[key][0] + (f", {extra[0]:,.0f} different images" if extra else "")
    return [{"key": key, "name": title, "level": law.level, "notes": [list(each.warnings) for each in best]}]


def _more_data(law: RepeatedLaw, compute: float) -> list[list[Any]]:
    """Returns rows (different images, parameters and error with their intervals, compute that is worth as much)."""
    if min(law.A, law.B) <= 0:
        return []
    rows = []
    for each in law.value_of_data(compute, law.unique_range[1], MORE_DATA):
        best = each.best
        spans = [best.params, *best.params_interval, best.error, *best.error_interval]
        rows.append([each.unique, *spans, each.worth / compute])
    return rows


def _rainbow(
    found: Findings, budgets: np.ndarray, compute: float, arrays: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Returns what the laws say without the runs of each size, and adds their curves to the arrays."""
    rows = []
    for params, law, joint in found.rainbow:
        row: dict[str, Any] = {"left_out": params, "curve": None, "size": None, "error": None}
        if law is not None:
            row |= {"curve": f"rainbow.{params:g}", "error": float(law.predict(compute))}
            arrays[row["curve"]] = law.predict(budgets).astype(np.float32)
        if joint is not None and min(joint.A, joint.B) > 0:
            row["size"] = joint.optimum(compute).params
        rows.append(row)
    return rows


def _with_ends(key: str, values: Any, low: Any, high: Any) -> dict[str, np.ndarray]:
    """Returns arrays of a curve and of the ends of its interval."""
    parts = {key: values, f"{key}.low": low, f"{key}.high": high}
    return {name: np.asarray(part, np.float32) for name, part in parts.items()}

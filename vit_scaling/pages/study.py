"""The page of a scaling study: its runs, its laws with their bands, and the answer for any budget."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit_scaling.pages import page
from vit_scaling.studies import findings, table
from vit_scaling.studies.table import SWEEP, Run

PAGE = "report.html"
POINTS = 161  # budgets of the curves and of the slider
BEYOND = 100.0  # the slider reaches so many times the dearest run


def write(
    folder: Path,
    title: str,
    runs: Sequence[Run],
    unfinished: Mapping[str, str],
    found: findings.Findings | None = None,
) -> Path:
    """Writes folder/report.html from the table of a study's runs and returns its path.

    Args:
        unfinished: {run: reason} of those that did not finish.
        found: what `findings.find` makes of the runs, if it is known already.
    """
    found = found or findings.find(runs)
    sweep = [run for run in runs if run.group == SWEEP]
    data: dict[str, Any] = {
        "title": title,
        "runs": [{name: getattr(run, name) for name in Run.__dataclass_fields__} for run in runs],
        "unfinished": sorted(unfinished.items()),
        "problems": [
            *found.problems,
            *(w for law in (found.law, found.joint) if law is not None for w in law.warnings),
        ],
        "dearest": max((run.compute for run in sweep), default=None),
    }
    arrays: dict[str, np.ndarray] = {}
    if sweep:
        low = min(run.compute for run in sweep)
        budgets = np.geomspace(low, BEYOND * data["dearest"], POINTS)
        arrays["budgets"] = budgets.astype(np.float32)
        if (law := found.law) is not None:
            band = law.band(budgets)
            arrays |= {"law": _single(law.predict(budgets)), "law.low": _single(band[0]), "law.high": _single(band[1])}
            residuals = law.error - law.predict(law.compute)
            data["law"] = {
                "coefficients": {name: [getattr(law, name), *law.interval(name)] for name in ("a", "b", "c", "d")},
                "level": law.level,
                "rms": law.rms,
                "r_squared": law.r_squared,
                "frontier": [
                    [float(x), float(y), float(r)] for x, y, r in zip(law.compute, law.error, residuals, strict=True)
                ],
            }
        if (joint := found.joint) is not None and min(joint.A, joint.B) > 0:
            best = [joint.optimum(float(budget)) for budget in budgets]
            for name in ("params", "images", "error"):
                arrays[f"best.{name}"] = _single([getattr(each, name) for each in best])
                spans = [getattr(each, f"{name}_interval") for each in best]
                arrays |= {
                    f"best.{name}.{end}": _single([span[i] for span in spans]) for i, end in enumerate(("low", "high"))
                }
            data["joint"] = {
                name: getattr(joint, name)
                for name in ("e", "A", "alpha", "B", "beta", "kappa", "gamma", "rms", "level")
            }
            data["joint"] |= {"sizes": list(joint.size_range), "images": list(joint.images_range)}
    path = folder / PAGE
    page.write(path, page.page(f"{title}: report", ("study.js",), data, arrays))
    return path


def _single(values: Any) -> np.ndarray:
    return np.asarray(values, np.float32)


def of_folder(folder: Path) -> Path:
    """Writes the page of a study's folder from its runs.csv alone, and returns its path."""
    return write(folder, f"Scaling study {folder.name}", table.read(folder / "runs.csv"), {})

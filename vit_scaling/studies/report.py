"""The report of a scaling study, in Markdown: first the answer for a budget, then the evidence."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vit_scaling.laws import joint, power_law
from vit_scaling.laws.joint import JointLaw
from vit_scaling.laws.power_law import Law
from vit_scaling.names import render_table
from vit_scaling.studies import plots
from vit_scaling.studies.table import SWEEP, Run


@dataclasses.dataclass(frozen=True)
class Findings:
    """The laws that the runs support; None, with the reason among `problems`, where they support none."""

    law: Law | None
    joint: JointLaw | None
    problems: tuple[str, ...]


def find(runs: Sequence[Run]) -> Findings:
    """Fits error against compute to the sweep's frontier, and against size and images to its runs on most data."""
    sweep = [run for run in runs if run.group == SWEEP]
    full = _on_most_data(sweep)
    problems: list[str] = []
    frontier = two = None
    try:
        frontier = power_law.fit(_column(sweep, "compute"), _column(sweep, "error"))
    except ValueError as error:
        problems.append(f"No law of compute: {error}.")
    try:
        params, images, error_, compute = (_column(full, name) for name in ("params", "images", "error", "compute"))
        two = joint.fit(params, images, error_, compute=compute)
    except ValueError as error:
        problems.append(f"No law of size and images: {error}.")
    return Findings(frontier, two, tuple(problems))


def write(
    folder: Path, title: str, runs: Sequence[Run], budgets: Sequence[float], unfinished: Mapping[str, str]
) -> Path:
    """Writes folder/report.md and the figures beside it, and returns the report's path.

    Args:
        budgets: training FLOPs to answer for; if empty 1, 3 and 10 times the most expensive run.
        unfinished: {run: reason} of those that did not finish.
    """
    found = find(runs)
    sweep = [run for run in runs if run.group == SWEEP]
    largest = max((run.compute for run in sweep), default=0.0)
    parts = [f"# {title}", _answer(found, sweep, budgets or [largest, 3 * largest, 10 * largest])]
    if unfinished:
        parts.append("## Runs that have not finished\n\n" + _table(("run", "why"), list(unfinished.items())))
    parts.append(_law_section(found))
    if sweep:
        figures = {
            "error_by_compute": (plots.error_by_compute(sweep, found.law), "Error against compute, and the law"),
            "error_by_data": (plots.error_by_data(sweep), "Error against the number of different images"),
            "sample_efficiency": (plots.sample_efficiency(sweep), "Error against images seen"),
        }
        if found.joint is not None and min(found.joint.A, found.joint.B) > 0:
            figures["iso_compute"] = (plots.iso_compute(_on_most_data(sweep), found.joint), "Size at equal compute")
        for name, (figure, caption) in figures.items():
            plots.save(figure, folder / "figures", name)
            parts.append(f"![{caption}](figures/{name}.png)")
    parts += [_efficiency(_on_most_data(sweep)), _comparisons(runs), _all_runs(runs)]
    path = folder / "report.md"
    path.write_text("\n\n".join(part for part in parts if part) + "\n")
    return path


def _answer(found: Findings, sweep: Sequence[Run], budgets: Sequence[float]) -> str:
    if not sweep:
        return "No run of the sweep has finished yet."
    rows = []
    most = max(run.compute for run in sweep)
    for budget in budgets:
        size = images = own = "not determined"
        if found.joint is not None and min(found.joint.A, found.joint.B) > 0:
            best = found.joint.optimum(budget)
            depth = _depth(sweep, best.params)
            beyond = "" if _within(best.params, found.joint.size_range) else ", beyond the sizes run"
            size = f"{best.params:,.0f} (about depth {depth:.1f}{beyond}), {_span(best.params_interval, '{:,.0f}')}"
            beyond = "" if _within(best.images, found.joint.images_range) else " (beyond the lengths run)"
            images = f"{best.images:,.0f}{beyond}, {_span(best.images_interval, '{:,.0f}')}"
            own = f"{100 * best.error:.2f}, {_span([100 * e for e in best.error_interval], '{:.2f}')}"
        frontier = "not determined"
        if found.law is not None:
            band = [100 * float(end) for end in found.law.band(budget)]
            frontier = f"{100 * float(found.law.predict(budget)):.2f}, {_span(band, '{:.2f}')}"
        rows.append((f"{budget:.2e}", size, images, own, frontier))
    header = ("FLOPs", "parameters", "images", "error, % (size and images)", "error, % (frontier)")
    note = (
        "Intervals are bootstrap intervals of the laws, at the level given below. "
        f"Beyond {most:.2e} FLOPs, the most expensive run, and beyond the sizes and lengths run, numbers are "
        "extrapolations."
    )
    return "\n\n".join(["## For a budget, train this", _table(header, rows), note])


def _within(value: float, span: tuple[float, float]) -> bool:
    return span[0] <= value <= span[1]


def _depth(sweep: Sequence[Run], params: float) -> float:
    """Returns the dial's setting of that many parameters, a power law between the sizes run."""
    sizes = sorted({(run.size, run.params) for run in sweep})
    if len(sizes) < 2:
        return float(sizes[0][0])
    slope, offset = np.polyfit(np.log([p for _, p in sizes]), np.log([s for s, _ in sizes]), 1)
    return float(np.exp(offset + slope * np.log(params)))


def _law_section(found: Findings) -> str:
    lines = ["## The laws"]
    if found.law is not None:
        fitted = found.law
        rows = [
            (name, f"{getattr(fitted, name):.4g}", _span(fitted.interval(name), "{:.4g}"))
            for name in fitted.COEFFICIENTS
        ]
        lines += [
            "Error against training FLOPs, E = c + a (C + d)^-b, on the frontier of all runs:",
            _table(("coefficient", "value", f"{fitted.level:.0%} interval"), rows),
            f"{len(fitted.compute)} frontier points, residuals of {100 * fitted.rms:.2f} points root mean square, "
            f"R² {fitted.r_squared:.4f}.",
        ]
        if (left := fitted.extrapolation) is not None:
            lines.append(
                f"Fitted to runs of at most {left.fitted_up_to:.2e} FLOPs, it misses the {left.points} "
                f"more expensive frontier points by {100 * left.mean_error:+.2f} points on average and by "
                f"{100 * left.max_error:.2f} at most."
            )
        lines += [f"* {sentence}" for sentence in fitted.warnings]
    if found.joint is not None:
        two = found.joint
        lines += [
            "Error against parameters N and images seen D, on most data:",
            f"E = {two.e:.3g} + {two.A:.3g} N^-{two.alpha:.3g} + {two.B:.3g} D^-{two.beta:.3g}, residuals of "
            f"{100 * two.rms:.2f} points. A run costs {two.kappa:.3g} N^{two.gamma:.3g} D FLOPs.",
            *(f"* {sentence}" for sentence in two.warnings),
        ]
    return "\n\n".join([*lines, *found.problems])


def _efficiency(runs: Sequence[Run]) -> str:
    """How many images each size needs for errors that several sizes reach."""
    sizes = sorted({run.size for run in runs})
    curves = {size: sorted((run for run in runs if run.size == size), key=lambda run: run.images) for size in sizes}
    targets = sorted({curve[-1].error for curve in curves.values() if len(curve) > 1}, reverse=True)
    rows = []
    for target in targets:
        cells = [f"{100 * target:.2f}"]
        for curve in curves.values():
            x, y = np.log([run.images for run in curve]), np.minimum.accumulate([run.error for run in curve])
            if y[-1] > target:
                cells.append("not reached")
            elif y[0] <= target:
                cells.append(f"under {curve[0].images:,}")
            else:
                cells.append(f"{np.exp(np.interp(-target, -y, x)):,.0f}")
        rows.append(tuple(cells))
    if not rows:
        return ""
    header = ("error, %", *(f"depth {size}" for size in sizes))
    return "## Images that each size needs for an error\n\n" + _table(header, rows)


def _comparisons(runs: Sequence[Run]) -> str:
    """Each comparison beside the sweep's run of the same size, data and duration."""
    rows = []
    for run in (run for run in runs if run.group != SWEEP):
        alike = (
            other
            for other in runs
            if other.group == SWEEP
            and (other.size, other.data_images, other.images) == (run.size, run.data_images, run.images)
        )
        baseline = next(alike, None)
        theirs = ("", "")
        if baseline is not None:
            theirs = f"{100 * baseline.error:.2f}", _percent(baseline.fewshot_error)
        own = f"{100 * run.error:.2f}", _percent(run.fewshot_error)
        rows.append((run.group, run.size, f"{run.images:,}", *own, *theirs))
    if not rows:
        return ""
    header = (
        "run",
        "depth",
        "images",
        "error, %",
        "few-shot error, %",
        "sweep's error, %",
        "sweep's few-shot error, %",
    )
    return "## Comparisons, each with the sweep's cooldown branch of the same length\n\n" + render_table(
        header, rows, markdown=True
    )


def _all_runs(runs: Sequence[Run]) -> str:
    rows = [
        (
            run.name,
            f"{run.params:,}",
            f"{run.data_images:,}",
            f"{run.images:,}",
            f"{run.compute:.2e}",
            f"{100 * run.error:.2f}",
            _percent(run.fewshot_error),
        )
        for run in runs
    ]
    header = ("run", "parameters", "data", "images seen", "FLOPs", "error, %", "few-shot error, %")
    return "## All runs\n\n" + _table(header, rows) if rows else ""


def _on_most_data(runs: Sequence[Run]) -> list[Run]:
    most = max((run.data_images for run in runs), default=0)
    return [run for run in runs if run.data_images == most]


def _column(runs: Sequence[Run], name: str) -> np.ndarray:
    return np.array([getattr(run, name) for run in runs], np.float64)


def _span(interval: Sequence[float], pattern: str) -> str:
    return f"{pattern.format(interval[0])} to {pattern.format(interval[1])}"


def _percent(error: float | None) -> str:
    return "" if error is None else f"{100 * error:.2f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return render_table(header, rows, markdown=True)

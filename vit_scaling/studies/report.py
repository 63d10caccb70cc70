"""The report of a study or of a table of runs, in Markdown: first the answer for a budget, then the evidence."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vit_scaling import laws
from vit_scaling.laws.repeated import RepeatedLaw
from vit_scaling.names import render_table
from vit_scaling.studies import checklist, findings, plots
from vit_scaling.studies.findings import Findings, on_most_data
from vit_scaling.studies.table import SWEEP, Run, number, unit


def write(
    folder: Path,
    title: str,
    runs: Sequence[Run],
    found: Findings,
    *,
    budgets: Sequence[float] = (),
    unfinished: Mapping[str, str] | None = None,
    origin: Sequence[tuple[str, str]] = (),
) -> Path:
    """Writes folder/report.md, its figures and the laws as JSON files, and returns the report's path.

    Args:
        found: what `findings.find` makes of the runs.
        budgets: compute to answer for; if empty 1, 3 and 10 times the most expensive run.
        unfinished: {run: reason} of those that did not finish.
        origin: rows of the checklist about where the table comes from.
    """
    sweep = [run for run in runs if run.group == SWEEP]
    largest = max((run.compute for run in sweep), default=0.0)
    budgets = budgets or [largest, 3 * largest, 10 * largest]
    parts = [f"# {title}", _answer(found, sweep, budgets)]
    if unfinished:
        parts.append("## Runs that have not finished\n\n" + _table(("run", "why"), list(unfinished.items())))
    parts += [_laws(found, runs), _more_data(found, sweep, budgets[0]), _trust(found, sweep, budgets[0])]
    parts += _figures(folder, found, sweep)
    parts += [_efficiency(on_most_data(sweep)), _comparisons(runs)]
    parts += ["## How this was fitted\n\n" + _table(("question", "answer"), [*origin, *checklist.rows(found, sweep)])]
    parts += [_all_runs(runs)]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.md"
    path.write_text("\n\n".join(part for part in parts if part) + "\n")
    named = (("compute", found.law), ("joint", found.joint), ("repeated", found.repeated), ("broken", found.broken))
    for name, law in named:
        if law is not None:
            (folder / "laws").mkdir(exist_ok=True)
            laws.save(law, folder / "laws" / f"{name}.json")
    return path


def _figures(folder: Path, found: Findings, sweep: Sequence[Run]) -> list[str]:
    """Saves all figures that the runs allow, and returns the lines that show them."""
    if not sweep:
        return []
    figures = {"error_by_compute": (plots.error_by_compute(sweep, found.law), "Error against compute, and the law")}
    if all(run.data_images for run in sweep):
        figures["error_by_data"] = plots.error_by_data(sweep), "Error against the number of different images"
    if all(run.images for run in sweep):
        figures["sample_efficiency"] = plots.sample_efficiency(sweep), "Error against images seen"
    if found.joint is not None and min(found.joint.A, found.joint.B) > 0:
        figures["iso_compute"] = plots.iso_compute(on_most_data(sweep), found.joint), "Size at equal compute"
    if residuals := findings.residuals(found, sweep):
        figures["residuals"] = plots.residuals(residuals), "Residuals of each law"
    left = [(size, law) for size, law, _ in found.rainbow if law is not None]
    if found.law is not None and left:
        figures["rainbow"] = plots.rainbow(sweep, left, found.law), "The law of compute with one size left out each"
    for name, (figure, _) in figures.items():
        plots.save(figure, folder / "figures", name)
    return [f"![{caption}](figures/{name}.png)" for name, (_, caption) in figures.items()]


def _answer(found: Findings, sweep: Sequence[Run], budgets: Sequence[float]) -> str:
    if not sweep:
        return "No run of the sweep has finished yet."
    scale = unit(sweep)
    rows, notes = [], []
    most = max(run.compute for run in sweep)
    for budget in budgets:
        size = images = own = "not determined"
        if found.joint is not None and min(found.joint.A, found.joint.B) > 0:
            best = found.joint.optimum(budget)
            beyond = "" if _within(best.params, found.joint.size_range) else "beyond the sizes run"
            about = ", ".join(part for part in (_depth(sweep, best.params), beyond) if part)
            size = f"{best.params:,.0f}{f' ({about})' if about else ''}, {_span(best.params_interval, '{:,.0f}')}"
            beyond = "" if _within(best.images, found.joint.images_range) else " (beyond the lengths run)"
            images = f"{best.images:,.0f}{beyond}, {_span(best.images_interval, '{:,.0f}')}"
            own = f"{scale.show(best.error)}, {_errors(best.error_interval, sweep)}"
            notes += [sentence for sentence in best.warnings if "not identified" in sentence]
        frontier = "not determined"
        if found.law is not None:
            band = [float(end) for end in found.law.band(budget)]
            frontier = f"{scale.show(float(found.law.predict(budget)))}, {_errors(band, sweep)}"
        rows.append((f"{budget:.2e}", size, images, own, frontier))
    header = ("compute", "parameters", "images", f"{scale.name} (size and images)", f"{scale.name} (frontier)")
    note = (
        "Intervals are bootstrap intervals of the laws, at the level given below. "
        f"Beyond {most:.2e}, the compute of the most expensive run, and beyond the sizes and lengths run, numbers are "
        "extrapolations."
    )
    bullets = [f"* {sentence}" for sentence in dict.fromkeys(notes)]
    return "\n\n".join(["## For a budget, train this", _table(header, rows), note, *bullets])


def _within(value: float, span: tuple[float, float]) -> bool:
    return span[0] <= value <= span[1]


def _depth(sweep: Sequence[Run], params: float) -> str:
    """Returns the dial's setting of that many parameters, a power law between the sizes run; empty without a dial."""
    sizes = sorted({(run.size, run.params) for run in sweep})
    if not all(size for size, _ in sizes):
        return ""
    if len(sizes) < 2:
        return f"about depth {sizes[0][0]:.1f}"
    slope, offset = np.polyfit(np.log([p for _, p in sizes]), np.log([s for s, _ in sizes]), 1)
    return f"about depth {np.exp(offset + slope * np.log(params)):.1f}"


def _laws(found: Findings, runs: Sequence[Run]) -> str:
    scale = unit(runs)
    lines = ["## The laws"]
    if (one := found.law) is not None:
        lines += [
            "Error against compute, E = c + a (C + d)^-b, on the frontier of all runs:",
            _coefficients(one),
            f"{len(one.compute)} frontier points, residuals of {scale.show(one.rms)} {scale.difference} root mean "
            f"square, R² {one.r_squared:.4f}.",
        ]
        if (left := one.extrapolation) is not None:
            lines.append(
                f"Fitted to runs of at most {left.fitted_up_to:.2e} of compute, it misses the {left.points} more "
                f"expensive frontier points by {scale.factor * left.mean_error:+.3g} {scale.difference} on average and "
                f"by {scale.factor * left.max_error:.3g} at most."
            )
        lines += [f"* {sentence}" for sentence in one.warnings]
    if (bent := found.broken) is not None:
        lines += [
            f"A law with a break at {bent.turn:.3g} of compute predicts the held-out runs better; it expects "
            f"{scale.show(float(bent.predict(10 * max(run.compute for run in runs))))} at ten times the most expensive "
            f"run. {scale.name}; its coefficients are in laws/broken.json."
        ]
    if (two := found.joint) is not None:
        lines += [
            "Error against parameters N and images seen T, on most data, E = e + A N^-alpha + B T^-beta:",
            _coefficients(two),
            f"{two.runs} runs, residuals of {scale.show(two.rms)} {scale.difference}. A run costs {two.kappa:.3g} "
            f"N^{two.gamma:.3g} T.",
            *(f"* {sentence}" for sentence in two.warnings),
        ]
    if (three := found.repeated) is not None:
        lines += [
            "Error against parameters N, images seen T and different images D, E = e + (chance - e) h / (1 + h) with "
            "h = A N^-alpha + B T^-beta + C N^gamma D^-delta:",
            _coefficients(three),
            f"{three.runs} runs, relative residuals of {three.relative_rms:.1%} root mean square.",
            *(f"* {sentence}" for sentence in three.warnings),
        ]
    return "\n\n".join([*lines, *found.problems])


def _coefficients(law: laws.Law | laws.JointLaw | RepeatedLaw) -> str:
    rows = [
        (name, f"{getattr(law, name):.4g}", _span(law.interval(name), "{:.4g}"))
        for name in law.COEFFICIENTS
    ]  # fmt: skip
    return _table(("coefficient", "value", f"{law.level:.0%} interval"), rows)


def _more_data(found: Findings, sweep: Sequence[Run], budget: float) -> str:
    law = found.repeated
    if law is None or min(law.A, law.B) <= 0:
        return ""
    scale, most = unit(sweep), law.unique_range[1]
    rows = []
    for more in law.value_of_data(budget, most, factors=(1.0, 2.0, 4.0, 10.0, np.inf)):
        amount = f"{more.unique:,.0f}" if np.isfinite(more.unique) else "unlimited"
        worth = f"{more.worth / budget:.3g} times" if np.isfinite(more.worth) else "no compute reaches it"
        best = more.best
        size = f"{best.params:,.0f}, {_span(best.params_interval, '{:,.0f}')}"
        rows.append((amount, size, f"{scale.show(best.error)}, {_errors(best.error_interval, sweep)}", worth))
    header = ("different images", "best size", scale.name, f"compute for that error on {most:,.0f}")
    text = f"By the law of repeated data, for {budget:.2e} of compute:"
    return "\n\n".join(["## What more different images would give", text, _table(header, rows)])


def _trust(found: Findings, sweep: Sequence[Run], budget: float) -> str:
    """The test on held-out runs, and how much each size decides the answer."""
    parts = []
    if found.held_out:
        rows = [(each.law, each.fitted, each.judged, f"{each.miss:.4f}") for each in found.held_out]
        parts += [
            f"The most expensive {found.options.held_out:.0%} of the runs, predicted by laws fitted to the others "
            "(root mean square of log predicted minus log measured error; the law of compute is judged on the "
            "frontier):",
            _table(("law of", "runs fitted", "runs judged", "miss"), rows),
        ]
    answers = []
    for params, one, two in found.rainbow:
        size = "not determined"
        if two is not None and min(two.A, two.B) > 0:
            size = f"{two.optimum(budget).params:,.0f}"
        error = "not determined" if one is None else unit(sweep).show(float(one.predict(budget)))
        answers.append((number(params), size, error))
    if answers:
        header = ("parameters left out", f"best size for {budget:.2e}", f"{unit(sweep).name} (frontier)")
        parts += ["The laws with the runs of one size left out each:", _table(header, answers)]
    return "\n\n".join(["## How far to trust it", *parts]) if parts else ""


def _efficiency(runs: Sequence[Run]) -> str:
    """How many images each size needs for errors that several sizes reach."""
    sizes = sorted({run.params for run in runs})
    if not all(run.images for run in runs) or len(sizes) > plots.MANY:
        return ""
    scale = unit(runs)
    curves = {size: sorted((run for run in runs if run.params == size), key=lambda run: run.images) for size in sizes}
    targets = sorted({curve[-1].error for curve in curves.values() if len(curve) > 1}, reverse=True)
    rows = []
    for target in targets:
        cells = [scale.show(target)]
        for curve in curves.values():
            x, y = np.log([run.images for run in curve]), np.minimum.accumulate([run.error for run in curve])
            if y[-1] > target:
                cells.append("not reached")
            elif y[0] <= target:
                cells.append(f"under {number(curve[0].images)}")
            else:
                cells.append(f"{np.exp(np.interp(-target, -y, x)):,.0f}")
        rows.append(tuple(cells))
    if not rows:
        return ""
    header = (scale.name, *(curve[0].label for curve in curves.values()))
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
        rows.append((run.group, run.size, number(run.images), *own, *theirs))
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
    scale = unit(runs)
    rows = [
        (
            run.name,
            number(run.params),
            number(run.data_images),
            number(run.images),
            f"{run.compute:.2e}",
            scale.show(run.error),
            _percent(run.fewshot_error),
        )
        for run in runs
    ]
    header = ("run", "parameters", "data", "images seen", "compute", scale.name, "few-shot error, %")
    return "## All runs\n\n" + _table(header, rows) if rows else ""


def _errors(interval: Sequence[float], sweep: Sequence[Run]) -> str:
    low, high = (unit(sweep).show(end) for end in interval)
    return f"{low} to {high}"


def _span(interval: Sequence[float], pattern: str) -> str:
    return f"{pattern.format(interval[0])} to {pattern.format(interval[1])}"


def _percent(error: float | None) -> str:
    return "" if error is None else f"{100 * error:.2f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return render_table(header, rows, markdown=True)

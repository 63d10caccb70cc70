"""The figures of a scaling study, after figures 2 to 4 of Scaling Vision Transformers (arXiv 2106.04560)."""

from collections.abc import Collection, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from vit_scaling.laws.joint import JointLaw
from vit_scaling.laws.power_law import Law
from vit_scaling.studies.findings import Residual
from vit_scaling.studies.table import Run, number, unit

INK, BAND = "#253237", "#9db4c0"
MANY = 12  # more sizes or amounts than these are not named one by one


def error_by_compute(runs: Sequence[Run], law: Law | None) -> Figure:
    """Error against compute: every run, coloured by size and marked by data size; the frontier and its law."""
    figure, axes = _axes("compute", runs)
    _lines(axes, runs, lambda run: run.compute)
    if law is not None:
        factor = unit(runs).factor
        x = np.geomspace(law.compute[0], 10 * law.compute[-1], 200)
        low, high = law.band(x)
        axes.fill_between(x, factor * low, factor * high, color=BAND, alpha=0.4, linewidth=0)
        inside = x <= law.compute[-1]
        formula = f"{law.c:.3g} + {law.a:.3g} (C + {law.d:.2g})$^{{-{law.b:.2g}}}$"
        axes.plot(x[inside], factor * law.predict(x[inside]), color=INK, label=f"E = {formula}")
        axes.plot(x[~inside], factor * law.predict(x[~inside]), color=INK, linestyle="--", label="extrapolated")
        axes.scatter(law.compute, factor * law.error, s=90, facecolors="none", edgecolors=INK, label="frontier")
    _legend(axes)
    return figure


def sample_efficiency(runs: Sequence[Run]) -> Figure:
    """Error against images seen, one line for each size and data size."""
    figure, axes = _axes("images seen", runs)
    _lines(axes, runs, lambda run: run.images)
    _counts(axes, {run.images for run in runs})
    _legend(axes)
    return figure


def error_by_data(runs: Sequence[Run]) -> Figure:
    """Error of each size's best run against how many different images it was trained on."""
    figure, axes = _axes("different training images", runs)
    factor = unit(runs).factor
    for params, colour in _colours(runs).items():
        best: dict[float, float] = {}
        for run in (run for run in runs if run.params == params):
            best[run.data_images] = min(run.error, best.get(run.data_images, np.inf))
        data = sorted(best)
        axes.plot(data, [factor * best[count] for count in data], color=colour, marker="o", label=_label(runs, params))
    _counts(axes, {run.data_images for run in runs})
    _legend(axes)
    return figure


def iso_compute(runs: Sequence[Run], law: JointLaw) -> Figure:
    """Error against model size at equal compute: the joint law, its minima, and the measured sizes.

    A measured point is a size's error at that compute, interpolated between its runs; never extrapolated.
    """
    figure, axes = _axes("parameters", runs)
    factor = unit(runs).factor
    compute = np.array([run.compute for run in runs])
    budgets = np.geomspace(compute.min() * 3, compute.max(), 4)
    for budget, colour in zip(budgets, matplotlib.colormaps["viridis"](np.linspace(0, 0.9, 4)), strict=True):
        params = np.geomspace(law.size_range[0] / 3, law.size_range[1] * 3, 100)
        errors = law.predict(params, law.images_for(params, budget))
        axes.plot(params, factor * errors, color=colour, label=f"{budget:.1e} of compute")
        best = law.optimum(float(budget))
        axes.scatter([best.params], [factor * best.error], color=colour, marker="v", s=60)
        for size in _colours(runs):
            own = sorted((run for run in runs if run.params == size), key=lambda run: run.compute)
            if own[0].compute <= budget <= own[-1].compute:
                x = np.log([run.compute for run in own])
                error = np.exp(np.interp(np.log(budget), x, np.log([max(run.error, 1e-6) for run in own])))
                axes.scatter([own[0].params], [factor * error], color=colour, s=25)
    axes.scatter([], [], color=INK, marker="v", s=60, label="least error, by the law")
    axes.scatter([], [], color=INK, s=25, label="measured")
    lowest = factor * float(law.optimum(float(budgets[-1])).error)
    axes.set_ylim(bottom=min(axes.get_ylim()[0], lowest / 1.3))
    _legend(axes)
    return figure


def rainbow(runs: Sequence[Run], laws: Sequence[tuple[float, Law]], whole: Law) -> Figure:
    """The law of compute, and those fitted without the runs of one size each."""
    figure, axes = _axes("compute", runs)
    factor, colours = unit(runs).factor, _colours(runs)
    x = np.geomspace(whole.compute[0], 10 * whole.compute[-1], 200)
    for params, law in laws:
        label = f"without {_label(runs, params)}"
        axes.plot(x, factor * law.predict(x), color=colours[params], linewidth=1.2, label=label)
    axes.plot(x, factor * whole.predict(x), color=INK, linewidth=2, label="all runs")
    axes.scatter(whole.compute, factor * whole.error, s=60, facecolors="none", edgecolors=INK, label="frontier")
    _legend(axes)
    return figure


def residuals(rows: Sequence[Residual]) -> Figure:
    """Measured over fitted error against compute, for each law."""
    names = list(dict.fromkeys(row.law for row in rows))
    figure = Figure(figsize=(8.5, 2.4 * len(names)), layout="constrained")
    for axes, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
        own = [row for row in rows if row.law == name]
        colours = _colours([row.run for row in own])
        for params, colour in colours.items():
            points = [row for row in own if row.run.params == params]
            values = [100 * row.relative for row in points]
            label = points[0].run.label if len(colours) <= MANY else None
            axes.scatter([row.run.compute for row in points], values, color=colour, s=18, label=label)
        axes.axhline(0.0, color=INK, linewidth=0.8)
        axes.set(xscale="log", xlabel="compute", ylabel="residual, %", title=f"law of {name}")
        axes.grid(which="major", color="#e5e9ec", linewidth=0.6)
        if any(params for params in colours) and len(colours) <= MANY:
            axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def save(figure: Figure, folder: Path, name: str) -> Path:
    """Writes `folder/name.png` and `.svg`, and returns the former."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in ("svg", "png"):
        path = folder / f"{name}.{suffix}"
        figure.savefig(path, dpi=130)
    return path


def _axes(x: str, runs: Sequence[Run]) -> tuple[Figure, Axes]:
    """Returns logarithmic axes that show the runs' errors, whatever else is drawn."""
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    factor, name, _ = unit(runs)
    errors = [factor * max(run.error, 1e-6) for run in runs]
    axes.set(xlabel=x, ylabel=name, xscale="log", yscale="log", ylim=(min(errors) / 1.8, max(errors) * 1.3))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(which="major", color="#e5e9ec", linewidth=0.6)
    return figure, axes


def _colours(runs: Sequence[Run]) -> dict:
    sizes = sorted({run.params for run in runs})
    return dict(zip(sizes, matplotlib.colormaps["plasma"](np.linspace(0, 0.85, len(sizes))), strict=True))


def _label(runs: Sequence[Run], params: float) -> str:
    return next(run.label for run in runs if run.params == params)


def _lines(axes: Axes, runs: Sequence[Run], abscissa) -> None:
    """One line for each size and data size; the largest data set is drawn whole, smaller ones dotted."""
    factor = unit(runs).factor
    amounts = sorted({run.data_images for run in runs}, reverse=True)
    colours = _colours(runs)
    for params, colour in colours.items():
        for rank, data in enumerate(amounts):
            own = sorted((run for run in runs if (run.params, run.data_images) == (params, data)), key=abscissa)
            axes.plot(
                [abscissa(run) for run in own],
                [factor * run.error for run in own],
                color=colour,
                linestyle=":" if rank else "-",
                linewidth=1.2 if len(colours) <= MANY else 0.0,
                marker="osD^v"[rank % 5],
                markersize=4,
                label=_label(runs, params) if not rank and len(colours) <= MANY else None,
            )
    for rank, data in enumerate(amounts if len(amounts) > 1 else []):
        axes.plot(
            [], [], color=INK, linestyle=":" if rank else "-", marker="osD^v"[rank % 5], label=f"{number(data)} images"
        )


def _counts(axes: Axes, amounts: Collection[float]) -> None:
    """Marks the x axis at these numbers, written out, unless they are many."""
    if len(amounts) <= MANY:
        axes.set_xticks(sorted(amounts), [number(count) for count in sorted(amounts)])
        axes.xaxis.set_minor_formatter(NullFormatter())


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize="small")

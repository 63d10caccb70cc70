"""The picture of a run: what the loss did, how accurate it became, the learning rate, and a few predictions."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from vit_scaling import paths
from vit_scaling.evaluation.figure import COLOURS, FAINT, INK, short

RIGHT, WRONG = COLOURS[:2]
PREDICTIONS = 12
LONGEST = 13  # characters of a class name above its image


def run_figure(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    title: str,
    images: Sequence[np.ndarray],
    labels: Sequence[str],
    predictions: Sequence[str],
) -> None:
    """Draws a run and writes it as PNG.

    Args:
        path: where to.
        rows: the rows of metrics.jsonl.
        title: one line over all.
        images: up to `PREDICTIONS` uint8 images [H, W, 3]; the panel is left out where there are none.
        labels: what each shows.
        predictions: what the model says.
    """
    figure = Figure(figsize=(11, 6), layout="constrained")
    figure.suptitle(title, parse_math=False)
    curves, shown = figure.subfigures(2, 1, squeeze=False, height_ratios=[4, 1])[:, 0]
    left, middle, right = curves.subfigures(1, 3, squeeze=False)[0]

    loss = left.subplots()
    for name, label, style in (
        ("loss", "training", {"color": FAINT, "linewidth": 0.8}),
        ("validation/loss", "validation", {"color": INK, "marker": "o", "markersize": 3}),
    ):
        steps, values = _series(rows, name)
        if steps:
            loss.plot(steps, values, label=label, **style)
    loss.set(title="loss", xlabel="step")
    _logarithmic(loss)
    if loss.has_data():
        loss.legend(frameon=False)

    accuracy = middle.subplots()
    names = sorted(
        {name for row in rows for name in row if name.endswith(("/accuracy", "shot")) and not name.startswith("test")},
        key=lambda name: (name.endswith("shot"), _leading_number(name)),
    )
    for number, name in enumerate(names):
        steps, values = _series(rows, name)
        look = {"color": COLOURS[number % len(COLOURS)], "linestyle": ("-", "--", ":")[number // len(COLOURS) % 3]}
        accuracy.plot(steps, [100 * value for value in values], marker="o", markersize=3, label=name, **look)
    accuracy.set(title="accuracy, %", xlabel="step", ylim=(0, 101))
    if names:
        accuracy.legend(frameon=False, fontsize="small")

    rate, norm = right.subplots(2, 1, sharex=True)
    for panel, name in ((rate, "learning_rate"), (norm, "gradient_norm")):
        steps, values = _series(rows, name)
        panel.plot(steps, values, color=COLOURS[5], linewidth=0.8)
        panel.set(title=name.replace("_", " "))
    _logarithmic(norm)
    norm.set(xlabel="step")

    if len(images):
        panels = shown.subplots(1, PREDICTIONS, squeeze=False)[0]
        for index, panel in enumerate(panels):
            panel.axis("off")
            if index >= len(images):
                continue
            panel.imshow(images[index])
            correct = labels[index] == predictions[index]
            told = short(predictions[index], LONGEST)
            panel.set_title(
                told if correct else f"{told}\nnot {short(labels[index], LONGEST)}",
                fontsize="x-small" if max(map(len, predictions)) > 4 else "small",
                color=RIGHT if correct else WRONG,
                parse_math=False,
            )
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, format="png")
    paths.write(path, drawn.getvalue())


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Returns (steps, values) of a metric; rows without it, or where it was not finite, are left out."""
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _logarithmic(panel: Any) -> None:
    """Makes the vertical axis logarithmic, with a few plain numbers as its only labels."""
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    wide = high > 8 * low  # else 1, 2 and 5 times powers of ten are too few
    panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=8) if wide else ticker.MaxNLocator(6))
    panel.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_locator(ticker.NullLocator())


def _leading_number(name: str) -> int:
    digits = "".join(character for character in name.split("/")[-1] if character.isdigit())
    return int(digits) if digits else 0

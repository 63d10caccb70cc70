"""The picture of a run: what the loss did, how accurate it became, the learning rate, and a few predictions."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

RIGHT, WRONG = "#2a6f4e", "#b3352b"
PREDICTIONS = 12


def run_figure(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    title: str,
    images: np.ndarray,
    labels: Sequence[str],
    predictions: Sequence[str],
) -> None:
    """Draws a run and writes it as PNG.

    Args:
        path: where to.
        rows: the rows of metrics.jsonl.
        title: one line over all.
        images: up to `PREDICTIONS` uint8 images [N, H, W, 3].
        labels: what each shows.
        predictions: what the model says.
    """
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    figure.suptitle(title)
    grid = figure.add_gridspec(3, PREDICTIONS, height_ratios=[3, 3, 1.6])

    loss = figure.add_subplot(grid[:2, :4])
    for name, label, style in (
        ("loss", "training", {"color": "#9db4c0", "linewidth": 0.8}),
        ("validation/loss", "validation", {"color": "#253237", "marker": "o", "markersize": 3}),
    ):
        steps, values = _series(rows, name)
        if steps:
            loss.plot(steps, values, label=label, **style)
    loss.set(title="loss", xlabel="step", yscale="log")
    loss.legend(frameon=False)

    accuracy = figure.add_subplot(grid[:2, 4:8])
    names = sorted(
        {name for row in rows for name in row if name.endswith(("/accuracy", "shot")) and not name.startswith("test/")},
        key=lambda name: (name.endswith("shot"), _leading_number(name)),
    )
    for name in names:
        steps, values = _series(rows, name)
        if steps:
            accuracy.plot(steps, [100 * value for value in values], marker="o", markersize=3, label=name)
    accuracy.set(title="accuracy, %", xlabel="step", ylim=(0, 101))
    if names:
        accuracy.legend(frameon=False, fontsize="small")

    rate = figure.add_subplot(grid[0, 8:])
    steps, values = _series(rows, "learning_rate")
    rate.plot(steps, values, color="#5c6b73")
    rate.set(title="learning rate", xticklabels=[])
    norm = figure.add_subplot(grid[1, 8:], sharex=rate)
    steps, values = _series(rows, "gradient_norm")
    norm.plot(steps, values, color="#5c6b73", linewidth=0.8)
    norm.set(title="gradient norm", xlabel="step", yscale="log")

    for index in range(min(PREDICTIONS, len(images))):
        panel = figure.add_subplot(grid[2, index])
        panel.imshow(images[index])
        panel.set(xticks=[], yticks=[])
        right = labels[index] == predictions[index]
        panel.set_title(
            predictions[index] if right else f"{predictions[index]}, not {labels[index]}",
            fontsize="small",
            color=RIGHT if right else WRONG,
        )
    figure.savefig(path, dpi=110)


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in points], [value if value > 0 or "loss" not in name else math.nan for _, value in points]


def _leading_number(name: str) -> int:
    digits = "".join(character for character in name.split("/")[-1] if character.isdigit())
    return int(digits) if digits else 0

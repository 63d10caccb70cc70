"""The picture of a run: what the loss did, how accurate it became, the learning rate, and a few predictions."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from vit_scaling import paths

RIGHT, WRONG = "#2a6f4e", "#b3352b"
PREDICTIONS = 12


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
    figure.suptitle(title)
    curves, shown = figure.subfigures(2, 1, squeeze=False, height_ratios=[4, 1])[:, 0]
    left, middle, right = curves.subfigures(1, 3, squeeze=False)[0]

    loss = left.subplots()
    for name, label, style in (
        ("loss", "training", {"color": "#9db4c0", "linewidth": 0.8}),
        ("validation/loss", "validation", {"color": "#253237", "marker": "o", "markersize": 3}),
    ):
        steps, values = _series(rows, name)
        if steps:
            loss.plot(steps, values, label=label, **style)
    loss.set(title="loss", xlabel="step", yscale="log")
    loss.legend(frameon=False)

    accuracy = middle.subplots()
    names = sorted(
        {name for row in rows for name in row if name.endswith(("/accuracy", "shot")) and not name.startswith("test")},
        key=lambda name: (name.endswith("shot"), _leading_number(name)),
    )
    for name in names:
        steps, values = _series(rows, name)
        accuracy.plot(steps, [100 * value for value in values], marker="o", markersize=3, label=name)
    accuracy.set(title="accuracy, %", xlabel="step", ylim=(0, 101))
    if names:
        accuracy.legend(frameon=False, fontsize="small")

    rate, norm = right.subplots(2, 1, sharex=True)
    for panel, name, scale in ((rate, "learning_rate", "linear"), (norm, "gradient_norm", "log")):
        steps, values = _series(rows, name)
        panel.plot(steps, values, color="#5c6b73", linewidth=0.8)
        panel.set(title=name.replace("_", " "), yscale=scale)
    norm.set(xlabel="step")

    if len(images):
        panels = shown.subplots(1, PREDICTIONS, squeeze=False)[0]
        for index, panel in enumerate(panels):
            panel.axis("off")
            if index >= len(images):
                continue
            panel.imshow(images[index])
            correct = labels[index] == predictions[index]
            panel.set_title(
                predictions[index] if correct else f"{predictions[index]}, not {labels[index]}",
                fontsize="small",
                color=RIGHT if correct else WRONG,
            )
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, format="png")
    paths.write(path, drawn.getvalue())


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Returns (steps, values) of a metric; rows without it, or where it was not finite, are left out."""
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _leading_number(name: str) -> int:
    digits = "".join(character for character in name.split("/")[-1] if character.isdigit())
    return int(digits) if digits else 0

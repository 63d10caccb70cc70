"""The picture of a run: what the loss did, how accurate it became, the learning rate, and a few predictions."""

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
    figure.savefig(path, dpi=110)


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Returns (steps, values) of a metric; rows without it, or where it was not finite, are left out."""
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _leading_number(name: str) -> int:
    digits = "".join(character for character in name.split("/")[-1] if character.isdigit())
    return int(digits) if digits else 0


MOST_CLASSES = 25


def evaluation_figure(
    path: Path,
    *,
    title: str,
    confusion: np.ndarray,
    names: Sequence[str],
    bins: Sequence[Mapping[str, float]],
) -> None:
    """Draws which classes are taken for which, and how far confidence can be believed; writes it as PNG.

    Args:
        path: where to.
        title: one line over all.
        confusion: [classes, classes] counts; rows are labels, columns predictions. Of many classes the worst are shown.
        names: of the classes.
        bins: of the calibration: "confidence", "accuracy" and "share" of each that is not empty.
    """
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2, width_ratios=[1.35, 1])
    total = np.maximum(confusion.sum(axis=1), 1)
    accuracy = np.diag(confusion) / total
    shown = np.arange(len(names))
    if len(names) > MOST_CLASSES:
        seen = np.flatnonzero(confusion.sum(axis=1))
        shown = np.sort(seen[np.argsort(accuracy[seen], kind="stable")[:MOST_CLASSES]])
    part = 100 * (confusion / total[:, None])[np.ix_(shown, shown)]
    image = left.imshow(part, cmap="Blues", vmin=0, vmax=100)
    for row, column in np.argwhere(part >= 0.05):
        dark = part[row, column] > 55
        left.text(
            column,
            row,
            f"{part[row, column]:.0f}" if part[row, column] >= 1 else "<1",
            ha="center",
            va="center",
            fontsize="x-small" if len(shown) > 12 else "small",
            color="white" if dark else "#253237",
        )
    labels = [names[int(index)] for index in shown]
    rows = [f"{name}  {100 * accuracy[index]:.0f}%" for name, index in zip(labels, shown, strict=True)]
    left.set_xticks(range(len(shown)), labels, rotation=0 if max(map(len, labels)) < 4 else 90)
    left.set_yticks(range(len(shown)), rows)
    worst = "" if len(shown) == len(names) else f", the {len(shown)} worst of {len(names)} classes"
    left.set(xlabel="prediction", ylabel="label and its accuracy", title=f"predictions for each label, %{worst}")
    figure.colorbar(image, ax=left, shrink=0.7)

    right.plot([0, 1], [0, 1], color="#9db4c0", linewidth=0.8)
    sizes = [10 + 400 * row["share"] for row in bins]
    right.scatter([row["confidence"] for row in bins], [row["accuracy"] for row in bins], s=sizes, color=RIGHT)
    right.set(
        title="is confidence right? area: share of the images",
        xlabel="confidence in the prediction",
        ylabel="share of these that is right",
        xlim=(0, 1.02),
        ylim=(0, 1.02),
    )
    figure.savefig(path, dpi=110)

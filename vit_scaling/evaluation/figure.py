"""The picture of an evaluation: which class is taken for which, and how well confidence is calibrated."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from vit_scaling import paths

# Those of the pages (pages/web/page.css): after Okabe and Ito (2008), told apart in every common colour blindness.
COLOURS = ("#0072b2", "#c65300", "#00805f", "#a9507f", "#8a7400", "#39424a")
INK, FAINT = "#253237", "#9db4c0"
MOST_CLASSES = 25
LONGEST = 24  # characters of a class name


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
    figure.suptitle(title, parse_math=False)
    left, right = figure.subplots(1, 2, width_ratios=[1.35, 1])
    total = np.maximum(confusion.sum(axis=1), 1)
    accuracy = np.diag(confusion) / total
    shown = np.arange(len(names))
    if len(names) > MOST_CLASSES:
        seen = np.flatnonzero(confusion.sum(axis=1))
        shown = np.sort(seen[np.argsort(accuracy[seen], kind="stable")[:MOST_CLASSES]])
    part = 100 * (confusion / total[:, None])[np.ix_(shown, shown)]
    shades = LinearSegmentedColormap.from_list("shares", ["#ffffff", COLOURS[0]])
    image = left.imshow(part, cmap=shades, vmin=0, vmax=100)
    for row, column in np.argwhere(part >= 0.05):
        dark = part[row, column] > 55
        left.text(
            column,
            row,
            f"{part[row, column]:.0f}" if part[row, column] >= 1 else "<1",
            ha="center",
            va="center",
            fontsize="x-small" if len(shown) > 12 else "small",
            color="white" if dark else INK,
        )
    labels = [short(names[int(index)]) for index in shown]
    rows = [f"{name}  {100 * accuracy[index]:.0f}%" for name, index in zip(labels, shown, strict=True)]
    left.set_xticks(range(len(shown)), labels, rotation=0 if max(map(len, labels)) < 4 else 90, parse_math=False)
    left.set_yticks(range(len(shown)), rows, parse_math=False)
    worst = "" if len(shown) == len(names) else f", the {len(shown)} worst of {len(names)} classes"
    left.set(xlabel="prediction", ylabel="label and its accuracy", title=f"predictions for each label, %{worst}")
    figure.colorbar(image, ax=left, shrink=0.7)

    right.plot([0, 1], [0, 1], color=FAINT, linewidth=0.8)
    sizes = [10 + 400 * row["share"] for row in bins]
    right.scatter([row["confidence"] for row in bins], [row["accuracy"] for row in bins], s=sizes, color=COLOURS[0])
    right.set(
        title="is confidence right? area: share of the images",
        xlabel="confidence in the prediction",
        ylabel="share of these that is right",
        xlim=(0, 1.02),
        ylim=(0, 1.02),
    )
    with paths.new_file(path) as file:
        figure.savefig(file, dpi=110)


def short(name: str, longest: int = LONGEST) -> str:
    """Returns a class name cut to what fits beside or above a picture."""
    return name if len(name) <= longest else name[: longest - 1] + "…"

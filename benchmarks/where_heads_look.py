"""Draws where each head of a trained Gaussian attention network looks, layer by layer.

    python -m vit_scaling.train --config=configs/attention_cnn_cifar10.py:quadratic --workdir=runs/quadratic
    python -m benchmarks.where_heads_look runs/quadratic/checkpoints/STEP docs/attention_as_convolution.png

The figure of Cordonnier et al. 2020 (arXiv 1911.03584, section 4.2): the query at the origin, for each head the line
within which 40% of a Gaussian's mass lies (thick) and 90% (thin). Prints the numbers behind it as well.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import orbax.checkpoint as ocp

from vit_scaling.models.attention_cnn import precisions


def read(checkpoint: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns the centers [Z, N, 2] and the precisions [Z, N, 2, 2] of a checkpoint's heads."""
    state = ocp.PyTreeCheckpointer().restore((checkpoint / "state").absolute())
    attention = state["params"]["blocks"]["attention"]
    if "centers" not in attention:
        raise ValueError(f"{checkpoint} has no Gaussian heads; train with position quadratic or gaussian")
    return np.asarray(attention["centers"]), np.asarray(precisions(np.asarray(attention["spreads"])))


def draw(centers_ZN2: np.ndarray, precisions_ZN22: np.ndarray, path: Path) -> None:
    depth = len(centers_ZN2)
    figure, axes = plt.subplots(1, depth, figsize=(2.4 * depth, 2.7), sharex=True, sharey=True, squeeze=False)
    circle = np.stack([np.cos(t := np.linspace(0, 2 * np.pi, 64)), np.sin(t)])
    extent = np.abs(centers_ZN2).max() + 3
    for layer, axis in enumerate(axes[0]):
        for head, (center, precision) in enumerate(zip(centers_ZN2[layer], precisions_ZN22[layer], strict=True)):
            to_pixels = np.linalg.inv(np.linalg.cholesky(precision)).T
            for mass, width in ((0.4, 2.0), (0.9, 0.7)):
                row, column = center[:, None] + np.sqrt(-2 * np.log(1 - mass)) * to_pixels @ circle
                axis.plot(column, row, color=f"C{head % 10}", linewidth=width)
        axis.plot(0, 0, "ks", markersize=4)
        axis.set(title=f"layer {layer + 1}", xlim=(-extent, extent), ylim=(extent, -extent), aspect="equal")
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("figure", type=Path)
    args = parser.parse_args()
    centers_ZN2, precisions_ZN22 = read(args.checkpoint)
    print("layer  distance from the query: mean, farthest  standard deviation: narrowest, mean   (tokens)")
    for layer, (centers, precision) in enumerate(zip(centers_ZN2, precisions_ZN22, strict=True), start=1):
        distance, deviation = np.hypot(*centers.T), np.linalg.det(precision) ** -0.25
        print(f"{layer:5}{distance.mean():32.2f}{distance.max():10.2f}{deviation.min():25.2f}{deviation.mean():6.2f}")
    draw(centers_ZN2, precisions_ZN22, args.figure)


if __name__ == "__main__":
    main()

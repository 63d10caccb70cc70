"""The frontier of a set of runs: the least error that was reached for each compute (arXiv 2106.04560, figure 2)."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vit_scaling.laws.robust import Floats

KINDS = ("minimum", "hull", "all")


def find(compute: ArrayLike, error: ArrayLike, kind: str = "minimum") -> NDArray[np.intp]:
    """Returns the positions of the frontier's points, in order of compute.

    Args:
        compute, error: [P], in any order and units.
        kind: "minimum", points with less error than every cheaper one; "hull", the corners of the lower convex hull
            over the logarithm of compute, where that falls; "all", every point.
    """
    x, y = np.asarray(compute, np.float64), np.asarray(error, np.float64)
    order = np.lexsort((y, x))
    if kind == "all":
        return order
    best = np.minimum.accumulate(y[order])
    falls = np.concatenate([[True], best[1:] < best[:-1]])
    keep = order[falls]
    if kind == "minimum":
        return keep
    corners: list[int] = []
    for i in keep.tolist():
        while len(corners) > 1 and _above(np.log(x), y, corners[-2], corners[-1], i):
            corners.pop()
        corners.append(i)
    return np.array(corners, np.intp)


def _above(log_x: Floats, y: Floats, left: int, middle: int, right: int) -> bool:
    """Whether the middle point lies on or above the line between the other two."""
    share = (log_x[middle] - log_x[left]) / (log_x[right] - log_x[left])
    return bool(y[middle] >= y[left] + share * (y[right] - y[left]))

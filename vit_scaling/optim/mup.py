"""muP: learning rates that transfer across widths (Yang and others 2022, arXiv 2203.03466).

A kernel whose inputs grow with the width must change by less in each element, or the sum over its inputs would change
by more in a wider network. The rates below keep the change of each activation as large as at the base width, by the
spectral condition (Yang, Simon and Bernstein 2023, arXiv 2310.17813): the spectral norm of an update is proportional to
sqrt(outputs / inputs). Initialisation does its part in the model: kernels have variance about 1 / inputs there, the
head starts at zero, and positions and probe do not shrink with the width.
"""

import math
from collections.abc import Mapping
from typing import Any

from vit_scaling import UserError, names
from vit_scaling.optim.muon import reduced_axes

SUPPORTED = ("adafactor", "adam", "lion", "muon")
FROM_PIXELS = ("embedding", "stem")  # whose inputs do not grow with the width


def rates(name: str, params: Mapping[str, Any], width_ratio: float) -> dict[str, float]:
    """Returns {path: factor of the learning rate} of an optimizer.

    Updates of Adam, Adafactor and Lion have elements of one size: base / width for every kernel but the patches' (table
    8 of the paper). Muon's updates of matrices grow by sqrt(width) in spectral norm: sqrt(base / width) for them, and
    Adam's factor for the head. Vectors and the patch kernel keep their rate.

    Args:
        name: of the optimizer.
        params: nested dict of anything with a `shape`.
        width_ratio: width over base width; all widths within blocks have grown by it.

    Raises:
        UserError: the optimizer has no such rule.
    """
    if width_ratio != 1 and name not in SUPPORTED:
        raise UserError(f"optim.name is {name!r}, and model.base_width needs one of {', '.join(SUPPORTED)}")

    def rate(path: str, shape: tuple[int, ...]) -> float:
        if path.split("/")[-1] != "kernel" or path.split("/")[0] in FROM_PIXELS:
            return 1.0
        is_matrix = name == "muon" and reduced_axes(path, shape) is not None
        return 1 / math.sqrt(width_ratio) if is_matrix else 1 / width_ratio

    return {path: rate(path, leaf.shape) for path, leaf in names.flatten(params).items()}

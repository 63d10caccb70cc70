"""What every layout of foreign weights offers, and what shapes tell about a network whoever named its tensors."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vit_scaling import UserError
from vit_scaling.interop.families import Family
from vit_scaling.interop.normalisation import Normalisation
from vit_scaling.interop.stored import Stored
from vit_scaling.models import ModelConfig, layers, swin, vit
from vit_scaling.ops import windows

Tensors = Mapping[str, Stored]
Json = Mapping[str, Any]


@dataclasses.dataclass
class Described:
    """A network as a file holds it.

    Attributes:
        config: the model; of its fields `assumed` are those that neither the file nor its neighbour tells.
        image_size: height and width in pixels that its positions or windows belong to.
        num_classes: of its classifier; None if it has none.
        prefix: the parameters that have rows of their own at the start of the position table.
        unknown: the assumed fields for which there is not even a usual value; the user must tell them.
        normalisation: of the input; None if unknown.
        class_names: of the classifier; None if unknown.
        loss: "softmax" or "sigmoid": what makes probabilities of the logits.
        notes: what was left out on the way.
    """

    config: ModelConfig
    image_size: tuple[int, int]
    num_classes: int | None
    assumed: tuple[str, ...] = ()
    prefix: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    normalisation: Normalisation | None = None
    class_names: tuple[str, ...] | None = None
    loss: str = "softmax"
    notes: tuple[str, ...] = ()


class Told(NamedTuple):
    """What a config beside the tensors tells: fields of the model by name (and image_size), and what comes with it."""

    fields: dict[str, Any]
    normalisation: Normalisation | None = None
    class_names: tuple[str, ...] | None = None
    loss: str = "softmax"


class Layout(NamedTuple):
    """What is particular to a library, beside its tables of names.

    canonical: {name: tensor} to the names that its tables have.
    told: (config.json or None, tensors, family) to what it tells.
    """

    canonical: Callable[[Tensors], dict[str, Stored]]
    told: Callable[[Json | None, Tensors, Family], Told]


def vit_heads(width: int) -> int | None:
    """Returns the heads of the published ViTs of this width, or None: no shape tells them."""
    found = {size.heads for size in vit.SIZES.values() if size.width == width}
    return found.pop() if len(found) == 1 else None


def vit_grid(
    rows: int,
    patch: tuple[int, int],
    prefixes: Sequence[int],
    trained_size: tuple[int, int] | None,
    *,
    square: bool = False,
) -> tuple[tuple[int, int], int]:
    """Returns (image size, rows that belong to no patch) of a position table of this many rows.

    Args:
        rows: of the table.
        patch: height and width in pixels.
        prefixes: how many rows the class token and the registers may have.
        trained_size: height and width in pixels as config.json or the user says; None: the one square grid.
        square: whether the first prefix that gives a square counts, as in families without any other table.

    Raises:
        UserError: no grid fits, or more than one does.
    """
    if trained_size is not None:
        tokens = math.prod(layers.grid_size(trained_size, patch))
        for prefix in prefixes:
            if rows - prefix == tokens:
                return trained_size, prefix
        raise UserError(
            f"the position table of {rows} rows is not of images of {trained_size[0]}x{trained_size[1]} pixels, which "
            f"have {tokens} patches; give the trained_size that the weights were trained at"
        )
    sides = {prefix: math.isqrt(max(rows - prefix, 0)) for prefix in prefixes}
    squares = {prefix: side for prefix, side in sides.items() if side and side**2 == rows - prefix}
    if len(squares) == 1 and (square or len(prefixes) == 1 or 0 not in squares):
        prefix, side = next(iter(squares.items()))
        return (side * patch[0], side * patch[1]), prefix
    why = "is of no square grid" if not squares else "fits more than one grid"
    raise UserError(f"the position table of {rows} rows {why}; give the trained_size that the weights were trained at")


def swin_size(tables: list[tuple[int, ...]], window: int, image_size: tuple[int, int] | None) -> tuple[int, int]:
    """Returns the image size of a Swin: as given, or the published one, where the last of four stages is one window.

    tables: shapes of the stages' bias tables, none for V2; a given size that they do not fit is not taken.
    """
    stages = [windows.table_window(shape[0]) for shape in tables]
    if image_size is not None:
        config = swin.SwinConfig(depths=(2,) * max(len(stages), 1), heads=(1,) * max(len(stages), 1), window=window)
        if not stages or list(swin.stage_windows(config, image_size)) == stages:
            return image_size
    return 32 * window, 32 * window


def size_pair(value: Any) -> tuple[int, int] | None:
    """Returns height and width of a config's image_size, a number or two."""
    if isinstance(value, int):
        return value, value
    if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(side, int) for side in value):
        return value[0], value[1]
    return None

"""What every layout of foreign weights offers, and what shapes tell about a network whoever named its tensors."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vit_scaling import UserError
from vit_scaling.interop.convert import Entry
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
        prefix_rows: rows of the position table that belong to the class token and the registers.
        unknown: the assumed fields for which there is not even a usual value; the user must tell them.
        normalisation: of the input; None if nobody says.
        class_names: of the classifier; None if nobody says.
    """

    config: ModelConfig
    image_size: tuple[int, int]
    num_classes: int | None
    assumed: tuple[str, ...] = ()
    prefix_rows: int = 0
    unknown: tuple[str, ...] = ()
    normalisation: Normalisation | None = None
    class_names: tuple[str, ...] | None = None


class Layout(NamedTuple):
    """A way to name tensors: functions of plain data.

    name: as users write it.
    canonical: {name: tensor} of a file to {name in this layout's newest form: tensor}, or None if it is another layout.
    ignored: regular expressions of canonical names that hold no parameter of the image model.
    describe: (tensors, neighbour, the size they were trained at if the user gave one) to the network.
    entries: (config, prefix_rows, with a classifier) to the name map.
    neighbour: (config, image_size, num_classes, normalisation, class names) to the config.json that goes with an
        export, or None where none does.
    """

    name: str
    canonical: Callable[[Tensors], dict[str, Stored] | None]
    ignored: tuple[str, ...]
    describe: Callable[[Tensors, Json | None, tuple[int, int] | None], Described]
    entries: Callable[[ModelConfig, int, bool], list[Entry]]
    neighbour: (
        Callable[[ModelConfig, tuple[int, int], int, Normalisation, tuple[str, ...] | None], dict[str, Any]] | None
    )


def shape_of(tensors: Tensors, name: str, dims: int) -> tuple[int, ...]:
    """Returns a tensor's shape.

    Raises:
        UserError: it is not there, or has another number of axes.
    """
    if name not in tensors:
        raise UserError(f"the weights have no tensor {name!r}, so what model they are of cannot be told")
    shape = tensors[name].shape
    if len(shape) != dims or not all(shape):
        raise UserError(f"the tensor {name!r} has the shape {shape}; it must have {dims} axes, none of them empty")
    return shape


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

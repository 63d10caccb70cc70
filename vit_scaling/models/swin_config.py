"""What a Swin Transformer is made of: published sizes, the config and its checks, grids and windows of each stage."""

import dataclasses
from typing import Any, NamedTuple

from vit_scaling import UserError
from vit_scaling.models import layers, stack
from vit_scaling.ops import windows


class Size(NamedTuple):
    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int
    drop_path: float
    extra_norm_every: int | None = None


# Drop path of training from scratch on ImageNet-1k (V1 and V2 configurations; L was trained on ImageNet-22k only).
# H and G are V2 shapes (V2 section 4, "model configurations"); T-c24 is the tiny model with heads of 24 dims.
SIZES = {
    "T": Size(96, (2, 2, 6, 2), (3, 6, 12, 24), 7, 0.2),
    "S": Size(96, (2, 2, 18, 2), (3, 6, 12, 24), 7, 0.3),
    "B": Size(128, (2, 2, 18, 2), (4, 8, 16, 32), 7, 0.5),
    "L": Size(192, (2, 2, 18, 2), (6, 12, 24, 48), 7, 0.2),
    "T-c24": Size(96, (2, 2, 6, 2), (4, 8, 16, 32), 8, 0.1),
    "v2-T": Size(96, (2, 2, 6, 2), (3, 6, 12, 24), 8, 0.2),
    "v2-S": Size(96, (2, 2, 18, 2), (3, 6, 12, 24), 8, 0.3),
    "v2-B": Size(128, (2, 2, 18, 2), (4, 8, 16, 32), 8, 0.5),
    "v2-L": Size(192, (2, 2, 18, 2), (6, 12, 24, 48), 8, 0.2),
    "v2-H": Size(352, (2, 2, 18, 2), (11, 22, 44, 88), 8, 0.2, 6),
    "v2-G": Size(512, (2, 2, 42, 4), (16, 32, 64, 128), 8, 0.2, 6),
}


@dataclasses.dataclass
class SwinConfig:
    """A Swin Transformer. `variant("T")` or `variant("v2-B", window=16)` makes one of a published size."""

    version: int = 1  # 1: norms before, dot products, a bias table; 2: norms after, cosines, a position network
    width: int = 96  # of the first stage; doubles from stage to stage
    depths: tuple[int, ...] = (2, 2, 6, 2)  # blocks of each stage, even: they come in pairs, plain and shifted
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7  # side in tokens; smaller where the grid is
    shifted: bool = True  # False leaves the shift out (V1 table 4)
    shift_rule: str = "official"  # official | timm; see ops.windows.window_and_shift
    patch: int = 4  # side in pixels
    mlp_ratio: int = 4
    patch_norm: bool = True
    absolute_position: bool = False  # learned position embedding after the patches (V1 table 4)
    pretrained_windows: tuple[int, ...] | None = None  # V2: windows of the stages that the weights were trained with
    extra_norm_every: int | None = None  # V2 H and G: a LayerNorm on the trunk after that many blocks of a stage
    drop_path: float = 0.2  # rate of the last block; grows linearly from 0 at the first
    gelu: str = "exact"  # exact | tanh
    norm_eps: float = 1e-5
    dtype: str = "float32"  # of the computation; parameters, softmax and position bias are float32
    scan: bool | None = None  # True: a loop over one compiled block; False: unrolled; None: unrolled on GPUs alone
    remat: str = "dots"  # none | dots | full: what the backward pass of a pair recomputes
    # By channel, for images in [0, 1]: the model sees (image - mean) / std; by default [-1, 1].
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


def variant(name: str, **fields: object) -> SwinConfig:
    """Returns the config of a published size: T, S, B, L, T-c24, v2-T, v2-S, v2-B, v2-L, v2-H or v2-G.

    Raises:
        UserError: no such size.
    """
    if name not in SIZES:
        raise UserError(f"no Swin size is called {name!r}; the sizes are {', '.join(SIZES)}")
    values: dict[str, Any] = {"version": 2 if name.startswith("v2-") else 1, **SIZES[name]._asdict(), **fields}
    return SwinConfig(**values)


def check(config: SwinConfig) -> None:
    """Raises UserError, in one sentence, for the first field that cannot work."""
    choices = {"version": (1, 2), "gelu": tuple(layers.GELUS), "dtype": layers.DTYPES}
    choices |= {"remat": tuple(stack.REMAT_POLICIES), "shift_rule": windows.RULES}
    positive, rates = ("width", "window", "patch", "mlp_ratio"), ("drop_path", "norm_eps")
    layers.check(config, choices=choices, positive=positive, rates=rates)
    if not config.depths or any(depth < 2 or depth % 2 for depth in config.depths):
        raise UserError(f"model.depths {config.depths} must be even numbers: blocks come in pairs, plain and shifted")
    for field in ("heads", "pretrained_windows"):
        values = getattr(config, field)
        if values is not None and (len(values) != len(config.depths) or min(values) < 1):
            raise UserError(f"model.{field} {values} must give one positive number for each of model.depths")
    for stage, heads in enumerate(config.heads):
        width = config.width * 2**stage
        if width % heads:
            raise UserError(f"model.heads {heads} of stage {stage + 1} does not divide its width {width}")
    if config.version == 1 and (config.pretrained_windows or config.extra_norm_every):
        raise UserError("model.pretrained_windows and model.extra_norm_every belong to model.version 2, not to 1")
    every = config.extra_norm_every
    if every is not None and (every < 2 or every % 2 or any(d > every and d % every for d in config.depths)):
        raise UserError(
            f"model.extra_norm_every {every} must be even and divide every one of model.depths {config.depths} above it"
        )


def stage_grids(config: SwinConfig, image_size: tuple[int, int]) -> list[tuple[int, int]]:
    """Returns the tokens, down and across, of each stage. What a patch or a merge does not fill is padded with zeros.

    Raises:
        UserError: the image is smaller than one patch.
    """
    layers.grid_size(image_size, (config.patch, config.patch))
    height, width = image_size
    scales = [config.patch * 2**stage for stage in range(len(config.depths))]
    return [(-(-height // scale), -(-width // scale)) for scale in scales]


def stage_windows(config: SwinConfig, image_size: tuple[int, int]) -> tuple[int, ...]:
    """Returns the window of each stage: no larger than the grid that the model is built for."""
    grids = stage_grids(config, image_size)
    return tuple(windows.window_and_shift(*grid, config.window, config.shift_rule)[0] for grid in grids)


def transfer(config: SwinConfig, image_size: tuple[int, int], *, window: int) -> SwinConfig:
    """Returns the config with another window for weights that were trained with this one at this image size.

    V2 keeps its weights as they are: its position network reads offsets of the new window on the scale of the windows
    that it was trained with (V2 section 3.3). V1 needs its tables resized by `adapt.adapt_swin`.
    """
    if config.version == 1:
        return dataclasses.replace(config, window=window)
    trained = config.pretrained_windows or stage_windows(config, image_size)
    return dataclasses.replace(config, window=window, pretrained_windows=trained)

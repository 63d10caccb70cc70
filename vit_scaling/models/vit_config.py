"""What a ViT is made of: its sizes, its options, and which of them go together. vit.py builds it."""

import dataclasses
import math
from typing import NamedTuple

from vit_scaling import UserError
from vit_scaling.models import layers, stack


class Size(NamedTuple):
    width: int
    depth: int
    mlp: int
    heads: int


# Lower-case s is Table 2 of Scaling ViT and is not upper-case S. e is ViT-e (PaLI), 22B is ViT-22B; So400m and So150m
# are SoViT (Alabdulmohsin et al. 2023, arXiv 2305.13035); the *-opt shapes and mu, M as in the public configurations.
SIZES = {
    "mu": Size(32, 1, 128, 2),
    "s": Size(256, 6, 1024, 8),
    "Ti": Size(192, 12, 768, 3),
    "S": Size(384, 12, 1536, 6),
    "M": Size(512, 12, 2048, 8),
    "B": Size(768, 12, 3072, 12),
    "So150m": Size(880, 18, 2320, 16),
    "L": Size(1024, 24, 4096, 16),
    "So400m": Size(1152, 27, 4304, 16),
    "H": Size(1280, 32, 5120, 16),
    "g": Size(1408, 40, 6144, 16),
    "g-opt": Size(1536, 40, 6144, 16),
    "G": Size(1664, 48, 8192, 16),
    "G-opt": Size(1536, 48, 8192, 16),
    "e": Size(1792, 56, 15360, 16),
    "22B": Size(6144, 48, 24576, 48),
}

# Pools that read the class token; beside it the mean of the patches (DINOv2's classifier), or the first register (the
# distillation token of a DeiT).
TOKEN_POOLS = ("token", "token+gap", "token+register")
CHOICES = {
    "pool": ("gap", "max", "avgmax", "map", *TOKEN_POOLS),
    "position": ("learned", "sincos2d", "rope", "learned+rope", "none"),
    "rope": ("dinov3", "vit5"),
    "mlp_kind": ("gelu", "swiglu"),
    "norm": ("layernorm", "rmsnorm"),
    "gelu": tuple(layers.GELUS),
    "dtype": layers.DTYPES,
    "remat": tuple(stack.REMAT_POLICIES),
}


@dataclasses.dataclass
class ViTConfig:
    """A plain vision transformer. `variant("B/16")` makes one of a published size."""

    width: int = 768
    depth: int = 12
    mlp: int = 3072  # hidden units; of swiglu, of each of its two halves (DINOv2's g/14: 4096 at width 1536)
    heads: int = 12
    patch: tuple[int, int] = (16, 16)  # height, width in pixels
    pool: str = (
        "gap"  # gap: mean of the patches; max; avgmax: half of each; map: attention pooling; token: class token;
    )
    # token+gap, token+register: two of them, side by side
    class_token: bool = False  # a class token even if the pool does not read it; pools of the token always have one
    pool_prefix: bool = False  # gap, max, avgmax and map read the class token and the registers, too
    pool_norm: bool = False  # gap, max and avgmax: the final norm follows the pool (timm's fc_norm), not the last block
    position: str = "learned"  # learned | sincos2d | rope | learned+rope | none
    # Of rotary positions. dinov3: coordinates between -1 and 1 on any grid; vit5: numbers of patches, and the
    # registers, whose number is a square, have positions on a grid of their own.
    rope: str = "dinov3"  # dinov3 | vit5
    registers: int = 0  # extra learned tokens (Darcet et al. 2024)
    drop_path: float = 0.0  # rate of the last block; grows linearly from 0 at the first
    drop_path_constant: bool = False  # the same rate in each block (DeiT III)
    patch_dropout: float = 0.0  # share of each image's patches that a training step leaves out (arXiv 2208.07220)
    # FlexiViT (arXiv 2212.08013): sides of square patches, one of which each training step draws. Kernel and learned
    # positions are those of `patch` and of its grid, resized for the step; evaluation sees `patch`.
    patches: tuple[int, ...] = ()
    # A training step moves the rotary coordinates of all its images at random (DINOv3): it adds up to ± rope_shift to
    # each axis, then scales each by up to rope_jitter or its inverse, then both by up to rope_rescale or its inverse.
    rope_shift: float | None = None
    rope_jitter: float | None = None
    rope_rescale: float | None = None
    base_width: int | None = None  # muP: the width at which the learning rate was chosen; heads keep their width
    layerscale: float | None = None  # initial scale of each residual branch (Touvron et al. 2021)
    layerscale_mlp: float | None = None  # of the MLP's branch, where it differs from the attention's
    mlp_kind: str = "gelu"  # gelu | swiglu (DINOv2's g/14); the MLP of the map pool is always the first
    norm: str = "layernorm"  # layernorm | rmsnorm
    pre_norm: bool = False  # a norm before the first block, and patches without a bias (CLIP)
    qk_norm: bool = False  # a norm on queries and keys (ViT-22B)
    qk_norm_bias: bool = False
    parallel: bool = False  # attention and MLP side by side on one norm (ViT-22B)
    qkv_bias: bool = True  # ViT-22B has none
    key_bias: bool = True  # DINOv3 has none; without qkv_bias there is none either
    proj_bias: bool = True  # of the attention's output projection
    mlp_bias: bool = True
    norm_bias: bool = True  # of layernorm; ViT-22B has none
    pre_logits: bool = False  # tanh(Linear) before the classifier (Dosovitskiy et al. 2021), as old checkpoints have
    gelu: str = "tanh"  # tanh | exact | quick
    norm_eps: float = 1e-6
    dtype: str = "float32"  # of the computation; parameters are float32, positions and norms computed in it
    scan: bool | None = None  # True: a loop over one compiled block; False: unrolled; None: unrolled on GPUs alone
    remat: str = "dots"  # none | dots | full: what the backward pass recomputes
    # By channel, for images in [0, 1]: the model sees (image - mean) / std; by default [-1, 1].
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


# Fields that change nothing of what trained weights compute.
NOT_OF_THE_WEIGHTS = (
    *("drop_path", "drop_path_constant", "patch_dropout", "patches", "base_width"),
    *("rope_shift", "rope_jitter", "rope_rescale"),
    *("dtype", "scan", "remat", "mean", "std"),
)


def variant(name: str, **fields: object) -> ViTConfig:
    """Returns the config of a size and patch such as "B/16", "g/14" or, for patches 8 high and 16 wide, "S/8x16".

    Raises:
        UserError: no such size, or the patch is not a number.
    """
    size_name, _, patch = name.partition("/")
    if size_name not in SIZES:
        raise UserError(f"no ViT size is called {size_name!r}; the sizes are {', '.join(SIZES)}")
    try:
        sides = tuple(int(side) for side in patch.split("x"))
    except ValueError:
        sides = ()
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise UserError(f"the ViT {name!r} names no patch; write size/patch, such as B/16 or S/8x16")
    # The fields are typed where they are declared; here they pass through.
    return ViTConfig(**SIZES[size_name]._asdict(), patch=(sides[0], sides[-1]), **fields)  # type: ignore[arg-type]


def check(config: ViTConfig) -> None:
    """Raises UserError, in one sentence, for the first field that cannot work."""
    layers.check(
        config,
        choices=CHOICES,
        positive=("width", "depth", "mlp", "heads", "patch"),
        rates=("drop_path", "patch_dropout", "norm_eps"),
    )
    if config.registers < 0:
        raise UserError(f"model.registers is {config.registers}; it must be at least 0")
    if config.width % config.heads:
        raise UserError(f"model.heads {config.heads} does not divide model.width {config.width}")
    if rotary_positions(config) and config.width // config.heads % 4:
        raise UserError(
            f"model.position {config.position!r} needs heads of a multiple of 4 dims; model.width {config.width} / "
            f"model.heads {config.heads} is {config.width // config.heads}"
        )
    if config.rope == "vit5" and not rotary_positions(config):
        raise UserError(f"model.rope is 'vit5', and model.position {config.position!r} has no rotary positions")
    if config.rope == "vit5" and math.isqrt(config.registers) ** 2 != config.registers:
        raise UserError(f"model.registers is {config.registers}, and model.rope 'vit5' needs a square number of them")
    for name, least, what in (("shift", 0, "an amount"), ("jitter", 1, "a factor"), ("rescale", 1, "a factor")):
        value = getattr(config, f"rope_{name}")
        moves = rotary_positions(config) and config.rope == "dinov3"
        if value is not None and not (moves and least <= value < math.inf):
            raise UserError(
                f"model.rope_{name} is {value}, model.position {config.position!r} and model.rope {config.rope!r}; it "
                f"is {what} of at least {least} for rotary positions of the form 'dinov3', or None"
            )
    if any(not 1 <= side <= layers.LARGEST for side in config.patches) or len(set(config.patches)) < len(
        config.patches
    ):
        raise UserError(f"model.patches is {config.patches}; give each side once, in whole pixels")
    head_dim = config.width // config.heads
    if config.base_width is not None and (config.base_width < 1 or config.base_width % head_dim):
        raise UserError(
            f"model.base_width is {config.base_width}; muP keeps the width of a head, here {head_dim}: give a multiple "
            "of it"
        )
    if config.pool_norm and config.pool in ("map", *TOKEN_POOLS):
        raise UserError(f"model.pool_norm needs model.pool gap, max or avgmax, not {config.pool!r}")
    if config.pool == "token+register" and not config.registers:
        raise UserError("model.pool 'token+register' needs model.registers to be at least 1")
    if config.pre_logits and feature_width(config) != config.width:
        raise UserError(f"model.pre_logits needs a pool of one vector, not {config.pool!r}")
    if config.layerscale_mlp is not None and config.layerscale is None:
        raise UserError(f"model.layerscale_mlp is {config.layerscale_mlp}, but model.layerscale is None; set both")


def prefix_tokens(config: ViTConfig) -> int:
    """Returns how many tokens precede the patches: the class token, where there is one, and the registers."""
    return int(config.class_token or config.pool in TOKEN_POOLS) + config.registers


def kept_patches(config: ViTConfig, patches: int) -> int:
    """Returns how many of an image's patches a training step sees, at least one."""
    return max(1, round(patches * (1 - config.patch_dropout)))


def width_ratio(config: ViTConfig) -> float:
    """Returns the width over that at which the learning rate was chosen, for muP; 1 without."""
    return 1.0 if config.base_width is None else config.width / config.base_width


def feature_width(config: ViTConfig) -> int:
    """Returns the length of the features that the classifier reads."""
    return config.width * (2 if config.pool in ("token+gap", "token+register") else 1)


def learned_positions(config: ViTConfig) -> bool:
    return config.position in ("learned", "learned+rope")


def rotary_positions(config: ViTConfig) -> bool:
    return config.position in ("rope", "learned+rope")

"""Vision Transformer as in Scaling Vision Transformers (Zhai et al. 2022, arXiv 2106.04560).

No class token by default; a GAP or MAP head; options of ViT-22B (Dehghani et al. 2023, arXiv 2302.05442), of the
plain ViT (Beyer et al. 2022, arXiv 2205.01580), of CLIP (arXiv 2103.00020) and of DINOv2 and DINOv3 (arXiv 2508.10104).
Shapes: B batch, H W image, L tokens, D width, N heads, K head dim, A angles (K / 2), Z layers, M classes.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from vit_scaling import UserError
from vit_scaling.models import layers
from vit_scaling.ops import rotary
from vit_scaling.parallel.sharding import constrain


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
    "mlp_kind": ("gelu", "swiglu"),
    "norm": ("layernorm", "rmsnorm"),
    "gelu": tuple(layers.GELUS),
    "dtype": layers.DTYPES,
    "remat": tuple(layers.REMAT_POLICIES),
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
    position: str = "learned"  # learned | sincos2d | rope (DINOv3's) | learned+rope | none
    registers: int = 0  # extra learned tokens (Darcet et al. 2024)
    drop_path: float = 0.0  # rate of the last block; grows linearly from 0 at the first
    patch_dropout: float = 0.0  # share of each image's patches that a training step leaves out (arXiv 2208.07220)
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
    scan: bool = True  # one compiled block looped over the layers; unrolled otherwise
    remat: str = "dots"  # none | dots | full: what the backward pass recomputes
    # By channel, for images in [0, 1]: the model sees (image - mean) / std; by default [-1, 1].
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


# Fields that change nothing of what trained weights compute.
NOT_OF_THE_WEIGHTS = ("drop_path", "patch_dropout", "dtype", "scan", "remat", "mean", "std")


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
    if rotary_positions(config) and config.patch_dropout:
        raise UserError(
            f"model.patch_dropout is {config.patch_dropout} and model.position {config.position!r}; rotary positions "
            "need all patches: set patch_dropout to 0"
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


def feature_width(config: ViTConfig) -> int:
    """Returns the length of the features that the classifier reads."""
    return config.width * (2 if config.pool in ("token+gap", "token+register") else 1)


def learned_positions(config: ViTConfig) -> bool:
    return config.position in ("learned", "learned+rope")


def rotary_positions(config: ViTConfig) -> bool:
    return config.position in ("rope", "learned+rope")


def make_norm(config: ViTConfig, width: int, *, bias: bool) -> nnx.Module:
    """Returns a norm of the config's kind; `bias` counts for layernorm only."""
    if config.norm == "rmsnorm":
        return layers.RMSNorm(width, eps=config.norm_eps)
    return layers.LayerNorm(width, eps=config.norm_eps, bias=bias)


class Block(nnx.Module):
    """x + Attention(LN x), then x + MLP(LN x); in parallel form x + Attention(LN x) + MLP(LN x) with one norm."""

    def __init__(self, config: ViTConfig, *, key: PRNGKeyArray):
        attention_key, mlp_key = jax.random.split(key)
        norm = functools.partial(make_norm, config, config.width, bias=config.norm_bias)
        self.norm1: Any = norm()
        self.attention = layers.Attention(
            config.width,
            config.heads,
            key=attention_key,
            qkv_bias=config.qkv_bias,
            key_bias=config.key_bias,
            out_bias=config.proj_bias,
            head_norm=functools.partial(make_norm, config, bias=config.qk_norm_bias) if config.qk_norm else None,
        )
        self.norm2: Any = None if config.parallel else norm()
        if config.mlp_kind == "swiglu":
            self.mlp: Any = layers.SwiGLU(config.width, config.mlp, key=mlp_key, bias=config.mlp_bias)
        else:
            self.mlp = layers.Mlp(config.width, config.mlp, key=mlp_key, gelu=config.gelu, bias=config.mlp_bias)
        scale, mlp_scale = config.layerscale, config.layerscale_mlp
        mlp_scale = scale if mlp_scale is None else mlp_scale
        self.layerscale1 = None if scale is None else nnx.Param(jnp.full(config.width, scale))
        self.layerscale2 = None if mlp_scale is None else nnx.Param(jnp.full(config.width, mlp_scale))

    def __call__(
        self, x_BLD: Float[Array, "B L D"], rate: Array, key: PRNGKeyArray | None, angles_LA: Array | None
    ) -> Float[Array, "B L D"]:
        x_BLD = constrain(x_BLD)
        key1, key2 = (None, None) if key is None else jax.random.split(key)

        def branch(y_BLD: Array, layerscale: nnx.Param | None, key: PRNGKeyArray | None) -> Array:
            if layerscale is not None:
                y_BLD = y_BLD * layers.expand(layerscale[...].astype(y_BLD.dtype), 3)
            return layers.drop_path(y_BLD, rate, key)

        y_BLD = self.norm1(x_BLD)
        attended_BLD = branch(self.attention(y_BLD, angles_LA=angles_LA), self.layerscale1, key1)
        if self.norm2 is None:
            return x_BLD + attended_BLD + branch(self.mlp(y_BLD), self.layerscale2, key2)
        x_BLD = x_BLD + attended_BLD
        return x_BLD + branch(self.mlp(self.norm2(x_BLD)), self.layerscale2, key2)


class AttentionPool(nnx.Module):
    """MAP head (Scaling ViT, section 3.2): a learned probe attends to the tokens, then y + MLP(LN y).

    The attention has no residual connection. Heads and hidden units are as many as in the blocks; the MLP has GELU and
    all biases. Computed in float32.
    """

    def __init__(self, config: ViTConfig, *, key: PRNGKeyArray):
        probe_key, attention_key, mlp_key = jax.random.split(key, 3)
        self.probe = nnx.Param(layers.xavier_uniform(probe_key, (1, config.width)))
        self.attention = layers.Attention(config.width, config.heads, key=attention_key)
        self.norm: Any = make_norm(config, config.width, bias=True)
        self.mlp = layers.Mlp(config.width, config.mlp, key=mlp_key, gelu=config.gelu)

    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B D"]:
        x_BLD = x_BLD.astype(jnp.float32)
        probe_B1D = jnp.broadcast_to(self.probe[...][None], (x_BLD.shape[0], 1, x_BLD.shape[2]))
        y_B1D = self.attention(probe_B1D, x_BLD)
        return (y_B1D + self.mlp(self.norm(y_B1D)))[:, 0]


class ViT(nnx.Module):
    """Images in [-1, 1] to logits. Parameters of the blocks are stacked: `blocks/...` has a leading axis Z.

    Any height and width of at least one patch works with sine-cosine, rotary or no positions; learned positions belong
    to the grid that the model was built for. Class token and registers have no position embedding: the sum of a learned
    token and a learned position is one learned token.
    """

    def __init__(self, config: ViTConfig, *, image_size: tuple[int, int], num_classes: int, key: PRNGKeyArray):
        check(config)
        self.config = config
        self.grid = layers.grid_size(image_size, config.patch)
        patch_key, position_key, register_key, blocks_key, pool_key, head_key = jax.random.split(key, 6)
        width = config.width
        self.embedding = layers.PatchEmbedding(config.patch, 3, width, key=patch_key, bias=not config.pre_norm)
        positions = layers.normal(width**-0.5)(position_key, (self.grid[0] * self.grid[1], width))
        self.position_embedding = nnx.Param(positions) if learned_positions(config) else None
        has_class_token = prefix_tokens(config) > config.registers
        self.class_token = nnx.Param(jnp.zeros((1, width))) if has_class_token else None
        registers = layers.normal(0.02)(register_key, (config.registers, width))
        self.registers = nnx.Param(registers) if config.registers else None
        self.pre_norm: Any = make_norm(config, width, bias=config.norm_bias) if config.pre_norm else None
        # By a loop and not by vmap: XLA compiles vmapped random numbers several times more slowly.
        self.blocks = jax.lax.map(lambda key: Block(config, key=key), jax.random.split(blocks_key, config.depth))
        self.norm: Any = make_norm(config, width, bias=config.norm_bias)
        self.pool = AttentionPool(config, key=pool_key) if config.pool == "map" else None
        self.pre_logits = (
            layers.Linear(width, width, key=jax.random.fold_in(head_key, 1)) if config.pre_logits else None
        )
        self.head = layers.Linear(feature_width(config), num_classes, key=head_key, kernel_init=layers.zeros)

    def _positions(self, height: int, width: int) -> Array | None:
        grid = layers.grid_size((height, width), self.config.patch)
        if self.config.position == "sincos2d":
            return layers.sincos2d(*grid, self.config.width)
        if self.position_embedding is None:
            return None
        if grid != self.grid:
            raise UserError(
                f"images of {height}x{width} pixels make a grid of {grid[0]}x{grid[1]} patches, but the "
                f"learned positions are for {self.grid[0]}x{self.grid[1]}; resize the images or the position embedding"
            )
        return self.position_embedding[...]

    def _tokens(self, images_BHWC: Array) -> Array:
        """Returns [class token, registers, patches], each where there is one."""
        images_BHWC = constrain(images_BHWC).astype(jnp.dtype(self.config.dtype))
        x_BLD = self.embedding(images_BHWC)
        positions_LD = self._positions(*images_BHWC.shape[1:3])
        if positions_LD is not None:
            # Added in float32: a position rounded to bfloat16 first would move by up to 0.4%.
            x_BLD = (x_BLD.astype(jnp.float32) + positions_LD[None]).astype(x_BLD.dtype)
        extra = [token[...].astype(x_BLD.dtype) for token in (self.class_token, self.registers) if token is not None]
        if extra:
            extra_LD = jnp.concatenate(extra)
            x_BLD = jnp.concatenate([jnp.broadcast_to(extra_LD, (x_BLD.shape[0], *extra_LD.shape)), x_BLD], axis=1)
        return x_BLD if self.pre_norm is None else self.pre_norm(x_BLD)

    def _angles(self, height: int, width: int) -> Float[Array, "L A"] | None:
        """Returns the rotary angles of all tokens, zero for the class token and the registers."""
        if not rotary_positions(self.config):
            return None
        grid = layers.grid_size((height, width), self.config.patch)
        angles_LA = rotary.axial_angles(*grid, self.config.width // self.config.heads)
        return jnp.pad(angles_LA, ((prefix_tokens(self.config), 0), (0, 0)))

    def _without_some_patches(self, x_BLD: Array, key: PRNGKeyArray) -> Array:
        """Returns the class token and registers and a random choice of each image's patches, in their order."""
        prefix, count = prefix_tokens(self.config), x_BLD.shape[1] - prefix_tokens(self.config)
        order_BP = jnp.argsort(jax.random.uniform(key, (x_BLD.shape[0], count)), axis=1)
        kept_BK = jnp.sort(order_BP[:, : kept_patches(self.config, count)], axis=1) + prefix
        patches_BKD = jnp.take_along_axis(x_BLD, kept_BK[:, :, None], axis=1)
        return jnp.concatenate([x_BLD[:, :prefix], patches_BKD], axis=1)

    def _drop_path_rates(self) -> Float[Array, "Z"]:
        return jnp.linspace(0.0, self.config.drop_path, self.config.depth)

    def encode(self, images_BHWC: Float[Array, "B H W 3"], key: PRNGKeyArray | None = None) -> Float[Array, "B L D"]:
        """Returns the tokens [class token, registers, patches], each where there is one.

        They come after the final norm, or with `pool_norm` before it. With a key, which means training, and
        `patch_dropout` some patches are missing.
        """
        x_BLD, angles_LA = self._tokens(images_BHWC), self._angles(*images_BHWC.shape[1:3])
        if key is not None and self.config.patch_dropout:
            x_BLD = self._without_some_patches(x_BLD, jax.random.fold_in(key, self.config.depth))
        keys = None if key is None else jax.random.split(key, self.config.depth)

        def step(x_BLD: Array, layer: tuple[Block, Array, PRNGKeyArray | None]) -> tuple[Array, None]:
            block, rate, key = layer
            return block(x_BLD, rate, key if self.config.drop_path else None, angles_LA), None

        per_layer = (self.blocks, self._drop_path_rates(), keys)
        x_BLD, _ = layers.scan_layers(step, x_BLD, per_layer, scan=self.config.scan, remat=self.config.remat)
        return constrain(x_BLD) if self.config.pool_norm else self.norm(constrain(x_BLD))

    def features(self, images_BHWC: Float[Array, "B H W 3"], key: PRNGKeyArray | None = None) -> Float[Array, "B D"]:
        """Returns what the classifier reads, in float32; of two pools side by side it is 2D wide."""
        pooled_BD = self._pool(self.encode(images_BHWC, key))
        return pooled_BD if self.pre_logits is None else jnp.tanh(self.pre_logits(pooled_BD))

    def _pool(self, x_BLD: Array) -> Float[Array, "B D"]:
        if self.config.pool in TOKEN_POOLS:
            token_BD = x_BLD[:, 0].astype(jnp.float32)
            if self.config.pool == "token":
                return token_BD
            patches_BLD = x_BLD[:, prefix_tokens(self.config) :].astype(jnp.float32)
            second_BD = x_BLD[:, 1] if self.config.pool == "token+register" else jnp.mean(patches_BLD, axis=1)
            return jnp.concatenate([token_BD, second_BD.astype(jnp.float32)], axis=1)
        x_BLD = x_BLD if self.config.pool_prefix else x_BLD[:, prefix_tokens(self.config) :]
        if self.pool is not None:
            return self.pool(x_BLD)
        x_BLD = x_BLD.astype(jnp.float32)
        if self.config.pool == "gap":
            pooled_BD = jnp.mean(x_BLD, axis=1)
        elif self.config.pool == "max":
            pooled_BD = jnp.max(x_BLD, axis=1)
        else:
            pooled_BD = 0.5 * (jnp.mean(x_BLD, axis=1) + jnp.max(x_BLD, axis=1))
        return self.norm(pooled_BD) if self.config.pool_norm else pooled_BD

    def __call__(self, images_BHWC: Float[Array, "B H W 3"], key: PRNGKeyArray | None = None) -> Float[Array, "B M"]:
        """Returns logits over the M classes, in float32. A key means training: drop path, patch dropout."""
        return self.head(self.features(images_BHWC, key))

    def attention_maps(self, images_BHWC: Float[Array, "B H W 3"]) -> Float[Array, "Z B N L L"]:
        """Returns how much each token attends to each other one, by layer and head, in float32."""

        angles_LA = self._angles(*images_BHWC.shape[1:3])

        def step(x_BLD: Array, layer: tuple[Block, Array]) -> tuple[Array, Array]:
            block, rate = layer
            return block(x_BLD, rate, None, angles_LA), block.attention.weights(block.norm1(x_BLD), angles_LA)

        _, maps = jax.lax.scan(step, self._tokens(images_BHWC), (self.blocks, self._drop_path_rates()))
        return maps

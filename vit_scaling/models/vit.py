"""Vision Transformer as in Scaling Vision Transformers (Zhai et al. 2022, arXiv 2106.04560).

No class token by default; a GAP or MAP head; options of ViT-22B (Dehghani et al. 2023, arXiv 2302.05442), of the
plain ViT (Beyer et al. 2022, arXiv 2205.01580), of CLIP (arXiv 2103.00020) and of DINOv2 and DINOv3 (arXiv 2508.10104).
Shapes: B batch, H W image, L tokens, T tokens that patch dropout keeps, P patches, D width, N heads, K head dim,
A angles (K / 2), Z layers, M classes.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vit_scaling import UserError
from vit_scaling.models import flexi, layers, stack
from vit_scaling.models.vit_config import (
    NOT_OF_THE_WEIGHTS,
    SIZES,
    TOKEN_POOLS,
    Size,
    ViTConfig,
    check,
    feature_width,
    kept_patches,
    learned_positions,
    prefix_tokens,
    rotary_positions,
    variant,
    width_ratio,
)
from vit_scaling.ops import attention, rotary
from vit_scaling.parallel.sharding import constrain

__all__ = ["NOT_OF_THE_WEIGHTS", "SIZES", "TOKEN_POOLS", "Size", "ViT", "ViTConfig", "check", "feature_width",
           "kept_patches", "prefix_tokens", "variant", "width_ratio"]  # fmt: skip

Patch = tuple[int, int] | None


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
        self,
        x_BLD: Float[Array, "B L D"],
        rate: Array,
        key: PRNGKeyArray | None,
        angles_LA: Array | None,
        tokens: int | None = None,
    ) -> Float[Array, "B L D"]:
        x_BLD = constrain(x_BLD)
        key1, key2 = (None, None) if key is None else jax.random.split(key)

        def branch(y_BLD: Array, layerscale: nnx.Param | None, key: PRNGKeyArray | None) -> Array:
            if layerscale is not None:
                y_BLD = y_BLD * layers.expand(layerscale[...].astype(y_BLD.dtype), 3)
            return layers.drop_path(y_BLD, rate, key)

        y_BLD = self.norm1(x_BLD)
        attended_BLD = branch(self.attention(y_BLD, angles_LA=angles_LA, tokens=tokens), self.layerscale1, key1)
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
        probe = layers.xavier_uniform(probe_key, (1, config.width))
        if config.base_width is not None:  # muP: as large in each dim as at the base width
            probe *= math.sqrt((1 + config.width) / (1 + config.base_width))
        self.probe = nnx.Param(probe)
        self.attention = layers.Attention(config.width, config.heads, key=attention_key)
        self.norm: Any = make_norm(config, config.width, bias=True)
        self.mlp = layers.Mlp(config.width, config.mlp, key=mlp_key, gelu=config.gelu)

    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B D"]:
        x_BLD = x_BLD.astype(jnp.float32)
        probe_B1D = jnp.broadcast_to(self.probe[...][None], (x_BLD.shape[0], 1, x_BLD.shape[2]))
        y_B1D = self.attention(probe_B1D, x_BLD)
        return (y_B1D + self.mlp(self.norm(y_B1D)))[:, 0]


def _log_uniform(key: PRNGKeyArray, largest: float, shape: tuple[int, ...] = ()) -> Array:
    """Returns factors between 1 / largest and largest whose logarithm is uniform."""
    limit = math.log(largest)
    return jnp.exp(jax.random.uniform(key, shape, minval=-limit, maxval=limit))


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
        positions = layers.normal((config.base_width or width) ** -0.5)(
            position_key, (self.grid[0] * self.grid[1], width)
        )
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

    def _positions(self, height: int, width: int, *, patch: Patch = None) -> Array | None:
        grid = layers.grid_size((height, width), patch or self.config.patch)
        if self.config.position == "sincos2d":
            return layers.sincos2d(*grid, self.config.width)
        if self.position_embedding is None:
            return None
        if grid != self.grid and patch is None:
            raise UserError(
                f"images of {height}x{width} pixels make a grid of {grid[0]}x{grid[1]} patches, but the "
                f"learned positions are for {self.grid[0]}x{self.grid[1]}; resize the images or the position embedding"
            )
        return flexi.resize_positions(self.position_embedding[...], self.grid, grid)

    def _tokens(self, images_BHWC: Array, patch: Patch = None) -> Array:
        """Returns [class token, registers, patches], each where there is one."""
        images_BHWC = constrain(images_BHWC).astype(jnp.dtype(self.config.dtype))
        x_BLD = self.embedding(images_BHWC, patch)
        positions_LD = self._positions(*images_BHWC.shape[1:3], patch=patch)
        if positions_LD is not None:
            # Added in float32: a position rounded to bfloat16 first would move by up to 0.4%.
            x_BLD = (x_BLD.astype(jnp.float32) + positions_LD[None]).astype(x_BLD.dtype)
        extra = [token[...].astype(x_BLD.dtype) for token in (self.class_token, self.registers) if token is not None]
        if extra:
            extra_LD = jnp.concatenate(extra)
            x_BLD = jnp.concatenate([jnp.broadcast_to(extra_LD, (x_BLD.shape[0], *extra_LD.shape)), x_BLD], axis=1)
        return x_BLD if self.pre_norm is None else self.pre_norm(x_BLD)

    def _angles(
        self, height: int, width: int, *, patch: Patch = None, key: PRNGKeyArray | None = None
    ) -> Float[Array, "L A"] | None:
        """Returns the rotary angles of all tokens: zero for the class token, and for the registers but those of ViT-5.

        With a key, which means training, coordinates are shifted, then stretched along each axis, then rescaled, all by
        random amounts that a step's images share (DINOv3, section 3.2 and its code).
        """
        if not rotary_positions(self.config):
            return None
        grid = layers.grid_size((height, width), patch or self.config.patch)
        head_dim = self.config.width // self.config.heads
        if self.config.rope == "vit5":
            side = math.isqrt(self.config.registers)
            registers_RA = rotary.index_angles((side, side), head_dim, base=100.0)
            angles_LA = rotary.index_angles(grid, head_dim, base=10_000.0, trained=self.grid)
            class_tokens = prefix_tokens(self.config) - self.config.registers
            return jnp.pad(jnp.concatenate([registers_RA, angles_LA]), ((class_tokens, 0), (0, 0)))
        shift = scale = None
        if key is not None and self.config.rope_shift is not None:
            limit = self.config.rope_shift
            shift = jax.random.uniform(jax.random.fold_in(key, 1), (2,), minval=-limit, maxval=limit)
        if key is not None and self.config.rope_jitter is not None:
            scale = _log_uniform(jax.random.fold_in(key, 2), self.config.rope_jitter, (2,))
        angles_LA = rotary.axial_angles(*grid, head_dim, shift=shift, scale=scale)
        if key is not None and self.config.rope_rescale is not None:
            angles_LA *= _log_uniform(key, self.config.rope_rescale)  # angles are proportional to coordinates
        return jnp.pad(angles_LA, ((prefix_tokens(self.config), 0), (0, 0)))

    def _kept_tokens(self, images: int, tokens: int, key: PRNGKeyArray) -> Int[Array, "B T"]:
        """Returns where the class token, the registers and a random choice of each image's patches are, in order."""
        prefix = prefix_tokens(self.config)
        order_BP = jnp.argsort(jax.random.uniform(key, (images, tokens - prefix)), axis=1)
        patches_BT = jnp.sort(order_BP[:, : kept_patches(self.config, tokens - prefix)], axis=1) + prefix
        return jnp.concatenate([jnp.broadcast_to(jnp.arange(prefix), (images, prefix)), patches_BT], axis=1)

    def _drop_path_rates(self) -> Float[Array, "Z"]:
        last = self.config.drop_path
        return jnp.linspace(last if self.config.drop_path_constant else 0.0, last, self.config.depth)

    def encode(
        self, images_BHWC: Float[Array, "B H W 3"], key: PRNGKeyArray | None = None, patch: Patch = None
    ) -> Float[Array, "B L D"]:
        """Returns the tokens [class token, registers, patches], each where there is one.

        They come after the final norm, or with `pool_norm` before it. With a key, which means training, and
        `patch_dropout` some patches are missing. With a patch, kernel and positions are resized for it.
        """
        x_BLD = self._tokens(images_BHWC, patch)
        angles_key = None if key is None else jax.random.fold_in(key, self.config.depth + 1)
        angles_LA = self._angles(*images_BHWC.shape[1:3], patch=patch, key=angles_key)
        if key is not None and self.config.patch_dropout:
            kept_BT = self._kept_tokens(x_BLD.shape[0], x_BLD.shape[1], jax.random.fold_in(key, self.config.depth))
            x_BLD = jnp.take_along_axis(x_BLD, kept_BT[:, :, None], axis=1)
            angles_LA = None if angles_LA is None else angles_LA[kept_BT]  # [B L A]
        keys = None if key is None else jax.random.split(key, self.config.depth)
        tokens, heads = x_BLD.shape[1], self.config.heads
        padding = attention.padded_length(tokens, heads, self.config.width // heads, x_BLD.dtype) - tokens
        if padding:  # attention leaves it out, and each other layer works on each token by itself
            x_BLD = jnp.pad(x_BLD, ((0, 0), (0, padding), (0, 0)))
            if angles_LA is not None:
                angles_LA = jnp.pad(angles_LA, ((0, 0),) * (angles_LA.ndim - 2) + ((0, padding), (0, 0)))

        def step(x_BLD: Array, layer: tuple[Block, Array, PRNGKeyArray | None]) -> tuple[Array, None]:
            block, rate, key = layer
            return block(x_BLD, rate, key if self.config.drop_path else None, angles_LA, tokens), None

        per_layer = (self.blocks, self._drop_path_rates(), keys)
        x_BLD, _ = stack.scan_layers(step, x_BLD, per_layer, scan=self.config.scan, remat=self.config.remat)
        x_BLD = constrain(x_BLD[:, :tokens])
        return x_BLD if self.config.pool_norm else self.norm(x_BLD)

    def features(
        self, images_BHWC: Float[Array, "B H W 3"], key: PRNGKeyArray | None = None, patch: Patch = None
    ) -> Float[Array, "B D"]:
        """Returns what the classifier reads, in float32; of two pools side by side it is 2D wide."""
        pooled_BD = self._pool(self.encode(images_BHWC, key, patch))
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

    def __call__(
        self, images_BHWC: Float[Array, "B H W 3"], key: PRNGKeyArray | None = None, patch: Patch = None
    ) -> Float[Array, "B M"]:
        """Returns logits over the M classes, in float32. A key means training: drop path, patch dropout.

        Args:
            patch: height and width of the patches, where they are not the config's; see `ViTConfig.patches`.
        """
        return self.head(self.features(images_BHWC, key, patch))

    def attention_maps(self, images_BHWC: Float[Array, "B H W 3"]) -> Float[Array, "Z B N L L"]:
        """Returns how much each token attends to each other one, by layer and head, in float32."""

        angles_LA = self._angles(*images_BHWC.shape[1:3])

        def step(x_BLD: Array, layer: tuple[Block, Array]) -> tuple[Array, Array]:
            block, rate = layer
            return block(x_BLD, rate, None, angles_LA), block.attention.weights(block.norm1(x_BLD), angles_LA)

        _, maps = jax.lax.scan(step, self._tokens(images_BHWC), (self.blocks, self._drop_path_rates()))
        return maps

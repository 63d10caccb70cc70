"""Swin Transformer V1 (Liu et al. 2021, arXiv 2103.14030) and V2 (Liu et al. 2022, arXiv 2111.09883).

Four stages of blocks that attend within windows; every second block shifts its windows by half. Between stages, four
neighboring tokens become one of twice the width. The published networks, at any image size.
Shapes: B batch, H W image or grid, G windows, n tokens of a window, D width, N heads, K head dim, R rows of a table,
P pairs of blocks, M classes.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from vit_scaling import UserError
from vit_scaling.models import layers, stack
from vit_scaling.models.swin_config import (
    SIZES,
    SwinConfig,
    check,
    stage_grids,
    stage_windows,
    transfer,
    variant,
)
from vit_scaling.ops import windows
from vit_scaling.parallel.sharding import constrain

__all__ = ["SIZES", "Swin", "SwinConfig", "check", "stage_grids", "stage_windows", "transfer", "variant"]


INIT = layers.truncated_normal(0.02)  # of every kernel and table but the patch embedding
POSITION_HIDDEN = 512  # hidden units of V2's position network
MAX_LOGIT_SCALE = math.log(100)  # V2 section 3.2: the temperature stays above 0.01


class WindowAttention(nnx.Module):
    """Attention within windows, with a relative position bias: one number for each head and offset.

    V1 (section 3.2): dot products scaled by K^-0.5 and a learned table. V2 (section 3.2-3.3): cosines times a learned
    scale for each head, no bias on keys, and a position bias of 16·sigmoid(network(offset on a log scale)).
    """

    def __init__(self, config: SwinConfig, stage: int, window: int, *, key: PRNGKeyArray):
        width, heads = config.width * 2**stage, config.heads[stage]
        keys = jax.random.split(key, 6)
        to_heads, dot_product = (heads, width // heads), config.version == 1
        self.query = layers.Linear(width, to_heads, key=keys[0], kernel_init=INIT)
        self.key = layers.Linear(width, to_heads, key=keys[1], kernel_init=INIT, bias=dot_product)
        self.value = layers.Linear(width, to_heads, key=keys[2], kernel_init=INIT)
        self.out = layers.Linear(to_heads, width, key=keys[3], kernel_init=INIT)
        self.window = window
        self.pretrained_window = config.pretrained_windows[stage] if config.pretrained_windows else window
        self.relative_position_bias_table = (
            nnx.Param(INIT(keys[4], ((2 * window - 1) ** 2, heads))) if dot_product else None
        )
        self.logit_scale = None if dot_product else nnx.Param(jnp.full((heads,), math.log(10.0)))
        self.cpb_mlp = None if dot_product else PositionNetwork(heads, key=keys[5])

    def bias_table(self) -> Float[Array, "R N"]:
        """Returns the bias of every offset within a window and every head."""
        if self.relative_position_bias_table is not None:
            return self.relative_position_bias_table[...]
        assert self.cpb_mlp is not None
        coordinates_R2 = jnp.asarray(windows.log_coordinates(self.window, self.pretrained_window))
        return 16 * jax.nn.sigmoid(self.cpb_mlp(coordinates_R2))

    def __call__(
        self, x_BHWD: Float[Array, "B H W D"], window: int, shift: int, rule: str, maps: bool = False
    ) -> tuple[Float[Array, "B H W D"], Float[Array, "B G N n n"] | None]:
        """Returns the mixed tokens of a grid and, where `maps`, the attention weights of the (shifted) windows."""
        height, width = x_BHWD.shape[1:3]
        head_dim = self.query.kernel.shape[-1]
        fused = not maps and windows.fits_kernel(height, width, window, head_dim, x_BHWD.dtype)
        x = x_BHWD if fused else windows.split(x_BHWD, window, shift, rule)
        q, k, v = layers.side_by_side((self.query, self.key, self.value), x)
        if self.logit_scale is None:
            q *= head_dim**-0.5
        else:
            scale_N1 = jnp.exp(jnp.minimum(self.logit_scale[...], MAX_LOGIT_SCALE))[:, None]
            q = (windows.unit(q) * layers.expand(scale_N1, 5)).astype(x.dtype)
            k = windows.unit(k).astype(x.dtype)
        bias_Nnn = windows.relative_bias(self.bias_table(), window)
        if fused:
            y_BHWNK = windows.grid_attention(q, k, v, bias_Nnn, window, shift, rule)
            return self.out(checkpoint_name(y_BHWNK, "attention")), None
        regions_Gn = windows.regions(height, width, window, shift, rule) if shift else None
        y_BGnNK, weights_BGNnn = windows.window_attention(q, k, v, bias_Nnn, regions_Gn)
        return windows.join(self.out(y_BGnNK), height, width, shift, rule), weights_BGNnn if maps else None


class PositionNetwork(nnx.Module):
    """V2's continuous position bias: coordinates of an offset to one number for each head (section 3.3, eq. 3)."""

    def __init__(self, heads: int, *, key: PRNGKeyArray):
        up_key, down_key = jax.random.split(key)
        self.up = layers.Linear(2, POSITION_HIDDEN, key=up_key, kernel_init=INIT)
        self.down = layers.Linear(POSITION_HIDDEN, heads, key=down_key, kernel_init=INIT, bias=False)

    def __call__(self, coordinates_R2: Float[Array, "R 2"]) -> Float[Array, "R N"]:
        return self.down(jax.nn.relu(self.up(coordinates_R2)))


class Block(nnx.Module):
    """V1: x + Attention(LN x), then x + MLP(LN x). V2: x + LN(Attention(x)), then x + LN(MLP(x)).

    V2's norms start at zero, scale and bias, so that a block starts as the identity (published code).
    """

    def __init__(self, config: SwinConfig, stage: int, window: int, *, key: PRNGKeyArray):
        attention_key, mlp_key = jax.random.split(key)
        width = config.width * 2**stage
        self.norm1 = layers.LayerNorm(width, eps=config.norm_eps)
        self.attention = WindowAttention(config, stage, window, key=attention_key)
        self.norm2 = layers.LayerNorm(width, eps=config.norm_eps)
        hidden, zeros = config.mlp_ratio * width, layers.zeros
        self.mlp = layers.Mlp(width, hidden, key=mlp_key, gelu=config.gelu, kernel_init=INIT, bias_init=zeros)
        self.norm_first, self.rule = config.version == 1, config.shift_rule
        if not self.norm_first:
            for norm in (self.norm1, self.norm2):
                norm.scale[...] = jnp.zeros_like(norm.scale[...])

    def __call__(
        self,
        x_BHWD: Float[Array, "B H W D"],
        window: int,
        shift: int,
        rate: Array,
        key: PRNGKeyArray | None,
        maps: bool = False,
    ) -> tuple[Float[Array, "B H W D"], Float[Array, "B G N n n"] | None]:
        """Returns the tokens and, where `maps`, the attention weights of the (shifted) windows."""
        x_BHWD = constrain(x_BHWD)
        key1, key2 = (None, None) if key is None else jax.random.split(key)
        y_BHWD = self.norm1(x_BHWD) if self.norm_first else x_BHWD
        y_BHWD, weights_BGNnn = self.attention(y_BHWD, window, shift, self.rule, maps)
        x_BHWD += layers.drop_path(y_BHWD if self.norm_first else self.norm1(y_BHWD), rate, key1)
        y_BHWD = self.mlp(self.norm2(x_BHWD)) if self.norm_first else self.norm2(self.mlp(x_BHWD))
        return x_BHWD + layers.drop_path(y_BHWD, rate, key2), weights_BGNnn


class Pair(nnx.Module):
    """A plain block and a shifted one: what a stage repeats."""

    def __init__(self, plain: Block, shifted: Block):
        self.plain, self.shifted = plain, shifted


class Merging(nnx.Module):
    """Joins 2 x 2 tokens into one of twice the width (V1 section 3.1); a missing row or column is zero.

    Their order is (row, column) = (0, 0), (1, 0), (0, 1), (1, 1). V1 normalizes before the linear map, V2 after it.
    """

    def __init__(self, config: SwinConfig, stage: int, *, key: PRNGKeyArray):
        width = config.width * 2**stage
        self.norm_first = config.version == 1
        self.norm = layers.LayerNorm((4 if self.norm_first else 2) * width, eps=config.norm_eps)
        self.reduction = layers.Linear(4 * width, 2 * width, key=key, bias=False, kernel_init=INIT)

    def __call__(self, x_BHWD: Float[Array, "B H W D"]) -> Float[Array, "B H2 W2 D2"]:
        B, H, W, D = x_BHWD.shape
        if H % 2 or W % 2:
            x_BHWD = jnp.pad(x_BHWD, ((0, 0), (0, H % 2), (0, W % 2), (0, 0)))
            H, W = x_BHWD.shape[1:3]
        x = x_BHWD.reshape(B, H // 2, 2, W // 2, 2, D).transpose(0, 1, 3, 4, 2, 5).reshape(B, H // 2, W // 2, 4 * D)
        return self.reduction(self.norm(x)) if self.norm_first else self.norm(self.reduction(x))


class Stack(nnx.Module):
    """Stores stacked layers under `blocks`, the name that marks a leading axis over layers."""

    def __init__(self, blocks: nnx.Module):
        self.blocks = blocks


class Stage(nnx.Module):
    """Pairs of blocks of one shape, stacked and scanned, then a merge unless it is the last stage."""

    def __init__(self, config: SwinConfig, stage: int, window: int, *, key: PRNGKeyArray):
        blocks_key, merging_key = jax.random.split(key)
        depth, width = config.depths[stage], config.width * 2**stage
        self.config, self.window = config, window
        # One stack of all blocks, by a loop: XLA compiles vmapped random numbers three to eight times more slowly.
        stack = jax.lax.map(lambda key: Block(config, stage, window, key=key), jax.random.split(blocks_key, depth))
        plain, shifted = (jax.tree.map(lambda leaf: leaf[i::2], stack) for i in (0, 1))  # noqa: B023
        self.blocks = Pair(plain, shifted)
        every = config.extra_norm_every
        self.groups = depth // every if every is not None and depth >= every else 0
        make_norm = lambda _: layers.LayerNorm(width, eps=config.norm_eps)  # noqa: E731
        self.extra_norm = Stack(jax.vmap(make_norm)(jnp.arange(self.groups))) if self.groups else None
        self.merging = Merging(config, stage, key=merging_key) if stage < len(config.depths) - 1 else None

    def trunk(
        self, x_BHWD: Float[Array, "B H W D"], rates_P2: Float[Array, "P 2"], keys_P2: Array | None, maps: bool = False
    ) -> tuple[Float[Array, "B H W D"], Any]:
        """Returns the tokens before the merge and, where `maps`, the attention weights [P, 2, B, G, N, n, n]."""
        height, width = x_BHWD.shape[1:3]
        window, shift = windows.window_and_shift(height, width, self.window, self.config.shift_rule)
        shift = shift if self.config.shifted else 0

        def step(x_BHWD: Array, pair: tuple[Pair, Array, Array | None]) -> tuple[Array, Any]:
            blocks, rates_2, keys_2 = pair
            key1, key2 = (None, None) if keys_2 is None else keys_2
            x_BHWD, plain = blocks.plain(x_BHWD, window, 0, rates_2[0], key1, maps)
            x_BHWD, shifted = blocks.shifted(x_BHWD, window, shift, rates_2[1], key2, maps)
            weights: list[Any] = [plain, shifted]
            return x_BHWD, jnp.stack(weights) if maps else None

        scan_pairs = functools.partial(stack.scan_layers, step, scan=self.config.scan, remat=self.config.remat)
        pairs = (self.blocks, rates_P2, keys_P2)
        if self.extra_norm is None:
            return scan_pairs(x_BHWD, pairs)

        def group(x_BHWD: Array, part: tuple[Any, Any]) -> tuple[Array, Any]:
            pairs, norm = part
            x_BHWD, weights = scan_pairs(x_BHWD, pairs)
            return norm(x_BHWD), weights

        groups = jax.tree.map(lambda a: a.reshape(self.groups, -1, *a.shape[1:]), pairs)
        parts = (groups, self.extra_norm.blocks)
        x_BHWD, weights = stack.scan_layers(group, x_BHWD, parts, scan=self.config.scan, remat="none")
        return x_BHWD, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), weights)


class Swin(nnx.Module):
    """Images to logits. Parameters of pairs of blocks are stacked: `stage1/blocks/...` has a leading axis P.

    Any height and width of at least one patch: incomplete patches, merges and windows are padded with zeros at the
    bottom and right; a grid smaller than the window has a smaller one. Absolute positions belong to one image size.
    """

    def __init__(self, config: SwinConfig, *, image_size: tuple[int, int], num_classes: int, key: PRNGKeyArray):
        check(config)
        self.config = config
        self.grid = stage_grids(config, image_size)[0]
        patch_key, position_key, head_key, *stage_keys = jax.random.split(key, 3 + len(config.depths))
        self.embedding = layers.PatchEmbedding((config.patch, config.patch), 3, config.width, key=patch_key)
        self.embedding_norm = layers.LayerNorm(config.width, eps=config.norm_eps) if config.patch_norm else None
        self.position_embedding = (
            nnx.Param(INIT(position_key, (math.prod(self.grid), config.width))) if config.absolute_position else None
        )
        for s, window in enumerate(stage_windows(config, image_size)):
            setattr(self, f"stage{s + 1}", Stage(config, s, window, key=stage_keys[s]))
        features = config.width * 2 ** (len(config.depths) - 1)
        self.norm = layers.LayerNorm(features, eps=config.norm_eps)
        self.head = layers.Linear(features, num_classes, key=head_key, kernel_init=INIT)

    def tokens(self, images_BHWC: Array) -> Float[Array, "B H W D"]:
        """Returns what the first stage reads."""
        B, *image_size, _ = images_BHWC.shape
        grid = stage_grids(self.config, (image_size[0], image_size[1]))[0]
        missing = [tokens * self.config.patch - side for tokens, side in zip(grid, image_size, strict=True)]
        x = constrain(images_BHWC).astype(jnp.dtype(self.config.dtype))
        x = jnp.pad(x, ((0, 0), (0, missing[0]), (0, missing[1]), (0, 0))) if any(missing) else x
        x_BLD = self.embedding(x)
        x_BLD = x_BLD if self.embedding_norm is None else self.embedding_norm(x_BLD)
        if self.position_embedding is not None:
            if grid != self.grid:
                raise UserError(
                    f"images of {image_size[0]}x{image_size[1]} pixels make a grid of {grid[0]}x{grid[1]} patches, but "
                    f"the absolute positions are for {self.grid[0]}x{self.grid[1]}; resize the images or the embedding"
                )
            x_BLD = (x_BLD.astype(jnp.float32) + self.position_embedding[...][None]).astype(x_BLD.dtype)
        return x_BLD.reshape(B, *grid, -1)

    def drop_path_rates(self) -> Float[Array, "P 2"]:
        """Returns the rate of every block of every pair, stage after stage."""
        return jnp.linspace(0.0, self.config.drop_path, sum(self.config.depths)).reshape(-1, 2)

    def _run(self, images_BHWC: Array, key: PRNGKeyArray | None, maps: bool) -> tuple[Array, list[Any]]:
        """Returns the tokens of the last stage before the norm, and the attention of each stage where `maps`."""
        rates = self.drop_path_rates()
        keys = None if key is None or not self.config.drop_path else jax.random.split(key, rates.shape)
        x_BHWD, weights = self.tokens(images_BHWC), []
        for s, depth in enumerate(self.config.depths):
            stage, before = getattr(self, f"stage{s + 1}"), sum(self.config.depths[:s])
            own = slice(before // 2, (before + depth) // 2)
            x_BHWD, stage_weights = stage.trunk(x_BHWD, rates[own], None if keys is None else keys[own], maps)
            x_BHWD = x_BHWD if stage.merging is None else stage.merging(constrain(x_BHWD))
            weights.append(stage_weights)
        return constrain(x_BHWD), weights

    def features(self, images_BHWC: Float[Array, "B H W 3"], key: PRNGKeyArray | None = None) -> Float[Array, "B D"]:
        """Returns the representation that the classifier reads: the mean token after the final norm, in float32."""
        x_BHWD, _ = self._run(images_BHWC, key, maps=False)
        return jnp.mean(self.norm(x_BHWD).astype(jnp.float32), axis=(1, 2))

    def __call__(self, images_BHWC: Float[Array, "B H W 3"], key: PRNGKeyArray | None = None) -> Float[Array, "B M"]:
        """Returns logits over the M classes, in float32. A key means training: it turns drop path on."""
        return self.head(self.features(images_BHWC, key))

    def attention_maps(self, images_BHWC: Float[Array, "B H W 3"]) -> list[Float[Array, "blocks B G N n n"]]:
        """Returns how much each token of a window attends to each other one, for each stage, by block and head.

        Odd blocks are shifted: `ops.windows.places` tells which token of the grid stands where in a window.
        """
        _, weights = self._run(images_BHWC, None, maps=True)
        return [w_P2.reshape(-1, *w_P2.shape[2:]).astype(jnp.float32) for w_P2 in weights]

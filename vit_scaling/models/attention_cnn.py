"""Self-attention that can be convolution (Cordonnier, Loukas, Jaggi, ICLR 2020, arXiv 1911.03584).

The network of section 4: 2x2 groups of pixels as tokens, post-norm blocks with attention by relative position, mean
pooling. `convolution_to_attention` is the theorem of section 3 as a function.

Shapes: B batch, H W tokens of the grid (queries), I J (keys), C channels, D width, N heads, K head dim, L = H·W,
R = 2·side - 1 offsets, Z layers.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from vit_scaling import UserError
from vit_scaling.models import layers, stack
from vit_scaling.ops import relative
from vit_scaling.parallel.sharding import constrain

# How a head decides where to look. quadratic: a round Gaussian around a learned center; gaussian: any Gaussian;
# learned: a learned logit by row and column offset; learned+query: q·r, learned+content: q·r + q·k.
POSITIONS = ("quadratic", "gaussian", "learned", "learned+query", "learned+content")


@dataclasses.dataclass
class AttentionCNNConfig:
    """The published network for CIFAR-10 has 6 layers of width 400 with 9 heads (16 in the many-heads figure)."""

    position: str = "quadratic"  # quadratic | gaussian | learned | learned+query | learned+content
    width: int = 400
    depth: int = 6
    heads: int = 9
    mlp: int = 512
    dropout: float = 0.1  # of each residual branch, in training
    pruned_heads: tuple[int, ...] = ()  # layer * heads + head, silenced for good: see `prunable_heads`
    norm_eps: float = 1e-12
    dtype: str = "float32"  # of the computation; parameters, positions and norms are float32
    scan: bool | None = None  # True: a loop over one compiled block; False: unrolled; None: unrolled on GPUs alone
    remat: str = "dots"  # none | dots | full: what the backward pass recomputes
    # By channel, for images in [0, 1]: the model sees (image - mean) / std; by default [-1, 1].
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        choices = {"position": POSITIONS, "dtype": layers.DTYPES, "remat": tuple(stack.REMAT_POLICIES)}
        layers.check(self, choices=choices, positive=("width", "depth", "heads", "mlp"), rates=("dropout", "norm_eps"))
        if self.width % 2 and self.position.startswith("learned+"):
            raise UserError(f"model.width {self.width} is odd; half of each query looks at rows, half at columns")
        for head in self.pruned_heads:
            if not 0 <= head < self.depth * self.heads:
                raise UserError(
                    f"model.pruned_heads names {head}; {self.depth} layers of {self.heads} heads are numbered 0 to "
                    f"{self.depth * self.heads - 1}"
                )


class GaussianAttention(nnx.Module):
    """Each head averages the map under a Gaussian around its center, an offset from the query; no content.

    Values are the inputs themselves: `out` merges value and output projection (the repository's "value").
    With `general` the precision is spread·spreadᵀ of a 2x2 matrix, otherwise spread² times the identity.
    """

    def __init__(self, inputs: int, outputs: int, heads: int, *, key: PRNGKeyArray, general: bool = False):
        center_key, spread_key, out_key = jax.random.split(key, 3)
        self.centers = nnx.Param(2.0 * jax.random.normal(center_key, (heads, 2)))
        if general:
            spreads = jnp.eye(2)[None] + 0.01 * jax.random.normal(spread_key, (heads, 2, 2))
        else:
            spreads = 1 + 0.01 * jax.random.normal(spread_key, (heads,))
        self.spreads = nnx.Param(spreads)
        self.out = layers.Linear((heads, inputs), outputs, key=out_key)

    def weights(self, rows_HI: Float[Array, "H I"], columns_WJ: Float[Array, "W J"]) -> Float[Array, "N H W I J"]:
        logits = relative.gaussian_logits(self.centers[...], precisions(self.spreads[...]), rows_HI, columns_WJ)
        return jax.nn.softmax(logits, axis=(-2, -1))

    def maps(self, x_BHWD: Float[Array, "B H W D"]) -> Float[Array, "B N H W H W"]:
        B, H, W, _ = x_BHWD.shape
        weights_NHWHW = self.weights(relative.offsets(H, H), relative.offsets(W, W))
        return jnp.broadcast_to(weights_NHWHW[None], (B, *weights_NHWHW.shape))

    def __call__(self, x_BHWD: Float[Array, "B H W D"], keep_N: Array | None = None) -> Float[Array, "B H W D"]:
        _, H, W, _ = x_BHWD.shape
        return self.mix(self.weights(relative.offsets(H, H), relative.offsets(W, W)), x_BHWD, keep_N)

    def mix(
        self, weights_NHWIJ: Float[Array, "N H W I J"], x_BIJD: Float[Array, "B I J D"], keep_N: Array | None
    ) -> Float[Array, "B H W E"]:
        if keep_N is not None:
            weights_NHWIJ *= keep_N[:, None, None, None, None]
        return self.out(jnp.einsum("NHWIJ,BIJD->BHWND", weights_NHWIJ.astype(x_BIJD.dtype), x_BIJD))


def precisions(spreads: Float[Array, "*shape"]) -> Float[Array, "*batch 2 2"]:
    """Returns the inverse covariance [..., 2, 2] of heads with spreads [..., N] (round) or [..., N, 2, 2]."""
    if spreads.shape[-2:] == (2, 2) and spreads.ndim >= 3:
        return spreads @ spreads.mT
    return jnp.square(spreads)[..., None, None] * jnp.eye(2, dtype=spreads.dtype)[(None,) * spreads.ndim]


class LearnedAttention(nnx.Module):
    """Each head weighs learned embeddings of row and column offset: by fixed vectors, or by the query (q·r, + q·k).

    Without content nothing is divided by the root of the head dim; with it, everything is (as in the repository).
    """

    def __init__(self, width: int, heads: int, grid: tuple[int, int], *, key: PRNGKeyArray, position: str):
        keys = jax.random.split(key, 5)
        init = layers.normal(0.02)
        by_query = position != "learned"
        offsets, dim = [2 * side - 1 for side in grid], width // 2 if by_query else width
        self.rel_row = nnx.Param(init(keys[0], (offsets[0], dim)))
        self.rel_col = nnx.Param(init(keys[1], (offsets[1], dim)))
        if by_query:
            self.query = layers.Linear(width, (heads, width), key=keys[2])
        else:
            self.row_score = layers.Linear(dim, heads, key=keys[2], bias=False)
            self.column_score = layers.Linear(dim, heads, key=keys[3], bias=False)
        self.key = layers.Linear(width, (heads, width), key=keys[3]) if position == "learned+content" else None
        self.out = layers.Linear((heads, width), width, key=keys[4])
        self.by_query = by_query

    def maps(self, x_BHWD: Float[Array, "B H W D"]) -> Float[Array, "B N H W H W"]:
        B, H, W, D = x_BHWD.shape
        if self.by_query:
            q_BHWNK = self.query(x_BHWD)
            q_row_BHWNK, q_col_BHWNK = jnp.split(q_BHWNK, 2, axis=-1)
            logits = relative.global_logits(q_row_BHWNK, q_col_BHWNK, self.rel_row[...], self.rel_col[...])
            if self.key is not None:
                k_BIJNK = self.key(x_BHWD)
                logits += jnp.einsum("BHWNK,BIJNK->BNHWIJ", q_BHWNK, k_BIJNK, preferred_element_type=jnp.float32)
            logits *= D**-0.5
        else:
            # A head's vector is its query, the same for every pixel.
            row_NK, col_NK = self.row_score.kernel[...].T, self.column_score.kernel[...].T
            q_row_BHWNK, q_col_BHWNK = (
                jnp.broadcast_to(x_NK[None, None, None], (1, H, W, *x_NK.shape)) for x_NK in (row_NK, col_NK)
            )
            logits = relative.global_logits(q_row_BHWNK, q_col_BHWNK, self.rel_row[...], self.rel_col[...])
        weights = jax.nn.softmax(logits, axis=(-2, -1))
        return jnp.broadcast_to(weights, (B, *weights.shape[1:]))

    def __call__(self, x_BHWD: Float[Array, "B H W D"], keep_N: Array | None = None) -> Float[Array, "B H W D"]:
        weights = self.maps(x_BHWD)
        if keep_N is not None:
            weights *= keep_N[None, :, None, None, None, None]
        return self.out(jnp.einsum("BNHWIJ,BIJD->BHWND", weights.astype(x_BHWD.dtype), x_BHWD))


def dropout(x: Array, rate: float, key: PRNGKeyArray | None) -> Array:
    """Zeroes entries with probability `rate` and scales the rest by 1 / (1 - rate); without a key, the identity."""
    if key is None or not rate:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros_like(x))


class Block(nnx.Module):
    """A post-norm (BERT) block on a grid of tokens."""

    def __init__(self, config: AttentionCNNConfig, grid: tuple[int, int], *, key: PRNGKeyArray):
        attention_key, dense_key, mlp_key = jax.random.split(key, 3)
        width, heads = config.width, config.heads
        if config.position in ("quadratic", "gaussian"):
            general = config.position == "gaussian"
            self.attention: GaussianAttention | LearnedAttention = GaussianAttention(
                width, width, heads, key=attention_key, general=general
            )
        else:
            self.attention = LearnedAttention(width, heads, grid, key=attention_key, position=config.position)
        self.dense = layers.Linear(width, width, key=dense_key)
        self.norm1 = layers.LayerNorm(width, eps=config.norm_eps)
        self.mlp = layers.Mlp(width, config.mlp, key=mlp_key, gelu="exact")
        self.norm2 = layers.LayerNorm(width, eps=config.norm_eps)
        self.dropout = config.dropout

    def __call__(self, x_BHWD: Float[Array, "B H W D"], keep_N: Array, key: PRNGKeyArray | None) -> Array:
        x_BHWD = constrain(x_BHWD)
        B, H, W, D = x_BHWD.shape
        keys = (None, None) if key is None else jax.random.split(key)
        y_BHWD = self.dense(self.attention(x_BHWD, keep_N))
        x_BHWD = self.norm1(x_BHWD + dropout(y_BHWD, self.dropout, keys[0]))
        y_BHWD = self.mlp(x_BHWD.reshape(B, H * W, D)).reshape(x_BHWD.shape)
        return self.norm2(x_BHWD + dropout(y_BHWD, self.dropout, keys[1]))


class AttentionCNN(nnx.Module):
    """Invertible 2x2 space-to-depth, a linear embedding, blocks, the mean, a linear classifier. No input positions."""

    def __init__(self, config: AttentionCNNConfig, *, image_size: tuple[int, int], num_classes: int, key: PRNGKeyArray):
        embedding_key, blocks_key, head_key = jax.random.split(key, 3)
        self.config = config
        self.grid = _grid(image_size)
        self.embedding = layers.Linear(12, config.width, key=embedding_key)
        keys = jax.random.split(blocks_key, config.depth)
        # By a loop and not by vmap: XLA compiles vmapped random numbers several times more slowly.
        self.blocks = jax.lax.map(lambda key: Block(config, self.grid, key=key), keys)
        self.head = layers.Linear(config.width, num_classes, key=head_key)

    def _tokens(self, images_BHWC: Array) -> Array:
        H, W = _grid(images_BHWC.shape[1:3])
        x = constrain(images_BHWC).astype(jnp.dtype(self.config.dtype)).reshape(-1, H, 2, W, 2, 3)
        return self.embedding(x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, H, W, 12))

    def _keep(self) -> Array:
        keep = np.ones((self.config.depth * self.config.heads,), np.float32)
        keep[list(self.config.pruned_heads)] = 0
        return jnp.asarray(keep.reshape(self.config.depth, self.config.heads))

    def features(self, images_BHWC: Float[Array, "B H W 3"], key: PRNGKeyArray | None = None) -> Float[Array, "B D"]:
        """Returns the mean token of the last layer, in float32."""
        keys = None if key is None else jax.random.split(key, self.config.depth)

        def step(x_BHWD: Array, layer: tuple[Block, Array, PRNGKeyArray | None]) -> tuple[Array, None]:
            block, keep_N, key = layer
            return block(x_BHWD, keep_N, key), None

        per_layer, config = (self.blocks, self._keep(), keys), self.config
        x_BHWD, _ = stack.scan_layers(step, self._tokens(images_BHWC), per_layer, scan=config.scan, remat=config.remat)
        return jnp.mean(x_BHWD.astype(jnp.float32), axis=(1, 2))

    def __call__(self, images_BHWC: Float[Array, "B H W 3"], key: PRNGKeyArray | None = None) -> Float[Array, "B M"]:
        """Returns logits over the M classes, in float32. A key means training: it turns dropout on."""
        return self.head(self.features(images_BHWC, key))

    def attention_maps(self, images_BHWC: Float[Array, "B H W 3"]) -> Float[Array, "Z B N L L"]:
        """Returns how much each token attends to each other one, by layer and head, in float32."""

        def step(x_BHWD: Array, layer: tuple[Block, Array]) -> tuple[Array, Array]:
            block, keep_N = layer
            maps = block.attention.maps(x_BHWD)
            L = maps.shape[2] * maps.shape[3]
            return block(x_BHWD, keep_N, None), maps.reshape(*maps.shape[:2], L, L)

        return jax.lax.scan(step, self._tokens(images_BHWC), (self.blocks, self._keep()))[1]


def _grid(image_size: tuple[int, ...]) -> tuple[int, int]:
    height, width = image_size
    if height % 2 or width % 2:
        raise UserError(f"images of {height}x{width} pixels cannot be cut into 2x2 groups; both sides must be even")
    return height // 2, width // 2


def prunable_heads(
    spreads: Float[Array, "Z N *matrix"], *, max_condition: float = 1000.0, min_eigenvalue: float = 1e-5
) -> tuple[int, ...]:
    """Returns the heads to put in `AttentionCNNConfig.pruned_heads`, layer * N + head.

    A head whose precision (inverse covariance) is badly conditioned or nearly singular looks along a line or
    everywhere, not around a pixel. The published pruned runs drop these and train on at a tenth of the rate.

    Args:
        spreads: the parameter "blocks/attention/spreads" of a network with position "gaussian".
        max_condition: largest ratio of the precision's eigenvalues that a head may keep.
        min_eigenvalue: smallest eigenvalue that a head may keep.

    Raises:
        UserError: the spreads are of round Gaussians, whose condition number is always one.
    """
    if spreads.ndim != 4:
        raise UserError(f"spreads have shape {spreads.shape}; only general Gaussians, [Z, N, 2, 2], have a condition")
    low, high = np.moveaxis(np.linalg.eigvalsh(np.asarray(precisions(spreads), np.float64)), -1, 0)
    bad = (low < min_eigenvalue) | (high > max_condition * np.maximum(low, np.finfo(np.float64).tiny))
    return tuple(int(head) for head in np.flatnonzero(bad))


class AttentionConvolution(nnx.Module):
    """A convolution as one multi-head self-attention layer: what `convolution_to_attention` returns."""

    def __init__(self, attention: GaussianAttention, padding: tuple[tuple[int, int], tuple[int, int]]):
        self.attention = attention
        self.padding = padding

    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H W E"]:
        _, H, W, _ = x_BHWC.shape
        rows, columns = self.padding
        x_BIJC = jnp.pad(x_BHWC, ((0, 0), rows, columns, (0, 0)))
        weights = self.attention.weights(
            relative.offsets(H, x_BIJC.shape[1], rows[0]), relative.offsets(W, x_BIJC.shape[2], columns[0])
        )
        return self.attention.mix(weights, x_BIJC, None)


def convolution_to_attention(
    kernel: Float[Array, "kh kw C E"], bias: Float[Array, "E"] | None, alpha: float, *, padding: str = "zero"
) -> AttentionConvolution:
    """Returns the self-attention layer that computes a convolution of stride 1 (theorem 1 of arXiv 1911.03584).

    One head for each of the kh·kw kernel elements, with quadratic encoding: head (i, j) attends by
    softmax(-alpha |d - offset(i, j)|²), which tends to one pixel as alpha grows (mass 0.9998 at alpha 10, all of
    float32 at 46), and maps it by kernel[i, j].

    Args:
        kernel: HWIO, cross-correlation as in `lax.conv_general_dilated`; any size.
        bias: of the convolution, or None.
        alpha: the heads' sharpness, positive.
        padding: "zero": keys include a border of zeros, and the layer tends to the "SAME" convolution. "edge": the
            attention sees the image only; a head that points outside finds the nearest pixel, and the layer tends to
            the convolution of the image padded with its edge values.

    Raises:
        UserError: alpha is not positive, or padding is unknown.
    """
    if padding not in ("zero", "edge"):
        raise UserError(f"padding is {padding!r}; choose one of zero, edge")
    if not alpha > 0:
        raise UserError(f"alpha is {alpha}; the sharpness of the heads must be positive")
    rows, columns, inputs, outputs = kernel.shape
    before, after = ((rows - 1) // 2, (columns - 1) // 2), (rows // 2, columns // 2)
    attention = GaussianAttention(inputs, outputs, rows * columns, key=jax.random.key(0))
    offsets = jnp.mgrid[:rows, :columns].reshape(2, -1).T - jnp.asarray(before)[None]
    attention.centers[...] = offsets.astype(kernel.dtype)
    attention.spreads[...] = jnp.full((rows * columns,), (2 * alpha) ** 0.5, kernel.dtype)
    attention.out.kernel[...] = kernel.reshape(rows * columns, inputs, outputs)
    attention.out.bias = nnx.Param(jnp.zeros((outputs,), kernel.dtype) if bias is None else bias)
    zero = padding == "zero"
    return AttentionConvolution(attention, ((before[0], after[0]), (before[1], after[1])) if zero else ((0, 0), (0, 0)))

"""The layers that the models share: plain Flax NNX modules that hold parameters and no mutable state.

Parameters are float32; every layer computes in the dtype of its input, norms in float32 inside.
Shapes: B batch, H W image or grid, C channels, L tokens, S context tokens, D width, N heads, K head dim,
A rotary angles (K / 2).
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from vit_scaling import UserError
from vit_scaling.models import flexi
from vit_scaling.ops import attention as attention_ops
from vit_scaling.ops import kernels, rotary
from vit_scaling.ops.relative import accumulator

Initializer = Callable[[PRNGKeyArray, tuple[int, ...]], Array]


def _exact_gelu(x: Array) -> Array:
    """Returns x Phi(x) in x's dtype, computed in float32 (arXiv 1606.08415)."""
    x32 = x.astype(jnp.float32)
    # erf, not the erfc of `jax.nn.gelu`, which takes a CPU three times as long.
    return (0.5 * x32 * (1 + jax.lax.erf(x32 * math.sqrt(0.5)))).astype(x.dtype)


GELUS = {
    "tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "exact": _exact_gelu,
    "quick": lambda x: x * jax.nn.sigmoid(1.702 * x),  # of OpenAI's CLIP weights
}

DTYPES = ("float32", "bfloat16")
KERNEL_WIDTH = 8192  # the kernel of layer norm keeps whole rows in the registers of a program
LARGEST = 2**17  # of a width, depth or number of heads: a hundred times the largest published ones


def check(config: Any, *, choices: Mapping[str, Sequence[Any]], positive: Sequence[str], rates: Sequence[str]) -> None:
    """Checks the fields of a model's config that every model checks alike.

    Args:
        config: any model's config.
        choices: for each field, the values that it may have.
        positive: whole numbers, or tuples of them, from 1 to `LARGEST`.
        rates: numbers that are at least 0 and below 1.

    Raises:
        UserError: in one sentence, the first field that cannot work.
    """
    for field, allowed in choices.items():
        if getattr(config, field) not in allowed:
            names = ", ".join(str(choice) for choice in allowed)
            raise UserError(f"model.{field} is {getattr(config, field)!r}; choose one of {names}")
    for field in positive:
        value = getattr(config, field)
        if not all(1 <= number <= LARGEST for number in (value if isinstance(value, tuple) else (value,))):
            raise UserError(f"model.{field} is {value}; it must be at least 1 and at most {LARGEST:,}")
    for field in rates:
        if not 0 <= getattr(config, field) < 1:
            raise UserError(f"model.{field} is {getattr(config, field)}; it must be at least 0 and below 1")


def zeros(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
    del key
    return jnp.zeros(shape)


def xavier_uniform(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
    """Uniform in ±sqrt(6 / (inputs + outputs)); `shape` is (inputs, outputs)."""
    limit = math.sqrt(6 / sum(shape))
    return jax.random.uniform(key, shape, minval=-limit, maxval=limit)


def truncated_normal(std: float) -> Initializer:
    """Normal of standard deviation `std` cut at two of them, which leaves 0.88 std: the initialization of Swin."""
    return lambda key, shape: std * jax.random.truncated_normal(key, -2.0, 2.0, shape)


def lecun_normal(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
    """Normal truncated at two deviations, with variance 1 / inputs; `shape` is (inputs, outputs)."""
    # A normal cut at ±2 has this standard deviation; dividing by it restores the variance that was asked for.
    truncated_std = 0.87962566103423978
    return jax.random.truncated_normal(key, -2.0, 2.0, shape) * (shape[0] ** -0.5 / truncated_std)


def normal(std: float) -> Initializer:
    return lambda key, shape: std * jax.random.normal(key, shape)


def expand(x: Array, ndim: int) -> Array:
    """Returns x with leading axes of size one, so that it broadcasts against an array of `ndim` axes."""
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def product(x: Array, kernel: Array, input_dims: int = 1) -> Array:
    """Contracts the last `input_dims` axes of x with the first ones of the kernel: `jnp.tensordot` in a faster form."""
    if kernels.platform() == "tpu":
        # Merging axes that do not fill the TPU's tiles, such as 196 tokens, would copy the array.
        return jnp.tensordot(x, kernel, input_dims)
    # As matrices, because for the kernel's gradient XLA transposes arrays of more axes in memory on a CPU.
    inputs, outputs = kernel.shape[:input_dims], kernel.shape[input_dims:]
    y = x.reshape(-1, math.prod(inputs)) @ kernel.reshape(math.prod(inputs), -1)
    return y.reshape(*x.shape[: x.ndim - input_dims], *outputs)


class Linear(nnx.Module):
    """An affine map of the last axes: [..., *inputs] to [..., *outputs].

    `kernel` has shape [*inputs, *outputs], so heads stay an axis of their own; it is initialized as the flattened
    (inputs, outputs) matrix.
    """

    def __init__(
        self,
        inputs: int | tuple[int, ...],
        outputs: int | tuple[int, ...],
        *,
        key: PRNGKeyArray,
        bias: bool = True,
        kernel_init: Initializer = xavier_uniform,
        bias_init: Initializer = zeros,
    ):
        inputs = (inputs,) if isinstance(inputs, int) else inputs
        outputs = (outputs,) if isinstance(outputs, int) else outputs
        kernel_key, bias_key = jax.random.split(key)
        matrix = kernel_init(kernel_key, (math.prod(inputs), math.prod(outputs)))
        self.kernel = nnx.Param(matrix.reshape(inputs + outputs))
        self.bias = nnx.Param(bias_init(bias_key, outputs)) if bias else None
        self.input_dims = len(inputs)

    def __call__(self, x: Array) -> Array:
        return self.apply(x, self.kernel[...])

    def apply(self, x: Array, kernel: Array) -> Array:
        """Maps with a kernel made from the layer's own, such as one for another patch."""
        return self.add_bias(product(x, kernel.astype(x.dtype), self.input_dims))

    def add_bias(self, y: Array) -> Array:
        if self.bias is None:
            return y
        # In float32, so that the bias's gradient, a sum over all tokens, is added up in float32.
        dtype = accumulator(y)
        return (y.astype(dtype) + expand(self.bias[...].astype(dtype), y.ndim)).astype(y.dtype)


def stacked_product(maps: Sequence[Linear], x: Array) -> Array:
    """Returns what linear maps of one shape make of the same input, without biases: [..., N, maps, K] for [N, K]."""
    return product(x, jnp.stack([map_.kernel[...].astype(x.dtype) for map_ in maps], -2), maps[0].input_dims)


def side_by_side(maps: Sequence[Linear], x: Array) -> list[Array]:
    """Returns what linear maps of one shape make of the same input: on a GPU by one product, elsewhere by one each.

    A GPU multiplies by a wide matrix faster than by three narrow ones, and reads the input once.
    """
    if kernels.platform() != "gpu":
        return [map_(x) for map_ in maps]
    y = stacked_product(maps, x)
    return [map_.add_bias(y[..., i, :]) for i, map_ in enumerate(maps)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _normalize(x_D: Array, eps: float) -> Array:
    """Returns (x - mean) / sqrt(variance + eps) over the last axis, in float32."""
    return _normalize_forward(x_D, eps)[0]


def _normalize_forward(x_D: Array, eps: float) -> tuple[Array, Any]:
    x32_D = x_D.astype(jnp.float32)
    # Two numbers for a token, which remat keeps. With them the gradients of scale and bias need one pass over x.
    mean_1 = checkpoint_name(jnp.mean(x32_D, axis=-1, keepdims=True), "norm")
    variance_1 = checkpoint_name(jnp.mean(jnp.square(x32_D - mean_1), axis=-1, keepdims=True), "norm")
    return (x32_D - mean_1) * jax.lax.rsqrt(variance_1 + eps), (x_D, mean_1, variance_1)


def _normalize_backward(eps: float, saved: tuple[Array, Array, Array], g_D: Array) -> tuple[Array]:
    x_D, mean_1, variance_1 = saved
    inverse_1 = jax.lax.rsqrt(variance_1 + eps)
    y_D = (x_D.astype(jnp.float32) - mean_1) * inverse_1
    along_y_1 = jnp.mean(g_D * y_D, axis=-1, keepdims=True)
    return (((g_D - jnp.mean(g_D, axis=-1, keepdims=True) - y_D * along_y_1) * inverse_1).astype(x_D.dtype),)


_normalize.defvjp(_normalize_forward, _normalize_backward)


class LayerNorm(nnx.Module):
    """Normalizes the last axis in float32 and returns the input's dtype (arXiv 1607.06450)."""

    def __init__(self, width: int, *, eps: float, bias: bool = True):
        self.scale = nnx.Param(jnp.ones((width,)))
        self.bias = nnx.Param(jnp.zeros((width,))) if bias else None
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        if self._has_kernel(x):
            from vit_scaling.ops import norm_pallas  # takes Pallas to import

            bias_D = jnp.zeros_like(self.scale[...]) if self.bias is None else self.bias[...]
            rows = x.reshape(x.shape[0], -1, x.shape[-1])
            return norm_pallas.layer_norm(rows, self.scale[...], bias_D, self.eps).reshape(x.shape)
        y = _normalize(x, self.eps) * expand(self.scale[...], x.ndim)
        if self.bias is not None:
            y = y + expand(self.bias[...], x.ndim)
        return y.astype(x.dtype)

    @staticmethod
    def _has_kernel(x: Array) -> bool:
        # Of arrays of four axes the third may be heads, which a mesh splits.
        shape_fits = x.ndim >= 3 and x.shape[-1] <= KERNEL_WIDTH and (x.ndim == 3 or not kernels.splits_heads())
        return shape_fits and kernels.runs_on_gpu("layer norm", x.dtype)


class RMSNorm(nnx.Module):
    """Divides the last axis by its root mean square, in float32, and returns the input's dtype (arXiv 1910.07467)."""

    def __init__(self, width: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones((width,)))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (y * expand(self.scale[...], x.ndim)).astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head attention from `x` to `context` (itself by default).

    `head_norm(head_dim)` makes a norm that the queries of each head pass, and one for the keys (ViT-22B, section 2).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        key: PRNGKeyArray,
        qkv_bias: bool = True,
        key_bias: bool = True,
        out_bias: bool = True,
        head_norm: Callable[[int], nnx.Module] | None = None,
    ):
        if width % heads:
            raise UserError(f"width {width} cannot be split over {heads} heads; choose a number that divides it")
        head_dim = width // heads
        query_key, key_key, value_key, out_key = jax.random.split(key, 4)
        self.query = Linear(width, (heads, head_dim), key=query_key, bias=qkv_bias)
        self.key = Linear(width, (heads, head_dim), key=key_key, bias=qkv_bias and key_bias)
        self.value = Linear(width, (heads, head_dim), key=value_key, bias=qkv_bias)
        self.out = Linear((heads, head_dim), width, key=out_key, bias=out_bias)
        self.query_norm: Any = None if head_norm is None else head_norm(head_dim)
        self.key_norm: Any = None if head_norm is None else head_norm(head_dim)

    def _query_key_value(
        self, x_BLD: Array, context_BSD: Array | None, angles_LA: Array | None
    ) -> tuple[Array, Array, Array]:
        if context_BSD is None:
            q_BLNK, k_BSNK, v_BSNK = side_by_side((self.query, self.key, self.value), x_BLD)
        else:
            q_BLNK, k_BSNK, v_BSNK = self.query(x_BLD), self.key(context_BSD), self.value(context_BSD)
        if self.query_norm is not None:
            q_BLNK, k_BSNK = self.query_norm(q_BLNK), self.key_norm(k_BSNK)
        if angles_LA is not None:
            q_BLNK, k_BSNK = rotary.rotate(q_BLNK, angles_LA), rotary.rotate(k_BSNK, angles_LA)
        return q_BLNK, k_BSNK, v_BSNK

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        context_BSD: Float[Array, "B S D"] | None = None,
        angles_LA: Float[Array, "*B L A"] | None = None,
        tokens: int | None = None,
    ) -> Float[Array, "B L D"]:
        """Mixes the values of the context. With angles, queries and keys are rotated first; see `ops.rotary`.

        `tokens` are how many of the context count, where the others are padding; None for all.
        """
        maps, head_dim = (self.query, self.key, self.value), self.query.kernel.shape[-1]
        plain = context_BSD is None and angles_LA is None and self.query_norm is None
        if plain and attention_ops.fits_kernel(x_BLD.shape[1], head_dim, x_BLD.dtype):
            zeros_NK = jnp.zeros(self.query.kernel.shape[1:])
            bias_N3K = jnp.stack([zeros_NK if map_.bias is None else map_.bias[...] for map_ in maps], -2)
            y_BLNK = attention_ops.self_attention(stacked_product(maps, x_BLD), bias_N3K, tokens)
            return self.out(checkpoint_name(y_BLNK, "attention"))
        q_BLNK, k_BSNK, v_BSNK = self._query_key_value(x_BLD, context_BSD, angles_LA)
        return self.out(attention_ops.attention(q_BLNK, k_BSNK, v_BSNK, tokens))

    def weights(
        self,
        x_BLD: Float[Array, "B L D"],
        angles_LA: Float[Array, "L A"] | None = None,
        context_BSD: Float[Array, "B S D"] | None = None,
    ) -> Float[Array, "B N L S"]:
        """Returns how much each token attends to each one of the context (itself by default), in float32."""
        q_BLNK, k_BSNK, _ = self._query_key_value(x_BLD, context_BSD, angles_LA)
        return attention_ops.attention_weights(q_BLNK, k_BSNK)


class Mlp(nnx.Module):
    """Linear, GELU ("tanh", "exact" or "quick"), Linear. Biases start at N(0, 1e-6) unless told otherwise."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        key: PRNGKeyArray,
        gelu: str,
        bias: bool = True,
        kernel_init: Initializer = xavier_uniform,
        bias_init: Initializer = normal(1e-6),  # noqa: B008
    ):
        up_key, down_key = jax.random.split(key)
        self.up = Linear(width, hidden, key=up_key, bias=bias, kernel_init=kernel_init, bias_init=bias_init)
        self.down = Linear(hidden, width, key=down_key, bias=bias, kernel_init=kernel_init, bias_init=bias_init)
        self.gelu = gelu

    def __call__(self, x_D: Float[Array, "*tokens D"]) -> Float[Array, "*tokens D"]:
        return self.down(GELUS[self.gelu](self.up(x_D)))


class SwiGLU(nnx.Module):
    """down(silu(gate x) * up x), the gated MLP of DINOv2 ViT-g/14 and DINOv3 (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int, *, key: PRNGKeyArray, bias: bool = True):
        gate_key, up_key, down_key = jax.random.split(key, 3)
        self.gate = Linear(width, hidden, key=gate_key, bias=bias)
        self.up = Linear(width, hidden, key=up_key, bias=bias)
        self.down = Linear(hidden, width, key=down_key, bias=bias)

    def __call__(self, x_D: Float[Array, "*tokens D"]) -> Float[Array, "*tokens D"]:
        return self.down(jax.nn.silu(self.gate(x_D)) * self.up(x_D))


class PatchEmbedding(Linear):
    """Cuts an image into patches, row by row, and maps each to a token.

    A convolution whose stride is its size, written as one matrix product. Pixels beyond the last whole patch are left
    out, as by that convolution without padding (So400m/14 at 384 pixels sees 27 x 27 patches).
    """

    def __init__(self, patch: tuple[int, int], channels: int, width: int, *, key: PRNGKeyArray, bias: bool = True):
        super().__init__((*patch, channels), width, key=key, bias=bias, kernel_init=lecun_normal)
        self.patch = patch

    def __call__(
        self, images_BHWC: Float[Array, "B H W C"], patch: tuple[int, int] | None = None
    ) -> Float[Array, "B L D"]:
        """Returns one token for each patch; for patches of another size than its own the kernel is resized."""
        batch, height, width, channels = images_BHWC.shape
        h, w = patch or self.patch
        rows, columns = grid_size((height, width), (h, w))
        x = images_BHWC[:, : rows * h, : columns * w].reshape(batch, rows, h, columns, w, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, h, w, channels)
        return self.apply(x, flexi.resize_kernel(self.kernel[...], (h, w)))


def grid_size(image_size: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    """Returns how many whole patches fit into the height and the width of an image."""
    rows, columns = image_size[0] // patch[0], image_size[1] // patch[1]
    if not rows or not columns:
        raise UserError(
            f"an image of {image_size[0]}x{image_size[1]} pixels is smaller than one patch of {patch[0]}x{patch[1]}"
        )
    return rows, columns


def drop_path(x: Array, rate: Array, key: PRNGKeyArray | None) -> Array:
    """Zeroes the residual branch of each example with probability `rate` and scales what stays by 1 / (1 - rate).

    Stochastic depth (Huang et al. 2016, arXiv 1603.09382). Without a key, which means inference, x is unchanged.
    """
    if key is None:
        return x
    keep = 1 - rate
    mask = jax.random.bernoulli(key, keep, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(mask, x / keep.astype(x.dtype), jnp.zeros_like(x))


def sincos2d(rows: int, columns: int, width: int, temperature: float = 10_000.0) -> Float[Array, "L D"]:
    """Returns fixed 2-D sine-cosine position embeddings: a quarter of the width each for sin x, cos x, sin y, cos y.

    The form of Chen et al. 2021 (MoCo v3) that the plain ViT-S/16 recipe uses (Beyer et al. 2022, section 2).
    """
    if width % 4 or width < 8:
        raise UserError(f"2-D sine-cosine positions need a width that is a multiple of 4 and at least 8, not {width}")
    frequency_Q = temperature ** -(jnp.arange(width // 4) / (width // 4 - 1))
    y_L, x_L = (axis.reshape(-1).astype(jnp.float32) for axis in jnp.mgrid[:rows, :columns])
    angle_x, angle_y = jnp.outer(x_L, frequency_Q), jnp.outer(y_L, frequency_Q)
    return jnp.concatenate([jnp.sin(angle_x), jnp.cos(angle_x), jnp.sin(angle_y), jnp.cos(angle_y)], axis=1)

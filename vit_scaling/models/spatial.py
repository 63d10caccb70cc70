"""The layers that can replace a k x k convolution in a residual network, and batch normalization and pools.

Convolution; stand-alone self-attention (SASA, Ramachandran et al. 2019, arXiv 1906.05909) and its stem; attention-
augmented convolution (Bello et al. 2019, arXiv 1904.09925); the non-local block (Wang et al. 2018, arXiv 1711.07971).

Shapes: B batch, H W map (I J of keys), C channels in, E channels out, N heads, K head dim, k kernel size, M mixtures.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from vit_scaling import UserError
from vit_scaling.models import layers
from vit_scaling.ops import kernels, local, relative

POSITIONS = ("relative", "absolute", "none")


def he_normal(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
    """Normal with variance 2 / (kernel elements x outputs): He et al. 2015, fan-out."""
    return jax.random.normal(key, shape) * (2 / (math.prod(shape[:-2]) * shape[-1])) ** 0.5


def convolve(x_BHWC: Array, kernel_hwCE: Array, stride: int) -> Array:
    """Convolves with a square kernel of odd side, after padding by half of it on each side."""
    pad = ((kernel_hwCE.shape[0] - 1) // 2,) * 2
    form = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x_BHWC, kernel_hwCE, (stride, stride), (pad, pad), dimension_numbers=form)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve_on_cpu(x_BHWC: Array, kernel_hwCE: Array, stride: int) -> Array:
    """`convolve` with another gradient: in a loop over layers, XLA's takes a CPU fifty times as long."""
    return convolve(x_BHWC, kernel_hwCE, stride)


def _every(x_BHWC: Array, stride: int) -> Array:
    """Returns every `stride`-th row and column; a slice, where jnp's own index is a gather."""
    return jax.lax.slice(x_BHWC, (0,) * 4, x_BHWC.shape, (1, stride, stride, 1))


def _shifted_products(x_BHWC: Array, kernel_hwCE: Array, stride: int) -> Array:
    """`convolve` as a sum of one product for each pixel of the kernel, in float32 as XLA sums inside a convolution."""
    (_, H, W, _), size, dtype = x_BHWC.shape, kernel_hwCE.shape[0], relative.accumulator(x_BHWC)
    pad = (size // 2,) * 2
    x_BHWC, kernel_hwCE = jnp.pad(x_BHWC.astype(dtype), ((0, 0), pad, pad, (0, 0))), kernel_hwCE.astype(dtype)
    y_BHWE = jnp.zeros((), dtype)
    for a in range(size):
        for c in range(size):
            y_BHWE += layers.product(_every(x_BHWC[:, a : a + H, c : c + W], stride), kernel_hwCE[a, c])
    return y_BHWE


def _forward(x_BHWC: Array, kernel_hwCE: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return convolve(x_BHWC, kernel_hwCE, stride), (x_BHWC, kernel_hwCE)


def _backward(stride: int, kept: tuple[Array, Array], y_BHWE: Array) -> tuple[Array, Array]:
    y, pull = jax.vjp(functools.partial(_shifted_products, stride=stride), *kept)
    return pull(y_BHWE.astype(y.dtype))


convolve_on_cpu.defvjp(_forward, _backward)


class Conv(nnx.Module):
    """A square convolution without bias (a norm follows); an odd kernel is padded by half of it on each side."""

    def __init__(self, inputs: int, outputs: int, size: int, *, key: PRNGKeyArray, stride: int = 1):
        self.kernel = nnx.Param(he_normal(key, (size, size, inputs, outputs)))
        self.stride = stride

    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 E"]:
        kernel_hwCE = self.kernel[...].astype(x_BHWC.dtype)
        if len(kernel_hwCE) == 1:
            return layers.product(_every(x_BHWC, self.stride), kernel_hwCE[0, 0])
        form = convolve_on_cpu if kernels.platform() == "cpu" else convolve
        return form(x_BHWC, kernel_hwCE, self.stride)


class BatchNorm(nnx.Module):
    """Normalizes channels over batch and map, in float32: by the batch in training, else by the running statistics.

    A training call updates the running statistics in place, for the caller to read. Under jit, XLA reduces over the
    whole batch even where it is sharded, so statistics are always synchronized.
    """

    def __init__(self, channels: int, *, decay: float, eps: float, zero_scale: bool = False):
        self.scale = nnx.Param(jnp.zeros((channels,)) if zero_scale else jnp.ones((channels,)))
        self.bias = nnx.Param(jnp.zeros((channels,)))
        self.mean = nnx.BatchStat(jnp.zeros((channels,)))
        self.variance = nnx.BatchStat(jnp.ones((channels,)))
        self.decay = decay
        self.eps = eps
        self.frozen = False  # whether it normalizes as in evaluation and keeps its statistics in training

    def __call__(self, x_BHWC: Float[Array, "B H W C"], train: bool) -> Float[Array, "B H W C"]:
        x32 = x_BHWC.astype(jnp.float32)
        if train and not self.frozen:
            mean = jnp.mean(x32, axis=(0, 1, 2))
            variance = jnp.mean(jnp.square(x32 - mean[None, None, None]), axis=(0, 1, 2))
            for running, batch in ((self.mean, mean), (self.variance, variance)):
                running[...] = self.decay * running[...] + (1 - self.decay) * jax.lax.stop_gradient(batch)
        else:
            mean, variance = self.mean[...], self.variance[...]
        scale = self.scale[...] * jax.lax.rsqrt(variance + self.eps)
        y = x32 * scale[None, None, None] + (self.bias[...] - mean * scale)[None, None, None]
        return y.astype(x_BHWC.dtype)


def average_pool(x_BHWC: Array, size: int, stride: int) -> Array:
    """Mean of the pixels inside the image: sides become ceil(side / stride), as those of a strided convolution."""
    window, strides = (1, size, size, 1), (1, stride, stride, 1)
    total = jax.lax.reduce_window(x_BHWC, np.zeros((), x_BHWC.dtype), jax.lax.add, window, strides, padding="SAME")
    ones = jnp.ones((1, *x_BHWC.shape[1:3], 1), x_BHWC.dtype)
    return total / jax.lax.reduce_window(ones, np.zeros((), ones.dtype), jax.lax.add, window, strides, padding="SAME")


def max_pool(x_BHWC: Array, size: int, stride: int, pad: int) -> Array:
    return jax.lax.reduce_window(
        x_BHWC,
        np.array(-np.inf, x_BHWC.dtype),
        jax.lax.max,
        (1, size, size, 1),
        (1, stride, stride, 1),
        ((0, 0), (pad, pad), (pad, pad), (0, 0)),
    )


def _scaled(init: layers.Initializer, factor: float) -> layers.Initializer:
    return lambda key, shape: factor * init(key, shape)


class LocalAttention(nnx.Module):
    """SASA's layer (section 3.1): full projections, relative tables of each head, no output projection.

    With a stride, attention runs on the incoming map and a 2x2 average pool follows (section 3.2.1). Query kernels
    start K^-1/2 times smaller (our choice), because the paper does not scale logits by K^-1/2.

    position: "relative", or for the ablations of Table 5 "absolute" (sinusoids are added to the input) or "none".
    content: whether logits have q·k; False leaves q·r, and there are no keys (Table 6).
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        kernel_size: int,
        *,
        key: PRNGKeyArray,
        stride: int = 1,
        backend: str = "blocks",
        position: str = "relative",
        content: bool = True,
    ):
        K = head_dim(channels, heads)
        keys = jax.random.split(key, 5)
        project = (channels, (heads, K))
        query_init = _scaled(layers.lecun_normal, K**-0.5)
        self.query = layers.Linear(*project, key=keys[0], bias=False, kernel_init=query_init)
        no_bias = functools.partial(layers.Linear, *project, bias=False, kernel_init=layers.lecun_normal)
        self.key = no_bias(key=keys[1]) if content else None
        self.value = no_bias(key=keys[2])
        self._table = kernel_size, heads, K // 2
        has_tables = position == "relative"
        self.rel_row = nnx.Param(jax.random.normal(keys[3], self._table)) if has_tables else None
        self.rel_col = nnx.Param(jax.random.normal(keys[4], self._table)) if has_tables else None
        self.absolute = position == "absolute"
        self.stride = stride
        self.backend = backend

    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
        x_BHWC = self._positioned(x_BHWC)
        q, k = self._queries_and_keys(x_BHWC)
        y_BHWNK = local.local_attention(
            q, k, self.value(x_BHWC), *self._tables(), kernel_size=self._table[0], backend=self.backend
        )
        # Its backward pass recomputes blocks of logits already; computing its result again would cost a third pass.
        y_BHWNK = checkpoint_name(y_BHWNK, "attention")
        y_BHWC = y_BHWNK.reshape(x_BHWC.shape)
        return average_pool(y_BHWC, 2, self.stride) if self.stride > 1 else y_BHWC

    def _positioned(self, x_BHWC: Array) -> Array:
        if not self.absolute:
            return x_BHWC
        _, H, W, C = x_BHWC.shape
        return x_BHWC + layers.sincos2d(H, W, C).reshape(1, H, W, C).astype(x_BHWC.dtype)

    def _queries_and_keys(self, x_BHWC: Array) -> tuple[Array, Array]:
        q_BHWNK = self.query(x_BHWC)
        return q_BHWNK, jnp.zeros_like(q_BHWNK) if self.key is None else self.key(x_BHWC)

    def _tables(self) -> tuple[Array, Array]:
        if self.rel_row is None or self.rel_col is None:
            return jnp.zeros(self._table), jnp.zeros(self._table)
        return self.rel_row[...], self.rel_col[...]

    def weights(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H W N k k"]:
        q_BHWNK, k_BHWNK = self._queries_and_keys(self._positioned(x_BHWC))
        return local.local_weights(q_BHWNK, k_BHWNK, *self._tables(), kernel_size=self._table[0])

    def terms(
        self, x_BHWC: Float[Array, "B H W C"]
    ) -> tuple[Float[Array, "B H W N k k"], Float[Array, "B H W N k"], Float[Array, "B H W N k"]]:
        """Returns the logits of content, of the row offset and of the column offset, in float32.

        Where a neighbour lies in the image, the softmax of content[a, c] + row[a] + column[c] is `weights`.
        """
        q_BHWNK, k_BHWNK = self._queries_and_keys(self._positioned(x_BHWC))
        _, H, W, _, K = q_BHWNK.shape
        (rel_row, rel_col), size = self._tables(), self._table[0]
        h = size // 2
        k_BHWNK = jnp.pad(k_BHWNK, ((0, 0), (h, h), (h, h), (0, 0), (0, 0)))
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        content = [
            product("BHWNK,BHWNK->BHWN", q_BHWNK, k_BHWNK[:, a : a + H, c : c + W])
            for a in range(size)
            for c in range(size)
        ]
        row = product("BHWNK,kNK->BHWNk", q_BHWNK[..., : K // 2], rel_row.astype(q_BHWNK.dtype))
        column = product("BHWNK,kNK->BHWNk", q_BHWNK[..., K // 2 :], rel_col.astype(q_BHWNK.dtype))
        return jnp.stack(content, axis=-1).reshape(*content[0].shape, size, size), row, column


def head_dim(channels: int, heads: int) -> int:
    """Returns channels / heads, an even number: half of a head holds row positions, half column positions."""
    if channels % (2 * heads):
        raise UserError(
            f"{channels} channels cannot be split over {heads} heads of an even size; twice "
            "the number of heads must divide them"
        )
    return channels // heads


class AttentionStem(nnx.Module):
    """SASA's stem (section 3.2.2): attention inside 4x4 blocks of the raw image, blocks aligned with the pool after it.

    Values depend on where in its block a pixel lies: a mixture of M projections, weighted by a softmax over
    (row embedding + column embedding)·nu_m, the same for all heads. The projections are mixed rather than their
    results, which is the same and spares M - 1 products. Mixtures and embedding width are not in the paper.
    """

    BLOCK = 4

    def __init__(self, outputs: int, heads: int, mixtures: int, *, key: PRNGKeyArray, embedding: int = 16):
        K = head_dim(outputs, heads)
        keys = jax.random.split(key, 6)
        query_init = _scaled(layers.lecun_normal, K**-0.5)
        self.query = layers.Linear(3, (heads, K), key=keys[0], bias=False, kernel_init=query_init)
        self.key = layers.Linear(3, (heads, K), key=keys[1], bias=False, kernel_init=layers.lecun_normal)
        project = lambda key: layers.Linear(3, (heads, K), key=key, bias=False, kernel_init=layers.lecun_normal)  # noqa: E731
        self.value = jax.vmap(project)(jax.random.split(keys[2], mixtures))  # its kernel is [M, 3, N, K]
        self.block_row = nnx.Param(jax.random.normal(keys[3], (self.BLOCK, embedding)))
        self.block_col = nnx.Param(jax.random.normal(keys[4], (self.BLOCK, embedding)))
        self.mixture = nnx.Param(jax.random.normal(keys[5], (mixtures, embedding)))

    def mixture_weights(self) -> Float[Array, "b b M"]:
        """Returns p(row, column, m): how each position of a block mixes the projections."""
        positions = self.block_row[...][:, None, :] + self.block_col[...][None, :, :]
        return jax.nn.softmax(jnp.einsum("abE,ME->abM", positions, self.mixture[...]), axis=-1)

    def __call__(self, x_BHWC: Float[Array, "B H W 3"]) -> Float[Array, "B H W E"]:
        B, H, W, _ = x_BHWC.shape
        b = self.BLOCK
        if H % b or W % b:
            raise UserError(f"images of {H}x{W} pixels cannot be cut into the {b}x{b} blocks of the attention stem")
        x = x_BHWC.reshape(B, H // b, b, W // b, b, 3).swapaxes(2, 3)
        q, k = (
            project(x).reshape(B, H // b, W // b, b * b, *self.query.kernel.shape[1:])
            for project in (self.query, self.key)
        )
        kernel = jnp.einsum("abM,MCNK->abCNK", self.mixture_weights(), self.value.kernel[...]).astype(x.dtype)
        v = jnp.einsum("BYXabC,abCNK->BYXabNK", x, kernel).reshape(k.shape)
        logits = jnp.einsum("BYXQNK,BYXSNK->BYXNQS", q, k, preferred_element_type=jnp.float32)
        y = jnp.einsum("BYXNQS,BYXSNK->BYXQNK", jax.nn.softmax(logits, axis=-1).astype(x.dtype), v)
        return y.reshape(B, H // b, W // b, b, b, -1).swapaxes(2, 3).reshape(B, H, W, -1)


def augmented_dims(channels: int, heads: int, key_fraction: float, value_fraction: float) -> tuple[int, int]:
    """Returns the channels of all keys and of all values (AA, section 4).

    Multiples of the number of heads, with at least 20 channels of keys for each head; rounded so that parameters and
    FLOPs are the published ones.
    """
    keys, values = (int(fraction * channels) // heads * heads for fraction in (key_fraction, value_fraction))
    return max(keys, 20 * heads), max(values, heads)


class AugmentedConv(nnx.Module):
    """A 3x3 convolution beside global attention with relative positions, concatenated (AA, section 3).

    With a stride, attention runs on the map averaged to the output's resolution. `pool` halves it once more, by a 3x3
    average, and enlarges the result bilinearly, as the paper does on 28x28 maps; then every second offset of the table
    is used.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        size: tuple[int, int],
        *,
        key: PRNGKeyArray,
        key_fraction: float,
        value_fraction: float,
        stride: int = 1,
        pool: bool = False,
    ):
        keys_width, values_width = augmented_dims(channels, heads, key_fraction, value_fraction)
        keys = jax.random.split(key, 7)
        K = keys_width // heads
        init = layers.lecun_normal
        self.conv = (
            Conv(channels, channels - values_width, 3, key=keys[0], stride=stride) if values_width < channels else None
        )
        self.query = layers.Linear(channels, (heads, K), key=keys[1], bias=False, kernel_init=init)
        self.key = layers.Linear(channels, (heads, K), key=keys[2], bias=False, kernel_init=init)
        values = (heads, values_width // heads)
        self.value = layers.Linear(channels, values, key=keys[3], bias=False, kernel_init=init)
        self.out = layers.Linear(values, values_width, key=keys[4], bias=False, kernel_init=init)
        self.rel_row = nnx.Param(K**-0.5 * jax.random.normal(keys[5], (2 * size[0] - 1, K)))
        self.rel_col = nnx.Param(K**-0.5 * jax.random.normal(keys[6], (2 * size[1] - 1, K)))
        self.stride = stride
        self.pool = pool

    def _attended(self, x_BHWC: Array) -> Array:
        """The map that attention sees."""
        x_BHWC = average_pool(x_BHWC, 2, self.stride) if self.stride > 1 else x_BHWC
        return average_pool(x_BHWC, 3, 2) if self.pool else x_BHWC

    def _offsets(self, table_RK: Array) -> Array:
        """The rows of the table whose offsets the attended map has, its center among them."""
        return table_RK[table_RK.shape[0] // 2 % 2 :: 2] if self.pool else table_RK

    def weights(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B N H2 W2 H2 W2"]:
        x_BHWC = self._attended(x_BHWC)
        q_BHWNK, k_BIJNK = self.query(x_BHWC), self.key(x_BHWC)
        rows, columns = self._offsets(self.rel_row[...]), self._offsets(self.rel_col[...])
        logits = relative.global_logits(q_BHWNK, q_BHWNK, rows, columns)
        logits += jnp.einsum("BHWNK,BIJNK->BNHWIJ", q_BHWNK, k_BIJNK, preferred_element_type=jnp.float32)
        return jax.nn.softmax(logits * q_BHWNK.shape[-1] ** -0.5, axis=(-2, -1))

    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
        v_BIJNK = self.value(self._attended(x_BHWC))
        weights = self.weights(x_BHWC).astype(v_BIJNK.dtype)
        y_BHWE = self.out(jnp.einsum("BNHWIJ,BIJNK->BHWNK", weights, v_BIJNK))
        sides = [-(-side // self.stride) for side in x_BHWC.shape[1:3]]
        if self.pool:
            y_BHWE = jax.image.resize(y_BHWE, (y_BHWE.shape[0], *sides, y_BHWE.shape[3]), "bilinear")
        return y_BHWE if self.conv is None else jnp.concatenate([self.conv(x_BHWC), y_BHWE], axis=-1)


class NonLocal(nnx.Module):
    """x + W softmax(theta(x)·phi(x)) g(x) over the whole map, at half the channels (embedded Gaussian, section 3.3).

    The norm on W starts with a scale of zero, so an inserted block changes nothing at first (section 4.1).
    """

    def __init__(self, channels: int, *, key: PRNGKeyArray, decay: float, eps: float):
        keys = jax.random.split(key, 4)
        half, init = channels // 2, layers.lecun_normal
        self.theta = layers.Linear(channels, half, key=keys[0], kernel_init=init)
        self.phi = layers.Linear(channels, half, key=keys[1], kernel_init=init)
        self.g = layers.Linear(channels, half, key=keys[2], kernel_init=init)
        self.out = layers.Linear(half, channels, key=keys[3], kernel_init=init)
        self.norm = BatchNorm(channels, decay=decay, eps=eps, zero_scale=True)

    def weights(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H W H W"]:
        theta, phi = self.theta(x_BHWC), self.phi(x_BHWC)
        logits = jnp.einsum("BHWC,BIJC->BHWIJ", theta, phi, preferred_element_type=jnp.float32)
        return jax.nn.softmax(logits, axis=(-2, -1))

    def __call__(self, x_BHWC: Float[Array, "B H W C"], train: bool) -> Float[Array, "B H W C"]:
        g_BIJC = self.g(x_BHWC)
        y_BHWC = jnp.einsum("BHWIJ,BIJC->BHWC", self.weights(x_BHWC).astype(g_BIJC.dtype), g_BIJC)
        return x_BHWC + self.norm(self.out(y_BHWC), train)

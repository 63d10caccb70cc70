"""Exact softmax attention between all tokens, by the fastest implementation that the device has.

Shapes: B batch, L queries, S keys, N heads, K head dim.
"""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_scaling.ops import kernels

# From here on the logits of all pairs of tokens cost a TPU more memory traffic than the flash kernel, which keeps them
# on the chip.
FLASH_TOKENS = 1024
# The flash kernel works on tiles of this many tokens; sequences are padded to a multiple.
_FLASH_TILE = 128
# The kernel for short sequences keeps all keys in one tile, and in the backward pass the gradients of keys and values
# in registers, where more or longer ones do not fit. It was tried on a GPU with tiles of 64 and of 256 tokens.
KERNEL_TOKENS = range(33, 257)
KERNEL_HEAD_DIM = 64


def attention_weights(q_BLNK: Float[Array, "B L N K"], k_BSNK: Float[Array, "B S N K"]) -> Float[Array, "B N L S"]:
    """Returns softmax_S(q·k / sqrt(K)), in float32 whatever the dtype of the inputs."""
    q_BNLK, k_BNSK = jnp.swapaxes(q_BLNK, 1, 2), jnp.swapaxes(k_BSNK, 1, 2)
    logits_BNLS = jnp.matmul(q_BNLK, k_BNSK.mT, preferred_element_type=jnp.float32)
    return jax.nn.softmax(logits_BNLS * q_BLNK.shape[-1] ** -0.5, axis=-1)


def fits_kernel(tokens: int, head_dim: int, dtype: jnp.dtype) -> bool:
    """Returns whether `self_attention` runs: on NVIDIA GPUs in half precision, where all keys fit into one tile.

    On another GPU a warning says once that it does not.
    """
    return tokens in KERNEL_TOKENS and head_dim == KERNEL_HEAD_DIM and kernels.runs_on_gpu("attention", dtype)


def self_attention(
    qkv_BLN3K: Float[Array, "B L N 3 K"], bias_N3K: Float[Array, "N 3 K"], keys: int | None = None
) -> Float[Array, "B L N K"]:
    """Returns `attention` of tokens to each other, [q, k, v] = qkv + bias, by a fused kernel: see `fits_kernel`."""
    from vit_scaling.ops import attention_pallas  # takes Pallas to import

    return attention_pallas.self_attention(qkv_BLN3K, bias_N3K, qkv_BLN3K.shape[1] if keys is None else keys)


def attention(
    q_BLNK: Float[Array, "B L N K"],
    k_BSNK: Float[Array, "B S N K"],
    v_BSNK: Float[Array, "B S N K"],
    keys: int | None = None,
) -> Float[Array, "B L N K"]:
    """Returns softmax(q·k / sqrt(K)) v, with the softmax in float32 and the result in v's dtype.

    Args:
        q_BLNK: queries.
        k_BSNK: keys.
        v_BSNK: values.
        keys: how many keys count; those after them are padding (see `padded_length`). None for all.
    """
    name = implementation(q_BLNK, k_BSNK)
    if name == "cudnn":
        return cudnn(q_BLNK, k_BSNK, v_BSNK, keys)
    k_BSNK, v_BSNK = k_BSNK[:, :keys], v_BSNK[:, :keys]
    if name == "flash":
        return flash(q_BLNK, k_BSNK, v_BSNK)
    weights_BNLS = attention_weights(q_BLNK, k_BSNK).astype(v_BSNK.dtype)
    # In this order of axes the product takes a CPU half the time of the einsum, which multiplies the transposes.
    return jnp.swapaxes(weights_BNLS @ jnp.swapaxes(v_BSNK, 1, 2), 1, 2)


def implementation(q_BLNK: Array | jax.ShapeDtypeStruct, k_BSNK: Array | jax.ShapeDtypeStruct) -> str:
    """Returns which implementation a call is traced with.

    "cudnn": cuDNN's fused attention, on NVIDIA GPUs in half precision, unless there is one query; where JAX finds no
    cuDNN, or one that refuses these shapes, a warning says so once and XLA takes over. "flash": a Pallas kernel, on
    TPUs in bfloat16 from `FLASH_TOKENS` queries and keys on. "xla": two matrix products and a softmax, everywhere else.
    """
    platform, shape = kernels.platform(), q_BLNK.shape
    if platform == "gpu" and q_BLNK.dtype in (jnp.bfloat16, jnp.float16) and shape[1] > 1:
        refusal = _refused_by_cudnn(shape, k_BSNK.shape, q_BLNK.dtype.name)
        if refusal is None:
            return "cudnn"
        warnings.warn(f"attention runs as plain XLA operations instead of cuDNN's kernel: {refusal}", stacklevel=1)
    if platform == "tpu" and q_BLNK.dtype == jnp.bfloat16 and min(shape[1], k_BSNK.shape[1]) >= FLASH_TOKENS:
        return "flash"
    return "xla"


@functools.cache
def _refused_by_cudnn(q_shape: tuple[int, ...], k_shape: tuple[int, ...], dtype: str) -> str | None:
    """Returns why cuDNN's attention cannot run on these shapes; None where it can."""
    if refusal := kernels.refused_by_gpu():
        return refusal
    q, k = jax.ShapeDtypeStruct(q_shape, dtype), jax.ShapeDtypeStruct(k_shape, dtype)
    try:
        jax.eval_shape(lambda q, k, v: jax.vjp(cudnn, q, k, v)[0], q, k, k)
    except (RuntimeError, NotImplementedError, ValueError) as error:  # no cuDNN; or a head dim that it does not have
        return " ".join(str(error).split())
    return None


def padded_length(tokens: int, heads: int, head_dim: int, dtype: jnp.dtype) -> int:
    """Returns how many tokens a network should carry so that no attention has to pad them: one more, or `tokens`.

    JAX refuses a gradient through cuDNN's attention for odd lengths, such as the 197 tokens of a ViT with a class
    token. To pad each layer's queries, keys, values and gradients instead would cost more than half of the kernel.
    """
    like = jax.ShapeDtypeStruct((1, tokens, heads, head_dim), dtype)
    return tokens + 1 if tokens % 2 and implementation(like, like) == "cudnn" else tokens


def cudnn(
    q_BLNK: Float[Array, "B L N K"],
    k_BSNK: Float[Array, "B S N K"],
    v_BSNK: Float[Array, "B S N K"],
    keys: int | None = None,
) -> Float[Array, "B L N K"]:
    """`attention` by cuDNN, which never writes the L x S logits. Odd lengths are padded by one token.

    The mean key is subtracted first, which changes no softmax. Then the log of the sum of a row's exponentials is at
    least log S. Where it is below -88, the gradients of cuDNN 9.20 to 9.26 are NaN on H100s at many lengths
    (pytorch/pytorch issue 196678, NVIDIA/cudnn-frontend issue 1072); a ViT of 64 tokens met that within 400 steps.
    """
    queries, keys = q_BLNK.shape[1], k_BSNK.shape[1] if keys is None else keys
    k32_BSNK = k_BSNK.astype(jnp.float32)
    # The gradients of all keys sum to zero, so the mean passes none on.
    mean_B1NK = jax.lax.stop_gradient(jnp.mean(k32_BSNK[:, :keys], axis=1, keepdims=True))
    arrays = q_BLNK, (k32_BSNK - mean_B1NK).astype(k_BSNK.dtype), v_BSNK
    q_BLNK, k_BSNK, v_BSNK = (_padded(x, 2, axis=1) for x in arrays)
    lengths: dict[str, Any] = {}
    if keys < k_BSNK.shape[1]:
        batch = len(q_BLNK)
        lengths = {
            "query_seq_lengths": jnp.full(batch, queries, jnp.int32),
            "key_value_seq_lengths": jnp.full(batch, keys, jnp.int32),
        }
    y_BLNK = jax.nn.dot_product_attention(q_BLNK, k_BSNK, v_BSNK, implementation="cudnn", **lengths)
    return y_BLNK[:, :queries]


def flash(
    q_BLNK: Float[Array, "B L N K"], k_BSNK: Float[Array, "B S N K"], v_BSNK: Float[Array, "B S N K"]
) -> Float[Array, "B L N K"]:
    """`attention` by JAX's flash kernel for TPUs, which never writes the L x S logits (arXiv 2205.14135)."""
    from jax.experimental.pallas.ops.tpu import flash_attention as kernel  # takes a second to import

    def on_device(q_BNLK: Array, k_BNSK: Array, v_BNSK: Array) -> Array:
        queries, keys = q_BNLK.shape[2], k_BNSK.shape[2]
        q_BNLK, k_BNSK, v_BNSK = (_padded(x, _FLASH_TILE, axis=2) for x in (q_BNLK, k_BNSK, v_BNSK))
        # A token attends to tokens of its own segment: 1 for real ones, 0 for padding.
        batch = len(q_BNLK)
        segments = [
            jnp.broadcast_to(jnp.arange(x.shape[2]) < real, (batch, x.shape[2])).astype(jnp.int32)
            for x, real in ((q_BNLK, queries), (k_BNSK, keys))
        ]
        padded = queries < q_BNLK.shape[2] or keys < k_BNSK.shape[2]
        y_BNLK = kernel.flash_attention(
            q_BNLK,
            k_BNSK,
            v_BNSK,
            segment_ids=kernel.SegmentIds(*segments) if padded else None,
            sm_scale=q_BNLK.shape[-1] ** -0.5,
            block_sizes=_block_sizes(q_BNLK.shape[2], k_BNSK.shape[2]),
        )
        return y_BNLK[:, :, :queries]

    by_head = [x.swapaxes(1, 2) for x in (q_BLNK, k_BSNK, v_BSNK)]
    return kernels.per_device(on_device, *by_head, heads=q_BLNK.shape[2], head_axis=1).swapaxes(1, 2)


def _padded(x: Array, multiple: int, axis: int) -> Array:
    """Returns x with zeros after the end of an axis, up to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths)


def _block_sizes(queries: int, keys: int) -> Any:
    """Returns the tiles of the flash kernel: the largest of 128, 256 and 512 tokens that divide the padded lengths."""
    from jax.experimental.pallas.ops.tpu import flash_attention as kernel

    q, k = (next(size for size in (512, 256, _FLASH_TILE) if length % size == 0) for length in (queries, keys))
    return kernel.BlockSizes(
        block_q=q,
        block_k_major=k,
        block_k=k,
        block_b=1,
        block_q_major_dkv=q,
        block_k_major_dkv=k,
        block_k_dkv=k,
        block_q_dkv=q,
        block_k_major_dq=k,
        block_k_dq=k,
        block_q_dq=q,
    )

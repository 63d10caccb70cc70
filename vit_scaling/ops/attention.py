"""Exact softmax attention between all tokens, by the fastest implementation that the device has.

Shapes: B batch, L queries, S keys, N heads, K head dim.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# cuDNN's fused attention needs half precision and a head dim that is a multiple of 8, at most 128.
_CUDNN_MAX_HEAD_DIM = 128


def attention_weights(
    q_BLNK: Float[Array, "B L N K"],
    k_BSNK: Float[Array, "B S N K"],
    bias_NLS: Float[Array, "N L S"] | None = None,
) -> Float[Array, "B N L S"]:
    """Returns softmax_S(q·k / sqrt(K) + bias), in float32 whatever the dtype of the inputs."""
    logits_BNLS = jnp.einsum("BLNK,BSNK->BNLS", q_BLNK, k_BSNK, preferred_element_type=jnp.float32)
    logits_BNLS *= q_BLNK.shape[-1] ** -0.5
    if bias_NLS is not None:
        logits_BNLS += bias_NLS.astype(jnp.float32)[None]
    return jax.nn.softmax(logits_BNLS, axis=-1)


def attention(
    q_BLNK: Float[Array, "B L N K"],
    k_BSNK: Float[Array, "B S N K"],
    v_BSNK: Float[Array, "B S N K"],
    bias_NLS: Float[Array, "N L S"] | None = None,
) -> Float[Array, "B L N K"]:
    """Returns softmax(q·k / sqrt(K) + bias) v, with the softmax in float32 and the result in v's dtype."""
    half = q_BLNK.dtype in (jnp.bfloat16, jnp.float16)
    head_dim = q_BLNK.shape[-1]
    if jax.default_backend() == "gpu" and half and head_dim % 8 == 0 and head_dim <= _CUDNN_MAX_HEAD_DIM:
        bias = None if bias_NLS is None else bias_NLS.astype(q_BLNK.dtype)[None]
        return jax.nn.dot_product_attention(q_BLNK, k_BSNK, v_BSNK, bias=bias, implementation="cudnn")
    weights_BNLS = attention_weights(q_BLNK, k_BSNK, bias_NLS)
    return jnp.einsum("BNLS,BSNK->BLNK", weights_BNLS.astype(v_BSNK.dtype), v_BSNK)

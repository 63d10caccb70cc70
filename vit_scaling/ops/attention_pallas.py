"""Self-attention of up to 256 tokens as one fused kernel for GPUs, from one product for queries, keys and values.

A program takes one head of one image. All keys fit into one tile, so the softmax needs no running sums, and the
backward pass computes it again. Queries, keys and values of a head are read where the product left them, without their
biases, which are added in registers; their gradients are written to the same places. So no array is copied, cut or
padded.

Shapes: B batch, L tokens, N heads, K head dim, 3 for queries, keys and values, C = N·3·K, D = N·K, T tokens of a tile
(L rounded up to a power of two), R queries of a tile.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float

from vit_scaling.ops import kernels
from vit_scaling.ops.relative import MASKED

# Queries of a tile: forward, where the R x T logits are in the registers of 4 warps, and backward, of 8. Twice as many
# do not fit there.
_FORWARD, _BACKWARD = 64, 32


class Plan(NamedTuple):
    """What is static about a call."""

    tokens: int
    keys: int  # those after them are padding
    head_dim: int
    interpret: bool

    @property
    def tile(self) -> int:
        return max(16, pl.next_power_of_2(self.tokens))


def self_attention(
    qkv_BLN3K: Float[Array, "B L N 3 K"], bias_N3K: Float[Array, "N 3 K"], keys: int, interpret: bool = False
) -> Float[Array, "B L N K"]:
    """Returns softmax(q·k / sqrt(K)) v of each head, where [q, k, v] = qkv + bias.

    Args:
        qkv_BLN3K: queries, keys and values without their biases; at most 256 tokens.
        bias_N3K: their biases.
        keys: how many of the tokens are keys; those after them are padding.
        interpret: runs the kernels' programs on any device, slowly.
    """
    plan = Plan(qkv_BLN3K.shape[1], keys, qkv_BLN3K.shape[-1], interpret)
    return _attend(qkv_BLN3K, bias_N3K[None].astype(jnp.float32), plan)


# --- Kernels ----------------------------------------------------------------------------------------------------------


class _Rows:
    """Consecutive tokens of one head: where the program reads and writes them."""

    def __init__(self, plan: Plan, first: Any, rows: int):
        shape = rows, plan.head_dim
        self.row = first + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        self.column = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        self.plan, self.mask = plan, self.row < plan.tokens

    def read(self, ref: Any, start: Any, bias_K: Array | None = None) -> Array:
        """Returns K channels of each row from `start` on, with zeros in rows that are none."""
        x_RK = pltriton.load(ref.at[self.row, start + self.column], mask=self.mask, other=0.0)
        return x_RK if bias_K is None else (x_RK.astype(jnp.float32) + bias_K[None, :]).astype(x_RK.dtype)

    def centred(self, ref: Any, start: Any) -> Array:
        """Returns keys less their mean, which changes no softmax and makes their bias needless.

        Otherwise what keys have in common would cancel in the gradient of queries, at the precision of bfloat16.
        """
        x_RK = self.read(ref, start)
        x32_RK = jnp.where(self.row < self.plan.keys, x_RK.astype(jnp.float32), 0.0)
        return (x32_RK - jnp.sum(x32_RK, axis=0, keepdims=True) / self.plan.keys).astype(x_RK.dtype)

    def write(self, ref: Any, start: Any, x_RK: Array) -> None:
        pltriton.store(ref.at[self.row, start + self.column], x_RK.astype(ref.dtype), mask=self.mask)


def _parts(plan: Plan, head: Array) -> list[Array]:
    """Returns where the queries, keys and values of a head start among the C channels."""
    return [(3 * head + part) * plan.head_dim for part in range(3)]


def _channels(plan: Plan, start: Array) -> tuple[Array, Array]:
    """Returns where K channels from `start` on are in an array [1, C]."""
    column_K = jax.lax.broadcasted_iota(jnp.int32, (plan.head_dim,), 0)
    return jnp.zeros_like(column_K), start + column_K


def _forward_kernel(plan: Plan, qkv_ref: Any, bias_ref: Any, y_ref: Any) -> None:
    head = pl.program_id(1)
    q, k, v = _parts(plan, head)
    q_bias_K, v_bias_K = (pltriton.load(bias_ref.at[_channels(plan, start)]) for start in (q, v))
    keys = _Rows(plan, 0, plan.tile)
    k_TK, v_TK = keys.centred(qkv_ref, k), keys.read(qkv_ref, v, v_bias_K)
    rows = min(_FORWARD, plan.tile)
    real_1T = jax.lax.broadcasted_iota(jnp.int32, (1, plan.tile), 1) < plan.keys

    def attend(tile: Array, carry: None) -> None:
        queries = _Rows(plan, tile * rows, rows)
        logits_RT = kernels.dot(queries.read(qkv_ref, q, q_bias_K), k_TK, (1, 1)) * plan.head_dim**-0.5
        logits_RT = jnp.where(real_1T, logits_RT, MASKED)
        weights_RT = jnp.exp(logits_RT - jnp.max(logits_RT, axis=1, keepdims=True))
        sums_R1 = jnp.sum(weights_RT, axis=1, keepdims=True)
        queries.write(y_ref, head * plan.head_dim, kernels.dot(weights_RT.astype(v_TK.dtype), v_TK, (1, 0)) / sums_R1)
        return carry

    jax.lax.fori_loop(0, pl.cdiv(plan.tokens, rows), attend, None)


def _backward_kernel(plan: Plan, qkv_ref: Any, g_ref: Any, bias_ref: Any, dqkv_ref: Any, dbias_ref: Any) -> None:
    head = pl.program_id(1)
    q, k, v = _parts(plan, head)
    q_bias_K, v_bias_K = (pltriton.load(bias_ref.at[_channels(plan, start)]) for start in (q, v))
    keys = _Rows(plan, 0, plan.tile)
    k_TK, v_TK = keys.centred(qkv_ref, k), keys.read(qkv_ref, v, v_bias_K)
    rows, scale = min(_BACKWARD, plan.tile), plan.head_dim**-0.5
    real_T1 = jax.lax.broadcasted_iota(jnp.int32, (plan.tile, 1), 0) < plan.keys

    def attend(tile: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        dk_TK, dv_TK, dq_sum_RK = sums
        queries = _Rows(plan, tile * rows, rows)
        q_RK, g_RK = queries.read(qkv_ref, q, q_bias_K), queries.read(g_ref, head * plan.head_dim)
        # Keys by queries: then the products that sum over queries take the weights as they are.
        logits_TR = jnp.where(real_T1, kernels.dot(k_TK, q_RK, (1, 1)) * scale, MASKED)
        weights_TR = jnp.exp(logits_TR - jnp.max(logits_TR, axis=0, keepdims=True))
        weights_TR /= jnp.sum(weights_TR, axis=0, keepdims=True)
        dv_TK += kernels.dot(weights_TR.astype(g_RK.dtype), g_RK, (1, 0))
        dweights_TR = kernels.dot(v_TK, g_RK, (1, 1))
        dlogits_TR = weights_TR * (dweights_TR - jnp.sum(weights_TR * dweights_TR, axis=0, keepdims=True)) * scale
        half_TR = dlogits_TR.astype(q_RK.dtype)
        dk_TK += kernels.dot(half_TR, q_RK, (1, 0))
        dq_RK = kernels.dot(half_TR, k_TK, (0, 0))
        queries.write(dqkv_ref, q, dq_RK)
        return dk_TK, dv_TK, dq_sum_RK + dq_RK

    zeros_TK = jnp.zeros((plan.tile, plan.head_dim), jnp.float32)
    zeros_RK = jnp.zeros((rows, plan.head_dim), jnp.float32)
    sums = jax.lax.fori_loop(0, pl.cdiv(plan.tokens, rows), attend, (zeros_TK, zeros_TK, zeros_RK))
    dk_TK, dv_TK, dq_sum_RK = sums
    keys.write(dqkv_ref, k, dk_TK)
    keys.write(dqkv_ref, v, dv_TK)
    for start, x in zip((q, k, v), (dq_sum_RK, dk_TK, dv_TK), strict=True):
        pltriton.store(dbias_ref.at[_channels(plan, start)], jnp.sum(x, axis=0))


# --- Calls ------------------------------------------------------------------------------------------------------------


def _forward_call(plan: Plan, qkv_BLN3K: Array, bias_1N3K: Array) -> Array:
    B, L, N, _, K = qkv_BLN3K.shape
    y_BLD = pl.pallas_call(
        functools.partial(_forward_kernel, plan),
        name="self_attention_forward",
        grid=(B, N),
        in_specs=[_image(L, 3 * N * K), pl.BlockSpec((1, 3 * N * K), lambda b, head: (0, 0))],
        out_specs=_image(L, N * K),
        out_shape=jax.ShapeDtypeStruct((B, L, N * K), qkv_BLN3K.dtype),
        compiler_params=pltriton.CompilerParams(num_warps=4),
        interpret=plan.interpret,
    )(qkv_BLN3K.reshape(B, L, -1), bias_1N3K.reshape(1, -1))
    return y_BLD.reshape(B, L, N, K)


def _backward_call(plan: Plan, qkv_BLN3K: Array, g_BLNK: Array, bias_1N3K: Array) -> tuple[Array, Array]:
    B, L, N, _, K = qkv_BLN3K.shape
    channels = 3 * N * K
    dqkv_BLC, dbias_B1C = pl.pallas_call(
        functools.partial(_backward_kernel, plan),
        name="self_attention_backward",
        grid=(B, N),
        in_specs=[_image(L, channels), _image(L, N * K), pl.BlockSpec((1, channels), lambda b, head: (0, 0))],
        out_specs=[_image(L, channels), _image(1, channels)],
        out_shape=[
            jax.ShapeDtypeStruct((B, L, channels), qkv_BLN3K.dtype),
            jax.ShapeDtypeStruct((B, 1, channels), jnp.float32),
        ],
        compiler_params=pltriton.CompilerParams(num_warps=8),
        interpret=plan.interpret,
    )(qkv_BLN3K.reshape(B, L, channels), g_BLNK.reshape(B, L, -1), bias_1N3K.reshape(1, channels))
    return dqkv_BLC.reshape(qkv_BLN3K.shape), dbias_B1C.reshape(B, 1, N, 3, K)


def _image(tokens: int, channels: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, tokens, channels), lambda b, head: (b, 0, 0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attend(qkv_BLN3K: Array, bias_1N3K: Array, plan: Plan) -> Array:
    return _attend_forward(qkv_BLN3K, bias_1N3K, plan)[0]


def _attend_forward(qkv_BLN3K: Array, bias_1N3K: Array, plan: Plan) -> tuple[Array, Any]:
    run, heads = functools.partial(_forward_call, plan), qkv_BLN3K.shape[2]
    return kernels.per_device(run, qkv_BLN3K, heads=heads, head_axis=2, shared=(bias_1N3K,)), (qkv_BLN3K, bias_1N3K)


def _attend_backward(plan: Plan, saved: tuple[Array, Array], g_BLNK: Array) -> tuple[Array, Array]:
    qkv_BLN3K, bias_1N3K = saved
    run, heads = functools.partial(_backward_call, plan), qkv_BLN3K.shape[2]
    dqkv_BLN3K, dbias = kernels.per_device(run, qkv_BLN3K, g_BLNK, heads=heads, head_axis=2, shared=(bias_1N3K,))
    return dqkv_BLN3K, jnp.sum(dbias, axis=0)


_attend.defvjp(_attend_forward, _attend_backward)

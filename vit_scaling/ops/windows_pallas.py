"""Attention within the windows of a grid as one fused kernel for GPUs: no windows, logits or masks in memory.

A program takes one head and one row of windows of one image. It reads the tokens of each window where they stand in the
grid, also where the windows are shifted, and writes the result to the same places. All keys of a window fit into one
tile, so the backward pass needs no sums of the forward pass: it computes the softmax again.

Shapes: B batch, H W grid, L tokens of the grid, N heads, K head dim, C N·K channels, n tokens of a window, R rows of
windows, T tokens of a tile (n rounded up to a power of two), M = N·T.
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


class Plan(NamedTuple):
    """What is static about a call."""

    height: int
    width: int
    window: int
    shift: tuple[int, int]  # by how many rows and columns the windows are shifted
    masked: float  # added to the logits of pairs from different regions of the image
    head_dim: int
    interpret: bool

    @property
    def tile(self) -> int:
        return max(16, pl.next_power_of_2(self.window**2))


def window_attention(
    q_BHWNK: Float[Array, "B H W N K"],
    k_BHWNK: Float[Array, "B H W N K"],
    v_BHWNK: Float[Array, "B H W N K"],
    bias_Nnn: Float[Array, "N n n"],
    window: int,
    shift: tuple[int, int],
    masked: float,
    interpret: bool = False,
) -> Float[Array, "B H W N K"]:
    """Returns `ops.windows.window_attention` for the tokens of a grid, in the grid's order.

    Args:
        q_BHWNK: queries, scaled; the window divides H and W.
        k_BHWNK: keys.
        v_BHWNK: values.
        bias_Nnn: added to the logits of every window.
        window: its side in tokens, at most 8.
        shift: by how many rows and columns the windows are shifted.
        masked: added to the logits of pairs from different regions of a shifted grid.
        interpret: runs the kernel's program on any device, slowly.
    """
    B, H, W, N, K = q_BHWNK.shape
    plan = Plan(H, W, window, shift, masked, K, interpret)
    missing = plan.tile - window**2
    bias_NTT = jnp.pad(bias_Nnn.astype(jnp.float32), ((0, 0), (0, missing), (0, 0)))
    bias_NTT = jnp.pad(bias_NTT, ((0, 0), (0, 0), (0, missing)), constant_values=MASKED)
    bias_TM = bias_NTT.swapaxes(0, 1).reshape(plan.tile, N * plan.tile)
    y_BLC = _attend(*(x.reshape(B, H * W, N * K) for x in (q_BHWNK, k_BHWNK, v_BHWNK)), bias_TM, plan)
    return y_BLC.reshape(B, H, W, N, K)


# --- Kernels ----------------------------------------------------------------------------------------------------------


class _Window:
    """The tokens of one window: where the program reads and writes them, and which pairs are masked."""

    def __init__(self, plan: Plan, head: Array, row: Array, column: Array):
        self.plan, window = plan, plan.window
        token_T = jax.lax.broadcasted_iota(jnp.int32, (plan.tile,), 0)
        # In the shifted grid; the roll by (-down, -right) brings (y + down, x + right) to (y, x).
        y_T, x_T = row * window + token_T // window, column * window + token_T % window
        (down, right), H, W = plan.shift, plan.height, plan.width
        there_T = token_T < window * window
        place_T = jnp.where(there_T, (y_T + down) % H * W + (x_T + right) % W, H * W)
        channel_K = head * plan.head_dim + jax.lax.broadcasted_iota(jnp.int32, (plan.head_dim,), 0)
        shape = (plan.tile, plan.head_dim)
        self.index = jnp.broadcast_to(place_T[:, None], shape), jnp.broadcast_to(channel_K[None, :], shape)
        self.mask = jnp.broadcast_to(there_T[:, None], shape)
        if down or right:
            row_T = (y_T >= H - window).astype(jnp.int32) + (y_T >= H - down).astype(jnp.int32)
            column_T = (x_T >= W - window).astype(jnp.int32) + (x_T >= W - right).astype(jnp.int32)
            self.region_T = 3 * row_T + column_T  # as in `ops.windows.regions`

    def read(self, ref: Any) -> Array:
        return pltriton.load(ref.at[self.index], mask=self.mask, other=0.0)

    def write(self, ref: Any, x_TK: Array) -> None:
        pltriton.store(ref.at[self.index], x_TK.astype(ref.dtype), mask=self.mask)

    def softmax(self, q_TK: Array, k_TK: Array, bias_TT: Array) -> Array:
        logits_TT = kernels.dot(q_TK, k_TK, (1, 1)) + bias_TT
        if self.plan.shift != (0, 0):
            logits_TT += jnp.where(self.region_T[:, None] != self.region_T[None, :], self.plan.masked, 0.0)
        weights_TT = jnp.exp(logits_TT - jnp.max(logits_TT, axis=1, keepdims=True))
        return weights_TT / jnp.sum(weights_TT, axis=1, keepdims=True)


def _forward_kernel(plan: Plan, q_ref: Any, k_ref: Any, v_ref: Any, bias_ref: Any, y_ref: Any) -> None:
    head, row, bias_TT = pl.program_id(1), pl.program_id(2), bias_ref[...]

    def attend(column: Array, carry: None) -> None:
        window = _Window(plan, head, row, column)
        q_TK, k_TK, v_TK = (window.read(ref) for ref in (q_ref, k_ref, v_ref))
        weights_TT = window.softmax(q_TK, k_TK, bias_TT)
        window.write(y_ref, kernels.dot(weights_TT.astype(v_TK.dtype), v_TK, (1, 0)))
        return carry

    jax.lax.fori_loop(0, plan.width // plan.window, attend, None)


def _backward_kernel(plan: Plan, *refs: Any) -> None:
    q_ref, k_ref, v_ref, g_ref, bias_ref, dq_ref, dk_ref, dv_ref, dbias_ref = refs
    head, row, bias_TT = pl.program_id(1), pl.program_id(2), bias_ref[...]

    def attend(column: Array, dbias_TT: Array) -> Array:
        window = _Window(plan, head, row, column)
        q_TK, k_TK, v_TK, g_TK = (window.read(ref) for ref in (q_ref, k_ref, v_ref, g_ref))
        weights_TT = window.softmax(q_TK, k_TK, bias_TT)
        window.write(dv_ref, kernels.dot(weights_TT.astype(g_TK.dtype), g_TK, (0, 0)))
        dweights_TT = kernels.dot(g_TK, v_TK, (1, 1))
        dlogits_TT = weights_TT * (dweights_TT - jnp.sum(weights_TT * dweights_TT, axis=1, keepdims=True))
        half_TT = dlogits_TT.astype(q_TK.dtype)
        window.write(dq_ref, kernels.dot(half_TT, k_TK, (1, 0)))
        window.write(dk_ref, kernels.dot(half_TT, q_TK, (0, 0)))
        return dbias_TT + dlogits_TT

    dbias_ref[...] = jax.lax.fori_loop(0, plan.width // plan.window, attend, jnp.zeros_like(bias_TT))


# --- Calls ------------------------------------------------------------------------------------------------------------


def _call(kernel: Any, plan: Plan, *arrays: Array, sums: bool) -> tuple[Array, ...]:
    """Runs a kernel on arrays [B, L, C] and the bias, into one such array, or into three and `sums` of the bias."""
    *tokens, _ = arrays
    B, L, C = tokens[0].shape
    heads, rows, T = C // plan.head_dim, plan.height // plan.window, plan.tile
    image = pl.BlockSpec((None, L, C), lambda b, head, row: (b, 0, 0))
    outputs, specs = [jax.ShapeDtypeStruct((B, L, C), tokens[0].dtype)] * (3 if sums else 1), [image]
    if sums:
        outputs.append(jax.ShapeDtypeStruct((B, rows * T, heads * T), jnp.float32))
        specs = [image] * 3 + [pl.BlockSpec((None, T, T), lambda b, head, row: (b, row, head))]
    call = pl.pallas_call(
        functools.partial(kernel, plan),
        name=f"window_attention{kernel.__name__.removesuffix('_kernel')}",
        grid=(B, heads, rows),
        in_specs=[image] * len(tokens) + [pl.BlockSpec((T, T), lambda b, head, row: (0, head))],
        out_specs=specs,
        out_shape=outputs,
        compiler_params=pltriton.CompilerParams(num_warps=4),
        interpret=plan.interpret,
    )
    return tuple(call(*arrays))


def _per_device(function: Any, plan: Plan, *arrays: Array) -> Any:
    *tokens, bias_TM = arrays
    heads = tokens[0].shape[2] // plan.head_dim
    return kernels.per_device(function, *tokens, heads=heads, head_axis=2, shared=(bias_TM,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_BLC: Array, k_BLC: Array, v_BLC: Array, bias_TM: Array, plan: Plan) -> Array:
    return _attend_forward(q_BLC, k_BLC, v_BLC, bias_TM, plan)[0]


def _attend_forward(q_BLC: Array, k_BLC: Array, v_BLC: Array, bias_TM: Array, plan: Plan) -> tuple[Array, Any]:
    arrays = q_BLC, k_BLC, v_BLC, bias_TM
    return _per_device(functools.partial(_call, _forward_kernel, plan, sums=False), plan, *arrays)[0], arrays


def _attend_backward(plan: Plan, arrays: tuple[Array, ...], g_BLC: Array) -> tuple[Array, ...]:
    *tokens, bias_TM = arrays
    run = functools.partial(_call, _backward_kernel, plan, sums=True)
    *gradients, dbias = _per_device(run, plan, *tokens, g_BLC, bias_TM)  # dbias [B, R·T, M]
    return *gradients, jnp.sum(dbias.reshape(-1, *bias_TM.shape), axis=0)


_attend.defvjp(_attend_forward, _attend_backward)

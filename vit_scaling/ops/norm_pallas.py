"""Layer norm as a fused kernel for GPUs: the gradients of input, scale and bias in one pass over the tokens.

A program takes some rows of one image, a tile of a few whole rows at a time, and adds up its share of the gradients of
scale and bias in registers. XLA reads the tokens once more for each sum.

Shapes: B batch, R rows (tokens of an image), D width, S shares of an image's rows, T rows of a tile, C columns of a
tile (D rounded up to a power of two).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float

from vit_scaling.ops import kernels

# Numbers of a tile: 32 in the registers of each of a program's 128 threads.
_TILE = 4096
# Rows of a program of the backward pass. Each writes one row of sums for scale and one for bias.
_SHARE = 32


class Plan(NamedTuple):
    """What is static about a call."""

    rows: int
    width: int
    eps: float
    interpret: bool

    @property
    def tile(self) -> tuple[int, int]:
        columns = pl.next_power_of_2(self.width)
        return min(_SHARE, max(1, _TILE // columns)), columns


def layer_norm(
    x_BRD: Float[Array, "B R D"],
    scale_D: Float[Array, "D"],
    bias_D: Float[Array, "D"],
    eps: float,
    interpret: bool = False,
) -> Float[Array, "B R D"]:
    """Returns (x - mean) / sqrt(variance + eps) * scale + bias over the last axis, in x's dtype, computed in float32.

    `interpret` runs the kernels' programs on any device, slowly.
    """
    _, rows, width = x_BRD.shape
    plan = Plan(rows, width, eps, interpret)
    return _norm(x_BRD, scale_D[None].astype(jnp.float32), bias_D[None].astype(jnp.float32), plan)


# --- Kernels ----------------------------------------------------------------------------------------------------------


class _Tile:
    """Some whole rows of an image: where the program reads and writes them."""

    def __init__(self, plan: Plan, first_row: Any):
        shape = plan.tile
        row_TC = first_row + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        column_TC = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        self.plan, self.index = plan, (row_TC, column_TC)
        self.mask = (row_TC < plan.rows) & (column_TC < plan.width)

    def read(self, ref: Any) -> Array:
        return pltriton.load(ref.at[self.index], mask=self.mask, other=0.0).astype(jnp.float32)

    def write(self, ref: Any, x_TC: Array) -> None:
        pltriton.store(ref.at[self.index], x_TC.astype(ref.dtype), mask=self.mask)

    def mean(self, x_TC: Array) -> Array:
        return jnp.sum(x_TC, axis=1, keepdims=True) / self.plan.width

    def normalized(self, x_TC: Array) -> tuple[Array, Array]:
        """Returns the normalized rows and 1 / sqrt(variance + eps) of each."""
        centred_TC = jnp.where(self.mask, x_TC - self.mean(x_TC), 0.0)
        inverse_T1 = jax.lax.rsqrt(self.mean(centred_TC * centred_TC) + self.plan.eps)
        return centred_TC * inverse_T1, inverse_T1


def _columns(plan: Plan) -> tuple[tuple[Array, Array], Array]:
    """Returns where a row of D numbers is, such as the scale, and the mask of a tile's columns."""
    shape = (1, plan.tile[1])
    column_1C = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return (jnp.zeros(shape, jnp.int32), column_1C), column_1C < plan.width


def _forward_kernel(plan: Plan, x_ref: Any, scale_ref: Any, bias_ref: Any, y_ref: Any) -> None:
    index, mask = _columns(plan)
    scale_1C, bias_1C = (pltriton.load(ref.at[index], mask=mask, other=0.0) for ref in (scale_ref, bias_ref))
    tile = _Tile(plan, pl.program_id(1) * plan.tile[0])
    tile.write(y_ref, tile.normalized(tile.read(x_ref))[0] * scale_1C + bias_1C)


def _backward_kernel(plan: Plan, x_ref: Any, g_ref: Any, scale_ref: Any, *outputs: Any) -> None:
    dx_ref, dscale_ref, dbias_ref = outputs
    index, mask = _columns(plan)
    scale_1C, first_row = pltriton.load(scale_ref.at[index], mask=mask, other=0.0), pl.program_id(1) * _SHARE

    def add(step: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        tile = _Tile(plan, first_row + step * plan.tile[0])
        y_TC, inverse_T1 = tile.normalized(tile.read(x_ref))
        g_TC = tile.read(g_ref)
        dy_TC = g_TC * scale_1C
        tile.write(dx_ref, (dy_TC - tile.mean(dy_TC) - y_TC * tile.mean(dy_TC * y_TC)) * inverse_T1)
        return sums[0] + g_TC * y_TC, sums[1] + g_TC

    zeros_TC = jnp.zeros(plan.tile, jnp.float32)
    for ref, sums_TC in zip(
        (dscale_ref, dbias_ref),
        jax.lax.fori_loop(0, _SHARE // plan.tile[0], add, (zeros_TC, zeros_TC)),
        strict=True,
    ):
        pltriton.store(ref.at[index], jnp.sum(sums_TC, axis=0, keepdims=True), mask=mask)


# --- Calls ------------------------------------------------------------------------------------------------------------


def _call(kernel: Any, plan: Plan, *arrays: Array, tokens: int, sums: bool) -> tuple[Array, ...]:
    """Runs a kernel on `tokens` arrays [B, R, D] and some [1, D], into one of the former and, with `sums`, two of
    [B, S, D]."""
    (B, R, D), dtype = arrays[0].shape, arrays[0].dtype
    programs = pl.cdiv(R, _SHARE if sums else plan.tile[0])
    image = pl.BlockSpec((None, R, D), lambda b, s: (b, 0, 0))
    row = pl.BlockSpec((1, D), lambda b, s: (0, 0))
    outputs, specs = [jax.ShapeDtypeStruct((B, R, D), dtype)], [image]
    if sums:
        outputs += [jax.ShapeDtypeStruct((B, programs, D), jnp.float32)] * 2
        specs += [pl.BlockSpec((None, 1, D), lambda b, s: (b, s, 0))] * 2
    call = pl.pallas_call(
        functools.partial(kernel, plan),
        name=f"layer_norm{kernel.__name__.removesuffix('_kernel')}",
        grid=(B, programs),
        in_specs=[image] * tokens + [row] * (len(arrays) - tokens),
        out_specs=specs,
        out_shape=outputs,
        compiler_params=pltriton.CompilerParams(num_warps=4),
        interpret=plan.interpret,
    )
    return tuple(call(*arrays))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _norm(x_BRD: Array, scale_1D: Array, bias_1D: Array, plan: Plan) -> Array:
    return _norm_forward(x_BRD, scale_1D, bias_1D, plan)[0]


def _norm_forward(x_BRD: Array, scale_1D: Array, bias_1D: Array, plan: Plan) -> tuple[Array, Any]:
    run = functools.partial(_call, _forward_kernel, plan, tokens=1, sums=False)
    return kernels.per_device(run, x_BRD, shared=(scale_1D, bias_1D))[0], (x_BRD, scale_1D)


def _norm_backward(plan: Plan, saved: tuple[Array, Array], g_BRD: Array) -> tuple[Array, ...]:
    x_BRD, scale_1D = saved
    run = functools.partial(_call, _backward_kernel, plan, tokens=2, sums=True)
    dx_BRD, *sums = kernels.per_device(run, x_BRD, g_BRD, shared=(scale_1D,))
    return dx_BRD, *(jnp.sum(x_BSD, axis=(0, 1))[None] for x_BSD in sums)


_norm.defvjp(_norm_forward, _norm_backward)

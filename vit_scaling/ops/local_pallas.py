"""Local attention as one fused kernel for TPU and GPU, forward and backward: no logits in memory.

The map is cut into tiles of b x b pixels. A program holds the queries of one tile and the m x m tiles of keys that
their neighborhoods touch, so keys are read in place and no halo is copied. Logits by row and by column offset
are made outside, [pixel, row of keys] and [pixel, column of keys], with -1e30 beyond the neighborhood and the image;
a product with a 0/1 matrix spreads them over a tile of keys. The backward pass recomputes the softmax from its
logarithmic sum, once by tile of queries and once by tile of keys.

Heads lie side by side in the last axis, which a TPU pads to 128 lanes: a head of 8 alone would take 16 times its size.

Shapes: B batch, N heads, n heads of a program, Y X tiles of queries, I J tiles of keys (Y + m - 1, X + m - 1), Q S the
b² queries or keys of a tile, K head dim, M = m·b rows or columns of keys that a tile of queries sees.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array

from vit_scaling.ops import kernels
from vit_scaling.ops.relative import MASKED, outside, skew

TILE = 8


class Plan(NamedTuple):
    """What is static about a call."""

    heads: int  # N
    neighbors: int  # m
    program_heads: int  # n: all on a TPU, whose cores run programs one after another; one on a GPU, which needs many
    interpret: bool

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return [(dy, dx) for dy in range(self.neighbors) for dx in range(self.neighbors)]


def local_attention(
    q: Array, k: Array, v: Array, rel_row: Array, rel_col: Array, masked: bool, interpret: bool = False
) -> Array:
    """`ops.local.local_attention` by this kernel; `interpret` runs its program on any device, slowly."""
    B, H, W, N, K = q.shape
    h = rel_row.shape[0] // 2
    m = 1 - (-2 * h // TILE)
    Y, X = -(-H // TILE), -(-W // TILE)
    on_tpu = kernels.platform() == "tpu"
    # Triton multiplies powers of two, 16 at least; zeros change neither logits nor sums.
    padded_K = K if on_tpu else max(16, pl.next_power_of_2(K))

    def tiles(x: Array, before: int, rows: int, columns: int) -> Array:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, 0), (0, padded_K - K))).reshape(B, H, W, N * padded_K)
        after = rows * TILE - H - before, columns * TILE - W - before
        # Negative padding cuts zeros of the halo that no tile of queries reaches.
        x = jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (before, after[0], 0), (before, after[1], 0), (0, 0, 0)))
        return _to_tiles(x)

    row, col = _position(q, rel_row, rel_col, Y, X, m, masked)
    plan = Plan(N, m, N if on_tpu else 1, interpret)
    keys, values = (tiles(x, h, Y + m - 1, X + m - 1) for x in (k, v))
    y = _attend(tiles(q, 0, Y, X), keys, values, row, col, plan)
    y = y.reshape(B, Y, X, TILE, TILE, N, padded_K).swapaxes(2, 3)
    return y.reshape(B, Y * TILE, X * TILE, N, padded_K)[:, :H, :W, :, :K]


def _to_tiles(x: Array) -> Array:
    """[B, H, W, C] to [B, Y, X, Q, C]; the sides are multiples of the tile's."""
    B, H, W, C = x.shape
    x = x.reshape(B, H // TILE, TILE, W // TILE, TILE, C).swapaxes(2, 3)
    return x.reshape(B, H // TILE, W // TILE, TILE * TILE, C)


def _position(q: Array, rel_row: Array, rel_col: Array, Y: int, X: int, m: int, masked: bool) -> tuple[Array, Array]:
    """Returns the logits of each query for the rows and the columns of its m x m tiles: two [B, Y, X, Q, N·M]."""
    B, H, W, N, K = q.shape
    h, half = rel_row.shape[0] // 2, K // 2

    def logits(q_half: Array, table: Array, axis: int, size: int) -> Array:
        """`axis` 0 for rows, 1 for columns."""
        x = jnp.einsum("BHWNK,kNK->BHWNk", q_half, table.astype(q.dtype), preferred_element_type=jnp.float32)
        x = jnp.pad(x, ((0, 0), (0, Y * TILE - H), (0, X * TILE - W), (0, 0), (0, 0)))
        x = _to_tiles(x.reshape(B, Y * TILE, X * TILE, -1)).reshape(B, Y, X, TILE, TILE, N, -1)
        x = skew(jnp.moveaxis(x, 3 + axis, -2), MASKED)
        x = jnp.pad(x, ((0, 0),) * 6 + ((0, m * TILE - x.shape[-1]),), constant_values=MASKED)
        x = jnp.moveaxis(x, -2, 3 + axis)
        if masked:
            mask_GM = outside(range(-h, (Y, X)[axis] * TILE - h, TILE), m * TILE, size, x.dtype)
            x += jnp.expand_dims(mask_GM, (0, 2 - axis, 3, 4, 5))
        return x.reshape(B, Y, X, TILE * TILE, N * m * TILE)

    return logits(q[..., :half], rel_row, 0, H), logits(q[..., half:], rel_col, 1, W)


# --- Arithmetic of one pair of tiles and one head ---------------------------------------------------------------------


def _spread(m: int, d: int, axis: int) -> Array:
    """Returns the [M, S] matrix of 0 and 1 that takes logits by row (axis 0) or column of keys to tile d's keys."""
    shape = (m * TILE, TILE * TILE)
    line = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    key = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    own = key // TILE if axis == 0 else key % TILE
    return (line == d * TILE + own).astype(jnp.float32)


def _logits(q: Array, k: Array, row: Array, col: Array, m: int, dy: int, dx: int) -> Array:
    return (
        kernels.dot(q, k, (1, 1))
        + kernels.dot(row, _spread(m, dy, 0), (1, 0))
        + kernels.dot(col, _spread(m, dx, 1), (1, 0))
    )


# --- Kernels ----------------------------------------------------------------------------------------------------------


def _head(ref: Any, n: int, heads: int) -> Array:
    """Reads head n of a block [Q, heads·C]."""
    width = ref.shape[-1] // heads
    return ref[:, n * width : (n + 1) * width]


def _store(refs: Sequence[Any], heads: Sequence[Sequence[Array]]) -> None:
    """Writes [Q, C] arrays of each head side by side; `heads` holds for each head one array a ref."""
    for ref, parts in zip(refs, zip(*heads, strict=True), strict=True):
        joined = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
        ref[...] = joined.astype(ref.dtype)


def _forward_kernel(plan: Plan, *refs: Any) -> None:
    m, pairs, heads = plan.neighbors, plan.pairs, plan.program_heads
    query_refs, rest = refs[:3], refs[3:]
    key_refs, value_refs, outputs = rest[: m * m], rest[m * m : 2 * m * m], rest[2 * m * m :]
    results: list[tuple[Any, ...]] = []
    for n in range(heads):
        q, row, col = (_head(ref, n, heads) for ref in query_refs)
        logits = [_logits(q, _head(k, n, heads), row, col, m, *pair) for k, pair in zip(key_refs, pairs, strict=True)]
        top = functools.reduce(jnp.maximum, [jnp.max(x, axis=1, keepdims=True) for x in logits])
        weights = [jnp.exp(x - top) for x in logits]
        total = sum(jnp.sum(w, axis=1, keepdims=True) for w in weights)
        values = [_head(v, n, heads) for v in value_refs]
        y = sum(kernels.dot(w.astype(v.dtype), v, (1, 0)) for w, v in zip(weights, values, strict=True))
        results.append((y / total, top + jnp.log(total)))
    _store(outputs, results)


def _query_kernel(plan: Plan, *refs: Any) -> None:
    m, pairs, heads = plan.neighbors, plan.pairs, plan.program_heads
    query_refs, rest = refs[:6], refs[6:]
    key_refs, value_refs, outputs = rest[: m * m], rest[m * m : 2 * m * m], rest[2 * m * m :]
    results = []
    for n in range(heads):
        q, row, col, g, log_sum, delta = (_head(ref, n, heads) for ref in query_refs)
        dq, drow, dcol = (jnp.zeros(x.shape, jnp.float32) for x in (q, row, col))
        for k_ref, v_ref, (dy, dx) in zip(key_refs, value_refs, pairs, strict=True):
            k, v = _head(k_ref, n, heads), _head(v_ref, n, heads)
            weights = jnp.exp(_logits(q, k, row, col, m, dy, dx) - log_sum)
            dlogits = weights * (kernels.dot(g, v, (1, 1)) - delta)
            dq += kernels.dot(dlogits.astype(k.dtype), k, (1, 0))
            drow += kernels.dot(dlogits, _spread(m, dy, 0), (1, 1))
            dcol += kernels.dot(dlogits, _spread(m, dx, 1), (1, 1))
        results.append((dq, drow, dcol))
    _store(outputs, results)


def _key_kernel(plan: Plan, rows: int, columns: int, *refs: Any) -> None:
    m, pairs, heads = plan.neighbors, plan.pairs, plan.program_heads
    key_refs, rest = refs[:2], refs[2:]
    groups, outputs = [rest[i * m * m : (i + 1) * m * m] for i in range(6)], rest[6 * m * m :]
    y, x = pl.program_id(2), pl.program_id(3)
    results = []
    for n in range(heads):
        k, v = (_head(ref, n, heads) for ref in key_refs)
        dk, dv = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
        for (dy, dx), query_refs in zip(pairs, zip(*groups, strict=True), strict=True):
            q, row, col, g, log_sum, delta = (_head(ref, n, heads) for ref in query_refs)
            # Beyond the map the tile of queries is a copy of the nearest one (see _seen_by), which counts elsewhere.
            there = (y >= dy) & (y - dy < rows) & (x >= dx) & (x - dx < columns)
            weights = jnp.where(there, jnp.exp(_logits(q, k, row, col, m, dy, dx) - log_sum), 0.0)
            dlogits = weights * (kernels.dot(g, v, (1, 1)) - delta)
            dk += kernels.dot(dlogits.astype(q.dtype), q, (0, 0))
            dv += kernels.dot(weights.astype(g.dtype), g, (0, 0))
        results.append((dk, dv))
    _store(outputs, results)


# --- Calls ------------------------------------------------------------------------------------------------------------


def _same(index: Any) -> Any:
    return index


def _spec(x: Any, plan: Plan, y: Callable = _same, x_: Callable = _same) -> pl.BlockSpec:
    """Of the array [B, rows, columns, Q, N·C], for program (batch, heads, i, j), the n heads of tile (y(i), x_(j))."""
    lanes = x.shape[-1] * plan.program_heads // plan.heads
    return pl.BlockSpec((None, None, None, x.shape[3], lanes), lambda b, head, i, j: (b, y(i), x_(j), 0, head))


def _seen(x: Any, plan: Plan) -> list[pl.BlockSpec]:
    """The tiles of keys that a tile of queries sees."""
    return [_spec(x, plan, lambda i, dy=dy: i + dy, lambda j, dx=dx: j + dx) for dy, dx in plan.pairs]


def _seen_by(x: Any, plan: Plan) -> list[pl.BlockSpec]:
    """The tiles of queries that see a tile of keys; for one beyond the map the nearest, which the kernel ignores."""
    rows, columns = x.shape[1:3]

    def nearest(d: int, size: int) -> Callable:
        return lambda i: jnp.clip(i - d, 0, size - 1)

    return [_spec(x, plan, nearest(dy, rows), nearest(dx, columns)) for dy, dx in plan.pairs]


def _call(
    kernel: Callable, inputs: Iterable[tuple[Array, pl.BlockSpec]], outputs: Sequence[Any], plan: Plan
) -> tuple[Array, ...]:
    B, rows, columns = outputs[0].shape[:3]
    arrays, specs = zip(*inputs, strict=True)
    if kernels.platform() == "tpu":
        params: Any = pltpu.CompilerParams(dimension_semantics=("parallel",) * 4)
    else:
        params = pltriton.CompilerParams(num_warps=4)
    call = pl.pallas_call(
        kernel,
        grid=(B, plan.heads // plan.program_heads, rows, columns),
        in_specs=list(specs),
        out_specs=[_spec(x, plan) for x in outputs],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        compiler_params=params,
        interpret=plan.interpret,
    )
    return tuple(call(*arrays))


def _local_heads(plan: Plan, row: Array) -> Plan:
    """The plan of one device, which may hold some of the heads only."""
    heads = row.shape[-1] // (plan.neighbors * TILE)
    return plan._replace(heads=heads, program_heads=min(plan.program_heads, heads))


def _forward(plan: Plan, q: Array, k: Array, v: Array, row: Array, col: Array) -> tuple[Array, ...]:
    plan = _local_heads(plan, row)
    inputs = [(x, _spec(x, plan)) for x in (q, row, col)]
    inputs += [(x, spec) for x in (k, v) for spec in _seen(x, plan)]
    log_sum = jax.ShapeDtypeStruct((*q.shape[:4], plan.heads), jnp.float32)
    return _call(functools.partial(_forward_kernel, plan), inputs, (q, log_sum), plan)


def _backward(plan: Plan, k: Array, v: Array, *query_side: Array) -> tuple[Array, ...]:
    q, row, col, *_ = query_side
    plan = _local_heads(plan, row)
    inputs = [(x, _spec(x, plan)) for x in query_side]
    inputs += [(x, spec) for x in (k, v) for spec in _seen(x, plan)]
    dq, drow, dcol = _call(functools.partial(_query_kernel, plan), inputs, (q, row, col), plan)
    inputs = [(x, _spec(x, plan)) for x in (k, v)]
    inputs += [(x, spec) for x in query_side for spec in _seen_by(x, plan)]
    dk, dv = _call(functools.partial(_key_kernel, plan, *q.shape[1:3]), inputs, (k, v), plan)
    return dq, dk, dv, drow, dcol


def _per_device(function: Callable, plan: Plan, *args: Array) -> Any:
    return kernels.per_device(functools.partial(function, plan), *args, heads=plan.heads, head_axis=4)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q: Array, k: Array, v: Array, row: Array, col: Array, plan: Plan) -> Array:
    """q [B, Y, X, Q, N·K], k and v [B, I, J, S, N·K], row and col [B, Y, X, Q, N·M], to y [B, Y, X, Q, N·K]."""
    return _attend_forward(q, k, v, row, col, plan)[0]


def _attend_forward(q: Array, k: Array, v: Array, row: Array, col: Array, plan: Plan) -> tuple[Array, Any]:
    y, log_sum = _per_device(_forward, plan, q, k, v, row, col)
    return y, (q, k, v, row, col, y, log_sum)


def _attend_backward(plan: Plan, saved: Any, g: Array) -> tuple[Array, ...]:
    q, k, v, row, col, y, log_sum = saved
    product = g.astype(jnp.float32) * y.astype(jnp.float32)
    delta = jnp.sum(product.reshape(*log_sum.shape, -1), axis=-1)
    return _per_device(_backward, plan, k, v, q, row, col, g, log_sum, delta)


_attend.defvjp(_attend_forward, _attend_backward)

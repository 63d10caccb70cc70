"""Relative positions of two-dimensional attention: the pieces that local, augmented and quadratic attention share.

An offset is key minus query, rows first. Shapes: B batch, H W grid, N heads, K head dim, Q queries and S keys along
one axis, R rows of a relative table.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

# Finite, so that a query whose keys are all masked still has a softmax; beside a real key its exp is exactly 0.
MASKED = -1e30


def accumulator(x: Array) -> jnp.dtype:
    """Returns the dtype for logits and softmax of x: float32, or float64 for float64 inputs."""
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def skew(x_QR: Float[Array, "*batch Q R"], fill: float) -> Float[Array, "*batch Q S"]:
    """Moves row q by q places to the right: out[q, q + r] = x[q, r], `fill` elsewhere; S = Q + R - 1.

    Takes logits by relative offset to logits by absolute key without a gather, which accelerators do badly: pad,
    flatten, cut, fold again (Music Transformer, Huang et al. 2019, section 3.4.1).
    """
    *batch, Q, R = x_QR.shape
    S = Q + R - 1
    x = jnp.pad(x_QR, [(0, 0)] * (len(batch) + 1) + [(0, Q)], constant_values=fill)  # rows of S + 1
    return x.reshape(*batch, Q * (S + 1))[..., : Q * S].reshape(*batch, Q, S)


def outside(starts: Sequence[int], count: int, size: int, dtype: jnp.dtype) -> Float[Array, "G S"]:
    """Returns what masks keys beyond 0..size-1: MASKED there, else 0, for runs of `count` keys from each start."""
    position_GS = jnp.asarray(starts)[:, None] + jnp.arange(count)[None, :]
    return jnp.where((position_GS < 0) | (position_GS >= size), MASKED, 0.0).astype(dtype)


def global_logits(
    q_BHWNK: Float[Array, "B H W N K"],
    rel_row_RK: Float[Array, "two_H_minus_1 K"],
    rel_col_RK: Float[Array, "two_W_minus_1 K"],
) -> Float[Array, "B N H W H W"]:
    """Returns q·rel_row[row offset] + q·rel_col[column offset] for all pairs of a query and a key, in float32.

    Row H - 1 of a table of 2H - 1 rows is offset 0 (Bello et al. 2019, arXiv 1904.09925, section 3.1, equation 3).

    Raises:
        ValueError: a table is not 2 * side - 1 long.
    """
    H, W = q_BHWNK.shape[1:3]
    for axis, side, table_RK in (("row", H, rel_row_RK), ("column", W, rel_col_RK)):
        if table_RK.shape[0] != 2 * side - 1:
            raise ValueError(
                f"the {axis} table has {table_RK.shape[0]} offsets, but a map of {H}x{W} needs {2 * side - 1}: "
                "build the model for this image size, or resize the images"
            )
    dtype = accumulator(q_BHWNK)
    tables = rel_row_RK.astype(q_BHWNK.dtype), rel_col_RK.astype(q_BHWNK.dtype)
    row_BNWHR = jnp.einsum("BHWNK,RK->BNWHR", q_BHWNK, tables[0], preferred_element_type=dtype)
    col_BNHWR = jnp.einsum("BHWNK,RK->BNHWR", q_BHWNK, tables[1], preferred_element_type=dtype)
    row_BNHWS = skew(row_BNWHR, 0.0)[..., H - 1 : 2 * H - 1].swapaxes(2, 3)
    col_BNHWS = skew(col_BNHWR, 0.0)[..., W - 1 : 2 * W - 1]
    return row_BNHWS[..., :, None] + col_BNHWS[..., None, :]


def offsets(queries: int, keys: int) -> Float[Array, "Q S"]:
    """Returns key minus query along one axis whose query 0 stands at key (keys - queries) / 2."""
    return (jnp.arange(keys)[None, :] - jnp.arange(queries)[:, None] - (keys - queries) // 2).astype(jnp.float32)


def quadratic_encoding(
    rows_QS: Float[Array, "H_q H_s"], columns_QS: Float[Array, "W_q W_s"]
) -> Float[Array, "H_q W_q H_s W_s 3"]:
    """Returns (|d|², d_row, d_column) for every offset d (Cordonnier et al. 2020, arXiv 1911.03584, equation 9)."""
    d_row, d_col = jnp.broadcast_arrays(rows_QS[:, None, :, None], columns_QS[None, :, None, :])
    return jnp.stack([jnp.square(d_row) + jnp.square(d_col), d_row, d_col], axis=-1)

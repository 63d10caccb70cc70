"""Relative positions of two-dimensional attention, for local, augmented and quadratic attention.

An offset is key minus query, rows first. Shapes: B batch, H W grid, N heads, K head dim, Q queries and S keys along
one axis, R rows of a relative table.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_scaling import UserError

# Finite, so that a query whose keys are all masked still has a softmax; beside a real key its exp is exactly 0.
MASKED = -1e30


def accumulator(x: Array) -> jnp.dtype:
    """Returns the dtype for logits and softmax of x: float32, or float64 for float64 inputs."""
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def skew(x_QR: Float[Array, "*batch Q R"], fill: float) -> Float[Array, "*batch Q S"]:
    """Moves row q by q places to the right: out[q, q + r] = x[q, r], `fill` elsewhere; S = Q + R - 1.

    Turns logits by relative offset into logits by absolute key without a gather, which is slow on accelerators: pad,
    flatten, cut, reshape (Music Transformer, Huang et al. 2019, section 3.4.1).
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
    q_row_BHWNK: Float[Array, "B H W N K"],
    q_col_BHWNK: Float[Array, "B H W N K"],
    rel_row_RK: Float[Array, "two_H_minus_1 K"],
    rel_col_RK: Float[Array, "two_W_minus_1 K"],
) -> Float[Array, "B N H W H W"]:
    """Returns q_row·rel_row[row offset] + q_col·rel_col[column offset] for all pairs of query and key, in float32.

    Row H - 1 of a table of 2H - 1 rows is offset 0 (Bello et al. 2019, arXiv 1904.09925, section 3.1, equation 3;
    there both queries are the whole head).

    Raises:
        UserError: a table is not 2 * side - 1 long.
    """
    _, H, W, _, _ = q_row_BHWNK.shape
    for axis, side, table_RK in (("row", H, rel_row_RK), ("column", W, rel_col_RK)):
        if table_RK.shape[0] != 2 * side - 1:
            raise UserError(
                f"the {axis} table has {table_RK.shape[0]} offsets, but a map of {H}x{W} needs {2 * side - 1}: "
                "build the model for this image size, or resize the images"
            )
    dtype = accumulator(q_row_BHWNK)
    rel_row_RK, rel_col_RK = (x.astype(q_row_BHWNK.dtype) for x in (rel_row_RK, rel_col_RK))
    row_BNWHR = jnp.einsum("BHWNK,RK->BNWHR", q_row_BHWNK, rel_row_RK, preferred_element_type=dtype)
    col_BNHWR = jnp.einsum("BHWNK,RK->BNHWR", q_col_BHWNK, rel_col_RK, preferred_element_type=dtype)
    row_BNHWS = skew(row_BNWHR, 0.0)[..., H - 1 : 2 * H - 1].swapaxes(2, 3)
    col_BNHWS = skew(col_BNHWR, 0.0)[..., W - 1 : 2 * W - 1]
    return row_BNHWS[..., :, None] + col_BNHWS[..., None, :]


def offsets(queries: int, keys: int, before: int = 0) -> Float[Array, "Q S"]:
    """Returns key minus query along one axis; `before` keys precede the key at the position of query 0."""
    return (jnp.arange(keys)[None, :] - before - jnp.arange(queries)[:, None]).astype(jnp.float32)


def gaussian_logits(
    centers_N2: Float[Array, "N 2"],
    precision_N22: Float[Array, "N 2 2"],
    rows_QS: Float[Array, "H I"],
    columns_QS: Float[Array, "W J"],
) -> Float[Array, "N H W I J"]:
    """Returns -(d - center)ᵀ precision (d - center) / 2 for each offset d = (rows, columns) and each head.

    Up to a constant that the softmax cancels, the quadratic encoding of Cordonnier et al. 2020 (arXiv 1911.03584,
    section 3.1): v·r with r = (|d|², d_row, d_column) and v = -alpha (1, -2 center), precision 2 alpha. Differences are
    squared here, rather than squares subtracted, which keeps far heads exact in float32.
    """
    rows_QS, columns_QS = rows_QS.astype(centers_N2.dtype), columns_QS.astype(centers_N2.dtype)
    row_NHI = rows_QS[None] - centers_N2[:, 0, None, None]
    col_NWJ = columns_QS[None] - centers_N2[:, 1, None, None]
    a_N, b_N, c_N = (precision_N22[:, i, j, None, None] for i, j in ((0, 0), (0, 1), (1, 1)))
    mixed = (b_N * row_NHI)[:, :, None, :, None] * col_NWJ[:, None, :, None, :]
    squares = (a_N * row_NHI**2)[:, :, None, :, None] + (c_N * col_NWJ**2)[:, None, :, None, :]
    return -0.5 * squares - mixed

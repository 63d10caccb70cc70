"""Local attention: each pixel attends to the k x k pixels around it (Ramachandran et al. 2019, arXiv 1906.05909).

Every back end computes equation 3 of the paper:

    y[i,j] = sum over |a| <= k//2, |c| <= k//2 of softmax(q[i,j]·k[i+a,j+c] + q[i,j]·r[a,c]) v[i+a,j+c]

r[a,c] is the row embedding of a (first half of the head) followed by the column embedding of c. Logits are not divided
by sqrt(K) unless `scale` says so. Pixels outside the image are masked by default. The softmax is float32 for 16-bit
inputs; the result has the dtype of v.

Shapes: B batch, H W map, N heads, K head dim, k kernel size, h halo (k // 2), b block side, L side of a block with its
halo (b + 2h), Y X rows and columns of blocks.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_scaling import UserError
from vit_scaling.ops import kernels
from vit_scaling.ops.relative import MASKED, accumulator, outside, skew

BACKENDS = ("blocks", "shifts", "pallas")
PALLAS_PLATFORMS = ("tpu", "gpu")
BORDERS = ("mask", "zero")


def local_attention(
    q: Float[Array, "B H W N K"],
    k: Float[Array, "B H W N K"],
    v: Float[Array, "B H W N K"],
    rel_row: Float[Array, "k N half_K"],
    rel_col: Float[Array, "k N half_K"],
    *,
    kernel_size: int,
    backend: str = "blocks",
    border: str = "mask",
    scale: float = 1.0,
    block: int | None = None,
) -> Float[Array, "B H W N K"]:
    """Attends from each pixel to its kernel_size x kernel_size neighborhood (SASA, section 3.1).

    Args:
        q, k, v: queries, keys and values of one dtype.
        rel_row, rel_col: embeddings of the row and the column offset -h..h, for the first and second half of a head.
        kernel_size: odd side of the neighborhood, in pixels.
        backend: how it is computed. "blocks": square blocks of queries against their block of keys with a halo, one
            row of blocks at a time (the default; fastest by measurement, see docs/local_attention.md). "shifts": one
            shifted copy for each neighbor. "pallas": a fused kernel for TPU and GPU that stores no logits.
        border: "mask" (the paper's sets of pixels), or "zero": pixels outside the image are keys and values of zero,
            so they keep the logit q·r and their share of the softmax, as in zero-padded implementations.
        scale: factor on all logits; the paper has none.
        block: side of a block for "blocks"; by default `block_size` chooses.

    Raises:
        UserError: shapes do not fit together, an even kernel, an unknown backend or border, or a backend that the
            device cannot run.
    """
    _check(q, k, v, rel_row, rel_col, kernel_size, backend, border, block)
    if scale != 1.0:
        q = q * jnp.asarray(scale, q.dtype)
    masked = border == "mask"
    if backend == "blocks":
        return _blocks(q, k, v, rel_row, rel_col, masked, block or block_size(*q.shape[1:3]))
    if backend == "pallas":
        from vit_scaling.ops import local_pallas  # imports Pallas, which few runs need

        return local_pallas.local_attention(q, k, v, rel_row, rel_col, masked)
    return _shifts(q, k, v, rel_row, rel_col, masked)


def local_weights(
    q: Float[Array, "B H W N K"],
    k: Float[Array, "B H W N K"],
    rel_row: Float[Array, "k N half_K"],
    rel_col: Float[Array, "k N half_K"],
    *,
    kernel_size: int,
    border: str = "mask",
    scale: float = 1.0,
) -> Float[Array, "B H W N k k"]:
    """Returns the softmax of `local_attention`, over the row and column offsets of each neighborhood, in float32."""
    _check(q, k, k, rel_row, rel_col, kernel_size, "shifts", border, None)
    weights = _shift_weights(q * jnp.asarray(scale, q.dtype), k, rel_row, rel_col, border == "mask")
    return weights.reshape(*weights.shape[:-1], kernel_size, kernel_size)


def block_size(height: int, width: int) -> int:
    """Returns the side of a block for "blocks": the fastest forward and backward pass of benchmarks/local_attention.py.

    Small blocks waste less of their halo, large ones have larger matrix products; where whole blocks just fill the
    map, nothing is padded.
    """
    side = max(height, width)
    return min(4 if side > 14 else 7, side)


def _check(
    q: Array,
    k: Array,
    v: Array,
    rel_row: Array,
    rel_col: Array,
    kernel: int,
    backend: str,
    border: str,
    block: int | None,
) -> None:
    if q.ndim != 5:
        raise UserError(f"q has shape {q.shape}; queries, keys and values are [B, H, W, N, K]")
    N, K = q.shape[3:]
    if kernel < 1 or kernel % 2 == 0:
        raise UserError(f"kernel_size is {kernel}; a neighborhood around a pixel needs an odd, positive size")
    if K % 2:
        raise UserError(f"head dim {K} is odd; half of a head carries row offsets, the other half column offsets")
    for name, table in (("rel_row", rel_row), ("rel_col", rel_col)):
        if table.shape != (kernel, N, K // 2):
            raise UserError(
                f"{name} has shape {table.shape}; kernel_size {kernel}, {N} heads and head dim {K} need "
                f"{(kernel, N, K // 2)}"
            )
    if not q.shape == k.shape == v.shape or not q.dtype == k.dtype == v.dtype:
        given = ", ".join(f"{x.shape} {x.dtype}" for x in (q, k, v))
        raise UserError(f"q, k and v must agree in shape and dtype, not {given}")
    if border not in BORDERS:
        raise UserError(f"border is {border!r}; choose one of {', '.join(BORDERS)}")
    if block is not None and block < 1:
        raise UserError(f"block is {block}; it must be a positive number of pixels, or None to choose by map size")
    if backend not in BACKENDS:
        raise UserError(f"backend is {backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend == "pallas" and kernels.platform() not in PALLAS_PLATFORMS:
        raise UserError(
            f"backend 'pallas' runs on {' and '.join(PALLAS_PLATFORMS)}, not on {kernels.platform()}; here "
            "choose one of blocks, shifts"
        )


def _pad(x: Array, h: int) -> Array:
    return jnp.pad(x, ((0, 0), (h, h), (h, h), (0, 0), (0, 0)))


def _relative(q: Array, rel_row: Array, rel_col: Array) -> tuple[Array, Array]:
    """Returns the logits of the row offsets and of the column offsets, each [..., N, k]."""
    half, dtype = q.shape[-1] // 2, accumulator(q)
    row = jnp.einsum("...NK,kNK->...Nk", q[..., :half], rel_row.astype(q.dtype), preferred_element_type=dtype)
    col = jnp.einsum("...NK,kNK->...Nk", q[..., half:], rel_col.astype(q.dtype), preferred_element_type=dtype)
    return row, col


def _mask(starts: range, count: int, size: int, dtype: jnp.dtype, masked: bool) -> Array:
    """Returns `outside`, or zeros where the border is zero-padded: one row for each start."""
    return outside(starts, count, size, dtype) if masked else jnp.zeros((len(starts), count), dtype)


def _with_border(row: Array, col: Array, masked: bool) -> tuple[Array, Array]:
    """Masks in logits by offset, [B, H, W, N, k], the offsets that leave the image."""
    _, H, W, _, size = row.shape
    h = size // 2
    rows_Hk = _mask(range(-h, h + 1), H, H, row.dtype, masked).T
    columns_Wk = _mask(range(-h, h + 1), W, W, col.dtype, masked).T
    return row + rows_Hk[None, :, None, None, :], col + columns_Wk[None, None, :, None, :]


# --- "shifts": one shifted view of keys and values for each of the k² neighbors ------------------------------------


def _shift_weights(q: Array, k: Array, rel_row: Array, rel_col: Array, masked: bool) -> Array:
    _, H, W, _, _ = q.shape
    size, dtype = rel_row.shape[0], accumulator(q)
    h = size // 2
    row, col = _relative(q, rel_row, rel_col)
    row, col = _with_border(row, col, masked)
    keys = _pad(k, h)
    logits = []
    for a in range(size):
        for c in range(size):
            content = jnp.einsum("BHWNK,BHWNK->BHWN", q, keys[:, a : a + H, c : c + W], preferred_element_type=dtype)
            logits.append(content + row[..., a] + col[..., c])
    return jax.nn.softmax(jnp.stack(logits, axis=-1), axis=-1)


def _shifts(q: Array, k: Array, v: Array, rel_row: Array, rel_col: Array, masked: bool) -> Array:
    _, H, W, _, _ = q.shape
    size, dtype = rel_row.shape[0], accumulator(q)
    weights = _shift_weights(q, k, rel_row, rel_col, masked)
    values = _pad(v, size // 2)
    y = jnp.zeros(v.shape, dtype)
    for a in range(size):
        for c in range(size):
            y += weights[..., a * size + c, None] * values[:, a : a + H, c : c + W].astype(dtype)
    return y.astype(v.dtype)


# --- "blocks": b x b queries against the (b + 2h) x (b + 2h) keys around them, as matrix products ---------------------


def _halos(x: Array, axis: int, count: int, b: int, L: int) -> Array:
    """Cuts `axis` into `count` overlapping pieces of L that start b apart: the axis becomes (count, L).

    Concatenates neighboring blocks, whose gradient is slices and sums; a gather's would be a slow scatter.
    """
    neighbors = -(-L // b)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, (count + neighbors - 1) * b - x.shape[axis])
    x = jnp.pad(x, padding)
    x = x.reshape(*x.shape[:axis], count + neighbors - 1, b, *x.shape[axis + 1 :])
    parts = [jax.lax.slice_in_dim(x, i, i + count, axis=axis) for i in range(neighbors)]
    return jax.lax.slice_in_dim(jnp.concatenate(parts, axis=axis + 1), 0, L, axis=axis + 1)


def _blocks(q: Array, k: Array, v: Array, rel_row: Array, rel_col: Array, masked: bool, b: int) -> Array:
    """Softmax over all (b + 2h)² keys of a block, those outside a query's own k x k at -1e30.

    The mask of the neighborhood needs no array of its own: `skew` fills every position beyond the k offsets with it.
    """
    B, H, W, N, K = q.shape
    size, dtype = rel_row.shape[0], accumulator(q)
    h = size // 2
    L = b + 2 * h
    Y, X = -(-H // b), -(-W // b)
    q = jnp.pad(q, ((0, 0), (0, Y * b - H), (0, X * b - W), (0, 0), (0, 0)))
    q_YBbWNK = q.reshape(B, Y, b, X * b, N, K).swapaxes(0, 1)
    k_YBLWNK, v_YBLWNK = (_halos(_pad(x, h), 1, Y, b, L).swapaxes(0, 1) for x in (k, v))
    rows_YL = _mask(range(-h, Y * b - h, b), L, H, dtype, masked)
    columns_XL = _mask(range(-h, X * b - h, b), L, W, dtype, masked)

    # One row of blocks at a time, recomputed in the backward pass: logits of the whole map never exist at once.
    @jax.checkpoint
    def row_of_blocks(strip: tuple[Array, Array, Array, Array]) -> Array:
        q_BbWNK, k_BLWNK, v_BLWNK, rows_L = strip
        q_BXNbbK = q_BbWNK.reshape(B, b, X, b, N, K).transpose(0, 2, 4, 1, 3, 5)
        k_BXNSK, v_BXNSK = (
            _halos(x, 2, X, b, L).transpose(0, 2, 4, 1, 3, 5).reshape(B, X, N, L * L, K) for x in (k_BLWNK, v_BLWNK)
        )
        row_BXNbbk, col_BXNbbk = (
            x.transpose(0, 2, 4, 1, 3, 5) for x in _relative(q_BbWNK.reshape(B, b, X, b, N, K), rel_row, rel_col)
        )
        row_BXNbbL = skew(row_BXNbbk.swapaxes(3, 4), MASKED).swapaxes(3, 4) + rows_L[None, None, None, None, None]
        col_BXNbbL = skew(col_BXNbbk, MASKED) + columns_XL[None, :, None, None, None]
        q_BXNQK = q_BXNbbK.reshape(B, X, N, b * b, K)
        logits = jnp.einsum("BXNQK,BXNSK->BXNQS", q_BXNQK, k_BXNSK, preferred_element_type=dtype)
        position = (row_BXNbbL[..., :, None] + col_BXNbbL[..., None, :]).reshape(logits.shape)
        weights = jax.nn.softmax(logits + position, axis=-1).astype(v.dtype)
        y_BXNQK = jnp.einsum("BXNQS,BXNSK->BXNQK", weights, v_BXNSK, preferred_element_type=dtype).astype(v.dtype)
        return y_BXNQK.reshape(B, X, N, b, b, K).transpose(0, 3, 1, 4, 2, 5).reshape(B, b, X * b, N, K)

    y_YBbWNK = jax.lax.map(row_of_blocks, (q_YBbWNK, k_YBLWNK, v_YBLWNK, rows_YL))
    return y_YBbWNK.swapaxes(0, 1).reshape(B, Y * b, X * b, N, K)[:, :H, :W]

"""Windows of an image, their attention and their relative positions: Swin V1 (arXiv 2103.14030) and V2 (2111.09883).

Everything that depends on sizes alone (region numbers, index tables, coordinates) is NumPy, made while tracing:
constants of the program, never parameters.

Shapes: B batch, H W grid, G windows, n tokens of a window (window²), N heads, K head dim, D width,
R rows of a bias table ((2·window - 1)²). A window is a square, its side counted in tokens; windows and their
tokens are in row-major order.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vit_scaling import UserError
from vit_scaling.ops import kernels

# The published code adds this to the logits of masked pairs, not minus infinity; published weights depend on it.
MASKED = -100.0
# The kernel keeps a few tiles of 64 x 64 float32 numbers in the registers of a program; of 256 x 256 none would fit.
KERNEL_WINDOW = 8
# Triton multiplies powers of two, 16 at least.
KERNEL_HEAD_DIMS = (16, 32, 64, 128)


RULES = ("official", "timm")


def window_and_shift(height: int, width: int, window: int, rule: str = "official") -> tuple[int, int]:
    """Returns the window that fits a grid of height x width tokens, and the shift of the odd blocks.

    "official": a grid with a side no longer than the window has windows of that side and no shift, as in the published
    code and transformers. "timm": a side no longer than the window is not shifted, whatever the other is (timm 1.0,
    swin_transformer.py, `_calc_window_shift`). Both agree on grids whose sides are both longer, or equal.

    Raises:
        UserError: timm would take windows that are no squares.
    """
    if rule == "official":
        return (min(height, width), 0) if min(height, width) <= window else (window, window // 2)
    fitted = {min(side, window) for side in (height, width)}
    if len(fitted) > 1:
        raise UserError(
            f"on a grid of {height}x{width} tokens timm has windows of {min(height, window)}x{min(width, window)}, and "
            f"models here have square ones: take another image size, or model.shift_rule 'official'"
        )
    return fitted.pop(), window // 2 if max(height, width) > window else 0


def rules_differ(height: int, width: int, window: int) -> bool:
    """Returns whether the rules give a grid other windows or shifts."""
    one_window = height != width and min(height, width) <= window
    return one_window or any(side > window and side % window for side in (height, width))


def _sides(height: int, width: int, window: int, shift: int, rule: str) -> tuple[int, int]:
    """Returns by how many rows and columns a grid is shifted."""
    if rule == "official":
        return shift, shift
    return shift if height > window else 0, shift if width > window else 0


def split(
    x_BHWD: Float[Array, "B H W D"], window: int, shift: int = 0, rule: str = "official"
) -> Float[Array, "B G n D"]:
    """Returns the windows of a grid that was cyclically shifted by (-shift, -shift).

    Any height and width: the grid is padded with zeros at the bottom and right to whole windows. By the "official" rule
    it is *then* rolled, as in the published detection code, torchvision and transformers; "timm" rolls, then pads. So
    padded tokens are keys like any other, of value zero before the projections; like the published code, only the
    regions of a shifted block keep them from some of the real tokens.
    """
    B, H, W, D = x_BHWD.shape
    rows, columns = -(-H // window), -(-W // window)
    down, right = _sides(H, W, window, shift, rule)
    padding = ((0, 0), (0, -H % window), (0, -W % window), (0, 0))
    if shift and rule == "timm":
        x_BHWD = jnp.roll(x_BHWD, (-down, -right), axis=(1, 2))
    x_BHWD = jnp.pad(x_BHWD, padding) if any(after for _, after in padding) else x_BHWD
    if shift and rule == "official":
        x_BHWD = jnp.roll(x_BHWD, (-down, -right), axis=(1, 2))
    x = x_BHWD.reshape(B, rows, window, columns, window, D)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, rows * columns, window * window, D)


def join(
    x_BGnD: Float[Array, "B G n D"], height: int, width: int, shift: int = 0, rule: str = "official"
) -> Float[Array, "B H W D"]:
    """Returns the grid of height x width tokens of which `split` made these windows: unshifted, padding removed."""
    B, _, n, D = x_BGnD.shape
    window = round(n**0.5)
    rows, columns = -(-height // window), -(-width // window)
    down, right = _sides(height, width, window, shift, rule)
    x = x_BGnD.reshape(B, rows, columns, window, window, D).transpose(0, 1, 3, 2, 4, 5)
    x_BHWD = x.reshape(B, rows * window, columns * window, D)
    x_BHWD = x_BHWD[:, :height, :width] if rule == "timm" else x_BHWD
    x_BHWD = jnp.roll(x_BHWD, (down, right), axis=(1, 2)) if shift else x_BHWD
    return x_BHWD[:, :height, :width]


def regions(height: int, width: int, window: int, shift: int, rule: str = "official") -> Int[np.ndarray, "G n"]:
    """Returns for each token of the shifted windows the number, 0 to 8, of the image region it came from.

    After the roll the last window of a row or column holds pieces that are not adjacent in the image. Tokens attend to
    each other where their numbers agree (V1 section 3.2, "efficient batch computation"). timm counts the regions from
    the padded end, too, where its own order puts the pieces elsewhere.
    """
    down, right = _sides(height, width, window, shift, rule)

    def part(length: int, shift: int) -> Int[np.ndarray, " padded"]:
        padded = -(-length // window) * window
        return np.searchsorted([padded - window, padded - shift], np.arange(padded), side="right")

    return tile((3 * part(height, down)[:, None] + part(width, right)[None, :]).astype(np.int32), window)


def places(height: int, width: int, window: int, shift: int, rule: str = "official") -> Int[np.ndarray, "G n"]:
    """Returns which token of the grid, counted row by row, stands where in the shifted windows; -1 is padding."""
    padding = (0, -height % window), (0, -width % window)
    moved = tuple(-side for side in _sides(height, width, window, shift, rule))
    place_HW = np.arange(height * width, dtype=np.int32).reshape(height, width)
    place_HW = np.roll(place_HW, moved, axis=(0, 1)) if rule == "timm" else place_HW
    place_HW = np.pad(place_HW, padding, constant_values=-1)
    return tile(place_HW if rule == "timm" else np.roll(place_HW, moved, axis=(0, 1)), window)


def tile(grid_HW: Int[np.ndarray, "H W"], window: int) -> Int[np.ndarray, "G n"]:
    """Returns the windows of a grid of numbers that they fill."""
    rows, columns = grid_HW.shape[0] // window, grid_HW.shape[1] // window
    return grid_HW.reshape(rows, window, columns, window).transpose(0, 2, 1, 3).reshape(-1, window * window)


def masked_pairs(regions_Gn: Int[np.ndarray, "G n"]) -> Bool[Array, "G n n"]:
    """Returns which pairs of a query and a key come from different regions, so the query must not attend to the key.

    Computed from the numbers inside the program, where XLA fuses it into the softmax: no mask is ever stored.
    """
    numbers_Gn = jnp.asarray(regions_Gn)
    return numbers_Gn[:, :, None] != numbers_Gn[:, None, :]


def window_attention(
    q_BGnNK: Float[Array, "B G n N K"],
    k_BGnNK: Float[Array, "B G n N K"],
    v_BGnNK: Float[Array, "B G n N K"],
    bias_Nnn: Float[Array, "N n n"],
    regions_Gn: Int[np.ndarray, "G n"] | None = None,
) -> tuple[Float[Array, "B G n N K"], Float[Array, "B G N n n"]]:
    """Returns softmax(q k^T + bias + mask) v within each window, and the attention weights.

    The scale belongs to q. Logits, bias and softmax are float32, whatever the inputs are; weights and result are
    of v's type. `regions_Gn`: None in unshifted blocks.
    """
    logits_BGNnn = jnp.einsum("BGqNK,BGkNK->BGNqk", q_BGnNK, k_BGnNK, preferred_element_type=jnp.float32)
    logits_BGNnn += bias_Nnn[None, None].astype(jnp.float32)
    if regions_Gn is not None:
        mask_G1nn = masked_pairs(regions_Gn)[:, None]
        logits_BGNnn += jnp.where(mask_G1nn, MASKED, 0.0)[None].astype(jnp.float32)
    weights_BGNnn = jax.nn.softmax(logits_BGNnn, axis=-1).astype(v_BGnNK.dtype)
    # In this order of axes the product takes a CPU half the time of the einsum (see ops/attention.py).
    return jnp.swapaxes(weights_BGNnn @ jnp.swapaxes(v_BGnNK, 2, 3), 2, 3), weights_BGNnn


def fits_kernel(height: int, width: int, window: int, head_dim: int, dtype: jnp.dtype) -> bool:
    """Returns whether `grid_attention` runs: on an NVIDIA GPU in half precision, where the window divides the grid.

    On another GPU a warning says once that it does not.
    """
    return (
        window <= KERNEL_WINDOW
        and head_dim in KERNEL_HEAD_DIMS
        and height % window == 0
        and width % window == 0
        and kernels.runs_on_gpu("window attention", dtype)
    )


def grid_attention(
    q_BHWNK: Float[Array, "B H W N K"],
    k_BHWNK: Float[Array, "B H W N K"],
    v_BHWNK: Float[Array, "B H W N K"],
    bias_Nnn: Float[Array, "N n n"],
    window: int,
    shift: int = 0,
    rule: str = "official",
) -> Float[Array, "B H W N K"]:
    """Returns the result of `split`, `window_attention` and `join` by a fused kernel; see `fits_kernel`."""
    from vit_scaling.ops import windows_pallas  # imports Pallas, which few runs need

    height, width = q_BHWNK.shape[1:3]
    sides = _sides(height, width, window, shift, rule)
    return windows_pallas.window_attention(q_BHWNK, k_BHWNK, v_BHWNK, bias_Nnn, window, sides, MASKED)


def unit(x: Float[Array, "*batch K"]) -> Float[Array, "*batch K"]:
    """Returns vectors of length one, in float32, for cosine attention (V2 section 3.2).

    A vector shorter than 1e-12 has no direction: it becomes zero and passes no gradient (dividing it by 1e-12, as
    usual, sends one of 1e12 to the tokens of an empty image region).
    """
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    directed = square > 1e-24
    return jnp.where(directed, x * jax.lax.rsqrt(jnp.where(directed, square, 1.0)), 0.0)


def relative_index(window: int) -> Int[np.ndarray, "n n"]:
    """Returns the row of the bias table for each query (first axis) and key: their offset, query minus key.

    Rows of the table go by (dy + window - 1)·(2·window - 1) + dx + window - 1 (V1 section 3.2).
    """
    y, x = np.divmod(np.arange(window * window), window)
    dy, dx = y[:, None] - y[None, :], x[:, None] - x[None, :]
    return ((dy + window - 1) * (2 * window - 1) + dx + window - 1).astype(np.int32)


def table_window(rows: int) -> int:
    """Returns the window of a bias table of that many rows.

    Raises:
        UserError: no window has that many.
    """
    window = (round(rows**0.5) + 1) // 2
    if (2 * window - 1) ** 2 != rows:
        raise UserError(f"a relative position table has (2·window - 1)² rows, and {rows} is not such a number")
    return window


def relative_bias(table_RN: Float[Array, "R N"], window: int) -> Float[Array, "N n n"]:
    """Returns the float32 bias of each head, query and key from a table of this window or of a larger one.

    A smaller window's offsets are the middle of a larger window's.
    """
    whole, side, heads = table_window(table_RN.shape[0]), 2 * window - 1, table_RN.shape[1]
    if whole != window:
        grid = table_RN.reshape(2 * whole - 1, 2 * whole - 1, heads)
        grid = grid[whole - window : whole + window - 1, whole - window : whole + window - 1]
        table_RN = grid.reshape(side * side, heads)
    return table_RN.astype(jnp.float32).T[:, relative_index(window)]


def log_coordinates(window: int, pretrained_window: int | None = None) -> Float[np.ndarray, "R 2"]:
    """Returns the offsets, in the order of the table's rows, on V2's logarithmic scale (V2 section 3.3, eq. 4).

    sign(t)·log2(1 + |t|) / log2(8) with t = 8·offset / (w - 1) and w the window the weights were trained with:
    the normalization of the published code, which its checkpoints need. `pretrained_window`: None for this window.
    """
    offsets = np.arange(1 - window, window, dtype=np.float64)
    t = 8 * offsets / max((pretrained_window or window) - 1, 1)
    scaled = np.sign(t) * np.log2(1 + np.abs(t)) / np.log2(8)
    dy, dx = np.meshgrid(scaled, scaled, indexing="ij")
    return np.stack([dy, dx], axis=-1).reshape(-1, 2).astype(np.float32)


def cubic_weights(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Returns the matrix that resamples `old` points to `new` ones by cubic convolution (a = -0.75).

    Half-pixel centers, edges repeated, no antialiasing: what published checkpoints of Swin are
    resized with.
    """
    a = -0.75
    center = (np.arange(new) + 0.5) * old / new - 0.5
    taps = np.floor(center).astype(int)[:, None] + np.arange(-1, 3)
    d = np.abs(center[:, None] - taps)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    weights = np.zeros((new, old))
    np.add.at(weights, (np.arange(new)[:, None], np.clip(taps, 0, old - 1)), np.where(d <= 1, near, far))
    return weights


def resize_table(table_RN: Float[np.ndarray, "R N"], window: int) -> Float[np.ndarray, "S N"]:
    """Returns a bias table stretched over the offsets of another window, as the official loader does.

    Raises:
        UserError: the rows belong to no window.
    """
    old, heads = table_window(table_RN.shape[0]), table_RN.shape[1]
    if old == window:
        return table_RN
    grid = np.asarray(table_RN, np.float64).reshape(2 * old - 1, 2 * old - 1, heads)
    weights = cubic_weights(2 * old - 1, 2 * window - 1)
    resized = np.einsum("ay,bx,yxN->abN", weights, weights, grid)
    return resized.reshape(-1, heads).astype(table_RN.dtype)

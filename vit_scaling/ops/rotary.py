"""Rotary positions on a grid of patches: axial 2-D RoPE in the forms of DINOv3 (arXiv 2508.10104) and ViT-5.

Queries and keys are rotated by angles that depend on where their patch lies, so their dot product depends on the
difference of positions only (RoFormer, Su et al. 2021, arXiv 2104.09864, section 3.2).

Shapes: B batch, L tokens, N heads, K head dim, A angles of a token (K / 2).
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_scaling import UserError


def axial_angles(
    rows: int,
    columns: int,
    head_dim: int,
    base: float = 100.0,
    shift: Float[Array, "2"] | None = None,
    scale: Float[Array, "2"] | None = None,
) -> Float[Array, "L A"]:
    """Returns the angle of each pair of dimensions for each patch, row by row, in radians.

    Patch centers are scaled to (-1, 1) along each axis, whatever the size of the grid, so the longest wavelength spans
    the image. The first half of the angles belongs to the row, the second to the column; each half is 2π times the
    coordinate times base^(-4i / head_dim), i = 0 ... head_dim / 4 - 1.

    Args:
        rows: of the grid.
        columns: of the grid.
        head_dim: dimensions of a head.
        base: ratio of the longest wavelength to the shortest.
        shift: what is added to the coordinates, for rows and for columns.
        scale: what they are then multiplied with, for rows and for columns.

    Raises:
        UserError: the head dim is not a multiple of 4.
    """
    if head_dim % 4:
        raise UserError(f"rotary positions need a head dim that is a multiple of 4, not {head_dim}")
    y, x = ((2 * jnp.arange(side, dtype=jnp.float32) + 1) / side - 1 for side in (rows, columns))
    if shift is not None:
        y, x = y + shift[0], x + shift[1]
    if scale is not None:
        y, x = y * scale[0], x * scale[1]
    return 2 * math.pi * _outer(y, x, head_dim, base)


def index_angles(
    grid: tuple[int, int], head_dim: int, *, base: float, trained: tuple[int, int] | None = None
) -> Float[Array, "L A"]:
    """Returns the angles of ViT-5 (arXiv 2602.08071 and its code), whose coordinates count patches from 0.

    Args:
        grid: rows and columns of the patches.
        head_dim: a multiple of 4.
        base: ratio of the longest wavelength to the shortest, about.
        trained: the grid whose coordinates a grid of another size spans; its own by default.
    """
    sides = zip(grid, trained or grid, strict=True)
    y, x = (jnp.arange(side, dtype=jnp.float32) * (full / side) for side, full in sides)
    return _outer(y, x, head_dim, base)


def _outer(y: Array, x: Array, head_dim: int, base: float) -> Float[Array, "L A"]:
    frequency = base ** (-4 * jnp.arange(head_dim // 4, dtype=jnp.float32) / head_dim)
    y_L, x_L = (axis.reshape(-1) for axis in jnp.meshgrid(y, x, indexing="ij"))
    return jnp.concatenate([jnp.outer(y_L, frequency), jnp.outer(x_L, frequency)], axis=1)


def rotate(x_BLNK: Float[Array, "B L N K"], angles_LA: Float[Array, "*B L A"]) -> Float[Array, "B L N K"]:
    """Rotates dimensions (i, i + K / 2) of every head by angle i of its token, in float32; the dtype stays x's.

    The images share the angles, or each has its own. An angle of zero leaves a token as it is.
    """
    first, second = jnp.split(x_BLNK.astype(jnp.float32), 2, axis=-1)
    angles_BL1A = angles_LA.reshape(-1, angles_LA.shape[-2], 1, angles_LA.shape[-1])
    cos, sin = jnp.cos(angles_BL1A), jnp.sin(angles_BL1A)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BLNK.dtype)

"""Patch kernels and positions for patches of another size (FlexiViT, Beyer et al. 2023, arXiv 2212.08013).

Shapes: R C rows and columns of a patch, D width, L tokens.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def linear_weights(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Returns the matrix that resamples `old` points to `new` ones linearly: half-pixel centres, edges repeated."""
    centre = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    left = np.minimum(np.floor(centre).astype(int), max(old - 2, 0))
    weights = np.zeros((new, old))
    rows = np.arange(new)
    weights[rows, left] += 1 - (centre - left)
    weights[rows, np.minimum(left + 1, old - 1)] += centre - left
    return weights


@functools.lru_cache(maxsize=64)
def kernel_weights(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Returns the matrix that resamples one axis of a patch kernel, the pseudo-inverse of the transposed resizing.

    Tokens of resized patches are then nearest to the old kernel's tokens of the patches, and equal to them where the
    new patch is larger (section 3.4). Rows and columns are apart, as bilinear resizing is.
    """
    return np.linalg.pinv(linear_weights(old, new).T)


def resize_kernel(kernel: Float[Array, "R C 3 D"], patch: tuple[int, int]) -> Float[Array, "R2 C2 3 D"]:
    """Returns a patch kernel for patches of another height and width; its own size leaves it as it is."""
    if kernel.shape[:2] == patch:
        return kernel
    rows, columns = (jnp.asarray(kernel_weights(a, b), kernel.dtype) for a, b in zip(kernel.shape, patch, strict=False))
    return jnp.einsum("ar,bc,rcxD->abxD", rows, columns, kernel, precision="highest")


def resize_positions(
    positions_LD: Float[Array, "L D"], old: tuple[int, int], new: tuple[int, int]
) -> Float[Array, "new_L D"]:
    """Returns learned positions of a grid for another one: bilinear with antialiasing, as the paper's code."""
    if old == new:
        return positions_LD
    width = positions_LD.shape[1]
    return jax.image.resize(positions_LD.reshape(*old, width), (*new, width), "linear").reshape(-1, width)

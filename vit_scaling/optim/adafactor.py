"""The modified Adafactor of Scaling Vision Transformers (arXiv 2106.04560, section 3.4 and appendix B).

Adafactor (arXiv 1804.04235) keeps the second moment of a matrix as its row and column means. The modifications:
a first moment in bfloat16, no scaling of the update by the norm of the weights, and a second-moment decay that is
capped instead of tending to one. There is no clipping of the update, no relative step and no bias correction of the
first moment, so the first update is 0.1 times the sign-like one.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from vit_scaling.names import stacked_dims

Tree = Any


class AdafactorState(NamedTuple):
    """Statistics of every parameter, in trees of the parameters' structure.

    `row` and `col` have the rank of their parameter, with length one on the axis that was averaged away, so that
    a parameter's sharding fits them too. A leaf that does not apply is None: a parameter has `row` and `col`, or it
    has `full`.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # hides tuple.count, as every optax state does
    row: Tree
    col: Tree
    full: Tree
    momentum: Tree


class _Leaf(NamedTuple):
    """The state of one parameter, and its update."""

    row: Array | None
    col: Array | None
    full: Array | None
    momentum: Array
    update: Array | None = None


def factored_axes(path: str, shape: tuple[int, ...], min_dim_size_to_factor: int = 32) -> tuple[int, int] | None:
    """Returns the axes (second largest, largest) that the second moment is factored over, or None.

    Axes over stacked layers (see vit_scaling.names) neither count nor are averaged: every layer keeps its own
    statistics, and stacking does not change which parameters are factored.
    """
    first = stacked_dims(path)
    if len(shape) - first < 2:
        return None
    *_, small, large = (int(axis) + first for axis in np.argsort(shape[first:], kind="stable"))
    return (small, large) if shape[small] >= min_dim_size_to_factor else None


def newest_weight(count: Int[Array, ""], decay_rate: float, cap: float) -> Float[Array, ""]:
    """Returns 1 - beta2, the weight of the newest squared gradient at update t = count + 1.

    beta2 = min(cap, 1 - t^-decay_rate): zero at the first update, the cap from about t = 5,600 on. Its complement is
    computed directly because 1 - 0.999 in float32 is wrong by one part in 77,000.
    """
    return jnp.maximum(1.0 - cap, (count.astype(jnp.float32) + 1.0) ** -decay_rate)


def scale_by_adafactor(
    *,
    min_dim_size_to_factor: int = 32,
    decay_rate: float = 0.8,
    beta2_cap: float = 0.999,
    momentum: float = 0.9,
    momentum_dtype: Any = jnp.bfloat16,
    eps: float = 1e-30,
) -> optax.GradientTransformation:
    """Scales gradients as the modified Adafactor of Scaling ViT does.

    Args:
        min_dim_size_to_factor: a parameter is factored if its two largest axes have at least this length.
        decay_rate: exponent of the second moment's decay, 1 - t^-decay_rate.
        beta2_cap: upper limit of that decay. Lower it (0.95) against instabilities.
        momentum: decay of the first moment, an average of the scaled gradients.
        momentum_dtype: type in which the first moment is kept; arithmetic is in float32.
        eps: added to the squared gradient.

    Returns:
        An optax transformation of any tree of arrays. Nested dicts may hold layers stacked under the key "blocks".
    """

    def axes_of(path: jax.tree_util.KeyPath, shape: tuple[int, ...]) -> tuple[int, int] | None:
        return factored_axes(jax.tree_util.keystr(path, simple=True, separator="/"), shape, min_dim_size_to_factor)

    def init_leaf(path: jax.tree_util.KeyPath, param: Any) -> _Leaf:  # only its shape is read
        axes = axes_of(path, param.shape)
        m = jnp.zeros(param.shape, momentum_dtype)
        if axes is None:
            return _Leaf(None, None, jnp.zeros(param.shape, jnp.float32), m)
        col_axis, row_axis = axes
        row = jnp.zeros(_without(param.shape, row_axis), jnp.float32)
        col = jnp.zeros(_without(param.shape, col_axis), jnp.float32)
        return _Leaf(row, col, None, m)

    def update_leaf(
        path: jax.tree_util.KeyPath,
        grad: Array,
        row: Array | None,
        col: Array | None,
        full: Array | None,
        m: Array,
        *,
        newest: Array,
    ) -> _Leaf:
        u, row, col, full = _second_moment(
            grad.astype(jnp.float32), row, col, full, axes_of(path, grad.shape), newest, eps
        )
        # In float32: bfloat16 arithmetic would round 0.9 * m before the new gradient is added.
        first = momentum * m.astype(jnp.float32) + (1.0 - momentum) * u
        return _Leaf(row, col, full, first.astype(momentum_dtype), first.astype(grad.dtype))

    def init(params: Tree) -> AdafactorState:
        leaves = jax.tree.map_with_path(init_leaf, params)
        return _gather(jnp.zeros((), jnp.int32), leaves)

    def update(grads: Tree, state: AdafactorState, params: Tree = None) -> tuple[Tree, AdafactorState]:
        del params
        newest = newest_weight(state.count, decay_rate, beta2_cap)
        leaves = jax.tree.map_with_path(
            lambda *args: update_leaf(*args, newest=newest), grads, state.row, state.col, state.full, state.momentum
        )
        return _field(leaves, "update"), _gather(optax.safe_increment(state.count), leaves)

    return optax.GradientTransformation(init, update)


def _second_moment(
    g: Array,
    row: Array | None,
    col: Array | None,
    full: Array | None,
    axes: tuple[int, int] | None,
    newest: Array,
    eps: float,
) -> tuple[Array, Array | None, Array | None, Array | None]:
    """Returns the gradient over the root of its second moment, and that moment's new statistics."""
    g2 = jnp.square(g) + eps

    def average(old: Array, new: Array) -> Array:
        return (1.0 - newest) * old + newest * new

    if axes is None:
        assert full is not None
        full = average(full, g2)
        return g * full**-0.5, row, col, full
    assert row is not None
    assert col is not None
    col_axis, row_axis = axes
    row = average(row, jnp.mean(g2, axis=row_axis, keepdims=True))
    col = average(col, jnp.mean(g2, axis=col_axis, keepdims=True))
    row_scale = (row / jnp.mean(row, axis=col_axis, keepdims=True)) ** -0.5
    return g * row_scale * col**-0.5, row, col, full


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], 1, *shape[axis + 1 :])


def _field(leaves: Tree, name: str) -> Tree:
    return jax.tree.map(lambda leaf: getattr(leaf, name), leaves, is_leaf=lambda x: isinstance(x, _Leaf))


def _gather(count: Array, leaves: Tree) -> AdafactorState:
    return AdafactorState(count, *(_field(leaves, name) for name in AdafactorState._fields[1:]))

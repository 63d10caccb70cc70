"""Muon: the momentum of each matrix is orthogonalised by Newton and Schulz's iteration; all else is left to Adam.

K. Jordan's optimizer (github.com/KellerJordan/Muon), with the scale of the update of Liu et al. (arXiv 2502.16982,
section 2.2): 0.2 sqrt(max(fan in, fan out)), the size of an AdamW update, so that AdamW's learning rates and decays
carry over.

Matrices are the kernels of hidden layers. As in the published implementations, query, key and value are one matrix
each, over all heads together, and the patch embedding, the head and all vectors are left to Adam. A convolution is a
matrix from (height, width, input) to output. Stacked layers are orthogonalised each for itself.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from vit_scaling import names

Tree = Any

MOMENTUM = 0.95
STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the odd quintic, steep at zero; singular values end in about 0.7 to 1.2
EPS = 1e-8
RMS = 0.2  # root mean square of AdamW's updates (arXiv 2502.16982)
OUTER = ("embedding", "head", "stem")  # first and last layers: the published implementations leave them to Adam


class MuonState(NamedTuple):
    """Momentum of the matrices, and the state of Adam for all other parameters."""

    count: Int[Array, ""]  # type: ignore[assignment]  # hides tuple.count, as every optax state does
    mu: Tree
    rest: optax.ScaleByAdamState


def reduced_axes(path: str, shape: tuple[int, ...]) -> int | None:
    """Returns how many axes of a layer's kernel are inputs, the others being outputs; None for what Adam updates."""
    parts = path.split("/")
    axes = len(shape) - names.stacked_dims(path)
    if parts[-1] != "kernel" or parts[0] in OUTER or "cpb_mlp" in parts or axes < 2:
        return None
    if axes == 3:  # of attention: (width, heads, head width), and for `out` (heads, head width, width)
        return 2 if parts[-2] == "out" else 1
    return axes - 1


def orthogonalize(x: Float[Array, "... m n"]) -> Float[Array, "... m n"]:
    """Returns a matrix with the singular vectors of `x` and singular values near one, for each of the leading axes."""
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -1, -2) if tall else x
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + EPS)

    def step(_: Any, x: Array) -> Array:
        square = x @ jnp.swapaxes(x, -1, -2)
        return a * x + (b * square + c * square @ square) @ x

    x = jax.lax.fori_loop(0, STEPS, step, x)
    return jnp.swapaxes(x, -1, -2) if tall else x


def scale_by_muon(*, b1: float, b2: float, mu_dtype: Any) -> optax.GradientTransformation:
    """Scales gradients as Muon does; `b1` and `b2` are Adam's, for parameters that are no matrices.

    Args:
        mu_dtype: type in which both momenta are kept; arithmetic is in float32.

    Returns:
        An optax transformation of nested dicts of arrays, which may hold layers stacked under the key "blocks".
    """
    adam = optax.scale_by_adam(b1=b1, b2=b2, mu_dtype=mu_dtype, nesterov=True)  # as optax.contrib.muon

    def split(tree: Tree) -> tuple[Tree, Tree]:
        leaves = names.flatten(tree)
        matrices = {path: leaf for path, leaf in leaves.items() if reduced_axes(path, leaf.shape) is not None}
        others = {path: leaf for path, leaf in leaves.items() if path not in matrices}
        return names.unflatten(matrices), names.unflatten(others)

    def init(params: Tree) -> MuonState:
        matrices, others = split(params)
        mu = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, mu_dtype), matrices)
        return MuonState(jnp.zeros((), jnp.int32), mu, adam.init(others))

    def update(grads: Tree, state: MuonState, params: Tree = None) -> tuple[Tree, MuonState]:
        matrices, others = split(grads)
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: MOMENTUM * m.astype(jnp.float32) + (1 - MOMENTUM) * g, state.mu, matrices)
        # Nesterov: the average as it will be after one more gradient like this one, without bias.
        ahead, now = (1 - MOMENTUM ** (count + more).astype(jnp.float32) for more in (1, 0))
        looked = jax.tree.map(lambda m, g: MOMENTUM * m / ahead + (1 - MOMENTUM) * g / now, mu, matrices)
        scaled = {path: _update(path, leaf) for path, leaf in names.flatten(looked).items()}
        rest, adam_state = adam.update(others, state.rest)
        updates = scaled | names.flatten(rest)
        stored = jax.tree.map(lambda m: m.astype(mu_dtype), mu)
        ordered = names.unflatten({path: updates[path] for path in names.flatten(grads)})
        return ordered, MuonState(count, stored, adam_state)

    return optax.GradientTransformation(init, update)


def _update(path: str, momentum: Array) -> Array:
    inputs = reduced_axes(path, momentum.shape)
    assert inputs is not None
    stacked = names.stacked_dims(path)
    fan_in = math.prod(momentum.shape[stacked : stacked + inputs])
    fan_out = math.prod(momentum.shape[stacked + inputs :])
    matrices = momentum.reshape(*momentum.shape[:stacked], fan_in, fan_out)
    scale = RMS * math.sqrt(max(fan_in, fan_out))
    return (scale * orthogonalize(matrices)).reshape(momentum.shape)

"""Shared layers whose gradients are written by hand or depend on the precision of a sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vit_scaling.models import layers


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_gradients_of_a_norm_are_those_of_its_formula(dtype, tolerance):
    """Of inputs with a large mean, scale and bias, against automatic differentiation of the plain formula."""
    norm = layers.LayerNorm(12, eps=1e-2)
    random = np.random.default_rng(0)
    x, g = (jnp.asarray(random.normal(size=(5, 7, 12)), jnp.float32).astype(dtype) for _ in range(2))
    x = (x.astype(jnp.float32) * jnp.arange(1.0, 6.0)[:, None, None] + 3).astype(dtype)
    graphdef, state = nnx.split(norm)
    state["scale"][...], state["bias"][...] = (jnp.asarray(random.normal(size=12), jnp.float32) for _ in range(2))

    def formula(scale, bias, x):
        mean, variance = jnp.mean(x, -1, keepdims=True), jnp.var(x, -1, keepdims=True)
        return (x - mean) / jnp.sqrt(variance + 1e-2) * scale[None, None] + bias[None, None]

    y, gradient = jax.vjp(lambda state, x: nnx.merge(graphdef, state)(x), state, x)
    assert y.dtype == dtype
    expected, theirs = jax.vjp(formula, state["scale"][...], state["bias"][...], x.astype(jnp.float32))
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=tolerance, atol=tolerance)
    parameters, dx = gradient(g)
    ours = parameters["scale"][...], parameters["bias"][...], dx.astype(jnp.float32)
    for own, other in zip(ours, theirs(g.astype(jnp.float32)), strict=True):
        np.testing.assert_allclose(own, other, rtol=tolerance, atol=tolerance)


def test_the_gradient_of_a_bias_is_summed_in_float32():
    """20,000 tokens: in bfloat16 their sum can only be a multiple of 128."""
    linear = layers.Linear(3, 2, key=jax.random.key(0))
    graphdef, state = nnx.split(linear)
    x = jnp.ones((20_000, 3), jnp.bfloat16)
    y, gradient = jax.vjp(lambda state: nnx.merge(graphdef, state)(x), state)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient(jnp.ones_like(y))[0]["bias"][...], 20_000)

"""Shared layers whose gradients are written by hand or depend on the precision of a sum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vit_scaling.models import layers
from vit_scaling.ops import kernels


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


@pytest.mark.parametrize("inputs", [6, (2, 3)])
def test_maps_side_by_side_are_one_product_on_a_gpu_and_give_the_same(inputs, monkeypatch):
    make = functools.partial(layers.Linear, inputs, (2, 4), bias_init=layers.normal(1))
    maps = [make(key=jax.random.key(i), bias=i != 1) for i in range(3)]
    graphdef, state = nnx.split(maps)
    x = jax.random.normal(jax.random.key(3), (5, 7, *np.atleast_1d(inputs)))

    def outputs_and_gradients():
        return jax.vjp(lambda state, x: layers.side_by_side(nnx.merge(graphdef, state), x), state, x)

    apart, gradients = outputs_and_gradients()
    monkeypatch.setattr(kernels, "platform", lambda: "gpu")
    together, together_gradients = outputs_and_gradients()
    for ours, theirs in zip(together, apart, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    g = [jnp.cos(y) for y in apart]
    for ours, theirs in zip(jax.tree.leaves(together_gradients(g)), jax.tree.leaves(gradients(g)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    jaxpr = jax.make_jaxpr(lambda state, x: layers.side_by_side(nnx.merge(graphdef, state), x))(state, x)
    assert str(jaxpr).count("dot_general[") == 1

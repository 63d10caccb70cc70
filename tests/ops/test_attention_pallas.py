"""The fused kernel for attention of a short sequence against the formula in float64, in networks and on devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops import networks
from vit_scaling.models import vit
from vit_scaling.ops import attention, attention_pallas
from vit_scaling.parallel import mesh as mesh_lib
from vit_scaling.parallel import sharding
from vit_scaling.parallel.mesh import MeshConfig


def arrays(tokens, head_dim, heads=2, dtype="float32", batch=2):
    """Returns queries, keys and values, their biases, and the gradient of the result."""
    random = np.random.default_rng(0)
    qkv = jnp.asarray(random.normal(size=(batch, tokens, heads, 3, head_dim)), dtype)
    bias = jnp.asarray(random.normal(size=(heads, 3, head_dim)), jnp.float32)
    return qkv, bias, jnp.asarray(random.normal(size=(batch, tokens, heads, head_dim)), dtype)


def oracle(qkv, bias, g, keys):
    """The result and its gradients with respect to qkv and bias, in float64."""
    qkv, bias, g = (np.asarray(x, np.float64) for x in (qkv, bias, g))
    q, k, v = np.moveaxis(qkv + bias, 3, 0)
    scale = q.shape[-1] ** -0.5
    logits = np.einsum("blnk,bsnk->bnls", q, k[:, :keys]) * scale
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    y = np.einsum("bnls,bsnk->blnk", weights, v[:, :keys])
    dweights = np.einsum("blnk,bsnk->bnls", g, v[:, :keys])
    dlogits = weights * (dweights - (weights * dweights).sum(-1, keepdims=True)) * scale
    dqkv = np.zeros_like(qkv)
    dqkv[:, :, :, 0] = np.einsum("bnls,bsnk->blnk", dlogits, k[:, :keys])
    dqkv[:, :keys, :, 1] = np.einsum("bnls,blnk->bsnk", dlogits, q)
    dqkv[:, :keys, :, 2] = np.einsum("bnls,blnk->bsnk", weights, g)
    return y, dqkv, dqkv.sum((0, 1))


@functools.partial(jax.jit, static_argnames="keys")
def run(qkv, bias, g, keys):
    attend = functools.partial(attention_pallas.self_attention, keys=keys, interpret=True)
    y, gradients = jax.vjp(attend, qkv, bias)
    return y, *gradients(g)


# (tokens, keys, head dim): one tile of queries and several; tokens that fill the tiles and that do not; keys of which
# the last are padding.
@pytest.mark.parametrize(
    ("tokens", "keys", "head_dim"), [(5, 5, 16), (64, 64, 32), (70, 70, 16), (198, 197, 64), (12, 9, 16)]
)
def test_values_and_gradients(tokens, keys, head_dim):
    qkv, bias, g = arrays(tokens, head_dim)
    for ours, expected in zip(run(qkv, bias, g, keys), oracle(qkv, bias, g, keys), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_as_exact_as_its_operands():
    qkv, bias, g = arrays(70, 32, dtype="bfloat16")
    results = run(qkv, bias, g, 70)
    assert [x.dtype.name for x in results] == ["bfloat16", "bfloat16", "float32"]
    for ours, expected in zip(results, oracle(qkv, bias, g, 70), strict=True):
        ours = np.asarray(ours, np.float64)
        assert np.linalg.norm(ours - expected) < 1e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize("keys", [40, 33])
def test_what_keys_have_in_common_costs_no_precision(keys):
    """Logits of about -900: their exponentials are zero in float32, and sums of such keys cancel in bfloat16."""
    qkv, bias, g = arrays(40, 16, dtype="bfloat16")
    qkv = qkv.at[..., 0, 0].set(60).at[..., 1, 0].set(-60).at[:, keys:, :, 1].set(3000)
    bias = jnp.zeros_like(bias)
    results, expected = run(qkv, bias, g, keys), oracle(qkv, bias, g, keys)
    # The result, and the gradient of queries.
    for ours, exact in ((results[0], expected[0]), (results[1][..., 0, :], expected[1][..., 0, :])):
        assert np.linalg.norm(np.asarray(ours, np.float64) - exact) < 1e-2 * np.linalg.norm(exact)


def test_a_split_batch_and_split_heads():
    mesh = mesh_lib.create(MeshConfig(model=2), jax.devices()[:4])
    qkv, bias, g = arrays(9, 16)
    expected = run(qkv, bias, g, 9)
    placed = [jax.device_put(x, sharding.batch_sharding(mesh)) for x in (qkv, g)]
    with jax.set_mesh(mesh):
        results = run(placed[0], bias, placed[1], 9)
    for ours, theirs in zip(results, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [{"pool": "map"}, {"pool": "token", "key_bias": False}, {"qkv_bias": False}],
    ids=["map", "no bias of keys", "no biases"],
)
def test_a_network_has_the_same_logits_and_gradients(fields, monkeypatch):
    run = networks.logits_and_gradients(vit.ViTConfig(32, 2, 32, 2, (8, 8), **fields), (16, 16))
    expected = run()
    calls, kernel = [], attention_pallas.self_attention
    monkeypatch.setattr(attention, "fits_kernel", lambda *_: True)
    monkeypatch.setattr(attention_pallas, "self_attention", lambda *a: calls.append(a) or kernel(*a, interpret=True))
    # A token of padding, as where cuDNN would run. What it holds must not matter.
    monkeypatch.setattr(attention, "padded_length", lambda tokens, *_: tokens + 1)
    networks.assert_same(run(), expected)
    assert calls


@pytest.mark.filterwarnings("ignore:attention runs as plain XLA operations instead of cuDNN")  # there is none here
@pytest.mark.parametrize(
    ("platform", "side", "fields", "kernels"),
    [
        ("gpu", 64, {}, 2),  # one forward, whose result remat keeps, and one backward
        ("gpu", 64, {"remat": "full"}, 3),
        ("gpu", 64, {"dtype": "float32"}, 0),
        ("gpu", 64, {"qk_norm": True}, 0),
        ("gpu", 64, {"position": "rope"}, 0),
        ("gpu", 64, {"width": 144}, 0),  # heads of 72
        ("gpu", 136, {}, 0),  # 289 tokens
        ("gpu", 32, {}, 0),  # 16 tokens
        ("tpu", 64, {}, 0),
    ],
)
def test_which_networks_lower_to_the_kernel(platform, side, fields, kernels):
    config = vit.ViTConfig(
        **{"width": 128, "depth": 1, "mlp": 64, "heads": 2, "patch": (8, 8), "dtype": "bfloat16"} | fields
    )
    assert networks.lowered_gradient(config, side, platform).count('name = "self_attention_') == kernels

"""The fused kernel of layer norm against the formula in float64, in networks, on several devices, and where it runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops import networks
from vit_scaling.models import layers, swin, vit
from vit_scaling.ops import kernels, norm_pallas
from vit_scaling.parallel import mesh as mesh_lib
from vit_scaling.parallel import sharding
from vit_scaling.parallel.mesh import MeshConfig

EPS = 1e-3


def arrays(shape, dtype="float32"):
    """Returns the input, far from zero, the gradient of the result, scale and bias."""
    random = np.random.default_rng(0)
    x, g = (jnp.asarray(random.normal(size=shape) + 2, dtype) for _ in range(2))
    return x, g, *(jnp.asarray(random.normal(size=shape[-1]), jnp.float32) for _ in range(2))


def oracle(x, g, scale, bias):
    """The result and its gradients with respect to x, scale and bias, in float64."""
    x, g, scale, bias = (np.asarray(a, np.float64) for a in (x, g, scale, bias))
    mean = lambda a: a.mean(-1, keepdims=True)  # noqa: E731
    inverse = 1 / np.sqrt(mean(np.square(x - mean(x))) + EPS)
    y, dy = (x - mean(x)) * inverse, g * scale
    dx = (dy - mean(dy) - y * mean(dy * y)) * inverse
    return y * scale + bias, dx, (g * y).sum((0, 1)), g.sum((0, 1))


@jax.jit
def run(x, g, scale, bias):
    y, gradients = jax.vjp(functools.partial(norm_pallas.layer_norm, eps=EPS, interpret=True), x, scale, bias)
    return y, *gradients(g)


# Widths that fill the columns of a tile and that do not; rows that fill a program's share, that end within a tile, that
# are fewer than a tile has; and a tile of one row.
@pytest.mark.parametrize("shape", [(2, 64, 128), (3, 70, 24), (2, 33, 384), (2, 5, 1000), (1, 3, 4100)])
def test_values_and_gradients(shape):
    inputs = arrays(shape)
    for ours, expected in zip(run(*inputs), oracle(*inputs), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_rounded_once_and_parameters_have_gradients_in_float32():
    inputs = arrays((2, 40, 96), "bfloat16")
    results = run(*inputs)
    assert [x.dtype.name for x in results] == ["bfloat16", "bfloat16", "float32", "float32"]
    for ours, expected, rounding in zip(results, oracle(*inputs), (2**-8, 2**-8, 1e-5, 1e-5), strict=True):
        np.testing.assert_allclose(ours.astype(jnp.float32), expected, rtol=rounding, atol=1e-4)


def test_a_split_batch():
    mesh = mesh_lib.create(MeshConfig(model=2), jax.devices()[:4])
    inputs = arrays((4, 6, 24))
    expected = run(*inputs)
    placed = [jax.device_put(x, sharding.batch_sharding(mesh)) for x in inputs[:2]]
    with jax.set_mesh(mesh):
        results = run(*placed, *inputs[2:])
    for ours, theirs in zip(results, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        vit.ViTConfig(16, 2, 16, 2, (8, 8), qk_norm=True, norm_bias=False),  # norms of heads; norms without a bias
        swin.SwinConfig(width=16, depths=(2, 2), heads=(2, 4), window=2, drop_path=0.0),
    ],
    ids=["vit", "swin"],
)
def test_a_network_has_the_same_logits_and_gradients(config, monkeypatch):
    run = networks.logits_and_gradients(config, (16, 16))
    expected = run()
    calls, kernel = [], norm_pallas.layer_norm
    monkeypatch.setattr(layers.LayerNorm, "_has_kernel", staticmethod(lambda x: x.ndim > 2))
    monkeypatch.setattr(norm_pallas, "layer_norm", lambda *a: calls.append(a) or kernel(*a, interpret=True))
    networks.assert_same(run(), expected)
    assert len(calls) > 3


@pytest.mark.filterwarnings("ignore:attention runs as plain XLA operations")  # there is no cuDNN here
@pytest.mark.parametrize(
    ("platform", "dtype", "forward", "backward"),
    [
        # Two norms of the block and the one after it. Remat runs the block's forward kernels again.
        ("gpu", "bfloat16", 5, 3),
        ("gpu", "float32", 0, 0),
        ("tpu", "bfloat16", 0, 0),
    ],
)
def test_which_networks_lower_to_the_kernel(platform, dtype, forward, backward):
    lowered = networks.lowered_gradient(vit.ViTConfig(64, 1, 64, 2, (8, 8), dtype=dtype), 16, platform)
    names = [lowered.count(f'name = "layer_norm_{way}"') for way in ("forward", "backward")]
    assert names == [forward, backward]


@pytest.mark.parametrize(
    ("shape", "axes", "runs"),
    [
        ((2, 5, 64), {}, True),
        ((2, 5, 64), {"model": 2}, True),
        ((2, 5, 4, 64), {}, True),
        ((2, 5, 4, 64), {"model": 2}, False),  # heads, which this mesh splits: the kernel would gather them
        ((2, 64), {}, False),
        ((2, 5, 8200), {}, False),  # a row does not fit into registers
    ],
)
def test_which_arrays_the_kernel_takes(shape, axes, runs):
    with jax.sharding.use_abstract_mesh(networks.described("gpu", **axes)):
        assert layers.LayerNorm._has_kernel(jnp.zeros(shape, jnp.bfloat16)) == runs


def test_another_gpu_is_said_and_runs_xla(monkeypatch):
    monkeypatch.setattr(kernels, "refused_by_gpu", lambda: "this GPU is not NVIDIA's")
    with (
        jax.sharding.use_abstract_mesh(networks.described("gpu")),
        pytest.warns(UserWarning, match="layer norm runs as plain"),
    ):
        assert not layers.LayerNorm._has_kernel(jnp.zeros((2, 5, 64), jnp.bfloat16))

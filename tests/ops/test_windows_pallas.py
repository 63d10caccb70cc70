"""The fused kernel of window attention against windows that are cut out, attended to and put back."""

import contextlib
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops import networks
from vit_scaling.models import swin
from vit_scaling.ops import windows, windows_pallas
from vit_scaling.parallel import mesh as mesh_lib
from vit_scaling.parallel import sharding
from vit_scaling.parallel.mesh import MeshConfig

# (height, width, window, shift, rule): windows of 16 tokens, which fill a tile, and of 49 and 9, which leave padding;
# one window; and timm's rule, which shifts one side only where the other is no longer than the window.
CASES = [
    (8, 12, 4, 2, "official"),
    (8, 12, 4, 0, "official"),
    (14, 21, 7, 3, "official"),
    (7, 7, 7, 0, "official"),
    (6, 9, 3, 1, "official"),
    (14, 7, 7, 3, "timm"),
]


def arrays(height, width, window, heads=2, batch=2):
    """Returns queries, keys, values, the gradient of the result, and a bias."""
    random = np.random.default_rng(0)
    tokens = random.normal(size=(4, batch, height, width, heads, 16))
    bias = random.normal(size=(heads, window**2, window**2))
    return *(jnp.asarray(x, jnp.float32) for x in tokens), jnp.asarray(bias, jnp.float32)


def cut(q, k, v, bias, window, shift, rule):
    """What the kernel does, by the operations that run elsewhere."""
    _, H, W, N, K = q.shape
    q, k, v = (windows.split(x.reshape(*x.shape[:3], N * K), window, shift, rule) for x in (q, k, v))
    numbers = windows.regions(H, W, window, shift, rule) if shift else None
    y, _ = windows.window_attention(*(x.reshape(*x.shape[:3], N, K) for x in (q, k, v)), bias, numbers)
    return windows.join(y.reshape(*y.shape[:3], N * K), H, W, shift, rule).reshape(-1, H, W, N, K)


@pytest.fixture
def interpreted(monkeypatch):
    """Runs the kernel's program on a CPU, wherever it would run on a GPU."""
    kernel = functools.partial(windows_pallas.window_attention, interpret=True)
    monkeypatch.setattr(windows_pallas, "window_attention", kernel)
    divides = lambda height, width, window, *_: not (height % window or width % window)  # noqa: E731
    monkeypatch.setattr(windows, "fits_kernel", divides)


@pytest.mark.parametrize(("height", "width", "window", "shift", "rule"), CASES)
def test_values_and_gradients(height, width, window, shift, rule, interpreted):
    q, k, v, g, bias = arrays(height, width, window)
    case = {"window": window, "shift": shift, "rule": rule}
    y, gradients = jax.vjp(functools.partial(windows.grid_attention, **case), q, k, v, bias)
    expected, others = jax.vjp(functools.partial(cut, **case), q, k, v, bias)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for name, ours, theirs in zip(("q", "k", "v", "bias"), gradients(g), others(g), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-5, err_msg=name)


def test_very_negative_logits_stay_finite(interpreted):
    """All logits of a window about -1000, as a bias may make them."""
    q, k, v, g, bias = arrays(4, 8, 4)
    y, gradients = jax.vjp(functools.partial(windows.grid_attention, window=4), q, k, v, bias - 1000)
    expected, others = jax.vjp(functools.partial(windows.grid_attention, window=4), q, k, v, bias)
    np.testing.assert_allclose(y, expected, atol=1e-3)
    np.testing.assert_allclose(gradients(g)[0], others(g)[0], atol=1e-3)


def test_a_split_batch_and_split_heads(interpreted):
    """On two by two devices, the gradient of the bias too, which is a sum over the devices' images."""
    mesh = mesh_lib.create(MeshConfig(model=2), jax.devices()[:4])
    q, k, v, g, bias = arrays(6, 9, 3)

    @jax.jit
    def run(q, k, v, g, bias):
        y, gradients = jax.vjp(functools.partial(windows.grid_attention, window=3, shift=1), q, k, v, bias)
        return y, *gradients(g)

    expected = run(q, k, v, g, bias)
    placed = [jax.device_put(x, sharding.batch_sharding(mesh)) for x in (q, k, v, g)]
    with jax.set_mesh(mesh):
        results = run(*placed, bias)
    for ours, theirs in zip(results, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("version", [1, 2])
def test_a_network_has_the_same_logits_and_gradients(version, request):
    config = swin.SwinConfig(version, width=32, depths=(2,), heads=(2,), window=4, drop_path=0.0)
    run = networks.logits_and_gradients(config, (32, 64))
    expected = run()
    request.getfixturevalue("interpreted")
    networks.assert_same(run(), expected)


@pytest.mark.parametrize(
    ("platform", "side", "dtype", "kernels"),
    [
        ("gpu", 64, "bfloat16", 8),  # two stages of two blocks, each with a kernel forward and one backward
        ("gpu", 64, "float32", 0),
        ("gpu", 40, "bfloat16", 0),  # windows of 4 do not divide the grids of 10 and 5
        ("tpu", 64, "bfloat16", 0),
    ],
)
def test_which_networks_lower_to_the_kernel(platform, side, dtype, kernels):
    """Remat keeps the kernel's result, so no forward kernel runs twice."""
    config = swin.SwinConfig(width=32, depths=(2, 2), heads=(2, 4), window=4, dtype=dtype)
    assert networks.lowered_gradient(config, side, platform).count('name = "window_attention_') == kernels


@pytest.mark.parametrize(
    ("capability", "fits"), [("9.0", True), ("8.0", True), ("7.5", False), ("gfx942", False), (None, False)]
)
def test_gpus_that_the_kernel_is_not_made_for_are_said_and_run_xla(capability, fits, monkeypatch):
    """AMD's give an architecture for a compute capability; no bfloat16 before 8.0."""
    device = types.SimpleNamespace(**({} if capability is None else {"compute_capability": capability}))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda backend: [device])
    with contextlib.nullcontext() if fits else pytest.warns(UserWarning, match="instead of a kernel: (this|a) GPU"):
        assert windows.fits_kernel(56, 56, 7, 32, jnp.dtype("bfloat16")) == fits

"""Attention between all tokens: one meaning, and which implementation each platform is given.

The flash kernel runs in interpret mode on the CPU and is compiled for TPUs that are only described; cuDNN's is lowered.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from vit_scaling.ops import attention
from vit_scaling.parallel import mesh as mesh_lib
from vit_scaling.planner import machines


def arrays(queries, keys, dtype="float32", heads=2, head_dim=16):
    random = np.random.default_rng(0)
    shapes = [(2, length, heads, head_dim) for length in (queries, keys, keys)]
    return [jnp.asarray(random.normal(size=shape), dtype) for shape in shapes]


def oracle(q, k, v):
    """The formula in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("blnk,bsnk->bnls", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bnls,bsnk->blnk", weights / weights.sum(-1, keepdims=True), v)


def described(platform):
    """A mesh of one device of a platform, which gives a trace its platform and runs nothing."""
    device = AbstractDevice(device_kind=platform, num_cores=None, platform=platform)
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def zeros(tokens, dtype="bfloat16", keys=None, head_dim=64):
    return (jnp.zeros((2, length, 2, head_dim), dtype) for length in (tokens, keys or tokens))


@pytest.fixture
def cudnn(monkeypatch):
    """JAX as it is where cuDNN is installed."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    attention._refused_by_cudnn.cache_clear()
    yield
    attention._refused_by_cudnn.cache_clear()


def test_plain_attention_is_the_formula():
    q, k, v = arrays(7, 5)
    np.testing.assert_allclose(attention.attention(q, k, v), oracle(q, k, v), atol=1e-6)


@pytest.mark.parametrize(("queries", "keys"), [(128, 256), (130, 200)])
def test_flash_equals_the_formula_with_and_without_padding(queries, keys):
    q, k, v = arrays(queries, keys)
    with pltpu.force_tpu_interpret_mode():
        y, gradients = jax.vjp(attention.flash, q, k, v)
        gradients = gradients(jnp.cos(y))
    plain, expected = jax.vjp(attention.attention, q, k, v)
    np.testing.assert_allclose(y, oracle(q, k, v), atol=2e-6)
    for ours, theirs in zip(gradients, expected(jnp.cos(plain)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize(
    ("platform", "tokens", "dtype", "expected"),
    [
        ("cpu", 2048, "bfloat16", "xla"),
        ("tpu", 1024, "bfloat16", "flash"),
        ("tpu", 1023, "bfloat16", "xla"),
        ("tpu", 1024, "float32", "xla"),
        ("gpu", 197, "bfloat16", "cudnn"),
        ("gpu", 197, "float16", "cudnn"),
        ("gpu", 197, "float32", "xla"),
    ],
)
def test_the_platform_of_the_mesh_decides(platform, tokens, dtype, expected, cudnn):
    with described(platform):
        assert attention.implementation(*zeros(tokens, dtype)) == expected


def test_one_query_over_many_keys_needs_no_flash_kernel():
    with described("tpu"):
        assert attention.implementation(*zeros(1, keys=4096)) == "xla"


def test_one_query_over_many_keys_needs_no_cudnn(cudnn):
    with described("gpu"):
        assert attention.implementation(*zeros(1, keys=196)) == "xla"


def test_a_head_dim_that_cudnn_refuses_is_said_and_runs_as_xla(cudnn):
    with described("gpu"), pytest.warns(UserWarning, match="instead of cuDNN's kernel.*multiple of 8.*got 12"):
        assert attention.implementation(*zeros(197, head_dim=12)) == "xla"


def test_a_missing_cudnn_is_said_once_and_runs_as_xla():
    attention._refused_by_cudnn.cache_clear()
    with described("gpu"), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(3):
            assert attention.implementation(*zeros(197)) == "xla"
    assert ["cuDNN is not detected" in str(warning.message) for warning in seen] == [True]


def test_keys_that_are_padding_count_for_nothing():
    """Neither their values nor, in the gradients, they themselves; also where the kernel is cuDNN's."""
    q, k, v = arrays(6, 6)
    plain, gradients = jax.vjp(lambda q, k, v: attention.attention(q, k, v, 5), q, k, v)
    np.testing.assert_allclose(plain, oracle(q, k[:, :5], v[:, :5]), atol=1e-6)
    for gradient in gradients(jnp.cos(plain))[1:]:
        assert np.abs(gradient[:, 4]).min() > 0
        np.testing.assert_array_equal(gradient[:, 5], 0)


@pytest.mark.parametrize(("tokens", "keys"), [(6, 5), (6, None), (5, None)])
def test_cudnn_is_told_which_keys_count(tokens, keys, monkeypatch):
    plain, seen = jax.nn.dot_product_attention, []

    def kernel(q, k, v, *, implementation, **lengths):
        seen.append(lengths)
        assert q.shape[1] % 2 == k.shape[1] % 2 == 0
        return plain(q, k, v, implementation="xla", **lengths)

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    q, k, v = arrays(tokens, tokens)
    if keys:
        v = v.at[:, keys:].set(1e6)  # would be seen in the result
    y, gradients = jax.vjp(lambda *a: attention.cudnn(*a, keys), q, k, v)
    real = keys or tokens
    assert y.shape == q.shape
    np.testing.assert_allclose(y[:, :real], oracle(q, k[:, :real], v[:, :real])[:, :real], atol=1e-5)
    expected = jax.vjp(lambda *a: attention.attention(*a, keys), q, k, v)[1]
    g = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).at[:, real:].set(0)
    for name, ours, theirs in zip("qkv", gradients(g), expected(g), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=name)
    assert bool(seen[0]) == (real % 2 == 1)


@pytest.mark.parametrize(
    ("platform", "tokens", "dtype", "expected"),
    [
        ("gpu", 197, "bfloat16", 198),
        ("gpu", 196, "bfloat16", 196),
        ("gpu", 197, "float32", 197),
        ("tpu", 197, "bfloat16", 197),
        ("cpu", 197, "bfloat16", 197),
    ],
)
def test_how_many_tokens_a_network_carries(platform, tokens, dtype, expected, cudnn):
    with described(platform):
        assert attention.padded_length(tokens, 2, 64, jnp.dtype(dtype)) == expected


@pytest.mark.parametrize("tokens", [196, 197])
def test_cudnn_is_what_is_lowered_for_cuda(tokens, cudnn):
    """Also for odd lengths: JAX refuses their gradient unless they are padded."""

    def loss(q, k, v):
        with described("gpu"):
            return jnp.sum(attention.attention(q, k, v).astype(jnp.float32))

    inputs = [jax.ShapeDtypeStruct((2, tokens, 2, 64), jnp.bfloat16)] * 3
    text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax(" in text
    assert "__cudnn$fmhaSoftmaxBackward(" in text


@pytest.mark.parametrize("tokens", [64, 7])
def test_cudnn_never_sees_a_row_of_very_negative_logits(tokens, monkeypatch):
    """Its gradient of such rows is NaN (pytorch/pytorch issue 196678). Here every logit is about -120."""
    plain, seen = jax.nn.dot_product_attention, {}

    def kernel(q, k, v, *, implementation, **lengths):
        assert implementation == "cudnn"
        seen["logits"] = jnp.einsum("BLNK,BSNK->BNLS", q, k) / np.sqrt(q.shape[-1])
        return plain(q, k, v, implementation="xla", **lengths)

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    q, k, v = arrays(tokens, tokens)
    q, k = q.at[..., 0].set(1), k.at[..., 0].set(-120 * np.sqrt(q.shape[-1]))
    np.testing.assert_allclose(attention.cudnn(q, k, v), oracle(q, k, v), atol=1e-4)
    assert float(jax.nn.logsumexp(seen["logits"], axis=-1).min()) >= np.log(tokens) - 1e-3


@pytest.mark.skipif(
    machines.compiler(machines.topology("v5e:1x1")) is None, reason="libtpu is made for linux x86-64 alone"
)
def test_flash_compiles_for_a_described_tpu_and_saves_the_logits():
    mesh = mesh_lib.create(mesh_lib.MeshConfig(model=2), machines.describe_devices(machines.topology("v5e:2x2")))
    on = NamedSharding(mesh, PartitionSpec(("replica", "data", "fold"), None, "model", None))
    inputs = [jax.ShapeDtypeStruct((64, 1025, 12, 64), jnp.bfloat16, sharding=on)] * 3

    def compiled(attend):
        def loss(q, k, v):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return jnp.sum(attend(q, k, v).astype(jnp.float32))

        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*inputs).compile()

    def plain(q, k, v):
        return jnp.einsum("BNLS,BSNK->BLNK", attention.attention_weights(q, k).astype(v.dtype), v)

    flash, xla = compiled(attention.attention), compiled(plain)
    assert "tpu_custom_call" in flash.as_text()
    assert "tpu_custom_call" not in xla.as_text()
    assert " all-gather" not in flash.as_text()
    # Half of the bytes stay: q, k, v and their gradients, padded, in both forms.
    assert flash.memory_analysis().temp_size_in_bytes < 0.6 * xla.memory_analysis().temp_size_in_bytes

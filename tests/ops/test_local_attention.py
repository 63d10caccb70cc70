"""Local attention: one meaning, several back ends.

The oracle attends globally and masks: for each query all pixels, offsets looked up in the tables by index. It shares
no code with any back end.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from vit_scaling.ops import kernels, local, local_pallas, relative
from vit_scaling.parallel import mesh as mesh_lib
from vit_scaling.parallel import sharding
from vit_scaling.parallel.mesh import MeshConfig

MEMORY_BACKENDS = ("blocks", "shifts")


def oracle(q, k, v, rel_row, rel_col, border="mask"):
    """Equation 3 of arXiv 1906.05909 over the whole map, in the inputs' dtype."""
    H, W = q.shape[1:3]
    size = rel_row.shape[0]
    h = size // 2
    if border == "zero":
        k, v = (jnp.pad(x, ((0, 0), (h, h), (h, h), (0, 0), (0, 0))) for x in (k, v))
    shift = h if border == "zero" else 0
    da = np.arange(k.shape[1])[None, :] - shift - np.arange(H)[:, None]  # key row minus query row
    dc = np.arange(k.shape[2])[None, :] - shift - np.arange(W)[:, None]
    near = (np.abs(da) <= h)[:, None, :, None] & (np.abs(dc) <= h)[None, :, None, :]
    r_row, r_col = rel_row[np.clip(da + h, 0, size - 1)], rel_col[np.clip(dc + h, 0, size - 1)]
    half = q.shape[-1] // 2
    logits = jnp.einsum("bijnd,bacnd->bnijac", q, k)
    logits += jnp.einsum("bijnd,iand->bnija", q[..., :half], r_row)[..., None]
    logits += jnp.einsum("bijnd,jcnd->bnijc", q[..., half:], r_col)[..., None, :]
    logits = jnp.where(near[None, None], logits, -jnp.inf)
    weights = jax.nn.softmax(logits.reshape(*logits.shape[:4], -1), axis=-1).reshape(logits.shape)
    return jnp.einsum("bnijac,bacnd->bijnd", weights, v)


def inputs(H, W, N, K, size, batch=2, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (0.7 * jax.random.normal(key, (batch, H, W, N, K)) for key in keys[:3])
    rel_row, rel_col = (0.7 * jax.random.normal(key, (size, N, K // 2)) for key in keys[3:])
    return q.astype(dtype), k.astype(dtype), v.astype(dtype), rel_row, rel_col


def run(backend, border="mask", **options):
    if backend.startswith("pallas"):
        return functools.partial(local_pallas.local_attention, masked=border == "mask", interpret=True)
    return lambda *args: local.local_attention(
        *args, kernel_size=args[3].shape[0], backend=backend, border=border, **options
    )


def value_and_gradients(function, args):
    def both(*args):
        y, vjp = jax.vjp(function, *args)
        return y, *vjp(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    return jax.jit(both)(*args)


@pytest.fixture(scope="module", params=[(9, 10, 4, 3, "mask"), (4, 3, 8, 5, "zero")], ids=["9x10-k3", "4x3-k5"])
def case(request):
    H, W, K, size, border = request.param
    args = inputs(H, W, 2, K, size)
    return args, border, value_and_gradients(functools.partial(oracle, border=border), args)


def assert_close(ours, theirs):
    for name, x, y in zip(("y", "q", "k", "v", "rel_row", "rel_col"), ours, theirs, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5, rtol=0, err_msg=name)


@pytest.mark.parametrize("backend", local.BACKENDS)
def test_backends_agree_with_the_oracle_in_value_and_gradients(case, backend):
    args, border, expected = case
    assert_close(value_and_gradients(run(backend, border), args), expected)


@pytest.mark.parametrize("block", [1, 4, 16])
def test_any_block_size_is_exact(case, block):
    args, border, expected = case
    assert_close(value_and_gradients(run("blocks", border, block=block), args), expected)


def test_pallas_program_with_all_heads_as_on_a_tpu(case, monkeypatch):
    args, border, expected = case
    monkeypatch.setattr(kernels, "platform", lambda: "tpu")
    assert_close(value_and_gradients(run("pallas", border), args), expected)


def test_pallas_with_more_than_two_tiles_of_keys_a_side():
    args = inputs(3, 9, 1, 4, 11, batch=1)
    assert -(-(11 - 1) // local_pallas.TILE) + 1 == 3
    np.testing.assert_allclose(jax.jit(run("pallas"))(*args), oracle(*args), atol=1e-5, rtol=0)


def fill(shape, a, b):
    return np.sin(a * np.arange(np.prod(shape)) + b).reshape(shape)


@pytest.mark.parametrize("backend", MEMORY_BACKENDS)
@pytest.mark.parametrize(
    ("border", "corner", "total", "absolute"),
    [
        ("mask", (-0.288539, 0.071550, 0.431134, -0.268626), 0.6265869397207636, 49.11364287690149),
        ("zero", (-0.124108, 0.030776, 0.235438, -0.146694), -1.1699061731347236, 37.97838200859851),
    ],
)
def test_golden_numbers_in_float64(backend, border, corner, total, absolute):
    """Numbers computed once by an independent NumPy loop over pixels, 4x4 map, two heads, k = 3."""
    with jax.enable_x64(True):
        x = fill((4, 4, 4), 0.7, 0.1)
        q, k, v = (
            jnp.asarray((x @ fill((4, 4), a, b)).reshape(1, 4, 4, 2, 2))
            for a, b in ((1.1, 0.2), (1.3, 0.3), (1.7, 0.4))
        )
        tables = (jnp.asarray(np.repeat(fill((3, 1, 1), a, b), 2, axis=1)) for a, b in ((2.1, 0.5), (2.3, 0.6)))
        y = run(backend, border)(q, k, v, *tables)
        assert y.dtype == jnp.float64
        y = np.asarray(y).reshape(4, 4, 4)
    np.testing.assert_allclose(y[0, 0], corner, atol=1e-6)
    np.testing.assert_allclose(y[1, 2], (-1.016341, 0.333358, 1.189049, -0.699183), atol=1e-6)
    np.testing.assert_allclose([y.sum(), np.abs(y).sum()], [total, absolute], rtol=1e-12)


@pytest.mark.parametrize("backend", [*MEMORY_BACKENDS, "pallas"])
def test_a_pixel_sees_exactly_its_neighborhood(backend):
    H, W, size = 5, 9, 3
    q, k, v, *tables = inputs(H, W, 1, 4, size, batch=1)

    @jax.jit
    def influence(i, j):
        def loss(k, v):
            return jnp.sum(run(backend)(q, k, v, *tables)[0, i, j] ** 2)

        return [jnp.abs(x[0]).max(axis=(2, 3)) for x in jax.grad(loss, argnums=(0, 1))(k, v)]

    for i, j in [(0, 0), (4, 8), (2, 3), (0, 5)]:
        near = (np.abs(np.arange(H) - i) <= 1)[:, None] & (np.abs(np.arange(W) - j) <= 1)[None, :]
        for influence_HW in influence(i, j):
            assert (np.asarray(influence_HW)[near] > 0).all()
            assert (np.asarray(influence_HW)[~near] == 0).all()


@pytest.mark.parametrize("backend", [*MEMORY_BACKENDS, "pallas"])
def test_bfloat16_inputs_have_a_float32_softmax(backend):
    # Two logits of 256 and 257: in bfloat16, whose step there is 2, both would weigh the same.
    q = jnp.ones((1, 1, 2, 1, 2), jnp.bfloat16)
    k = jnp.array([[256, 0], [256, 1]], jnp.bfloat16).reshape(q.shape)
    v = jnp.array([[0, 0], [1, 1]], jnp.bfloat16).reshape(q.shape)
    tables = jnp.zeros((3, 1, 1)), jnp.full((3, 1, 1), 0.25)
    y = jax.jit(run(backend))(q, k, v, *tables)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y[0, 0, :, 0, 0].astype(jnp.float32), jax.nn.sigmoid(1.0), atol=4e-3)


def test_scale_multiplies_content_and_position():
    q, k, v, *tables = inputs(4, 4, 2, 4, 3)
    ours = local.local_attention(q, k, v, *tables, kernel_size=3, scale=0.25)
    np.testing.assert_allclose(ours, oracle(q * 0.25, k, v, *tables), atol=1e-6)


def test_weights_are_the_softmax_that_the_result_averages_with():
    q, k, v, *tables = inputs(4, 5, 2, 4, 3)
    weights = jax.jit(functools.partial(local.local_weights, kernel_size=3))(q, k, *tables)
    assert weights.shape == (2, 4, 5, 2, 3, 3)
    np.testing.assert_allclose(weights.sum((-2, -1)), 1, atol=1e-6)
    assert (weights[:, 0, :, :, 0] == 0).all()
    assert (weights[:, :, -1, :, :, 2] == 0).all()
    padded = jnp.pad(v, ((0, 0), (1, 1), (1, 1), (0, 0), (0, 0)))
    patches = jnp.stack(
        [jnp.stack([padded[:, a : a + 4, c : c + 5] for c in range(3)], axis=-1) for a in range(3)], axis=-2
    )
    y = jnp.einsum("bhwnac,bhwndac->bhwnd", weights, patches)
    np.testing.assert_allclose(y, oracle(q, k, v, *tables), atol=1e-6)


def test_a_split_batch_stays_split():
    """Every back end divides over a mesh with the numbers of one device, and gathers neither batch nor map."""
    mesh = mesh_lib.create(MeshConfig(model=2), jax.devices()[:4])
    args = inputs(9, 8, 2, 4, 3)
    split, whole = sharding.batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    placed = [jax.device_put(x, split if x.ndim == 5 else whole) for x in args]
    expected = jax.jit(oracle)(*args)
    for backend in local.BACKENDS:
        with jax.set_mesh(mesh):
            compiled = jax.jit(run(backend), out_shardings=split).lower(*placed).compile()
            y = compiled(*placed)
        np.testing.assert_allclose(y, expected, atol=1e-5, err_msg=backend)
        if backend != "pallas":  # interpreted, its heads are divided too, and joined at the end
            assert "all-gather" not in compiled.as_text(), backend


@pytest.mark.parametrize(("platform", "kind"), [("tpu", "TPU v5 lite"), ("gpu", "NVIDIA H200")])
def test_pallas_lowers_for_devices_that_are_not_here(platform, kind):
    device = AbstractDevice(kind, 1 if platform == "tpu" else None, platform)
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    q = jax.ShapeDtypeStruct((2, 14, 14, 8, 32), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((7, 8, 16), jnp.float32)

    def loss(q, k, v, rel_row, rel_col):
        y = local.local_attention(q, k, v, rel_row, rel_col, kernel_size=7, backend="pallas")
        return jnp.sum(y.astype(jnp.float32))

    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4))).trace(q, q, q, table, table)
        text = traced.lower(lowering_platforms=("cuda" if platform == "gpu" else "tpu",)).as_text()
    # One kernel forward, two backward: by tile of queries and by tile of keys.
    assert text.count("tpu_custom_call" if platform == "tpu" else "__gpu$xla.gpu.triton") == 3


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kernel_size": 4}, "kernel_size is 4; .* needs an odd"),
        ({"kernel_size": 5}, r"rel_row has shape \(3, 2, 2\); kernel_size 5, 2 heads and head dim 4 need \(5, 2, 2\)"),
        ({"backend": "conv"}, "backend is 'conv'; choose one of blocks, shifts, pallas"),
        ({"backend": "pallas"}, "backend 'pallas' runs on tpu and gpu, not on cpu; .* blocks, shifts"),
        ({"border": "wrap"}, "border is 'wrap'; choose one of mask, zero"),
        ({"block": 0}, "block is 0; it must be a positive number"),
    ],
)
def test_wrong_input_gets_one_clear_sentence(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        local.local_attention(*inputs(4, 4, 2, 4, 3), **{"kernel_size": 3, **change})


def test_an_odd_head_is_refused():
    q = jnp.zeros((1, 4, 4, 2, 3))
    with pytest.raises(ValueError, match="head dim 3 is odd"):
        local.local_attention(q, q, q, jnp.zeros((3, 2, 1)), jnp.zeros((3, 2, 1)), kernel_size=3)


def test_block_size_never_exceeds_the_map():
    assert [local.block_size(s, s) for s in (3, 7, 14, 28, 56)] == [3, 7, 7, 4, 4]


def test_skew_against_indices():
    x = np.arange(12.0).reshape(3, 4)
    out = relative.skew(jnp.asarray(x), -1.0)
    expected = np.full((3, 6), -1.0)
    for q in range(3):
        expected[q, q : q + 4] = x[q]
    np.testing.assert_array_equal(out, expected)

"""Adafactor against a slow float64 reference, against optax, and across stacked and separate layers."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from vit_scaling.optim.adafactor import AdafactorState, factored_axes, newest_weight, scale_by_adafactor

BF16_EPS = 2.0**-8


def draw(shapes, steps, seed=0):
    rng = np.random.default_rng(seed)
    return [{n: rng.normal(size=s, scale=10.0 ** rng.uniform(-4, 1)).astype(np.float32) for n, s in shapes.items()}
            for _ in range(steps)]  # fmt: skip


def reference_adafactor(grads, axes, start, momentum_dtype):
    """The update of arXiv 2106.04560 on one parameter, in float64, one matrix entry at a time where factored."""
    shape = grads[0].shape
    v, m, updates = {}, np.zeros(shape), []
    for t, g in enumerate(np.asarray(grads, np.float64), start + 1):
        beta2 = min(0.999, 1 - t**-0.8)
        g2 = g * g + 1e-30
        u = np.empty(shape)
        if axes is None:
            v["full"] = beta2 * v.get("full", 0) + (1 - beta2) * g2
            u = g / np.sqrt(v["full"])
        else:
            batch = [range(n) if axis not in axes else [slice(None)] for axis, n in enumerate(shape)]
            for where in (
                np.array(np.meshgrid(*map(np.arange, map(len, batch)), indexing="ij")).reshape(len(shape), -1).T
            ):
                index = tuple(options[i] for options, i in zip(batch, where, strict=True))
                old_rows, old_cols = v.get(str(index), (0, 0))
                rows = beta2 * old_rows + (1 - beta2) * g2[index].mean(axis=1)
                cols = beta2 * old_cols + (1 - beta2) * g2[index].mean(axis=0)
                v[str(index)] = rows, cols
                # rank-one estimate of the second moment: rows x columns / mean
                u[index] = g[index] / np.sqrt(np.outer(rows, cols) / rows.mean())
        m = 0.9 * m + 0.1 * u
        updates.append(m)
        m = m.astype(momentum_dtype).astype(np.float64)
    return updates


SHAPES = {
    "wide": (33, 70),
    "tall": (70, 33),
    "heads": (40, 3, 36),
    "square": (32, 32),
    "narrow": (31, 500),
    "bias": (100,),
    "patch": (14, 14, 3, 64),
    "scalar": (),
}
FACTORED = {"wide": (0, 1), "tall": (0, 1), "heads": (0, 2), "square": (0, 1)}


def run(tx, params, grads, count=0):
    state = tx.init(params)
    if count:
        state = state._replace(count=jnp.asarray(count, jnp.int32))
    step, out = jax.jit(tx.update), []
    for g in grads:
        update, state = step(g, state)
        out.append(update)
    return out, state


@pytest.mark.parametrize("start", [0, 5_620])  # 5,620: the cap on beta2 begins to bind within the ten steps
def test_updates_equal_float64_reference(start):
    grads = draw(SHAPES, 10)
    updates, state = run(scale_by_adafactor(momentum_dtype=jnp.float32), grads[0], grads, start)
    assert int(state.count) == start + 10
    for name in SHAPES:
        expected = reference_adafactor([g[name] for g in grads], FACTORED.get(name), start, np.float64)
        for got, want in zip(updates, expected, strict=True):
            np.testing.assert_allclose(got[name], want, rtol=2e-6, atol=2e-7 * np.abs(want).max(), err_msg=name)


def test_bfloat16_momentum_is_only_rounded_when_stored():
    grads = draw(SHAPES, 5)
    updates, state = run(scale_by_adafactor(), grads[0], grads)
    for name in SHAPES:
        expected = reference_adafactor([g[name] for g in grads], FACTORED.get(name), 0, ml_dtypes.bfloat16)
        assert state.momentum[name].dtype == jnp.bfloat16
        assert updates[-1][name].dtype == jnp.float32
        # A sum within float32's error of a rounding border may be stored one bfloat16 step away.
        size = max(np.abs(e).max() for e in expected)
        np.testing.assert_allclose(updates[-1][name], expected[-1], atol=BF16_EPS * size)
        assert np.median(np.abs(updates[-1][name] - expected[-1])) < 1e-6 * size
    # 0.9 * 1.1015625 is no bfloat16 number; arithmetic in bfloat16 would give 0.9921875.
    tx = scale_by_adafactor()
    state = tx.init({"w": jnp.zeros(())})._replace(momentum={"w": jnp.asarray(1.1015625, jnp.bfloat16)})
    update, _ = tx.update({"w": jnp.zeros(())}, state)
    assert float(update["w"]) == pytest.approx(0.99140625, rel=1e-7)


def test_first_update_is_a_tenth_of_the_sign():
    grads = draw(SHAPES, 1)
    updates, _ = run(scale_by_adafactor(), grads[0], grads)
    for name in ("bias", "narrow", "patch", "scalar"):
        np.testing.assert_allclose(updates[0][name], 0.1 * np.sign(grads[0][name]), rtol=1e-5)
    sign = np.where(np.arange(64 * 48).reshape(64, 48) % 3 == 0, -1.0, 1.0).astype(np.float32)
    updates, _ = run(scale_by_adafactor(), {"w": sign}, [{"w": 7 * sign}])
    np.testing.assert_allclose(updates[0]["w"], 0.1 * sign, rtol=1e-5)


def test_equals_optax_where_settings_coincide():
    grads = draw(SHAPES, 6, seed=1)
    theirs = optax.chain(
        optax.scale_by_factored_rms(
            min_dim_size_to_factor=32,
            epsilon=1e-30,
            decay_rate_fn=lambda i, rate: jnp.minimum(0.999, 1.0 - (i.astype(jnp.float32) + 1.0) ** -rate),
        ),
        optax.ema(0.9, debias=False, accumulator_dtype=jnp.float32),
    )
    ours, _ = run(scale_by_adafactor(momentum_dtype=jnp.float32), grads[0], grads)
    state = theirs.init(jax.tree.map(jnp.asarray, grads[0]))
    for got, g in zip(ours, grads, strict=True):
        want, state = jax.jit(theirs.update)(g, state, grads[0])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), got, want)


def test_forty_stacked_layers_update_as_forty_separate_ones():
    depth, shapes = 40, {"kernel": (48, 64), "qkv": (48, 2, 40), "bias": (64,), "scale": (35,), "gain": ()}
    grads = draw({n: (depth, *s) for n, s in shapes.items()}, 4)
    tx = scale_by_adafactor(momentum_dtype=jnp.float32)
    stacked, state = run(tx, {"blocks": grads[0]}, [{"blocks": g} for g in grads])
    apart = [{f"layer_{i}": {n: a[i] for n, a in g.items()} for i in range(depth)} for g in grads]
    separate, _ = run(tx, apart[0], apart)
    assert state.full["blocks"]["bias"].shape == (depth, 64)  # (40, 64) would otherwise be factored
    assert state.row["blocks"]["kernel"].shape == (depth, 48, 1)
    for a, b in zip(stacked, separate, strict=True):
        for name in shapes:
            got, want = a["blocks"][name], np.stack([b[f"layer_{i}"][name] for i in range(depth)])
            # XLA may sum means in another order, and fuse multiplications: last bits of numbers below one.
            np.testing.assert_allclose(got, want, rtol=0, atol=3e-7, err_msg=name)


@pytest.mark.parametrize(
    ("path", "shape", "axes"),
    [
        ("head/kernel", (1024, 1000), (1, 0)),
        ("query/kernel", (768, 12, 64), (2, 0)),
        ("position_embedding", (1, 196, 384), (1, 2)),
        ("patch/kernel", (14, 14, 3, 1408), None),
        ("patch/kernel", (32, 32, 3, 768), (1, 3)),
        ("probe", (1, 1, 768), None),
        ("blocks/mlp/bias", (48, 8192), None),
        ("blocks/mlp/in/kernel", (48, 1664, 8192), (1, 2)),
        ("stages/blocks/kernel", (64, 96, 33), (2, 1)),
        ("blocks/blocks/kernel", (40, 50, 60, 70), (2, 3)),
        ("blocks/gain", (40,), None),
    ],
)
def test_factored_axes(path, shape, axes):
    assert factored_axes(path, shape) == axes


def test_state_is_half_of_the_parameters():
    def size(tree):
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))

    d, f, heads, depth = 1408, 6144, 16, 40  # ViT-g/14
    projection = {"kernel": (depth, d, heads, d // heads), "bias": (depth, heads, d // heads)}
    shapes = {
        "patch_embedding": {"kernel": (14, 14, 3, d), "bias": (d,)},
        "position_embedding": (1, 256, d),
        "blocks": {
            "attention": {"query": projection, "key": projection, "value": projection, "out": projection},
            "norm": {"scale": (depth, d), "bias": (depth, d)},
            "mlp": {"in": {"kernel": (depth, d, f), "bias": (depth, f)}, "out": {"kernel": (depth, f, d)}},
        },
        "head": {"kernel": (d, 29_593), "bias": (29_593,)},
    }
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=is_shape)
    state = jax.eval_shape(scale_by_adafactor().init, params)
    assert size(state) <= 0.51 * size(params)

    square = jax.eval_shape(scale_by_adafactor().init, {"kernel": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)})
    assert sum(a.size for a in jax.tree.leaves((square.row, square.col, square.full))) == 2 * 1024
    assert size(square.momentum) == 2 * 1024 * 1024


def test_state_leaves_carry_the_parameters_path_and_rank():
    params = {"blocks": {"kernel": jnp.ones((2, 64, 32)), "bias": jnp.ones((2, 32))}}
    state = scale_by_adafactor().init(params)
    assert isinstance(state, AdafactorState)
    for path, leaf in jax.tree.leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name != "count":
            assert leaf.ndim == params["blocks"][name.split("/", 2)[2]].ndim


def test_beta2_starts_at_zero_and_is_capped():
    beta2 = [1 - float(newest_weight(jnp.asarray(c, jnp.int32), 0.8, 0.999)) for c in (0, 1, 5_000, 5_700, 10**6)]
    assert beta2[0] == 0
    assert beta2[1] == pytest.approx(1 - 2**-0.8, rel=1e-6)
    assert beta2[2] < 0.999 - 1e-5
    assert beta2[3:] == pytest.approx([0.999, 0.999], abs=1e-9)

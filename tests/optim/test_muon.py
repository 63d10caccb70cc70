"""Muon: which parameters are matrices, the orthogonalisation, and whole updates beside optax on separate layers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vit_scaling import names as paths
from vit_scaling.optim import muon, optimizer
from vit_scaling.optim.optimizer import OptimConfig

SHAPES = {
    "embedding/kernel": (4, 4, 3, 32),
    "position_embedding": (4, 32),
    "blocks/attention/query/kernel": (2, 32, 2, 16),
    "blocks/attention/query/bias": (2, 2, 16),
    "blocks/attention/out/kernel": (2, 2, 16, 32),
    "blocks/mlp/up/kernel": (2, 32, 64),
    "blocks/mlp/down/kernel": (2, 64, 32),
    "blocks/norm/scale": (2, 32),
    "merge/kernel": (64, 48),
    "head/kernel": (32, 10),
}
MATRICES = {
    "blocks/attention/query/kernel": (32, 32),
    "blocks/attention/out/kernel": (32, 32),
    "blocks/mlp/up/kernel": (32, 64),
    "blocks/mlp/down/kernel": (64, 32),
    "merge/kernel": (64, 48),
}


def draw(seed):
    rng = np.random.default_rng(seed)
    return paths.unflatten({p: jnp.asarray(rng.normal(size=s), jnp.float32) for p, s in SHAPES.items()})


def config(**fields):
    plain = {"name": "muon", "moment_dtype": "float32", "clip": None, "weight_decay": 0.0, "head_weight_decay": 0.0}
    return OptimConfig(**(plain | fields))


def separate(tree):
    """{path:layer}: every layer of a stack for itself, and kernels of hidden layers as matrices."""
    return {
        f"{path}:{i}": x.reshape(MATRICES[path]) if path in MATRICES else x
        for path, leaf in paths.flatten(tree).items()
        for i, x in enumerate(leaf if paths.stacked_dims(path) else leaf[None])
    }


def test_updates_equal_those_of_optax_on_separate_layers():
    few = ("embedding/kernel", "blocks/attention/query/kernel", "blocks/attention/out/kernel", "blocks/norm/scale")
    some = lambda seed: paths.unflatten({p: paths.flatten(draw(seed))[p] for p in (*few, "merge/kernel")})  # noqa: E731
    params = some(0)
    tx = optimizer.create(config(), params)
    kinds = {
        name: optax.contrib.MuonDimensionNumbers() if name.partition(":")[0] in MATRICES else None
        for name in separate(params)
    }
    reference = optax.contrib.muon(-1.0, consistent_rms=0.2, muon_weight_dimension_numbers=kinds)
    state, reference_state = tx.init(params), reference.init(separate(params))
    step = jax.jit(tx.update)
    for seed in (1, 2, 3):
        direction, state = step(some(seed), state, params)
        with jax.numpy_dtype_promotion("standard"):
            want, reference_state = jax.jit(reference.update)(separate(some(seed)), reference_state, separate(params))
        for name, x in separate(direction).items():
            np.testing.assert_allclose(x, want[name], rtol=2e-4, atol=2e-5, err_msg=name)


def test_matrices_are_the_kernels_of_hidden_layers():
    rows = optimizer.describe(config(freeze=("merge/.*",)), draw(0))
    assert [row.path for row in rows if row.orthogonalised] == [p for p in MATRICES if p != "merge/kernel"]
    assert not any(row.orthogonalised for row in optimizer.describe(config(name="adam"), draw(0)))
    assert muon.reduced_axes("stage1/blocks/plain/attention/cpb_mlp/fc1/kernel", (2, 2, 512)) is None
    assert muon.reduced_axes("stage1/conv/kernel", (3, 3, 64, 64)) == 3


@pytest.mark.parametrize("shape", [(2, 24, 40), (40, 24)])
def test_singular_vectors_stay_and_singular_values_become_about_one(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found = np.asarray(jax.jit(muon.orthogonalize)(jnp.asarray(x)))
    for before, after in zip(x.reshape(-1, *shape[-2:]), found.reshape(-1, *shape[-2:]), strict=True):
        u, _, v = np.linalg.svd(before, full_matrices=False)
        values = u.T @ after @ v.T
        assert 0.6 < np.diag(values).min() < np.diag(values).max() < 1.25
        np.testing.assert_allclose(values - np.diag(np.diag(values)), 0, atol=2e-5)


def test_updates_are_as_large_as_those_of_adamw():
    """Root mean square 0.2 for every matrix (arXiv 2502.16982, section 2.2), up to the spread of singular values."""
    tx = optimizer.create(config(), draw(0))
    direction, _ = jax.jit(tx.update)(draw(1), tx.init(draw(0)), draw(0))
    for path in MATRICES:
        assert 0.15 < float(jnp.sqrt(jnp.mean(paths.flatten(direction)[path] ** 2))) < 0.23


def test_decay_of_head_and_body():
    params, zero = draw(0), jax.tree.map(jnp.zeros_like, draw(0))
    tx = optimizer.create(config(weight_decay=0.1, head_weight_decay=3.0), params)
    direction, _ = jax.jit(tx.update)(zero, tx.init(params), params)
    flat, own = paths.flatten(direction), paths.flatten(params)
    for path in SHAPES:
        decay = 3.0 if path == "head/kernel" else 0.1 if path.endswith("kernel") else 0.0
        np.testing.assert_allclose(flat[path], decay * own[path], rtol=1e-6, atol=1e-7)


def test_the_state_has_one_momentum_of_matrices_and_adams_two_of_the_rest():
    state = jax.eval_shape(optimizer.create(config(moment_dtype="bfloat16"), draw(0)).init, draw(0))
    size = {p: int(np.prod(s)) for p, s in SHAPES.items()}
    matrices = sum(size[p] for p in MATRICES)
    rest = sum(size.values()) - matrices
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert stored == 2 * matrices + (2 + 4) * rest + 2 * 4  # two counters


def test_split_matrices_give_the_same_update():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = {p: (None,) * (len(s) - 2) + ("model", "data") for p, s in SHAPES.items() if p in MATRICES}
    on = paths.unflatten({p: NamedSharding(mesh, PartitionSpec(*split.get(p, ()))) for p in SHAPES})
    tx = optimizer.create(config(), draw(0))
    whole, _ = jax.jit(tx.update)(draw(1), tx.init(draw(0)), draw(0))
    grads, params = jax.device_put(draw(1), on), jax.device_put(draw(0), on)
    parts, _ = jax.jit(tx.update, out_shardings=(on, None))(grads, tx.init(params), params)
    for path, x in paths.flatten(parts).items():
        np.testing.assert_allclose(x, paths.flatten(whole)[path], rtol=1e-4, atol=1e-5)

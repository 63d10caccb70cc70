"""The whole optimizer: decay by pattern, clipping, freezing, and each choice under strict dtype promotion."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_scaling import names as paths
from vit_scaling.optim import optimizer
from vit_scaling.optim.adafactor import scale_by_adafactor
from vit_scaling.optim.optimizer import OptimConfig

SHAPES = {
    "patch_embedding/kernel": (4, 4, 3, 32),
    "patch_embedding/bias": (32,),
    "position_embedding": (1, 4, 32),
    "class_token": (1, 1, 32),
    "blocks/attention/query/kernel": (3, 32, 2, 32),
    "blocks/norm/scale": (3, 32),
    "blocks/layerscale": (3, 32),
    "pool/probe": (1, 1, 32),
    "head/kernel": (32, 40),
    "head/bias": (40,),
}
DECAYED = {"patch_embedding/kernel": 0.03, "blocks/attention/query/kernel": 0.03, "head/kernel": 3.0}


def draw(seed):
    rng = np.random.default_rng(seed)
    return paths.unflatten({p: jnp.asarray(rng.normal(size=s), jnp.float32) for p, s in SHAPES.items()})


def close(a, b, rtol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-7), a, b)


def test_direction_is_scaled_gradient_plus_decay_of_kernels():
    params, grads = draw(0), draw(1)
    tx = optimizer.create(OptimConfig(clip=None), params)
    direction, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    plain = scale_by_adafactor()
    scaled, _ = jax.jit(plain.update)(grads, plain.init(params))
    close(
        paths.flatten(direction),
        {p: paths.flatten(scaled)[p] + DECAYED.get(p, 0.0) * w for p, w in paths.flatten(params).items()},
    )


@pytest.mark.parametrize(("name", "second"), [("sgd", 0.9 * 1 + 2), ("nesterov", 2 + 0.9 * (0.9 * 1 + 2))])
def test_momentum_by_hand(name, second):
    """Gradients 1 and 2: Nesterov's step looks ahead to where the momentum will carry it."""
    params = {"body": {"kernel": jnp.zeros((2,))}}
    c = OptimConfig(name=name, moment_dtype="float32", clip=None, weight_decay=0.0, decay_rules=((".*", "body"),))
    tx = optimizer.create(c, params)
    state = tx.init(params)
    for gradient, want in ((1.0, 1.0 if name == "sgd" else 1.9), (2.0, second)):
        direction, state = tx.update(jax.tree.map(lambda p, g=gradient: jnp.full_like(p, g), params), state, params)
        np.testing.assert_allclose(direction["body"]["kernel"], want, rtol=1e-6)


@pytest.mark.parametrize("name", optimizer.NAMES)
@pytest.mark.parametrize("dtype", optimizer.DTYPES)
def test_every_optimizer_under_jit_and_strict_promotion(name, dtype):
    params = draw(0)
    c = OptimConfig(name=name, moment_dtype=dtype, clip=1.0, weight_decay=0.0, head_weight_decay=0.0)
    tx = optimizer.create(c, jax.eval_shape(lambda: params))
    state = tx.init(params)
    abstract = jax.eval_shape(tx.init, params)
    step = jax.jit(tx.update)
    trace = functools.partial(optax.trace, 0.9, accumulator_dtype=dtype)
    theirs = {"adam": optax.scale_by_adam(mu_dtype=dtype), "sgd": trace(), "nesterov": trace(nesterov=True)}
    theirs["lion"] = optax.scale_by_lion(b1=0.9, b2=0.999, mu_dtype=dtype)
    theirs["lamb"] = optax.scale_by_adam(eps=1e-6, mu_dtype=dtype)  # then the trust ratio: see the next test
    reference = optax.chain(optax.clip_by_global_norm(1.0), theirs.get(name, scale_by_adafactor(momentum_dtype=dtype)))
    reference_state = reference.init(params)
    for seed in (1, 2, 3):
        direction, state = step(draw(seed), state, params)
        with jax.numpy_dtype_promotion("standard"):
            want, reference_state = jax.jit(reference.update)(draw(seed), reference_state)
        if name not in ("lamb", "muon"):  # tests of their own
            close(direction, want)
    # One state for every setting of clip and freeze, of the announced types, with the parameters' paths in it.
    assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == jax.tree.map(lambda a: (a.shape, a.dtype), abstract)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(state)]
    assert all(any(n.endswith("/" + p) for n in names) for p in SHAPES)
    moments = ("momentum", "mu", "trace", "rest/mu")
    kept = [a.dtype for a, n in zip(jax.tree.leaves(state), names, strict=True) if n.startswith(moments)]
    assert kept == [jnp.dtype(dtype)] * len(SHAPES)


def test_lamb_equals_optax_on_separate_layers():
    """Decay for kernels only; the trust ratio belongs to each layer of a stack, not to the stack."""
    params = draw(0)
    c = OptimConfig(name="lamb", moment_dtype="float32", clip=None, weight_decay=0.1, head_weight_decay=0.1)
    tx = optimizer.create(c, params)
    layers = lambda tree: {  # noqa: E731
        f"{path}:{i}": x
        for path, leaf in paths.flatten(tree).items()
        for i, x in enumerate(leaf if paths.stacked_dims(path) else leaf[None])
    }
    decayed = {name: name.partition(":")[0] in DECAYED for name in layers(params)}
    reference = optax.lamb(-1.0, b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.1, mask=decayed)
    state, reference_state = tx.init(params), reference.init(layers(params))
    for seed in (1, 2):
        direction, state = jax.jit(tx.update)(draw(seed), state, params)
        with jax.numpy_dtype_promotion("standard"):
            want, reference_state = jax.jit(reference.update)(layers(draw(seed)), reference_state, layers(params))
        close(layers(direction), want, rtol=2e-5)
    zero = jax.tree.map(jnp.zeros_like, params)
    assert not any(jnp.isnan(x).any() for x in jax.tree.leaves(jax.jit(tx.update)(zero, tx.init(zero), zero)[0]))


def test_clip_is_the_global_norm_of_raw_gradients_of_trained_parameters():
    params, grads = draw(0), draw(1)
    c = OptimConfig(name="sgd", beta1=0.0, clip=0.5, weight_decay=0.0, head_weight_decay=0.0, moment_dtype="float32")
    tx = optimizer.create(c, params)
    direction, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert float(optax.tree.norm(direction)) == pytest.approx(0.5, rel=1e-6)
    close(direction, jax.tree.map(lambda g: g * (0.5 / optax.tree.norm(grads)), grads))
    # A huge gradient of a frozen parameter must not shrink the others.
    huge = jax.tree.map(lambda g: g, grads) | {"position_embedding": 1e6 * grads["position_embedding"]}
    c.freeze = ("position_embedding",)
    tx = optimizer.create(c, params)
    direction, _ = jax.jit(tx.update)(huge, tx.init(params), params)
    assert float(optax.tree.norm(direction)) == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("name", optimizer.NAMES)
def test_frozen_parameters_stay_and_cost_nothing(name):
    params, grads = draw(0), draw(1)
    tx = optimizer.create(OptimConfig(name=name, freeze=("blocks/.*", "patch_embedding/.*")), params)
    state = tx.init(params)
    direction, state = jax.jit(tx.update)(grads, state, params)
    frozen = {p for p in SHAPES if p.startswith(("blocks", "patch"))}
    for path, d in paths.flatten(direction).items():
        assert bool(jnp.all(d == 0)) == (path in frozen)
    names = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(state)]
    assert any("probe" in n for n in names)
    assert not any("blocks" in n or "patch" in n for n in names)


def test_describe_lists_what_happens_to_every_parameter():
    rows = {row.path: row for row in optimizer.describe(OptimConfig(freeze=("class_token",)), draw(0))}
    assert list(rows) == list(SHAPES)
    assert {p: r.decay for p, r in rows.items() if r.decay} == DECAYED
    assert [p for p, r in rows.items() if r.frozen] == ["class_token"]
    assert [p for p, r in rows.items() if r.factored] == ["blocks/attention/query/kernel", "head/kernel"]
    assert rows["head/kernel"].shape == (32, 40)


def test_layer_decay_of_what_precedes_the_blocks():
    params = {"embedding": {"kernel": (4,)}, "pre_norm": {"scale": (4,)}, "registers": (2, 4)}
    params |= {"blocks": {"mlp": {"gate": {"kernel": (3, 4, 4)}}}, "norm": {"scale": (4,)}}
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, "float32"), params, is_leaf=lambda x: isinstance(x, tuple))
    rates = {path: rate.ravel().tolist() for path, rate in optimizer.layer_rates(shapes, 0.5).items()}
    first = {path: [1 / 16] for path in ("embedding/kernel", "pre_norm/scale", "registers")}
    assert rates == first | {"blocks/mlp/gate/kernel": [1 / 8, 1 / 4, 1 / 2], "norm/scale": [1.0]}


def test_names_of_the_other_models_have_a_rule():
    expected = {
        "head/kernel": "head",
        "pool/attention/query/kernel": "body",
        "pool/mlp/out/kernel": "body",
        "stage_0/blocks/attention/relative_position_bias_table": "none",
        "stage_0/blocks/attention/logit_scale": "none",
        "stage_0/blocks/attention/cpb_mlp/in/kernel": "none",
        "registers": "none",
        "layer/rel_row": "none",
        "blocks/layerscale_attention/gamma": "none",
    }
    assert {p: paths.first_match(optimizer.DECAY_RULES, p) for p in expected} == expected


def test_ema():
    ema = optimizer.ema_update({"w": jnp.asarray(2.0)}, {"w": jnp.asarray(4.0)}, 0.75)
    assert float(ema["w"]) == 2.5


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"name": "shampoo"}, "optim.name.*shampoo.*adafactor, adam, sgd, nesterov, lion, lamb"),
        ({"moment_dtype": "float8"}, "optim.moment_dtype.*bfloat16, float32"),
        ({"beta2": 1.0}, "optim.beta2 is 1.0"),
        ({"lr": -1.0}, "optim.lr is -1.0"),
        ({"lr": float("nan")}, r"optim.lr is nan; it must be a number from 0 to 1e\+30"),
        ({"lr": float("inf")}, "optim.lr is inf; it must be"),
        ({"weight_decay": 1e38}, r"optim.weight_decay is 1e\+38; it must be"),
        ({"head_weight_decay": float("nan")}, "optim.head_weight_decay is nan"),
        ({"clip": float("inf")}, "optim.clip is inf"),
        ({"ema": float("nan")}, "optim.ema is nan"),
        ({"freeze": ("blocks/(",)}, r"optim.freeze: 'blocks/\(' is no regular expression"),
        ({"decay_rules": (("[", "body"),)}, r"optim.decay_rules: '\[' is no regular expression"),
        ({"clip": 0.0}, "optim.clip is 0.0.*None"),
        ({"accumulate": 0}, "optim.accumulate is 0"),
        ({"freeze": ("no_such/.*",)}, "optim.freeze.*no_such"),
        ({"freeze": (".*",)}, "optim.freeze.*every parameter"),
        ({"decay_rules": ((".*kernel", "body"),)}, "optim.decay_rules.*patch_embedding/bias"),
        ({"decay_rules": ((".*", "neck"),)}, "neck.*head, body or none"),
    ],
)
def test_bad_input_is_named(fields, names):
    with pytest.raises(ValueError, match=names):
        optimizer.create(OptimConfig(**fields), draw(0))

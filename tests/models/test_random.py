"""Random numbers of the models: how every parameter starts, and that no random key is used twice."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_scaling import models, names
from vit_scaling.models import attention_cnn, layers, resnet, swin, vit

CUT = 0.8796256610342398  # standard deviation of a standard normal truncated at two


def xavier(shape, inputs):
    """Standard deviation of a uniform distribution in ±sqrt(6 / (inputs + outputs)), `inputs` leading axes in."""
    return (6 / (np.prod(shape[:inputs]) + np.prod(shape[inputs:])) / 3) ** 0.5


def lecun(shape, inputs):
    return np.prod(shape[:inputs]) ** -0.5


def fan_out(shape, _):
    return (2 / (np.prod(shape[:-2]) * shape[-1])) ** 0.5


def constant(value):
    return lambda *_: value


def scaled(rule, factor):
    return lambda shape, inputs: factor * rule(shape, inputs)


# For each parameter: a pattern of its path, how many of its axes are inputs, and its standard deviation. What no
# pattern matches starts as a constant.
VIT_RULES = (
    (r"embedding/kernel", 3, lecun),
    (r"position_embedding", 0, constant(64**-0.5)),
    (r"registers", 0, constant(0.02)),
    (r".*/(query|key|value|up|gate|down)/kernel", 1, xavier),
    (r".*/out/kernel", 2, xavier),
    (r"(pool|blocks)/mlp/(up|down)/bias", 0, constant(1e-6)),
    (r"pool/probe", 1, xavier),
    (r"pre_logits/kernel", 1, xavier),
)
SWIN_RULES = (
    (r"embedding/kernel", 3, lecun),
    (r".*(kernel|relative_position_bias_table)|position_embedding", 0, constant(0.02 * CUT)),
)
RESNET_RULES = (
    (r"stem/(block_row|block_col|mixture)|.*spatial/rel_(row|col)", 0, constant(1.0)),
    (r"stem/query/kernel", 1, scaled(lecun, 16**-0.5)),
    (r"stem/(key|value)/kernel", 1, lecun),
    (r".*spatial/query/kernel", 1, lecun),  # and divided by the root of the head dim
    (r".*(spatial/(key|value)|non_local/(theta|phi|g|out))/kernel", 1, lecun),
    (r".*(down|up|shortcut|spatial)/kernel", 0, fan_out),
)
AUGMENTED_RULES = (
    (r"stem/kernel|.*(down|up|shortcut|conv|group[34].*spatial)/kernel", 0, fan_out),
    (r".*spatial/(query|key|value)/kernel", 1, lecun),
    (r".*spatial/out/kernel", 2, lecun),
    (r".*spatial/rel_(row|col)", 0, constant(20**-0.5)),
)
CNN_RULES = (
    (r"blocks/attention/centers", 0, constant(2.0)),
    (r"blocks/attention/spreads", 0, constant(0.01)),
    (r"blocks/attention/rel_(row|col)", 0, constant(0.02)),
    (r"blocks/attention/out/kernel", 2, xavier),
    (r"blocks/mlp/(up|down)/bias", 0, constant(1e-6)),
    (r".*kernel", 1, xavier),
)
SMALL_RESNET = {"depth": 26, "width": 64, "heads": 4, "nonlocal_after": (1,)}
CASES = {
    "vit": (
        vit.ViTConfig(64, 2, 96, 4, (8, 8), "map", registers=64, pre_logits=True, layerscale=0.1),
        (64, 64),
        VIT_RULES,
    ),
    "vit swiglu": (
        vit.ViTConfig(64, 2, 96, 4, (8, 8), mlp_kind="swiglu", position="none"),
        (64, 64),
        [rule for rule in VIT_RULES if "bias" not in rule[0]],
    ),
    "swin": (
        swin.SwinConfig(width=32, depths=(2, 2), heads=(2, 4), window=4, absolute_position=True),
        (32, 32),
        SWIN_RULES,
    ),
    "swin v2": (swin.SwinConfig(2, width=32, depths=(2, 2), heads=(2, 4), window=4), (32, 32), SWIN_RULES),
    "sasa": (
        resnet.ResNetConfig(spatial="attention", stem="attention", stem_mixtures=4, **SMALL_RESNET),
        (32, 32),
        RESNET_RULES,
    ),
    "augmented": (
        resnet.ResNetConfig(spatial="augmented", groups=(1, 2), depth=26, heads=4, key_fraction=0.01),
        (64, 64),
        AUGMENTED_RULES,
    ),
    **{
        f"attention cnn {position}": (
            attention_cnn.AttentionCNNConfig(position=position, width=64, depth=3, heads=4, mlp=96),
            (64, 64),
            CNN_RULES,
        )
        for position in ("quadratic", "gaussian", "learned", "learned+content")
    },
}


@functools.cache
def initialized(case, seed=0):
    config, image_size, _ = CASES[case]
    init = lambda key: models.build(config, image_size=image_size, num_classes=12, key=key)  # noqa: E731
    parameters = jax.jit(lambda key: models.split(init(key))[1])(jax.random.key(seed))
    return {path: np.asarray(leaf, np.float64) for path, leaf in names.flatten(parameters).items()}


def layers_of(path, leaf):
    """Returns the layers of a stacked parameter, or the parameter alone."""
    return leaf if names.stacked_dims(path) else leaf[None]


def draws(case):
    """Returns {name: numbers, flat, without mean and of deviation one} of every random parameter of every layer."""
    found = {}
    for path, leaf in initialized(case).items():
        for index, layer in enumerate(layers_of(path, leaf)):
            flat = layer.reshape(-1)
            if flat.size >= 32 and flat.std() > 1e-9 and "spreads" not in path:
                found[f"{path}:{index}"] = (flat - flat.mean()) / flat.std()
    return found


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_has_its_published_deviation(case):
    rules = CASES[case][2]
    for path, leaf in initialized(case).items():
        shape = layers_of(path, leaf).shape[1:]
        rule = next((rule for rule in rules if re.fullmatch(rule[0], path)), None)
        if "spreads" in path and leaf.ndim == 4:
            leaf = leaf - np.eye(2)
        if path.startswith("stem/value"):
            shape = shape[1:]
        deviation = leaf.std()
        if rule is None:
            assert deviation < 1e-7, path
            continue
        wanted = rule[2](shape, rule[1])
        if case == "sasa" and re.fullmatch(r".*spatial/query/kernel", path):
            wanted *= shape[2] ** -0.5
        # Four standard errors of a normal sample's deviation.
        assert deviation == pytest.approx(wanted, rel=4 / (2 * leaf.size) ** 0.5), path


@pytest.mark.parametrize("case", CASES)
def test_no_two_parameters_and_no_two_layers_share_a_random_key(case):
    """Draws of one key and one size are the same numbers up to their scale."""
    by_size = {}
    for name, flat in draws(case).items():
        by_size.setdefault(flat.size, []).append((name, flat))
    assert by_size
    for group in by_size.values():
        correlation = np.abs(np.corrcoef([flat for _, flat in group])) if len(group) > 1 else np.eye(1)
        shared = np.argwhere(np.triu(correlation > 0.95, 1))
        assert not len(shared), [(group[a][0], group[b][0]) for a, b in shared]


def test_another_seed_gives_other_numbers():
    other = initialized("vit", 1)
    for path, leaf in initialized("vit").items():
        assert (leaf.std() < 1e-12) or not np.allclose(leaf, other[path], atol=0), path


def record(monkeypatch, module, name):
    """Replaces a function (x, rate, key) by the identity; returns the list of (rate, key) of its calls at run time."""
    seen = []

    def recorded(x, rate, key):
        if key is not None:
            note = lambda rate, key: seen.append((float(rate), tuple(np.asarray(key).tolist())))  # noqa: E731
            jax.debug.callback(note, jnp.asarray(rate), jax.random.key_data(key), ordered=True)
        return x

    monkeypatch.setattr(module, name, recorded)
    return seen


@pytest.mark.parametrize("parallel", [False, True])
def test_drop_path_of_a_vit_grows_with_depth_and_every_branch_has_its_key(monkeypatch, parallel):
    seen = record(monkeypatch, layers, "drop_path")
    config = vit.ViTConfig(16, 4, 16, 2, (8, 8), drop_path=0.3, parallel=parallel)
    model = models.build(config, image_size=(16, 16), num_classes=2, key=jax.random.key(0))
    jax.block_until_ready(model(jnp.zeros((1, 16, 16, 3)), jax.random.key(1)))
    jax.effects_barrier()
    np.testing.assert_allclose([rate for rate, _ in seen], np.repeat([0.0, 0.1, 0.2, 0.3], 2), atol=1e-6)
    assert len({key for _, key in seen}) == 8


def test_drop_path_of_a_swin_grows_with_depth_and_every_branch_has_its_key(monkeypatch):
    seen = record(monkeypatch, layers, "drop_path")
    config = swin.SwinConfig(width=8, depths=(2, 4), heads=(1, 2), window=2, drop_path=0.5)
    model = models.build(config, image_size=(16, 16), num_classes=2, key=jax.random.key(0))
    jax.block_until_ready(model(jnp.zeros((1, 16, 16, 3)), jax.random.key(1)))
    jax.effects_barrier()
    np.testing.assert_allclose([rate for rate, _ in seen], np.repeat(np.linspace(0, 0.5, 6), 2), atol=1e-6)
    assert len({key for _, key in seen}) == 12


def test_every_dropout_of_an_attention_cnn_has_its_key(monkeypatch):
    seen = record(monkeypatch, attention_cnn, "dropout")
    config = attention_cnn.AttentionCNNConfig(width=8, depth=3, heads=2, mlp=8, dropout=0.4)
    model = models.build(config, image_size=(8, 8), num_classes=2, key=jax.random.key(0))
    jax.block_until_ready(model(jnp.zeros((1, 8, 8, 3)), jax.random.key(1)))
    jax.effects_barrier()
    np.testing.assert_allclose([rate for rate, _ in seen], [0.4] * 6, atol=1e-6)
    assert len({key for _, key in seen}) == 6

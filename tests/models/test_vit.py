"""ViT: published sizes to the parameter, a slow twin, and every option."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_scaling import flops, models, names
from vit_scaling.models import layers, vit

# Scaling Vision Transformers, Table 2: parameters in millions and forward GFLOPs at 224 and at 384 pixels.
# The parameter column counts the trunk: no MAP head, no classifier.
TABLE_2 = {
    "s/28": (5.4, 0.7, 2.0),
    "s/16": (5.0, 2.2, 7.8),
    "S/32": (22, 2.3, 6.9),
    "Ti/16": (5.5, 2.5, 9.5),
    "B/32": (87, 8.7, 26.0),
    "S/16": (22, 9.2, 31.2),
    "B/28": (87, 11.3, 30.5),
    "B/16": (86, 35.1, 111.3),
    "L/16": (303, 122.9, 382.8),
    "g/14": (1011, 533.1, 1596.4),
    "G/14": (1843, 965.3, 2859.9),
}


def trunk_params(name: str) -> int:
    shapes = flops.parameters(vit.variant(name), image_size=(224, 224), num_classes=10)
    return sum(leaf.size for path, leaf in shapes.items() if not path.startswith(("head/", "pool/")))


def formula(width: int, depth: int, mlp: int, patch: int, tokens: int) -> int:
    """The trunk by hand: patches, positions, blocks with all biases, final norm."""
    block = 4 * (width * width + width) + (width * mlp + mlp) + (mlp * width + width) + 4 * width
    return (3 * patch * patch * width + width) + tokens * width + depth * block + 2 * width


@pytest.mark.parametrize("name", TABLE_2)
def test_parameters_equal_the_papers_table(name: str) -> None:
    published = TABLE_2[name][0]
    digits = 1 if isinstance(published, float) else 0
    assert round(trunk_params(name) / 1e6, digits) == published


@pytest.mark.parametrize("size", vit.SIZES)
def test_parameters_of_every_size_to_the_unit(size: str) -> None:
    shape = vit.SIZES[size]
    assert trunk_params(f"{size}/16") == formula(shape.width, shape.depth, shape.mlp, 16, 196)


@pytest.mark.parametrize(
    ("size", "millions"),
    [("s", 0.79), ("Ti", 0.44), ("S", 1.77), ("B", 7.09), ("L", 12.60), ("H", 19.68), ("g", 25.25), ("G", 38.36)],
)
def test_map_head_parameters(size: str, millions: float) -> None:
    shapes = flops.parameters(vit.variant(f"{size}/16", pool="map"), image_size=(224, 224), num_classes=10)
    assert round(sum(leaf.size for path, leaf in shapes.items() if path.startswith("pool/")) / 1e6, 2) == millions


@pytest.mark.parametrize("name", TABLE_2)
@pytest.mark.parametrize("column", [1, 2])
def test_flops_equal_the_papers_table(name: str, column: int) -> None:
    side = {1: 224, 2: 384}[column]
    cost = flops.count(vit.variant(name, pool="map"), image_size=(side, side), num_classes=1000)
    # Patches of 28 and 14 do not divide 384; the paper's figures there are a little above whole patches' cost.
    tolerance = 0.02 if column == 1 or 384 % int(name.split("/")[1]) == 0 else 0.06
    assert cost.forward_flops / 1e9 == pytest.approx(TABLE_2[name][column], rel=tolerance, abs=0.06)
    assert cost.train_flops == 3 * cost.forward_flops


def test_flops_of_one_block_equal_the_compilers() -> None:
    config = vit.ViTConfig(width=64, depth=1, mlp=128, heads=4, patch=(4, 4), pool="map", scan=False)
    model = models.build(config, image_size=(16, 16), num_classes=10, key=jax.random.key(0))
    description, params, statistics = models.split(model)
    compiled = (
        jax.jit(lambda p, x: models.merge(description, p, statistics)(x))
        .lower(params, jnp.zeros((1, 16, 16, 3)))
        .compile()
    )
    counted = flops.count(config, image_size=(16, 16), num_classes=10).forward_flops
    # The compiler also counts norms, GELU and softmax.
    assert counted <= compiled.cost_analysis()["flops"] <= 1.15 * counted


def build(**fields: object) -> vit.ViT:
    """A small model with every zero and every one moved, so that no term of its arithmetic can be missing unseen."""
    defaults = {"width": 16, "depth": 3, "mlp": 24, "heads": 2, "patch": (4, 4)}
    config = vit.ViTConfig(**(defaults | fields))  # type: ignore[arg-type]
    shape = jax.eval_shape(
        lambda key: models.build(config, image_size=(8, 12), num_classes=5, key=key), jax.random.key(0)
    )
    description, params, statistics = models.split(shape)
    generator = np.random.default_rng(1)
    moved = jax.tree.map(lambda leaf: jnp.asarray(generator.normal(0.2, 0.4, leaf.shape), jnp.float32), params)
    return models.merge(description, moved, statistics)


# A module is a pytree, so one jitted function serves every model of one description.
run = jax.jit(lambda model, images, key=None: model(images, key))
IMAGES = jax.random.uniform(jax.random.key(2), (2, 8, 12, 3), minval=-1.0)


def reference_norm(x: np.ndarray, p: dict, eps: float = 1e-6) -> np.ndarray:
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return y * p["scale"] + p.get("bias", 0.0)


def reference_gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def reference_attention(q_from: np.ndarray, kv_from: np.ndarray, p: dict, qk_norm: bool = False) -> np.ndarray:
    out = np.zeros_like(q_from)
    for head in range(p["query"]["kernel"].shape[1]):
        q, k, v = (
            x @ p[name]["kernel"][:, head] + p[name].get("bias", np.zeros((9, 1)))[head]
            for name, x in (("query", q_from), ("key", kv_from), ("value", kv_from))
        )
        if qk_norm:
            q, k = reference_norm(q, p["query_norm"]), reference_norm(k, p["key_norm"])
        logits = q @ k.T / np.sqrt(q.shape[-1])
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out += (weights / weights.sum(-1, keepdims=True)) @ v @ p["out"]["kernel"][head]
    return out + p["out"]["bias"]


def reference_mlp(x: np.ndarray, p: dict) -> np.ndarray:
    return reference_gelu(x @ p["up"]["kernel"] + p["up"]["bias"]) @ p["down"]["kernel"] + p["down"]["bias"]


def reference_vit(config: vit.ViTConfig, p: dict, image: np.ndarray) -> np.ndarray:
    """One image, one head, one layer at a time, in float64."""
    h, w = config.patch
    rows, columns = image.shape[0] // h, image.shape[1] // w
    tokens = []
    for row in range(rows):
        for column in range(columns):
            patch = image[row * h : (row + 1) * h, column * w : (column + 1) * w]
            tokens.append(np.einsum("hwc,hwcd->d", patch, p["embedding"]["kernel"]) + p["embedding"]["bias"])
    x = np.stack(tokens)
    if config.position == "learned":
        x = x + p["position_embedding"]
    elif config.position == "sincos2d":
        quarter = config.width // 4
        for index, (row, column) in enumerate(np.ndindex(rows, columns)):
            for f in range(quarter):
                omega = 10_000.0 ** (-f / (quarter - 1))
                x[index, f] += np.sin(column * omega)
                x[index, quarter + f] += np.cos(column * omega)
                x[index, 2 * quarter + f] += np.sin(row * omega)
                x[index, 3 * quarter + f] += np.cos(row * omega)
    if config.registers:
        x = np.concatenate([p["registers"], x])
    if config.pool == "token":
        x = np.concatenate([p["class_token"], x])
    for layer in range(config.depth):
        b = jax.tree.map(lambda leaf: leaf[layer], p["blocks"])  # noqa: B023
        scale1, scale2 = b.get("layerscale1", 1.0), b.get("layerscale2", 1.0)
        y = reference_norm(x, b["norm1"])
        attended = scale1 * reference_attention(y, y, b["attention"], config.qk_norm)
        if config.parallel:
            x = x + attended + scale2 * reference_mlp(y, b["mlp"])
        else:
            x = x + attended
            x = x + scale2 * reference_mlp(reference_norm(x, b["norm2"]), b["mlp"])
    x = reference_norm(x, p["norm"])
    if config.pool == "token":
        feature = x[0]
    elif config.pool == "gap":
        feature = x[config.registers :].mean(0)
    else:
        q = p["pool"]
        y = reference_attention(q["probe"], x[config.registers :], q["attention"])
        feature = (y + reference_mlp(reference_norm(y, q["norm"]), q["mlp"]))[0]
    return feature @ p["head"]["kernel"] + p["head"]["bias"]


OPTIONS = {
    "gap": {},
    "map": {"pool": "map"},
    "token": {"pool": "token"},
    "token and registers": {"pool": "token", "registers": 2},
    "map and registers": {"pool": "map", "registers": 3},
    "sincos2d": {"position": "sincos2d"},
    "no positions": {"position": "none"},
    "22B": {"parallel": True, "qk_norm": True, "qkv_bias": False, "norm_bias": False, "pool": "map"},
    "layerscale": {"layerscale": 0.1},
    "rectangular patch": {"patch": (4, 2)},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_equals_the_slow_twin(option: str) -> None:
    model = build(**OPTIONS[option])
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), models.split(model)[1])
    expected = [reference_vit(model.config, params, np.asarray(image, np.float64)) for image in IMAGES]
    np.testing.assert_allclose(run(model, IMAGES), np.stack(expected), rtol=2e-4, atol=2e-5)


def loss_and_gradient(model: vit.ViT, config: vit.ViTConfig) -> tuple:
    """Of the same parameters under another way to run them."""
    params = models.split(model)[1]
    shape = jax.eval_shape(lambda k: models.build(config, image_size=(8, 12), num_classes=5, key=k), jax.random.key(0))
    description = models.split(shape)[0]

    def loss(params: dict) -> jax.Array:
        return jnp.sum(jnp.square(models.merge(description, params, {})(IMAGES, jax.random.key(3))))

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.fixture(scope="module")
def plain() -> tuple:
    model = build(pool="map", drop_path=0.5)
    return model, loss_and_gradient(model, model.config)


@pytest.mark.parametrize(
    "way", [{"scan": False}, {"remat": "full"}, {"remat": "dots"}, {"scan": False, "remat": "full"}]
)
def test_scan_and_remat_change_no_number(plain: tuple, way: dict) -> None:
    model, expected = plain
    found = loss_and_gradient(model, dataclasses.replace(model.config, **way))
    # The same arithmetic fused in another order: the last bits of float32, of the largest gradient where the true one
    # is zero (a bias of the keys moves all logits of a query alike).
    noise = 1e-6 * max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=noise)


def test_scan_is_a_loop_over_the_layers_and_unrolled_is_none() -> None:
    def lowered(scan: bool) -> str:
        description, params, _ = models.split(build(scan=scan, depth=6))
        return jax.jit(lambda p: models.merge(description, p, {})(IMAGES)).lower(params).as_text()

    assert "stablehlo.while" in lowered(True)
    assert "stablehlo.while" not in lowered(False)


def test_drop_path_needs_a_key_and_keeps_the_mean() -> None:
    x = jnp.ones((4000, 1, 1))
    assert layers.drop_path(x, jnp.float32(0.5), None) is x
    dropped = layers.drop_path(x, jnp.float32(0.25), jax.random.key(0))
    assert set(np.unique(dropped)) == {0.0, np.float32(4 / 3)}
    assert float(jnp.mean(dropped == 0)) == pytest.approx(0.25, abs=0.03)
    model = build(drop_path=0.9)
    assert not np.allclose(run(model, IMAGES), run(model, IMAGES, jax.random.key(0)))
    still = build(drop_path=0.0)
    np.testing.assert_array_equal(run(still, IMAGES), run(still, IMAGES, jax.random.key(0)))


def test_drop_path_grows_with_depth_from_zero() -> None:
    np.testing.assert_allclose(build(depth=3, drop_path=0.3)._drop_path_rates(), [0.0, 0.15, 0.3], rtol=1e-6)


def test_initialisation_is_the_published_one() -> None:
    config = dataclasses.replace(vit.variant("S/16", pool="map"), depth=2)
    init = jax.jit(lambda key: models.split(models.build(config, image_size=(224, 224), num_classes=9, key=key))[1])
    p = names.flatten(init(jax.random.key(0)))
    limit = (6 / (384 + 384)) ** 0.5
    kernel = p["blocks/attention/query/kernel"]
    assert float(jnp.max(jnp.abs(kernel))) == pytest.approx(limit, rel=1e-3)
    assert float(jnp.std(kernel)) == pytest.approx(limit / 3**0.5, rel=0.01)
    assert float(jnp.max(jnp.abs(p["blocks/mlp/up/kernel"]))) == pytest.approx((6 / (384 + 1536)) ** 0.5, rel=1e-3)
    assert float(jnp.std(p["blocks/mlp/up/bias"])) == pytest.approx(1e-6, rel=0.05)
    assert float(jnp.std(p["embedding/kernel"])) == pytest.approx((16 * 16 * 3) ** -0.5, rel=0.01)
    assert float(jnp.std(p["position_embedding"])) == pytest.approx(384**-0.5, rel=0.02)
    assert float(jnp.max(jnp.abs(p["pool/probe"]))) == pytest.approx((6 / 385) ** 0.5, rel=0.01)
    for zero in (
        "head/kernel",
        "head/bias",
        "embedding/bias",
        "blocks/attention/query/bias",
        "blocks/attention/out/bias",
    ):
        assert not jnp.any(p[zero])
    # Layers are drawn one by one: no two are alike.
    assert not np.allclose(kernel[0], kernel[1])
    assert {leaf.dtype for leaf in p.values()} == {jnp.dtype("float32")}


def test_bfloat16_computes_in_it_and_keeps_positions_and_norms_in_float32() -> None:
    model, half = build(pool="map"), build(pool="map", dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(models.split(half)[1])} == {jnp.dtype("float32")}
    text = jax.jit(lambda x: half(x)).lower(IMAGES).as_text()
    assert "bf16" in text
    np.testing.assert_allclose(run(half, IMAGES), run(model, IMAGES), rtol=0.1, atol=0.1)
    assert half._positions(8, 12).dtype == jnp.float32
    embedding = layers.LayerNorm(4, eps=1e-6)
    assert embedding(jnp.ones((1, 4), jnp.bfloat16)).dtype == jnp.bfloat16
    far = 1000.0 + jnp.array([[0.0, 1.0, 2.0, 3.0]])
    np.testing.assert_allclose(embedding(far), embedding(far - 1000.0), atol=1e-3)


def test_every_token_hears_every_other_but_not_other_images() -> None:
    model = build(pool="gap")
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(model(x)[0] * jnp.arange(5.0))))(IMAGES)
    assert np.all(np.abs(gradient[0]).max(axis=-1) > 0)
    assert not np.any(gradient[1])


def test_registers_are_not_read_by_the_head() -> None:
    model = build(registers=2, pool="gap", depth=1)
    tokens = model.encode(IMAGES)
    assert tokens.shape == (2, 2 + 6, 16)
    np.testing.assert_allclose(model.features(IMAGES), tokens[:, 2:].mean(axis=1), rtol=1e-5, atol=1e-6)


def test_attention_maps_are_distributions_and_those_that_the_model_uses() -> None:
    model = build(registers=1)
    maps = model.attention_maps(IMAGES)
    assert maps.shape == (3, 2, 2, 7, 7)
    np.testing.assert_allclose(maps.sum(-1), 1.0, rtol=1e-5)
    first = jax.tree.map(lambda leaf: leaf[0], model.blocks)
    y = first.norm1(model._tokens(IMAGES))
    value = first.attention.value(y)
    attended = first.attention.out(jnp.einsum("BNLS,BSNK->BLNK", maps[0], value))
    np.testing.assert_allclose(attended, first.attention(y), rtol=1e-4, atol=1e-5)


def test_other_image_sizes() -> None:
    assert run(build(position="sincos2d"), jnp.ones((1, 16, 9, 3))).shape == (1, 5)
    with pytest.raises(ValueError, match="16x12 pixels make a grid of 4x3 patches"):
        run(build(), jnp.ones((1, 16, 12, 3)))
    with pytest.raises(ValueError, match="smaller than one patch"):
        run(build(position="none"), jnp.ones((1, 3, 12, 3)))
    # A remainder that fills no patch is left out: 27 patches of 14 fit into 384 pixels.
    assert layers.grid_size((384, 384), (14, 14)) == (27, 27)
    padded = jnp.pad(IMAGES, ((0, 0), (0, 3), (0, 2), (0, 0)))
    np.testing.assert_allclose(run(build(), padded), run(build(), IMAGES), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("Q/16", "no ViT size is called 'Q'"),
        ("B", "names no patch"),
        ("B/x", "names no patch"),
        ("B/0", "names no patch"),
    ],
)
def test_variants_that_do_not_exist(name: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        vit.variant(name)


def test_variants_that_do() -> None:
    assert vit.variant("B/8x16").patch == (8, 16)
    assert vit.variant("So400m/14", pool="map").mlp == 4304
    assert vit.variant("s/16").width == 256
    assert vit.variant("S/16").width == 384


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"pool": "mean"}, "model.pool is 'mean'; choose one of gap, map, token"),
        ({"dtype": "float16"}, "model.dtype"),
        ({"heads": 3}, "model.heads 3 does not divide model.width 16"),
        ({"drop_path": 1.0}, "model.drop_path"),
        ({"depth": 0}, "model.depth is 0"),
        ({"position": "sincos2d", "width": 18}, "multiple of 4"),
    ],
)
def test_configs_that_cannot_work(fields: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        run(build(**fields), IMAGES)

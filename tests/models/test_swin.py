"""Swin V1 and V2 are the published networks, at any size and window, on one device and on eight."""

import dataclasses
import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import fill
from vit_scaling import models
from vit_scaling import names as paths
from vit_scaling.flops.swin import swin_forward
from vit_scaling.models import adapt as resize
from vit_scaling.models import swin
from vit_scaling.ops import windows
from vit_scaling.optim import optimizer
from vit_scaling.parallel import mesh as mesh_lib
from vit_scaling.parallel import sharding
from vit_scaling.parallel.mesh import MeshConfig

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "swin.json").read_text())
SIZE = (40, 56)  # leaves padding in the windows of both stages of the small models
SMALL = {
    version: swin.SwinConfig(version=version, width=8, depths=(4, 2), heads=(1, 2), window=4, drop_path=0.0)
    for version in (1, 2)
}


def make(config, image_size, num_classes=6):
    """Returns (graphdef, parameters filled by the rule of the goldens)."""
    build = lambda: models.build(config, image_size=image_size, num_classes=num_classes, key=jax.random.key(0))  # noqa: E731
    graphdef, parameters, _ = models.split(jax.eval_shape(build))
    return graphdef, jax.tree.map(jnp.asarray, fill.tree(parameters))


@functools.cache
def small(version, **fields):
    """Returns `make` of a small model whose config has these fields; V2's cosines scaled by about one.

    At the goldens' ten to forty its gradients multiply rounding errors by a thousand, and comparisons see no more.
    """
    graphdef, parameters = make(dataclasses.replace(SMALL[version], **fields), SIZE)
    leaves = paths.flatten(parameters).items()
    return graphdef, paths.unflatten({p: x - 2.3 if p.endswith("logit_scale") else x for p, x in leaves})


def images(*shape):
    return jnp.asarray(fill.images("images", (*shape, 3)))


def call(graphdef, parameters, images_BHWC, key=None):
    return models.merge(graphdef, parameters, {})(images_BHWC, key)


@functools.cache
def logits(version):
    """Returns the logits of two images by the small model."""
    graphdef, parameters = small(version)
    return jax.jit(functools.partial(call, graphdef))(parameters, images(2, *SIZE))


def noise(gradient):
    """How far two compilations may be apart: norms amplify rounding, and a key bias's gradient is nothing else."""
    return 1e-4 * float(jnp.abs(gradient).max()) + 3e-8


@functools.cache
def loss_and_gradient(version, **fields):
    """Loss (of the same images and weights) and gradients of a small model whose config has these fields."""
    graphdef, parameters = small(version, **fields)
    loss = lambda parameters, images_BHWC: jnp.mean(jnp.square(call(graphdef, parameters, images_BHWC)))  # noqa: E731
    return jax.jit(jax.value_and_grad(loss))(parameters, images(8, *SIZE))


# Exact counts of the published models (facts that the official code, timm and transformers share), and multiply-adds
# in units of 1e9 as the papers' tables round them.
PUBLISHED = [
    ("T", 7, 224, 28_288_354, 4.494),
    ("S", 7, 224, 49_606_258, 8.747),
    ("B", 7, 224, 87_768_224, 15.438),
    ("B", 12, 384, 87_903_584, 47.105),
    ("L", 7, 224, 196_532_476, 34.487),
    ("L", 12, 384, 196_735_516, 103.952),
    ("v2-T", 8, 256, 28_347_154, 5.926),
    ("v2-T", 16, 256, 28_347_154, 6.606),
    ("v2-S", 8, 256, 49_728_418, 11.515),
    ("v2-S", 16, 256, 49_728_418, 12.648),
    ("v2-B", 8, 256, 87_918_816, 20.286),
    ("v2-B", 16, 256, 87_918_816, 21.796),
    ("v2-B", 24, 384, 87_918_816, 54.749),
    ("v2-L", 16, 256, 196_739_932, 47.492),
    ("v2-L", 24, 384, 196_739_932, 115.418),
]


@pytest.mark.parametrize(("name", "window", "side", "parameters", "macs"), PUBLISHED)
def test_parameters_and_multiply_adds(name, window, side, parameters, macs):
    config = swin.variant(name, window=window)
    model = jax.eval_shape(lambda: swin.Swin(config, image_size=(side, side), num_classes=1000, key=jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(models.split(model)[1])) == parameters
    flops, activation_bytes = swin_forward(config, (side, side), 1000)
    assert flops / 2e9 == pytest.approx(macs, rel=0.005)
    assert activation_bytes > 0


@pytest.mark.parametrize(("name", "parameters"), [("v2-H", 658e6), ("v2-G", 3.0e9)])
def test_the_largest_sizes_are_as_large_as_the_paper_says(name, parameters):
    config = swin.variant(name)
    model = jax.eval_shape(lambda: swin.Swin(config, image_size=(256, 256), num_classes=1000, key=jax.random.key(0)))
    leaves = paths.flatten(models.split(model)[1])
    assert sum(leaf.size for leaf in leaves.values()) == pytest.approx(parameters, rel=0.002)
    assert leaves["stage3/extra_norm/blocks/scale"].shape == (config.depths[2] // 6, config.width * 4)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name):
    case = CASES[name]
    fields = {field: tuple(value) if isinstance(value, list) else value for field, value in case["config"].items()}
    graphdef, parameters = make(swin.SwinConfig(**fields), tuple(case["image_size"]), case["num_classes"])
    images_BHWC = fill.images(name, (2, *case["image_size"], 3))
    logits_BM = jax.jit(functools.partial(call, graphdef))(parameters, images_BHWC)
    np.testing.assert_allclose(logits_BM, np.load(GOLDEN / "swin.npz")[name], rtol=0, atol=2e-5)


def test_only_weights_are_parameters():
    """No mask, index or coordinate is in a checkpoint."""
    block = ["attention/out/bias", "attention/out/kernel", "attention/query/bias", "attention/query/kernel"]
    block += ["attention/value/bias", "attention/value/kernel", "attention/key/kernel"]
    block += [f"{layer}/{kind}" for layer in ("mlp/up", "mlp/down") for kind in ("bias", "kernel")]
    block += [f"{norm}/{kind}" for norm in ("norm1", "norm2") for kind in ("bias", "scale")]
    own = {1: ["attention/key/bias", "attention/relative_position_bias_table"], 2: ["attention/logit_scale"]}
    own[2] += [f"attention/cpb_mlp/{name}" for name in ("up/kernel", "up/bias", "down/kernel")]
    whole = {"embedding/kernel", "embedding/bias", "embedding_norm/scale", "embedding_norm/bias"}
    whole |= {"norm/scale", "norm/bias", "head/kernel", "head/bias"}
    whole |= {f"stage1/merging/{name}" for name in ("norm/scale", "norm/bias", "reduction/kernel")}
    for version in (1, 2):
        leaves = paths.flatten(small(version)[1])
        for stage, pairs in ((1, 2), (2, 1)):
            names = {f"stage{stage}/blocks/{b}/{n}" for b in ("plain", "shifted") for n in block + own[version]}
            whole |= names
            assert {leaves[name].shape[0] for name in names} == {pairs}
        assert set(leaves) == whole
        whole = {name for name in whole if "/blocks/" not in name}


def test_the_optimizer_decays_only_kernels_of_the_trunk_and_the_head():
    """No decay of biases, norms, positions and temperatures, as the official recipe has it."""
    optim = optimizer.OptimConfig(name="adam", weight_decay=0.05, head_weight_decay=0.05)
    for version in (1, 2):
        _, parameters = small(version, absolute_position=True)
        for row in optimizer.describe(optim, parameters):
            kernel = row.path.endswith("/kernel") and "cpb_mlp" not in row.path
            assert row.decay == (0.05 if kernel else 0.0), row.path


def test_initial_values():
    """Kernels: deviation .02 cut at two. V2's blocks begin as the identity, V1's do not."""
    x_BHWD = jax.random.normal(jax.random.key(1), (2, 10, 14, 8))
    moved = []
    for version in (1, 2):
        stage = jax.jit(lambda key: swin.Stage(SMALL[version], 1, 4, key=key))(jax.random.key(0))  # noqa: B023
        kernel = stage.blocks.plain.mlp.up.kernel[...]
        assert 0.016 < float(jnp.std(kernel)) < 0.019
        assert float(jnp.abs(kernel).max()) <= 0.04
        assert float(jnp.abs(kernel - stage.blocks.shifted.mlp.up.kernel[...]).max()) > 0.01
        x_BHWD = jax.random.normal(jax.random.key(1), (2, 10, 14, 16))
        y_BHWD, _ = jax.jit(stage.trunk)(x_BHWD, jnp.zeros((1, 2)), None)
        moved.append(float(jnp.abs(y_BHWD - x_BHWD).max()))
    np.testing.assert_allclose(stage.blocks.plain.attention.logit_scale[...], np.log(10), rtol=1e-6)
    assert moved[0] > 1e-3
    assert moved[1] == 0


@pytest.mark.parametrize("version", [1, 2])
def test_a_block_sees_its_window_and_nothing_else(version):
    """By gradient. The shifted block's windows are cut at 2, 6 and 10; what the roll joins must stay apart."""
    stage = models.merge(*small(version), {}).stage1
    pair = jax.tree.map(lambda leaf: leaf[0], stage.blocks)
    height, width = 8, 11  # the roll joins real tokens of both ends, down and across, and padding with them
    x_BHWD = jax.random.normal(jax.random.key(0), (1, height, width, 8))

    @functools.partial(jax.jit, static_argnames="shift")
    def influence(x_BHWD, query, shift):
        block = pair.shifted if shift else pair.plain
        picked = lambda x: block(x, 4, shift, jnp.zeros(()), None)[0][0, query[0], query[1]].sum()  # noqa: E731
        return jnp.abs(jax.grad(picked)(x_BHWD)[0]).max(axis=-1)

    for shift in (0, 2):
        group = lambda at: (at + shift) // 4 if shift else at // 4  # noqa: B023, E731
        for query in ((0, 0), (1, 5), (3, 9), (5, 10), (7, 2), (7, 10)):
            sees_HW = influence(x_BHWD, jnp.array(query), shift) > 0
            expected_HW = [
                [group(y) == group(query[0]) and group(x) == group(query[1]) for x in range(width)]
                for y in range(height)
            ]
            np.testing.assert_array_equal(sees_HW, expected_HW)


@pytest.mark.parametrize(
    ("version", "fields"),
    [(1, {"scan": False}), (2, {"remat": "full"}), (1, {"scan": False, "remat": "none"})],
    ids=str,
)
def test_scan_and_remat_change_no_number(version, fields):
    loss, gradient = loss_and_gradient(version)
    other_loss, other_gradient = loss_and_gradient(version, **fields)
    np.testing.assert_allclose(loss, other_loss, rtol=5e-6)
    for path, leaf in paths.flatten(gradient).items():
        other = paths.flatten(other_gradient)[path]
        np.testing.assert_allclose(leaf, other, rtol=0, atol=noise(leaf), err_msg=path)
        assert float(jnp.abs(leaf).max()) > 0 or path.endswith("key/bias"), path


def test_extra_norms_stand_after_every_group():
    """Against a loop over blocks: norm after every second pair of a stage that is that deep, nowhere else."""
    config = dataclasses.replace(SMALL[2], depths=(8, 2), extra_norm_every=4)
    graphdef, parameters = make(config, SIZE)
    model = models.merge(graphdef, parameters, {})
    assert model.stage2.extra_norm is None
    x_BHWD = jax.random.normal(jax.random.key(0), (1, 10, 14, 8))
    rates = jnp.zeros((4, 2))
    at = lambda layers, i: jax.tree.map(lambda leaf: leaf[i], layers)  # noqa: E731

    @jax.jit
    def one_pair(pair, x_BHWD):
        x_BHWD, _ = pair.plain(x_BHWD, 4, 0, rates[0, 0], None)
        return pair.shifted(x_BHWD, 4, 2, rates[0, 0], None)[0]

    expected = x_BHWD
    for i in range(4):
        expected = one_pair(at(model.stage1.blocks, i), expected)
        expected = at(model.stage1.extra_norm.blocks, i // 2)(expected) if i % 2 else expected
    actual, _ = jax.jit(model.stage1.trunk)(x_BHWD, rates, None)
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_drop_path_grows_with_depth_and_needs_a_key():
    graphdef, parameters = small(1, drop_path=0.5)
    model = models.merge(graphdef, parameters, {})
    np.testing.assert_allclose(model.drop_path_rates().reshape(-1), [0, 0.1, 0.2, 0.3, 0.4, 0.5], atol=1e-6)
    run = jax.jit(functools.partial(call, graphdef))
    one, two, again = (run(parameters, images(2, *SIZE), jax.random.key(seed)) for seed in (1, 2, 1))
    np.testing.assert_array_equal(one, again)
    assert min(float(jnp.abs(a - b).max()) for a, b in ((one, two), (one, logits(1)), (two, logits(1)))) > 1e-3

    # Blocks that are always dropped leave the tokens as they were: rates reach the block that they belong to.
    x_BHWD = jax.random.normal(jax.random.key(0), (2, 10, 14, 8))
    keys, always = jax.random.split(jax.random.key(0), (2, 2)), 1 - 1e-7
    dropped, _ = jax.jit(model.stage1.trunk)(x_BHWD, jnp.array([[0.0, always], [always, always]]), keys)
    first = jax.tree.map(lambda leaf: leaf[0], model.stage1.blocks).plain
    expected, _ = jax.jit(lambda x_BHWD: first(x_BHWD, 4, 0, jnp.zeros(()), None))(x_BHWD)
    np.testing.assert_allclose(dropped, expected, atol=1e-6)


@pytest.mark.parametrize("version", [1, 2])
def test_bfloat16(version):
    """Finite gradients on an empty image too, whose tokens are all zero; float32 logits near those of float32."""
    graphdef, start = small(version, dtype="bfloat16")
    zero = ("embedding/bias", "embedding_norm/bias")
    parameters = paths.unflatten({p: jnp.where(p in zero, 0, x) for p, x in paths.flatten(start).items()})
    images_BHWC = images(2, *SIZE).at[0].set(0)

    @jax.jit
    def step(parameters):
        def loss(parameters):
            logits_BM = call(graphdef, parameters, images_BHWC)
            assert logits_BM.dtype == jnp.float32
            return jnp.mean(jnp.square(logits_BM - 1))

        value, gradient = jax.value_and_grad(loss)(parameters)
        return value, gradient, jax.tree.map(lambda p, g: p - 0.01 * g, parameters, gradient)

    losses = []
    for _ in range(6):
        value, gradient, parameters = step(parameters)
        losses.append(float(value))
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    assert losses[-1] < 0.9 * losses[0]
    half = jax.jit(functools.partial(call, graphdef))(start, images(2, *SIZE))
    assert float(jnp.linalg.norm(half - logits(version)) / jnp.linalg.norm(logits(version))) < 0.06


def test_any_size_after_it_is_built():
    """Larger, not square, smaller than the windows down to one patch."""
    for version, sizes in ((1, ((64, 48), (9, 30))), (2, ((4, 4),))):
        for size in sizes:
            logits_BM = jax.jit(functools.partial(call, small(version)[0]))(small(version)[1], images(1, *size))
            assert logits_BM.shape == (1, 6)
            assert bool(jnp.isfinite(logits_BM).all())
    assert swin.stage_windows(SMALL[1], (12, 20)) == (3, 2)  # built for a smaller grid, a model has smaller windows


def test_attention_maps_and_features():
    graphdef, parameters = small(1)
    model = models.merge(graphdef, parameters, {})
    features, maps = jax.jit(lambda x: (model.features(x), model.attention_maps(x)))(images(2, *SIZE))
    assert features.shape == (2, 16)
    np.testing.assert_allclose(model.head(features), logits(1), atol=1e-6)
    assert [stage.shape for stage in maps] == [(4, 2, 12, 1, 16, 16), (2, 2, 4, 2, 16, 16)]
    for stage in maps:
        np.testing.assert_allclose(stage.sum(axis=-1), 1, atol=1e-5)
    # Plain blocks attend to their whole window; in the shifted ones the image's corners lie together, and apart.
    assert float(maps[0][0::2].min()) > 0
    place_Gn = windows.places(10, 14, 4, 2)
    corner, opposite = np.argwhere(place_Gn == 0)[0], np.argwhere(place_Gn == 14)[0]  # rows 0 and 1, column 0
    assert corner[0] == opposite[0]
    assert float(maps[0][1::2, :, corner[0], :, corner[1], opposite[1]].min()) > 0
    outside = np.flatnonzero(place_Gn[corner[0]] == -1)
    assert len(outside) > 0
    assert float(maps[0][1::2, :, corner[0], :, corner[1]][..., outside].max()) == 0


def test_adapt_bias_tables_and_absolute_positions():
    config = dataclasses.replace(SMALL[1], absolute_position=True)
    parameters = make(config, (64, 64))[1]
    adapt = functools.partial(
        resize.adapt_swin, {k: np.asarray(v) for k, v in paths.flatten(parameters).items()}, config, (64, 64)
    )
    same = adapt(target=config, target_image_size=(64, 64))
    for path, leaf in paths.flatten(parameters).items():
        np.testing.assert_array_equal(same[path], leaf, err_msg=path)

    target = swin.transfer(config, (64, 64), window=6)
    grown = adapt(target=target, target_image_size=(96, 112))
    _, expected = make(target, (96, 112))
    assert jax.tree.map(jnp.shape, paths.unflatten(grown)) == jax.tree.map(jnp.shape, expected)
    table = "stage1/blocks/shifted/attention/relative_position_bias_table"
    before = np.asarray(paths.flatten(parameters)[table])
    np.testing.assert_allclose(grown[table][1], windows.resize_table(before[1], 6), atol=1e-6)
    positions = fill.normal("positions", (49, 2))
    np.testing.assert_array_equal(
        resize.resize_positions(positions, (7, 7), (11, 11)), windows.resize_table(positions, 6)
    )
    plane = (np.arange(16.0)[:, None] + 3 * np.arange(16.0)[None, :]).reshape(-1, 1)
    larger = resize.resize_positions(plane, (16, 16), (24, 32)).reshape(24, 32)[4:-4, 4:-4]
    slopes = [np.diff(larger, axis=axis).mean() for axis in (0, 1)]
    np.testing.assert_allclose(slopes, [16 / 24, 3 * 16 / 32], rtol=0.02)
    with pytest.raises(ValueError, match="the absolute positions are for 16x16"):
        jax.eval_shape(functools.partial(call, make(config, (64, 64))[0]), parameters, images(1, 96, 96))
    with pytest.raises(ValueError, match=r"depths \(4, 2\) cannot become one with depths \(2, 2\)"):
        adapt(target=dataclasses.replace(config, depths=(2, 2)), target_image_size=(64, 64))


def test_log_positions_transfer_to_a_larger_window():
    """V2: the same weights give the same bias to the same offset, whatever the window (V2 section 3.3)."""
    config, image_size = SMALL[2], (64, 64)
    parameters = make(config, image_size)[1]
    table = lambda config: np.asarray(  # noqa: E731
        jax.tree.map(
            lambda leaf: leaf[0],
            models.merge(make(config, (96, 96))[0], parameters, {}).stage1.blocks.plain.attention,
        ).bias_table()
    ).reshape(2 * config.window - 1, 2 * config.window - 1, -1)
    assert swin.transfer(config, image_size, window=4).pretrained_windows == (4, 4)
    before = table(config)
    np.testing.assert_array_equal(table(swin.transfer(config, image_size, window=4)), before)
    after = table(swin.transfer(config, image_size, window=6))
    np.testing.assert_allclose(after[2:-2, 2:-2], before, atol=1e-5)
    assert np.abs(np.diff(after, axis=0)).max() < 2 * np.abs(np.diff(before, axis=0)).max()
    plain = table(dataclasses.replace(config, window=6))
    assert np.abs(plain[2:-2, 2:-2] - before).max() > 0.1  # without the transfer it is another function


@pytest.mark.parametrize("version", [1, 2])
def test_sharded_equals_unsharded(version, monkeypatch):
    """On 8 devices, parameters split by the table: loss and gradients are those of one device."""
    fields = {"width": 16, "heads": (2, 4)}
    expected, expected_gradient = loss_and_gradient(version, **fields)
    graphdef, parameters = small(version, **fields)
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 2**8)
    mesh = mesh_of(1, 4, 2)
    with jax.set_mesh(mesh):
        split = jax.device_put(parameters, sharding.tree_shardings(parameters, mesh))
        images_BHWC = jax.device_put(images(8, *SIZE), sharding.batch_sharding(mesh))
        loss = lambda parameters, images_BHWC: jnp.mean(jnp.square(call(graphdef, parameters, images_BHWC)))  # noqa: E731
        actual, gradient = jax.jit(jax.value_and_grad(loss))(split, images_BHWC)
    query = split["stage1"]["blocks"]["plain"]["attention"]["query"]["kernel"]
    assert query.sharding.spec == jax.sharding.PartitionSpec(None, "data", "model", None)
    np.testing.assert_allclose(actual, expected, rtol=5e-6)
    for path, leaf in paths.flatten(expected_gradient).items():
        np.testing.assert_allclose(paths.flatten(gradient)[path], leaf, rtol=0, atol=noise(leaf), err_msg=path)


def mesh_of(*sizes):
    return mesh_lib.create(MeshConfig(*sizes))


def test_published_sizes_can_be_sharded():
    """What speaks of relative positions stays whole, every other large parameter is split."""
    for name, window in (("L", 12), ("v2-G", 16)):
        config = swin.variant(name, window=window)
        build = lambda: swin.Swin(config, image_size=(512, 512), num_classes=1000, key=jax.random.key(0))  # noqa: B023, E731
        for path, leaf in paths.flatten(models.split(jax.eval_shape(build))[1]).items():
            spec = sharding.partition_spec(path, leaf.shape, mesh_of(1, 8, 1))
            whole = re.search("relative_position_bias_table|cpb_mlp", path) or leaf.size < sharding.MIN_SHARDED_SIZE
            assert ("data" in spec) == (not whole), path


@pytest.mark.parametrize(
    ("fields", "image_size", "sentence"),
    [
        ({"heads": (3, 2)}, SIZE, "model.heads 3 of stage 1 does not divide its width 8"),
        ({"window": 0}, SIZE, "model.window is 0; it must be at least 1"),
        ({}, (3, 56), "an image of 3x56 pixels is smaller than one patch of 4x4"),
        ({"depths": (3, 2)}, SIZE, r"model.depths \(3, 2\) must be even numbers"),
        ({"heads": (1,)}, SIZE, r"model.heads \(1,\) must give one positive number for each of model.depths"),
        ({"version": 3}, SIZE, "model.version is 3; choose one of 1, 2"),
        ({"dtype": "float16"}, SIZE, "model.dtype is 'float16'; choose one of float32, bfloat16"),
        ({"pretrained_windows": (4, 4)}, SIZE, "belong to model.version 2"),
        ({"version": 2, "depths": (6, 2), "extra_norm_every": 4}, SIZE, "model.extra_norm_every 4 must be even"),
        ({"drop_path": 1.0}, SIZE, "model.drop_path is 1.0; it must be at least 0 and below 1"),
    ],
)
def test_what_cannot_work_is_said_in_one_sentence(fields, image_size, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(dataclasses.replace(SMALL[1], **fields), image_size)


def test_unknown_size():
    with pytest.raises(ValueError, match="no Swin size is called 'XL'; the sizes are T, S, B, L"):
        swin.variant("XL")

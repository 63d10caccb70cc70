"""Residual networks: published sizes and FLOPs, spatial layers against plain formulas, statistics of the norms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from vit_scaling import flops
from vit_scaling.flops.attention_cnn import attention_cnn_linear
from vit_scaling.models import layers, resnet, spatial
from vit_scaling.models.attention_cnn import AttentionCNNConfig
from vit_scaling.models.resnet import ResNet, ResNetConfig
from vit_scaling.ops import kernels
from vit_scaling.parallel import mesh as mesh_lib
from vit_scaling.parallel import sharding
from vit_scaling.parallel.mesh import MeshConfig


@functools.cache
def _cost(fields):
    return flops.count(ResNetConfig(**dict(fields)), image_size=(224, 224), num_classes=1000)


def cost(config):
    return _cost(tuple(dataclasses.asdict(config).items()))


def gigaflops(config):
    return cost(config).forward_flops / 1e9


SASA = functools.partial(ResNetConfig, spatial="attention")
AA = functools.partial(ResNetConfig, spatial="augmented", groups=(2, 3, 4))


@pytest.mark.parametrize(
    ("config", "parameters", "published"),
    [
        (ResNetConfig(depth=26), 13_696_552, 4.7),
        (ResNetConfig(depth=38), 19_626_792, 6.5),
        (ResNetConfig(depth=50), 25_557_032, 8.2),
        (SASA(depth=26), 10_342_632, 4.5),
        (SASA(depth=38), 14_190_632, 5.7),
        (SASA(depth=50), 18_038_632, 7.0),
        (AA(depth=50), 25_813_872, 8.3),
        (AA(depth=101), 45_391_208, 16.1),
        (AA(key_fraction=0.25, value_fraction=0.25), 24_308_208, 7.9),
    ],
)
def test_published_parameters_and_flops(config, parameters, published):
    """SASA, Table 1; AA, Table 2 and the sweep of ratios; GFLOPs of one 224x224 image within 2%."""
    assert cost(config).params == parameters
    np.testing.assert_allclose(gigaflops(config), published, rtol=0.02)


@pytest.mark.parametrize(("depth", "published"), [(26, 4.7), (38, 6.0), (50, 7.2)])
def test_flops_with_the_attention_stem(depth, published):
    np.testing.assert_allclose(gigaflops(SASA(depth=depth, stem="attention")), published, rtol=0.02)


@pytest.mark.parametrize(
    ("groups", "published_flops", "published_parameters"),
    [
        ((1, 2, 3, 4), 7.0, 18.0),
        ((2, 3, 4), 7.3, 18.1),
        ((3, 4), 7.5, 18.5),
        ((4,), 8.0, 20.8),
        ((), 8.2, 25.6),
        ((1,), 7.9, 25.5),
        ((1, 2), 7.8, 25.0),
        ((1, 2, 3), 7.2, 22.7),
    ],
)
def test_sasa_table_3(groups, published_flops, published_parameters):
    config = SASA(groups=groups)
    np.testing.assert_allclose(gigaflops(config), published_flops, rtol=0.02)
    np.testing.assert_allclose(cost(config).params / 1e6, published_parameters, atol=0.1)


@pytest.mark.parametrize(("size", "published"), [(3, 6.6), (5, 6.7), (7, 7.0), (9, 7.3), (11, 7.7)])
def test_sasa_table_4(size, published):
    np.testing.assert_allclose(gigaflops(SASA(kernel_size=size)), published, rtol=0.02)


@pytest.mark.parametrize(
    ("fields", "published_flops", "published_parameters"),
    [
        ({"position": "none"}, 6.9, 18.0),  # Table 5; its count of relative logits is smaller than Table 4's
        ({"position": "absolute"}, 6.9, 18.0),
        ({"content": False}, 6.1, 16.7),  # Table 6
    ],
)
def test_sasa_tables_5_and_6(fields, published_flops, published_parameters):
    config = SASA(**fields)
    np.testing.assert_allclose(gigaflops(config), published_flops, rtol=0.02)
    np.testing.assert_allclose(cost(config).params / 1e6, published_parameters, atol=0.1)


@pytest.mark.parametrize(("position", "published"), [("quadratic", 6.2), ("learned", 6.2), ("learned+content", 15.0)])
def test_attention_cnn_flops_are_those_of_its_linear_maps(position, published):
    """Cordonnier et al., Table 1, counts no attention products; our own count does."""
    config = AttentionCNNConfig(position=position)
    np.testing.assert_allclose(attention_cnn_linear(config, (32, 32), 10) / 1e9, published, rtol=0.02)
    products = 2 * 6 * 9 * 256 * 256 * 400 * (2 if position == "learned+content" else 1)
    if position == "learned+content":
        products += 2 * 6 * 9 * 256 * 62 * 200
    forward = flops.count(config, image_size=(32, 32), num_classes=10).forward_flops
    assert forward == attention_cnn_linear(config, (32, 32), 10) + products


# --- Spatial layers ---------------------------------------------------------------------------------------------------


@functools.cache
def features(channels=16, side=6):
    return jax.random.normal(jax.random.key(1), (2, side, side, channels))


def test_strided_attention_runs_on_the_incoming_map_and_pools_after():
    x = features()
    layer, strided = (spatial.LocalAttention(16, 4, 3, key=jax.random.key(0), stride=s) for s in (1, 2))
    whole = jax.jit(layer)(x)
    np.testing.assert_allclose(jax.jit(strided)(x), whole.reshape(2, 3, 2, 3, 2, 16).mean((2, 4)), atol=1e-6)


def test_local_attention_by_content_by_position_or_by_absolute_position():
    """The ablations of SASA, Tables 5 and 6, each against the layer of both with the other part taken out."""
    x = features()
    make = functools.partial(spatial.LocalAttention, 16, 4, 3, key=jax.random.key(0))
    both, none, absolute, relative = make(), make(position="none"), make(position="absolute"), make(content=False)
    run = jax.jit(lambda layer, x: (layer(x), layer.weights(x)))
    for layer, part in ((none, "position"), (relative, "content")):
        reference = make()
        if part == "position":
            reference.rel_row[...] = reference.rel_col[...] = jnp.zeros((3, 4, 2))
        else:
            assert reference.key is not None
            reference.key.kernel[...] = jnp.zeros_like(reference.key.kernel[...])
        for mine, expected in zip(run(layer, x), run(reference, x), strict=True):
            np.testing.assert_allclose(mine, expected, atol=1e-6)
            assert np.abs(mine - np.asarray(run(both, x)[mine.ndim == 6])).max() > 0.01
    for mine, expected in zip(
        run(absolute, x), run(none, x + layers.sincos2d(6, 6, 16).reshape(1, 6, 6, 16)), strict=True
    ):
        np.testing.assert_allclose(mine, expected, atol=1e-6)
    content, row, column = relative.terms(x)
    logits = content + row[..., :, None] + column[..., None, :]
    inside = relative.weights(x)[:, 1:-1, 1:-1]  # all neighbors lie in the image there
    softmax = jax.nn.softmax(logits[:, 1:-1, 1:-1].reshape(*inside.shape[:4], 9)).reshape(inside.shape)
    np.testing.assert_allclose(inside, softmax, atol=1e-6)


def test_average_pool_divides_by_the_pixels_that_are_there():
    np.testing.assert_allclose(spatial.average_pool(jnp.ones((1, 5, 4, 1)), 2, 2), np.ones((1, 3, 2, 1)))
    np.testing.assert_allclose(spatial.average_pool(jnp.ones((1, 5, 4, 1)), 3, 2), np.ones((1, 3, 2, 1)))


def test_attention_stem_against_a_loop_over_blocks():
    stem = spatial.AttentionStem(8, 2, 3, key=jax.random.key(0))
    x = np.asarray(jax.random.normal(jax.random.key(1), (1, 8, 4, 3)))
    position = np.asarray(stem.block_row[...])[:, None] + np.asarray(stem.block_col[...])[None, :]  # row, column
    p = np.exp(position @ np.asarray(stem.mixture[...]).T)
    p /= p.sum(-1, keepdims=True)
    query, key, values = (np.asarray(w) for w in (stem.query.kernel[...], stem.key.kernel[...], stem.value.kernel[...]))
    expected = np.zeros((8, 4, 2, 4))
    for top in (0, 4):
        pixels = [(i, j) for i in range(top, top + 4) for j in range(4)]
        v = {  # the paper's way: every projection first, then the mixture
            (i, j): sum(p[i - top, j, m] * np.einsum("C,CNK->NK", x[0, i, j], values[m]) for m in range(3))
            for i, j in pixels
        }
        for i, j in pixels:
            q = np.einsum("C,CNK->NK", x[0, i, j], query)
            logits = np.stack([(q * np.einsum("C,CNK->NK", x[0][pixel], key)).sum(-1) for pixel in pixels])
            weights = np.exp(logits) / np.exp(logits).sum(0)
            expected[i, j] = sum(w[:, None] * v[pixel] for w, pixel in zip(weights, pixels, strict=True))
    np.testing.assert_allclose(jax.jit(stem)(jnp.asarray(x))[0], expected.reshape(8, 4, 8), atol=1e-5)


def fill(shape, a, b):
    return np.sin(a * np.arange(np.prod(shape)) + b).reshape(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("size", "stride", "side"), [(1, 1, 5), (1, 2, 5), (1, 2, 6), (3, 1, 5), (3, 2, 5), (3, 2, 6), (7, 2, 9)]
)
def test_a_convolution_and_its_gradients_are_those_of_xla(size, stride, side):
    keys = jax.random.split(jax.random.key(0), 3)
    conv = spatial.Conv(3, 4, size, key=keys[0], stride=stride)
    images_BHWC = jax.random.normal(keys[1], (2, side, side + 1, 3))
    kernel = conv.kernel[...]
    y, pull = jax.vjp(lambda x, kernel: spatial.convolve(x, kernel, stride), images_BHWC, kernel)
    graphdef, state = nnx.split(conv)
    own, own_pull = jax.vjp(lambda x, state: nnx.merge(graphdef, state)(x), images_BHWC, state)
    np.testing.assert_allclose(own, y, rtol=1e-5, atol=1e-5)
    cotangent = jax.random.normal(keys[2], y.shape)
    for ours, theirs in zip(jax.tree.leaves(own_pull(cotangent)), pull(cotangent), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_gradients_in_bfloat16_are_summed_in_float32():
    keys = jax.random.split(jax.random.key(0), 3)
    x_BHWC, kernel_hwCE = jax.random.normal(keys[0], (2, 6, 6, 32)), jax.random.normal(keys[1], (3, 3, 32, 32))
    half = [a.astype(jnp.bfloat16) for a in (x_BHWC, kernel_hwCE, jax.random.normal(keys[2], (2, 6, 6, 32)))]
    *exact_args, cotangent = (a.astype(jnp.float32) for a in half)
    exact = jax.vjp(lambda *args: spatial.convolve(*args, 1), *exact_args)[1](cotangent)
    found = jax.vjp(lambda *args: spatial.convolve_on_cpu(*args, 1), *half[:2])[1](half[2])
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == jnp.bfloat16
        # Rounding the result alone costs 0.0017 of the norm; summing nine terms in bfloat16 would cost 0.004.
        assert jnp.linalg.norm(ours.astype(jnp.float32) - theirs) < 0.0025 * jnp.linalg.norm(theirs)


@pytest.mark.parametrize(("platform", "convolutions"), [("cpu", 1), ("gpu", 3), ("tpu", 3)])
def test_gradients_are_products_on_a_cpu_and_convolutions_elsewhere(platform, convolutions, monkeypatch):
    """In a loop over layers, XLA takes a CPU fifty times as long for such a convolution as for products."""
    monkeypatch.setattr(kernels, "platform", lambda: platform)
    conv = spatial.Conv(3, 4, 3, key=jax.random.key(0))
    graphdef, state = nnx.split(conv)
    gradient = jax.grad(lambda state, x: jnp.sum(jnp.square(nnx.merge(graphdef, state)(x))), argnums=(0, 1))
    program = str(jax.make_jaxpr(gradient)(state, jnp.ones((1, 5, 5, 3))))
    assert program.count("conv_general_dilated[") == convolutions


def test_golden_augmented_attention():
    """A 2x3 map, one head, 4 channels of keys and 2 of values: numbers of a plain loop in float64."""
    layer = spatial.AugmentedConv(10, 1, (2, 3), key=jax.random.key(0), key_fraction=0.4, value_fraction=0.2)
    q, k, v = (fill((6, n), a, b) for n, a, b in ((4, 0.7, 0.1), (4, 1.1, 0.2), (2, 1.3, 0.3)))
    x = jnp.asarray(np.concatenate([q, k, v], axis=1).reshape(1, 2, 3, 10))
    pick = np.eye(10, dtype=np.float32)[:, None]
    for name, columns in (("query", slice(0, 4)), ("key", slice(4, 8)), ("value", slice(8, 10))):
        getattr(layer, name).kernel = nnx.Param(jnp.asarray(pick[..., columns]))
    layer.out.kernel = nnx.Param(jnp.eye(2)[None])
    layer.rel_col, layer.rel_row = (
        nnx.Param(jnp.asarray(fill((n, 4), a, b))) for n, a, b in ((5, 1.7, 0.4), (3, 1.9, 0.5))
    )
    y = np.asarray(layer(x))[0, :, :, -2:].reshape(6, 2)
    np.testing.assert_allclose(y[0], (-0.037725, -0.013052), atol=1e-6)
    np.testing.assert_allclose(y[5], (0.305469, 0.377406), atol=1e-6)
    np.testing.assert_allclose(y.sum(), 1.4218997886477807, rtol=1e-5)


def test_pooled_augmented_attention_uses_every_second_offset():
    """Attending at half resolution, an offset of one pooled pixel is an offset of two of the table."""
    layer = spatial.AugmentedConv(16, 1, (6, 7), key=jax.random.key(0), key_fraction=0.2, value_fraction=0.5, pool=True)
    x = jax.random.normal(jax.random.key(1), (2, 6, 7, 16))
    y, gradient = jax.jit(lambda layer, x: (layer(x), jax.grad(lambda m: jnp.sum(m(x) ** 2))(layer)))(layer, x)
    assert y.shape == (2, 6, 7, 16)
    used = [np.flatnonzero(np.abs(g[...]).max(1)) for g in (gradient.rel_row, gradient.rel_col)]
    np.testing.assert_array_equal(used[0] - 5, [-4, -2, 0, 2, 4])  # 3 rows
    np.testing.assert_array_equal(used[1] - 6, [-6, -4, -2, 0, 2, 4, 6])  # 4 columns
    assert layer.weights(x).shape == (2, 1, 3, 4, 3, 4)


def test_augmented_dims():
    """At least 20 channels of keys a head; AA's 0.2 and 0.1 of 512 channels and 8 heads."""
    assert spatial.augmented_dims(512, 8, 0.2, 0.1) == (160, 48)
    assert spatial.augmented_dims(512, 8, 1.0, 1.0) == (512, 512)


def test_non_local_block_is_the_identity_when_inserted_and_attends_to_the_whole_map():
    block = spatial.NonLocal(16, key=jax.random.key(0), decay=0.9, eps=1e-5)
    x = features()
    np.testing.assert_array_equal(block(x, False), x)
    block.norm.scale[...] += 1.0
    gradient = jax.grad(lambda x: block(x, False)[0, 0, 0, 0])(x)
    assert (np.abs(gradient[0]).max(-1) > 0).all()
    theta, phi, g = (np.asarray(layer(x)).reshape(2, 36, 8) for layer in (block.theta, block.phi, block.g))
    logits = np.einsum("bqc,bsc->bqs", theta, phi)  # not scaled
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    y = (weights @ g) @ np.asarray(block.out.kernel[...])
    np.testing.assert_allclose(block(x, False), x + y.reshape(x.shape) / np.sqrt(1 + 1e-5), atol=1e-5)


# --- Statistics -------------------------------------------------------------------------------------------------------


def test_batch_norm_uses_the_batch_in_training_and_the_running_statistics_after():
    norm = spatial.BatchNorm(16, decay=0.75, eps=1e-5)
    x = 3 * features() + 2
    y = norm(x, True)
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(y.std((0, 1, 2)), 1, atol=1e-4)
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    np.testing.assert_allclose(norm.mean[...], 0.25 * mean, rtol=1e-5)
    np.testing.assert_allclose(norm.variance[...], 0.75 + 0.25 * variance, rtol=1e-5)
    before, deviation = np.asarray(norm.mean[...]), np.sqrt(np.asarray(norm.variance[...]) + 1e-5)
    np.testing.assert_allclose(norm(x, False), (np.asarray(x) - before) / deviation, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(norm.mean[...], before)


def configuration(**fields):
    return ResNetConfig(
        **{"depth": 26, "width": 8, "heads": 2, "stem_heads": 2, "kernel_size": 3, "bn_decay": 0.5, **fields}
    )


def perturbed(model):
    """With random numbers added: norms that start at zero, and the classifier, would hide what lies before them."""
    graphdef, parameters, statistics = nnx.split(model, nnx.Param, nnx.BatchStat)
    leaves, tree = jax.tree.flatten(nnx.to_pure_dict(parameters))
    generator = np.random.default_rng(0)
    leaves = [leaf + 0.3 * generator.standard_normal(leaf.shape, np.float32) for leaf in leaves]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves), nnx.to_pure_dict(statistics))


def small(**fields):
    return ResNet(configuration(**fields), image_size=(24, 16), num_classes=5, key=jax.random.key(0))


def step(model, *arguments):
    """Loss, its gradient and the statistics after a training call, as the train step takes them."""

    def loss(parameters, statistics):
        merged = nnx.merge(graphdef, parameters, statistics)
        value = jnp.mean(jnp.square(merged(*arguments) - 1))
        return value, nnx.to_pure_dict(nnx.state(merged, nnx.BatchStat))

    graphdef, parameters, statistics = nnx.split(model, nnx.Param, nnx.BatchStat)
    state = nnx.to_pure_dict(parameters), nnx.to_pure_dict(statistics)
    (value, statistics), gradient = jax.value_and_grad(loss, has_aux=True)(*state)
    return {"loss": value, "gradient": gradient, "statistics": statistics}


training_step = jax.jit(lambda group, x: step(group, x, True))

KINDS = {
    "attention": {"spatial": "attention", "stem": "attention"},
    "augmented": {"spatial": "augmented", "groups": (3,), "nonlocal_after": (3,), "pool_above": 4},
}


@functools.cache
def images():
    return jax.random.uniform(jax.random.key(2), (8, 24, 16, 3), minval=-1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns_and_every_statistic_moves(kind):
    model = perturbed(small(depth=14, **KINDS[kind]))
    result = jax.jit(lambda model, x: step(model, x, jax.random.key(0)))(model, images())
    for path, leaf in jax.tree_util.tree_leaves_with_path(result["gradient"]):
        name = jax.tree_util.keystr(path)
        # Maps of one pixel (the last group's) have one key, whose weight is 1 whatever its logit.
        if "group4" not in name:
            assert float(jnp.abs(leaf).max()) > 0, name
    assert_every_statistic_moved(model, result)


def assert_every_statistic_moved(model, result):
    before = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    moves = jax.tree.map(lambda new, old: jnp.abs(new - old).max(-1).min(), result["statistics"], before)
    for path, move in jax.tree_util.tree_leaves_with_path(moves):
        assert float(move) > 0, path


@pytest.fixture(scope="module", params=KINDS, ids=list(KINDS))
def group(request):
    """The third group alone: an entry with stride, then three scanned blocks; its result of one training step."""

    def build(**fields):
        config = configuration(**{**KINDS[request.param], **fields})
        return perturbed(resnet.Group(config, 3, 16, (5, 3), key=jax.random.key(0)))

    x = jax.random.normal(jax.random.key(3), (8, 10, 6, 16))
    return build, x, training_step(build(), x)


def assert_equal_results(ours, theirs):
    for key in ("loss", "gradient", "statistics"):
        floor = 1e-3 * max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(theirs[key]))
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(ours[key]), jax.tree.leaves(theirs[key]), strict=True
        ):
            tolerance = 1e-4 * max(float(np.abs(b).max()), floor)
            np.testing.assert_allclose(a, b, atol=tolerance, rtol=0, err_msg=jax.tree_util.keystr(path))


def test_scan_and_remat_change_no_number(group):
    build, x, result = group
    assert_every_statistic_moved(build(), result)  # of every layer of the scan
    assert_equal_results(training_step(build(scan=False, remat="full"), x), result)


def test_statistics_of_a_split_batch_are_those_of_the_whole(group):
    """Each of eight devices has one image: unsynchronised norms would see one image each."""
    build, x, result = group
    mesh = mesh_lib.create(MeshConfig(replica=2))
    x = jax.device_put(x, sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        model = jax.device_put(build(), NamedSharding(mesh, PartitionSpec()))
        assert_equal_results(training_step(model, x), result)


def test_maps_of_every_attention_layer():
    model = small(depth=26, spatial="attention", groups=(1, 2), nonlocal_after=(2,))
    maps = jax.jit(lambda model, x: model.attention_maps(x))(model, images())
    assert {name: m.shape for name, m in maps.items()} == {
        "1/1": (8, 6, 4, 2, 3, 3),
        "2/1": (8, 6, 4, 2, 3, 3),  # on the incoming map
        "2/2": (8, 3, 2, 2, 3, 3),
        "2/nonlocal": (8, 3, 2, 3, 2),
    }
    np.testing.assert_allclose(maps["1/1"].sum((-2, -1)), 1, atol=1e-5)
    np.testing.assert_allclose(maps["2/nonlocal"].sum((-2, -1)), 1, atol=1e-5)
    with pytest.raises(ValueError, match="convolutions only"):
        small().attention_maps(images())


@pytest.mark.parametrize(
    ("action", "sentence"),
    [
        (lambda: ResNetConfig(depth=34), "depth is 34; choose one of 14, 26, 38, 50, 101"),
        (lambda: ResNetConfig(spatial="swin"), "spatial is 'swin'; choose one of convolution, attention, augmented"),
        (lambda: ResNetConfig(stem="patch"), "stem is 'patch'; choose one of convolution, attention, small"),
        (lambda: ResNetConfig(backend="cuda"), "backend is 'cuda'; choose one of blocks, shifts, pallas"),
        (lambda: ResNetConfig(position="rope"), "position is 'rope'; choose one of relative, absolute, none"),
        (lambda: ResNetConfig(content=False, position="none"), "model.content is False and model.position 'none'"),
        (lambda: ResNetConfig(kernel_size=4), "kernel_size is 4; local attention needs an odd"),
        (lambda: ResNetConfig(groups=(0, 1)), r"groups is \(0, 1\); a residual network has groups 1, 2, 3 and 4"),
        (lambda: small(spatial="attention", heads=3), "8 channels cannot be split over 3 heads of an even size"),
        (
            lambda: spatial.AttentionStem(8, 2, 2, key=jax.random.key(0))(jnp.zeros((1, 6, 8, 3))),
            "images of 6x8 pixels cannot be cut into the 4x4 blocks",
        ),
    ],
)
def test_wrong_input_gets_one_clear_sentence(action, sentence):
    with pytest.raises(ValueError, match=sentence):
        action()


def test_an_augmented_network_names_the_image_size_it_was_built_for():
    model = small(spatial="augmented", groups=(4,), stem="small")
    with pytest.raises(ValueError, match="column table has 3 offsets, but a map of 3x3 needs 5"):
        jax.eval_shape(model, jax.ShapeDtypeStruct((1, 24, 24, 3), jnp.float32))


def test_group_sizes_follow_any_image():
    assert resnet.map_sizes(ResNetConfig(), (224, 200)) == [(56, 50), (28, 25), (14, 13), (7, 7)]
    assert resnet.map_sizes(dataclasses.replace(ResNetConfig(), stem="small"), (28, 28))[3] == (4, 4)

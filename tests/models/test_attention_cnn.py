"""Attention as convolution: the theorem, the published sizes, where heads look, pruning."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vit_scaling.models import attention_cnn
from vit_scaling.models.attention_cnn import AttentionCNN, AttentionCNNConfig, convolution_to_attention
from vit_scaling.ops import relative


def fill(shape, a, b):
    return np.sin(a * np.arange(np.prod(shape)) + b).reshape(shape)


def convolve(x, kernel, bias, mode):
    pads = [((k - 1) // 2, k // 2) for k in kernel.shape[:2]]
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)), mode=mode)
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y + bias[None, None, None]


def by_definition(x, kernel, bias, mode):
    """A convolution as its definition has it: for each pixel, the sum over taps and channels of pixel times weight."""
    rows, columns = kernel.shape[:2]
    H, W = x.shape[1:3]
    padded = np.pad(x, ((0, 0), *[((k - 1) // 2, k // 2) for k in (rows, columns)], (0, 0)), mode=mode)
    taps = [padded[:, i : i + H, j : j + W] for i in range(rows) for j in range(columns)]
    return jnp.tensordot(jnp.stack(taps, axis=3), kernel.reshape(-1, *kernel.shape[2:]), 2) + bias[None, None, None]


def test_golden_convolution_and_how_the_error_falls_with_alpha():
    with jax.enable_x64(True):
        x, kernel = jnp.asarray(fill((1, 6, 6, 2), 0.9, 0.3)), jnp.asarray(fill((3, 3, 2, 3), 0.37, 0.2))
        bias = jnp.asarray(fill((3,), 1, 0))
        zero, edge = convolve(x, kernel, bias, "constant"), convolve(x, kernel, bias, "edge")
        np.testing.assert_allclose(zero[0, 0, 0], (-0.919402, 0.632304, 1.438676), atol=1e-6)
        np.testing.assert_allclose(zero[0, 2, 3], (0.018259, 0.937782, 1.070625), atol=1e-6)
        np.testing.assert_allclose(zero.sum(), 53.73235417414467, rtol=1e-12)

        def error(alpha, padding, target):
            return float(jnp.abs(convolution_to_attention(kernel, bias, alpha, padding=padding)(x) - target).max())

        np.testing.assert_allclose(
            [error(a, "zero", zero) for a in (5, 10, 20)], [6.96e-2, 4.78e-4, 2.17e-8], rtol=5e-3
        )
        np.testing.assert_allclose(error(10, "edge", edge), 5.3e-4, rtol=2e-2)
        # No error at all: the weights are exactly 0 and 1, so that the layer picks pixels and sums what the definition
        # of convolution sums. lax's convolution adds in another order, and that is all that is between them.
        assert error(46, "zero", by_definition(x, kernel, bias, "constant")) == 0
        assert error(46, "edge", by_definition(x, kernel, bias, "edge")) == 0
        assert error(46, "zero", zero) < 2e-15
        assert error(46, "edge", edge) < 2e-15
        np.testing.assert_allclose(error(46, "edge", zero), 3.575018, atol=1e-6)  # at the border only:
        np.testing.assert_allclose(edge[:, 1:-1, 1:-1], zero[:, 1:-1, 1:-1], atol=1e-12)
        weights = convolution_to_attention(kernel, bias, 46.0).attention.weights(*[relative.offsets(6, 8, 1)] * 2)
        np.testing.assert_array_equal(np.sort(weights.reshape(9 * 36, 64), axis=1)[:, -1], 1)


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (5, 5), (2, 4)], ids=str)
def test_theorem_for_random_kernels(size):
    keys = jax.random.split(jax.random.key(1), 3)
    x, kernel = jax.random.normal(keys[0], (2, 7, 6, 3)), jax.random.normal(keys[1], (*size, 3, 4))
    bias = jax.random.normal(keys[2], (4,))

    @jax.jit
    def both(x, kernel, bias):
        return [
            (convolution_to_attention(kernel, bias, 46.0, padding=padding)(x), convolve(x, kernel, bias, mode))
            for padding, mode in (("zero", "constant"), ("edge", "edge"))
        ]

    for ours, theirs in both(x, kernel, bias):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=1e-5)


def test_logits_are_the_quadratic_encoding_up_to_a_constant():
    """v·r with r = (|d|², d) and v = -alpha (1, -2 center), as the paper writes it."""
    alpha, center = 0.7, np.array([1.0, -2.0])
    rows, columns = relative.offsets(3, 3), relative.offsets(4, 4)
    d = np.stack(np.broadcast_arrays(rows[:, None, :, None], columns[None, :, None, :]), axis=-1)
    r = np.concatenate([(d**2).sum(-1, keepdims=True), d], axis=-1)
    paper = r @ (-alpha * np.array([1.0, *(-2 * center)]))
    precision = 2 * alpha * jnp.eye(2)[None]
    ours = relative.gaussian_logits(jnp.asarray(center[None], jnp.float32), precision, rows, columns)[0]
    np.testing.assert_allclose(ours + alpha * (center**2).sum(), paper, atol=1e-5)


def test_a_general_gaussian_has_precision_spread_times_its_transpose():
    spread = jnp.array([[[1.0, 0.5], [-0.3, 2.0]]])
    precision = np.asarray(spread[0]) @ np.asarray(spread[0]).T
    rows = columns = relative.offsets(3, 3)
    center = jnp.array([[0.4, -0.2]])
    logits = relative.gaussian_logits(center, attention_cnn.precisions(spread), rows, columns)
    delta = np.array([2.0, -1.0]) - np.asarray(center[0])  # query (0, 1), key (2, 0)
    np.testing.assert_allclose(logits[0, 0, 1, 2, 0], -0.5 * delta @ precision @ delta, rtol=1e-5)


@pytest.mark.parametrize(
    ("position", "heads", "parameters"),
    [
        ("quadratic", 9, 12_086_844),
        ("gaussian", 9, 12_087_006),
        ("learned", 9, 12_278_682),
        ("learned+content", 9, 29_484_282),
        ("quadratic", 16, None),
    ],
)
def test_published_parameter_counts(position, heads, parameters):
    config = AttentionCNNConfig(position=position, heads=heads)
    model = jax.eval_shape(lambda: AttentionCNN(config, image_size=(32, 32), num_classes=10, key=jax.random.key(0)))
    count = sum(x.size for x in jax.tree.leaves(model))
    expected = 12_086_844 + 6 * 7 * (400 * 400 + 3) if parameters is None else parameters
    assert count == expected


call = jax.jit(lambda model, x, key=None: model(x, key))


def small(position, **fields):
    return nnx.clone(built(position, **fields))


@functools.cache
def built(position, **fields):
    config = AttentionCNNConfig(position=position, width=8, depth=2, heads=3, mlp=16, **fields)
    return AttentionCNN(config, image_size=(8, 12), num_classes=5, key=jax.random.key(0))


@functools.cache
def images():
    return jax.random.uniform(jax.random.key(2), (2, 8, 12, 3), minval=-1)


@pytest.mark.parametrize("position", attention_cnn.POSITIONS)
def test_forward_gradient_and_maps(position):
    model = small(position)

    @jax.jit
    def everything(model, x):
        loss = lambda model: jnp.sum(jnp.square(model(x, jax.random.key(3))))  # noqa: E731
        return model(x), jax.grad(loss)(model), model.attention_maps(x)

    logits, gradient, maps = everything(model, images())
    assert logits.shape == (2, 5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        # The key's bias adds the same to all logits of a query, which the softmax does not see.
        if "key" not in str(path) or "bias" not in str(path):
            assert float(jnp.abs(leaf).max()) > 0, path
    assert maps.shape == (2, 2, 3, 24, 24)
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)


def test_learned_logits_depend_on_the_offset_only():
    model = small("learned", dropout=0.0)
    model.blocks.attention.rel_row[...] *= 50
    model.blocks.attention.rel_col[...] *= 50
    logits = jnp.log(model.attention_maps(images()))[0, 0, 1].reshape(4, 6, 4, 6)
    # The same offset (1, 2) from two queries, against each query's own offset (0, 0).
    np.testing.assert_allclose(
        logits[0, 1, 1, 3] - logits[0, 1, 0, 1], logits[2, 3, 3, 5] - logits[2, 3, 2, 3], atol=1e-4
    )
    block = jax.tree.map(lambda x: x[0], model.blocks).attention
    rows = block.rel_row[...] @ block.row_score.kernel[...]
    columns = block.rel_col[...] @ block.column_score.kernel[...]
    expected = rows[3 + 1, 1] - rows[3, 1] + columns[5 + 2, 1] - columns[5, 1]
    np.testing.assert_allclose(logits[0, 1, 1, 3] - logits[0, 1, 0, 1], expected, atol=1e-4)


def test_scan_changes_no_number():
    x = images()
    scanned, unrolled = call(small("quadratic"), x), call(small("quadratic", scan=False, remat="full"), x)
    np.testing.assert_allclose(scanned, unrolled, atol=1e-6)


def test_dropout_only_in_training():
    model = small("quadratic", dropout=0.5)
    first, second = (call(model, images(), jax.random.key(seed)) for seed in (0, 1))
    assert float(jnp.abs(first - second).max()) > 1e-3
    np.testing.assert_allclose(
        call(model, images()), call(small("quadratic", dropout=0.0), images(), jax.random.key(0)), atol=1e-6
    )


def test_pruned_heads_are_silent():
    model, pruned = small("gaussian"), small("gaussian", pruned_heads=(1, 5))
    silenced = small("gaussian")
    kernel = silenced.blocks.attention.out.kernel[...]
    silenced.blocks.attention.out.kernel[...] = kernel.at[0, 1].set(0).at[1, 2].set(0)
    np.testing.assert_allclose(call(pruned, images()), call(silenced, images()), atol=1e-6)
    assert float(jnp.abs(call(pruned, images()) - call(model, images())).max()) > 1e-4


def test_heads_are_pruned_by_condition_number():
    spreads = np.tile(np.eye(2), (2, 3, 1, 1))
    spreads[0, 1] = np.diag([1, 40])  # precision's condition 1600
    spreads[1, 0] = np.diag([1e-3, 1e-3])  # round, but everywhere: eigenvalue 1e-6
    spreads[1, 2] = np.diag([1, 30])  # 900
    assert attention_cnn.prunable_heads(jnp.asarray(spreads, jnp.float32)) == (1, 3)


@pytest.mark.parametrize(
    ("action", "sentence"),
    [
        (lambda: AttentionCNNConfig(position="sine"), "position is 'sine'; choose one of quadratic, gaussian, learned"),
        (lambda: AttentionCNNConfig(pruned_heads=(54,)), "pruned_heads names 54; 6 layers of 9 heads .* 0 to 53"),
        (lambda: AttentionCNNConfig(position="learned+query", width=9), "width 9 is odd"),
        (lambda: small("quadratic")(jnp.zeros((1, 7, 8, 3))), "images of 7x8 pixels cannot be cut into 2x2"),
        (lambda: small("learned")(jnp.zeros((1, 16, 12, 3))), "row table has 7 offsets, but a map of 8x6 needs 15"),
        (lambda: convolution_to_attention(jnp.zeros((1, 1, 1, 1)), None, 0.0), "alpha is 0.0"),
        (lambda: convolution_to_attention(jnp.zeros((1, 1, 1, 1)), None, 1.0, padding="same"), "choose one of zero"),
        (lambda: attention_cnn.prunable_heads(jnp.ones((6, 9))), "only general Gaussians"),
    ],
)
def test_wrong_input_gets_one_clear_sentence(action, sentence):
    with pytest.raises(ValueError, match=sentence):
        action()

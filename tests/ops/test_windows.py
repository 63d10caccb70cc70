"""Windows against slow references that visit one token at a time, and against figures worked out elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_scaling.ops import windows

# (height, width, window, shift): whole windows, padding below, to the right and on both sides, no shift, one window.
GRIDS = [(4, 4, 2, 1), (8, 12, 4, 2), (7, 9, 4, 2), (6, 4, 4, 2), (5, 10, 5, 0), (9, 7, 3, 1), (3, 3, 3, 0)]


def filler(shape, a, b):
    """sin(a·i + b), i counting the elements."""
    return np.sin(a * np.arange(np.prod(shape)) + b).reshape(shape)


def reference_split(x_HWD, window, shift):
    """Token y, x of window r, c is token r·window + y + shift, c·window + x + shift of the padded grid, wrapped."""
    height, width, depth = x_HWD.shape
    padded_height, padded_width = -(-height // window) * window, -(-width // window) * window
    result = []
    for r in range(padded_height // window):
        for c in range(padded_width // window):
            tokens = []
            for y in range(window):
                for x in range(window):
                    i, j = (r * window + y + shift) % padded_height, (c * window + x + shift) % padded_width
                    tokens.append(x_HWD[i, j] if i < height and j < width else np.zeros(depth))
            result.append(tokens)
    return np.array(result)


def reference_region(position, length, window, shift):
    """Pieces of the rolled axis: whole windows, the last window's own tokens, the tokens that came round."""
    padded = -(-length // window) * window
    return 0 if position < padded - window else 1 if position < padded - shift else 2


@pytest.mark.parametrize(("height", "width", "window", "shift"), GRIDS)
def test_split_and_join(height, width, window, shift):
    x_BHWD = jax.random.normal(jax.random.key(0), (2, height, width, 3))
    windows_BGnD = windows.split(x_BHWD, window, shift)
    for x_HWD, windows_GnD in zip(x_BHWD, windows_BGnD, strict=True):
        np.testing.assert_array_equal(windows_GnD, reference_split(np.asarray(x_HWD), window, shift))
    np.testing.assert_array_equal(windows.join(windows_BGnD, height, width, shift), x_BHWD)


@pytest.mark.parametrize(("height", "width", "window", "shift"), GRIDS)
def test_masked_pairs(height, width, window, shift):
    numbers_Gn = windows.regions(height, width, window, shift)
    mask_Gnn = np.asarray(windows.masked_pairs(numbers_Gn))
    columns = -(-width // window)
    place = lambda g, n: (g // columns * window + n // window, g % columns * window + n % window)  # noqa: E731
    for g, q, k in np.ndindex(mask_Gnn.shape):
        (qy, qx), (ky, kx) = place(g, q), place(g, k)
        same = all(
            reference_region(a, length, window, shift) == reference_region(b, length, window, shift)
            for a, b, length in ((qy, ky, height), (qx, kx, width))
        )
        assert mask_Gnn[g, q, k] == (not same)


def test_how_many_pairs_are_masked():
    counts = lambda *grid: np.asarray(windows.masked_pairs(windows.regions(*grid))).sum(axis=(1, 2))  # noqa: E731
    assert counts(4, 4, 2, 1).tolist() == [0, 8, 8, 12]
    swin_tiny = counts(56, 56, 7, 3)
    assert (swin_tiny > 0).sum() == 15
    assert swin_tiny.sum() == 18_240
    assert swin_tiny[-1] == 1_776
    assert counts(56, 56, 7, 0).sum() == 0


@pytest.mark.parametrize(
    ("height", "width", "window", "expected"),
    [(56, 56, 7, (7, 3)), (7, 7, 7, (7, 0)), (5, 20, 7, (5, 0)), (8, 9, 7, (7, 3)), (16, 16, 16, (16, 0))],
)
def test_window_and_shift(height, width, window, expected):
    assert windows.window_and_shift(height, width, window) == expected


def reference_index(window):
    """The row of the table, by loops over both tokens."""
    index = np.zeros((window * window, window * window), int)
    for q in range(window * window):
        for k in range(window * window):
            dy, dx = q // window - k // window, q % window - k % window
            index[q, k] = (dy + window - 1) * (2 * window - 1) + dx + window - 1
    return index


def test_relative_index():
    assert windows.relative_index(2).tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    index = windows.relative_index(7)
    assert [index[0, 0], index[0, 48], index[48, 0], index[0, 1], index[0, 7], index.sum()] == [
        84,
        0,
        168,
        83,
        71,
        201_684,
    ]
    for window in (1, 3, 5):
        np.testing.assert_array_equal(windows.relative_index(window), reference_index(window))


def test_a_smaller_window_reads_the_middle_of_the_table():
    """The bias of an offset does not depend on the window that asks for it."""
    window, whole = 3, 5
    table = jnp.asarray(filler(((2 * whole - 1) ** 2, 2), 0.7, 0.1))
    small, large = windows.relative_bias(table, window), windows.relative_bias(table, whole)
    for q in range(window**2):
        for k in range(window**2):
            wide = [t // window * whole + t % window for t in (q, k)]
            np.testing.assert_array_equal(small[:, q, k], large[:, wide[0], wide[1]])


def golden_window():
    """One 2x2 window of width 4 and 2 heads: (q, k, v as [1, 1, n, N, K], bias table [9, N], output projection)."""
    x = filler((4, 4), 0.7, 0.1)
    qkv = x @ filler((4, 12), 0.9, 0.2) + filler((12,), 1.1, 0.3)
    q, k, v = (jnp.asarray(part.reshape(1, 1, 4, 2, 2)) for part in np.split(qkv, 3, axis=1))
    project = lambda y: np.asarray(y).reshape(4, 4) @ filler((4, 4), 1.3, 0.4) + filler((4,), 1.5, 0.5)  # noqa: E731
    return q, k, v, jnp.asarray(filler((9, 2), 1.7, 0.6)), project


def test_golden_attention_of_version_1():
    q, k, v, table, project = golden_window()
    y, _ = windows.window_attention(q * 2**-0.5, k, v, windows.relative_bias(table, 2))
    y = project(y)
    np.testing.assert_allclose(y[0], [1.100806, 0.456891, -1.214200, -0.968444], atol=2e-6)
    np.testing.assert_allclose(y[3], [3.082613, 1.934006, -2.405754, -3.083037], atol=2e-6)
    np.testing.assert_allclose(y.sum(), -2.5849024731467742, atol=5e-6)


def test_golden_cosine_attention_of_version_2():
    q, k, v, table, project = golden_window()
    bias = 16 * jax.nn.sigmoid(windows.relative_bias(table, 2))
    y, _ = windows.window_attention(10 * windows.unit(q), windows.unit(k), v.astype(jnp.float32), bias)
    y = project(y)
    np.testing.assert_allclose(y[0], [0.896358, -0.305810, -1.417795, -0.314666], atol=5e-6)
    np.testing.assert_allclose(y[3], [3.498604, 1.597258, -3.001904, -3.065229], atol=5e-6)
    np.testing.assert_allclose(y.sum(), -4.803848228062502, atol=2e-5)


def reference_attention(q, k, v, bias, numbers):
    """softmax(q k + bias), one query of one head at a time; pairs of different regions get -100."""
    y = np.zeros(v.shape)
    for b, g, i, h in np.ndindex(q.shape[:4]):
        logits = np.array([q[b, g, i, h] @ k[b, g, j, h] + bias[h, i, j] for j in range(q.shape[2])])
        logits += np.where(numbers[g] == numbers[g, i], 0, -100)
        weights = np.exp(logits - logits.max())
        y[b, g, i, h] = weights @ v[b, g, :, h] / weights.sum()
    return y


def test_window_attention():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 4, 4, 2, 3))
    bias, numbers = jax.random.normal(jax.random.key(1), (2, 4, 4)), windows.regions(4, 4, 2, 1)
    y, weights = windows.window_attention(q, k, v, bias, numbers)
    np.testing.assert_allclose(y, reference_attention(*map(np.asarray, (q, k, v, bias)), numbers), atol=1e-6)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-6)
    assert np.abs(np.where(np.asarray(windows.masked_pairs(numbers))[:, None], weights, 0)).max() == 0


def test_logits_stay_float32_in_half_precision():
    """Logits that differ by less than bfloat16 can tell at 100 still differ in the softmax."""
    q, k = jnp.full((1, 1, 1, 1, 1), 10, jnp.bfloat16), jnp.array([10, 10], jnp.bfloat16).reshape(1, 1, 2, 1, 1)
    q = jnp.broadcast_to(q, k.shape)
    bias = jnp.array([[0.0, 0.1], [0.0, 0.1]])[None]
    _, weights = windows.window_attention(q, k, k, bias)
    np.testing.assert_allclose(weights[0, 0, 0, 0, 1].astype(jnp.float32), jax.nn.sigmoid(0.1), rtol=4e-3)


def test_unit_vectors_and_their_gradient():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0], [1e-9, 0.0]])
    np.testing.assert_allclose(windows.unit(x), [[0.6, 0.8], [0, 0], [1, 0]], atol=1e-7)
    gradient = jax.grad(lambda x: (windows.unit(x) * jnp.array([[1.0, 2.0]])).sum())(x)
    np.testing.assert_array_equal(gradient[1], 0)
    np.testing.assert_allclose(gradient[0], jnp.array([4.0, -3.0]) * (4 * 1 - 3 * 2) / 125, atol=1e-7)
    assert windows.unit(x.astype(jnp.bfloat16)).dtype == jnp.float32


def test_log_coordinates():
    half = lambda *args: windows.log_coordinates(*args).reshape(2 * args[0] - 1, -1, 2)  # noqa: E731
    eight = half(8)
    expected = [0, 0.366512, 0.572069, 0.715614, 0.826016, 0.915745, 0.991335, 1.056642]
    np.testing.assert_allclose(eight[7:, 0, 0], expected, atol=1e-6)
    np.testing.assert_allclose(eight[:8, 0, 0][::-1], np.negative(expected), atol=1e-6)
    np.testing.assert_array_equal(eight[..., 1], eight[..., 0].T)  # dy is constant along a row, dx along a column
    assert half(16, 8).max() == pytest.approx(1.393777, abs=1e-6)
    assert half(24, 12).max() == pytest.approx(1.382633, abs=1e-6)
    np.testing.assert_array_equal(windows.log_coordinates(1), [[0, 0]])


# torch.nn.functional.interpolate(mode="bicubic", align_corners=False) of filler((5, 5), .7, .1) to 7x7, row 2, and of
# filler((13, 13), .7, .1) to 5x5, row 1; torch 2.13.0.
TORCH_GROW = [-0.09028337, -0.32771025, -0.5917709, -0.65074378, -0.58244345, -0.31056196, -0.06998213]
TORCH_SHRINK = [-0.09760094, -0.34727783, 0.28122877, 0.21306818, -0.38463481]


def test_bicubic_resize_is_torch_s():
    grown = windows.resize_table(filler((25, 1), 0.7, 0.1), 4)
    np.testing.assert_allclose(grown.reshape(7, 7)[2], TORCH_GROW, atol=1e-6)
    shrunk = windows.resize_table(filler((169, 1), 0.7, 0.1), 3)
    np.testing.assert_allclose(shrunk.reshape(5, 5)[1], TORCH_SHRINK, atol=1e-6)


def test_resize_of_tables():
    resize = windows.resize_table
    table = filler((169, 2), 0.05, 0.1).astype(np.float32)
    np.testing.assert_array_equal(resize(table, 7), table)
    for window in (4, 8, 12):
        side = 2 * window - 1
        grown = resize(table, window)
        assert grown.shape == (side**2, 2)
        assert grown.dtype == np.float32
        np.testing.assert_allclose(resize(np.ones((169, 2)), window), 1, atol=1e-6)
        # Offsets stay mirrored: a table that reads the same backwards still does.
        mirrored = table + table[::-1]
        np.testing.assert_allclose(resize(mirrored, window), resize(mirrored, window)[::-1], atol=1e-5)
        # Heads stay apart, and the axes stay where they are.
        ramp = np.stack([np.repeat(np.arange(13.0), 13), np.tile(np.arange(13.0), 13)], axis=1)
        rows, columns = np.moveaxis(resize(ramp, window).reshape(side, side, 2), -1, 0)
        np.testing.assert_allclose(rows, columns.T, atol=1e-5)
        np.testing.assert_allclose(np.ptp(rows, axis=1), 0, atol=1e-5)
        assert (np.diff(rows[:, 0]) > 0).all()


def bump(window, reach):
    """A smooth bias that falls off with distance, on the offsets of a window."""
    offsets = np.arange(1 - window, window) / reach
    return np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2)).reshape(-1, 1)


def test_a_smooth_table_stays_smooth():
    """Growing 7 to 12 scales the width of a bump; beyond the last old offsets the edge is repeated."""
    stretched = windows.resize_table(bump(7, 6.0), 12)
    inside = lambda table: table.reshape(23, 23)[2:-2, 2:-2]  # noqa: E731
    np.testing.assert_allclose(inside(stretched), inside(bump(12, 6.0 * 23 / 13)), atol=0.01)


def test_bad_input():
    with pytest.raises(ValueError, match=r"\(2·window - 1\)² rows, and 168 is not"):
        windows.relative_bias(jnp.zeros((168, 2)), 7)

"""Every quantity of the attention page equals a slow NumPy reference that is computed from the parameters."""

import functools
import math
from typing import Any

import numpy as np
import pytest

from tests.pages import dense
from tests.pages.dense import expected_of, looked
from vit_scaling import names
from vit_scaling.ops import windows
from vit_scaling.pages import families


@functools.cache
def whole(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns a ViT's attention [Z, B, N, L, L] and its tokens after the last norm [B, L, D]."""
    model, images, _ = looked(name)
    return families.computed(model, images, lambda model, images: (model.attention_maps(images), model.encode(images)))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def test_rollout_of_a_vit_is_the_product_of_its_averaged_layers() -> None:
    """Abnar and Zuidema 2020: each layer is half identity; the map's row is the query's."""
    maps, _ = whole("vit")
    for image in range(2):
        through = np.eye(18)
        for z in range(2):
            layer = sum(maps[z, image, n].astype(np.float64) for n in range(2)) / 2
            through = np.array([[0.5 * layer[i] @ through[:, j] for j in range(18)] for i in range(18)]) + 0.5 * through
        np.testing.assert_allclose(looked("vit")[2].maps["rollout"][image, 0], through, rtol=1e-4, atol=1e-6)


def test_similarity_of_features_is_the_cosine_of_the_last_tokens_of_the_map() -> None:
    _, tokens = whole("vit")
    drawn = looked("vit")[2].maps["similarity of features"]
    assert drawn.shape == (2, 1, 16, 16)
    for image, i, j in ((0, 0, 0), (0, 3, 7), (1, 15, 2), (1, 5, 14)):
        expected = cosine(tokens[image, 2 + i].astype(np.float64), tokens[image, 2 + j].astype(np.float64))
        assert drawn[image, 0, i, j] == pytest.approx(expected, abs=1e-5)


def test_similarity_of_positions_is_the_cosine_of_their_embeddings() -> None:
    table = np.asarray(looked("vit")[0].position_embedding[...], np.float64)[-16:]
    drawn = looked("vit")[2].maps["similarity of position embeddings"]
    for i, j in ((0, 0), (0, 1), (2, 7), (5, 14)):
        assert drawn[0, 0, i, j] == pytest.approx(cosine(table[i], table[j]), abs=1e-5)


def test_attention_of_the_class_token_is_its_row_of_the_last_layer() -> None:
    maps, _ = whole("vit")
    drawn = looked("vit")[2].maps["attention of the class token, last layer"]
    np.testing.assert_array_equal(drawn[:, :, 0], maps[-1][:, :, 0, 2:])


def test_attention_of_the_map_probe_is_the_softmax_of_its_products() -> None:
    _, tokens = whole("vit_map")
    leaves = {
        path: value.astype(np.float64) for path, value in names.flatten(dense.weights("vit_map").parameters).items()
    }
    one = {part: leaves[f"pool/attention/{part}/kernel"] for part in ("query", "key")}
    bias = {part: leaves[f"pool/attention/{part}/bias"] for part in ("query", "key")}
    query = np.einsum("sd,dnk->nk", leaves["pool/probe"].reshape(1, -1), one["query"]) + bias["query"]
    keys = np.einsum("bld,dnk->blnk", tokens[:, 1:], one["key"]) + bias["key"]  # the probe does not read the register
    logits = np.einsum("nk,blnk->bnl", query, keys) / math.sqrt(query.shape[-1])
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    expected = shares / shares.sum(axis=-1, keepdims=True)
    drawn = looked("vit_map")[2].maps["attention of the MAP probe"]
    np.testing.assert_allclose(drawn[:, :, 0], expected, rtol=1e-3, atol=1e-6)


def test_filters_are_the_principal_components_of_the_patch_embedding() -> None:
    """From the eigenvectors of the covariance; a component has either sign, and spans its own range."""
    kernel = names.flatten(dense.weights("vit").parameters)["embedding/kernel"].astype(np.float64)
    drawn = looked("vit")[2].filters
    assert drawn is not None
    assert drawn.shape == (16, 7, 7, 3)  # the width, which is below FILTERS
    rows = kernel.reshape(-1, 16).T
    _, vectors = np.linalg.eigh(np.cov(rows, rowvar=False))
    for number in range(3):
        expected = vectors[:, -1 - number] / np.abs(vectors[:, -1 - number]).max()
        pixels = (drawn[number].reshape(-1).astype(np.float64) - 127.5) / 127.5
        assert min(np.abs(pixels - expected).max(), np.abs(pixels + expected).max()) < 0.01


@pytest.mark.parametrize("name", list(dense.MODELS))
def test_mean_distance_is_the_average_of_pixels_between_query_and_key(name: str) -> None:
    for layer, full in zip(looked(name)[2].layers, expected_of(name), strict=True):
        rows, columns = layer.grid
        where = [(r * layer.cell[0], c * layer.cell[1]) for r in range(rows) for c in range(columns)]
        between = np.array([[math.dist(a, b) for b in where] for a in where])
        shares = np.nan_to_num(full[: len(layer.weights)].astype(np.float64))
        shares = shares / shares.sum(axis=-1, keepdims=True)
        expected = (shares * between).sum(axis=-1).mean(axis=(0, 2))
        np.testing.assert_allclose(layer.distances(), expected, rtol=1e-4)
        assert layer.cell[0] * rows >= dense.SIZE[0]


def test_bias_of_swin_is_drawn_by_query_minus_key() -> None:
    model, _, found = looked("swin")
    for number, layer in enumerate(found.layers):
        assert layer.lines is not None
        assert layer.table is not None
        window, _ = layer.lines
        stage = getattr(model, f"stage{number // 2 + 1}").blocks
        block = stage.shifted if number % 2 else stage.plain
        rows = np.asarray(block.attention.relative_position_bias_table[...])[0]
        index = windows.relative_index(window)
        for i in range(window * window):
            for j in range(window * window):
                (y, x), (v, u) = divmod(i, window), divmod(j, window)
                drawn = layer.table[:, y - v + window - 1, x - u + window - 1]
                np.testing.assert_array_equal(drawn, rows[index[i, j]])


def test_bias_of_swin_v2_is_that_of_the_position_network() -> None:
    """Liu et al. 2022, section 3.3: 16 sigmoid(MLP(sign(d) log2(1 + 8 |d| / 3) / log2(8))) for windows of 4."""
    layer = looked("swin_v2")[2].layers[1]
    stage = {
        path.removeprefix("stage1/blocks/shifted/attention/cpb_mlp/"): value[0]
        for path, value in names.flatten(dense.weights("swin_v2").parameters).items()
        if path.startswith("stage1/blocks/shifted/attention/cpb_mlp/")
    }
    assert layer.table is not None
    for dy, dx in ((0, 0), (3, -2), (-1, 1)):
        d = np.array([dy, dx], np.float64)
        place = np.sign(d) * np.log2(1 + 8 * np.abs(d) / 3) / 3
        hidden = np.maximum(place @ stage["up/kernel"] + stage["up/bias"], 0)
        expected = 16 / (1 + np.exp(-hidden @ stage["down/kernel"]))
        np.testing.assert_allclose(layer.table[:, dy + 3, dx + 3], expected, rtol=1e-4)


def test_terms_of_local_attention_are_told_apart() -> None:
    """Without relative positions the position term is zero, and the content of the first layer is as before."""
    weights = dense.weights("sasa")
    for path, value in names.flatten(weights.parameters).items():
        if path.endswith(("rel_row", "rel_col")):
            value[...] = 0
    model: Any = weights.module()
    blind = families.look(model, looked("sasa")[1]).layers[0]
    layer = looked("sasa")[2].layers[0]
    assert not blind.terms["position"].any()
    assert layer.terms["position"].any()
    np.testing.assert_allclose(blind.terms["content"], layer.terms["content"], rtol=1e-4, atol=1e-5)


def test_position_term_of_local_attention_is_one_row_and_one_column_offset() -> None:
    """A sum f(row) + g(column): its mixed second differences vanish; content has no such form."""
    layer = looked("sasa")[2].layers[0]
    H, W = layer.grid
    inner = [r * W + c for r in range(1, H - 1) for c in range(1, W - 1)]

    def mixed(name: str) -> float:
        maps = layer.terms[name][:, :, inner].reshape(-1, 3, 3)
        return float(np.abs(np.diff(np.diff(maps, axis=1), axis=2)).max())

    assert mixed("position") < 1e-4 < 1e-2 < mixed("content")


def test_centers_and_covariances_are_those_of_the_heads_maps() -> None:
    """The logarithm of a Gaussian head's map is minus half the Mahalanobis distance from query plus center."""
    _, _, found = looked("attention_cnn")
    assert found.centers is not None
    assert found.covariances is not None
    H, W = found.layers[0].grid
    query = (H // 2, W // 2)
    offsets = [(-1, -1), (0, 0), (1, 2), (2, -1)]
    for z, full in enumerate(expected_of("attention_cnn")):
        for n in range(full.shape[1]):
            precision = np.linalg.inv(found.covariances[0, z, n])
            away = [np.array(offset) - found.centers[0, z, n] for offset in offsets]
            expected = np.array([-0.5 * d @ precision @ d for d in away])
            cells = [(query[0] + r) * W + query[1] + c for r, c in offsets]
            drawn = np.log(full[0, n, query[0] * W + query[1], cells].astype(np.float64))
            np.testing.assert_allclose(drawn - drawn[0], expected - expected[0], rtol=1e-3, atol=1e-3)

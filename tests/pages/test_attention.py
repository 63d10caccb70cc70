"""What is packed for the attention page equals the model's attention, to the quantization that the page states."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.pages import dense
from tests.pages.browser import Browser
from tests.pages.dense import expected_of, looked
from vit_scaling import UserError
from vit_scaling.models import resnet
from vit_scaling.pages import attention, families, images, page, quantize


@pytest.fixture(params=list(dense.MODELS))
def name(request: Any) -> str:
    return request.param


def test_spread_rows_equal_the_dense_maps(name: str) -> None:
    found, expected = looked(name)[2], expected_of(name)
    assert len(found.layers) == len(expected)
    for layer, full in zip(found.layers, expected, strict=True):
        drawn = layer.spread(layer.weights)[:, :, layer.extra :]
        # The two compiled programs may differ in the last bits; what cannot be seen agrees exactly.
        np.testing.assert_allclose(drawn, full[: len(drawn)], rtol=2e-5, atol=1e-7)
        assert np.array_equal(np.isnan(drawn), np.isnan(full[: len(drawn)]))


def test_drawn_weights_are_within_the_stated_error(name: str) -> None:
    found = looked(name)[2]
    for levels in quantize.LEVELS:
        for layer in found.layers:
            packed = quantize.weights(layer.weights, levels)
            drawn = quantize.weights_of(packed.entries, packed.largest, levels)
            top = layer.weights.max(axis=-1, keepdims=True)
            assert np.all(np.abs(drawn - layer.weights) <= packed.error * top + 1e-9)
            # Half a step of the root at the top: (1 - 1/(2 levels))² differs from 1 by about 1/levels.
            assert packed.error <= 1.01 / levels + 3e-4
            assert np.all(drawn[layer.weights == 0] == 0)


def test_terms_of_local_attention_make_its_weights() -> None:
    """Each is less its mean over the neighbours in the image, which the softmax ignores."""
    for layer in looked("sasa")[2].layers:
        assert layer.places is not None
        seen = layer.places >= 0
        for term in layer.terms.values():
            np.testing.assert_allclose((term * seen).sum(axis=-1), 0, atol=1e-4 * np.abs(term).max())
        logits = np.where(layer.places >= 0, layer.terms["content"] + layer.terms["position"], -np.inf)
        shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
        np.testing.assert_allclose(shares / shares.sum(axis=-1, keepdims=True), layer.weights, rtol=1e-4, atol=1e-6)


def test_every_family_has_what_is_its_own() -> None:
    found = {name: looked(name)[2] for name in dense.MODELS}
    assert found["vit"].extra == ("class token", "register 1")
    assert "attention of the class token, last layer" in found["vit"].maps
    assert found["vit_map"].maps["attention of the MAP probe"].shape == (2, 2, 1, 16)
    assert [layer.lines for layer in found["swin"].layers[:2]] == [(3, 0), (3, 1)]
    assert found["swin"].layers[0].table is not None
    assert found["swin"].layers[0].table.shape == (2, 5, 5)
    assert found["swin_v2"].layers[0].table is not None
    assert 0 < found["swin_v2"].layers[0].table.min() < found["swin_v2"].layers[0].table.max() < 16
    assert set(found["sasa"].layers[0].terms) == {"content", "position"}
    assert found["attention_cnn"].centers is not None
    assert found["attention_cnn"].layers[0].weights.shape[0] == 1  # one map serves every image


def test_rollout_of_two_layers_by_hand() -> None:
    maps = np.array([[[[[1, 0], [0.5, 0.5]]]], [[[[0, 1], [0, 1]]]]], np.float32)  # [Z, B, N, L, L]
    first, second = [[1, 0], [0.25, 0.75]], [[0.5, 0.5], [0, 1]]
    np.testing.assert_allclose(families.rollout(maps)[0], np.array(second) @ np.array(first))


def test_distance_of_a_head_that_looks_one_cell_to_the_right() -> None:
    weights = np.zeros((1, 1, 4, 4), np.float32)
    weights[0, 0, [0, 2], [1, 3]] = 1  # the left cells look right, 4 pixels
    weights[0, 0, [1, 3], [1, 3]] = 1  # the right cells look at themselves
    layer = families.Layer("layer", (2, 2), (8.0, 4.0), weights)
    np.testing.assert_allclose(layer.distances(), [2.0])


def test_gaussians_are_the_inverse_of_the_precision() -> None:
    spreads = np.array([[[[2.0, 0.0], [1.0, 1.0]]]])
    _, covariances = families.gaussians(np.zeros((1, 1, 2)), spreads)
    np.testing.assert_allclose(covariances[0, 0], np.linalg.inv(spreads[0, 0] @ spreads[0, 0].T), rtol=1e-6)


def test_a_convolution_network_has_no_attention_page(monkeypatch: Any) -> None:
    config = resnet.ResNetConfig(depth=14, width=8, spatial="convolution", stem="small")
    monkeypatch.setitem(dense.MODELS, "convolution", config)
    model: Any = dense.weights("convolution").module()
    with pytest.raises(UserError, match="no attention to show"):
        families.look(model, dense.inputs(dense.pictures(1), config))


def test_the_page_grows_coarser_and_then_smaller_until_it_fits(monkeypatch: Any, tmp_path: Path) -> None:
    weights, chosen = dense.weights("vit"), dense.pictures(2)
    monkeypatch.setattr(families, "look", lambda *_: looked("vit")[2])
    whole = attention.write(weights, chosen, tmp_path / "whole.html", title="t")
    assert (whole.images, whole.of, whole.levels) == (2, 2, 255)
    monkeypatch.setattr(attention, "MOST_BYTES", whole.bytes - 1)
    coarser = attention.write(weights, chosen, tmp_path / "coarser.html", title="t")
    assert coarser.levels < 255
    data, _ = page.unpack((tmp_path / "coarser.html").read_text())
    assert data["levels"] == coarser.levels
    assert data["left_out"] == 2 - coarser.images
    monkeypatch.setattr(attention, "MOST_BYTES", 1000)
    with pytest.raises(UserError, match="the page of one image would be"):
        attention.write(weights, chosen, tmp_path / "none.html", title="t")
    assert not (tmp_path / "none.html").exists()


def test_predictions_have_the_models_names_and_labels_those_of_the_set(monkeypatch: Any) -> None:
    """The set orders its classes in another way than the model does."""

    class Source:
        class_names, num_classes, multi_label = ("cat", "dog"), 2, False

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"image": np.zeros((*dense.SIZE, 3), np.uint8), "label": np.int32(1)}

        def id(self, index: int) -> str:
            return f"record {index}"

    monkeypatch.setattr(images, "open_source", lambda _: Source())
    weights = dataclasses.replace(dense.weights("vit", 2), class_names=("dog", "cat"))
    read = images.read("folder:pets:test", 1, weights, None)
    assert (read.labels, read.left_out, read.captions) == (["dog"], 2, ["record 0"])
    data, _, _ = attention.contents(looked("vit")[2], read, np.array([[3.0, 0.0]]), 1, 255, "softmax")
    assert data["images"][0]["label"] == "dog"
    assert [name for name, _ in data["images"][0]["predictions"]] == ["dog", "cat"]
    nameless = dataclasses.replace(weights, class_names=None)
    assert images.read("folder:pets:test", 1, nameless, None).class_names is None  # numbers, no guess


def test_signed_rows_are_within_half_a_step() -> None:
    values = np.random.default_rng(0).normal(0, 20, (5, 7)).astype(np.float32)
    packed = quantize.signed(values)
    drawn = quantize.signed_of(packed.entries, packed.largest)
    assert np.all(np.abs(drawn - values) <= np.abs(values).max(axis=1, keepdims=True) * (0.5 / 127 + 3e-4))
    assert packed.error <= 0.5 / 127 + 3e-4


# ---- In a browser ----


def page_of(name: str, path: Path, class_names: tuple[str, ...] | None = None) -> None:
    """Writes the page of a family's model, from what `looked` has computed."""
    found = looked(name)[2]
    logits = np.array([[2.0, 1.0, 0.0, -1.0], [0.0, 3.0, 0.0, 0.0]], np.float32)
    data, arrays, _ = attention.contents(found, dense.pictures(2, class_names), logits, 2, 255, "softmax")
    steps = []
    if found.centers is not None:
        steps = [10, 20]
        arrays |= {key: np.concatenate([arrays[key]] * 2) for key in ("centers", "covariances")}
    about = {
        "title": name,
        "model": name,
        "image_size": list(dense.SIZE),
        "parameters": 1,
        "left_out": 0,
        "steps": steps,
    }
    page.write(path, page.page(name, attention.SCRIPTS, about | data, arrays))


def chosen(browser: Browser) -> dict[str, Any]:
    """Returns what the page says that it shows, after it has drawn a frame."""
    browser.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return json.loads(browser.run("document.querySelector('.stage').dataset.drawn"))


def numbers(browser: Browser) -> np.ndarray:
    """Returns the values of the chosen map as the table of the page tells them, NaN where it has none."""
    browser.run("document.querySelector('.chosen figure details').open = true")
    browser.run("new Promise((done) => setTimeout(done, 0))")
    cells = browser.run(
        "[...document.querySelectorAll('.chosen figure tbody tr')].map((row) => row.cells[2].textContent)"
    )
    return np.array([np.nan if cell == "–" else float(cell.replace(",", "")) for cell in cells])


def alphas(browser: Browser, layer: int, head: int) -> np.ndarray:
    """Returns the opacity of every pixel of a small map: 0 is a cell that is left empty."""
    button = f".heads .row:nth-of-type({2 * layer + 2}) button:nth-of-type({head + 1}) canvas"
    return np.array(
        browser.run(
            f"(() => {{ const c = document.querySelector('{button}');"
            "const pixels = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
            "return Array.from(pixels).filter((_, i) => i % 4 === 3);"
            " })()"
        )
    )


def test_the_page_draws_the_attention_of_every_family(name: str, browser: Browser, tmp_path: Path) -> None:
    found, expected = looked(name)[2], expected_of(name)
    page_of(name, tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    for z, (layer, full) in enumerate(zip(found.layers, expected, strict=True)):
        head = layer.weights.shape[1] - 1
        browser.run(f"document.querySelectorAll('.heads .row')[{z}].querySelectorAll('button')[{head}].click()")
        for image, y, x in ((0, 0.05, 0.05), (1, 0.6, 0.9)):
            browser.run(f"document.querySelectorAll('.thumbs button')[{image}].click()")
            box = browser.box(".stage canvas")
            browser.point(box["x"] + x * box["width"], box["y"] + y * box["height"])
            H, W = layer.grid
            row = min(H - 1, int(y * dense.SIZE[0] / layer.cell[0]))
            column = min(W - 1, int(x * dense.SIZE[1] / layer.cell[1]))
            query = layer.extra * (layer.places is None) + row * W + column
            assert chosen(browser) == {"layer": z, "head": head, "panel": None, "image": image, "query": query}
            wanted = full[image % len(full), head, row * W + column]
            drawn = numbers(browser)
            assert np.array_equal(np.isnan(drawn), np.isnan(wanted))
            # A step of the root, and the five digits of the table.
            assert np.nanmax(np.abs(drawn - wanted)) <= np.nanmax(wanted) * (1.01 / 255 + 4e-4)
            opacity = alphas(browser, z, head)
            assert np.array_equal(opacity == 0, np.isnan(wanted))
    assert browser.problems == []
    assert browser.requests == []


def test_the_keyboard_alone_moves_everything(browser: Browser, tmp_path: Path) -> None:
    page_of("vit", tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    for _ in range(30):
        browser.press("Tab")
        if browser.run("document.activeElement.className === 'stage'"):
            break
    assert browser.run("document.activeElement.className === 'stage'")
    start = chosen(browser)
    assert (start["layer"], start["head"], start["image"]) == (1, 0, 0)
    for key in ("ArrowUp", "ArrowLeft", "]", "PageUp", "n"):
        browser.press(key)
    moved = chosen(browser)
    assert moved == {"layer": 0, "head": 1, "panel": None, "image": 1, "query": start["query"] - 4 - 1}
    browser.press("c")
    assert chosen(browser)["query"] == 0
    assert "Query: class token" in browser.run("document.querySelector('[aria-live].live').textContent")


def test_the_checkpoints_of_gaussian_heads_can_be_chosen(browser: Browser, tmp_path: Path) -> None:
    page_of("attention_cnn", tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    found = looked("attention_cnn")[2]
    assert found.centers is not None
    x = browser.run("Number(document.querySelector('.gaussians ellipse').getAttribute('cx'))")
    assert x == pytest.approx(found.centers[0, 0, 0, 1], rel=1e-5)
    browser.run("document.querySelector('#checkpoint').focus()")
    browser.press("Home")
    assert "step 10" in browser.run("document.querySelector('#checkpoint').parentNode.textContent")


HOSTILE = (
    '<img src=x onerror="window.hacked = 1">',
    "</script><script>window.hacked = 1</script>",
    "\u202e\u2067gnp.exe\u0000\u2028",
    "x" * 10_000,
)


def test_hostile_class_names_show_as_text(browser: Browser, tmp_path: Path) -> None:
    page_of("vit", tmp_path / "page.html", HOSTILE)
    browser.open(tmp_path / "page.html", width=390)
    text = browser.run("document.querySelector('.probabilities').textContent")
    assert HOSTILE[0] in text
    assert HOSTILE[1] in text
    assert "gnp.exe" in text
    assert browser.run("window.hacked === undefined && document.querySelectorAll('.probabilities img').length === 0")
    assert browser.run("document.querySelectorAll('.probabilities bdi').length") == 4
    assert browser.run("document.documentElement.scrollWidth") <= 390
    assert browser.problems == []
    assert browser.requests == []


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("dark", [False, True])
def test_screenshots_differ_in_colours_and_fit_the_screen(
    browser: Browser, tmp_path: Path, width: int, dark: bool
) -> None:
    page_of("swin", tmp_path / "page.html")
    browser.open(tmp_path / "page.html", width=width, dark=dark)
    browser.screenshot(tmp_path / "page.png")
    picture = cv2.imread(str(tmp_path / "page.png"))
    assert picture is not None
    assert picture.shape[1] == width
    assert (picture[2, 2].mean() < 60) == dark  # the ground
    assert browser.run("document.documentElement.scrollWidth") <= width

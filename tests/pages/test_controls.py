"""What a reader does with an attention page: point, touch, choose, save numbers; and what is drawn from its data."""

import csv
import io
import math
import os
import re
import subprocess
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import conftest
from tests.pages import browser as browsers
from tests.pages.browser import Browser
from tests.pages.dense import looked, pictures
from tests.pages.test_attention import HOSTILE, chosen, numbers, page_of
from tests.pages.test_report import figure_of
from vit_scaling.pages import attention, page, study
from vit_scaling.studies.table import SWEEP, Run

ROOT = Path(__file__).parents[2]


def saved(browser: Browser, title: str, folder: Path) -> list[list[str]]:
    """Presses the CSV button of a figure with the keyboard and returns the rows of the file that is saved."""
    browser.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    browser.run(f"{figure_of(title)}.querySelector('[aria-label^=CSV]').focus()")
    before = set(folder.iterdir())
    browser.press("Enter")
    until = time.monotonic() + browsers.TIMEOUT
    while not (new := [path for path in set(folder.iterdir()) - before if path.suffix == ".csv"]):
        assert time.monotonic() < until, "nothing was saved"
        browser.run("new Promise((done) => setTimeout(done, 20))")
    return list(csv.reader(io.StringIO(new[0].read_text())))


def touch(browser: Browser, x: float, y: float) -> None:
    for kind, points in (("touchStart", [{"x": x, "y": y}]), ("touchEnd", [])):
        browser.call("Input.dispatchTouchEvent", type=kind, touchPoints=points)


def values_of(browser: Browser, figure: str) -> np.ndarray:
    """Returns the last column of the table of a figure's numbers; NaN where it has none."""
    browser.run(f"{figure}.querySelector('details').open = true")
    browser.run("new Promise((done) => setTimeout(done, 0))")
    cells = browser.run(
        f"[...{figure}.querySelectorAll('details tbody tr')].map((row) => [...row.cells].at(-1).textContent)"
    )
    return np.array([np.nan if cell == "–" else float(cell.replace(",", "")) for cell in cells])


def told_by(browser: Browser, figure: str) -> list[float]:
    """Returns the numbers in the line under a picture."""
    text = browser.run(f"{figure}.querySelector('[aria-live]').textContent")
    return [float(word) for word in re.findall(r"-?\d[\d.]*(?:e[-+]?\d+)?", text)]


def magnification(browser: Browser, frame: str) -> float:
    """Returns how many times wider than its frame the picture in it is drawn."""
    return browser.run(f"((frame) => frame.firstChild.getBoundingClientRect().width / frame.clientWidth)({frame})")


def assert_zooms(browser: Browser, frame: str, drags: bool = True) -> None:
    """Keys, Ctrl with the wheel, and a drag over the middle half zoom; 0, Escape and a double click show all."""
    box = browser.box_of(frame)
    quarter, middle, most = ((box["x"] + s * box["width"], box["y"] + s * box["height"]) for s in (0.25, 0.5, 0.75))
    browser.run(f"{frame}.focus()")
    assert magnification(browser, frame) == pytest.approx(1, rel=0.01)
    browser.press("+")
    assert magnification(browser, frame) == pytest.approx(2, rel=0.01)
    browser.press("-")
    assert magnification(browser, frame) == pytest.approx(1, rel=0.01)
    browser.wheel(*middle, -200, ctrl=True)
    assert magnification(browser, frame) == pytest.approx(2, rel=0.01)
    browser.press("0")
    assert magnification(browser, frame) == pytest.approx(1, rel=0.01)
    browser.drag(quarter, most)
    assert magnification(browser, frame) == pytest.approx(2 if drags else 1, rel=0.02)
    browser.press("+")
    browser.press("Escape")
    assert magnification(browser, frame) == pytest.approx(1, rel=0.01)
    browser.press("+")
    browser.double_click(*middle)
    assert magnification(browser, frame) == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("name", ["vit", "vit_map"])
def test_every_panel_of_a_vit_draws_its_map(name: str, browser: Browser, tmp_path: Path) -> None:
    page_of(name, tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    found = looked(name)[2]
    browser.run("document.querySelectorAll('.thumbs button')[1].click()")
    box = browser.box(".stage canvas")
    browser.point(box["x"] + 0.6 * box["width"], box["y"] + 0.4 * box["height"])  # row 1, column 2 of 4
    chosen(browser)
    number = 0
    for title, values in found.maps.items():
        for head in range(values.shape[1]):
            browser.run(f"document.querySelectorAll('.panels .pick')[{number}].click()")
            number += 1
            extra = values.shape[3] - 16
            wanted = values[1 % len(values), head, extra + 6 if values.shape[2] > 1 else 0, extra:]
            drawn = numbers(browser)
            assert np.abs(drawn - wanted).max() <= np.abs(wanted).max() * 0.01, title
    assert number == browser.run("document.querySelectorAll('.panels .pick').length")
    assert browser.problems == []


def test_predictions_are_the_most_probable_classes_by_name(browser: Browser, tmp_path: Path) -> None:
    page_of("vit", tmp_path / "page.html", ("ant", "bee", "cow", "dog"))
    browser.open(tmp_path / "page.html")
    shares = np.exp([2.0, 1.0, 0.0, -1.0])
    expected = [f"{100 * share / shares.sum():.1f}%" for share in shares]
    assert browser.run("[...document.querySelectorAll('.probabilities bdi')].map((e) => e.textContent)") == [
        "ant", "bee", "cow", "dog"
    ]  # fmt: skip
    assert browser.run("[...document.querySelectorAll('.probabilities span')].map((e) => e.textContent)") == expected


def test_weights_without_a_classifier_have_a_page_without_predictions(browser: Browser, tmp_path: Path) -> None:
    found = looked("vit")[2]
    data, arrays, _ = attention.contents(found, pictures(1), np.zeros((1, 0), np.float32), 1, 255, "softmax")
    about = {"title": "t", "model": "m", "image_size": [28, 28], "parameters": 1, "left_out": 0, "steps": []}
    page.write(tmp_path / "page.html", page.page("t", attention.SCRIPTS, about | data, arrays))
    browser.open(tmp_path / "page.html")
    assert "Prediction" not in browser.run("document.querySelector('main').innerText")
    assert browser.problems == []


def test_the_filters_are_drawn_pixel_by_pixel(browser: Browser, tmp_path: Path) -> None:
    page_of("vit", tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    filters = looked("vit")[2].filters
    assert filters is not None
    drawn = browser.run(
        "[...document.querySelectorAll('figure .tiles canvas')].map((c) => "
        "[...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].filter((_, i) => i % 4 < 3))"
    )
    np.testing.assert_array_equal(np.array(drawn).reshape(filters.shape), filters)


def test_the_mean_distance_of_every_layer_and_head_is_plotted(browser: Browser, tmp_path: Path) -> None:
    page_of("swin", tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    layers = looked("swin")[2].layers
    heads = [float(layer.distances()[n]) for n in range(2) for layer in layers]
    means = [float(layer.distances().mean()) for layer in layers]
    drawn = values_of(browser, figure_of("By layer and head, in pixels of the input"))
    np.testing.assert_allclose(drawn, heads + means, rtol=1e-3)


def test_the_bias_tables_of_swin_are_drawn_with_the_layer(browser: Browser, tmp_path: Path) -> None:
    page_of("swin", tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    for z, layer in enumerate(looked("swin")[2].layers):
        browser.run(f"document.querySelectorAll('.heads .row')[{z}].querySelector('button').click()")
        assert layer.table is not None
        for n in range(2):
            drawn = values_of(browser, figure_of(f"Head {n + 1}"))
            np.testing.assert_allclose(drawn, layer.table[n].reshape(-1), rtol=1e-3, atol=1e-6)


def test_windows_are_outlined_where_they_begin(browser: Browser, tmp_path: Path) -> None:
    """Lines at every window of 3 cells of a plain layer, and from one cell on for a shifted one."""
    page_of("swin", tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    browser.run(
        "(() => { window.lines = []; const of = CanvasRenderingContext2D.prototype, moveTo = of.moveTo;"
        "of.moveTo = function (x, y) { window.lines.push([x / this.canvas.width, y / this.canvas.height]);"
        " return moveTo.call(this, x, y); }; })()"
    )
    for z, first in ((0, 0), (1, 1)):
        browser.run("window.lines = []")
        browser.run(f"document.querySelectorAll('.heads .row')[{z}].querySelector('button').click()")
        places = np.array(browser.run("window.lines"))
        across, down = places[places[:, 0] == 0, 1], places[places[:, 1] == 0, 0]
        wanted = [cell / 7 for cell in range(first, 8, 3)]
        for found in (across, down):
            found = np.unique(found) if first == 0 else found[found > 0]
            np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_the_terms_of_a_neighbourhood_are_drawn_and_empty_outside_the_image(browser: Browser, tmp_path: Path) -> None:
    page_of("sasa", tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    browser.run("document.querySelectorAll('.heads .row')[0].querySelectorAll('button')[1].click()")
    box = browser.box(".stage canvas")
    browser.point(box["x"] + 2, box["y"] + 0.5 * box["height"])
    layer = looked("sasa")[2].layers[0]
    query = chosen(browser)["query"]
    assert query % layer.grid[1] == 0  # at the left border
    assert layer.places is not None
    unseen = layer.places[query] < 0
    assert unseen.tolist() == [True, False, False] * 3
    terms = {"Attention": layer.weights}
    terms |= {"Content, q·k": layer.terms["content"], "Position, q·r": layer.terms["position"]}
    for title, rows in terms.items():
        drawn, wanted = values_of(browser, figure_of(title)), rows[0, 1, query]
        assert np.array_equal(np.isnan(drawn), unseen)
        assert np.nanmax(np.abs(drawn - wanted)[~unseen]) <= np.abs(wanted).max() * 0.01, title


def test_contours_of_gaussian_heads_hold_their_share(browser: Browser, tmp_path: Path) -> None:
    """Each point of an ellipse lies sqrt(-2 log(1 - share)) standard deviations from its center; rows are y."""
    page_of("attention_cnn", tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    found = looked("attention_cnn")[2]
    assert found.centers is not None
    assert found.covariances is not None
    ellipses = browser.run(
        "[...document.querySelectorAll('.gaussians')].map((svg) => [...svg.querySelectorAll('ellipse')].map((e) => "
        "[...['cx', 'cy', 'rx', 'ry'].map((name) => Number(e.getAttribute(name))),"
        " Number(e.getAttribute('transform').match(/rotate\\(([^ ]+)/)[1])]))"
    )
    assert np.array(ellipses).shape == (2, 6, 5)
    for z, layer in enumerate(ellipses):
        for number, (x, y, rx, ry, angle) in enumerate(layer):
            n, share = number // 2, (0.4, 0.9)[number % 2]
            assert (y, x) == pytest.approx(tuple(found.centers[0, z, n]), rel=1e-4, abs=1e-5)
            for t in (0.0, 1.0, 2.5):
                a, b, turn = rx * math.cos(t), ry * math.sin(t), math.radians(angle)
                away = np.array([a * math.sin(turn) + b * math.cos(turn), a * math.cos(turn) - b * math.sin(turn)])
                squared = away @ np.linalg.inv(found.covariances[0, z, n]) @ away
                assert squared == pytest.approx(-2 * math.log(1 - share), rel=1e-3)


def test_every_head_of_a_layers_contours_is_read(browser: Browser, tmp_path: Path) -> None:
    page_of("attention_cnn", tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    found = looked("attention_cnn")[2]
    assert found.centers is not None
    assert found.covariances is not None
    layer = "document.querySelectorAll('.gaussian-row > div')[1]"
    frame = f"{layer}.querySelector('.picture')"
    browser.box_of(frame)
    browser.run(f"{frame}.focus()")

    def is_read(head: int) -> bool:
        told = told_by(browser, layer)
        wanted = [*found.centers[0, 1, head], *np.sqrt(np.diagonal(found.covariances[0, 1, head]))]
        return told[0] == head + 1 and told[1:] == pytest.approx(wanted, rel=5e-3)

    for head in (0, 1, 2, 2):
        browser.press("ArrowRight")
        assert is_read(head)
    for head in (0, 1, 2):
        ellipse = f"{layer}.querySelectorAll('ellipse')[{2 * head}].getBoundingClientRect()"
        x, y = browser.run(f"((b) => [b.x + b.width / 2, b.y + b.height / 2])({ellipse})")
        browser.point(x, y)
        assert is_read(head)
    assert_zooms(browser, frame)
    assert browser.problems == []


@pytest.mark.parametrize(
    ("name", "title"), [("swin", "Head 2"), ("sasa", "Content, q·k"), ("vit", "Its first 16 principal components")]
)
def test_a_picture_is_read_cell_by_cell_and_zooms(name: str, title: str, browser: Browser, tmp_path: Path) -> None:
    page_of(name, tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    found = looked(name)[2]
    layer = found.layers[-1]
    if name == "swin":
        assert layer.table is not None
        wanted = layer.table[1]
    elif name == "sasa":
        H, W = layer.grid  # the query is in the middle, where the page starts
        wanted = layer.terms["content"][0, 0, H // 2 * W + W // 2].reshape(3, 3)
    else:
        assert found.filters is not None
        wanted = found.filters[0]
    rows, columns = wanted.shape[:2]
    figure = figure_of(title)
    frame = f"{figure}.querySelector('.picture')"
    box = browser.box_of(frame)

    def is_read(row: int, column: int) -> bool:
        value = np.atleast_1d(wanted[row, column])
        told = told_by(browser, figure)
        return told[-len(value) :] == pytest.approx(list(value), rel=1e-3, abs=0.01 * float(np.abs(wanted).max()))

    def point_at(y: float, x: float) -> None:
        browser.point(box["x"] + x * box["width"], box["y"] + y * box["height"])

    browser.run(f"{frame}.focus()")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):  # the first of them reads the first cell
        browser.press(key)
    assert is_read(1, 1)
    point_at(0.1, 0.95)
    assert is_read(int(0.1 * rows), columns - 1)
    assert_zooms(browser, frame)
    # Of the middle half, shown twice as large, a tenth from the corner is 0.25 + 0.1 / 2 of the whole.
    corners = [(box["x"] + share * box["width"], box["y"] + share * box["height"]) for share in (0.25, 0.75)]
    browser.drag(*corners)
    point_at(0.1, 0.1)
    assert is_read(int(0.3 * rows), int(0.3 * columns))
    # Keys take the part that is shown along.
    for _ in range(columns):
        browser.press("ArrowRight")
    assert is_read(int(0.3 * rows), columns - 1)
    inside = f"((a, b) => a.right <= b.right + 1 && a.left >= b.left - 1)({frame}.lastChild.getBoundingClientRect(),"
    assert browser.run(f"{inside} {frame}.getBoundingClientRect())")
    # Enlarged it is larger, and Escape first shows all of it and then closes.
    browser.run(f"{figure}.querySelector('[aria-label^=Enlarge]').click()")
    large = "document.querySelector('dialog[open] .picture')"
    assert browser.run(f"{large}.getBoundingClientRect().width") > 1.2 * box["width"]
    browser.run(f"{large}.focus()")
    browser.press("Escape")
    assert magnification(browser, large) == pytest.approx(1, rel=0.01)
    browser.press("Escape")
    assert browser.until("document.querySelector('dialog') === null")
    assert browser.problems == []


def test_the_chosen_map_zooms_and_its_query_follows(browser: Browser, tmp_path: Path) -> None:
    page_of("vit", tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    stage = "document.querySelector('.stage')"
    assert_zooms(browser, stage, drags=False)
    box = browser.box_of(stage)
    browser.wheel(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, -200, ctrl=True)
    place = (box["x"] + 0.1 * box["width"], box["y"] + 0.9 * box["height"])  # 0.3 and 0.7 of the whole
    browser.drag(place, place)  # a click
    assert chosen(browser)["query"] == 2 + 4 * 2 + 1
    for _ in range(3):
        browser.press("ArrowUp")
    assert chosen(browser)["query"] == 2 + 1
    canvas, frame = (browser.run(f"{node}.getBoundingClientRect().top") for node in (f"{stage}.firstChild", stage))
    assert canvas == pytest.approx(frame, abs=1)  # the part that is shown has moved up with the query
    browser.press("0")
    browser.call("Emulation.setTouchEmulationEnabled", enabled=True, maxTouchPoints=2)
    try:
        for kind, apart in (("touchStart", 0.1), ("touchMove", 0.2), ("touchMove", 0.3)):
            points = [
                {"x": box["x"] + (0.5 + side * apart) * box["width"], "y": box["y"] + 0.5 * box["height"], "id": n}
                for n, side in enumerate((-1, 1))
            ]
            browser.call("Input.dispatchTouchEvent", type=kind, touchPoints=points)
        browser.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        assert magnification(browser, stage) == pytest.approx(3, rel=0.05)
    finally:
        browser.call("Emulation.setTouchEmulationEnabled", enabled=False)
    assert browser.problems == []


def test_a_touch_moves_the_query(browser: Browser, tmp_path: Path) -> None:
    page_of("vit", tmp_path / "page.html")
    browser.open(tmp_path / "page.html", width=390)
    browser.call("Emulation.setTouchEmulationEnabled", enabled=True)
    try:
        box = browser.box(".stage canvas")
        touch(browser, box["x"] + 0.9 * box["width"], box["y"] + 0.1 * box["height"])
        assert chosen(browser)["query"] == 2 + 3
        touch(browser, box["x"] + 0.1 * box["width"], box["y"] + 0.9 * box["height"])
        assert chosen(browser)["query"] == 2 + 12
    finally:
        browser.call("Emulation.setTouchEmulationEnabled", enabled=False)


def test_the_chosen_map_is_saved_as_csv(browser: Browser, tmp_path: Path) -> None:
    page_of("vit", tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    header, *rows = saved(browser, "The chosen map", tmp_path)
    assert header == ["row", "column", "weight"]
    drawn = numbers(browser)
    np.testing.assert_allclose([float(row[2]) for row in rows], drawn, rtol=1e-4)
    assert [row[:2] for row in rows[:5]] == [["1", "1"], ["1", "2"], ["1", "3"], ["1", "4"], ["2", "1"]]
    assert browser.problems == []


def test_hostile_text_is_shown_whole_or_with_its_length(browser: Browser, tmp_path: Path) -> None:
    page_of("vit", tmp_path / "page.html", HOSTILE)
    browser.open(tmp_path / "page.html")
    shown = browser.run("[...document.querySelectorAll('.probabilities bdi')].map((e) => e.textContent)")
    assert shown == [*HOSTILE[:3], "x" * 60 + "…"]
    assert "(10000 characters)" in browser.run("[...document.querySelectorAll('.probabilities bdi')].at(-1).title")
    isolated = "getComputedStyle(document.querySelectorAll('.probabilities bdi')[2]).unicodeBidi"
    assert browser.run(isolated) == "isolate"


def test_hostile_names_of_a_study_and_of_training_images_show_as_text(browser: Browser, tmp_path: Path) -> None:
    row = Run(HOSTILE[0], SWEEP, 1, 1000, 500, 4000, 1e9, 0.5, None, 1.0)
    browser.open(study.write(tmp_path, HOSTILE[1], [row], {HOSTILE[0]: HOSTILE[2]}))
    text = browser.run("document.querySelector('main').textContent")
    assert text.count(HOSTILE[0]) == 2
    assert HOSTILE[1] in text
    image = {"step": 0, "label": [[HOSTILE[0], 1.0]], "target": [[HOSTILE[1], 1.0]]}
    image |= dict.fromkeys(("before", "after"), page.picture(np.zeros((2, 2, 3), np.uint8)))
    data = {"title": HOSTILE[2], "seed": 0, "batch_size": 1, "mixing": True, "images": [image]}
    page.write(tmp_path / "fed.html", page.page("fed", ("fed.js",), data, {}))
    browser.open(tmp_path / "fed.html")
    text = browser.run("document.querySelector('main').textContent")
    assert all(name in text for name in HOSTILE[:3])
    assert browser.run("window.hacked === undefined")
    assert browser.problems == []
    assert browser.requests == []


# ---- Without a browser ----


def test_without_a_browser_one_last_line_says_what_was_not_run(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("CHROMIUM", "/nowhere/chromium")
    assert browsers.find() is None

    config: Any = types.SimpleNamespace(option=types.SimpleNamespace(collectonly=False))
    conftest.pytest_unconfigure(config)
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("not run: the tests that open pages in a browser")
    assert "install Debian's or Ubuntu's chromium" in lines[0]
    config.workerinput = {}  # of a worker of xdist
    conftest.pytest_unconfigure(config)
    assert capsys.readouterr().out == ""


def test_continuous_integration_fails_without_a_browser(tmp_path: Path) -> None:
    """With a git that gives an empty archive and an apt-get that installs nothing."""
    for name, body in (("git", "tar -c -T /dev/null"), ("apt-get", "exit 0")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CHROMIUM": "/nowhere/chromium"}
    done = subprocess.run(["bash", ".ci/run"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no /nowhere/chromium")

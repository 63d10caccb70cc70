"""What a reader does with an attention page: point, touch, choose, save numbers; and what is drawn from its data."""

import csv
import io
import math
import os
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
    header, *rows = saved(browser, "The chosen map in numbers", tmp_path)
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

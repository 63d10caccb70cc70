"""What a reader does with a page: point, touch, press keys, enlarge, save numbers; and what is drawn from them."""

import csv
import io
import json
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
from vit_scaling.pages import attention, page, report, runs, study
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


# ---- A report of made-up rows: no training is needed ----


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> Path:
    """The workdir of a run with few-shot accuracies, two starts and values of every kind."""
    folder = tmp_path_factory.mktemp("made") / "made"
    folder.mkdir()
    generator = np.random.default_rng(0)
    rows: list[dict[str, float | int | None]] = []
    for step in range(1, 41):
        rows.append(
            {"step": step, "loss": 2.0 / step, "learning_rate": 1e-3 * step, "step_seconds": 0.5, "mfu": 0.3}
            | {"images_per_second_per_device": float(generator.uniform(50, 60)), "skipped": float(step > 20)}
            | {"gradient_norm": float(generator.uniform(1, 2)), "data_wait_share": 0.1, "own/metric": step * 7.0}
        )
        if step % 20 == 0:
            rows.append({"step": step, "fewshot/5shot": 0.5, "fewshot/5shot_std": 0.1, "validation/accuracy": 0.8})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"duration": {"amount": 80}, "data": {"batch_size": 10}, "optim": {"lr": 0.5}}
    (folder / "config.json").write_text(json.dumps({"config": config, "device_count": 1, "device_kind": "cpu"}))
    starts = [{"step": 0, "host": "one"}, {"step": 20, "host": "two"}]
    (folder / "starts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in starts))
    (folder / "clock.json").write_text(json.dumps({"step": 40, "seconds": {"step": 20.0, "lost": 5.0, "data": 75.0}}))
    record = {"command": ["./run.sh", "train", "--config.optim.lr=0.5"], "examples": {"evaluation.validation": 40}}
    record |= {"warnings": [["warning", f"{sign}HYPERLINK(1)", -1] for sign in "=+-@\t"] + [["warning", "-5e-3", 1]]}
    (folder / runs.RECORD).write_text(json.dumps(record))
    report.write(folder)
    return folder


def test_every_metric_is_drawn_and_saved_as_it_was_written(made: Path, browser: Browser) -> None:
    browser.open(made / report.PAGE)
    browser.run(
        "(() => { window.blobs = []; const create = URL.createObjectURL;"
        "URL.createObjectURL = (blob) => { window.blobs.push(blob); return create.call(URL, blob); }; })()"
    )
    curves = "[...document.querySelectorAll('section[aria-label=Curves] figure')]"
    titles = browser.run(f"{curves}.map((f) => f.querySelector('h3').textContent)")
    assert "own/metric" in titles  # a metric of no group has a chart of its own
    browser.run(f"{curves}.forEach((f) => f.querySelector('[aria-label^=CSV]').click())")
    files = browser.run("Promise.all(window.blobs.map((blob) => blob.text()))")
    assert len(files) == len(titles)
    found: dict[tuple[str, int], float] = {}
    for text in files:
        header, *lines = csv.reader(io.StringIO(text))
        assert header[:2] == ["series", "step"]
        found |= {(name, int(step)): float(value) for name, step, value in lines}
    rows = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    wanted = {
        (name, row["step"]): float(np.float32(value))
        for row in rows
        for name, value in row.items()
        if name not in ("step", "fewshot/5shot_std")
    }
    assert found == pytest.approx(wanted, rel=1e-7)
    assert browser.problems == []
    assert browser.requests == []


def test_few_shot_accuracy_has_a_band_of_one_deviation(made: Path, browser: Browser) -> None:
    browser.open(made / report.PAGE)
    chart = f"{figure_of('Few-shot accuracy')}.querySelector('svg.chart')"
    low, high = browser.run(f"(({{y, height}}) => [y, y + height])({chart}.querySelector('.band').getBBox())")
    line = browser.run(f"{chart}.querySelector('.series').getBBox().y")
    assert high - low > 20  # pixels
    assert line == pytest.approx((low + high) / 2, abs=1.0)


def test_smoothing_is_a_moving_average_without_bias(made: Path, browser: Browser) -> None:
    browser.open(made / report.PAGE)
    slider = "document.querySelector('[aria-label=Smoothing]')"
    browser.run(f"{slider}.value = 0.5")
    browser.run(f"{slider}.dispatchEvent(new Event('input'))")
    drawn = values_of(browser, figure_of("Loss"))
    losses = [2.0 / step for step in range(1, 41)]
    for at in (0, 1, 20):
        weights = 0.5 ** np.arange(at, -1, -1)
        assert drawn[at] == pytest.approx(float(weights @ losses[: at + 1] / weights.sum()), rel=1e-3)
    # A constant stays one, though its average rounds otherwise at each step.
    assert 3 < browser.run(f"{figure_of('MFU')}.querySelectorAll('svg.chart text').length") < 20


def test_axes_become_logarithmic_and_linear(made: Path, browser: Browser) -> None:
    browser.open(made / report.PAGE)
    chart = f"{figure_of('Learning rate')}.querySelector('svg.chart')"

    def heights() -> list[float]:
        points = browser.run(f"{chart}.querySelector('.series').getAttribute('points')")
        pairs = [part.split(",") for part in points.split()]
        return [float(pair[1]) for pair in pairs]

    linear = heights()
    assert linear[0] - linear[9] == pytest.approx(linear[20] - linear[29], rel=0.02)
    browser.run("document.querySelector('[aria-label=\"Vertical scale\"] [data-value=log]').click()")
    log = heights()
    assert log[0] - log[9] == pytest.approx(log[1] - log[19], rel=0.02)  # from 1 to 10 as far as from 2 to 20


def test_the_first_screen_and_the_time_bar_tell_the_files_numbers(made: Path, browser: Browser) -> None:
    browser.open(made / report.PAGE)
    text = browser.run("document.querySelector('main').innerText")
    low, high = runs.wilson(0.8, 40)
    for told in (
        "Not finished. Step 40 of 80.",
        f"{100 * low:.2f}% to {100 * high:.2f}%",
        *("80.00%", "2 min", "20.0% of it in steps", "400", "restarted at step 20", "1 updates were left out"),
        "./run.sh train --config.optim.lr=0.5",
    ):
        assert told in text, told
    assert values_of(browser, figure_of("Where the time went")).tolist() == pytest.approx([0.75, 0.2, 0.05])
    widths = browser.run("[...document.querySelectorAll('.stack > div')].map((e) => e.getBoundingClientRect().width)")
    assert widths[0] / sum(widths) == pytest.approx(0.75, abs=0.01)
    marks = browser.run("[...document.querySelectorAll('svg .mark title')].map((e) => e.textContent)")
    assert set(marks) == {"restart 1 at step 20"}
    assert len(marks) == browser.run("document.querySelectorAll('section[aria-label=Curves] svg.chart').length")


def test_a_report_is_read_with_the_keyboard_alone(made: Path, browser: Browser) -> None:
    browser.open(made / report.PAGE)
    focused = "document.activeElement"
    seen = []
    for _ in range(200):
        browser.press("Tab")
        label = browser.run(f"{focused}.getAttribute('aria-label') ?? {focused}.textContent.slice(0, 30)")
        seen.append(label)
        if label == "Enlarge: Loss":
            break
    assert {"step", "images", "seconds", "Smoothing"} <= set(seen)
    assert browser.run(f"getComputedStyle({focused}).outlineStyle") != "none"
    browser.press("Enter")
    assert browser.until("document.querySelector('dialog[open] svg.chart') !== null")
    browser.press("Escape")
    assert browser.until("document.querySelector('dialog') === null")
    assert browser.until(f"{figure_of('Loss')}.querySelector('svg.chart') !== null")
    browser.press("Tab")  # CSV
    browser.press("Tab")  # the chart
    browser.press("End")
    assert "step 40" in browser.run(f"{figure_of('Loss')}.querySelector('.legend').textContent")
    browser.press("Tab")  # numbers as a table
    browser.press("Enter")
    assert browser.until(f"{figure_of('Loss')}.querySelectorAll('details tbody tr').length === 40")


def test_a_touch_reads_a_chart(made: Path, browser: Browser) -> None:
    browser.open(made / report.PAGE, width=390)
    browser.call("Emulation.setTouchEmulationEnabled", enabled=True)
    try:
        box = browser.box("svg[aria-label^='Learning rate']")
        touch(browser, box["x"] + 0.6 * box["width"], box["y"] + 0.5 * box["height"])
        assert "step " in browser.run(f"{figure_of('Learning rate')}.querySelector('.legend').textContent")
    finally:
        browser.call("Emulation.setTouchEmulationEnabled", enabled=False)


def test_a_csv_file_holds_no_formula(made: Path, browser: Browser, tmp_path: Path) -> None:
    """A text that a spreadsheet would run gets an apostrophe; numbers, and the table on the page, stay as they are."""
    browser.open(made / report.PAGE)
    rows = saved(browser, "6 different warnings", tmp_path)
    assert [row[1] for row in rows[1:]] == [f"'{sign}HYPERLINK(1)" for sign in "=+-@\t"] + ["-5e-3"]
    assert {row[2] for row in rows[1:6]} == {"-1"}
    assert "'" not in browser.run(f"{figure_of('6 different warnings')}.querySelector('tbody').innerText")
    assert ["optim.lr", "0.5", "overridden"] in saved(browser, "All fields", tmp_path)


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

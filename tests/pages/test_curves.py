"""What a reader does with the report of a run: axes, smoothing, keys, touch, CSV; and what is drawn from its files."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.pages.browser import Browser
from tests.pages.test_controls import assert_zooms, saved, touch, values_of
from tests.pages.test_report import figure_of
from vit_scaling.evaluation import scores
from vit_scaling.pages import report, runs


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
    low, high = scores.interval(0.8, 40)
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


def test_a_chart_zooms_about_the_value_that_is_read(made: Path, browser: Browser) -> None:
    browser.open(made / report.PAGE)
    figure = figure_of("Learning rate")
    chart = f"{figure}.querySelector('svg.chart')"
    box = browser.box_of(chart)
    middle = (box["x"] + 54 + (box["width"] - 66) / 2, box["y"] + box["height"] / 2)  # of the steps from 1 to 40

    def shown() -> list[float]:
        """The steps at both ends of the axis, from where the curve's points are drawn."""
        points = browser.run(f"{chart}.querySelector('.series').getAttribute('points')").split()
        first, last = (float(point.split(",")[0]) for point in (points[0], points[-1]))
        return [1 + (pixel - first) / (last - first) * 39 for pixel in (54, box["width"] - 12)]

    def told() -> str:
        return browser.run(f"{figure}.querySelector('.legend').textContent")

    assert shown() == pytest.approx([1, 40], abs=0.1)
    browser.wheel(*middle, -200, ctrl=True)
    assert shown() == pytest.approx([10.75, 30.25], abs=0.2)
    browser.point(middle[0] - (box["width"] - 66) / 4, middle[1])  # step 15.6 of them
    assert "0.016" in told()
    assert "step 16" in told()
    browser.run(f"{chart}.focus()")
    browser.press("Home")  # outside the part that is shown: it moves there
    assert "0.001" in told()
    assert shown() == pytest.approx([1, 20.5], abs=0.2)
    browser.press("+")
    assert shown() == pytest.approx([1, 10.75], abs=0.2)
    browser.double_click(*middle)
    assert shown() == pytest.approx([1, 40], abs=0.1)


def test_the_time_bar_is_read_part_by_part_and_zooms(made: Path, browser: Browser) -> None:
    browser.open(made / report.PAGE)
    figure = figure_of("Where the time went")
    frame = f"{figure}.querySelector('.picture')"
    box = browser.box_of(frame)
    browser.run(f"{frame}.focus()")
    told = f"{figure}.querySelector('[aria-live]').textContent"
    for text in ("data: 1 min, 75.0%", "step: 20 s, 20.0%", "lost: 5 s, 5.0%", "lost: 5 s, 5.0%"):
        browser.press("ArrowRight")
        assert browser.run(told) == text
    for share, text in ((0.5, "data"), (0.76, "step"), (0.96, "lost")):
        browser.point(box["x"] + share * box["width"], box["y"] + 5)
        assert browser.run(told).startswith(text)
    parts = browser.run(f"[...{frame}.querySelectorAll('.stack > div')].map((e) => e.getBoundingClientRect().height)")
    assert min(parts) > 20  # pixels: its colours are seen
    assert_zooms(browser, frame)
    assert browser.problems == []


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

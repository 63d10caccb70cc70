"""The report of a run, the comparison, the page of a study and of training images, in a browser."""

import dataclasses
import inspect
import json
import types
from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from tests import tiny
from tests.pages.browser import Browser
from vit_scaling import UserError
from vit_scaling import config as config_lib
from vit_scaling.data import loader, mixing
from vit_scaling.data.images.transforms import transform
from vit_scaling.data.sources import open_source
from vit_scaling.evaluation import scores
from vit_scaling.pages import fed, page, report, runs
from vit_scaling.parallel import mesh as mesh_lib
from vit_scaling.training import loop, telemetry
from vit_scaling.training import step as step_lib

TRAINED: list[np.ndarray] = []  # the images of every batch of the run
COMMAND = ["./run.sh", "train", "--config=tiny.py", "--config.optim.lr=0.003"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: Any) -> Path:
    """A finished run of eight steps."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    create, to_device, train_batches = mesh_lib.create, loader.to_device, loader.train_batches
    of_training: list[Any] = []

    def noted(*arguments: Any, **named: Any) -> Any:
        of_training.append(train_batches(*arguments, **named))
        return of_training[-1]

    def listening(batches: Any, *arguments: Any, **named: Any) -> Any:
        if batches in of_training:
            batches = (TRAINED.append(batch["image"].copy()) or batch for batch in batches)
        return to_device(batches, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        # As the tests of the loop have it, so that what they compile serves here too.
        patch.setattr(mesh_lib, "create", lambda config: create(config, jax.devices()[:1]))
        patch.setattr(loader, "train_batches", noted)
        patch.setattr(loader, "to_device", listening)
        with report.Reporter(folder, COMMAND) as reporter:
            logging.warning("a warning of the run")
            loop.train(tiny.config(), folder, reporter)
    return folder


def copy_of(workdir: Path, to: Path) -> Path:
    """Returns a run with the files that a report reads, in another folder."""
    to.mkdir()
    for name in ("config.json", "metrics.jsonl", "clock.json", "result.json", "starts.jsonl", runs.RECORD):
        (to / name).write_bytes((workdir / name).read_bytes())
    return to


def figure_of(title: str) -> str:
    """Returns a JavaScript expression of the figure with this title."""
    found = f"(f) => f.querySelector('h3').textContent === {json.dumps(title)}"
    return f"[...document.querySelectorAll('figure')].find({found})"


def numbers(browser: Browser, title: str) -> list[list[str]]:
    """Returns the rows of a figure that is a table, or of the table of its numbers, without commas."""
    browser.run(
        f"(figure => {{ const d = figure.querySelector('details'); if (d) d.open = true; }})({figure_of(title)})"
    )
    browser.run("new Promise((done) => setTimeout(done, 0))")
    return browser.run(
        f"[...{figure_of(title)}.querySelectorAll('tbody tr')]"
        ".map((row) => [...row.cells].map((cell) => cell.textContent.replaceAll(',', '')))"
    )


def test_the_curves_are_those_of_the_metrics_file(workdir: Path, browser: Browser) -> None:
    browser.open(workdir / report.PAGE)
    rows = telemetry.read_jsonl(workdir / "metrics.jsonl")
    for title, names in (
        ("Loss", ("loss", "validation/loss", "validation_ema/loss")),
        ("Accuracy", ("validation/accuracy", "validation_ema/accuracy")),
        ("Learning rate", ("learning_rate",)),
        ("Gradient and update norms", ("gradient_norm", "update_norm")),
    ):
        drawn = numbers(browser, title)
        wanted = [(name, row["step"], row[name]) for name in names for row in rows if row.get(name) is not None]
        if title in ("Loss", "Gradient and update norms"):  # on logarithmic axes only what is positive is drawn
            wanted = [each for each in wanted if each[2] > 0]
        assert {(name, int(step)) for name, step, _ in drawn} == {(name, step) for name, step, _ in wanted}
        by_key = {(name, int(step)): float(value) for name, step, value in drawn}
        for name, step, value in wanted:
            assert by_key[name, step] == pytest.approx(value, rel=1e-4)
    assert browser.problems == []
    assert browser.requests == []


def test_the_first_screen_says_what_came_of_the_run(workdir: Path, browser: Browser) -> None:
    browser.open(workdir / report.PAGE)
    result = json.loads((workdir / "result.json").read_text())
    text = browser.run("document.querySelector('main').innerText")
    assert "Finished." in text
    assert f"{100 * result['accuracy']:.2f}%" in text
    low, high = scores.interval(result["accuracy"], 40)
    assert f"{100 * low:.2f}% to {100 * high:.2f}%" in text
    assert "./run.sh train --config=tiny.py --config.optim.lr=0.003" in text
    changed = browser.run("[...document.querySelectorAll('tr.changed')].map((row) => row.cells[0].textContent)")
    assert changed == ["optim.lr"]


def test_one_switch_sets_the_axis_of_every_chart(workdir: Path, browser: Browser) -> None:
    browser.open(workdir / report.PAGE)
    browser.run("document.querySelector('[data-value=images]').click()")
    assert [int(float(row[1])) for row in numbers(browser, "Learning rate")] == [16 * step for step in range(1, 9)]
    browser.run("document.querySelector('[data-value=seconds]').click()")
    seconds = [float(row[1]) for row in numbers(browser, "Learning rate")]
    assert seconds == sorted(seconds)
    rows = [row for row in telemetry.read_jsonl(workdir / "metrics.jsonl") if "step_seconds" in row]
    assert seconds[-1] == pytest.approx(sum(row["step_seconds"] for row in rows), rel=1e-3)


def test_a_chart_zooms_and_tells_values_by_pointer_and_by_keys(workdir: Path, browser: Browser) -> None:
    browser.open(workdir / report.PAGE)
    chart = "svg[aria-label^='Learning rate']"
    ticks = f"[...document.querySelectorAll(\"{chart} text\")].map((t) => t.textContent).join(' ')"
    whole = browser.run(ticks)
    box = browser.box(chart)
    middle = box["y"] + box["height"] / 2
    browser.drag((box["x"] + 100, middle), (box["x"] + 200, middle))
    assert browser.run(ticks) != whole
    browser.run(f'document.querySelector("{chart}").focus()')
    browser.press("0")
    assert browser.run(ticks) == whole
    browser.press("Home")
    browser.press("ArrowRight")
    rows = telemetry.read_jsonl(workdir / "metrics.jsonl")
    value = next(row["learning_rate"] for row in rows if row["step"] == 2 and "learning_rate" in row)
    readout = browser.run(f'document.querySelector("{chart}").parentNode.nextSibling.textContent')
    assert f"{value:.4g}" in readout
    assert "step 2" in readout


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("dark", [False, True])
def test_the_report_fits_the_screen(workdir: Path, browser: Browser, tmp_path: Path, width: int, dark: bool) -> None:
    browser.open(workdir / report.PAGE, width=width, dark=dark)
    browser.screenshot(tmp_path / "page.png")
    picture = cv2.imread(str(tmp_path / "page.png"))
    assert picture is not None
    assert (picture[2, 2].mean() < 60) == dark  # the ground
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert (workdir / report.PAGE).stat().st_size < 2e6


def test_a_run_that_was_stopped_says_so_and_marks_its_restart(workdir: Path, browser: Browser, tmp_path: Path) -> None:
    copy = copy_of(workdir, tmp_path / "stopped")
    (copy / "result.json").unlink()
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 4))
    (copy / "clock.json").write_text(json.dumps({"step": 4, "seconds": {"step": 1.0}}))
    first = json.loads((copy / "starts.jsonl").read_text())
    with (copy / "starts.jsonl").open("a") as file:
        file.write(json.dumps(first | {"step": 2, "host": "another"}) + "\n")
    report.write(copy)
    browser.open(copy / report.PAGE)
    text = browser.run("document.querySelector('main').innerText")
    assert "Not finished. Step 4 of 8." in text
    assert "restarted at step 2" in text
    assert browser.run("document.querySelector('svg .mark title').textContent") == "restart 1 at step 2"
    rows = browser.run(f"[...{figure_of('Versions and devices')}.querySelectorAll('tbody tr')].map((r) => r.innerText)")
    assert any(row.split("\t") == ["host", first["host"], "another"] for row in rows)
    assert any(row.startswith("versions.jax\t") for row in rows)


def test_hostile_names_in_a_report_show_as_text(workdir: Path, browser: Browser, tmp_path: Path) -> None:
    copy = copy_of(workdir, tmp_path / "hostile")
    hostile = '<img src=x onerror="window.hacked = 1">'
    record = json.loads((copy / runs.RECORD).read_text())
    record["evaluation"]["classes"][0][0] = hostile
    record["evaluation"]["classes"][1][0] = "</script><script>window.hacked = 1</script>" + "y" * 10_000
    record["command"].append("--note=" + hostile)
    (copy / runs.RECORD).write_text(json.dumps(record))
    report.write(copy)
    browser.open(copy / report.PAGE, width=390)
    text = browser.run("document.querySelector('main').textContent")
    assert text.count(hostile) == 2
    assert "</script><script>window.hacked = 1</script>" in text
    assert browser.run("window.hacked === undefined")
    assert browser.run("document.documentElement.scrollWidth") <= 390
    assert browser.problems == []
    assert browser.requests == []


def test_a_comparison_shows_both_runs_and_what_differs(workdir: Path, browser: Browser, tmp_path: Path) -> None:
    other = copy_of(workdir, tmp_path / "other")
    record = json.loads((other / "config.json").read_text())
    record["config"]["optim"]["lr"] = 0.5
    (other / "config.json").write_text(json.dumps(record))
    rows = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("validation/loss", None)
    (other / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report.compare([workdir, other], tmp_path / "comparison.html")
    browser.open(tmp_path / "comparison.html")
    assert [row[0] for row in numbers(browser, "Results")] == ["tiny", "other"]
    assert numbers(browser, "Fields of the config that differ") == [["optim.lr", "0.003", "0.5"]]
    assert {row[0] for row in numbers(browser, "Learning rate")} == {"tiny", "other"}
    looks = browser.run(
        f"[...{figure_of('Loss')}.querySelectorAll('.series')].map((e) => "
        "[e.getAttribute('class').split(' ')[1], e.getAttribute('stroke-dasharray')])"
    )
    # A run is a colour and a metric is a dash, also where a run lacks one.
    assert looks == [["s0", ""], ["s0", "6 4"], ["s0", "2 3"], ["s1", ""], ["s1", "2 3"]]
    assert browser.problems == []
    assert browser.requests == []


def test_the_network_is_fed_the_pixels_that_the_page_shows(
    workdir: Path, browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images are those that the run trained on; mixed they are what its step hands to the model."""
    config = config_lib.from_dict(json.loads((workdir / "config.json").read_text())["config"])
    for number in (0, 5):
        own = fed.batch(config, open_source(config.data.train), number)[0]
        np.testing.assert_array_equal(own["image"], TRAINED[number])
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, mixing=mixing.MixingConfig(mixup=0.8)))
    plain, mixed, targets = fed.batch(config, open_source(config.data.train), 5)

    class HeardError(Exception):
        pass

    def listening(_: Any, __: Any, images: jax.Array, targets: jax.Array, ___: Any) -> Any:
        raise HeardError(images, targets)

    recipe: Any = types.SimpleNamespace(config=config, num_classes=10, teacher=None)
    state: Any = types.SimpleNamespace(step=jnp.int32(5))
    batch = {name: jnp.asarray(part) for name, part in plain.items()}
    monkeypatch.setattr(step_lib, "_gradients", listening)
    with pytest.raises(HeardError) as heard:
        inspect.unwrap(step_lib._train_step)(recipe, state, batch)  # no compiler, and no check of its arguments' types
    images, labels = (np.asarray(part) for part in heard.value.args)
    assert np.abs(127.5 * (images + 1) - mixed).max() <= 0.5 + 1e-3
    np.testing.assert_allclose(targets, labels, atol=1e-6)
    assert np.abs(mixed.astype(int) - plain["image"]).max() > 10  # something was mixed

    # Another seed: the page shows what the loop of a run with that seed reads and what its step makes of it.
    mixed_run = copy_of(workdir, tmp_path / "mixed")
    record = json.loads((mixed_run / "config.json").read_text())
    record["config"]["data"]["mixing"]["mixup"] = 0.8
    (mixed_run / "config.json").write_text(json.dumps(record))
    recipe.config = config = dataclasses.replace(config, seed=7)
    setup: Any = types.SimpleNamespace(
        config=config,
        source=open_source(config.data.train),
        augment=transform(config.data.transform, train=True),
        program=types.SimpleNamespace(mesh=mesh_lib.create(config.mesh, jax.devices()[:1])),
    )
    batches = inspect.unwrap(loop._batches)(setup, 5)
    seventh = next(iter(batches))
    batches.close()
    with pytest.raises(HeardError) as heard:
        inspect.unwrap(step_lib._train_step)(recipe, state, {name: jnp.asarray(part) for name, part in seventh.items()})
    fed.write(mixed_run, [5], 2, tmp_path / "seventh.html", seed=7)
    shown, _ = page.unpack((tmp_path / "seventh.html").read_text())
    assert (shown["seed"], shown["own_seed"]) == (7, config_lib.from_dict(record["config"]).seed)
    after = np.rint(127.5 * (np.asarray(heard.value.args[0][:2]) + 1)).clip(0, 255).astype(np.uint8)
    for number in (0, 1):
        assert shown["images"][number]["before"] == page.picture(seventh["image"][number])
        assert shown["images"][number]["after"] == page.picture(after[number])
    assert np.abs(seventh["image"].astype(int) - plain["image"]).max() > 10

    picture = fed.write(workdir, [0, 5], 3, tmp_path / "fed.html")
    assert picture.exists()
    browser.open(tmp_path / "fed.html")
    assert browser.run("document.querySelectorAll('.tiles > div').length") == 6
    told = [row[:2] for row in numbers(browser, "Labels and targets")]
    assert told == [[number, image] for number in ("0", "5") for image in ("1", "2", "3")]
    shown = page.unpack((tmp_path / "fed.html").read_text())[0]["images"]
    assert shown[3]["before"] == page.picture(plain["image"][0])
    assert browser.problems == []
    with pytest.raises(UserError, match="--steps has 8; the run has the steps 0 to 7"):
        fed.write(workdir, [8], 1, tmp_path / "never.html")


def test_the_record_of_the_config_is_what_the_run_used(workdir: Path) -> None:
    record = json.loads((workdir / "config.json").read_text())["config"]
    assert config_lib.to_dict(config_lib.from_dict(record)) == record


def test_warnings_and_the_error_that_ended_a_run_are_in_its_report(
    workdir: Path, browser: Browser, tmp_path: Path
) -> None:
    browser.open(workdir / report.PAGE)
    rows = browser.run(f"{figure_of('1 different warnings')}.querySelector('tbody').innerText")
    assert rows.split("\t") == ["warning", "a warning of the run", "1"]

    copy = copy_of(workdir, tmp_path / "failed")
    (copy / "result.json").unlink()
    reporter = report.Reporter(copy, COMMAND)
    reporter._note({})  # as after an evaluation

    def fails() -> None:
        with reporter:
            logging.error("an error of the run")
            raise UserError("the data are gone")

    with pytest.raises(UserError, match="the data are gone"):
        fails()
    shown = page.unpack((copy / report.PAGE).read_text())[0]
    assert shown["warnings"] == [["warning", "a warning of the run", 1], ["error", "an error of the run", 1]]
    assert any("UserError: the data are gone" in note for note in shown["notes"])

"""What a report says of a run's files."""

import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import commands, tiny
from vit_scaling import UserError, cli
from vit_scaling import config as config_lib
from vit_scaling.evaluation import scores
from vit_scaling.pages import page, report, runs


def test_thin_keeps_ends_and_spikes() -> None:
    values = np.zeros(10_000, np.float32)
    values[1234], values[5678], values[9000] = 5, -5, np.nan
    kept = runs.thin(values, 100)
    assert len(kept) <= 100
    assert {0, 1234, 5678, 9999} <= set(kept.tolist())
    assert np.array_equal(runs.thin(values[:50], 100), np.arange(50))


def test_notes_name_what_is_wrong() -> None:
    rows = [{"step": 1, "loss": None, "skipped": 0.0}, {"step": 2, "loss": 1.0, "skipped": 3.0}]
    said = " ".join(runs.notes(rows, False, 2, 10, {}))
    assert "step 2 of 10" in said
    assert "3 updates were left out" in said
    assert "1 logged values were not finite" in said
    assert runs.notes([{"step": 2, "loss": 1.0}], True, 2, 2, {}) == []


def test_counts_of_images_begin_again_with_each_start() -> None:
    name = "data/skipped"
    rows = [{"step": 2, name: 1.0}, {"step": 4, name: 3.0}, {"step": 5, name: 4.0}, {"step": 8, name: 4.0}]
    starts = [{"step": 0}, {"step": 4}]
    assert runs.counted(rows, name, starts) == 3 + 4
    assert runs.counted(rows, "data/alpha", starts) == 0
    said = " ".join(runs.notes(rows, True, 8, 8, {}, starts))
    assert "7 reads of training images found them corrupt" in said


def test_the_error_that_ended_the_last_start_is_told() -> None:
    record = {"ended": "UserError: the update was not finite"}
    assert "ended with an error: UserError: the update" in " ".join(runs.notes([], False, 2, 8, record))
    assert runs.notes([], True, 8, 8, record) == []


def test_warnings_are_kept_once_with_their_number() -> None:
    kept, logger = report.Warnings(), logging.getLogger("test of warnings")
    logger.propagate = False
    logger.addHandler(kept)
    for text in ("first", "second", "first"):
        logger.warning(text)
    logger.info("no warning")
    assert kept.rows() == [["warning", "first", 2], ["warning", "second", 1]]
    for number in range(report.MOST_WARNINGS):
        logger.error("error %d", number)
    assert len(kept.rows()) == report.MOST_WARNINGS + 1
    assert kept.rows()[-1][2] == 2
    logger.removeHandler(kept)


def test_the_page_of_a_long_run_stays_below_two_megabytes(tmp_path: Path) -> None:
    """100 metrics of 1,200 steps, 1,000 classes, 16 confusions and 2,000 parameters, all of them incompressible."""
    generator = np.random.default_rng(0)
    values = generator.normal(size=(1200, 100))
    rows = [{"step": step, **{f"metric {n}": v for n, v in enumerate(row)}} for step, row in enumerate(values.tolist())]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.json").write_text(json.dumps({"config": {"duration": {"amount": 1200}}}))
    labels = generator.integers(0, 1000, 20_000)
    predictions = np.where(generator.random(20_000) < 0.5, labels, generator.integers(0, 1000, 20_000))
    noise = generator.integers(0, 256, (report.THUMBNAIL, report.THUMBNAIL, 3), dtype=np.uint8)
    class_names = [f"class {number} {generator.integers(1 << 60):x}" for number in range(1000)]
    evaluation = report.classes(labels, predictions, class_names, lambda i: noise + np.uint8(i % 251))
    parameters = [[f"blocks/{n}/kernel", "384 x 384", 147456, "0.1", "1", "", 589824] for n in range(2000)]
    record = {"evaluation": {"step": 1200, "set": "test", **evaluation}, "parameters": parameters}
    (tmp_path / runs.RECORD).write_text(json.dumps(page.finite(record)))
    assert report.write(tmp_path).stat().st_size < 2e6
    data, arrays = page.unpack((tmp_path / report.PAGE).read_text())
    assert data["thinned"] == 100
    assert max(len(arrays[curve["steps"]]) for curve in data["curves"]) <= 1000


def test_headline_prefers_the_test_set_and_needs_the_count_for_an_interval() -> None:
    rows = [{"step": 0, "validation/accuracy": 0.1}, {"step": 5, "validation/accuracy": 0.5, "test/accuracy": 0.4}]
    found = runs.headline(rows, {"evaluation.test": 100})
    assert found is not None
    assert (found["name"], found["value"], found["step"]) == ("test/accuracy", 0.4, 5)
    assert found["interval"] == list(scores.interval(0.4, 100))
    found = runs.headline(rows[:1], {})
    assert found is not None
    assert (found["value"], found["interval"]) == (0.1, None)
    assert runs.headline([], {}) is None


def test_seconds_by_step_add_up() -> None:
    rows = [{"step": 2, "step_seconds": 0.5}, {"step": 4, "step_seconds": 1.0}]
    arrays, _, _ = runs.curves_of(rows)
    assert arrays["clock.steps"].tolist() == [0, 2, 4]
    assert arrays["clock.seconds"].tolist() == [0, 1, 3]


def test_overrides_are_the_fields_of_the_command_line() -> None:
    command = ["python", "-m", "vit_scaling.train", "--config=a.py", "--config.optim.lr=3", "--config.seed", "7"]
    assert runs.overridden(command) == {"optim.lr", "seed"}


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        runs.read(tmp_path)


def test_titles_of_runs_are_the_shortest_that_differ() -> None:
    assert report.distinct(["/a/x/run", "/a/y/run"]) == ["x/run", "y/run"]
    assert report.distinct(["/a/p", "/a/q"]) == ["p", "q"]
    assert report.distinct(["/a/p", "/a/p"]) == ["1: /a/p", "2: /a/p"]


def test_packed_data_come_back_whole() -> None:
    arrays = {"a": np.arange(3, dtype=np.uint8), "b": np.array([[1.5, np.nan]], np.float32)}
    data, back = page.unpack(page.page("t", (), {"x": math.inf, "y": ["<b>", None, 2]}, arrays))
    assert data == {"x": None, "y": ["<b>", None, 2]}
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)


def test_no_text_of_the_data_is_in_the_markup() -> None:
    name = "<img src=x onerror=alert(1)></script>"
    text = page.page(name, ("run.js",), {"name": name}, {})
    assert name not in text
    assert text.count("</script>") == 2  # that of the data and that of the code


def test_classes_count_right_and_wrong() -> None:
    labels, predictions = np.array([0, 0, 1, 1, 1, 2]), np.array([0, 1, 1, 0, 0, 2])
    told = report.classes(labels, predictions, ("a", "b", "c"), lambda i: np.full((4, 4, 3), i, np.uint8))
    assert told["classes"][0] == ["b", 3, 1, 1 / 3, 2]
    assert (told["images"], told["wrong"], told["pairs"]) == (6, 3, 2)
    assert [(c["label"], c["prediction"], c["count"]) for c in told["confusions"]] == [("b", "a", 2), ("a", "b", 1)]
    assert told["confusions"][0]["image"] == page.picture(np.full((4, 4, 3), 3, np.uint8))


def test_a_config_comes_back_from_its_record() -> None:
    config = tiny.config()
    record = config_lib.to_dict(config)
    assert config_lib.to_dict(config_lib.from_dict(json.loads(json.dumps(record)))) == record


def test_a_report_that_fails_ends_no_run(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "config.json").write_text("{}")

    def broken(*_: Any) -> None:
        raise RuntimeError("a fault of the report")

    monkeypatch.setattr(report, "write", broken)
    report.Reporter(tmp_path, ["python"]).finish()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--fed=r", "--images=x", "--ema"], "--fed does not read --ema and --images; leave that out"),
        (["--weights=w", "--seed=3"], "--weights does not read --seed; leave that out"),
        (["--compare=a", "--compare=b", "--count=3"], "--compare does not read --count; leave that out"),
    ],
)
def test_a_flag_that_a_page_does_not_read_is_refused(words: list[str], sentence: str) -> None:
    with commands.loaded("explore", *words, "--output=page.html") as explore:
        cli.parse(sys.argv)
        with pytest.raises(UserError, match=sentence):
            explore.main([])

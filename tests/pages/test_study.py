"""The page of a study in a browser: every number on it is that of the laws fitted to its runs."""

import csv
import functools
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.pages.browser import Browser
from tests.pages.test_report import figure_of, numbers
from vit_scaling.pages import page, study
from vit_scaling.studies import findings
from vit_scaling.studies.table import SWEEP, Run

Made = tuple[Path, list[Run], findings.Findings]


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> Made:
    """A page of 32 runs with 1% noise: four sizes, four lengths, two numbers of different images."""
    generator, runs = np.random.default_rng(0), []
    for size, params in enumerate((10_000, 50_000, 150_000, 400_000), 1):
        for images in (5_000, 15_000, 45_000, 135_000):
            for unique in (1_000, 4_000):
                error = 0.02 + 20 * params**-0.5 + 60 * images**-0.6 + (0.03 if unique == 1_000 else 0.0)
                error *= 1 + 0.01 * generator.normal()
                name, cost = f"d{size}_p{unique}_i{images}", 20.0 * params * images
                runs.append(Run(name, SWEEP, size, params, unique, images, cost, error, None, 1.0))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fit_compute", "fit_joint", "fit_repeated"):  # 20 replicates in place of 200
            patch.setattr(findings, name, functools.partial(getattr(findings, name), bootstrap=20))
        found = findings.find(runs)
    folder = tmp_path_factory.mktemp("study")
    return study.write(folder, "study", runs, {"r9": "has not run yet"}, found), runs, found


def values(browser: Browser, title: str) -> list[list[Any]]:
    """Returns the rows of a figure's CSV file: numbers to their last digit, None for an empty cell."""
    text = browser.run(
        "(async () => { let blob = null; const create = URL.createObjectURL;"
        "URL.createObjectURL = (each) => { blob = each; return create.call(URL, each); };"
        f"{figure_of(title)}.querySelector('[aria-label^=CSV]').click();"
        "URL.createObjectURL = create; return await blob.text(); })()"
    )

    def cell(text: str) -> float | str | None:
        try:
            return float(text) if text else None
        except ValueError:
            return text

    return [[cell(text) for text in row] for row in list(csv.reader(io.StringIO(text)))[1:]]


def test_the_slider_answers_for_its_budget_by_every_law(made: Made, browser: Browser) -> None:
    path, runs, found = made
    assert found.law is not None
    assert found.joint is not None
    assert found.repeated is not None
    browser.open(path)
    low, high = min(run.compute for run in runs), 100 * max(run.compute for run in runs)
    browser.run("document.querySelector('#budget').focus()")
    for key, budget in (("Home", low), ("End", high)):
        browser.press(key)
        blocks = browser.run(
            "[...document.querySelectorAll('#answer .facts')].map((block) => [...block.children].map((fact) => "
            "[...fact.children].slice(1).map((part) => part.textContent.replaceAll(',', ''))))"
        )
        advice = [found.joint.optimum(budget), found.repeated.optimum(budget, 4_000)]
        for block, best in zip(blocks, advice, strict=False):
            for (value, span), name in zip(block, ("params", "images", "error"), strict=True):
                factor = 100 if name == "error" else 1
                told = [float(text.rstrip("%")) / factor for text in (value, *span.split(" to "))]
                wanted = [getattr(best, name), *getattr(best, f"{name}_interval")]
                np.testing.assert_allclose(told, wanted, rtol=6e-3, atol=6e-5 if name == "error" else 1)
        ((value, span),) = blocks[len(advice)]
        ends = [float(end) for end in found.law.band(budget)]
        assert value == f"{100 * float(found.law.predict(budget)):.2f}%"
        assert span == f"{100 * ends[0]:.2f}% to {100 * ends[1]:.2f}%"
        text = browser.run("document.querySelector('#answer').innerText")
        assert all(sentence in text for best in advice for sentence in best.warnings)
    assert advice[0].warnings  # beyond the runs
    assert "an extrapolation" in browser.run("document.querySelector('main').innerText")
    assert browser.problems == []
    assert browser.requests == []


def test_the_laws_are_on_the_page_with_their_intervals_and_warnings(made: Made, browser: Browser) -> None:
    path, runs, found = made
    browser.open(path)
    laws = {"compute": found.law, "size and images": found.joint, "repeated data": found.repeated}
    for name, law in laws.items():
        assert law is not None
        rows = values(browser, f"Law of {name}")
        assert [row[0] for row in rows] == list(law.COEFFICIENTS)
        for each, *told in rows:
            np.testing.assert_allclose(np.array(told, float), [getattr(law, str(each)), *law.interval(str(each))])
    text = browser.run("document.querySelector('main').innerText")
    assert "1 runs have not finished." in text
    assert found.warnings
    assert all(sentence in text for sentence in (*found.problems, *found.warnings))
    assert numbers(browser, "Run and reason") == [["r9", "has not run yet"]]
    assert len(values(browser, "Table of runs")) == len(runs)


def test_the_curves_are_the_runs_and_the_laws(made: Made, browser: Browser) -> None:
    path, runs, found = made
    assert found.law is not None
    browser.open(path)
    rows = values(browser, "Error against training compute")
    drawn = {name: np.array([row[1:] for row in rows if row[0] == name]) for name in {row[0] for row in rows}}
    depths = np.concatenate([points for name, points in drawn.items() if name.startswith("depth")])
    assert sorted(map(tuple, depths)) == sorted((run.compute, run.error) for run in runs)
    x, y = drawn["law of compute"].T
    np.testing.assert_allclose(y, found.law.predict(x), rtol=1e-5)
    assert x[-1] == pytest.approx(100 * max(run.compute for run in runs))
    np.testing.assert_allclose(drawn["frontier"], np.stack([found.law.compute, found.law.error], axis=1))
    efficiency = values(browser, "Sample efficiency: error against images seen")
    assert sorted(row[1] for row in efficiency) == sorted(run.images for run in runs)
    left = values(browser, "The law of compute with one size left out each")
    for size, without, _ in found.rainbow:
        assert without is not None
        x, y = np.array([row[1:] for row in left if row[0] == f"without {size:,.0f}"]).T
        np.testing.assert_allclose(y, without.predict(x), rtol=1e-5)
    best = values(browser, "Best size for a budget")
    assert found.joint is not None
    for name, budget, params in best[::40]:
        if name == "law of size and images":
            assert params == pytest.approx(found.joint.optimum(budget).params, rel=1e-4)


def test_what_the_runs_can_be_trusted_for_is_on_the_page(made: Made, browser: Browser) -> None:
    path, runs, found = made
    assert found.repeated is not None
    browser.open(path)
    most = max(run.compute for run in runs)
    for law in ("compute", "size and images", "repeated data"):
        wanted = sorted(row.relative for row in findings.residuals(found, runs) if row.law == law)
        told = sorted(row[-1] for row in values(browser, f"Residuals of the law of {law}"))
        np.testing.assert_allclose(told, wanted)
    told = values(browser, "The most expensive runs, predicted from the others")
    assert told == [[each.law, each.fitted, each.judged, pytest.approx(each.miss)] for each in found.held_out]
    for row, (size, one, two) in zip(values(browser, "One size left out each"), found.rainbow, strict=True):
        assert one is not None
        assert two is not None
        assert row == pytest.approx([size, two.optimum(most).params, float(one.predict(most))])
    for row, more in zip(
        values(browser, "Value of different images"),
        found.repeated.value_of_data(most, 4_000, (1.0, 2.0, 4.0, 10.0, np.inf)),
        strict=True,
    ):
        assert row[0] == ("unlimited" if np.isinf(more.unique) else more.unique)
        worth = None if np.isinf(more.worth) else pytest.approx(more.worth / most)
        best = more.best
        wanted = [best.params, *best.params_interval, best.error, *best.error_interval]
        assert row[1:] == [*(pytest.approx(value) for value in wanted), worth]
    checklist = dict(numbers(browser, "Checklist"))
    assert checklist["runs"] == "32: 4 sizes 4 lengths 2 numbers of different images"  # without commas
    assert "root mean square" in browser.run(f"{figure_of('Residuals of the law of compute')}.innerText")


def test_a_table_of_losses_and_many_sizes_has_a_page(browser: Browser, tmp_path: Path) -> None:
    """Losses are no percentages; more sizes than colours are one series; columns that say nothing are left out."""
    runs = []
    for params in np.geomspace(1e6, 1e9, 15):
        for images in (1e8, 1e9, 1e10):
            error = 1.7 + 400 * params**-0.34 + 400 * images**-0.28
            runs.append(Run("line", SWEEP, 0, float(params), 0.0, images, 6 * params * images, error, None, 0.0))
    found = findings.Findings(None, findings.fit_joint(runs, bootstrap=20))
    path = study.write(tmp_path, "Laws of points.csv", runs, {}, found, [("table", "points.csv")])
    data, _ = page.unpack(path.read_text())
    assert data["runs"]["header"] == ["name", "group", "params", "images", "compute", "error"]
    browser.open(path)
    assert {row[0] for row in numbers(browser, "Error against training compute")} == {"runs"}
    assert dict(numbers(browser, "Checklist"))["table"] == "points.csv"
    answer = browser.run("document.querySelector('#answer').innerText")
    assert "%" not in answer
    assert "By the law of size and images" in answer
    assert browser.problems == []


def test_a_study_without_runs_has_a_page(browser: Browser, tmp_path: Path) -> None:
    browser.open(study.write(tmp_path, "study", [], {"r1": "has not run yet"}))
    assert "No run of the sweep has finished yet." in browser.run("document.querySelector('main').innerText")
    assert browser.problems == []

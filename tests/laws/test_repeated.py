"""The law of repeated data: known laws, prediction of held-out runs of the digits study, and bad input.

tests/files/digits_study.csv holds the 60 cooldowns of the study in docs/scaling_study.md, section 3.
"""

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from vit_scaling import UserError, laws

TRUE = {"e": 0.05, "A": 40.0, "alpha": 0.45, "B": 300.0, "beta": 0.4, "C": 3.0, "gamma": 0.1, "delta": 0.35}


def surface(params, images, unique):
    h = 40 * params**-0.45 + 300 * images**-0.4 + 3 * params**0.1 * unique**-0.35
    return 0.05 + 0.85 * h / (1 + h)


def runs(noise=0.0, seed=0):
    params = np.repeat(np.geomspace(1e5, 1e8, 5), 15)
    images = np.tile(np.repeat(np.geomspace(1e6, 1e9, 5), 3), 5)
    unique = np.tile([1e5, 1e6, 1e7], 25)
    error = surface(params, images, unique) * (1 + noise * np.random.default_rng(seed).normal(size=75))
    return {"params": params, "examples": images, "unique": unique, "compute": 6 * params**0.9 * images, "error": error}


def digits():
    with (Path(__file__).parents[1] / "files" / "digits_study.csv").open() as file:
        rows = [[float(cell) for cell in row.values()] for row in csv.DictReader(file)]
    return np.array(rows).T


@pytest.fixture(scope="module")
def exact():
    return laws.fit_joint(**runs(), chance=0.9, bootstrap=20)


def test_exact_points_give_the_exact_law(exact):
    for name, value in TRUE.items():
        assert getattr(exact, name) == pytest.approx(value, rel=1e-6)
    assert (exact.kappa, exact.cost_gamma) == (pytest.approx(6), pytest.approx(0.9))
    assert exact.predict(1e6, 1e7, np.inf) < exact.predict(1e6, 1e7, 1e7) < exact.predict(1e6, 1e7, 1e5) < 0.9
    assert exact.predict(1.0, 1.0, 1.0) < 0.9  # never worse than chance


@pytest.mark.parametrize("unique", [1e5, 1e9])
def test_optimum_is_the_lowest_point_at_equal_cost(exact, unique):
    best = exact.optimum(1e14, unique)
    assert 6 * best.params**0.9 * best.images == pytest.approx(1e14, rel=1e-6)
    sizes = best.params * np.geomspace(0.01, 100, 20001)
    errors = surface(sizes, 1e14 / (6 * sizes**0.9), unique)
    assert best.params == pytest.approx(sizes[errors.argmin()], rel=2e-3)
    assert best.error == pytest.approx(errors.min(), rel=1e-6)


def test_order_and_units_do_not_matter(exact):
    order = np.random.default_rng(1).permutation(75)
    units = {"params": 1e-6, "examples": 1e-3, "unique": 1e-3, "compute": 1e-15, "error": 100}
    columns = {name: units[name] * column[order] for name, column in runs().items()}
    other = laws.fit_joint(**columns, chance=90, bootstrap=2)
    assert other.optimum(1.0, 1e3).params * 1e6 == pytest.approx(exact.optimum(1e15, 1e6).params, rel=1e-5)
    assert other.predict(1, 1e4, 1e3) == pytest.approx(100 * exact.predict(1e6, 1e7, 1e6), rel=1e-6)


def test_intervals_cover_the_truth(exact):
    """95% intervals of the advised size and of a prediction beyond the runs, one run in 75 far off."""
    size, error = exact.optimum(1e16, 1e6).params, surface(1e9, 1e9, 1e7)
    inside = np.zeros(2)
    for seed in range(8):
        table = runs(noise=0.01, seed=seed)
        table["error"][seed] *= 1.3
        table["error"] = np.minimum(table["error"], 0.89)
        law = laws.fit_joint(**table, chance=0.9, bootstrap=40)
        low, high = law.optimum(1e16, 1e6).params_interval
        below, above = law.band(1e9, 1e9, 1e7)
        inside += [low <= size <= high, below <= error <= above]
    assert inside.min() >= 7


def test_digits_held_out_durations_are_predicted_better_than_by_size_and_images():
    """Fitted to runs of at most 80,000 images, judged on those of 160,000: 10 runs on two data sizes."""
    params, images, unique, error = digits()
    seen = images < 160_000
    law = laws.fit_joint(params[seen], images[seen], error[seen], unique=unique[seen], chance=0.9, bootstrap=20)
    plain = laws.fit_joint(params[seen], images[seen], error[seen], bootstrap=2)
    far = lambda predicted: np.sqrt(np.mean(np.log(predicted / error[~seen]) ** 2))  # noqa: E731
    assert far(law.predict(params[~seen], images[~seen], unique[~seen])) < 0.21
    assert far(plain.predict(params[~seen], images[~seen])) > 0.6
    assert any("alpha = 5 is the largest value tried" in sentence for sentence in law.warnings)


def test_bad_runs_are_named():
    given = runs()
    params, images, unique, error = (given[name] for name in ("params", "examples", "unique", "error"))
    fit = lambda **changed: laws.fit_joint(**(given | {"chance": 0.9} | changed), bootstrap=2)  # noqa: E731
    with pytest.raises(UserError, match=r"chance is 0\.3"):
        fit(chance=0.3)
    with pytest.raises(UserError, match="all runs have 1000 different images"):
        fit(unique=np.full(75, 1000.0))
    with pytest.raises(UserError, match=r"unique\[2\] is 0"):
        fit(unique=np.where(np.arange(75) == 2, 0, unique))
    overfit = np.where((params == 1e8) & (unique == 1e5) & (images > 9e8), 1.3 * error, error)
    with pytest.raises(UserError, match=r"1e\+08 parameters and 100000 different images the error rises from"):
        fit(error=overfit)
    with pytest.raises(UserError, match="chance limits the law of repeated data; give unique"):
        fit(unique=None)


def test_replicates_of_one_run_are_no_overfitting():
    """The last of several seeds of the longest run may be the worst of them."""
    given = runs()
    doubled = {name: np.concatenate([column, column]) for name, column in given.items()}
    doubled["error"][75:] *= 1 + 0.02 * np.random.default_rng(0).normal(size=75)
    assert laws.fit_joint(**doubled, chance=0.9, bootstrap=2).beta == pytest.approx(0.4, rel=0.05)


def test_the_error_of_chance_is_fitted_where_it_is_not_given():
    law = laws.fit_joint(**runs(), bootstrap=20)
    for name, value in (TRUE | {"chance": 0.9}).items():
        assert getattr(law, name) == pytest.approx(value, rel=1e-5)


def test_value_of_more_different_images(exact):
    """The error that ten times the data reaches for 1e14, and the compute that reaches it on the data at hand."""
    more, unlimited = exact.value_of_data(1e14, 1e7, factors=(10, np.inf))
    assert more.best.error == pytest.approx(exact.optimum(1e14, 1e8).error)
    assert exact.optimum(more.worth, 1e7).error == pytest.approx(more.best.error, rel=1e-9)
    assert 1e14 < more.worth < unlimited.worth
    assert exact.value_of_data(1e20, 1e5, factors=(10,))[0].worth == np.inf


def test_a_stated_deviation_widens_the_intervals():
    """Exact errors with a known deviation of 1%: intervals as wide as those of errors that scatter by 1%."""
    given = runs()
    stated = laws.fit_joint(**given, chance=0.9, deviation=0.01 * given["error"], bootstrap=100)
    shown = laws.fit_joint(**runs(noise=0.01), chance=0.9, bootstrap=100)
    both = laws.fit_joint(**runs(noise=0.01), chance=0.9, deviation=0.01 * given["error"], bootstrap=100)
    widths = [np.subtract(*law.optimum(1e14, 1e6).params_interval[::-1]) for law in (stated, shown, both)]
    assert 0.5 < widths[0] / widths[1] < 2
    assert 0.7 < widths[2] / widths[1] < 1.5


def test_a_run_that_is_too_good_makes_no_overfitting_of_longer_ones():
    given = runs()
    given["error"][np.flatnonzero((given["params"] == 1e8) & (given["unique"] == 1e5))[2]] *= 0.7
    assert laws.fit_joint(**given, chance=0.9, bootstrap=2).beta == pytest.approx(0.4, rel=1e-3)


def test_overfitting_is_refused_where_the_law_fits_badly():
    """The published L/16 on 30 million images: 27.8% after 400,000 steps, 32.8% after 4 million (arXiv 2106.04560)."""
    with (Path(__file__).parents[1] / "files" / "jft_scaling_runs.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["inet10_err"]]
    names = ("params_M", "images_seen", "inet10_err", "data_images")
    params, images, error, unique = np.array([[float(row[name]) for name in names] for row in rows]).T
    with pytest.raises(UserError, match=r"with 303 parameters and 3e\+07 different images the error rises from 27\.8"):
        laws.fit_joint(params, images, error, unique=unique, bootstrap=2)


def test_few_runs_have_wider_intervals(exact):
    """With 75 runs and 9 coefficients the quantiles are those of 2.14 standard deviations; unwidened, of 1.96."""
    law = laws.fit_joint(**runs(noise=0.01), chance=0.9, bootstrap=100)
    plain = dataclasses.replace(law, runs=0).interval("beta")
    widened = law.interval("beta")
    assert widened.low < plain.low < plain.high < widened.high
    values = np.random.default_rng(0).normal(size=200_001)
    np.testing.assert_allclose(law.quantiles(values), [-2.13, 2.13], atol=0.03)

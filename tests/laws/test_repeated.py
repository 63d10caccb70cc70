"""The law of repeated data: known laws, prediction of held-out runs of the digits study, and bad input.

tests/files/digits_study.csv holds the 60 cooldowns of the study in docs/scaling_study.md, section 3.
"""

import csv
from pathlib import Path

import numpy as np
import pytest

from vit_scaling import UserError
from vit_scaling.laws import joint, repeated

TRUE = {"e": 0.05, "A": 40.0, "alpha": 0.45, "B": 300.0, "beta": 0.4, "C": 3.0, "gamma": 0.1, "delta": 0.35}


def surface(params, images, unique):
    h = 40 * params**-0.45 + 300 * images**-0.4 + 3 * params**0.1 * unique**-0.35
    return 0.05 + 0.85 * h / (1 + h)


def runs(noise=0.0, seed=0):
    params = np.repeat(np.geomspace(1e5, 1e8, 5), 15)
    images = np.tile(np.repeat(np.geomspace(1e6, 1e9, 5), 3), 5)
    unique = np.tile([1e5, 1e6, 1e7], 25)
    error = surface(params, images, unique) * (1 + noise * np.random.default_rng(seed).normal(size=75))
    return params, images, unique, 6 * params**0.9 * images, error


def digits():
    with (Path(__file__).parents[1] / "files" / "digits_study.csv").open() as file:
        rows = [[float(cell) for cell in row.values()] for row in csv.DictReader(file)]
    return np.array(rows).T


@pytest.fixture(scope="module")
def exact():
    return repeated.fit(*runs(), chance=0.9, bootstrap=20)


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
    params, images, unique, compute, error = runs()
    order = np.random.default_rng(1).permutation(75)
    other = repeated.fit(
        *(column[order] for column in (params / 1e6, images / 1e3, unique / 1e3, compute / 1e15, 100 * error)),
        chance=90,
        bootstrap=2,
    )
    assert other.optimum(1.0, 1e3).params * 1e6 == pytest.approx(exact.optimum(1e15, 1e6).params, rel=1e-5)
    assert other.predict(1, 1e4, 1e3) == pytest.approx(100 * exact.predict(1e6, 1e7, 1e6), rel=1e-6)


def test_intervals_cover_the_truth():
    """95% intervals of the advised size and of a prediction beyond the runs, one run in 75 far off."""
    truth = repeated.fit(*runs(), chance=0.9, bootstrap=2)
    size, error = truth.optimum(1e16, 1e6).params, surface(1e9, 1e9, 1e7)
    inside = np.zeros(2)
    for seed in range(8):
        params, images, unique, compute, noisy = runs(noise=0.01, seed=seed)
        noisy[seed] *= 1.3
        noisy = np.minimum(noisy, 0.89)
        law = repeated.fit(params, images, unique, compute, noisy, chance=0.9, bootstrap=40)
        low, high = law.optimum(1e16, 1e6).params_interval
        below, above = law.band(1e9, 1e9, 1e7)
        inside += [low <= size <= high, below <= error <= above]
    assert inside.min() >= 7


def test_digits_held_out_durations_are_predicted_better_than_by_size_and_images():
    """Fitted to runs of at most 80,000 images, judged on those of 160,000: 10 runs on two data sizes."""
    params, images, unique, error = digits()
    seen = images < 160_000
    compute = 6 * params * images
    law = repeated.fit(params[seen], images[seen], unique[seen], compute[seen], error[seen], chance=0.9, bootstrap=20)
    plain = joint.fit(params[seen], images[seen], compute[seen], error[seen], bootstrap=2)
    far = lambda predicted: np.sqrt(np.mean(np.log(predicted / error[~seen]) ** 2))  # noqa: E731
    assert far(law.predict(params[~seen], images[~seen], unique[~seen])) < 0.21
    assert far(plain.predict(params[~seen], images[~seen])) > 0.6
    assert any("alpha = 5 is the largest value tried" in sentence for sentence in law.warnings)


def test_bad_runs_are_named():
    params, images, unique, compute, error = runs()
    given = {"params": params, "images": images, "unique": unique, "compute": compute, "error": error, "chance": 0.9}
    fit = lambda **changed: repeated.fit(**(given | changed), bootstrap=2)  # noqa: E731
    with pytest.raises(UserError, match=r"chance is 0\.3"):
        fit(chance=0.3)
    with pytest.raises(UserError, match="all runs have 1000 different images"):
        fit(unique=np.full(75, 1000.0))
    with pytest.raises(UserError, match=r"unique\[2\] is 0"):
        fit(unique=np.where(np.arange(75) == 2, 0, unique))
    overfit = np.where((params == 1e8) & (unique == 1e5) & (images > 9e8), 1.3 * error, error)
    with pytest.raises(UserError, match=r"1e\+08 parameters and 100000 different images the error rises from"):
        fit(error=overfit)

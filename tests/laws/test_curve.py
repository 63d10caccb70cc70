"""Learning curves: known ones are continued exactly, the end decides, a break is used where it predicts better."""

import numpy as np
import pytest

from vit_scaling import UserError, laws

X = np.geomspace(1e6, 1e9, 40)


def plain(x):
    return 0.1 + 0.4 * (x / 1e8) ** -0.4


def broken(x):
    return 0.05 + 0.6 * (x / 1e7) ** -0.05 * (1 + (x / 1e7) ** (1 / 0.3)) ** (-0.5 * 0.3)


def test_an_exact_curve_is_continued_exactly():
    law = laws.fit_curve(X, plain(X), bootstrap=10)
    assert not law.broken
    assert (law.b, law.c) == (pytest.approx(0.4, rel=1e-6), pytest.approx(0.1, rel=1e-6))
    np.testing.assert_allclose(law.predict(1e11), plain(1e11), rtol=1e-6)
    low, high = law.band(np.array([1e9, 1e10]))
    assert low.shape == high.shape == (2,)


def test_a_break_is_followed():
    law = laws.fit_curve(X, broken(X), bootstrap=2)
    assert law.broken
    assert law.turn == pytest.approx(1e7, rel=1e-3)
    np.testing.assert_allclose(law.predict([1e10, 1e11]), broken(np.array([1e10, 1e11])), rtol=1e-3)


def test_noise_alone_makes_no_break():
    for seed in range(4):
        noise = 1 + 0.01 * np.random.default_rng(seed).normal(size=40)
        assert not laws.fit_curve(X, plain(X) * noise, bootstrap=2).broken


def test_the_end_of_the_curve_decides():
    """The start stays near chance, as few-shot errors do: the power law of the end is continued all the same."""
    start = np.minimum(plain(X), 0.7)
    law = laws.fit_curve(X, start, bootstrap=2)
    np.testing.assert_allclose(law.predict(1e10), plain(1e10), rtol=0.01)


def test_order_and_units_do_not_matter():
    order = np.random.default_rng(0).permutation(40)
    noise = 1 + 0.01 * np.random.default_rng(1).normal(size=40)
    one = laws.fit_curve(X, plain(X) * noise, bootstrap=2)
    other = laws.fit_curve(X[order] / 1e6, 100 * (plain(X) * noise)[order], bootstrap=2)
    np.testing.assert_allclose(other.predict(1e4), 100 * one.predict(1e10), rtol=1e-6)


def test_bad_curves_are_named():
    with pytest.raises(UserError, match="a curve of 5 evaluations"):
        laws.fit_curve(X[:5], plain(X[:5]))
    with pytest.raises(UserError, match="40 images and 39 errors"):
        laws.fit_curve(X, plain(X)[1:])
    with pytest.raises(UserError, match=r"error\[0\] is 0"):
        laws.fit_curve(X, np.where(np.arange(40) == 0, 0, plain(X)))

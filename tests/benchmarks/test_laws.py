"""The exams of benchmarks/laws.py.

tests/files/chinchilla_points.csv: points read off figure 4 of arXiv 2203.15556 by Besiroglu et al. (arXiv 2404.10102).
"""

import csv
from pathlib import Path

import numpy as np

from benchmarks import laws as exams


def test_chinchilla_coefficients_lie_in_the_published_intervals():
    with (Path(__file__).parents[1] / "files" / "chinchilla_points.csv").open() as file:
        text = exams.chinchilla(list(csv.DictReader(file)))
    lines = text.splitlines()
    assert lines[0] == "240 points"
    assert len(lines) == 7
    for line in lines[2:]:
        *_, verdict, ratio = line.split()
        assert verdict == "inside"
        assert 0.5 < float(ratio) < 2


def test_laws_of_the_curves_exam_continue_their_own_curves():
    x = np.geomspace(1e6, 1e9, 30)
    power, floor = 0.4 * (x / 1e8) ** -0.3, 0.1 + 0.4 * (x / 1e9) ** -0.3
    np.testing.assert_allclose(exams.m1(x, power, 0.99)(np.array([1e10])), 0.4 * 100**-0.3, rtol=1e-6)
    np.testing.assert_allclose(exams.m2(x, floor, 0.99)(np.array([1e10])), 0.1 + 0.4 * 10**-0.3, rtol=1e-4)
    h = 0.3 * (x / 1e9) ** -0.5  # M4 with alpha = 1 is (c + chance h) / (1 + h)
    bounded = (0.1 + 0.9 * h) / (1 + h)
    at = 0.3 * 10**-0.5
    np.testing.assert_allclose(exams.m4(x, bounded, 0.9)(np.array([1e10])), (0.1 + 0.9 * at) / (1 + at), rtol=1e-3)

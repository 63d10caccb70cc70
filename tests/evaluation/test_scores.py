"""Numbers on the terminal: intervals, deviations beside means, shots in order, a short table of classes."""

import pytest
import scipy.stats

from vit_scaling.evaluation import scores


def test_the_interval_is_wilsons() -> None:
    """Brown, Cai and DasGupta 2001, eq. 4; at 0 and 1 it stays inside."""
    assert scores.interval(0.9, 100) == pytest.approx((0.82563, 0.94477), abs=1e-5)
    assert scores.interval(0.0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert scores.interval(1.0, 10) == pytest.approx((0.72247, 1.0), abs=1e-5)


def test_the_interval_is_that_of_scipy() -> None:
    for right, count in ((0, 10), (7, 10), (480, 500), (500, 500)):
        expected = scipy.stats.binomtest(right, count).proportion_ci(method="wilson")
        assert scores.interval(right / count, count) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_lines_of_an_evaluation() -> None:
    values = {
        "validation/accuracy": 0.9, "validation/loss": 0.123456, "validation_ema/accuracy": 0.5,
        "fewshot/10shot": 0.8, "fewshot/10shot_std": 0.0123, "fewshot/5shot": 0.7, "fewshot/5shot_std": 0.02,
    }  # fmt: skip
    assert scores.lines(values, {"validation": 100}) == [
        "validation      accuracy 90.00% (n = 100, 95%: 82.6 to 94.5), loss 0.1235",
        "validation_ema  accuracy 50.00% (n = 100, 95%: 40.4 to 59.6)",
        "fewshot         5-shot 70.00% ± 2.00, 10-shot 80.00% ± 1.23",
    ]


def test_counts_are_whole_numbers() -> None:
    numbers = {"top1": 0.5, "examples": 1031.0, "left_out": 0.0, "images_per_second": 1234.5678}
    assert scores.parts(numbers) == ["top1 50.00%", "examples 1,031", "left_out 0", "images_per_second 1235"]


def test_the_worst_classes_come_first() -> None:
    rows = [("cat", 1.0, 3), ("dog", 0.25, 4), ("a" * 60, 0.5, 1)]
    assert scores.worst_classes(rows, show=2) == [
        f"{'dog':40s}   25.00%  of 4 examples",
        f"{'a' * 40}   50.00%  of 1 example",
    ]

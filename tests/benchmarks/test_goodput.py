"""Goodput: the formula agrees with the simulation, and the best period minimizes it."""

import math

import numpy as np
import pytest

from benchmarks import goodput_model as goodput
from benchmarks.goodput_model import Costs

HOUR = 3600.0


def step_by_step(period: float, costs: Costs, mean: float, failures: int) -> float:
    """A slow reference for `simulate`: a clock, a checkpoint that is being written, and failures."""
    generator = np.random.default_rng(1)
    time, saved = 0.0, 0.0
    for _ in range(failures):
        end = time + generator.exponential(mean)
        now, done, pending = time + costs.restart, saved, []
        while now + period + costs.blocking <= end:
            now += period + costs.blocking
            done += period
            pending.append((now + costs.writing, done))
        saved = max([saved, *(value for complete, value in pending if complete <= end)])
        time = end
    return saved / time


@pytest.mark.parametrize(
    ("period", "costs", "mean"),
    [
        (600.0, Costs(10, 0, 300), 3 * HOUR),
        (1800.0, Costs(60, 120, 600), 12 * HOUR),
        (300.0, Costs(5, 60, 900), HOUR),
    ],
)
def test_formula_simulation_and_the_slow_twin_agree(period: float, costs: Costs, mean: float) -> None:
    share = goodput.useful_share(period, costs, mean)
    assert goodput.simulate(period, costs, mean) == pytest.approx(share, rel=0.01)
    assert step_by_step(period, costs, mean, 4000) == pytest.approx(share, rel=0.04)


@pytest.mark.parametrize("blocking", [1.0, 30.0, 600.0])
@pytest.mark.parametrize("mean", [2 * HOUR, 200 * HOUR])
def test_the_best_period_is_the_best(blocking: float, mean: float) -> None:
    costs = Costs(blocking, 60, 600)
    best = goodput.best_period(costs, mean)
    periods = best * np.linspace(0.5, 2.0, 301)
    shares = [goodput.useful_share(period, costs, mean) for period in periods]
    assert periods[int(np.argmax(shares))] == pytest.approx(best, rel=0.006)
    # Young's is first order in sqrt(blocking / mean), Daly's is closer.
    order = math.sqrt(blocking / mean)
    assert goodput.daly(costs, mean) == pytest.approx(best, rel=0.01 * order)
    assert goodput.young(costs, mean) == pytest.approx(best, rel=order)
    assert abs(goodput.daly(costs, mean) - best) < abs(goodput.young(costs, mean) - best)


def test_a_published_run() -> None:
    """Llama 3 (arXiv 2407.21783, section 3.3.4): 419 unexpected interruptions of 16,384 GPUs in 54 days."""
    mean = goodput.between_failures(16_384, 419 / (16_384 * 54 * 24))
    assert mean == pytest.approx(54 * 24 * HOUR / 419)
    assert goodput.between_failures(256, 1e-5) == 64 * goodput.between_failures(16_384, 1e-5)


@pytest.mark.parametrize(
    ("costs", "sentence"),
    [((0, 0, 0), "blocking is 0 seconds"), ((1, -1, 0), "writing is -1"), ((1, 0, math.nan), "restart is nan")],
)
def test_costs_that_cannot_be_are_named(costs: tuple[float, float, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Costs(*costs)
    with pytest.raises(ValueError, match="must be positive"):
        goodput.between_failures(0, 1e-5)

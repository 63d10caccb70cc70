"""How much of a long run is useful when machines fail: the best time between checkpoints, and the share that is left.

Failures come at random and independently, at a constant rate, also while the run restarts. A checkpoint stops the steps
for `blocking` seconds and is complete `writing` seconds later, beside the steps; a failure throws the run back to where
the newest complete one was taken, and costs `restart` seconds before the next step. All times are in seconds.
"""

import dataclasses
import math

import numpy as np
from scipy.special import lambertw


@dataclasses.dataclass(frozen=True)
class Costs:
    """What checkpoints and restarts take."""

    blocking: float  # for which a checkpoint stops the steps
    writing: float  # after that, until it is complete
    restart: float  # from a failure to the next step: notice it, start, restore, compile

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0) or (field.name == "blocking" and not value):
                least = "more than 0" if field.name == "blocking" else "0 or more"
                raise ValueError(f"{field.name} is {value} seconds; it must be {least}")


def between_failures(chips: int, failures_per_chip_hour: float) -> float:
    """Returns the mean time between failures of a run on so many chips, any of which ends it.

    Raises:
        ValueError: a number is not positive.
    """
    if chips < 1 or failures_per_chip_hour <= 0:
        raise ValueError(f"{chips} chips with {failures_per_chip_hour} failures an hour: both must be positive")
    return 3600.0 / (chips * failures_per_chip_hour)


def useful_share(period: float, costs: Costs, mean: float) -> float:
    """Returns the share of time that goes into steps which are never run again.

    J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, Future Generation Computer
    Systems 22 (2006), the complete model. A checkpoint that is written beside the steps counts as a longer restart, as
    each failure finds the newest complete checkpoint older by `writing`.

    Args:
        period: steps' time between two checkpoints.
        costs: of checkpoints and restarts.
        mean: time between failures.
    """
    again = math.exp((costs.restart + costs.writing) / mean) * mean
    return period / (again * math.expm1((period + costs.blocking) / mean))


def best_period(costs: Costs, mean: float) -> float:
    """Returns the period with the largest `useful_share`: where its derivative, e^(-(p + b) / m) = 1 - p / m, holds."""
    return mean * (1.0 + float(lambertw(-math.exp(-1.0 - costs.blocking / mean)).real))


def young(costs: Costs, mean: float) -> float:
    """Returns the best period to first order: J. W. Young, A first order approximation to the optimum checkpoint
    interval, Communications of the ACM 17 (1974)."""
    return math.sqrt(2.0 * costs.blocking * mean)


def daly(costs: Costs, mean: float) -> float:
    """Returns the best period to higher order: Daly 2006."""
    if costs.blocking >= 2.0 * mean:
        return mean
    ratio = costs.blocking / (2.0 * mean)
    return young(costs, mean) * (1.0 + math.sqrt(ratio) / 3.0 + ratio / 9.0) - costs.blocking


def simulate(period: float, costs: Costs, mean: float, *, failures: int = 100_000, seed: int = 0) -> float:
    """Returns the useful share of a run through so many failures, drawn at random; what `useful_share` approximates."""
    lived = np.random.default_rng(seed).exponential(mean, failures)
    running = np.maximum(lived - costs.restart, 0.0)
    kept = np.floor(np.maximum(running - costs.writing, 0.0) / (period + costs.blocking))
    return float(np.sum(kept) * period / np.sum(lived))

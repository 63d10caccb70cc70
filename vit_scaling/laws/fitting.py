"""What all laws share: checked columns in a fixed order, the solution from a grid of starts, intervals, warnings.

R fits (the data themselves or bootstrap replicates), P points, K coefficients, S nodes of the grid, J exponents.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, stdtrit

from vit_scaling import UserError
from vit_scaling.laws import robust
from vit_scaling.laws.robust import Curve, Floats, Values

REPLICATES = 200  # of the bootstrap


class Interval(NamedTuple):
    low: float
    high: float


class Fitted:
    """The intervals of a fitted law: quantiles over its bootstrap replicates.

    Attributes:
        samples: coefficients of the replicates, [R, K], in the order of `COEFFICIENTS`.
        level: probability content of the intervals.
        runs: number of runs fitted, by which the intervals are widened where they are few; 0 for not.
    """

    COEFFICIENTS: ClassVar[tuple[str, ...]]
    samples: Floats
    level: float
    runs: int = 0

    @property
    def coefficients(self) -> Floats:
        """The fitted coefficients, [K], in the order of `COEFFICIENTS`."""
        return np.array([getattr(self, name) for name in self.COEFFICIENTS])

    def quantiles(self, values: Values) -> Floats:
        """Returns the lower and the upper end, [2, ...], of what the replicates give, [R, ...].

        Resampling few runs gives too narrow a spread, because K of their P degrees of freedom went into the fit. The
        quantiles are those of Student's distribution with P - K degrees of freedom and a spread larger by
        sqrt(P / (P - K)) (expanded percentiles; Hesterberg, arXiv 1411.5279).
        """
        tail = (1.0 - self.level) / 2
        if self.runs:
            free = max(1, self.runs - len(self.COEFFICIENTS))
            tail = float(ndtr(np.sqrt(self.runs / free) * stdtrit(free, tail)))
        return np.quantile(values, [tail, 1.0 - tail], axis=0)

    def interval(self, coefficient: str) -> Interval:
        """Returns the bootstrap interval of a coefficient.

        Raises:
            UserError: the law has no such coefficient.
        """
        if coefficient not in self.COEFFICIENTS:
            raise UserError(f"coefficient is {coefficient!r}; choose one of {', '.join(self.COEFFICIENTS)}")
        return Interval(*self.quantiles(self.samples[:, self.COEFFICIENTS.index(coefficient)]).tolist())

    def unidentified(self, name: str, value: float, interval: Interval) -> tuple[str, ...]:
        """Returns a warning if the interval of a quantity is wider than the quantity is large."""
        if interval.high - interval.low <= max(value, 1e-12):
            return ()
        span = f"{interval.low:.3g} to {interval.high:.3g}"
        return (f"{name} = {value:.3g} is not identified: its {self.level:.0%} interval is {span}",)


def law_fields(law: type[Fitted], coefficients_K: Floats) -> dict[str, Any]:
    """Returns the coefficients by name, to make a law of."""
    return dict(zip(law.COEFFICIENTS, coefficients_K.tolist(), strict=True))


@dataclasses.dataclass(frozen=True)
class Form:
    """The form of a law, in units in which all coefficients are of order one.

    Attributes:
        curve: coefficients [R, K] to values [R, P] and derivatives [R, P, K]; the J exponents come first in K.
        basis: exponents [J] to the columns [P, K - J] that the linear coefficients, none negative, multiply.
        grid: nodes of exponents at which the search starts, [S, J].
        lower, upper: bounds of the coefficients, [K].
        starts: number of nodes, the best ones, that are refined.
    """

    curve: Curve
    basis: Callable[[Floats], Floats]
    grid: Floats
    lower: Floats
    upper: Floats
    starts: int


def solve(
    form: Form,
    y_P: Floats,
    weight_RP: Floats,
    *,
    scale_P: Floats | None = None,
    noise_RP: Floats | None = None,
    squares: bool = False,
    near_RK: Floats | None = None,
) -> Floats:
    """Returns the coefficients [R, K] that fit `y` best under each row of weights.

    Args:
        scale_P: what residuals are divided by; 1 if None.
        noise_RP: added to `y` in each row.
        squares: least squares instead of the robust loss.
        near_RK: coefficients from which the search starts too, in place of all but the two best nodes.
    """
    scale = np.ones_like(y_P) if scale_P is None else scale_P

    def scaled(theta_RK: Floats) -> tuple[Floats, Floats]:
        values, slopes = form.curve(theta_RK)
        return values / scale, slopes / scale[:, None]

    seen = np.flatnonzero(weight_RP.sum(axis=0))  # points that no fit sees must not influence the starts
    start = robust.nodes(lambda node: form.basis(node)[seen], form.grid, y_P[seen], scale[seen], form.starts)
    if near_RK is not None:
        start = np.concatenate([near_RK, start[:2]])
    y_RP = np.broadcast_to((y_P if noise_RP is None else y_P + noise_RP) / scale, weight_RP.shape)
    return robust.refine(scaled, y_RP, weight_RP, start, form.lower, form.upper, squares=squares)


def with_bootstrap(
    form: Form, y_P: Floats, deviation_P: Floats | None = None, *, bootstrap: int, seed: int
) -> tuple[Floats, Floats]:
    """Returns the coefficients [1, K] that fit `y` best, and those of bootstrap replicates [R, K].

    Args:
        deviation_P: standard deviation of each `y`, by which residuals are divided; None for relative residuals.
    """
    scale = y_P if deviation_P is None else deviation_P
    best = solve(form, y_P, np.ones((1, len(y_P))), scale_P=scale)
    noise = None
    if deviation_P is not None:
        noise = unseen_noise(form.curve(best)[0][0] - y_P, deviation_P, bootstrap, seed)
    weight = robust.replicates(len(y_P), bootstrap, seed)
    return best, solve(form, y_P, weight, scale_P=scale, noise_RP=noise, near_RK=best)


def unseen_noise(residual_P: Floats, deviation_P: Floats, count: int, seed: int) -> Floats:
    """Returns normal noise [count, P] of the variance that is stated and that the residuals do not show already.

    Resampling the points counts the scatter that they show. Few points around a law may scatter less than their known
    deviation by luck, and the intervals would be too narrow.
    """
    shown = robust.spread((residual_P / deviation_P)[None], np.ones((1, len(residual_P))))[0]
    missing = np.sqrt(np.maximum(0.0, 1.0 - shown**2))
    return missing * deviation_P * np.random.default_rng(seed + 1).normal(size=(count, len(residual_P)))


def columns(*, least: int, distinct: int, coefficients: str, **named: ArrayLike | None) -> dict[str, Floats]:
    """Returns the columns of a table of runs as arrays [P], sorted by the first, second, ... column; None is left out.

    The order makes a fit independent of how the runs were written down.

    Args:
        least: number of runs that the law needs.
        distinct: number of different values that each of the first two columns needs.
        coefficients: their number, in words.
        named: the columns; `deviation` may be one number for all runs.

    Raises:
        UserError: a number is not positive and finite, the columns differ in length, or there are too few runs.
    """
    given = {name: values for name, values in named.items() if values is not None}
    runs = np.size(next(iter(given.values())))
    arrays = {
        name: for_each(values, runs) if name == "deviation" else positive(name, values)
        for name, values in given.items()
    }
    if len({len(array) for array in arrays.values()}) > 1:
        lengths = ", ".join(f"{len(array)} of {name}" for name, array in arrays.items())
        raise UserError(f"the columns differ in length: {lengths}; give one number of each for every run")
    names = list(arrays)
    first, second = (len(np.unique(arrays[name])) for name in names[:2])
    if runs < least or min(first, second) < distinct:
        raise UserError(
            f"{runs} runs with {first} values of {names[0]} and {second} of {names[1]}; {coefficients} "
            f"coefficients need at least {least} runs and {distinct} values of each"
        )
    order = np.lexsort(list(arrays.values())[::-1])
    return {name: array[order] for name, array in arrays.items()}


def positive(name: str, values: ArrayLike) -> Floats:
    """Returns `values` as an array [P].

    Raises:
        UserError: a number is not positive and finite; the sentence names the first one.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 1:
        raise UserError(f"{name} has shape {array.shape}; give one number for every run")
    bad = np.flatnonzero(~(np.isfinite(array) & (array > 0)))
    if len(bad):
        raise UserError(f"{name}[{bad[0]}] is {array[bad[0]]:g}; every {name} must be positive and finite")
    return array


def for_each(deviation: ArrayLike, runs: int) -> Floats:
    """Returns one standard deviation for each run, [runs], of one for all or one for each.

    Raises:
        UserError: a deviation is not positive and finite, or there is another number of them.
    """
    one = np.asarray(deviation, np.float64)
    array = positive("deviation", np.full(runs, one) if one.ndim == 0 else one)
    if len(array) != runs:
        raise UserError(f"there are {runs} runs and {len(array)} of deviation; give one, or one for each run")
    return array


def middle(values: Floats) -> float:
    """Returns the geometric mean."""
    return float(np.exp(np.log(values).mean()))

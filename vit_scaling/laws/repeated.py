"""Error as a function of model size, images seen and different images: the law for data that a run sees repeatedly.

    E(N, T, D) = e + (chance - e) h / (1 + h),    h = A N^-alpha + B T^-beta + C N^gamma D^-delta

A model of N parameters saw T images, drawn from D different ones. The error never exceeds that of chance and never
falls below e. The third term is the cost of a finite data set: it grows with the model and does not fall with T. The
form is that of arXiv 2605.09189. The law falls with T at fixed N and D, so runs that overfit are refused.

R replicates, P points, K = 9 coefficients.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from vit_scaling import UserError
from vit_scaling.laws import budget, fitting, robust
from vit_scaling.laws.budget import STEEPEST, Budgeted, Optimum
from vit_scaling.laws.fitting import Form, Interval, law_fields
from vit_scaling.laws.robust import Floats, Values

LEAST_POINTS = 12
STARTS = 8
RATES = (0.1, 0.3, 0.7, 1.4)
LIMITS = (1.02, 1.3, 3.0, 30.0)  # starts of the error of chance, over the largest error, where it is fitted
OVERFIT = 0.05  # smallest relative rise of the error that counts as overfitting


class MoreData(NamedTuple):
    """What a budget reaches with so many different images.

    Attributes:
        unique: number of different images.
        best: the best split of the budget on them.
        worth: compute that reaches the same error on the images at hand; infinite if none does.
    """

    unique: float
    best: Optimum
    worth: float


@dataclasses.dataclass(frozen=True)
class RepeatedLaw(Budgeted):
    """A fitted law of size, images seen and different images, in the units of the data that it was fitted to.

    Attributes:
        e: error of an unlimited model on unlimited different images.
        A, alpha, B, beta, C, gamma, delta: what limited size, images seen and different images add.
        chance: error of guessing, which limits the law from above: as given, or fitted.
        kappa, cost_gamma: the cost of a run, kappa N^cost_gamma T.
        samples: coefficients of the bootstrap replicates, [R, 9].
        level: probability content of the intervals.
        relative_rms: root mean square of the residuals divided by the errors.
        size_range, images_range, unique_range: smallest and largest N, T and D among the runs.
        runs: number of runs fitted.
        warnings: sentences about what the data do not determine.
    """

    COEFFICIENTS: ClassVar = ("e", "A", "alpha", "B", "beta", "C", "gamma", "delta", "chance")
    LIMITS: ClassVar = {"size": ("A", "alpha"), "images seen": ("B", "beta"), "different images": ("C", "delta")}

    e: float
    A: float
    alpha: float
    B: float
    beta: float
    C: float
    gamma: float
    delta: float
    chance: float
    kappa: float
    cost_gamma: float
    samples: Floats
    level: float
    relative_rms: float
    size_range: tuple[float, float]
    images_range: tuple[float, float]
    unique_range: tuple[float, float]
    runs: int = 0
    warnings: tuple[str, ...] = ()

    def predict(self, params: ArrayLike, images: ArrayLike, unique: ArrayLike) -> Floats:
        """Returns the error of a model of `params` after `images`, of `unique` different ones, of their common shape.

        `unique` may be infinite: the limit that no amount of different images improves on.
        """
        n, t, d = (np.asarray(values, np.float64) for values in (params, images, unique))
        return np.asarray(_law(self.coefficients, n, t, d))

    def band(self, params: float, images: float, unique: float) -> Interval:
        """Returns the bootstrap interval of one prediction."""
        values = _law(self.samples.T, np.float64(params), np.float64(images), np.float64(unique))
        return Interval(*self.quantiles(values).tolist())

    def optimum(self, compute: float, unique: float) -> Optimum:
        """Returns the size and the images seen of least error among runs that cost `compute` on `unique` images.

        Raises:
            UserError: compute that is not positive, or a law in which size or images seen do not matter.
        """
        return self._optimum(compute, lambda theta: self._split(theta, compute, unique))

    def value_of_data(
        self, compute: float, unique: float, factors: Sequence[float] = (2.0, 4.0, 10.0, np.inf)
    ) -> list[MoreData]:
        """Returns what `compute` reaches with `factors` times `unique` different images, and what that is worth.

        Raises:
            UserError: as `optimum`.
        """
        answers = []
        for factor in factors:
            best = self.optimum(compute, unique * factor)
            low, high = np.log(compute), np.log(compute) + 100.0
            for _ in range(60):
                middle = (low + high) / 2
                reached = self._split(self.coefficients[:, None], float(np.exp(middle)), unique)[2, 0]
                low, high = (middle, high) if reached > best.error else (low, middle)
            answers.append(
                MoreData(unique * factor, best, np.inf if high > np.log(compute) + 99 else float(np.exp(high)))
            )
        return answers

    def _split(self, theta_KR: Floats, compute: float, unique: float) -> Floats:
        """Returns params, images and error, [3, R], by bisection: h is convex in log N along a line of equal cost."""
        _, a, alpha, b, beta, c, gamma, delta, _ = theta_KR
        low, high = np.full(a.shape, -100.0), np.full(a.shape, 200.0)
        for _ in range(100):
            log_n = (low + high) / 2
            log_t = np.log(compute / self.kappa) - self.cost_gamma * log_n
            with np.errstate(over="ignore"):
                rises = beta * self.cost_gamma * b * np.exp(-beta * log_t)
                rises = rises + gamma * c * np.exp(gamma * log_n) * unique**-delta
                slope = rises - alpha * a * np.exp(-alpha * log_n)
            low, high = np.where(slope < 0, log_n, low), np.where(slope < 0, high, log_n)
        params = np.exp((low + high) / 2)
        images = compute / (self.kappa * params**self.cost_gamma)
        return np.stack([params, images, _law(theta_KR, params, images, np.float64(unique))])


def fit(
    params: ArrayLike,
    images: ArrayLike,
    unique: ArrayLike,
    error: ArrayLike,
    *,
    compute: ArrayLike | None = None,
    chance: float | None = None,
    deviation: ArrayLike | None = None,
    bootstrap: int = fitting.REPLICATES,
    level: float = 0.95,
    seed: int = 0,
) -> RepeatedLaw:
    """Fits the law to runs of several sizes, lengths and data sizes, robustly; `joint.fit` describes the arguments.

    Raises:
        UserError: a number that is not positive and finite, unequal lengths, too few runs, an error at or above
            chance, fewer than two data sizes, or an error that rises with the images seen at fixed size and data.
    """
    table = fitting.columns(
        least=LEAST_POINTS, distinct=3, coefficients="eight",
        params=params, images=images, unique=unique, error=error, compute=compute, deviation=deviation,
    )  # fmt: skip
    n, t, d, y = (table[name] for name in ("params", "images", "unique", "error"))
    if chance is not None and not np.all(y < chance):
        raise UserError(f"an error is {np.max(y):g}, but chance is {chance:g}; leave runs that learned nothing out")
    if len(np.unique(d)) < 2:
        raise UserError(f"all runs have {d[0]:g} different images; a law of repeated data needs at least two numbers")
    unit = float(np.max(y))
    units = [fitting.middle(values) for values in (n, t, d)]
    form = _form(n / units[0], t / units[1], d / units[2], y / unit, None if chance is None else chance / unit)
    noise = table["deviation"] / unit if "deviation" in table else None
    theta, samples = fitting.with_bootstrap(form, y / unit, noise, bootstrap=bootstrap, seed=seed)
    residual = form.curve(theta)[0][0] * unit / y - 1
    _refuse_overfitting(n, t, d, y, residual)

    def in_units(rows: Floats) -> Floats:
        alpha, beta, gamma, delta, limit, e, a, b, c = rows.T
        a, b, c = a * units[0] ** alpha, b * units[1] ** beta, c * units[0] ** -gamma * units[2] ** delta
        return np.stack([e * unit, a, alpha, b, beta, c, gamma, delta, limit * unit], axis=1)

    kappa, cost_gamma = budget.cost(n, t, table.get("compute"))
    law = RepeatedLaw(
        **law_fields(RepeatedLaw, in_units(theta)[0]),
        kappa=kappa,
        cost_gamma=cost_gamma,
        samples=in_units(samples),
        level=level,
        runs=len(y),
        relative_rms=float(np.sqrt(np.mean(residual**2))),
        size_range=(float(np.min(n)), float(np.max(n))),
        images_range=(float(np.min(t)), float(np.max(t))),
        unique_range=(float(np.min(d)), float(np.max(d))),
    )
    return dataclasses.replace(law, warnings=law.undetermined("e", *(() if chance is not None else ("chance",))))


def _form(x1: Floats, x2: Floats, x3: Floats, y: Floats, chance: float | None) -> Form:
    """Returns the law over N, T and D, each [P] and around one; K is alpha, beta, gamma, delta, chance, e, A, B, C."""
    logs = np.log(x1), np.log(x2), np.log(x3)
    most = float(np.max(y))

    def curve(theta_RK: Floats) -> tuple[Floats, Floats]:
        alpha, beta, gamma, delta, limit, e, a, b, c = (column[:, None] for column in theta_RK.T)
        size, seen, data = x1**-alpha, x2**-beta, x1**gamma * x3**-delta
        h = a * size + b * seen + c * data
        share = h / (1 + h)
        by_h = [-a * size * logs[0], -b * seen * logs[1], c * data * logs[0], -c * data * logs[2]]
        to_h = (limit - e) / (1 + h) ** 2
        slopes = [*(to_h * slope for slope in by_h), share, 1 - share, to_h * size, to_h * seen, to_h * data]
        return e + (limit - e) * share, np.stack(slopes, axis=-1)

    def basis(exponents: Floats) -> Floats:
        # E (1 + h) = e + chance h, so E = e + (chance - E) h: linear in e, A, B and C for the measured E.
        alpha, beta, gamma, delta, limit = exponents
        gap = limit - y
        return np.stack([np.ones_like(y), gap * x1**-alpha, gap * x2**-beta, gap * x1**gamma * x3**-delta], axis=1)

    limits = tuple(most * share for share in LIMITS) if chance is None else (chance,)
    grid = np.array(list(itertools.product(RATES, RATES, (0.0, 0.3), RATES, limits)))
    low, high = (1.001 * most, 100 * most) if chance is None else (chance, chance)
    lower = np.array([1e-3, 1e-3, 0.0, 1e-3, low, 0.0, 0.0, 0.0, 0.0])
    upper = np.array([STEEPEST, STEEPEST, STEEPEST, STEEPEST, high, most, 1e4, 1e4, 1e4])
    return Form(curve, basis, grid, lower, upper, STARTS)


def _law(theta: Floats, n: Values, t: Values, d: Values) -> Values:
    e, a, alpha, b, beta, c, gamma, delta, chance = theta
    h = a * n**-alpha + b * t**-beta + c * n**gamma * d**-delta
    return e + (chance - e) * h / (1 + h)


def _refuse_overfitting(n: Floats, t: Floats, d: Floats, y: Floats, residual: Floats) -> None:
    """Raises UserError if the error rises with the images seen, at fixed size and data, by more than noise.

    The longest run must also lie above the law, so that a shorter run that is too good is no overfitting. Noise is what
    residuals of neighbouring lengths differ by, because the law itself may be off by more.
    """
    series = []
    for size, data in sorted(set(zip(n.tolist(), d.tolist(), strict=True))):
        own = np.flatnonzero((n == size) & (d == data))
        lengths = np.unique(t[own])
        means = np.array(
            [(y[own][t[own] == length].mean(), residual[own][t[own] == length].mean()) for length in lengths]
        )
        series.append((size, data, lengths, means[:, 0], -means[:, 1]))  # means over replicates
    steps = np.concatenate([np.diff(above) for *_, above in series]) / np.sqrt(2)
    noise = float(robust.spread(steps[None], np.ones((1, len(steps))))[0]) if len(steps) else 0.0
    for size, data, lengths, means, above in series:
        least, rise = int(np.argmin(means)), max(OVERFIT, 4 * noise)
        if means[-1] / means[least] - 1 > rise and above[-1] > rise / 2:
            raise UserError(
                f"with {size:g} parameters and {data:g} different images the error rises from {means[least]:.4g} at "
                f"{lengths[least]:g} images seen to {means[-1]:.4g} at {lengths[-1]:g}; this law falls with images "
                "seen: leave out runs longer than the best one"
            )

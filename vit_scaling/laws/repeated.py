"""Error as a function of model size, images seen and different images: the law for data that a run sees repeatedly.

    E(N, T, D) = e + (chance - e) h / (1 + h),    h = A N^-alpha + B T^-beta + C N^gamma D^-delta

A model of N parameters saw T images, drawn from D different ones. The error never exceeds that of chance and never
falls below e. The third term is the cost of a finite data set: it grows with the model and does not fall with T. The
form is that of arXiv 2605.09189. The law falls with T at fixed N and D, so runs that overfit are refused.

R replicates, P points, K = 8 coefficients.
"""

import dataclasses
import itertools
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from vit_scaling import UserError
from vit_scaling.laws import fitting, robust
from vit_scaling.laws.fitting import Fitted, Form, Interval, law_fields
from vit_scaling.laws.joint import Optimum
from vit_scaling.laws.robust import Floats, Values

LEAST_POINTS = 12
STARTS = 8
STEEPEST = 5.0  # largest exponent tried
RATES = (0.1, 0.3, 0.7, 1.4)
OVERFIT = 0.05  # smallest relative rise of the error that counts as overfitting


@dataclasses.dataclass(frozen=True)
class RepeatedLaw(Fitted):
    """A fitted law of size, images seen and different images, in the units of the data that it was fitted to.

    Attributes:
        e: error of an unlimited model on unlimited different images.
        chance: error of guessing, which limits the law from above.
        A, alpha, B, beta, C, gamma, delta: what limited size, images seen and different images add.
        kappa, cost_gamma: the cost of a run, kappa N^cost_gamma T.
        samples: coefficients of the bootstrap replicates, [R, 8].
        level: probability content of the intervals.
        relative_rms: root mean square of the residuals divided by the errors.
        warnings: sentences about what the data do not determine.
    """

    COEFFICIENTS: ClassVar = ("e", "A", "alpha", "B", "beta", "C", "gamma", "delta")

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
    warnings: tuple[str, ...] = ()

    def predict(self, params: ArrayLike, images: ArrayLike, unique: ArrayLike) -> Floats:
        """Returns the error of a model of `params` after `images`, of `unique` different ones, of their common shape.

        `unique` may be infinite: the limit that no amount of different images improves on.
        """
        n, t, d = (np.asarray(values, np.float64) for values in (params, images, unique))
        return np.asarray(_law(self.coefficients, self.chance, n, t, d))

    def band(self, params: float, images: float, unique: float) -> Interval:
        """Returns the bootstrap interval of one prediction."""
        values = _law(self.samples.T, self.chance, np.float64(params), np.float64(images), np.float64(unique))
        return Interval(*self.quantiles(values).tolist())

    def optimum(self, compute: float, unique: float) -> Optimum:
        """Returns the size and the images seen of least error among runs that cost `compute` on `unique` images.

        Raises:
            UserError: compute that is not positive, or a law in which size or images seen do not matter.
        """
        if not compute > 0:
            raise UserError(f"compute is {compute:g}; a budget is positive")
        if min(self.A, self.B) <= 0:
            idle = "size" if self.A <= 0 else "number of images seen"
            raise UserError(f"in these runs the {idle} does not change the error, so a budget has no best split")
        best = self._split(self.coefficients[:, None], compute, unique)
        rows = self.samples[(self.samples[:, 1] > 0) & (self.samples[:, 3] > 0)]
        low, high = self.quantiles(self._split(rows.T, compute, unique).T)
        intervals = [Interval(*pair) for pair in zip(low.tolist(), high.tolist(), strict=True)]
        return Optimum(compute, *best[:, 0].tolist(), *intervals)

    def _split(self, theta_KR: Floats, compute: float, unique: float) -> Floats:
        """Returns params, images and error, [3, R], by bisection: h is convex in log N along a line of equal cost."""
        _, a, alpha, b, beta, c, gamma, delta = theta_KR
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
        return np.stack([params, images, _law(theta_KR, self.chance, params, images, np.float64(unique))])


def fit(
    params: ArrayLike,
    images: ArrayLike,
    unique: ArrayLike,
    compute: ArrayLike,
    error: ArrayLike,
    *,
    chance: float,
    bootstrap: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> RepeatedLaw:
    """Fits the law to runs of several sizes, lengths and data sizes, robustly and in relative error.

    Args:
        params: [P] size N of each run's model.
        images: [P] images T that each run saw, repetitions included.
        unique: [P] number D of different images in each run's training set.
        compute: [P] what each run cost.
        error: [P] positive and below `chance`.
        chance: error of guessing: 0.9 for ten equal classes.
        bootstrap, level, seed: of the intervals.

    Raises:
        UserError: a number that is not positive and finite, unequal lengths, too few runs, an error at or above
            chance, fewer than two data sizes, or an error that rises with the images seen at fixed size and data.
    """
    n, t, d, c, y = fitting.columns(
        least=LEAST_POINTS,
        distinct=3,
        coefficients="eight",
        params=params,
        images=images,
        unique=unique,
        compute=compute,
        error=error,
    )
    if not np.all(y < chance):
        raise UserError(f"an error is {np.max(y):g}, but chance is {chance:g}; leave runs that learned nothing out")
    if len(np.unique(d)) < 2:
        raise UserError(f"all runs have {d[0]:g} different images; a law of repeated data needs at least two numbers")
    units = [fitting.middle(values) for values in (n, t, d)]
    form = _form(n / units[0], t / units[1], d / units[2], y, chance)
    theta, samples = fitting.with_bootstrap(form, y, bootstrap=bootstrap, seed=seed)
    residual = form.curve(theta)[0][0] / y - 1
    _refuse_overfitting(n, t, d, y, residual)

    def in_units(rows: Floats) -> Floats:
        alpha, beta, gamma, delta, e, a, b, last = rows.T
        last = last * units[0] ** -gamma * units[2] ** delta
        return np.stack([e, a * units[0] ** alpha, alpha, b * units[1] ** beta, beta, last, gamma, delta], axis=1)

    cost_gamma, log_kappa = np.polyfit(np.log(n / units[0]), np.log(c / t), 1)
    law = RepeatedLaw(
        **law_fields(RepeatedLaw, in_units(theta)[0]),
        chance=chance,
        kappa=float(np.exp(log_kappa) * units[0] ** -cost_gamma),
        cost_gamma=float(cost_gamma),
        samples=in_units(samples),
        level=level,
        relative_rms=float(np.sqrt(np.mean(residual**2))),
    )
    return dataclasses.replace(law, warnings=_warnings(law))


def _form(x1: Floats, x2: Floats, x3: Floats, y: Floats, chance: float) -> Form:
    """Returns the law over N, T and D, each [P] and around one; K is alpha, beta, gamma, delta, e, A, B, C."""
    logs = np.log(x1), np.log(x2), np.log(x3)

    def curve(theta_RK: Floats) -> tuple[Floats, Floats]:
        alpha, beta, gamma, delta, e, a, b, c = (column[:, None] for column in theta_RK.T)
        size, seen, data = x1**-alpha, x2**-beta, x1**gamma * x3**-delta
        h = a * size + b * seen + c * data
        share = h / (1 + h)
        slopes = np.stack(
            [-a * size * logs[0], -b * seen * logs[1], c * data * logs[0], -c * data * logs[2], h, size, seen, data], -1
        )
        slopes = slopes * ((chance - e) / (1 + h) ** 2)[..., None]
        slopes[..., 4] = 1 - share
        return e + (chance - e) * share, slopes

    def basis(exponents: Floats) -> Floats:
        # E (1 + h) = e + chance h, so E = e + (chance - E) h: linear in e, A, B and C for the measured E.
        alpha, beta, gamma, delta = exponents
        room = chance - y
        return np.stack([np.ones_like(y), room * x1**-alpha, room * x2**-beta, room * x1**gamma * x3**-delta], axis=1)

    grid = np.array(list(itertools.product(RATES, RATES, (0.0, 0.3), RATES)))
    lower = np.array([1e-3, 1e-3, 0.0, 1e-3, 0.0, 0.0, 0.0, 0.0])
    upper = np.array([STEEPEST, STEEPEST, STEEPEST, STEEPEST, float(np.max(y)), 1e4, 1e4, 1e4])
    return Form(curve, basis, grid, lower, upper, STARTS)


def _law(theta: Floats, chance: float, n: Values, t: Values, d: Values) -> Values:
    e, a, alpha, b, beta, c, gamma, delta = theta
    h = a * n**-alpha + b * t**-beta + c * n**gamma * d**-delta
    return e + (chance - e) * h / (1 + h)


def _refuse_overfitting(n: Floats, t: Floats, d: Floats, y: Floats, residual: Floats) -> None:
    """Raises UserError if the error rises with the images seen, at fixed size and data, by more than noise."""
    noise = float(robust.spread(residual[None], np.ones((1, len(y))))[0])
    for size, data in sorted(set(zip(n.tolist(), d.tolist(), strict=True))):
        own = np.flatnonzero((n == size) & (d == data))
        own = own[np.argsort(t[own])]
        least = int(np.argmin(y[own]))
        rise = y[own[-1]] / y[own[least]] - 1
        if rise > max(OVERFIT, 4 * noise):
            raise UserError(
                f"with {size:g} parameters and {data:g} different images the error rises from {y[own[least]]:.4g} at "
                f"{t[own[least]]:g} images seen to {y[own[-1]]:.4g} at {t[own[-1]]:g}; this law falls with images "
                "seen: leave out runs longer than the best one"
            )


def _warnings(law: RepeatedLaw) -> tuple[str, ...]:
    sentences: tuple[str, ...] = ()
    for name in ("e", "alpha", "beta", "delta"):
        sentences += law.unidentified(name, getattr(law, name), law.interval(name))
    falls = (("alpha", "size"), ("beta", "images seen"), ("delta", "different images"))
    for name, what in falls:
        if (value := getattr(law, name)) > 0.999 * STEEPEST:
            sentences += (
                f"{name} = {value:.3g} is the largest value tried: the error does not fall with {what} as a power law",
            )
    for name, what in (("A", "size"), ("B", "images seen"), ("C", "different images")):
        if getattr(law, name) <= 0:
            sentences += (f"{name} = 0: in these runs the number of {what} does not limit the error",)
    return sentences

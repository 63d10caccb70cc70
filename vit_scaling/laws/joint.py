"""Error as a function of model size and images seen, and the best split of a compute budget between them.

E(N, D) = e + A N^-alpha + B D^-beta, and a run of size N on D images costs kappa N^gamma D. For a given cost the error
falls and then rises with N. Its minimum over N moves as a power of the budget. Scaling Vision Transformers (arXiv
2106.04560, section 2.2) shows these curves; the form is that of arXiv 2203.15556.

R replicates, P points, K = 5 coefficients.
"""

import dataclasses
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from vit_scaling import UserError
from vit_scaling.laws import fitting
from vit_scaling.laws.fitting import Fitted, Form, Interval, law_fields
from vit_scaling.laws.robust import Floats, Values

LEAST_POINTS = 6
STARTS = 6
STEEPEST = 5.0  # largest exponent tried


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The best split of a budget, each number with its bootstrap interval."""

    compute: float
    params: float
    images: float
    error: float
    params_interval: Interval
    images_interval: Interval
    error_interval: Interval


@dataclasses.dataclass(frozen=True)
class JointLaw(Fitted):
    """A fitted law E = e + A N^-alpha + B D^-beta, in the units of the data that it was fitted to.

    Attributes:
        e: error of an unlimited model on unlimited images.
        A, alpha, B, beta: what limited size and limited images add.
        kappa, gamma: the cost of a run, kappa N^gamma D.
        samples: (e, A, alpha, B, beta) of the bootstrap replicates, [R, 5].
        level: probability content of the intervals.
        rms: root mean square of the residuals, in units of the error.
        size_range, images_range: smallest and largest N and D among the runs.
        warnings: sentences about what the data do not determine.
    """

    COEFFICIENTS: ClassVar = ("e", "A", "alpha", "B", "beta")

    e: float
    A: float
    alpha: float
    B: float
    beta: float
    kappa: float
    gamma: float
    samples: Floats
    level: float
    rms: float
    size_range: tuple[float, float]
    images_range: tuple[float, float]
    warnings: tuple[str, ...] = ()

    def predict(self, params: ArrayLike, images: ArrayLike) -> Floats:
        """Returns the error of a model of `params` after `images`, of their common shape."""
        return np.asarray(_joint(self.coefficients, np.asarray(params, np.float64), np.asarray(images, np.float64)))

    def optimum(self, compute: float) -> Optimum:
        """Returns the size and the images of least error among runs that cost `compute`.

        Raises:
            UserError: compute that is not positive, or a law in which one of the two does not matter.
        """
        if not compute > 0:
            raise UserError(f"compute is {compute:g}; a budget is positive")
        if min(self.A, self.B) <= 0:
            idle = "size" if self.A <= 0 else "number of images"
            raise UserError(f"in these runs the {idle} does not change the error, so a budget has no best split")
        params, images, error = self._split(self.coefficients, compute)
        # A replicate without one of the two terms has no optimum.
        rows = self.samples[(self.samples[:, 1] > 0) & (self.samples[:, 3] > 0)]
        low, high = self.quantiles(np.stack(self._split(rows.T, compute), axis=1))
        intervals = [Interval(*pair) for pair in zip(low.tolist(), high.tolist(), strict=True)]
        return Optimum(compute, float(params), float(images), float(error), *intervals)

    def images_for(self, params: ArrayLike, compute: ArrayLike) -> Floats:
        """Returns how many images a model of `params` sees for `compute`, of their common shape."""
        return np.asarray(np.asarray(compute, np.float64) / (self.kappa * np.asarray(params, np.float64) ** self.gamma))

    def _split(self, theta: Floats, compute: float) -> tuple[Values, Values, Values]:
        # d/dN of A N^-alpha + B (compute / (kappa N^gamma))^-beta is zero at:
        _, a, alpha, b, beta = theta
        ratio = alpha * a / (beta * self.gamma * b)
        params = (ratio * (compute / self.kappa) ** beta) ** (1 / (alpha + beta * self.gamma))
        images = compute / (self.kappa * params**self.gamma)
        return params, images, _joint(theta, params, images)


def fit(
    params: ArrayLike,
    images: ArrayLike,
    compute: ArrayLike,
    error: ArrayLike,
    *,
    bootstrap: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> JointLaw:
    """Fits E = e + A N^-alpha + B D^-beta to runs of several sizes and lengths, robustly and in relative error.

    Args:
        params: [P] size N of each run's model: parameters, or any other measure of size.
        images: [P] images D that each run saw.
        compute: [P] what each run cost.
        error: [P] positive.
        bootstrap, level, seed: of the intervals.

    Raises:
        UserError: unequal lengths, a number that is not positive and finite, fewer than 6 runs, or runs of fewer than
            3 sizes or lengths.
    """
    n, d, c, y = fitting.columns(
        least=LEAST_POINTS, distinct=3, coefficients="five", params=params, images=images, compute=compute, error=error
    )
    unit_n, unit_d, unit_y = fitting.middle(n), fitting.middle(d), float(np.max(y))
    theta, samples = fitting.with_bootstrap(_form(n / unit_n, d / unit_d), y / unit_y, bootstrap=bootstrap, seed=seed)

    def in_units(rows: Floats) -> Floats:
        alpha, beta, e, a, b = rows.T
        return np.stack([e * unit_y, a * unit_y * unit_n**alpha, alpha, b * unit_y * unit_d**beta, beta], axis=1)

    gamma, log_kappa = np.polyfit(np.log(n / unit_n), np.log(c / d), 1)
    coefficients = in_units(theta)[0]
    law = JointLaw(
        **law_fields(JointLaw, coefficients),
        kappa=float(np.exp(log_kappa) * unit_n**-gamma),
        gamma=float(gamma),
        samples=in_units(samples),
        level=level,
        rms=float(np.sqrt(np.mean((_joint(coefficients, n, d) - y) ** 2))),
        size_range=(float(np.min(n)), float(np.max(n))),
        images_range=(float(np.min(d)), float(np.max(d))),
    )
    return dataclasses.replace(law, warnings=_warnings(law))


def _form(x1: Floats, x2: Floats) -> Form:
    """Returns the law over sizes x1 and images x2, both [P] and around one; K is alpha, beta, e, A, B."""

    def curve(theta_RK: Floats) -> tuple[Floats, Floats]:
        alpha, beta, e, a, b = (column[:, None] for column in theta_RK.T)
        size, seen = x1**-alpha, x2**-beta
        slopes = [-a * size * np.log(x1), -b * seen * np.log(x2), np.ones_like(size), size, seen]
        return e + a * size + b * seen, np.stack(slopes, axis=-1)

    def basis(exponents: Floats) -> Floats:
        return np.stack([np.ones_like(x1), x1 ** -exponents[0], x2 ** -exponents[1]], axis=1)

    rates = (0.1, 0.2, 0.35, 0.55, 0.8, 1.2)
    grid = np.array([(i, j) for i in rates for j in rates])
    lower, upper = np.array([1e-3, 1e-3, 0.0, 0.0, 0.0]), np.array([STEEPEST, STEEPEST, 1.0, 1e3, 1e3])
    return Form(curve, basis, grid, lower, upper, STARTS)


def _warnings(law: JointLaw) -> tuple[str, ...]:
    sentences: tuple[str, ...] = ()
    for name in ("e", "alpha", "beta"):
        sentences += law.unidentified(name, getattr(law, name), law.interval(name))
    for name, what in (("alpha", "size"), ("beta", "images")):
        if (value := getattr(law, name)) > 0.999 * STEEPEST:
            sentences += (
                f"{name} = {value:.3g} is the largest value tried: the error does not fall with {what} as a power law",
            )
    return sentences


def _joint(theta: Floats, params: Values, images: Values) -> Values:
    e, a, alpha, b, beta = theta
    return e + a * params**-alpha + b * images**-beta

"""Error as a function of model size and images seen, and the best split of a compute budget between them.

E(N, T) = e + A N^-alpha + B T^-beta, and a run of size N on T images costs kappa N^gamma T. For a given cost the error
falls and then rises with N. Its minimum over N moves as a power of the budget. Scaling Vision Transformers (arXiv
2106.04560, section 2.2) shows these curves; the form is that of arXiv 2203.15556.

R replicates, P points, K = 5 coefficients.
"""

import dataclasses
from typing import ClassVar, overload

import numpy as np
from numpy.typing import ArrayLike

from vit_scaling import UserError
from vit_scaling.laws import budget, fitting, repeated
from vit_scaling.laws.budget import STEEPEST, Budgeted, Optimum
from vit_scaling.laws.fitting import Form, Interval, law_fields
from vit_scaling.laws.repeated import RepeatedLaw
from vit_scaling.laws.robust import Floats, Values

LEAST_POINTS = 6
STARTS = 6


@dataclasses.dataclass(frozen=True)
class JointLaw(Budgeted):
    """A fitted law E = e + A N^-alpha + B T^-beta, in the units of the data that it was fitted to.

    Attributes:
        e: error of an unlimited model on unlimited images.
        A, alpha, B, beta: what limited size and limited images add.
        kappa, gamma: the cost of a run, kappa N^gamma T.
        samples: (e, A, alpha, B, beta) of the bootstrap replicates, [R, 5].
        level: probability content of the intervals.
        rms: root mean square of the residuals, in units of the error.
        size_range, images_range: smallest and largest N and T among the runs.
        runs: number of runs fitted.
        warnings: sentences about what the data do not determine.
    """

    COEFFICIENTS: ClassVar = ("e", "A", "alpha", "B", "beta")
    LIMITS: ClassVar = {"size": ("A", "alpha"), "images": ("B", "beta")}

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
    runs: int = 0
    warnings: tuple[str, ...] = ()

    def predict(self, params: ArrayLike, images: ArrayLike) -> Floats:
        """Returns the error of a model of `params` after `images`, of their common shape."""
        return np.asarray(_joint(self.coefficients, np.asarray(params, np.float64), np.asarray(images, np.float64)))

    def band(self, params: float, images: float) -> Interval:
        """Returns the bootstrap interval of one prediction."""
        return Interval(*self.quantiles(_joint(self.samples.T, np.float64(params), np.float64(images))).tolist())

    def optimum(self, compute: float) -> Optimum:
        """Returns the size and the images of least error among runs that cost `compute`.

        Raises:
            UserError: compute that is not positive, or a law in which one of the two does not matter.
        """
        return self._optimum(compute, lambda theta: self._split(theta, compute))

    def images_for(self, params: ArrayLike, compute: ArrayLike) -> Floats:
        """Returns how many images a model of `params` sees for `compute`, of their common shape."""
        return np.asarray(np.asarray(compute, np.float64) / (self.kappa * np.asarray(params, np.float64) ** self.gamma))

    def _split(self, theta: Floats, compute: float) -> Floats:
        # d/dN of A N^-alpha + B (compute / (kappa N^gamma))^-beta is zero at:
        _, a, alpha, b, beta = theta
        ratio = alpha * a / (beta * self.gamma * b)
        params = (ratio * (compute / self.kappa) ** beta) ** (1 / (alpha + beta * self.gamma))
        images = compute / (self.kappa * params**self.gamma)
        return np.stack([params, images, _joint(theta, params, images)])


@overload
def fit(
    params: ArrayLike,
    examples: ArrayLike,
    error: ArrayLike,
    *,
    compute: ArrayLike | None = ...,
    unique: None = ...,
    chance: None = ...,
    deviation: ArrayLike | None = ...,
    bootstrap: int = ...,
    level: float = ...,
    seed: int = ...,
) -> JointLaw: ...
@overload
def fit(
    params: ArrayLike,
    examples: ArrayLike,
    error: ArrayLike,
    *,
    unique: ArrayLike,
    compute: ArrayLike | None = ...,
    chance: float | None = ...,
    deviation: ArrayLike | None = ...,
    bootstrap: int = ...,
    level: float = ...,
    seed: int = ...,
) -> RepeatedLaw: ...
def fit(
    params: ArrayLike,
    examples: ArrayLike,
    error: ArrayLike,
    *,
    compute: ArrayLike | None = None,
    unique: ArrayLike | None = None,
    chance: float | None = None,
    deviation: ArrayLike | None = None,
    bootstrap: int = fitting.REPLICATES,
    level: float = 0.95,
    seed: int = 0,
) -> JointLaw | RepeatedLaw:
    """Fits the law of size and images seen to runs of several sizes and lengths, robustly.

    Args:
        params: [P] size N of each run's model: parameters, or any other measure of size.
        examples: [P] images T that each run saw, repetitions included.
        error: [P] positive: a fraction, percent, or a loss, summed or averaged.
        compute: [P] what each run cost; 6 N T if None.
        unique: [P] number of different images in each run's training set. With it the law is that of repeated data,
            `repeated.RepeatedLaw`.
        chance: error of guessing, the limit of that law from above; fitted if None.
        deviation: standard deviation of the error between seeds, for all runs or [P] for each. Residuals are divided by
            it, and by the error itself if None. It widens the intervals where the residuals scatter less.
        bootstrap, level, seed: of the intervals.

    Raises:
        UserError: unequal lengths, a number that is not positive and finite, fewer than 6 runs (12 with `unique`), or
            runs of fewer than 3 sizes or lengths; chance without unique; see `repeated.fit` for more.
    """
    if unique is not None:
        return repeated.fit(
            params,
            examples,
            unique,
            error,
            compute=compute,
            chance=chance,
            deviation=deviation,
            bootstrap=bootstrap,
            level=level,
            seed=seed,
        )
    if chance is not None:
        raise UserError("chance limits the law of repeated data; give unique, the number of different images, with it")
    table = fitting.columns(
        least=LEAST_POINTS, distinct=3, coefficients="five",
        params=params, images=examples, error=error, compute=compute, deviation=deviation,
    )  # fmt: skip
    n, t, y = (table[name] for name in ("params", "images", "error"))
    units, unit_y = (fitting.middle(n), fitting.middle(t)), float(np.max(y))
    noise = table["deviation"] / unit_y if "deviation" in table else None
    form = _form(n / units[0], t / units[1])
    theta, samples = fitting.with_bootstrap(form, y / unit_y, noise, bootstrap=bootstrap, seed=seed)

    def in_units(rows: Floats) -> Floats:
        alpha, beta, e, a, b = rows.T
        return np.stack(
            [e * unit_y, a * unit_y * units[0] ** alpha, alpha, b * unit_y * units[1] ** beta, beta], axis=1
        )

    coefficients = in_units(theta)[0]
    kappa, gamma = budget.cost(n, t, table.get("compute"))
    law = JointLaw(
        **law_fields(JointLaw, coefficients),
        kappa=kappa,
        gamma=gamma,
        samples=in_units(samples),
        level=level,
        runs=len(y),
        rms=float(np.sqrt(np.mean((_joint(coefficients, n, t) - y) ** 2))),
        size_range=(float(np.min(n)), float(np.max(n))),
        images_range=(float(np.min(t)), float(np.max(t))),
    )
    return dataclasses.replace(law, warnings=law.undetermined("e"))


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


def _joint(theta: Floats, params: Values, images: Values) -> Values:
    e, a, alpha, b, beta = theta
    return e + a * params**-alpha + b * images**-beta

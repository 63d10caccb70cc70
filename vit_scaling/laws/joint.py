"""Error as a function of model size and images seen, and the best split of a compute budget between them.

E(N, D) = e + A N^-alpha + B D^-beta, and a run of size N on D images costs kappa N^gamma D. For a given cost the error
falls and then rises with N: a parabola over log N whose lowest point moves with the budget as a power of it. Scaling
Vision Transformers (arXiv 2106.04560, section 2.2) shows these curves; the form is that of arXiv 2203.15556.

R replicates, P points, K = 5 coefficients.
"""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

from vit_scaling import UserError
from vit_scaling.laws import robust
from vit_scaling.laws.power_law import Interval
from vit_scaling.laws.robust import Floats, Values

LEAST_POINTS = 6
STARTS = 6
STEEPEST = 5.0  # exponent


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
class JointLaw:
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
        return np.asarray(_joint(self._theta(), np.asarray(params, np.float64), np.asarray(images, np.float64)))

    def optimum(self, compute: float) -> Optimum:
        """Returns the size and the images of least error among runs that cost `compute`.

        Raises:
            UserError: compute that is not positive, or a law in which one of the two does not matter.
        """
        if not compute > 0:
            raise UserError(f"compute is {compute:g}; a budget is positive")
        if min(self.A, self.B) <= 0:
            idle = "size" if self.A <= 0 else "number of images"
            raise UserError(f"in these runs the {idle} does not change the error, so that a budget has no best split")
        params, images, error = self._split(self._theta(), compute)
        tail = (1 - self.level) / 2
        # A replicate without one of the two terms has no optimum.
        rows = self.samples[(self.samples[:, 1] > 0) & (self.samples[:, 3] > 0)]
        low, high = np.quantile(self._split(rows.T, compute), [tail, 1 - tail], axis=1)
        intervals = [Interval(*pair) for pair in zip(low.tolist(), high.tolist(), strict=True)]
        return Optimum(compute, float(params), float(images), float(error), *intervals)

    def images_for(self, params: ArrayLike, compute: ArrayLike) -> Floats:
        """Returns how many images a model of `params` sees for `compute`, of their common shape."""
        return np.asarray(np.asarray(compute, np.float64) / (self.kappa * np.asarray(params, np.float64) ** self.gamma))

    def _theta(self) -> Floats:
        return np.array([self.e, self.A, self.alpha, self.B, self.beta])

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
    columns = {"params": params, "images": images, "compute": compute, "error": error}
    n, d, c, y = (positive(name, values) for name, values in columns.items())
    if len({len(n), len(d), len(c), len(y)}) > 1:
        raise UserError(f"the four arguments have {len(n)}, {len(d)}, {len(c)} and {len(y)} numbers; give one a run")
    if len(y) < LEAST_POINTS or min(len(np.unique(n)), len(np.unique(d))) < 3:
        raise UserError(
            f"{len(y)} runs of {len(np.unique(n))} sizes and {len(np.unique(d))} lengths; "
            f"five coefficients need at least {LEAST_POINTS} runs, 3 sizes and 3 lengths"
        )
    # In an order and in units that do not depend on how the runs were written down.
    order = np.lexsort((y, d, n))
    n, d, c, y = n[order], d[order], c[order], y[order]
    unit_n, unit_d, unit_y = _middle(n), _middle(d), float(np.max(y))
    x1, x2, z = n / unit_n, d / unit_d, y / unit_y

    def curve(theta_RK: Floats) -> tuple[Floats, Floats]:
        alpha, beta, e, a, b = (column[:, None] for column in theta_RK.T)
        size, seen = x1**-alpha, x2**-beta
        slopes = [-a * size * np.log(x1), -b * seen * np.log(x2), np.ones_like(size), size, seen]
        return (e + a * size + b * seen) / z, np.stack(slopes, axis=-1) / z[:, None]

    def basis(exponents: Floats) -> Floats:
        return np.stack([np.ones_like(x1), x1 ** -exponents[0], x2 ** -exponents[1]], axis=1)

    rates = (0.1, 0.2, 0.35, 0.55, 0.8, 1.2)
    start = robust.nodes(basis, np.array([(i, j) for i in rates for j in rates]), z, z, STARTS)
    lower, upper = np.array([1e-3, 1e-3, 0.0, 0.0, 0.0]), np.array([STEEPEST, STEEPEST, 1.0, 1e3, 1e3])
    ones = np.ones((1, len(z)))
    theta = robust.refine(curve, np.ones_like(z), ones, start, lower, upper)
    weights = robust.replicates(len(z), bootstrap, seed)
    samples = robust.refine(curve, np.ones_like(z), weights, np.concatenate([theta, start[:2]]), lower, upper)

    def in_units(rows: Floats) -> Floats:
        alpha, beta, e, a, b = rows.T
        return np.stack([e * unit_y, a * unit_y * unit_n**alpha, alpha, b * unit_y * unit_d**beta, beta], axis=1)

    gamma, log_kappa = np.polyfit(np.log(x1), np.log(c / d), 1)
    coefficients, samples = in_units(theta)[0], in_units(samples)
    e, a, alpha, b, beta = coefficients.tolist()
    tail = (1 - level) / 2
    low, high = np.quantile(samples, [tail, 1 - tail], axis=0)
    names = ("e", "A", "alpha", "B", "beta")
    warnings = tuple(
        f"{name} = {value:.3g} is not identified: its {level:.0%} interval is {lo:.3g} to {hi:.3g}"
        for name, value, lo, hi in zip(names, coefficients, low, high, strict=True)
        if name not in "AB" and hi - lo > max(value, 1e-12)
    )
    warnings += tuple(
        f"{name} = {value:.3g} is the steepest that is tried: the error does not fall with {what} as a power law"
        for name, value, what in (("alpha", alpha, "size"), ("beta", beta, "images"))
        if value > 0.999 * STEEPEST
    )
    return JointLaw(
        e,
        a,
        alpha,
        b,
        beta,
        kappa=float(np.exp(log_kappa) * unit_n**-gamma),
        gamma=float(gamma),
        samples=samples,
        level=level,
        rms=float(np.sqrt(np.mean((_joint(coefficients, n, d) - y) ** 2))),
        size_range=(float(np.min(n)), float(np.max(n))),
        images_range=(float(np.min(d)), float(np.max(d))),
        warnings=warnings,
    )


def positive(name: str, values: ArrayLike) -> Floats:
    """Returns `values` as an array [P]; raises ValueError naming the first number that is not positive and finite."""
    array = np.asarray(values, np.float64)
    if array.ndim != 1:
        raise UserError(f"{name} has shape {array.shape}; give one number for every run")
    bad = np.flatnonzero(~(np.isfinite(array) & (array > 0)))
    if len(bad):
        raise UserError(f"{name}[{bad[0]}] is {array[bad[0]]:g}; every {name} must be positive and finite")
    return array


def _joint(theta: Floats, params: Values, images: Values) -> Values:
    e, a, alpha, b, beta = theta
    return e + a * params**-alpha + b * images**-beta


def _middle(values: Floats) -> float:
    return float(np.exp(np.log(values).mean()))

"""The saturating power law E = c + a (C + d)^-b of error against compute (arXiv 2106.04560, section 2, figure 2).

`c` is the irreducible error. `d` shifts compute, because even a model of no compute is right sometimes. The law
describes the frontier: the lowest error that any run reached with a given compute.

R bootstrap replicates or starts, P points, K = 4 coefficients.
"""

import dataclasses
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vit_scaling import UserError
from vit_scaling.laws import fitting, robust
from vit_scaling.laws.fitting import Fitted, Form
from vit_scaling.laws.frontier import KINDS, find
from vit_scaling.laws.robust import Floats, Values

LOSSES = ("huber", "squares")
LEAST_POINTS = 5
# Where the search starts: values of b, and of d divided by the least compute.
GRID = np.array([(b, d) for b in (0.1, 0.2, 0.35, 0.6, 1.0, 2.0) for d in (0.0, 0.3, 1.0, 3.0, 10.0, 100.0)])
STARTS = 4


@dataclasses.dataclass(frozen=True)
class Extrapolation:
    """How well a law fitted to the cheaper runs predicts the frontier of the more expensive ones.

    Attributes:
        fitted_up_to: largest compute of a run that the fit saw.
        predicted_up_to: largest compute of a run that it was tested on.
        points: number of frontier points that it was tested on.
        mean_error: mean of prediction minus truth there, in units of the error.
        max_error: largest absolute difference there.
    """

    fitted_up_to: float
    predicted_up_to: float
    points: int
    mean_error: float
    max_error: float


@dataclasses.dataclass(frozen=True, repr=False)
class Law(Fitted):
    """A fitted law E = c + a (C + d)^-b, in the units of the data that it was fitted to.

    Attributes:
        a, b, c, d: the coefficients.
        compute, error: the points fitted, [P], in order of compute.
        index: their positions in the arrays that were given, [P].
        outliers: positions of given points so far below the others' law that they were set aside.
        samples: coefficients (a, b, c, d) of the bootstrap replicates, [R, 4].
        level: probability content of the intervals.
        rms: root mean square of the residuals, in units of the error.
        r_squared: share of the points' variance that the law explains.
        extrapolation: test by leaving out the most expensive points; None with too few points.
        warnings: sentences about what the data do not determine.
    """

    COEFFICIENTS: ClassVar = ("a", "b", "c", "d")

    a: float
    b: float
    c: float
    d: float
    compute: Floats
    error: Floats
    index: NDArray[np.intp]
    outliers: NDArray[np.intp]
    samples: Floats
    level: float
    rms: float
    r_squared: float
    extrapolation: Extrapolation | None = None
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        spans = [f"{name} = {getattr(self, name):.4g} ({low:.4g} to {high:.4g})" for name, (low, high) in self._spans()]
        fit = f"{len(self.compute)} points, R² {self.r_squared:.4f}, rms {self.rms:.3g}, {self.level:.0%} intervals"
        return "\n".join(["E = c + a (C + d)^-b", *spans, fit, *self.warnings])

    def _spans(self) -> list[tuple[str, fitting.Interval]]:
        return [(name, self.interval(name)) for name in self.COEFFICIENTS]

    def predict(self, compute: ArrayLike) -> Floats:
        """Returns the error at `compute`, of its shape."""
        return np.asarray(_law(self.coefficients, _computes(compute)))

    def invert(self, error: ArrayLike) -> Floats:
        """Returns the compute that reaches `error`, of its shape; 0 where no compute is needed.

        Raises:
            UserError: an error at or below the asymptote `c`, which no compute reaches.
        """
        e = np.asarray(error, np.float64)
        if not np.all(e > self.c):
            raise UserError(f"no compute reaches an error of {np.min(e):.6g}: the law's asymptote is c = {self.c:.6g}")
        return np.asarray(np.maximum(0.0, ((e - self.c) / self.a) ** (-1.0 / self.b) - self.d))

    def band(self, compute: ArrayLike) -> tuple[Floats, Floats]:
        """Returns (low, high) of the bootstrap interval of the law at `compute`, each of its shape."""
        x = _computes(compute)
        low, high = self.quantiles(_law(self.samples.T.reshape(4, -1, *(1,) * x.ndim), x[None]))
        return np.asarray(low), np.asarray(high)


def fit(
    compute: ArrayLike,
    error: ArrayLike,
    *,
    frontier: str = "minimum",
    loss: str = "huber",
    deviation: ArrayLike | None = None,
    bootstrap: int = fitting.REPLICATES,
    level: float = 0.95,
    seed: int = 0,
) -> Law:
    """Fits E = c + a (C + d)^-b to the frontier of the given runs.

    The fit starts from the best nodes of a grid, so it needs no initial guess. Neither the order of the points nor the
    units of either argument change the curve. Residuals are differences of errors, as in the paper's published fits.

    Args:
        compute: [P], positive, of every run in one unit: FLOPs, core-days, images of one model.
        error: [P], not negative: fractions or percent.
        frontier: "minimum" (running minimum over compute, the paper's), "hull" or "all", as in `frontier.find`. "all"
            is for points that scatter around one curve; a running minimum would keep only the lucky ones.
        loss: "huber", which gives little weight to points far from the curve, or "squares".
        deviation: standard deviation of the error between seeds, for all runs or [P] for each. Residuals are divided by
            it. It widens the intervals where the residuals scatter less.
        bootstrap: number of replicates, drawn from all runs before the frontier is taken.
        level: probability content of the intervals.
        seed: of the bootstrap.

    Raises:
        UserError: unequal lengths, a number that is not finite, compute that is not positive, a negative error, equal
            errors everywhere, or fewer than 5 points on the frontier.
    """
    x, y, order = _checked(compute, error, frontier, loss, bootstrap, level)
    noise = None if deviation is None else fitting.for_each(deviation, len(x))[order]
    outliers = _outliers(x, y, frontier, loss)
    inlier = np.setdiff1d(np.arange(len(x)), outliers)
    weight = np.zeros((1, len(x)))
    weight[0, inlier[find(x[inlier], y[inlier], frontier)]] = 1.0
    theta = _solve(x, y, weight, loss, noise)[0]
    points = np.flatnonzero(weight[0])
    residual = y[points] - _law(theta, x[points])

    counts = robust.replicates(len(inlier), bootstrap, seed)
    draws = np.zeros((bootstrap, len(x)))
    for draw, count in zip(draws, counts, strict=True):
        drawn = inlier[count > 0]
        chosen = drawn[find(x[drawn], y[drawn], frontier)]
        draw[chosen] = count[np.searchsorted(inlier, chosen)]
    # A replicate with fewer than five different points does not determine four coefficients.
    draws = draws[np.count_nonzero(draws, axis=1) >= LEAST_POINTS]
    unseen = None
    if noise is not None:
        unseen = np.zeros((len(draws), len(x)))
        unseen[:, points] = fitting.unseen_noise(residual, noise[points], len(draws), seed)
    samples = _solve(x, y, draws, loss, noise, unseen) if len(draws) else theta[None]
    variance = np.sum((y[points] - y[points].mean()) ** 2)
    law = Law(
        **fitting.law_fields(Law, theta),
        compute=x[points],
        error=y[points],
        index=order[points],
        outliers=order[outliers],
        samples=samples,
        level=level,
        rms=float(np.sqrt(np.mean(residual**2))),
        r_squared=float(1.0 - np.sum(residual**2) / variance),
    )
    left_out = None
    if len(points) >= LEAST_POINTS + 2:
        left_out = _extrapolate(x[inlier], y[inlier], x[points][int(0.8 * len(points)) - 1], frontier, loss)
    law = dataclasses.replace(law, extrapolation=left_out)
    return dataclasses.replace(law, warnings=_warnings(law, len(draws), bootstrap))


def extrapolate(
    compute: ArrayLike,
    error: ArrayLike,
    *,
    up_to: float,
    frontier: str = "minimum",
    loss: str = "huber",
) -> Extrapolation:
    """Fits a law to the runs of compute at most `up_to` and tests it on the frontier of the more expensive ones.

    Raises:
        UserError: as `fit`, for the cheaper runs; or no frontier point is more expensive than `up_to`.
    """
    x, y, _ = _checked(compute, error, frontier, loss, 1, 0.95)
    _checked(x[x <= up_to], y[x <= up_to], frontier, loss, 1, 0.95)
    result = _extrapolate(x, y, up_to, frontier, loss)
    if result is None:
        raise UserError(f"up_to is {up_to:g}, but no frontier point is more expensive; the most expensive is {x[-1]:g}")
    return result


def _extrapolate(x: Floats, y: Floats, up_to: float, kind: str, loss: str) -> Extrapolation | None:
    cheap = np.flatnonzero(x <= up_to)
    weight = np.zeros((1, len(x)))
    weight[0, cheap[find(x[cheap], y[cheap], kind)]] = 1.0
    judges = find(x, y, kind)
    judges = judges[x[judges] > up_to]
    if not len(judges):
        return None
    difference = _law(_solve(x, y, weight, loss)[0], x[judges]) - y[judges]
    return Extrapolation(
        float(x[cheap[-1]]),
        float(x[judges[-1]]),
        len(judges),
        float(difference.mean()),
        float(np.abs(difference).max()),
    )


def _law(theta: Floats, x: Values) -> Values:
    a, b, c, d = theta
    return c + a * (x + d) ** -b


def _computes(compute: ArrayLike) -> Floats:
    x = np.asarray(compute, np.float64)
    if not np.all(x >= 0):
        raise UserError(f"compute is {np.min(x)}; it cannot be negative")
    return x


def _outliers(x: Floats, y: Floats, kind: str, loss: str) -> NDArray[np.intp]:
    """Returns the positions of points that lie far below the law of all others, yet would form the running minimum.

    One such run would hide every more expensive run. Far means six robust standard deviations of the frontier.
    """
    gone: list[int] = []
    if loss == "squares" or kind == "all":
        return np.array(gone, np.intp)  # without a minimum, the robust loss is enough
    while True:
        inlier = np.setdiff1d(np.arange(len(x)), gone)
        points = inlier[find(x[inlier], y[inlier], kind)]
        if len(points) <= LEAST_POINTS:
            return np.array(gone, np.intp)
        weight = np.zeros((1, len(x)))
        weight[0, points] = 1.0
        residual = y[points] - _law(_solve(x, y, weight, loss)[0], x[points])
        limit = 6 * robust.spread(residual[None], np.ones((1, len(points))))[0]
        if np.min(residual) >= -max(limit, 1e-9 * float(np.max(y))):
            return np.array(gone, np.intp)
        gone.append(int(points[np.argmin(residual)]))


def _solve(
    x_P: Floats,
    y_P: Floats,
    weight_RP: Floats,
    loss: str,
    deviation_P: Floats | None = None,
    noise_RP: Floats | None = None,
) -> Floats:
    """Returns coefficients (a, b, c, d) [R, 4] of the law fitted under each row of weights.

    Works with compute over the least compute, and with the rise A = a (x_0 + d)^-b of the cheapest point above the
    asymptote instead of `a`, so that all four numbers are of order one in any units.
    """
    unit_x, unit_y = float(np.min(x_P)), float(np.max(y_P))
    x, y = x_P / unit_x, y_P / unit_y

    def curve(theta_RK: Floats) -> tuple[Floats, Floats]:
        b, d, c, rise = (column[:, None] for column in theta_RK.T)
        u = (x + d) / (1.0 + d)
        power = u**-b
        fall = rise * power
        slopes = [-fall * np.log(u), -b * fall / u * (1.0 - x) / (1.0 + d) ** 2, np.ones_like(power), power]
        return c + fall, np.stack(slopes, axis=-1)

    def basis(exponents: Floats) -> Floats:
        b, d = exponents
        return np.stack([np.ones_like(x), ((x + d) / (1.0 + d)) ** -b], axis=1)

    lower, upper = np.array([1e-3, 0.0, 0.0, 0.0]), np.array([20.0, 10.0 * float(np.max(x)), 1.0, 10.0])
    form = Form(curve, basis, GRID, lower, upper, STARTS)
    scale = None if deviation_P is None else deviation_P / unit_y
    noise = None if noise_RP is None else noise_RP / unit_y
    b, d, c, rise = fitting.solve(form, y, weight_RP, scale_P=scale, noise_RP=noise, squares=loss == "squares").T
    return np.stack([rise * unit_y * ((1.0 + d) * unit_x) ** b, b, c * unit_y, d * unit_x], axis=-1)


def _checked(
    compute: ArrayLike, error: ArrayLike, kind: str, loss: str, bootstrap: int, level: float
) -> tuple[Floats, Floats, NDArray[np.intp]]:
    """Returns compute and error in order of compute, and that order."""
    x, y = np.asarray(compute, np.float64), np.asarray(error, np.float64)
    for name, value, choices in (("frontier", kind, KINDS), ("loss", loss, LOSSES)):
        if value not in choices:
            raise UserError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
    if bootstrap < 1:
        raise UserError(f"bootstrap is {bootstrap}; give the number of replicates, at least 1")
    if not 0 < level < 1:
        raise UserError(f"level is {level}; it lies between 0 and 1")
    if x.ndim != 1 or x.shape != y.shape:
        raise UserError(f"compute has shape {x.shape} and error {y.shape}; give one number of each for every run")
    for name, values in (("compute", x), ("error", y)):
        if not np.all(np.isfinite(values)):
            at = int(np.flatnonzero(~np.isfinite(values))[0])
            raise UserError(f"{name}[{at}] is {values[at]}; leave runs without a finite {name} out")
    if np.any(x <= 0):
        at = int(np.argmin(x))
        raise UserError(f"compute[{at}] is {x[at]:g}; compute must be positive")
    if np.any(y < 0):
        at = int(np.argmin(y))
        raise UserError(f"error[{at}] is {y[at]:g}; an error cannot be negative")
    if len(y) and np.ptp(y) == 0:
        raise UserError(f"all {len(y)} errors equal {y[0]:g}; a law needs errors that fall with compute")
    points = len(find(x, y, kind)) if len(y) else 0
    if points < LEAST_POINTS:
        raise UserError(
            f"{points} of the {len(y)} runs lie on the frontier; four coefficients need at least {LEAST_POINTS}"
        )
    order = np.lexsort((y, x))
    return x[order], y[order], order


def _warnings(law: Law, replicates: int, bootstrap: int) -> tuple[str, ...]:
    sentences: list[str] = []
    for name, value in zip(law.COEFFICIENTS, law.coefficients.tolist(), strict=True):
        sentences += law.unidentified(name, value, law.interval(name))
    if replicates < bootstrap:
        sentences.append(f"{bootstrap - replicates} of {bootstrap} bootstrap replicates had too few frontier points")
    return tuple(sentences)

"""The learning curve of one model: its error against images seen, fitted in order to continue it.

    E = c + a x^-b                                           one power law
    E = c + a x^-b (1 + (x / turn)^(1 / WIDTH))^(-s WIDTH)   with one break (arXiv 2210.14891)

The start of a curve follows another law than its end. Squared residuals therefore count by x^1.5, so that the end
decides. The broken law is used only if it predicts the last fifth of the curve better than the plain one does.

R replicates, P points, K = 3 coefficients, or 5 with a break.
"""

import dataclasses
import itertools
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from vit_scaling import UserError
from vit_scaling.laws import fitting, robust
from vit_scaling.laws.fitting import Fitted, Form
from vit_scaling.laws.robust import Floats, Values

LEAST_POINTS = 6
LATE = 1.5  # squared residuals count by this power of x
WIDTH = 0.3  # of the break, in units of log x: about a factor of two to either side
HELD_OUT = 0.2  # share of the points, the last ones, by which the two laws are compared
BETTER = 0.7  # the break must bring the error of prediction below this share of the plain law's
EXACT = 1e-6  # relative error below which the plain law needs no break
RATES = (0.1, 0.2, 0.4, 0.7, 1.0, 1.5)


@dataclasses.dataclass(frozen=True)
class CurveLaw(Fitted):
    """A fitted learning curve, in the units of the data that it was fitted to.

    Attributes:
        c, a, b: error of unlimited images, and the amplitude and exponent of what is above it.
        turn, s: position of the break, and by how much the exponent grows there; infinity and 0 without a break.
        samples: (c, a, b, turn, s) of the bootstrap replicates, [R, 5].
        level: probability content of the intervals.
    """

    COEFFICIENTS: ClassVar = ("c", "a", "b", "turn", "s")

    c: float
    a: float
    b: float
    turn: float
    s: float
    samples: Floats
    level: float

    @property
    def broken(self) -> bool:
        return self.s > 0

    def predict(self, images: ArrayLike) -> Floats:
        """Returns the error after `images`, of its shape."""
        return np.asarray(_law(self.coefficients, np.asarray(images, np.float64)))

    def band(self, images: ArrayLike) -> tuple[Floats, Floats]:
        """Returns (low, high) of the bootstrap interval of the curve at `images`, each of its shape."""
        x = np.asarray(images, np.float64)
        low, high = self.quantiles(_law(self.samples.T.reshape(5, -1, *(1,) * x.ndim), x[None]))
        return np.asarray(low), np.asarray(high)


def fit(
    images: ArrayLike, error: ArrayLike, *, bootstrap: int = fitting.REPLICATES, level: float = 0.95, seed: int = 0
) -> CurveLaw:
    """Fits the learning curve of one model, robustly and in relative error.

    Args:
        images: [P] images seen at each evaluation, or any other measure of training, in any order.
        error: [P] positive.
        bootstrap, level, seed: of the intervals.

    Raises:
        UserError: unequal lengths, a number that is not positive and finite, or fewer than 6 evaluations.
    """
    x, y = fitting.positive("images", images), fitting.positive("error", error)
    if len(x) != len(y):
        raise UserError(f"there are {len(x)} images and {len(y)} errors; give one of each for every evaluation")
    if len(np.unique(x)) < LEAST_POINTS:
        raise UserError(f"a curve of {len(np.unique(x))} evaluations; a law needs at least {LEAST_POINTS}")
    order = np.lexsort((y, x))
    x, y = x[order], y[order]
    broken = _break_predicts_better(x, y)
    one = np.ones((1, len(y)))
    best = _solve(x, y, one, broken)
    samples = _solve(x, y, robust.replicates(len(y), bootstrap, seed), broken)
    return CurveLaw(**fitting.law_fields(CurveLaw, best[0]), samples=samples, level=level)


def _break_predicts_better(x: Floats, y: Floats) -> bool:
    last = x > np.quantile(x, 1 - HELD_OUT)
    early = ~last
    if len(np.unique(x[early])) < 2 * LEAST_POINTS:
        return False
    one = np.ones((1, int(early.sum())))
    plain, broken = (
        float(np.mean(np.log(_law(_solve(x[early], y[early], one, kind)[0], x[last]) / y[last]) ** 2)) ** 0.5
        for kind in (False, True)
    )
    return plain > EXACT and broken < BETTER * plain


def _solve(x: Floats, y: Floats, weight_RP: Floats, broken: bool) -> Floats:
    """Returns (c, a, b, turn, s) [R, 5] under each row of weights. Works with x over the largest x."""
    unit_x, unit_y = float(np.max(x)), float(np.max(y))
    u = x / unit_x
    late = u**LATE / np.mean(u**LATE)
    theta = fitting.solve(_form(u, broken), y / unit_y, weight_RP * late, scale_P=y / unit_y)
    if broken:
        b, s, log_turn, c, a = theta.T
    else:
        b, c, a = theta.T
        s, log_turn = np.zeros_like(b), np.full_like(b, np.inf)
    return np.stack([c * unit_y, a * unit_y * unit_x**b, b, np.exp(log_turn) * unit_x, s], axis=1)


def _form(u: Floats, broken: bool) -> Form:
    """Returns the law over images u, [P] and at most one; K is b, c, a, with a break b, s, log turn, c, a."""
    log_u = np.log(u)

    def decay(b: Values, s: Values, log_turn: Values) -> Values:
        return np.exp(-b * log_u - s * WIDTH * np.logaddexp(0, (log_u - log_turn) / WIDTH))

    def plain(theta_RK: Floats) -> tuple[Floats, Floats]:
        b, c, a = (column[:, None] for column in theta_RK.T)
        falls = u**-b
        return c + a * falls, np.stack([-a * falls * log_u, np.ones_like(falls), falls], axis=-1)

    def turning(theta_RK: Floats) -> tuple[Floats, Floats]:
        b, s, log_turn, c, a = (column[:, None] for column in theta_RK.T)
        falls, past = decay(b, s, log_turn), (log_u - log_turn) / WIDTH
        softplus, gate = WIDTH * np.logaddexp(0, past), 1 / (1 + np.exp(-past))
        slopes = [-a * falls * log_u, -a * falls * softplus, a * falls * s * gate, np.ones_like(falls), falls]
        return c + a * falls, np.stack(slopes, axis=-1)

    def basis(exponents: Floats) -> Floats:
        falls = decay(*exponents) if broken else u ** -exponents[0]
        return np.stack([np.ones_like(u), falls], axis=1)

    if not broken:
        return Form(plain, basis, np.array(RATES)[:, None], np.array([1e-3, 0, 0]), np.array([5.0, 1, 1e3]), 3)
    first, last = float(log_u[0]), 0.0
    turns = np.linspace(first, last, 5)[1:-1]
    grid = np.array(list(itertools.product(RATES[:4], (0.2, 0.6, 1.2), turns)))
    lower, upper = np.array([1e-3, 0, first, 0, 0]), np.array([5.0, 5, last, 1, 1e3])
    return Form(turning, basis, grid, lower, upper, 4)


def _law(theta: Floats, x: Values) -> Values:
    c, a, b, turn, s = theta
    return c + a * x**-b * np.exp(-s * WIDTH * np.logaddexp(0, (np.log(x) - np.log(turn)) / WIDTH))

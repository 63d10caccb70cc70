"""One dimension of a shape against compute: the law of "Getting ViT in Shape" (arXiv 2305.13035, sections 3 and 4).

With the other dimensions fixed, a model whose width (or depth, or MLP) is x, trained with compute t, has the error

    f(x, t) = alpha x^-a + (beta x^b + xi) t^-c + epsilon

Its minimum is at x*(t) = (alpha a t^c / (beta b))^(1 / (a + b)): the dimension should grow as t^s with s = c / (a + b).

R replicates, P points, K = 7 coefficients.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from vit_scaling import UserError
from vit_scaling.laws import fitting
from vit_scaling.laws.fitting import Fitted, Form, Interval, law_fields
from vit_scaling.laws.robust import Floats

LEAST_POINTS = 9
STARTS = 12

# Image classification, section 4: depth should grow faster than width, and the MLP fastest.
PUBLISHED_EXPONENTS = {"depth": 0.45, "width": 0.22, "mlp": 0.60}


@dataclasses.dataclass(frozen=True)
class DimensionLaw(Fitted):
    """A fitted law alpha x^-a + (beta x^b + xi) t^-c + epsilon, in the units of its data.

    Attributes:
        samples: (alpha, a, beta, b, xi, c, epsilon) of the bootstrap replicates, [R, 7].
        level: probability content of the intervals.
        relative_rms: root mean square of the residuals over the errors.
        warnings: sentences about what the data do not determine.
    """

    COEFFICIENTS: ClassVar = ("alpha", "a", "beta", "b", "xi", "c", "epsilon")

    alpha: float
    a: float
    beta: float
    b: float
    xi: float
    c: float
    epsilon: float
    samples: Floats
    level: float
    relative_rms: float
    warnings: tuple[str, ...] = ()

    @property
    def exponent(self) -> float:
        """s = c / (a + b), the exponent with which the best x grows with compute."""
        return self.c / (self.a + self.b)

    @property
    def exponent_interval(self) -> Interval:
        _, a, _, b, _, c, _ = self.samples.T
        return Interval(*self.quantiles(c / (a + b)).tolist())

    def predict(self, x: ArrayLike, compute: ArrayLike) -> Floats:
        """Returns the error of dimension `x` under `compute`, of their common shape."""
        x, t = np.asarray(x, np.float64), np.asarray(compute, np.float64)
        return np.asarray(self.alpha * x**-self.a + (self.beta * x**self.b + self.xi) * t**-self.c + self.epsilon)

    def optimum(self, compute: ArrayLike) -> Floats:
        """Returns the dimension of least error under `compute`, of its shape.

        Raises:
            UserError: the law has no minimum: more of the dimension always helps, or never does.
        """
        if min(self.alpha, self.beta) <= 0:
            raise UserError(
                f"alpha = {self.alpha:g} and beta = {self.beta:g}: both must be positive for a best dimension; "
                "include runs on both sides of it"
            )
        t = np.asarray(compute, np.float64)
        return np.asarray((self.alpha * self.a * t**self.c / (self.beta * self.b)) ** (1 / (self.a + self.b)))


def fit(
    x: ArrayLike,
    compute: ArrayLike,
    error: ArrayLike,
    *,
    bootstrap: int = 100,
    level: float = 0.95,
    seed: int = 0,
) -> DimensionLaw:
    """Fits the law to runs that differ in one dimension and in compute, in relative error as the paper does.

    Args:
        x: [P] the dimension of each run.
        compute: [P] the compute of each run. The paper's is forward FLOPs times examples.
        error: [P] positive.
        bootstrap, level, seed: of the intervals.

    Raises:
        UserError: unequal lengths, numbers that are not positive and finite, or too few runs, dimensions or budgets.
    """
    size, t, y = fitting.columns(
        least=LEAST_POINTS, distinct=3, coefficients="seven", x=x, compute=compute, error=error
    ).values()
    unit_x, unit_t, unit_y = fitting.middle(size), fitting.middle(t), float(np.max(y))
    form, z = _form(size / unit_x, t / unit_t), y / unit_y
    theta, samples = fitting.with_bootstrap(form, z, bootstrap=bootstrap, seed=seed)

    def in_units(rows: Floats) -> Floats:
        a, b, c, alpha, beta, xi, epsilon = rows.T
        time = unit_t**c
        alpha, beta, xi = alpha * unit_x**a, beta * unit_x**-b * time, xi * time
        return np.stack([alpha * unit_y, a, beta * unit_y, b, xi * unit_y, c, epsilon * unit_y], axis=1)

    residual = form.curve(theta)[0][0] / z - 1
    law = DimensionLaw(
        **law_fields(DimensionLaw, in_units(theta)[0]),
        samples=in_units(samples),
        level=level,
        relative_rms=float(np.sqrt(np.mean(residual**2))),
    )
    return dataclasses.replace(law, warnings=_warnings(law, size, t))


def _form(u: Floats, v: Floats) -> Form:
    """Returns the law over dimensions u and compute v, [P], near one; K is a, b, c, alpha, beta, xi, epsilon."""

    def curve(theta_RK: Floats) -> tuple[Floats, Floats]:
        a, b, c, alpha, beta, xi, epsilon = (column[:, None] for column in theta_RK.T)
        small, large, time = u**-a, u**b, v**-c
        rising = beta * large + xi
        slopes = [
            -alpha * small * np.log(u),
            beta * large * np.log(u) * time,
            -rising * time * np.log(v),
            small,
            large * time,
            time,
            np.ones_like(small),
        ]
        return alpha * small + rising * time + epsilon, np.stack(slopes, axis=-1)

    def basis(exponents: Floats) -> Floats:
        a, b, c = exponents
        return np.stack([u**-a, u**b * v**-c, v**-c, np.ones_like(u)], axis=1)

    grid = np.array(list(itertools.product((0.15, 0.35, 0.7, 1.2), repeat=3)))
    lower, upper = np.array([1e-2, 1e-2, 1e-2, 0, 0, 0, 0]), np.array([5.0, 5, 5, 1e3, 1e3, 1e3, 1])
    return Form(curve, basis, grid, lower, upper, STARTS)


def grow(
    shape: Mapping[str, float], factor: float, exponents: Mapping[str, float] = PUBLISHED_EXPONENTS
) -> dict[str, float]:
    """Returns the shape for `factor` times the compute of one that is optimal: each dimension times factor^(s / n).

    With n = 3 dimensions scaled together each takes a third of the growth; 100 times the compute widens by 1.4, deepens
    by 2.0 and multiplies the MLP by 2.5 (figure 1 of the paper).
    """
    if not factor > 0:
        raise UserError(f"factor is {factor:g}; it is a positive ratio of compute")
    if missing := sorted(set(shape) - set(exponents)):
        raise UserError(f"no exponent for {', '.join(missing)}; there are exponents for {', '.join(exponents)}")
    return {name: value * factor ** (exponents[name] / len(shape)) for name, value in shape.items()}


def _warnings(law: DimensionLaw, x: Floats, compute: Floats) -> tuple[str, ...]:
    middle = float(np.exp(np.log(compute).mean()))
    if min(law.alpha, law.beta) <= 0 or not np.min(x) <= float(law.optimum(middle)) <= np.max(x):
        return (
            f"the best dimension is not among the runs: at compute {middle:.3g} it lies outside {np.min(x):g} to "
            f"{np.max(x):g}; include runs on both sides of it",
        )
    return law.unidentified("s", law.exponent, law.exponent_interval)

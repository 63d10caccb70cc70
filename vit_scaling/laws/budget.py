"""The best split of a compute budget between the size of a model and the images it sees, by a fitted law.

A run of size N on T images costs kappa N^gamma T. For a given cost the error falls and then rises with N; a law's own
`split` finds the minimum on its fitted surface. R replicates, K coefficients.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from vit_scaling import UserError
from vit_scaling.laws import fitting
from vit_scaling.laws.fitting import Fitted, Interval
from vit_scaling.laws.robust import Floats

STEEPEST = 5.0  # largest exponent tried
VAGUE = 10.0  # a size or a number of images is not identified if its interval spans such a factor


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The best split of a budget, each number with its bootstrap interval.

    Attributes:
        warnings: sentences about what the runs do not determine.
    """

    compute: float
    params: float
    images: float
    error: float
    params_interval: Interval
    images_interval: Interval
    error_interval: Interval
    warnings: tuple[str, ...] = ()


class Budgeted(Fitted):
    """A fitted law in which size and images seen each limit the error by a power law.

    Attributes:
        LIMITS: {what: (amplitude, exponent)} of the terms.
    """

    LIMITS: ClassVar[Mapping[str, tuple[str, str]]]
    A: float
    B: float
    size_range: tuple[float, float]
    images_range: tuple[float, float]

    def _optimum(self, compute: float, split: Callable[[Floats], Floats]) -> Optimum:
        """Returns the best split by `split`, which takes coefficients [K, R] to params, images and error, [3, R]."""
        if not (compute > 0 and np.isfinite(compute)):
            raise UserError(f"compute is {compute:g}; a budget is positive and finite")
        if min(self.A, self.B) <= 0:
            idle = "size" if self.A <= 0 else "number of images seen"
            raise UserError(f"in these runs the {idle} does not change the error, so a budget has no best split")
        params, images, error = split(self.coefficients[:, None])[:, 0].tolist()
        low, high = self.quantiles(split(self._limited().T).T)
        spans = [Interval(*pair) for pair in zip(low.tolist(), high.tolist(), strict=True)]
        sentences = []
        named = (("parameters", self.size_range), ("images seen", self.images_range))
        for (what, (least, most)), value, span in zip(named, (params, images), spans[:2], strict=True):
            if span.high > VAGUE * span.low:
                sentences.append(
                    f"the best number of {what} is not identified: its {self.level:.0%} interval is {span.low:.3g} to "
                    f"{span.high:.3g}"
                )
            if not least <= value <= most:
                sentences.append(f"the best number of {what}, {value:.3g}, is outside {least:.3g} to {most:.3g}, "
                                 "what the runs had: an extrapolation")  # fmt: skip
        return Optimum(compute, params, images, error, spans[0], spans[1], spans[2], tuple(sentences))

    def _limited(self) -> Floats:
        """Returns the replicates in which both size and images seen limit the error, [R, K]: others have no optimum."""
        a, b = (self.samples[:, self.COEFFICIENTS.index(name)] for name in ("A", "B"))
        return self.samples[(a > 0) & (b > 0)]

    def undetermined(self, *others: str) -> tuple[str, ...]:
        """Returns sentences about what the runs do not determine: the exponents and the `others` named."""
        sentences: tuple[str, ...] = ()
        for name in (*others, *(exponent for _, exponent in self.LIMITS.values())):
            sentences += self.unidentified(name, getattr(self, name), self.interval(name))
        for what, (amplitude, exponent) in self.LIMITS.items():
            if (value := getattr(self, exponent)) > 0.999 * STEEPEST:
                sentences += (f"{exponent} = {value:.3g} is the largest value tried: the error does not fall with "
                              f"{what} as a power law",)  # fmt: skip
            if getattr(self, amplitude) <= 0:
                sentences += (f"{amplitude} = 0: in these runs the number of {what} does not limit the error",)
        if min(self.A, self.B) > 0 and (without := len(self.samples) - len(self._limited())):
            sentences += (f"in {without} of {len(self.samples)} bootstrap replicates size or images seen do not limit "
                          "the error; intervals of the advice leave these out",)  # fmt: skip
        return sentences


def cost(params: Floats, images: Floats, compute: ArrayLike | None) -> tuple[float, float]:
    """Returns kappa and gamma of the cost of a run, kappa N^gamma T; 6 N T without measured compute."""
    if compute is None:
        return 6.0, 1.0
    unit = fitting.middle(params)
    gamma, log_kappa = np.polyfit(np.log(params / unit), np.log(np.asarray(compute) / images), 1)
    return float(np.exp(log_kappa) * unit**-gamma), float(gamma)

"""What the runs of a study, or of any table, say: the laws they support, and how far these can be trusted.

The report and the page of a study show what `find` returns.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from vit_scaling import UserError
from vit_scaling.laws import curve, frontier, joint, power_law, repeated
from vit_scaling.laws.curve import CurveLaw
from vit_scaling.laws.joint import JointLaw
from vit_scaling.laws.power_law import Law
from vit_scaling.laws.repeated import RepeatedLaw
from vit_scaling.laws.robust import Floats
from vit_scaling.studies.table import SEED, SWEEP, Run


class Residual(NamedTuple):
    """One run beside one law."""

    law: str  # "compute", "size and images" or "repeated data"
    run: Run
    fitted: float
    relative: float  # measured error over fitted error, minus 1


class HeldOut(NamedTuple):
    """How well a law fitted to the cheaper runs predicts the most expensive ones.

    `miss` is the root mean square of log predicted error minus log measured error.
    """

    law: str
    fitted: int
    judged: int
    miss: float


@dataclasses.dataclass(frozen=True)
class Options:
    """How laws are fitted to a table of runs.

    Attributes:
        chance: error of guessing, for the law of repeated data; fitted if None.
        held_out: share of the runs, the most expensive ones, that the laws predict for a test.
        frontier: runs that the law of compute is fitted to, as in `laws.fit`.
    """

    chance: float | None = None
    held_out: float = 0.2
    frontier: str = "minimum"


@dataclasses.dataclass(frozen=True)
class Findings:
    """The laws that the runs support; None, with the reason among `problems`, where they support none.

    Attributes:
        law: error of the frontier against compute.
        joint: error against size and images seen, on most different images.
        repeated: error against size, images seen and different images.
        broken: law of compute with a break, only where it predicts the held-out runs better than `law` does.
        problems: sentences about laws that could not be fitted.
        rainbow: (parameters, law, joint) with the runs of that size left out.
        held_out: test of each law on the most expensive runs.
        deviation: standard deviation of the error between seeds over the error, from replicates; None without any.
        options: how the laws were fitted.
    """

    law: Law | None
    joint: JointLaw | None
    repeated: RepeatedLaw | None = None
    broken: CurveLaw | None = None
    problems: tuple[str, ...] = ()
    rainbow: tuple[tuple[float, Law | None, JointLaw | None], ...] = ()
    held_out: tuple[HeldOut, ...] = ()
    deviation: float | None = None
    options: Options = dataclasses.field(default_factory=Options)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the laws say that the runs do not determine."""
        laws = (self.law, self.joint, self.repeated)
        return tuple(sentence for law in laws if law is not None for sentence in law.warnings)


def find(runs: Sequence[Run], options: Options | None = None) -> Findings:
    """Fits all laws to the sweep's runs."""
    options = options or Options()
    if not 0 < options.held_out < 1:
        raise UserError(f"held_out is {options.held_out:g}; it is a share of the runs, between 0 and 1")
    sweep = [run for run in runs if run.group == SWEEP]
    deviation = of_replicates([run for run in runs if run.group in (SWEEP, SEED)])
    problems: list[str] = []

    def attempt(what: str, fitting: Callable):
        try:
            return fitting()
        except UserError as error:
            problems.append(f"No law of {what}: {error}.")
            return None

    law = attempt("compute", lambda: fit_compute(sweep, options, deviation))
    two = attempt("size and images", lambda: fit_joint(sweep, deviation))
    three = None
    if len({run.data_images for run in sweep}) > 1:
        three = attempt("repeated data", lambda: fit_repeated(sweep, options, deviation))
    tests, broken = _held_out(sweep, options, deviation)
    return Findings(
        law, two, three, broken, tuple(problems), _rainbow(sweep, options, deviation), tests, deviation, options
    )


def fit_compute(runs: Sequence[Run], options: Options, deviation: float | None = None, bootstrap: int = 200) -> Law:
    compute, error, noise = column(runs, "compute"), column(runs, "error"), noises(runs, deviation)
    return power_law.fit(compute, error, frontier=options.frontier, deviation=noise, bootstrap=bootstrap)


def fit_joint(runs: Sequence[Run], deviation: float | None = None, bootstrap: int = 200) -> JointLaw:
    """Fits the law of size and images to the runs on most different images."""
    own = on_most_data(runs)
    params, images, error, compute = (column(own, name) for name in ("params", "images", "error", "compute"))
    if not np.all(params > 0) or not np.all(images > 0):
        raise UserError("the table has no parameters or no images seen")
    return joint.fit(params, images, error, compute=compute, deviation=noises(own, deviation), bootstrap=bootstrap)


def fit_repeated(
    runs: Sequence[Run], options: Options, deviation: float | None = None, bootstrap: int = 200
) -> RepeatedLaw:
    names = ("params", "images", "data_images", "error", "compute")
    params, images, unique, error, compute = (column(runs, name) for name in names)
    noise = noises(runs, deviation)
    return repeated.fit(
        params, images, unique, error, compute=compute, chance=options.chance, deviation=noise, bootstrap=bootstrap
    )


def residuals(found: Findings, runs: Sequence[Run]) -> list[Residual]:
    """Returns the sweep's runs beside every law: the frontier's beside that of compute, the others beside all."""
    sweep = [run for run in runs if run.group == SWEEP]
    rows: list[Residual] = []

    def add(name: str, own: Sequence[Run], fitted: Floats) -> None:
        rows.extend(
            Residual(name, run, float(value), run.error / float(value) - 1)
            for run, value in zip(own, fitted, strict=True)
        )

    if found.law is not None:
        own = [sweep[i] for i in found.law.index]
        add("compute", own, found.law.predict(column(own, "compute")))
    if found.joint is not None:
        own = on_most_data(sweep)
        add("size and images", own, found.joint.predict(column(own, "params"), column(own, "images")))
    if found.repeated is not None:
        three = (column(sweep, name) for name in ("params", "images", "data_images"))
        add("repeated data", sweep, found.repeated.predict(*three))
    return rows


def of_replicates(runs: Sequence[Run]) -> float | None:
    """Returns the standard deviation over the error, pooled over runs that differ in the seed alone; None without."""
    alike: dict[tuple, list[float]] = {}
    for run in runs:
        alike.setdefault((run.params, run.images, run.data_images, run.compute), []).append(run.error)
    groups = [
        np.array(errors) / np.mean(errors) for errors in alike.values() if len(errors) > 1 and np.mean(errors) > 0
    ]
    free = sum(len(group) - 1 for group in groups)
    if not free:
        return None
    return float(np.sqrt(sum(np.sum((group - 1) ** 2) for group in groups) / free)) or None


def noises(runs: Sequence[Run], deviation: float | None) -> Floats | None:
    """Returns the standard deviation of each run's error: its own where the table has one, else by `deviation`."""
    if runs and all(run.deviation is not None for run in runs):
        return np.array([run.deviation for run in runs])
    return None if deviation is None else deviation * column(runs, "error")


def on_most_data(runs: Sequence[Run]) -> list[Run]:
    most = max((run.data_images for run in runs), default=0)
    return [run for run in runs if run.data_images == most]


def column(runs: Sequence[Run], name: str) -> Floats:
    return np.array([getattr(run, name) for run in runs], np.float64)


def _rainbow(
    runs: Sequence[Run], options: Options, deviation: float | None
) -> tuple[tuple[float, Law | None, JointLaw | None], ...]:
    sizes = sorted({run.params for run in runs})
    if not 3 <= len(sizes) <= 40:
        return ()
    rows = []
    for size in sizes:
        others = [run for run in runs if run.params != size]
        law, two = (
            _or_none(lambda others=others: fit_compute(others, options, deviation, bootstrap=2)),
            _or_none(lambda others=others: fit_joint(others, deviation, bootstrap=2)),
        )
        rows.append((size, law, two))
    return tuple(rows)


def _held_out(
    runs: Sequence[Run], options: Options, deviation: float | None
) -> tuple[tuple[HeldOut, ...], CurveLaw | None]:
    """Returns the test of each law, and the broken law of compute if it predicts better than the saturating one."""
    order = sorted(runs, key=lambda run: run.compute)
    count = round(options.held_out * len(order))
    if not count or len(order) - count < power_law.LEAST_POINTS:
        return (), None
    cheap, dear = order[:-count], order[-count:]
    best = frontier.find(column(order, "compute"), column(order, "error"), options.frontier)
    judges = [order[i] for i in best if i >= len(order) - count]
    rows: list[HeldOut] = []

    def judge(name: str, own: Sequence[Run], fitted: int, predicted: Floats) -> float:
        measured = np.maximum(column(own, "error"), 1e-12)
        miss = float(np.sqrt(np.mean(np.log(np.maximum(predicted, 1e-12) / measured) ** 2)))
        rows.append(HeldOut(name, fitted, len(own), miss))
        return miss

    broken = None
    law = _or_none(lambda: fit_compute(cheap, options, deviation, bootstrap=2))
    if law is not None and judges:
        budgets = column(judges, "compute")
        plain = judge("compute", judges, len(law.compute), law.predict(budgets))
        bent = _or_none(lambda: curve.fit(law.compute, law.error, bootstrap=2))
        if bent is not None and bent.broken:
            miss = judge("compute, with a break", judges, len(law.compute), bent.predict(budgets))
            if miss < plain:
                points = [order[i] for i in best]
                broken = _or_none(lambda: curve.fit(column(points, "compute"), column(points, "error")))
    if (two := _or_none(lambda: fit_joint(cheap, deviation, bootstrap=2))) is not None:
        own = [run for run in dear if run.data_images == on_most_data(cheap)[0].data_images]
        if own:
            fitted = len(on_most_data(cheap))
            judge("size and images", own, fitted, two.predict(column(own, "params"), column(own, "images")))
    if len({run.data_images for run in cheap}) > 1:
        three = _or_none(lambda: fit_repeated(cheap, options, deviation, bootstrap=2))
        if three is not None:
            values = (column(dear, name) for name in ("params", "images", "data_images"))
            judge("repeated data", dear, len(cheap), three.predict(*values))
    return tuple(rows), broken


def _or_none(fitting: Callable):
    try:
        return fitting()
    except UserError:
        return None

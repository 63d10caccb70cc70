"""What a study says on the terminal: the laws, what the runs do not determine, and what to train, in 80 columns."""

import math
import textwrap
from collections.abc import Iterator, Sequence

from vit_scaling import laws
from vit_scaling.laws.repeated import RepeatedLaw
from vit_scaling.studies.findings import Findings, on_most_data
from vit_scaling.studies.table import SWEEP, Run, number, unit

WIDTH = 80
_ERRORS = {"c", "e"}  # coefficients that are errors


def text(found: Findings, runs: Sequence[Run], budgets: Sequence[float] = ()) -> str:
    """Returns the summary: of each law the exponents, the irreducible error and what the runs do not identify.

    Args:
        found: what `findings.find` makes of the runs.
        budgets: compute to answer for; if empty 1, 3 and 10 times the most expensive run.
    """
    sweep = [run for run in runs if run.group == SWEEP]
    if not sweep:
        return "no run of the sweep has finished yet"
    lines: list[str] = []
    if (one := found.law) is not None:
        lines += [f"error against compute, on the {len(one.compute)} frontier runs of {len(sweep)}:"]
        lines += _coefficients(one, {"b": "exponent", "c": "irreducible error"}, sweep)
    if (two := found.joint) is not None:
        named = {"alpha": "exponent of size", "beta": "exponent of images", "e": "irreducible error"}
        lines += [f"error against size and images, {len(on_most_data(sweep))} runs:", *_coefficients(two, named, sweep)]
    if (three := found.repeated) is not None:
        named = {"alpha": "exponent of size", "beta": "exponent of images", "delta": "exponent of data"}
        named["e"] = "irreducible error"
        lines += [f"error with repeated images, {len(sweep)} runs:", *_coefficients(three, named, sweep)]
    if found.problems:
        lines += ["laws that these runs do not determine:", *_wrapped(found.problems)]
    if advice := list(_advice(found, sweep, budgets)):
        lines += ["what to train:", *_wrapped(advice)]
    return "\n".join(lines)


def _coefficients(
    law: laws.Law | laws.JointLaw | RepeatedLaw, named: dict[str, str], sweep: Sequence[Run]
) -> list[str]:
    scale = unit(sweep)
    percent = "%" if scale.factor > 1 else ""

    def show(name: str, value: float) -> str:
        return scale.show(value) + percent if name in _ERRORS else f"{value:.3g}"

    rows = []
    for name, meaning in named.items():
        low, high = law.interval(name)
        value = show(name, getattr(law, name))
        rows.append(f"  {meaning:18s} {name:5s} {value:>8s}  {law.level:.0%}: {show(name, low)} to {show(name, high)}")
    return rows + _wrapped(law.warnings)


def _advice(found: Findings, sweep: Sequence[Run], budgets: Sequence[float]) -> Iterator[str]:
    scale, most = unit(sweep), max(run.compute for run in sweep)
    percent = "%" if scale.factor > 1 else ""
    for budget in budgets or [most, 3 * most, 10 * most]:
        what = f"{budget:.2e} of compute{' (beyond the runs)' if budget > most else ''}: "
        if found.joint is not None and min(found.joint.A, found.joint.B) > 0:
            best = found.joint.optimum(budget)
            low, high = (scale.show(end) for end in best.error_interval)
            what += f"{_short(best.params)} parameters on {_short(best.images)} images, error "
            yield f"{what}{scale.show(best.error)}{percent} ({low} to {high})"
        elif found.law is not None:
            low, high = (scale.show(float(end)) for end in found.law.band(budget))
            yield f"{what}error {scale.show(float(found.law.predict(budget)))}{percent} ({low} to {high})"


def _short(count: float) -> str:
    """Returns a predicted count with three digits: 12,300 or 1.23e+09."""
    if not math.isfinite(count) or count >= 1e8:
        return f"{count:.3g}"
    return number(float(f"{count:.3g}"))


def _wrapped(sentences: Sequence[str]) -> list[str]:
    return [
        line for each in sentences for line in textwrap.wrap(each, WIDTH, initial_indent="  ", subsequent_indent="    ")
    ]

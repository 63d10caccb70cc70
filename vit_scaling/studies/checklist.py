"""What was fitted how: the checklist that a reader of scaling laws asks for (after arXiv 2502.18969), filled in."""

from collections.abc import Sequence

from vit_scaling.laws import fitting, joint, power_law, repeated, robust
from vit_scaling.laws.budget import STEEPEST
from vit_scaling.studies.findings import Findings, on_most_data
from vit_scaling.studies.table import Run


def rows(found: Findings, sweep: Sequence[Run]) -> list[tuple[str, str]]:
    """Returns pairs of a question and its answer."""
    sizes, lengths = len({run.params for run in sweep}), len({run.images for run in sweep})
    amounts = len({run.data_images for run in sweep})
    answers = [
        ("runs", f"{len(sweep)}: {sizes} sizes, {lengths} lengths, {amounts} numbers of different images"),
        ("quantities held equal", "none by the fit: compute, size, images and errors are taken as the table has them"),
    ]
    if (law := found.law) is not None:
        left = f", {len(law.outliers)} runs far below the others' law set aside" if len(law.outliers) else ""
        answers.append(
            (
                "law of compute",
                f"c + a (C + d)^-b, 4 coefficients, {len(law.compute)} of {len(sweep)} runs (frontier: "
                f"{found.options.frontier}{left}); differences of errors",
            )
        )
    if (two := found.joint) is not None:
        answers.append(
            (
                "law of size and images",
                f"e + A N^-alpha + B T^-beta, 5 coefficients, {two.runs} runs on most different images "
                f"({len(sweep) - len(on_most_data(sweep))} runs on fewer left out); {_scaled(found)}",
            )
        )
    if (three := found.repeated) is not None:
        chance = f"{found.options.chance:g}, as given" if found.options.chance is not None else "fitted"
        answers.append(
            (
                "law of repeated data",
                f"e + (chance - e) h / (1 + h), 8 coefficients, {three.runs} runs; chance is {chance}; "
                f"{_scaled(found)}",
            )
        )
    level = next((each.level for each in (found.law, found.joint, found.repeated) if each is not None), 0.95)
    answers += [
        (
            "loss function",
            f"smooth Huber, knee at {robust.KNEE:g} robust standard deviations of the residuals",
        ),
        (
            "minimiser",
            "Levenberg and Marquardt within bounds (amplitudes and asymptotes not negative, exponents at most "
            f"{STEEPEST:g}), analytic derivatives, stopped at a relative change of 1e-12",
        ),
        (
            "starts",
            f"best {power_law.STARTS}, {joint.STARTS} and {repeated.STARTS} nodes of a grid of exponents, linear "
            "coefficients by non-negative least squares; no guess by the user",
        ),
        ("weights and seed noise", _noise(found, sweep)),
        (
            "intervals",
            f"{level:.0%}, by {fitting.REPLICATES} bootstrap replicates of the runs, widened where runs are few",
        ),
        ("held-out runs", f"the most expensive {found.options.held_out:.0%}; used for the test alone"),
        ("advice", "minimum of the fitted surface along equal compute, not vertices of parabolas"),
    ]
    return answers


def _scaled(found: Findings) -> str:
    return "residuals over the errors" if found.deviation is None else "residuals over their standard deviation"


def _noise(found: Findings, sweep: Sequence[Run]) -> str:
    if sweep and all(run.deviation is not None for run in sweep):
        return "each run's standard deviation, a column of the table"
    if found.deviation is not None:
        return f"{found.deviation:.2%} of the error, pooled over the replicates in the table"
    return "all runs weigh the same; the table has neither replicates nor standard deviations"

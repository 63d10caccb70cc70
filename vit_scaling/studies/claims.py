"""Claims of papers in miniature: variants of one experiment, several seeds, and a verdict on what a paper says of them.

`runner.py` runs the variants. A difference between two variants counts if the means over the seeds are further apart
than twice the deviation between seeds; a smaller one is called not seen.
"""

import copy
import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from vit_scaling import UserError, flops
from vit_scaling.config import Config, to_dict
from vit_scaling.names import render_table
from vit_scaling.studies import runner
from vit_scaling.studies.runner import Job

RELATIONS = ("above", "below", "equal to")
SEEN, NOT_SEEN, CONTRADICTED = "seen", "not seen at this scale", "contradicted"


@dataclasses.dataclass(frozen=True)
class Expectation:
    """What a paper says of one metric: that of one variant it is above, below or equal to another's, or to a number."""

    first: str
    relation: str
    second: str | float
    metric: str = "test/accuracy"

    @property
    def variants(self) -> list[str]:
        return [name for name in (self.first, self.second) if isinstance(name, str)]


@dataclasses.dataclass
class Claim:
    """One claim.

    Attributes:
        name: as it is given to the config.
        source: paper and section.
        says: what the paper says, in one sentence.
        variants: experiments by name.
        expects: the claim in terms of the variants.
        minutes: what it took on two cores, two runs at a time.
        metrics: what the table shows, by the names in `result.json`, or what `measure` adds.
        measure: from the folder of a finished run and its config to further metrics; see measures.py.
    """

    name: str
    source: str
    says: str
    variants: Mapping[str, Config]
    expects: tuple[Expectation, ...]
    minutes: float
    metrics: tuple[str, ...] = ("test/accuracy",)
    measure: Callable[[Path, Config], dict[str, float]] | None = None


@dataclasses.dataclass
class ClaimsConfig:
    """Claims to try, each variant with every seed."""

    claims: tuple[Claim, ...]
    seeds: tuple[int, ...] = (0, 1, 2)


def plan(study: ClaimsConfig) -> list[Job]:
    """Returns one job for each claim, variant and seed, in this order; equal ones once.

    Raises:
        UserError: a claim's expectation names a variant, relation or metric that it does not have, or there are fewer
            than two seeds.
    """
    if len(set(study.seeds)) < max(2, len(study.seeds)):
        raise UserError(f"seeds is {study.seeds}; give at least two different ones: their deviation is the yardstick")
    for claim in study.claims:
        for expected in claim.expects:
            if unknown := set(expected.variants) - set(claim.variants):
                raise UserError(f"the claim {claim.name} has no variant {sorted(unknown)[0]!r}")
            if expected.relation not in RELATIONS or expected.metric not in claim.metrics:
                raise UserError(f"the claim {claim.name} cannot check {expected}")
    jobs: dict[str, Job] = {}
    for (claim_name, _, _), (name, config) in _runs(study).items():
        if name not in jobs:
            examples, _ = runner.training_set(config)
            steps = config.duration.to_steps(config.data.batch_size, examples)
            jobs[name] = Job(name, claim_name, 0, config, steps, steps, examples)
    return list(jobs.values())


def _runs(study: ClaimsConfig) -> dict[tuple[str, str, int], tuple[str, Config]]:
    """Returns {(claim, variant, seed): (name, config)} of all runs. Equal ones share the name of the first."""
    names: dict[str, str] = {}
    runs = {}
    for claim in study.claims:
        for variant, config in claim.variants.items():
            for seed in study.seeds:
                own = dataclasses.replace(copy.deepcopy(config), seed=seed)
                name = f"{claim.name}/{variant.replace(' ', '_').replace(',', '')}/seed{seed}"
                name = names.setdefault(json.dumps(to_dict(own), sort_keys=True), name)
                runs[claim.name, variant, seed] = name, own
    return runs


def describe(study: ClaimsConfig, jobs: Sequence[Job]) -> str:
    """Returns a line for each claim: its runs but for those that it shares with an earlier one, and their minutes."""
    return "\n".join(
        f"{claim.name}: {sum(job.group == claim.name for job in jobs)} runs, about {claim.minutes:g} min on two cores; "
        f"{claim.source}"
        for claim in study.claims
    )


# ---- results ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One expectation, the difference of the means that was measured, and the deviation between seeds."""

    expected: Expectation
    difference: float
    deviation: float

    @property
    def verdict(self) -> str:
        visible = abs(self.difference) > 2 * self.deviation
        if self.expected.relation == "equal to":
            return CONTRADICTED if visible else SEEN
        if not visible:
            return NOT_SEEN
        return SEEN if (self.difference > 0) == (self.expected.relation == "above") else CONTRADICTED

    def sentence(self) -> str:
        expected, unit = self.expected, _unit(self.expected.metric)
        return (
            f"{expected.first} {expected.relation} {expected.second} in {expected.metric}: {self.verdict} "
            f"(difference {unit * self.difference:+.3g}, twice the deviation {2 * unit * self.deviation:.2g})"
        )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a claim's finished runs say: {variant: {metric: one value for each seed}} and the verdicts."""

    claim: Claim
    values: dict[str, dict[str, list[float]]]
    verdicts: list[Verdict]

    @property
    def verdict(self) -> str:
        """Returns the least favourable of the verdicts."""
        found = {verdict.verdict for verdict in self.verdicts}
        return next(word for word in (CONTRADICTED, NOT_SEEN, SEEN) if word in found)


def gather(study: ClaimsConfig, jobs: Sequence[Job], workdir: Path) -> list[Outcome]:
    """Returns the outcome of every claim of which all runs have finished.

    Raises:
        UserError: a run did not measure one of the claim's metrics.
    """
    finished = {job.name for job in jobs if runner.done(job, workdir)}
    runs, outcomes = _runs(study), []
    for claim in study.claims:
        names = {name: [runs[claim.name, name, seed][0] for seed in study.seeds] for name in claim.variants}
        if not finished.issuperset(name for of_variant in names.values() for name in of_variant):
            continue
        values: dict[str, dict[str, list[float]]] = {}
        for variant, of_variant in names.items():
            config = claim.variants[variant]
            measured = [_metrics(claim, config, runner.folder(workdir, name)) for name in of_variant]
            values[variant] = {metric: [run[metric] for run in measured] for metric in claim.metrics}
        outcomes.append(Outcome(claim, values, [judge(expected, values) for expected in claim.expects]))
    return outcomes


def judge(expected: Expectation, values: Mapping[str, Mapping[str, Sequence[float]]]) -> Verdict:
    """Compares two variants: the difference of their means, and the pooled deviation between their seeds."""
    samples = [values[name][expected.metric] for name in expected.variants]
    deviation = math.sqrt(statistics.mean(map(statistics.variance, samples)))
    second = statistics.mean(samples[1]) if isinstance(expected.second, str) else expected.second
    return Verdict(expected, statistics.mean(samples[0]) - second, deviation)


def _metrics(claim: Claim, config: Config, folder: Path) -> dict[str, float]:
    metrics = json.loads((folder / "result.json").read_text())["metrics"]
    if claim.measure is not None:
        kept = folder / f"measured_{claim.name}.json"  # claims may share a run
        if not kept.exists():
            print(f"measuring {folder} for {claim.name}", flush=True)
            kept.write_text(json.dumps(claim.measure(folder, config)))
        metrics |= json.loads(kept.read_text())
    if missing := [metric for metric in claim.metrics if metric not in metrics]:
        raise UserError(
            f"the claim {claim.name} needs {missing[0]}, but {folder} measured {', '.join(sorted(metrics))}"
        )
    return metrics


def _unit(metric: str) -> float:
    """Returns the factor of a metric's unit: accuracies are shown in percent."""
    return 100.0 if "accuracy" in metric or "shot" in metric else 1.0


# ---- report ----------------------------------------------------------------------------------------------------------


def write(outcomes: Sequence[Outcome], seeds: int, workdir: Path) -> Path:
    """Writes <workdir>/claims.md, claims.json and figures/<claim>.png; returns the first."""
    (workdir / "figures").mkdir(parents=True, exist_ok=True)
    rows = [[outcome.claim.name, outcome.claim.says, outcome.verdict] for outcome in outcomes]
    parts = ["# Claims in miniature\n", render_table(["claim", "the paper says", "here"], rows, markdown=True)]
    for outcome in outcomes:
        draw(outcome).savefig(workdir / "figures" / f"{outcome.claim.name}.png", dpi=110, bbox_inches="tight")
        parts.append(f"\n## {outcome.claim.name}: {outcome.verdict}\n")
        parts.append(f"{outcome.claim.source}: {outcome.claim.says}\n")
        parts.append(_table(outcome, seeds))
        parts.append("".join(f"\n* {verdict.sentence()}" for verdict in outcome.verdicts) + "\n")
        parts.append(f"![{outcome.claim.name}](figures/{outcome.claim.name}.png)")
    path = workdir / "claims.md"
    path.write_text("\n".join(parts) + "\n")
    record = {
        outcome.claim.name: {
            "verdict": outcome.verdict,
            "values": outcome.values,
            "verdicts": [dataclasses.asdict(verdict) | {"verdict": verdict.verdict} for verdict in outcome.verdicts],
        }
        for outcome in outcomes
    }
    (workdir / "claims.json").write_text(json.dumps(record, indent=1))
    return path


def _table(outcome: Outcome, seeds: int) -> str:
    metrics = outcome.claim.metrics
    rows = []
    for variant, config in outcome.claim.variants.items():
        classes = runner.num_classes(config)
        cost = flops.count(config.model, image_size=config.data.transform.size, num_classes=classes)
        shown = []
        for metric in metrics:
            of_seeds, unit = outcome.values[variant][metric], _unit(metric)
            mean, deviation = unit * statistics.mean(of_seeds), unit * statistics.stdev(of_seeds)
            shown.append(f"{mean:.2f} ± {deviation:.2f}" if unit > 1 else f"{mean:.3g} ± {deviation:.2g}")
        rows.append([variant, f"{cost.params:,}", f"{cost.train_flops / 1e6:.1f}", *shown])
    header = ["variant", "parameters", "training MFLOPs per image", *metrics]
    return render_table(header, rows, markdown=True) + f"\n\nMean and deviation over {seeds} seeds."


def draw(outcome: Outcome) -> Figure:
    """Returns a figure with a panel for each metric: every seed a dot, the mean a line."""
    metrics, variants = outcome.claim.metrics, list(outcome.claim.variants)
    figure = Figure(figsize=(1.5 + 3.2 * len(metrics), 1 + 0.32 * len(variants)), layout="constrained")
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for panel, metric in zip(panels, metrics, strict=True):
        for row, variant in enumerate(variants):
            values = [_unit(metric) * value for value in outcome.values[variant][metric]]
            panel.plot(values, [row] * len(values), "o", color="#1f6f8b", alpha=0.6, markersize=5)
            panel.plot([statistics.mean(values)], [row], "|", color="#253237", markersize=16, markeredgewidth=2)
        panel.set_xlabel(metric + (", %" if _unit(metric) > 1 else ""))
        panel.set_yticks(range(len(variants)), variants)
        panel.grid(axis="x", alpha=0.3)
        panel.margins(y=0.1)
    panels[0].invert_yaxis()
    figure.suptitle(f"{outcome.claim.name}: {outcome.verdict}", fontsize=11)
    return figure

"""A scaling study: which runs it has, how each is configured, and how their results are gathered.

Each size and each share of the data has one trunk run, whose schedule has no end. Every duration is a cooldown branched
from it (Scaling Vision Transformers, section 3.5).
"""

import copy
import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vit_scaling import UserError, flops
from vit_scaling import config as config_lib
from vit_scaling.config import Config
from vit_scaling.optim import schedule
from vit_scaling.optim.schedule import Duration
from vit_scaling.studies import runner
from vit_scaling.studies.runner import Job
from vit_scaling.studies.table import SEED, SWEEP, Run


@dataclasses.dataclass
class Dial:
    """One number, the depth, sets everything that grows with a ViT.

    Attributes:
        width_per_layer: width for each layer of depth.
        head_dim: width of one attention head.
        mlp_ratio: hidden units over width.
        reference: the depth that the study's own learning rate and batch size belong to.
        lr_power: the learning rate is proportional to this power of depth.
        batch_power: so is the batch size.
    """

    width_per_layer: int = 16
    head_dim: int = 16
    mlp_ratio: int = 4
    reference: int = 4
    lr_power: float = -0.5
    batch_power: float = 0.0


@dataclasses.dataclass
class Comparison:
    """Runs that differ from one of the sweep in some fields, planned from the start rather than branched.

    Attributes:
        name: of the comparison.
        size: the dial's setting.
        images: how many images are seen.
        overrides: pairs of a field, such as "optim.name", and its value.
    """

    name: str
    size: int
    images: int
    overrides: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass
class StudyConfig:
    """A scaling study.

    Attributes:
        base: every run's config, but for what the dial and the study set.
        sizes: the dial's settings.
        fractions: shares of the training data, in whole percent.
        images: durations, in images seen.
        dial: what a size means.
        cooldown: share of each duration that its cooldown takes.
        metric: accuracy of which the error is studied.
        fewshot: likewise, of few-shot classification; empty for none.
        comparisons: of Comparison, further runs on all data that the law does not see.
        chance: error of guessing, for the law of images seen repeatedly; fitted if None.
        budgets: training FLOPs that the report answers for; if empty 1, 3 and 10 times the most expensive run.
    """

    base: Config
    sizes: tuple[int, ...]
    fractions: tuple[float, ...]
    images: tuple[int, ...]
    dial: Dial = dataclasses.field(default_factory=Dial)
    cooldown: float = 0.2
    metric: str = "test/accuracy"
    fewshot: str = "fewshot/10shot"
    comparisons: tuple = ()
    chance: float | None = None
    budgets: tuple[float, ...] = ()


def plan(study: StudyConfig, workdir: Path) -> list[Job]:
    """Returns all runs, each after the one that it needs; small ones first.

    Raises:
        UserError: a field that cannot work; the sentence names it.
    """
    _check(study)
    jobs: list[Job] = []
    for size in sorted(study.sizes):
        for fraction in sorted(study.fractions):
            jobs += _trunk_and_branches(study, workdir, size, fraction)
    for comparison in study.comparisons:
        config, data_images = _config(study, comparison.size, 1.0)
        total, cooldown = _lengths(study, config.data.batch_size, comparison.images)
        config.schedule.cooldown = Duration(cooldown)
        for field, value in comparison.overrides:
            override(config, field, value)
        config = _ending(config, total)
        name = f"{comparison.name}_d{comparison.size}_i{comparison.images}"
        group = SEED if {field for field, _ in comparison.overrides} == {"seed"} else comparison.name
        jobs.append(Job(name, group, comparison.size, config, total, total, data_images))
    names = [job.name for job in jobs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two runs of the study are called {twice[0]}; give comparisons different names")
    return jobs


def _trunk_and_branches(study: StudyConfig, workdir: Path, size: int, fraction: float) -> list[Job]:
    config, data_images = _config(study, size, fraction)
    lengths = [_lengths(study, config.data.batch_size, images) for images in sorted(study.images)]
    unit = _common_unit([total for total, _ in lengths], study.cooldown)
    starts = [unit * round((total - cooldown) / unit) for total, cooldown in lengths]
    stem = f"d{size}_p{round(100 * fraction)}"

    trunk = copy.deepcopy(config)
    trunk.schedule.cooldown = Duration(0)
    # Branches start from its checkpoints. Its own accuracy, without a cooldown, is not measured.
    trunk.evaluation = config_lib.EvaluationConfig(every=Duration(starts[-1]))
    trunk.checkpoint = config_lib.CheckpointConfig(every=Duration(unit), keep=1, permanent=Duration(unit))
    trunk.duration = Duration(starts[-1])
    name = f"{stem}_trunk"
    jobs = [Job(name, "trunk", size, trunk, starts[-1], starts[-1], data_images)]
    for images, (total, _), start in zip(sorted(study.images), lengths, starts, strict=True):
        branch = copy.deepcopy(config)
        branch.schedule.cooldown = Duration(total - start)
        branch.schedule.cooldown_from = str(runner.folder(workdir, name) / "checkpoints" / str(start))
        branch = _ending(branch, total)
        jobs.append(Job(f"{stem}_i{images}", SWEEP, size, branch, total, total - start, data_images, needs=name))
    return jobs


def _config(study: StudyConfig, size: int, fraction: float) -> tuple[Config, int]:
    """Returns the config of one size and share of the data, and the number of its different images."""
    config = copy.deepcopy(study.base)
    dial, grown = study.dial, size / study.dial.reference
    width = dial.width_per_layer * size
    fields = {"depth": size, "width": width, "heads": max(1, width // dial.head_dim), "mlp": dial.mlp_ratio * width}
    for field, value in fields.items():
        override(config, f"model.{field}", value)
    config.optim.lr *= grown**dial.lr_power
    config.data.batch_size = round(config.data.batch_size * grown**dial.batch_power)
    if fraction < 1:
        config.data.train.split += f"[:{round(100 * fraction)}%]"
    return config, runner.training_set(config)[0]


def _lengths(study: StudyConfig, batch_size: int, images: int) -> tuple[int, int]:
    """Returns (steps in all, of which cooldown)."""
    total = Duration(images, "examples").to_steps(batch_size, 1)
    return total, max(1, round(study.cooldown * total))


def _common_unit(totals: list[int], cooldown: float) -> int:
    """Returns the period of the trunk's checkpoints, of which each branch starts at one near where its cooldown is due.

    The longest period that moves no start by more than 2% of its run: few checkpoints for durations that are multiples
    of the shortest, and twenty to its length at most.
    """
    first = (1 - cooldown) * totals[0]
    for parts in range(1, 20):
        unit = max(1, round(first / parts))
        due = [(1 - cooldown) * total for total in totals]
        moved = [abs(unit * round(start / unit) - start) for start in due]
        if all(move <= max(0.5, 0.02 * total) for move, total in zip(moved, totals, strict=True)):
            return unit
    return max(1, round(first / 20))


def _ending(config: Config, total: int) -> Config:
    """Returns the config of a run that is measured at its end only, and saved twice on the way there."""
    config.duration = Duration(total)
    config.evaluation.every = Duration(total)
    config.checkpoint = config_lib.CheckpointConfig(every=Duration(max(1, total // 3)), keep=1)
    return config


def override(config: Any, field: str, value: Any) -> None:
    """Sets a field of a config, such as "optim.lr".

    Raises:
        UserError: there is none.
    """
    *parents, name = field.split(".")
    node = config
    for part in parents:
        node = getattr(node, part, None)
    if not hasattr(node, name):
        raise UserError(f"a study's config has no field {field!r}")
    setattr(node, name, value)


def value_of(config: Any, field: str) -> Any:
    """Returns a field of a config, such as "optim.lr"."""
    return functools.reduce(getattr, field.split("."), config)


def _check(study: StudyConfig) -> None:
    for name in ("sizes", "fractions", "images"):
        values = getattr(study, name)
        if not values or min(values) <= 0 or len(set(values)) < len(values):
            raise UserError(f"{name} is {values}; give at least one positive number, each once")
    for fraction in study.fractions:
        if fraction > 1 or abs(100 * fraction - round(100 * fraction)) > 1e-9:
            raise UserError(f"fractions has {fraction}; a share of the data is a whole number of percent, at most 1")
    if len(study.fractions) > 1 and "[" in study.base.data.train.split:
        raise UserError(
            f"base.data.train.split is {study.base.data.train.split!r}; the study cuts it: name a whole one"
        )
    if not 0 < study.cooldown < 1:
        raise UserError(f"cooldown is {study.cooldown}; it is a share of a run, between 0 and 1")
    if schedule.needs_total(study.base.schedule):
        raise UserError(f"base.schedule.kind is {study.base.schedule.kind!r}; cooldowns branch from rsqrt or constant")


def gather(study: StudyConfig, jobs: Sequence[Job], workdir: Path) -> list[Run]:
    """Returns the table of all finished runs but trunks.

    Raises:
        UserError: a run did not measure the study's metric.
    """
    table = []
    for job in jobs:
        if job.group == "trunk" or not runner.done(job, workdir):
            continue
        result = json.loads((runner.folder(workdir, job.name) / "result.json").read_text())
        if study.metric not in result["metrics"]:
            raise UserError(f"metric is {study.metric!r}, but runs measured {', '.join(sorted(result['metrics']))}")
        fewshot = result["metrics"].get(study.fewshot)
        batch_size = job.config.data.batch_size
        cost = flops.count(
            job.config.model, image_size=job.config.data.transform.size, num_classes=runner.num_classes(job.config)
        )
        table.append(
            Run(
                name=job.name,
                group=job.group,
                size=job.size,
                params=cost.params,
                data_images=job.data_images,
                images=job.steps * batch_size,
                compute=cost.train_flops * job.steps * batch_size,
                error=1.0 - result["metrics"][study.metric],
                fewshot_error=None if fewshot is None else 1.0 - fewshot,
                seconds=sum(result["seconds"].values()),
            )
        )
    return table

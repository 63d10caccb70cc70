"""The typed schema of every experiment.

A file in configs/ has `get_config(arg)`, which returns a `Config`; flags such as --config.optim.lr=3e-4 override its
fields. The parts for model, data, loss, optimizer, schedule and mesh are defined beside what they configure, the rest
here.
"""

import dataclasses
import functools
import json
import typing
from pathlib import Path
from typing import Any

from vit_scaling import UserError
from vit_scaling.data.config import DataConfig
from vit_scaling.data.images.transforms import TransformConfig
from vit_scaling.data.sources import SourceConfig
from vit_scaling.interop import native
from vit_scaling.models import ModelConfig
from vit_scaling.optim import losses, schedule
from vit_scaling.optim.losses import LossConfig
from vit_scaling.optim.optimizer import OptimConfig
from vit_scaling.optim.schedule import Duration, ScheduleConfig
from vit_scaling.parallel.mesh import MeshConfig


@dataclasses.dataclass
class FewShotConfig:
    """Ridge regression on frozen features of a few examples of each class (Scaling ViT, appendix D)."""

    train: SourceConfig  # the shots are drawn from it
    test: SourceConfig
    transform: TransformConfig
    shots: tuple[int, ...] = (1, 5, 10, 25)
    seeds: int = 3
    l2: float = 1024.0


@dataclasses.dataclass
class EvaluationConfig:
    """What is measured at step 0, every `every`, and at the end; the test set at the end only."""

    every: Duration
    validation: SourceConfig | None = None
    test: SourceConfig | None = None
    fewshot: FewShotConfig | None = None
    batch_size: int | None = None  # data.batch_size where None


@dataclasses.dataclass
class CheckpointConfig:
    """When the state is saved: every `every` (the last `keep` stay) and for good every `permanent`, where not 0."""

    every: Duration
    keep: int = 2
    permanent: Duration = dataclasses.field(default_factory=Duration)
    best: str | None = None  # a metric, such as validation/accuracy: its best evaluation is kept too, in workdir/best


@dataclasses.dataclass
class InitConfig:
    """Weights that a run starts from instead of random ones.

    Attributes:
        path: a weight file or folder (see vit_scaling.interop), or a checkpoint or workdir of a run; None for none.
        ema: of a checkpoint, take the average of the parameters.
        keep_head: keep the classifier, which must have as many classes; it starts from zero otherwise.
        class_map: for each class the one of the weights' classifier that it was.
        ignore: regular expressions of tensors that may be left over.
    """

    path: str | None = None
    ema: bool = False
    keep_head: bool = False
    class_map: tuple[int, ...] = ()
    ignore: tuple[str, ...] = ()


@dataclasses.dataclass
class LogConfig:
    """When metrics are written, and when a run gives up or is profiled."""

    every: Duration = dataclasses.field(default_factory=lambda: Duration(50))
    stop_after_skipped: int = 10  # updates in a row whose loss or gradient is not finite
    profile_from: int | None = None  # first step of a profile written to workdir/profile
    profile_steps: int = 5
    peak_flops: float | None = None  # FLOP/s of one device, for MFU; None: from the table of known chips
    writers: tuple[str, ...] = ("jsonl", "tensorboard")  # also "wandb" and "trackio", which are extras
    project: str = "vit_scaling"  # under which wandb and trackio file a run
    watchdog: float = 1200.0  # seconds without a step, or a batch of an evaluation, that end the process; 0: never


@dataclasses.dataclass
class GuardConfig:
    """Which updates are left out beside those that are not finite: steps whose loss spikes.

    Attributes:
        spike_deviation: leave an update out if its loss is this many standard deviations above the mean of the last
            `spike_window` losses; None: never.
        spike_window: how many losses.
    """

    spike_deviation: float | None = None
    spike_window: int = 128


@dataclasses.dataclass
class Config:
    """One experiment. Durations are in steps, epochs or examples until `resolve`."""

    model: ModelConfig
    data: DataConfig
    duration: Duration
    optim: OptimConfig
    schedule: ScheduleConfig
    evaluation: EvaluationConfig
    checkpoint: CheckpointConfig
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    export: tuple[str, ...] = ()  # layouts of `weights export`, written to workdir/export at the end
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What stands behind the colon of --config=file.py:variant,smoke."""

    variant: str
    smoke: bool


def arguments(arg: str | None, *, variants: tuple[str, ...] | None, default: str = "") -> Arguments:
    """Reads `variant,smoke`, both optional.

    Args:
        arg: the text behind the colon; empty or None for none.
        variants: the variants there are; () for a config that has none, None where the config checks them itself.
        default: the variant if none is given.

    Raises:
        UserError: there is no such variant.
    """
    words = [word for word in (arg or "").split(",") if word]
    smoke = "smoke" in words
    words = [word for word in words if word != "smoke"] or ([default] if default else [])
    if len(words) > 1 or (variants is not None and any(word not in variants for word in words)):
        choices = f"choose one of {', '.join(variants)}" if variants else "it takes a variant"
        choices = choices if variants is None or variants else "it takes none"
        raise UserError(f"the config has no variant {','.join(words)!r}; {choices}, and smoke for a run of seconds")
    return Arguments(variant=words[0] if words else "", smoke=smoke)


def image_size(name: str, text: str) -> tuple[int, int]:
    """Returns (height, width) of "384" or "512x384".

    Raises:
        UserError: it is no size; the sentence begins with `name`.
    """
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdigit() and int(side) for side in sides):
        raise UserError(f"{name} is {text!r}; write 384, or 512x384 for height and width")
    return int(sides[0]), int(sides[-1])


def smoke(config: Config, model: ModelConfig) -> Config:
    """Returns the experiment shrunk to a run of seconds: its own recipe, a small model, the built-in digits.

    Args:
        config: the whole experiment.
        model: its model at a size for images of 28 x 28 pixels.
    """
    digits = functools.partial(SourceConfig, "builtin", "mnist")

    def small(transform: TransformConfig) -> TransformConfig:
        return dataclasses.replace(transform, size=(28, 28), resize_to=28)

    evaluation = EvaluationConfig(every=Duration(2), validation=digits("validation"), test=digits("test"))
    if config.evaluation.fewshot is not None:
        evaluation.fewshot = dataclasses.replace(
            config.evaluation.fewshot,
            train=digits("train"),
            test=digits("validation"),
            transform=small(config.evaluation.fewshot.transform),
            shots=(1, 5),
            seeds=2,
        )
    data = dataclasses.replace(
        config.data,
        train=digits("train"),
        transform=small(config.data.transform),
        eval_transform=small(config.data.eval_transform),
        batch_size=32,
        workers=0,
    )
    return dataclasses.replace(
        config,
        model=model,
        data=data,
        duration=Duration(4),
        optim=dataclasses.replace(config.optim, accumulate=1),
        schedule=dataclasses.replace(config.schedule, warmup=Duration(1), cooldown=Duration(1), timescale=Duration(2)),
        evaluation=evaluation,
        checkpoint=CheckpointConfig(every=Duration(2)),
        log=dataclasses.replace(config.log, every=Duration(1)),
    )


# The range of each numeric field as an interval, by the last parts of its name; of a tuple, of each part.
RANGES = {
    **dict.fromkeys(("amount", "profile_from"), "[0, 1e15]"),
    "seed": f"[0, {2**32})",
    **dict.fromkeys(("model.depth", "model.depths", "threads", "rope_jitter", "rope_rescale"), "[1, 4096]"),
    **dict.fromkeys(
        ("model.width", "model.mlp", "model.heads", "model.groups", "stem_heads", "stem_mixtures"), f"[1, {2**17}]"
    ),
    **dict.fromkeys(("patch", "patches", "window", "mlp_ratio", "kernel_size", "extra_norm_every"), "[1, 16384]"),
    **dict.fromkeys(("registers", "pool_above", "pretrained_windows", "nonlocal_after"), "[0, 16384]"),
    **dict.fromkeys(("pruned_heads", "class_map"), "[0, 1e9]"),
    "version": "[1, 2]",
    **dict.fromkeys(("drop_path", "patch_dropout", "dropout", "bn_decay", "bn_eps", "norm_eps"), "[0, 1)"),
    **dict.fromkeys(("key_fraction", "value_fraction"), "(0, 16]"),
    **dict.fromkeys(("layerscale", "layerscale_mlp", "head_bias", "mean"), "[-1e30, 1e30]"),
    "std": "(0, 1e30]",
    **dict.fromkeys(("size", "resize_to"), "[1, 16384]"),
    **dict.fromkeys(("area", "erase_area", "layer_decay"), "(0, 1]"),
    **dict.fromkeys(("aspect", "erase_aspect"), "(0, 1000]"),
    **dict.fromkeys(("flip", "erase", "switch", "probability", "start", "final"), "[0, 1]"),
    **dict.fromkeys(("scale", "label_smoothing", "beta1", "beta2", "ema"), "[0, 1)"),
    **dict.fromkeys(("pad", "rotate", "shear", "shift", "jitter", "rope_shift", "mixup", "cutmix"), "[0, 16384]"),
    **dict.fromkeys(("randaugment_layers", "randaugment_magnitude"), "[0, 1000]"),
    "randaugment_std": "[0, inf]",  # timm draws uniformly at infinity
    **dict.fromkeys(("weights", "l2", "lr", "weight_decay", "head_weight_decay"), "[0, 1e30]"),
    **dict.fromkeys(("clip", "peak_flops", "spike_deviation", "temperature"), "(0, 1e30]"),
    **dict.fromkeys(("batch_size", "repeats", "prefetch", "seeds", "shots", "accumulate", "keep"), "[1, 1e9]"),
    **dict.fromkeys(("stop_after_skipped", "profile_steps", "spike_window", "base_width"), "[1, 1e9]"),
    "workers": "[0, 4096]",
    "timeout": "(0, 1e8]",
    "watchdog": "[0, 1e8]",
    **dict.fromkeys(("replica", "mesh.data", "mesh.model"), "[-1, 1e9]"),
}


def range_of(name: str) -> str | None:
    """Returns the range of a numeric field, None if it has none. `name` is its path, such as optim.lr."""
    return next(
        (RANGES[key] for key in (name, ".".join(name.split(".")[-2:]), name.split(".")[-1]) if key in RANGES), None
    )


def check_ranges(node: Any, prefix: str = "") -> None:
    """Raises UserError for a number that is not within its field's range, which NaN never is."""
    for field in dataclasses.fields(node):
        name, value = f"{prefix}{field.name}", getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{name}.")
        numbers = [part for part in (value if isinstance(value, tuple) else (value,)) if type(part) in (int, float)]
        if not numbers or (interval := range_of(name)) is None:
            continue
        low, high = map(float, interval[1:-1].split(","))
        for number in numbers:
            above = number > low if interval[0] == "(" else number >= low
            below = number < high if interval[-1] == ")" else number <= high
            if not (above and below):
                least = f"{'above' if interval[0] == '(' else 'at least'} {low:.12g}"
                most = f"{'below' if interval[-1] == ')' else 'at most'} {high:.12g}"
                raise UserError(f"{name} is {value}; it must be {least} and {most}")


def check(config: Config) -> None:
    """Raises UserError, in one sentence, for what can be seen to be wrong before any file or device is touched."""
    check_ranges(config)
    losses.check(config.loss)
    for name in ("mean", "std"):
        if len(value := getattr(config.model, name)) != 3:
            raise UserError(f"model.{name} is {value}; give three numbers")
    if config.evaluation.fewshot is not None and not config.evaluation.fewshot.shots:
        raise UserError("evaluation.fewshot.shots is empty; name at least one number of shots")


def resolve(config: Config, examples_per_epoch: int) -> Config:
    """Returns the config with every duration in whole steps; the duration of a branch (schedule.cooldown_from) is what
    its trunk's step and its cooldown make it.

    Raises:
        UserError: a field that `check` refuses, a batch larger than the training set, or a duration that cannot be
            counted in steps; the sentence names the field.
    """
    check(config)
    if config.data.batch_size > examples_per_epoch:
        raise UserError(
            f"data.batch_size {config.data.batch_size} is larger than the training set of {examples_per_epoch} examples"
        )

    def steps(name: str, duration: Duration, least: int) -> Duration:
        try:
            count = duration.to_steps(config.data.batch_size, examples_per_epoch)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from None
        if count < least:
            raise UserError(f"{name} is {duration.amount:g} {duration.unit}; it must be at least {least} step")
        return Duration(count, "steps")

    settled = schedule.in_steps(config.schedule, config.data.batch_size, examples_per_epoch)
    return dataclasses.replace(
        config,
        duration=_branch_end(settled) if settled.cooldown_from else steps("duration", config.duration, 1),
        schedule=settled,
        evaluation=dataclasses.replace(config.evaluation, every=steps("evaluation.every", config.evaluation.every, 1)),
        checkpoint=dataclasses.replace(
            config.checkpoint,
            every=steps("checkpoint.every", config.checkpoint.every, 1),
            permanent=steps("checkpoint.permanent", config.checkpoint.permanent, 0),
        ),
        log=dataclasses.replace(config.log, every=steps("log.every", config.log.every, 1)),
    )


def _branch_end(branch: ScheduleConfig) -> Duration:
    """Returns when a branch ends: with the cooldown that starts at its trunk's checkpoint."""
    origin = str(branch.cooldown_from)
    if not branch.cooldown.amount:
        raise UserError("schedule.cooldown_from needs schedule.cooldown, the length of the branch; it is 0")
    if not Path(origin).name.isdigit():
        raise UserError(
            f"schedule.cooldown_from is {origin!r}; name a checkpoint of a run, <workdir>/checkpoints/<step>"
        )
    return Duration(int(Path(origin).name) + int(branch.cooldown.amount))


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the config as JSON reads it back: nested dicts, lists and plain values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(record: dict[str, Any]) -> Config:
    """Returns the config that a run's config.json holds: the inverse of `to_dict`."""

    def typed(hint: Any, value: Any) -> Any:
        kinds: list[Any] = [kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind)]
        if isinstance(value, dict) and len(kinds) == 1:
            hints = typing.get_type_hints(kinds[0])
            return kinds[0](**{name: typed(hints[name], part) for name, part in value.items()})
        if isinstance(value, list):
            return tuple(SourceConfig(**part) if isinstance(part, dict) else typed(None, part) for part in value)
        return value

    hints = typing.get_type_hints(Config)
    fields = {name: typed(hints[name], value) for name, value in record.items() if name != "model"}
    return Config(model=native.model_config(record["model"]), **fields)

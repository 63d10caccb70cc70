"""Learning rate over a run, relative to its peak (Scaling Vision Transformers, section 3.5).

A schedule is the product of a linear warmup, a main phase and a linear cooldown to zero. The reciprocal square root
and the constant one know nothing of the run's length before their cooldown begins: a cooldown of any length can be
branched from a checkpoint of one long trunk run. A branch of `c` steps from the trunk's step `s` is the same schedule
with `total_steps = s + c` and a cooldown of `c`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vit_scaling import UserError

KINDS = ("rsqrt", "constant", "linear", "cosine")
UNITS = ("steps", "epochs", "examples")


@dataclasses.dataclass
class Duration:
    """A length of training.

    Attributes:
        amount: how many.
        unit: of what: "steps" (of one batch), "epochs" (of the training split) or "examples".
    """

    amount: float = 0.0
    unit: str = "steps"

    def to_steps(self, batch_size: int, examples_per_epoch: int) -> int:
        """Returns the duration in steps of `batch_size` examples, rounded to the nearest whole step.

        Raises:
            UserError: an unknown unit, a negative or non-finite amount, or a positive one that rounds to no step.
        """
        if self.unit not in UNITS:
            raise UserError(f"unit is {self.unit!r}; a duration is given in one of {', '.join(UNITS)}")
        if not (math.isfinite(self.amount) and self.amount >= 0):
            raise UserError(f"amount is {self.amount}; a duration is a finite number that is not negative")
        examples = {"steps": batch_size, "epochs": examples_per_epoch, "examples": 1}[self.unit]
        steps = round(self.amount * examples / batch_size)
        if self.amount > 0 and steps == 0:
            raise UserError(
                f"a duration of {self.amount:g} {self.unit} is no whole step of batch size {batch_size}; "
                "make it longer, or exactly 0"
            )
        return steps


@dataclasses.dataclass
class ScheduleConfig:
    """The learning rate relative to `optim.lr`.

    Attributes:
        kind: main phase: "rsqrt", 1 / sqrt(1 + (step - warmup) / timescale); "constant"; "linear" or "cosine",
            from one to `final` between the end of the warmup and the end of the run.
        warmup: linear rise to one.
        cooldown: linear factor down to zero that ends with the run, multiplied with the main phase.
        timescale: of "rsqrt" only.
        cooldown_from: a checkpoint of a trunk run, <workdir>/checkpoints/<step>, at which this run begins with its
            cooldown and nothing else; None for a run of its own.
        start: the warmup's first value.
        final: the last value of "linear" and "cosine".
    """

    kind: str = "rsqrt"
    warmup: Duration = dataclasses.field(default_factory=lambda: Duration(10_000.0))
    cooldown: Duration = dataclasses.field(default_factory=lambda: Duration(50_000.0))
    timescale: Duration = dataclasses.field(default_factory=lambda: Duration(10_000.0))
    cooldown_from: str | None = None
    start: float = 0.0
    final: float = 0.0


def needs_total(config: ScheduleConfig) -> bool:
    """Whether the main phase depends on the run's length, so that no cooldown can be branched from it."""
    return config.kind in ("linear", "cosine")


def in_steps(config: ScheduleConfig, batch_size: int, examples_per_epoch: int) -> ScheduleConfig:
    """Returns `config` with every duration in steps.

    Raises:
        UserError: a duration that `Duration.to_steps` refuses; the message names its field.
    """
    steps: dict[str, Any] = {}
    for name in ("warmup", "cooldown", "timescale"):
        try:
            steps[name] = Duration(float(getattr(config, name).to_steps(batch_size, examples_per_epoch)))
        except ValueError as error:
            raise UserError(f"schedule.{name}: {error}") from None
    return dataclasses.replace(config, **steps)


def create(config: ScheduleConfig, total_steps: int) -> Callable[[Int[Array, ""] | int], Float[Array, ""]]:
    """Returns the function from a step to the learning rate's multiplier, in float32.

    The multiplier is exactly `start` at step 0, one at the end of the warmup and, with a cooldown, zero at
    `total_steps` and after it. The step may be traced.

    Raises:
        UserError: an unknown kind, a duration not in steps, or durations that do not fit in `total_steps`.
    """
    warmup, cooldown, timescale = _checked(config, total_steps)

    def main(after_warmup: Array) -> Array:
        if config.kind == "constant":
            return jnp.ones((), jnp.float32)
        if config.kind == "rsqrt":
            return (1.0 + after_warmup / timescale) ** -0.5
        progress = jnp.minimum(1.0, after_warmup / max(1, total_steps - warmup))
        left = 1.0 - progress if config.kind == "linear" else 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return config.final + (1.0 - config.final) * left

    def multiplier(step: Int[Array, ""] | int) -> Float[Array, ""]:
        # Differences of steps are taken in integers: float32 is exact only up to 2^24.
        step = jnp.asarray(step, jnp.int32)
        value = main(jnp.maximum(0, step - warmup).astype(jnp.float32))
        if warmup:
            risen = jnp.minimum(1.0, step.astype(jnp.float32) / warmup)
            value *= config.start + (1.0 - config.start) * risen
        if cooldown:
            value *= jnp.clip((total_steps - step).astype(jnp.float32) / cooldown, 0.0, 1.0)
        return value

    return multiplier


def _checked(config: ScheduleConfig, total_steps: int) -> tuple[int, int, int]:
    if config.kind not in KINDS:
        raise UserError(f"schedule.kind is {config.kind!r}; choose one of {', '.join(KINDS)}")
    for name in ("warmup", "cooldown", "timescale"):
        duration = getattr(config, name)
        if duration.unit != "steps" or duration.amount != int(duration.amount) or duration.amount < 0:
            raise UserError(
                f"schedule.{name} is {duration.amount:g} {duration.unit}; convert durations to whole steps first"
            )
    warmup, cooldown, timescale = (int(d.amount) for d in (config.warmup, config.cooldown, config.timescale))
    if config.kind == "rsqrt" and timescale == 0:
        raise UserError("schedule.timescale is 0; the rsqrt schedule needs at least 1 step")
    if warmup + cooldown > total_steps:
        raise UserError(
            f"a warmup of {warmup} and a cooldown of {cooldown} steps do not fit in a run of {total_steps} steps; "
            "shorten schedule.warmup or schedule.cooldown, or train longer"
        )
    for name in ("start", "final"):
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"schedule.{name} is {getattr(config, name)}; it is a fraction of the peak, from 0 to 1")
    return warmup, cooldown, timescale

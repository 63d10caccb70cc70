"""What a run writes about its steps: losses, rates, utilization, and where updates were skipped."""

from collections.abc import Mapping
from pathlib import Path

import jax

from vit_scaling import UserError, flops, paths
from vit_scaling.config import Config
from vit_scaling.parallel import chips
from vit_scaling.training import telemetry
from vit_scaling.training import workdir as workdirs


class StepLog:
    """Reads the metrics of each step once the next one is on its way, and writes every `log.every`-th."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        num_classes: int,
        writer: telemetry.Writers,
        progress: telemetry.Progress,
        clock: telemetry.Clock,
        start_step: int,
    ):
        self._config, self._workdir = config, workdir
        self._writer, self._progress, self._clock = writer, progress, clock
        cost = flops.count(config.model, image_size=config.data.transform.size, num_classes=num_classes)
        self._flops_per_step = cost.train_flops * config.data.batch_size / jax.device_count()
        self._peak = chips.peak_flops(jax.devices()[0], config.log.peak_flops)
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None
        self._logged_step = start_step
        self._logged_seconds = dict(clock.seconds)

    def dispatched(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of a step that has just been dispatched and reads those of the one before it."""
        self._read()
        self._pending = step, metrics

    def drain(self) -> None:
        """Reads what is still pending, before other work."""
        self._read()
        self._clock.book_rest("step")

    def _read(self) -> None:
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._progress.advance()
        in_row = int(values.pop("skipped_in_row"))
        if in_row and in_row & (in_row - 1) == 0:  # the 1st, 2nd, 4th, 8th, ...: a warning with a count, not a flood
            self._progress.say(
                f"step {step}: the update is left out, something in it is not finite or its loss spiked "
                f"({in_row} in a row)"
            )
        if in_row >= self._config.log.stop_after_skipped:
            raise UserError(
                f"the update was not finite for {in_row} steps in a row (or its loss spiked), up to step {step}; lower "
                f"optim.lr or optim.beta2, or look at the data; the checkpoints before it are intact"
            )
        if step % int(self._config.log.every.amount) and step != int(self._config.duration.amount):
            return
        self._clock.book_rest("step")
        count, waited, stepped = step - self._logged_step, self._since_row("data"), self._since_row("step")
        seconds = max(waited + stepped, 1e-9) / count
        flops_per_second = self._flops_per_step / seconds
        values |= {
            "step_seconds": seconds,
            "images_per_second_per_device": self._config.data.batch_size / seconds / jax.device_count(),
            "data_wait_share": waited / max(waited + stepped, 1e-9),
            "useful_share": self._clock.useful_share,
            "flops_per_second_per_device": flops_per_second,
            "examples": step * self._config.data.batch_size,
        }
        if self._peak is not None:
            values["mfu"] = flops_per_second / self._peak
        self._logged_step, self._logged_seconds = step, dict(self._clock.seconds)
        self._writer.write_scalars(step, values)
        if not paths.in_bucket(self._workdir):  # a write there takes longer than a step; the loop notes it at a save
            workdirs.note_clock(self._workdir, step, self._clock)
        rate = self._config.data.batch_size / seconds
        self._progress.show(step, {"loss": values["loss"], "images/s": rate, "lr": values["learning_rate"]})

    def _since_row(self, name: str) -> float:
        """Returns the seconds booked on `name` since the last row."""
        return self._clock.seconds.get(name, 0.0) - self._logged_seconds.get(name, 0.0)

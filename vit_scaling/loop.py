"""The training loop: restore or begin, step, log, evaluate, save, stop.

Read `train` from top to bottom: its order is the order of a run.
"""

import contextlib
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import jax

from vit_scaling import checkpoint, pretrained, telemetry, workdirs
from vit_scaling.config import Config, resolve
from vit_scaling.data import loader
from vit_scaling.data.sources import Source, open_source
from vit_scaling.data.transforms import transform
from vit_scaling.evaluators.suite import Suite
from vit_scaling.parallel import mesh as mesh_lib
from vit_scaling.parallel import sharding
from vit_scaling.scaling import flops
from vit_scaling.step import TrainState, batch_shape, build


def train(config: Config, workdir: Path) -> dict[str, Any]:
    """Runs an experiment to its end, or on from where it stopped, and returns what workdir/result.json says.

    Everything is a function of the config and of the step, so a run that was killed and started again ends with the
    numbers of one that was not. SIGTERM or Ctrl-C saves and returns {"interrupted": step}.

    Args:
        config: the experiment, durations in any unit.
        workdir: where checkpoints/, metrics.jsonl, tensorboard/, config.json, result.json and figure.png go.

    Raises:
        ValueError: the config cannot work, or the workdir belongs to another one; nothing was written.
        FloatingPointError: loss or gradient stayed non-finite for log.stop_after_skipped steps in a row.
    """
    started = time.perf_counter()

    # ---- What is asked for: nothing is written until all of it is known to work.
    source = open_source(config.data.train)
    config = resolve(config, len(source))
    trunk = workdirs.trunk(config)
    if trunk is not None:
        config = workdirs.branch(config, trunk)
    total_steps = int(config.duration.amount)
    evaluate_every = int(config.evaluation.every.amount)
    save_every, keep_every = int(config.checkpoint.every.amount), int(config.checkpoint.permanent.amount)
    mesh = mesh_lib.create(config.mesh)
    program = build(config, num_classes=source.num_classes, total_steps=total_steps, mesh=mesh)
    suite = Suite(config, program)
    augment = transform(config.data.transform, train=True)
    weights = pretrained.start_of(config, source.num_classes, workdir)

    # ---- The workdir is this experiment's, or becomes it.
    workdirs.claim(workdir, config)
    own = checkpoint.steps(workdir / "checkpoints")
    if own and own[-1] >= total_steps:
        print(f"{workdir} holds this run, finished; delete it or name another --workdir to run it again")
        return workdirs.read_result(workdir)
    print(workdirs.describe(config, program, source))

    # ---- The state: the newest checkpoint, the trunk's, or a new one; each leaf on the mesh it will be used on.
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep, permanent=keep_every)
    begin = workdir / "checkpoints" / str(own[-1]) if own else trunk
    state, record = (
        (pretrained.begin(program, weights), {}) if begin is None else checkpoint.restore(begin, program.state_shape)
    )
    best = checkpoint.Best(workdir, config.checkpoint.best)
    start_step = int(jax.device_get(state.step))
    clock = telemetry.Clock(record["seconds"] if own else {})
    writer = telemetry.create_writer(workdir, start_step if own else None)
    progress = telemetry.Progress(start_step, total_steps)
    if begin is not None:
        progress.say(f"continuing from {begin}")

    # ---- The step, compiled once, from shapes; the loader, at this step.
    with clock.book("compile"):
        shapes = batch_shape(config, source.num_classes, source.multi_label, mesh)
        train_step = program.train_step.lower(program.state_shape, shapes).compile()
    batches = loader.train_batches(
        source,
        augment,
        batch_size=config.data.batch_size,
        seed=config.seed,
        start_step=start_step,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        repeats=config.data.repeats,
        on_corrupt=config.data.on_corrupt,
        workers=config.data.workers,
        threads=config.data.threads,
        prefetch=config.data.prefetch,
        timeout=config.data.timeout,
    )
    on_devices = loader.to_device(batches, sharding.batch_sharding(mesh), ahead=1)

    def evaluate(step: int, state: TrainState) -> dict[str, float]:
        with clock.book("evaluation"):
            values = suite.measure(state, final=step == total_steps)
        writer.write_scalars(step, values)
        progress.show(step, {name: value for name, value in values.items() if not name.endswith(("loss", "std"))})
        return values

    # ---- Steps. Do not reorder: step n + 1 is dispatched before the metrics of step n are read, and rows and result
    # are written before the checkpoint that makes them part of the run's past.
    with (
        contextlib.closing(checkpoints),
        contextlib.closing(writer),
        contextlib.closing(progress),
        contextlib.closing(batches),
        StopRequest() as stop,
        jax.transfer_guard("disallow"),
    ):
        if start_step == 0:
            evaluate(0, state)
        clock.book_rest("start", since=started)
        log = StepLog(config, source, writer, progress, clock, start_step)
        for step in range(start_step + 1, total_steps + 1):
            _profile(config, workdir, step)
            with clock.book("data"):
                batch = next(on_devices)
            state, metrics = train_step(state, batch)
            log.dispatched(step, metrics)

            end = step == total_steps
            at_evaluation = end or step % evaluate_every == 0
            at_save = end or step % save_every == 0 or bool(keep_every and step % keep_every == 0)
            if not (at_evaluation or at_save or stop.requested):
                continue
            log.drain()
            if at_evaluation:
                values = evaluate(step, state)
                best.offer(step, state, values)
            if end:
                workdirs.finish(workdir, config, source, suite, values, clock)
            if at_save or stop.requested:
                with clock.book("checkpoint"):
                    checkpoints.save(step, state, {"seconds": clock.seconds})
            if stop.requested:
                break
            log.since = time.perf_counter()

    if step < total_steps:
        print(f"stopped at step {step} and saved it; the same command continues from there")
        return {"interrupted": step}
    return workdirs.read_result(workdir)


def _profile(config: Config, workdir: Path, step: int) -> None:
    """Profiles log.profile_steps steps from log.profile_from on; TensorBoard shows workdir/profile."""
    first = config.log.profile_from
    if first is None:
        return
    if step == first:
        jax.profiler.start_trace(str(workdir / "profile"))
    elif step == first + config.log.profile_steps:
        jax.profiler.stop_trace()


class StepLog:
    """Reads the metrics of each step once the next one is on its way, and writes every `log.every`-th."""

    def __init__(
        self,
        config: Config,
        source: Source,
        writer: telemetry.Writers,
        progress: telemetry.Progress,
        clock: telemetry.Clock,
        start_step: int,
    ):
        self._config, self._writer, self._progress, self._clock = config, writer, progress, clock
        cost = flops.count(config.model, image_size=config.data.transform.size, num_classes=source.num_classes)
        self._flops_a_step = cost.train_flops * config.data.batch_size / jax.device_count()
        self._peak = telemetry.peak_flops(jax.devices()[0], config.log.peak_flops)
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None
        self._logged_step = start_step
        self._seconds = 0.0
        self._data_seconds = clock.seconds.get("data", 0.0)
        self.since = time.perf_counter()  # when counting of steps' time began; the loop moves it past other work

    def dispatched(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of a step that has just been dispatched and reads those of the one before it."""
        self._read()
        self._pending = step, metrics

    def drain(self) -> None:
        """Reads what is still pending, before other work."""
        self._read()
        self._tick()

    def _tick(self) -> None:
        now = time.perf_counter()
        elapsed = now - self.since
        self._seconds, self.since = self._seconds + elapsed, now
        self._clock.seconds["step"] = self._clock.seconds.get("step", 0.0) + elapsed

    def _read(self) -> None:
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._progress.advance()
        in_row = int(values.pop("skipped_in_row"))
        if in_row:
            self._progress.say(
                f"step {step}: loss or gradient is not finite; the update is left out ({in_row} in a row)"
            )
        if in_row >= self._config.log.stop_after_skipped:
            raise FloatingPointError(
                f"loss or gradient was not finite for {in_row} steps in a row, up to step {step}; lower optim.lr or "
                f"optim.beta2, or look at the data; the checkpoints before it are intact"
            )
        if step % int(self._config.log.every.amount) and step != int(self._config.duration.amount):
            return
        self._tick()
        count, waited = step - self._logged_step, self._clock.seconds.get("data", 0.0) - self._data_seconds
        seconds = max(self._seconds, 1e-9) / count
        flops_per_second = self._flops_a_step / seconds
        values |= {
            "step_seconds": seconds,
            "images_per_second_per_device": self._config.data.batch_size / seconds / jax.device_count(),
            "data_wait_share": waited / max(self._seconds, 1e-9),
            "flops_per_second_per_device": flops_per_second,
            "examples": step * self._config.data.batch_size,
        }
        if self._peak is not None:
            values["mfu"] = flops_per_second / self._peak
        self._logged_step, self._seconds, self._data_seconds = step, 0.0, self._clock.seconds.get("data", 0.0)
        self._writer.write_scalars(step, values)
        rate = self._config.data.batch_size / seconds
        self._progress.show(step, {"loss": values["loss"], "lr": values["learning_rate"], "images/s": rate})


class StopRequest:
    """Turns the first SIGTERM or SIGINT into a flag; the second acts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

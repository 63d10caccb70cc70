"""The training loop: restore or begin, step, log, evaluate, save, stop.

Read `train` from top to bottom: its order is the order of a run.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from vit_scaling import UserError, flops
from vit_scaling.config import Config, resolve
from vit_scaling.data import loader
from vit_scaling.data.images.transforms import transform
from vit_scaling.data.sources import Source, open_source
from vit_scaling.evaluation.suite import Suite
from vit_scaling.parallel import chips, processes, sharding
from vit_scaling.parallel import mesh as mesh_lib
from vit_scaling.parallel.interrupts import Stopped, StopRequest, Watchdog
from vit_scaling.training import checkpoint, initial, telemetry
from vit_scaling.training import workdir as workdirs
from vit_scaling.training.step import Program, TrainState, batch_shape, build


def train(config: Config, workdir: Path) -> dict[str, Any]:
    """Runs an experiment to its end, or on from where it stopped, and returns what workdir/result.json says.

    Everything is a function of the config and of the step, so a run that was killed and started again ends with the
    numbers of one that was not. SIGTERM or Ctrl-C, to any one of its processes, saves and returns
    {"interrupted": step}. All processes of a run call it, with one workdir that all of them see.

    Args:
        config: the experiment, durations in any unit.
        workdir: where checkpoints/, metrics.jsonl, tensorboard/, config.json, result.json and figure.png go.

    Raises:
        ValueError: the config cannot work, the workdir belongs to another one, or the processes differ; nothing was
            written.
        UserError: loss or gradient stayed non-finite for log.stop_after_skipped steps in a row.
    """
    with StopRequest() as stop, telemetry.Clock() as clock:
        return _train(config, workdir, stop, clock)


def _train(config: Config, workdir: Path, stop: StopRequest, clock: telemetry.Clock) -> dict[str, Any]:
    # ---- What is asked for: nothing is written until all of it is known to work, in every process.
    with processes.together():
        source = open_source(config.data.train)
        config = resolve(config, len(source))
        trunk = workdirs.trunk(config)
        if trunk is not None:
            config = workdirs.branch(config, trunk)
        total_steps = int(config.duration.amount)
        evaluate_every = int(config.evaluation.every.amount)
        save_every, keep_every = int(config.checkpoint.every.amount), int(config.checkpoint.permanent.amount)
        watchdog = Watchdog(config.log.watchdog)
        mesh = mesh_lib.create(config.mesh)
        program = build(config, num_classes=source.num_classes, total_steps=total_steps, mesh=mesh)
        suite = Suite(config, _watched(program, stop, watchdog))
        augment = transform(config.data.transform, train=True)
        weights = initial.start_of(config, source.num_classes, workdir)
    workdirs.agree(config, {"data.train": len(source)} | suite.examples_of())

    # ---- The workdir is this experiment's, or becomes it.
    processes.first(lambda: workdirs.claim(workdir, config))
    past = processes.first(lambda: workdirs.past(workdir))
    own = past["checkpoints"]
    if own and own[-1] >= total_steps and past["finished"]:
        processes.say(f"{workdir} holds this run, finished; delete it or name another --workdir to run it again")
        return processes.first(lambda: workdirs.read_result(workdir))
    workdirs.keep_compilations(workdir)
    processes.say(workdirs.describe(config, program, source))

    # ---- The state: the newest checkpoint, the trunk's, or a new one; each leaf on the mesh it will be used on.
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep, permanent=keep_every)
    begin = workdir / "checkpoints" / str(own[-1]) if own else trunk
    state, record = (
        (initial.begin(program, weights), {}) if begin is None else checkpoint.restore(begin, program.state_shape)
    )
    best = checkpoint.Best(workdir, config.checkpoint.best)
    start_step = int(jax.device_get(state.step))
    clock.resume(start_step, record["seconds"] if own else {}, past["clock"]["step"], past["clock"]["seconds"])
    writer = telemetry.create_writer(workdir, start_step if own else None)
    progress = telemetry.Progress(start_step, total_steps)
    if begin is not None:
        progress.say(f"continuing from {begin}")

    # ---- The step, compiled once, from shapes; the loader, at this step.
    with clock.book("compile"):
        shapes = batch_shape(config, source.num_classes, source.multi_label, mesh)
        train_step = program.train_step.lower(program.state_shape, shapes).compile()
    on = sharding.batch_sharding(mesh)
    shard = loader.Shard(*sharding.batch_parts(on))
    batches = loader.train_batches(source, augment, config.data, seed=config.seed, start_step=start_step, shard=shard)
    on_devices = loader.to_device(batches, on, ahead=1)

    def measure_at(step: int) -> bool:
        return step == total_steps or step % evaluate_every == 0

    def evaluate(step: int, state: TrainState) -> None:
        """Measures, and at the end writes the result; neither where the run is asked to stop meanwhile."""
        try:
            with clock.book("evaluation"):
                values = suite.measure(measured(state), state.statistics, final=step == total_steps)
        except Stopped:
            return
        writer.write_scalars(step, values)
        progress.show(step, {name: value for name, value in values.items() if not name.endswith(("loss", "std"))})
        if step > 0:
            best.offer(step, state, values)
        if step == total_steps:
            workdirs.finish(workdir, config, source, suite, values, clock)

    # ---- Steps. Do not reorder: step n + 1 is dispatched before the metrics of step n are read, and rows and result
    # are written before the checkpoint that makes them part of the run's past.
    with (
        contextlib.closing(watchdog),
        contextlib.closing(checkpoints),
        contextlib.closing(writer),
        contextlib.closing(progress),
        contextlib.closing(batches),
        jax.transfer_guard("disallow"),
    ):
        step = start_step
        if (measure_at(step) and step not in past["measured"]) if own else step == 0:
            evaluate(step, state)  # the first, or one that was broken off
        clock.book_rest("start")
        workdirs.note_clock(workdir, step, clock)
        log = StepLog(config, workdir, source, writer, progress, clock, start_step)
        while step < total_steps and not stop.granted:
            step += 1
            _profile(config, workdir, step)
            with clock.book("data"):
                batch = next(on_devices)
            state, metrics = train_step(state, batch)
            log.dispatched(step, metrics)
            watchdog.beat()

            at_save = step == total_steps or step % save_every == 0 or bool(keep_every and step % keep_every == 0)
            if not (stop.asked() or measure_at(step) or at_save):
                continue
            log.drain()
            if measure_at(step):
                evaluate(step, state)
            if at_save or stop.granted:
                with clock.book("checkpoint"):
                    checkpoints.save(step, state, {"seconds": clock.seconds})
    if batches.summary:
        processes.say(f"images read for training: {batches.summary}")
    clock.book_rest("checkpoint")  # the wait until it is written
    workdirs.note_clock(workdir, step, clock)

    if stop.granted:
        processes.say(f"stopped at step {step}; the same command continues from there")
        return {"interrupted": step}
    return processes.first(lambda: workdirs.read_result(workdir))


def _watched(program: Program, stop: StopRequest, watchdog: Watchdog) -> Program:
    """Returns the program, each batch of whose evaluations is progress, and may be the last if the run is to stop."""

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled = set()

        def call(params: Any, statistics: Any, batch: Any) -> Any:
            shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
            watchdog.beat(compiles=shapes not in compiled)
            compiled.add(shapes)
            if stop.asked():
                raise Stopped
            return function(params, statistics, batch)

        return call

    return dataclasses.replace(program, classify=watched(program.classify), features=watched(program.features))


def measured(state: TrainState) -> dict[str, Any]:
    """Returns the parameters that evaluations measure, by the suffix of their metrics' names."""
    return {"": state.params} | ({} if state.ema is None else {"_ema": state.ema})


def _profile(config: Config, workdir: Path, step: int) -> None:
    """Profiles log.profile_steps steps from log.profile_from on; TensorBoard shows workdir/profile."""
    first = config.log.profile_from
    if first is None or not processes.is_first():
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
        workdir: Path,
        source: Source,
        writer: telemetry.Writers,
        progress: telemetry.Progress,
        clock: telemetry.Clock,
        start_step: int,
    ):
        self._config, self._workdir = config, workdir
        self._writer, self._progress, self._clock = writer, progress, clock
        cost = flops.count(config.model, image_size=config.data.transform.size, num_classes=source.num_classes)
        self._flops_a_step = cost.train_flops * config.data.batch_size / jax.device_count()
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
        if in_row:
            self._progress.say(
                f"step {step}: loss or gradient is not finite; the update is left out ({in_row} in a row)"
            )
        if in_row >= self._config.log.stop_after_skipped:
            raise UserError(
                f"loss or gradient was not finite for {in_row} steps in a row, up to step {step}; lower optim.lr or "
                f"optim.beta2, or look at the data; the checkpoints before it are intact"
            )
        if step % int(self._config.log.every.amount) and step != int(self._config.duration.amount):
            return
        self._clock.book_rest("step")
        count, waited, stepped = step - self._logged_step, self._since_row("data"), self._since_row("step")
        seconds = max(waited + stepped, 1e-9) / count
        flops_per_second = self._flops_a_step / seconds
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
        workdirs.note_clock(self._workdir, step, self._clock)
        rate = self._config.data.batch_size / seconds
        self._progress.show(step, {"loss": values["loss"], "lr": values["learning_rate"], "images/s": rate})

    def _since_row(self, name: str) -> float:
        """Returns the seconds booked on `name` since the last row."""
        return self._clock.seconds.get(name, 0.0) - self._logged_seconds.get(name, 0.0)

"""The training loop: restore or begin, step, log, evaluate, save, stop.

Read `_train` from top to bottom: its order is the order of a run.
"""

import contextlib
import ctypes
import dataclasses
import errno
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from vit_scaling import TransientError, UserError, paths
from vit_scaling import config as config_lib
from vit_scaling.config import Config, resolve
from vit_scaling.data import loader
from vit_scaling.data.images.transforms import Transform, transform
from vit_scaling.data.sources import Source, open_source
from vit_scaling.evaluation import scores, sets
from vit_scaling.evaluation.suite import Suite
from vit_scaling.interop import Weights, run
from vit_scaling.parallel import mesh as mesh_lib
from vit_scaling.parallel import processes, sharding
from vit_scaling.parallel.interrupts import Stopped, StopRequest, Watchdog
from vit_scaling.training import checkpoint, export, initial, loggers, teacher, telemetry
from vit_scaling.training import workdir as workdirs
from vit_scaling.training.lock import locked
from vit_scaling.training.profiler import Profiler
from vit_scaling.training.step import Program, TrainState, batch_shape, build
from vit_scaling.training.step_log import StepLog

# Called in every process with the step, the suite, the resolved config and the program.
AfterEvaluation = Callable[[int, Suite, Config, Program], None]


def train(config: Config, workdir: Path, after_evaluation: AfterEvaluation | None = None) -> dict[str, Any]:
    """Runs an experiment to its end, or on from where it stopped, and returns what workdir/result.json says.

    Everything is a function of the config and of the step, so a run that was killed and started again ends with the
    numbers of one that was not. After SIGTERM or Ctrl-C, to any one of its processes, it saves and returns
    {"interrupted": step}. All processes of a run call it, with one workdir that all of them see.

    Args:
        config: the experiment, durations in any unit.
        workdir: where checkpoints/, metrics.jsonl, tensorboard/, config.json, result.json and figure.png go.
        after_evaluation: called after each evaluation, when its rows, result and checkpoint are written or under way.

    Raises:
        UserError: the config cannot work, the workdir belongs to another one, or the processes differ, and nothing was
            written; or the updates stayed non-finite for log.stop_after_skipped steps in a row.
    """
    with StopRequest() as stop, telemetry.Clock() as clock, _fault_of_disk_is_a_sentence(workdir):
        setup = _set_up(config, workdir)
        with locked(workdir), contextlib.ExitStack() as last:
            claim = functools.partial(workdirs.claim, workdir, setup.config, setup.sets, setup.source.class_names)
            identity = processes.first(claim)
            last.enter_context(_gone_workdir_is_a_sentence(workdir))
            past = processes.first(lambda: workdirs.past(workdir, setup.total_steps))
            if not past["finished"]:
                workdirs.keep_compilations(workdir)
                processes.say(workdirs.describe(setup.config, setup.program, setup.source))
                return _train(setup, workdir, identity, past, stop, clock, after_evaluation, last)
            processes.say(f"{workdir} holds this run, finished; delete it or name another --workdir to run it again")
            return _result(workdir)


@dataclasses.dataclass(frozen=True)
class _Setup:
    """A run that is known to work, before it has a workdir."""

    config: Config  # resolved
    source: Source
    program: Program
    suite: Suite
    sets: dict[str, dict[str, Any]]  # what each set holds, by its field in the config
    augment: Transform
    weights: Weights | None  # to start from
    trunk: Path | None  # the checkpoint to branch from

    @property
    def total_steps(self) -> int:
        return int(self.config.duration.amount)

    def measures_at(self, step: int) -> bool:
        return step == self.total_steps or step % int(self.config.evaluation.every.amount) == 0

    def saves_at(self, step: int) -> bool:
        every, permanent = self.config.checkpoint.every, self.config.checkpoint.permanent
        return step == self.total_steps or any(step % int(d.amount) == 0 for d in (every, permanent) if d.amount)


def _set_up(config: Config, workdir: Path) -> _Setup:
    """Returns everything that can be checked before the first write; every process fails where one does."""
    begins = processes.first(lambda: not run.steps(workdir / "checkpoints"))
    with processes.together():
        loggers.check(config.log.writers)
        export.check(config)
        source = open_source(config.data.train)
        config = resolve(config, len(source))
        sets.check_trainable(source, config.loss)
        mesh = mesh_lib.create(config.mesh)
        program = build(config, num_classes=source.num_classes, total_steps=int(config.duration.amount), mesh=mesh)
        teacher.check_classes(program.teacher, source)
        workdirs.check_space(workdir, program)
        suite = Suite(config, program)
        suite.match_classes(source)
        setup = _Setup(
            config=config,
            source=source,
            program=program,
            suite=suite,
            sets={"data.train": sets.identity(source)} | suite.sets(),
            augment=transform(config.data.transform, train=True),
            weights=initial.start_of(config, source.num_classes) if begins else None,
            trunk=workdirs.trunk(config),
        )
    workdirs.agree(config, setup.sets, initial.digest(setup.weights, program.teacher))
    processes.first(lambda: workdirs.check(workdir, config, setup.sets))
    processes.first(lambda: paths.make_folder(workdir))
    return setup


def _train(
    setup: _Setup,
    workdir: Path,
    identity: str,
    past: dict[str, Any],
    stop: StopRequest,
    clock: telemetry.Clock,
    after_evaluation: AfterEvaluation | None,
    last: contextlib.ExitStack,
) -> dict[str, Any]:
    config, source, total_steps = setup.config, setup.source, setup.total_steps
    watchdog = last.enter_context(contextlib.closing(Watchdog(config.log.watchdog)))
    watchdog.beat(compiles=not run.steps(workdir / "checkpoints"))  # else a restore, which may stand still
    # ---- The state, where this run or its trunk left it, or a new one; then what follows from its step.
    state, resumed, origin = _first_state(setup, workdir, identity, past, clock)
    step = int(jax.device_get(state.step))
    workdirs.note_start(workdir, step)
    keep, permanent = config.checkpoint.keep, int(config.checkpoint.permanent.amount)
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", keep=keep, permanent=permanent)
    best = checkpoint.Best(workdir, config.checkpoint.best, sets.digest(setup.sets))
    told = (config.log.writers, config.log.project, identity, config_lib.to_dict(config))
    writer = telemetry.create_writer(workdir, step if resumed else None, *told)
    last.enter_context(contextlib.closing(writer))  # trackers are told the result
    progress = telemetry.Progress(step, total_steps)
    last.enter_context(contextlib.closing(telemetry.Warnings(progress.say)))
    if origin is not None:
        progress.say(f"continuing from {origin}")
    progress.doing("compiling", line=True)
    watchdog.beat(compiles=True)
    with clock.book("compile"):
        train_step = _compiled(setup)
    batches = _batches(setup, step)
    on_devices = loader.to_device(batches, sharding.batch_sharding(setup.program.mesh), ahead=1)
    log = StepLog(config, workdir, source.num_classes, writer, progress, clock, step)
    profiler = Profiler(config.log, workdir)
    evaluate = _Evaluator(setup, after_evaluation, stop, clock, writer, progress, watchdog, best, batches)

    # ---- Steps. Do not reorder: step n + 1 is dispatched before the metrics of step n are read, and rows are written
    # before the checkpoint that makes them part of the run's past.
    with contextlib.ExitStack() as exits:
        for each in (watchdog, checkpoints, progress, profiler, batches):  # exports and results take their time
            exits.enter_context(contextlib.closing(each))
        exits.enter_context(jax.transfer_guard("disallow"))
        due = (setup.measures_at(step) and step not in past["measured"]) if resumed else step == 0
        if due and evaluate(step, state):  # the first, or one that was interrupted
            evaluate.report(step)
        progress.doing("training")
        clock.book_rest("start")
        workdirs.note_clock(workdir, step, clock)
        while step < total_steps and not stop.granted:
            step += 1
            with clock.book("data"):
                batch = next(on_devices)
            with profiler.step(step):
                state, metrics = train_step(state, batch)
            log.dispatched(step, metrics)
            watchdog.beat()
            if not (stop.asked() or setup.measures_at(step) or setup.saves_at(step)):
                continue
            log.drain()
            evaluated_here = setup.measures_at(step) and evaluate(step, state)
            if setup.saves_at(step) or stop.granted:
                writer.flush()
                workdirs.note_clock(workdir, step, clock)
                progress.doing("stopping, saving" if stop.granted else "saving", line=stop.granted)
                with clock.book("checkpoint"):
                    checkpoints.save(step, state, {"seconds": clock.seconds, "run": identity})
            if evaluated_here:
                evaluate.report(step)
            progress.doing("training")
    if batches.summary:
        processes.say(f"images read for training: {batches.summary}")
    clock.book_rest("checkpoint")  # the wait until it is written
    workdirs.note_clock(workdir, step, clock)
    if stop.granted:
        processes.say(f"stopped at step {step}; the same command continues from there")
        return {"interrupted": step}
    result = _finished(setup, workdir, step, evaluate.values, clock)
    writer.finish(result)
    return result


def _finished(
    setup: _Setup, workdir: Path, step: int, values: dict[str, float] | None, clock: telemetry.Clock
) -> dict[str, Any]:
    """Writes what stands at the end of a run, and returns its result.

    The result speaks of the last checkpoint, so it is written after it; and last, because it ends the run.
    """
    config = setup.config
    export.write_all(config, workdir, workdir / "checkpoints" / str(step))
    processes.first(lambda: workdirs.finish(workdir, config, setup.source, setup.suite, values, clock))
    return _result(workdir)


def _result(workdir: Path) -> dict[str, Any]:
    """Returns the result of a run that has finished.

    Raises:
        FileNotFoundError: it is gone again.
    """
    result = processes.first(lambda: workdirs.read_result(workdir))
    if result is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(workdir / "result.json"))
    return result


@dataclasses.dataclass
class _Evaluator:
    """Measures a state, tells writers and terminal, and keeps the best checkpoint."""

    setup: _Setup
    after: AfterEvaluation | None
    stop: StopRequest
    clock: telemetry.Clock
    writer: telemetry.Writers
    progress: telemetry.Progress
    watchdog: Watchdog
    best: checkpoint.Best
    batches: loader.Batches  # of training, with the counts of events while images were read
    values: dict[str, float] | None = None  # of the newest evaluation; before the first, evaluations may compile

    def __call__(self, step: int, state: TrainState) -> bool:
        """Returns False if the run was asked to stop meanwhile."""
        self.progress.doing("evaluating")
        suite, is_last = self.setup.suite, step == self.setup.total_steps
        try:
            with self.clock.book("evaluation"):
                values = suite.measure(
                    measured(state), state.statistics, final=is_last, before_batch=self._before_batch
                )
        except Stopped:
            return False  # the next start measures again
        self.values = values
        read = {f"data/{event}": float(count) for event, count in self.batches.counts.items() if count}
        self.writer.write_scalars(step, values | read)
        self.writer.flush()
        for line in scores.lines(values, suite.counts):
            self.progress.say(f"step {step:,}: {line}")
        if step > 0:
            self.best.offer(step, state, values)
        return True

    def report(self, step: int) -> None:
        if self.after is not None:
            with self.clock.book("report"):
                self.after(step, self.setup.suite, self.setup.config, self.setup.program)

    def _before_batch(self) -> None:
        self.watchdog.beat(compiles=self.values is None)
        if self.stop.asked():
            raise Stopped


def _compiled(setup: _Setup) -> Any:
    """Returns the train step, compiled for the shapes of the run's state and batches."""
    program, source = setup.program, setup.source
    batch = batch_shape(setup.config, source.num_classes, source.multi_label, program.mesh)
    compiled = program.train_step.lower(program.state_shape, batch).compile()
    _give_memory_back()
    return compiled


def _give_memory_back() -> None:
    """Gives the system what compiling has freed, which glibc would keep: 0.2 GB for a ViT-S on a CPU."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _batches(setup: _Setup, step: int) -> loader.Batches:
    """Returns this process's shard of the batches from a step on."""
    config = setup.config
    shard = loader.Shard(*sharding.batch_parts(sharding.batch_sharding(setup.program.mesh)))
    return loader.train_batches(
        setup.source, setup.augment, config.data, seed=config.seed, start_step=step, shard=shard
    )


def _first_state(
    setup: _Setup, workdir: Path, identity: str, past: dict[str, Any], clock: telemetry.Clock
) -> tuple[TrainState, bool, Path | None]:
    """Returns (state, whether it is this run's own, the checkpoint that it was restored from, if any)."""
    shape, origin = setup.program.state_shape, setup.trunk
    own = checkpoint.restore_newest(workdir / "checkpoints", shape, identity)
    if own is not None:
        origin, state, record = own
    elif origin is not None:
        state, record = checkpoint.restore(origin, shape)
    else:
        state, record = initial.begin(setup.program, setup.weights), {}
    step, noted = int(jax.device_get(state.step)), past["clock"]
    clock.resume(step, record["seconds"] if own else {}, noted["step"], noted["seconds"])
    return state, own is not None, origin


@contextlib.contextmanager
def _fault_of_disk_is_a_sentence(workdir: Path) -> Iterator[None]:
    """Raises TransientError where anything inside failed because the disk is full or fails."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (fault := paths.fault_of_disk(error)) is None:
            raise
        try:
            intact = run.steps(workdir / "checkpoints")
            rest = f"checkpoint {intact[-1]} is intact" if intact else "there is no checkpoint yet"
        except OSError:
            rest = "its checkpoints cannot be listed"
        is_full = fault.startswith((os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT)))
        what = f"the disk of {workdir} is full" if is_full else f"a file cannot be read or written ({fault})"
        raise TransientError(f"{what}; {rest}") from error


@contextlib.contextmanager
def _gone_workdir_is_a_sentence(workdir: Path) -> Iterator[None]:
    """Raises TransientError where anything inside failed because the run's folder has been renamed or deleted."""
    try:
        yield
    except Exception as error:
        # Libraries make folders anew, but not the file by which the workdir is the run's.
        if not paths.is_missing_file(error) or (workdir / "config.json").exists():
            raise
        raise TransientError(f"{workdir} is gone: it was renamed or deleted while the run went on") from error


def measured(state: TrainState) -> dict[str, Any]:
    """Returns the parameters that evaluations measure, by the suffix of their metrics' names."""
    return {"": state.params} | ({} if state.ema is None else {"_ema": state.ema})

"""Starts of the trainer: most are forks of a process that has imported the program, some are processes of their own.

A fork spares the seconds of the imports, so that a campaign tries several times as many faults. It also lets a fault
be switched on inside: preload.c for files and clocks, and poisoned updates.
"""

import contextlib
import ctypes
import dataclasses
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CONFIG = "--config=tests/faults/small.py"
DEADLINE = 1200.0  # seconds in which a start must end
WRITES, READS, OPENS = range(3)  # what preload.c can let fail


@dataclasses.dataclass
class Ended:
    """How one start of the trainer ended."""

    code: int
    error: str  # stderr

    @property
    def is_clear(self) -> bool:
        """Whether it is a refusal in one sentence."""
        said = [line for line in self.error.splitlines() if line.startswith("error: ")]
        return self.code in (1, 2) and len(said) == 1 and "Traceback" not in self.error


@dataclasses.dataclass(frozen=True)
class Inside:
    """Faults inside a forked start.

    Attributes:
        files: (what, errno, calls that succeed before, calls that fail) of files in the workdir.
        clock: (seconds by which the wall clock is wrong, readings that are right before).
        limit_bytes: no file may grow beyond it.
        poison: (what, value, step): the loss ("loss"), the gradients ("grad") or one image of the batch ("image") have
            this value at this step.
        devices: of the CPU.
    """

    files: tuple[int, int, int, int] | None = None
    clock: tuple[float, int] | None = None
    limit_bytes: int | None = None
    poison: tuple[str, float, int] | None = None
    devices: int = 1


def environment(compiled: Path, devices: int = 1) -> dict[str, str]:
    return {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(compiled)),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "OPENBLAS_NUM_THREADS": "1",
    }


class Forks:
    """Forks of one process that has imported the program."""

    def __init__(self, folder: Path):
        self._logs, self._count = folder / "logs", 0
        self._logs.mkdir(exist_ok=True)
        library = folder / "preload.so"
        source = Path(__file__).with_name("preload.c")
        command = ["cc", "-shared", "-fPIC", "-O1", "-w", "-o", str(library), str(source), "-ldl"]
        subprocess.run(command, check=True, timeout=120)
        self.library = str(library)
        self._context = multiprocessing.get_context("forkserver")
        forkserver.set_forkserver_preload(["tests.faults.preloaded"])
        before = dict(os.environ)
        os.environ.update(environment(folder / "compiled") | {"LD_PRELOAD": self.library})
        os.environ["PYTHONPATH"] = str(ROOT)
        try:
            forkserver.ensure_running()
        finally:
            os.environ.clear()
            os.environ.update(before)

    def start(self, function: Callable[..., Any], *arguments: Any) -> "Running":
        self._count += 1
        log = self._logs / str(self._count)
        process = self._context.Process(target=_begin, args=(str(log), function, arguments))
        process.start()
        return Running(process, log)


class Running:
    """One start: a multiprocessing.Process or a subprocess.Popen, whose stderr goes to a file."""

    def __init__(self, process: Any, log: Path):
        self.process, self.log = process, log

    @property
    def pid(self) -> int:
        return self.process.pid

    def code(self) -> int | None:
        """Returns the exit code, None while it runs."""
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def send(self, *numbers: int) -> None:
        for number in numbers:
            if self.code() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, number)

    def stop_at(self, when: Callable[[], bool], *numbers: int) -> None:
        """Sends signals as soon as `when` says so, unless the start has ended before."""
        ends = time.monotonic() + DEADLINE
        while self.code() is None and not when() and time.monotonic() < ends:
            time.sleep(0.002)
        self.send(*numbers)

    def wait(self, seconds: float = DEADLINE) -> Ended:
        ends = time.monotonic() + seconds
        while self.code() is None and time.monotonic() < ends:
            time.sleep(0.005)
        code = self.code()
        if code is None:
            self.process.kill()
            return Ended(-99, f"did not end within {seconds:.0f} s: {self.log.read_text()[-400:]}")
        error = self.log.read_text(errors="replace") if self.log.exists() else ""
        self.log.unlink(missing_ok=True)
        return Ended(code, error)


def alone(compiled: Path, arguments: list[str], python: str = sys.executable, devices: int = 1) -> Running:
    """Starts the trainer as a user does, in a process of its own."""
    log = Path(tempfile.mkstemp(prefix="start")[1])
    command = [python, "-m", "vit_scaling.train", *arguments]
    with log.open("w") as stream:
        variables = os.environ | environment(compiled, devices)
        process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.DEVNULL, stderr=stream)
    return Running(process, log)


def _begin(log: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Runs in the fork."""
    errors = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(errors, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.chdir(ROOT)
    function(*arguments)


def trainer(arguments: list[str], workdir: str, inside: Inside) -> None:
    """The trainer's main function in a fork, with faults."""
    import jax

    from vit_scaling import cli, train
    from vit_scaling.training import figure

    figure.run_figure = _blank_figure
    signal.signal(signal.SIGINT, cli._interrupted)
    jax.config.update("jax_num_cpu_devices", inside.devices)
    if inside.poison is not None:
        _poison(*inside.poison)
    if inside.limit_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (inside.limit_bytes,) * 2)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    library = ctypes.CDLL(None)
    if inside.files is not None:
        what, error, after, count = inside.files
        library.faults_set(workdir.encode(), what, error, ctypes.c_long(after), ctypes.c_long(count))
    if inside.clock is not None:
        library.faults_clock(ctypes.c_double(inside.clock[0]), ctypes.c_long(inside.clock[1]))
    sys.argv = ["train.py", *arguments]
    cli.run(train.main, train.__doc__)


def _blank_figure(path: Path, *args: Any, **options: Any) -> None:
    """Stands in for the curves: drawing them would take a third of a start."""
    path.write_bytes(b"a figure")


def _poison(what: str, value: float, at: int) -> None:
    """Puts a value that is not finite into one image, the loss or the gradients of one step."""
    import jax
    import jax.numpy as jnp

    from vit_scaling.training import step

    right = step._gradients

    def poisoned(recipe: Any, state: Any, images: Any, *rest: Any) -> Any:
        def put(name: str, array: Any) -> Any:
            return jnp.where((state.step == at) & (what == name), jnp.asarray(value, array.dtype), array)

        images = images.at[:1].set(put("image", images[:1]))
        loss, batch_stats, grads = right(recipe, state, images, *rest)
        return put("loss", loss), batch_stats, jax.tree.map(lambda grad: put("grad", grad), grads)

    step._gradients = poisoned

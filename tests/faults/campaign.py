"""Runs, faults and verdicts.

A fault ends in one of three ways:
  equal    the run ends with the parameters, averages and results of the undisturbed run, to the last bit;
  refused  a start ends with code 1 or 2 and one sentence, no checkpoint that was intact has changed, and, where the
           fault can be taken back, the next start ends equal;
  lost     anything else.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CONFIG = "--config=tests/faults/small.py"
STEPS = 8
HALF = 4  # where the half-finished run stopped
DEADLINE = 300.0  # seconds in which a start must end


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


class Lab:
    """Where the runs of a campaign lie, with the undisturbed run and a half-finished one to start faults from."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.count = 0
        whole = self.start(folder / "whole").wait(DEADLINE)
        assert whole.code == 0, whole.error
        self.reference = outcome(folder / "whole")
        half = self.start(folder / "half")
        half.stop_at(lambda: (folder / "half" / "checkpoints" / str(HALF)).is_dir(), signal.SIGTERM)
        stopped = half.wait(DEADLINE)
        assert stopped.code == 0, stopped.error
        # SIGTERM takes effect a step or two later, so which checkpoints there are depends on the machine's speed.
        kept = sorted(int(path.name) for path in (folder / "half" / "checkpoints").glob("*") if path.name.isdigit())
        self.newest, self.older = str(kept[-1]), str(kept[0])

    def start(self, workdir: Path, *flags: str, **how: Any) -> "Running":
        return Running(workdir, self.folder / "compiled", *flags, **how)

    def new(self) -> Path:
        """Returns the place of a run that does not exist yet."""
        self.count += 1
        return self.folder / f"run{self.count}"

    def half(self) -> Path:
        """Returns a copy of the half-finished run."""
        return shutil.copytree(self.folder / "half", self.new())


class Running:
    """One start of the trainer, in a process of its own."""

    def __init__(self, workdir: Path, compiled: Path, *flags: str, limit_bytes: int | None = None):
        command = [sys.executable, "-m", "vit_scaling.train", CONFIG, f"--workdir={workdir}", *flags]
        if limit_bytes is not None:  # a quota: no file may grow beyond it
            command = ["bash", "-c", f'ulimit -f {limit_bytes // 1024}; trap "" XFSZ; exec "$@"', "bash", *command]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_COMPILATION_CACHE_DIR": str(compiled),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
        }
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def stop_at(self, when: Callable[[], bool], *numbers: int) -> None:
        """Sends signals as soon as `when` says so, unless the run has ended before."""
        ends = time.monotonic() + DEADLINE
        while self.process.poll() is None and not when() and time.monotonic() < ends:
            time.sleep(0.002)
        for number in numbers:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    def wait(self, seconds: float) -> Ended:
        try:
            _, error = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return Ended(-99, f"did not end within {seconds:.0f} s")
        return Ended(self.process.returncode, error)


def digest(checkpoint: Path) -> str:
    """Returns a digest of a checkpoint's arrays, read as the weights command reads them."""
    from vit_scaling import names
    from vit_scaling.interop import run

    _, arrays = run.read_arrays(checkpoint, ("params", "ema"))
    found = hashlib.sha256()
    for path, array in sorted(names.flatten(arrays).items()):
        found.update(f"{path} {array.shape} {array.dtype}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def outcome(workdir: Path) -> dict[str, Any]:
    """Returns what a finished run ends with: its results, its rows of losses, and a digest of its last checkpoint."""
    result = json.loads((workdir / "result.json").read_text())
    return {
        "step": result["step"],
        "metrics": result["metrics"],
        "arrays": digest(workdir / "checkpoints" / str(STEPS)),
    }


def intact(workdir: Path) -> dict[str, str]:
    """Returns the digests of all checkpoints of a run that can be read."""
    found = {}
    for path in workdir.glob("checkpoints/*"):
        if path.name.isdigit():
            with contextlib.suppress(Exception):
                found[path.name] = digest(path)
    return found


@dataclasses.dataclass
class Verdict:
    kind: str
    detail: str
    answer: str  # equal, refused, lost
    why: str = ""


def judge(lab: Lab, workdir: Path, kind: str, detail: str, *, heal: Callable[[], None] | None = None) -> Verdict:
    """Starts a disturbed run again, until it has ended, and says what became of it.

    Args:
        heal: takes the fault back (frees the disk ...) after a refusal; then the run must end equal.
    """
    before = intact(workdir)
    ended = lab.start(workdir).wait(DEADLINE)
    refused = ended.code != 0
    if refused and not ended.is_clear:
        return Verdict(kind, detail, "lost", f"code {ended.code}: {ended.error.strip()[-400:]}")
    if refused:
        changed = [name for name, value in before.items() if intact(workdir).get(name) != value]
        if changed:
            return Verdict(kind, detail, "lost", f"checkpoint {changed[0]} was intact and has changed")
        if heal is None:
            return Verdict(kind, detail, "refused", ended.error.strip().splitlines()[-1])
        heal()
        ended = lab.start(workdir).wait(DEADLINE)
        if ended.code != 0:
            return Verdict(kind, detail, "lost", f"after the fault was gone: {ended.error.strip()[-400:]}")
    try:
        found = outcome(workdir)
    except Exception as error:
        return Verdict(kind, detail, "lost", f"no outcome: {type(error).__name__}: {error}")
    if found != lab.reference:
        differing = [name for name in found if found[name] != lab.reference[name]]
        return Verdict(kind, detail, "lost", f"ended with another {', '.join(differing)}")
    return Verdict(kind, detail, "refused" if refused else "equal")


def run(lab: Lab, seed: int, *, minutes: float | None = None, count: int | None = None) -> list[Verdict]:
    """Draws faults, one kind after the other in a seeded order, until the time or the number is used up."""
    from tests.faults import kinds

    verdicts: list[Verdict] = []
    ends = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    names = sorted(kinds.KINDS)
    for number in range(10**6):
        if time.monotonic() > ends or (count is not None and number >= count):
            break
        if number % len(names) == 0:
            order = random.Random(f"{seed} order {number}").sample(names, len(names))
        name = order[number % len(names)]
        verdict = kinds.KINDS[name](lab, random.Random(f"{seed} {number}"))
        verdicts.append(verdict)
        line = f"fault {number} (seed {seed}): {verdict.answer:8s} {verdict.kind}, {verdict.detail}"
        print(f"{line}{': ' + verdict.why if verdict.why else ''}", flush=True)
        for path in lab.folder.glob("run*"):
            shutil.rmtree(path, ignore_errors=True)
    return verdicts


def table(verdicts: list[Verdict]) -> str:
    """Returns the table of a campaign: kind, tried, equal, refused clearly, lost."""
    lines = [f"{'kind':28s} {'tried':>6s} {'equal':>6s} {'refused':>8s} {'lost':>5s}"]
    for kind in [*sorted({verdict.kind for verdict in verdicts}), None]:
        rows = [verdict.answer for verdict in verdicts if kind in (None, verdict.kind)]
        counts = [rows.count(answer) for answer in ("equal", "refused", "lost")]
        lines.append(f"{kind or 'all':28s} {len(rows):6d} {counts[0]:6d} {counts[1]:8d} {counts[2]:5d}")
    return "\n".join(lines)

"""Processes that are killed, stopped, frozen, or started twice."""

import contextlib
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.campaign import Kind, Lab, Verdict, changed, complete, judge, outcome
from tests.faults.starts import Ended, Inside, Running

KINDS: dict[str, Kind] = {}

MOMENTS = {
    "start": "*",
    "claimed": "config.json",
    "compile": "starts.jsonl",
    "first rows": "metrics.jsonl",
    "first save": "checkpoints/*",
    "save of step 2": "checkpoints/2*",
    "save of step 6": "checkpoints/6*",
    "retention": "checkpoints/6/commit_success.txt",
    "last save": "checkpoints/8*",
    "best": "best*",
    "figure": "figure*",
    "result": "result*",
    "report": "report*",
}


def moment(workdir: Path, draw: random.Random) -> tuple[str, Callable[[], bool]]:
    """Returns a moment of a run and the function that says when it has come: a file that appears, and a bit later."""
    name = draw.choice(sorted(MOMENTS))
    later = draw.choice((0.0, 0.0, draw.uniform(0.0, 0.05), draw.uniform(0.0, 0.5)))
    seen: list[float] = []

    def come() -> bool:
        if not seen and workdir.is_dir() and any(workdir.glob(MOMENTS[name])):
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() - seen[0] >= later

    return f"{later:.3f} s after {name}", come


def end_by(label: str, *signals: int, several: bool = False, alone: bool = False) -> None:
    """Adds a kind: a run that signals end, once or several times in a row, at random moments."""

    def fault(lab: Lab, draw: random.Random) -> Verdict:
        workdir, details = draw.choice((lab.new, lab.half))(), []
        for _ in range(draw.choice((2, 3)) if several else 1):
            if alone:  # while modules are imported, too
                later = time.monotonic() + draw.uniform(0.0, 8.0)
                detail, come = (
                    f"{later - time.monotonic():.1f} s after its start",
                    lambda at=later: time.monotonic() > at,
                )
                running = lab.alone(workdir)
            else:
                detail, come = moment(workdir, draw)
                running = lab.start(workdir)
            details.append(detail)
            running.stop_at(come, *signals)
            ended = running.wait()
            codes = {0, *(-number for number in signals), *(128 + number for number in signals)}
            if ended.code not in codes:
                return Verdict(label, detail, "lost", f"code {ended.code}: {ended.error.strip()[-600:]}")
            if wrong := changed({}, complete(workdir)):
                return Verdict(label, detail, "lost", wrong)
        return judge(lab, workdir, label, "; ".join(details))

    KINDS[label] = fault


end_by("kill -9", signal.SIGKILL)
end_by("kill -9 several times", signal.SIGKILL, several=True)
end_by("SIGTERM", signal.SIGTERM)
end_by("SIGINT", signal.SIGINT)
end_by("SIGTERM twice", signal.SIGTERM, signal.SIGTERM)
end_by("SIGINT while modules load", signal.SIGINT, alone=True)


def frozen(lab: Lab, draw: random.Random) -> Verdict:
    """SIGSTOP past the watchdog: the process ends with code 1, or goes on if no heartbeat was due."""
    workdir = lab.half()
    running = lab.start(workdir, "--config.log.watchdog=2")
    detail, come = moment(workdir, draw)
    running.stop_at(come, signal.SIGSTOP)
    time.sleep(3.0)
    running.send(signal.SIGCONT)
    ended = running.wait()
    if ended.code not in (0, 1) or (ended.code == 1 and "Timeout (0:00:02)!" not in ended.error):
        return Verdict("SIGSTOP past the watchdog", detail, "lost", f"code {ended.code}: {ended.error.strip()[-600:]}")
    return judge(lab, workdir, "SIGSTOP past the watchdog", f"{detail}, code {ended.code}")


KINDS["SIGSTOP past the watchdog"] = frozen


def children_of(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(child) for child in task.read_text().split()]
    return found


def worker_killed(lab: Lab, draw: random.Random) -> Verdict:
    """A data worker is killed, as the kernel does when memory runs out: code 1 and one sentence."""
    workdir = lab.new()
    running = lab.start(workdir, "--config.data.workers=1")
    workers: list[int] = []

    def at_work() -> bool:
        spawned = [pid for pid in children_of(running.pid) if b"spawn_main" in _command(pid)]
        workers[:] = spawned
        return bool(spawned)

    running.stop_at(at_work)
    later = draw.uniform(0.0, 8.0)
    ends = time.monotonic() + later
    while time.monotonic() < ends and running.code() is None:
        time.sleep(0.01)
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    detail, ended = f"{later:.1f} s after its start", running.wait()
    if ended.code not in (0, 1):
        return Verdict("data worker killed", detail, "lost", f"code {ended.code}: {ended.error.strip()[-600:]}")
    return judge(lab, workdir, "data worker killed", detail, first=ended)


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


KINDS["data worker killed"] = worker_killed


def _pair(lab: Lab, workdir: Path) -> list[Running]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    flags = (f"--coordinator=127.0.0.1:{port}", "--num_processes=2", "--config.log.watchdog=60")
    return [lab.start(workdir, *flags, f"--process_id={process}") for process in range(2)]


def one_of_two_killed(lab: Lab, draw: random.Random) -> Verdict:
    """One of two processes is killed: the other ends with code 1, and two new ones go on."""
    label = "one of two processes killed"

    def both(workdir: Path) -> Ended:
        ended = [running.wait() for running in _pair(lab, workdir)]
        return max(ended, key=lambda each: each.code != 0)

    if label not in lab.references:
        reference = lab.folder / "pair"
        ended = both(reference)
        assert ended.code == 0, ended.error
        lab.references[label] = outcome(reference)
    workdir, victim = lab.new(), draw.randrange(2)
    pair = _pair(lab, workdir)
    detail, come = moment(workdir, draw)
    detail = f"process {victim}, {detail}"
    pair[victim].stop_at(come, signal.SIGKILL)
    ended = [running.wait() for running in pair]
    other = ended[1 - victim]
    if other.code not in (0, 1, -signal.SIGABRT):  # JAX aborts a process whose coordinator has died
        return Verdict(label, detail, "lost", f"code {other.code}: {other.error.strip()[-600:]}")
    return judge(lab, workdir, label, detail, reference=lab.references[label], again=lambda: both(workdir))


KINDS["one of two processes killed"] = one_of_two_killed


def two_runs_at_once(lab: Lab, draw: random.Random) -> Verdict:
    workdir = lab.new()
    first = lab.start(workdir)
    detail, come = moment(workdir, draw)
    first.stop_at(come)
    second = lab.start(workdir)
    ended = [one.wait() for one in (first, second)]
    detail += f", codes {ended[0].code} and {ended[1].code}"
    if not all(one.code == 0 or one.is_clear for one in ended):
        bad = next(one for one in ended if one.code and not one.is_clear)
        return Verdict("two runs at once", detail, "lost", bad.error.strip()[-600:])
    return judge(lab, workdir, "two runs at once", detail)


KINDS["two runs at once"] = two_runs_at_once


def clock_jumps(lab: Lab, draw: random.Random) -> Verdict:
    """The wall clock jumps at a random reading, by up to ten years in either direction.

    TensorStore starts no thread for as long as the clock went back, so a restore may stand still: the watchdog ends it.
    """
    seconds = draw.choice((-1, 1)) * draw.choice((3600.0, 86400.0 * 30, 86400.0 * 365, 86400.0 * 3650))
    after = draw.choice((0, draw.randrange(100), draw.randrange(5000)))
    workdir = draw.choice((lab.new, lab.half))()
    ended = lab.start(workdir, "--config.log.watchdog=60", inside=Inside(clock=(seconds, after))).wait()
    detail = f"by {seconds:.0f} s after {after} readings, code {ended.code}"
    if ended.code not in (0, 1) or (ended.code == 1 and "Timeout (0:01:00)!" not in ended.error):
        return Verdict("clock that jumps", detail, "lost", f"code {ended.code}: {ended.error.strip()[-600:]}")
    return judge(lab, workdir, "clock that jumps", detail)


KINDS["clock that jumps"] = clock_jumps

"""The kinds of faults. Each is a function (lab, random) -> Verdict, and draws its details from `random`."""

import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.campaign import DEADLINE, Lab, Running, Verdict, intact, judge, outcome

Kind = Callable[[Lab, random.Random], Verdict]
KINDS: dict[str, Kind] = {}


def kind(function: Kind) -> Kind:
    KINDS[function.__name__.replace("_", " ")] = function
    return function


def moment(workdir: Path, draw: random.Random) -> tuple[str, Callable[[], bool]]:
    """Returns a moment of a run and the function that says when it has come: a file that appears, and a bit later."""
    marks = {
        "start": "*",
        "claimed": "config.json",
        "first rows": "metrics.jsonl",
        "first save": "checkpoints/*",
        "save of step 2": "checkpoints/2*",
        "save of step 6": "checkpoints/6*",
        "last save": "checkpoints/8*",
        "best": "best*",
        "figure": "figure*",
        "result": "result*",
    }
    name = draw.choice(sorted(marks))
    later = draw.choice((0.0, 0.0, draw.uniform(0.0, 0.05), draw.uniform(0.0, 0.5)))
    seen: list[float] = []

    def come() -> bool:
        if not seen and workdir.is_dir() and any(workdir.glob(marks[name])):
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() - seen[0] >= later

    return f"{later:.3f} s after {name}", come


def end_by(signals: tuple[int, ...], label: str) -> Kind:
    def fault(lab: Lab, draw: random.Random) -> Verdict:
        workdir = lab.new()
        details = []
        for _ in range(draw.choice((1, 1, 1, 2, 3))):  # several in a row
            detail, come = moment(workdir, draw)
            details.append(detail)
            running = lab.start(workdir)
            running.stop_at(come, *signals)
            ended = running.wait(DEADLINE)
            if ended.code not in (0, -signals[-1], 128 + signals[-1], 130):
                return Verdict(label, detail, "lost", f"code {ended.code}: {ended.error.strip()[-400:]}")
        return judge(lab, workdir, label, "; ".join(details))

    return fault


KINDS["kill -9"] = end_by((signal.SIGKILL,), "kill -9")
KINDS["SIGTERM"] = end_by((signal.SIGTERM,), "SIGTERM")
KINDS["SIGINT"] = end_by((signal.SIGINT,), "SIGINT")
KINDS["SIGTERM twice"] = end_by((signal.SIGTERM, signal.SIGTERM), "SIGTERM twice")


DAMAGES = ("truncated", "emptied", "deleted", "one bit flipped")


def damage(path: Path, how: str, draw: random.Random) -> str:
    """Damages one file and returns what was done."""
    data = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
    elif how == "emptied" or not data:
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(data[: draw.randrange(len(data))])
    else:
        bit = draw.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        how = f"bit {bit} flipped"
    return how


def damaged(pattern: str, label: str) -> Kind:
    def fault(lab: Lab, draw: random.Random) -> Verdict:
        workdir = lab.half()
        own = pattern.format(newest=lab.newest, older=lab.older)
        files = sorted(path for path in workdir.glob(own) if path.is_file())
        path = draw.choice(files)
        how = damage(path, draw.choice(DAMAGES), draw)
        return judge(lab, workdir, label, f"{path.relative_to(workdir)} {how}")

    return fault


KINDS["newest checkpoint damaged"] = damaged("checkpoints/{newest}/**/*", "newest checkpoint damaged")
KINDS["older checkpoint damaged"] = damaged("checkpoints/{older}/**/*", "older checkpoint damaged")
KINDS["side file damaged"] = damaged("*.json*", "side file damaged")


@kind
def checkpoint_half_copied(lab: Lab, draw: random.Random) -> Verdict:
    workdir = lab.half()
    files = sorted(path for path in (workdir / "checkpoints" / lab.newest).rglob("*") if path.is_file())
    kept = draw.randrange(len(files))
    for path in files[kept:]:
        path.unlink()
    return judge(lab, workdir, "checkpoint half copied", f"{kept} of {len(files)} files")


@kind
def checkpoint_of_another_step(lab: Lab, draw: random.Random) -> Verdict:
    workdir = lab.half()
    taken = {path.name for path in (workdir / "checkpoints").iterdir()}
    other = draw.choice([step for step in ("1", "3", "5", "6", "7", "99") if step not in taken])
    if draw.random() < 0.3:
        (workdir / "checkpoints" / other).write_text("")
        return judge(lab, workdir, "checkpoint of another step", f"{other} is a file")
    shutil.copytree(workdir / "checkpoints" / lab.newest, workdir / "checkpoints" / other)
    heal = lambda: shutil.rmtree(workdir / "checkpoints" / other)  # noqa: E731
    return judge(lab, workdir, "checkpoint of another step", f"{other} is a copy of {lab.newest}", heal=heal)


@kind
def quota(lab: Lab, draw: random.Random) -> Verdict:
    """No file may grow beyond a few kilobytes, until the fault is gone."""
    workdir, limit = draw.choice((lab.new, lab.half))(), 1024 * draw.choice((1, 4, 8, 16, 32))
    before = intact(workdir)
    ended = lab.start(workdir, limit_bytes=limit).wait(DEADLINE)
    detail = f"{limit} bytes for each file"
    if any(intact(workdir).get(name) != value for name, value in before.items() if name == max(before, key=int)):
        return Verdict("quota", detail, "lost", "the newest checkpoint was intact and has changed")
    if ended.code not in (0, 1):
        return Verdict("quota", detail, "lost", f"code {ended.code}: {ended.error.strip()[-400:]}")
    return judge(lab, workdir, "quota", detail)


@kind
def two_runs_at_once(lab: Lab, draw: random.Random) -> Verdict:
    workdir = lab.new()
    first = lab.start(workdir)
    time.sleep(draw.uniform(0.0, 6.0))
    second = lab.start(workdir)
    ended = [one.wait(DEADLINE) for one in (first, second)]
    detail = f"codes {ended[0].code} and {ended[1].code}"
    if not all(one.code == 0 or one.is_clear for one in ended):
        bad = next(one for one in ended if one.code and not one.is_clear)
        return Verdict("two runs at once", detail, "lost", bad.error.strip()[-400:])
    return judge(lab, workdir, "two runs at once", detail)


@kind
def workdir_renamed(lab: Lab, draw: random.Random) -> Verdict:
    workdir = lab.half()
    return judge(lab, workdir.rename(lab.new()), "workdir renamed", "between two starts")


@kind
def finished_run_damaged(lab: Lab, draw: random.Random) -> Verdict:
    """The same command on a finished run whose result is gone or damaged."""
    workdir = shutil.copytree(lab.folder / "whole", lab.new())
    how = damage(workdir / "result.json", draw.choice(DAMAGES), draw)
    return judge(lab, workdir, "finished run damaged", f"result.json {how}")


HOSTILE = (
    *("optim.lr=inf", "optim.lr=nan", "optim.lr=1e39", "optim.lr=-1", "optim.weight_decay=1e38", "optim.beta2=2"),
    *("model.width=1000000000", "model.patch=(0,0)", "model.heads=0", "model.depth=-1", "data.batch_size=0"),
    *("data.transform.size=(100000,100000)", "data.threads=0", "data.prefetch=0", "log.watchdog=inf", "seed=-1"),
    *("optim.freeze=('[',)", "duration.amount=nan", "duration.amount=1e300", "checkpoint.keep=0", "loss.head_bias=inf"),
    *("evaluation.validation.split=nonesuch", "checkpoint.best=nonesuch", "schedule.kind=nonesuch", "mesh.data=7"),
    *("init.path=/nonexistent/weights", "log.profile_from=-5", "evaluation.batch_size=0", "log.every.amount=0"),
)


@kind
def hostile_override(lab: Lab, draw: random.Random) -> Verdict:
    """Refused in one sentence, before anything is written."""
    workdir, override = lab.new(), draw.choice(HOSTILE)
    ended = lab.start(workdir, f"--config.{override}").wait(DEADLINE)
    if ended.code != 2 or not ended.is_clear:
        return Verdict("hostile override", override, "lost", f"code {ended.code}: {ended.error.strip()[-400:]}")
    if workdir.exists():
        return Verdict("hostile override", override, "lost", "the workdir was written")
    return Verdict("hostile override", override, "refused", ended.error.strip().splitlines()[-1])


__all__ = ["KINDS", "Running", "outcome"]

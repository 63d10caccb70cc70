"""A campaign: a small run, disturbed by a seeded schedule, and the verdict on each disturbance.

A fault ends in one of three ways:
  equal    the run ends with the parameters, averages and results of the undisturbed run, to the last bit (on another
           mesh or another Python: to rounding); a file is read to what it holds, or has no checksum that could tell;
  refused  a start ends with code 1 or 2 and one sentence, no checkpoint has changed, and, where the fault can be taken
           back, the next start ends equal;
  lost     anything else.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tests.faults import starts
from tests.faults.starts import DEADLINE, Ended, Forks, Inside, Running

STEPS = 8
HALF = 4  # where the half-finished run stopped


@dataclasses.dataclass
class Verdict:
    kind: str
    detail: str
    answer: str  # equal, refused, lost
    why: str = ""


Kind = Callable[["Lab", random.Random], Verdict]


class Lab:
    """Where the runs of a campaign lie, with the undisturbed run and a half-finished one to start faults from.

    Args:
        folder: an empty one.
        python: another interpreter with the program's packages, for the faults that change it; None for none.
    """

    def __init__(self, folder: Path, python: str | None = None):
        self.folder, self.python, self.count = folder, python, 0
        self.forks = Forks(folder)
        self.references: dict[Any, dict[str, Any]] = {}  # of runs that differ from the undisturbed one on purpose

    @functools.cached_property
    def whole(self) -> Path:
        """The undisturbed run, made when it is first needed."""
        ended = self.start(self.folder / "whole").wait()
        assert ended.code == 0, ended.error
        return self.folder / "whole"

    @functools.cached_property
    def reference(self) -> dict[str, Any]:
        """What the undisturbed run ends with."""
        return outcome(self.whole)

    @functools.cached_property
    def stopped(self) -> tuple[Path, str, str]:
        """(a run that was stopped half-way, the step of its newest checkpoint, of its oldest)."""
        folder = self.folder / "half"
        running = self.start(folder)
        running.stop_at(lambda: (folder / "checkpoints" / str(HALF)).is_dir(), signal.SIGTERM)
        ended = running.wait()
        assert ended.code == 0, ended.error
        # SIGTERM takes effect a step or two later, so which checkpoints there are depends on the machine's speed.
        kept = sorted(int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit())
        return folder, str(kept[-1]), str(kept[0])

    @property
    def newest(self) -> str:
        return self.stopped[1]

    @property
    def older(self) -> str:
        return self.stopped[2]

    def start(self, workdir: Path, *flags: str, inside: Inside = Inside()) -> Running:  # noqa: B008 (frozen)
        """Starts the trainer in a fork."""
        arguments = [starts.CONFIG, f"--workdir={workdir}", *flags]
        return self.forks.start(starts.trainer, arguments, str(workdir), inside)

    def alone(self, workdir: Path, *flags: str, **how: Any) -> Running:
        """Starts the trainer in a process of its own."""
        return starts.alone(self.folder / "compiled", [starts.CONFIG, f"--workdir={workdir}", *flags], **how)

    def new(self) -> Path:
        """Returns the place of a run that does not exist yet."""
        self.count += 1
        return self.folder / f"run{self.count}"

    def half(self) -> Path:
        """Returns a copy of the half-finished run."""
        return shutil.copytree(self.stopped[0], self.new())

    def clear(self) -> None:
        """Deletes what a fault left."""
        for path in self.folder.glob("run*"):
            shutil.rmtree(path, ignore_errors=True)


def arrays(checkpoint: Path) -> dict[str, Any]:
    """Returns a checkpoint's parameters and averages, read as the weights command reads them."""
    from vit_scaling import names
    from vit_scaling.interop import run

    return names.flatten(run.read_arrays(checkpoint, ("params", "ema"))[1])


def outcome(workdir: Path) -> dict[str, Any]:
    """Returns what a finished run ends with: its step, its results, and a digest of its last checkpoint."""
    result = json.loads((workdir / "result.json").read_text())
    found = hashlib.sha256()
    for path, array in sorted(arrays(workdir / "checkpoints" / str(STEPS)).items()):
        found.update(f"{path} {array.shape} {array.dtype}".encode())
        found.update(array.tobytes())
    return {"step": result["step"], "metrics": result["metrics"], "arrays": found.hexdigest()}


def complete(workdir: Path) -> dict[str, str]:
    """Returns the digests of the files of all complete checkpoints of a run."""
    found = {}
    for folder in workdir.glob("checkpoints/*"):
        if folder.name.isdigit() and (folder / "commit_success.txt").exists():
            digest = hashlib.sha256()
            for path in sorted(folder.rglob("*")):
                with contextlib.suppress(OSError):
                    digest.update(f"{path.name} ".encode() + (path.read_bytes() if path.is_file() else b""))
            found[folder.name] = digest.hexdigest()
    return found


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> str | None:
    """Returns what is wrong after a start that failed: a checkpoint that changed, or that nothing newer replaced."""
    for name, digest in before.items():
        if name in after and after[name] != digest:
            return f"checkpoint {name} has changed"
    if before and (not after or max(map(int, after)) < max(map(int, before))):
        return f"checkpoint {max(before, key=int)} is gone"
    return None


def judge(
    lab: Lab,
    workdir: Path,
    kind: str,
    detail: str,
    *,
    first: Ended | None = None,
    before: Mapping[str, str] | None = None,
    heal: Callable[[], None] | None = None,
    reference: dict[str, Any] | None = None,
    again: Callable[[], Ended] | None = None,
) -> Verdict:
    """Starts a disturbed run again and says what became of it.

    Args:
        first: how the start that met the fault ended; None: the start made here meets it.
        before: `complete` of the workdir before that start.
        heal: takes the fault back (frees the disk ...) after a refusal; then the run must end equal.
        reference: what it must end with; None: with what the undisturbed run ended.
        again: makes the starts; None: starts without faults.
    """
    again = again or (lambda: lab.start(workdir).wait())
    before = complete(workdir) if before is None else before
    ended = again() if first is None else first
    refused = ended.code != 0
    if refused and not ended.is_clear:
        return Verdict(kind, detail, "lost", f"code {ended.code}: {ended.error.strip()[-600:]}")
    why = next((line for line in ended.error.splitlines() if line.startswith("error: ")), "")
    if refused and (wrong := changed(before, complete(workdir))):
        return Verdict(kind, detail, "lost", f"{wrong}; {why}")
    if refused and first is None and heal is None:
        return Verdict(kind, detail, "refused", why)
    if heal is not None:
        heal()
    if refused or first is not None:
        ended = again()
        if ended.code != 0:
            return Verdict(kind, detail, "lost", f"after the fault was gone: {ended.error.strip()[-600:]}")
    return compare(lab, workdir, kind, detail, "refused" if refused else "equal", reference, why)


def compare(
    lab: Lab,
    workdir: Path,
    kind: str,
    detail: str,
    answer: str = "equal",
    reference: dict[str, Any] | None = None,
    why: str = "",
) -> Verdict:
    """Compares what a run ended with; `answer` is the verdict if it is as it should be."""
    reference = lab.reference if reference is None else reference
    try:
        found = outcome(workdir)
    except Exception as error:
        return Verdict(kind, detail, "lost", f"no outcome: {type(error).__name__}: {error}")
    if found != reference:
        differing = [name for name in found if found[name] != reference[name]]
        return Verdict(kind, detail, "lost", f"ended with another {', '.join(differing)}")
    return Verdict(kind, detail, answer, why)


def draw(seed: int, number: int, names: list[str]) -> tuple[str, random.Random]:
    """Returns the kind of fault `number`, and where its details are drawn from: a function of the seed alone.

    Args:
        names: of the kinds of one cycle; a kind that is drawn more often is there several times.
    """
    cycle, place = divmod(number, len(names))
    return random.Random(f"{seed} order {cycle}").sample(names, len(names))[place], random.Random(f"{seed} {number}")


def run(
    lab: Lab,
    kinds: Mapping[str, Kind],
    seed: int,
    *,
    minutes: float,
    record: Path,
    numbers: list[int] | None = None,
    most: int = 10**6,
    often: Mapping[str, int] | None = None,
) -> list[Verdict]:
    """Draws faults in cycles of all kinds, each in a seeded order, until the time is up.

    Args:
        often: how many times a kind is in each cycle, where not once.
        record: a file of verdicts, one JSON row for each fault; faults that it has are not tried again.
        numbers: only these faults, again.
        most: how many faults are drawn.
    """
    rows = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    known = {row.pop("number"): Verdict(**row) for row in rows}
    names = [name for name in sorted(kinds) for _ in range((often or {}).get(name, 1))]
    ends = time.monotonic() + 60 * minutes
    with record.open("a") as file, tqdm(total=round(60 * minutes), unit="s", dynamic_ncols=True, delay=1) as bar:
        for number in range(most) if numbers is None else numbers:
            if time.monotonic() > ends:
                break
            if number in known and numbers is None:
                continue
            name, details = draw(seed, number, names)
            started = time.monotonic()
            try:
                verdict = kinds[name](lab, details)
            except Exception as error:  # of the campaign itself: no verdict is better than a wrong one
                verdict = Verdict(name, "", "lost", f"the campaign failed: {type(error).__name__}: {error}")
            known[number] = verdict
            file.write(json.dumps({"number": number} | dataclasses.asdict(verdict)) + "\n")
            file.flush()
            lab.clear()
            seconds = time.monotonic() - started
            bar.update(max(0, min(round(60 * minutes) - bar.n, round(seconds))))
            lost = [number for number, each in known.items() if each.answer == "lost"]
            bar.set_postfix_str(f"{len(known)} faults, {len(lost)} lost")
            if verdict.answer == "lost":
                bar.write(f"fault {number} (seed {seed}): lost, {name}, {verdict.detail}: {verdict.why}")
    return [known[number] for number in sorted(known)]


def table(verdicts: list[Verdict]) -> str:
    """Returns the table of a campaign: kind, tried, equal, refused clearly, lost."""
    lines = [f"{'kind':32s} {'tried':>6s} {'equal':>6s} {'refused':>8s} {'lost':>5s}"]
    for kind in [*sorted({verdict.kind for verdict in verdicts}), None]:
        answers = [verdict.answer for verdict in verdicts if kind in (None, verdict.kind)]
        counts = [answers.count(answer) for answer in ("equal", "refused", "lost")]
        lines.append(f"{kind or 'all':32s} {len(answers):6d} {counts[0]:6d} {counts[1]:8d} {counts[2]:5d}")
    return "\n".join(lines)


__all__ = ["DEADLINE", "Inside", "Kind", "Lab", "Verdict", "judge", "run", "table"]

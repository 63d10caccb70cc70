"""Files of a run that are damaged between two starts."""

import random
import shutil
from pathlib import Path

from tests.faults.campaign import Kind, Lab, Verdict, judge
from tests.faults.kinds.signals import moment

KINDS: dict[str, Kind] = {}
DAMAGES = ("truncated", "emptied", "deleted", "one bit flipped", "one bit flipped")


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


def damaged(pattern: str, label: str) -> None:
    def fault(lab: Lab, draw: random.Random) -> Verdict:
        workdir = lab.half()
        own = pattern.format(newest=lab.newest, older=lab.older)
        path = draw.choice(sorted(path for path in workdir.glob(own) if path.is_file()))
        how = damage(path, draw.choice(DAMAGES), draw)
        return judge(lab, workdir, label, f"{path.relative_to(workdir)} {how}")

    KINDS[label] = fault


damaged("checkpoints/{newest}/**/*", "newest checkpoint damaged")
damaged("checkpoints/{older}/**/*", "older checkpoint damaged")
damaged("*.json*", "side file damaged")


def all_damaged(lab: Lab, draw: random.Random) -> Verdict:
    """Every checkpoint is damaged: one sentence, nothing is changed; with the newest back, the run ends equal."""
    workdir, details, kept = lab.half(), [], {}
    for folder in sorted((workdir / "checkpoints").iterdir()):
        path = draw.choice(sorted(path for path in folder.glob("state/**/*") if path.is_file() and path.stat().st_size))
        kept[path] = path.read_bytes()
        details.append(f"{folder.name}: {damage(path, 'truncated', draw)}")

    def heal() -> None:
        for path, data in kept.items():
            if path.parent.is_dir():
                path.write_bytes(data)

    return judge(lab, workdir, "every checkpoint damaged", "; ".join(details), heal=heal)


KINDS["every checkpoint damaged"] = all_damaged


def half_copied(lab: Lab, draw: random.Random) -> Verdict:
    workdir = lab.half()
    files = sorted(path for path in (workdir / "checkpoints" / lab.newest).rglob("*") if path.is_file())
    kept = draw.randrange(len(files))
    for path in files[kept:]:
        path.unlink()
    return judge(lab, workdir, "checkpoint half copied", f"{kept} of {len(files)} files")


KINDS["checkpoint half copied"] = half_copied


def of_another_step(lab: Lab, draw: random.Random) -> Verdict:
    workdir, label = lab.half(), "checkpoint of another step"
    taken = {path.name for path in (workdir / "checkpoints").iterdir()}
    other = draw.choice([step for step in ("1", "3", "5", "6", "7", "99") if step not in taken])
    if draw.random() < 0.3:
        (workdir / "checkpoints" / other).write_text("")
        return judge(lab, workdir, label, f"{other} is a file")
    shutil.copytree(workdir / "checkpoints" / lab.newest, workdir / "checkpoints" / other)
    return judge(lab, workdir, label, f"{other} is a copy of {lab.newest}")


KINDS["checkpoint of another step"] = of_another_step


def workdir_renamed(lab: Lab, draw: random.Random) -> Verdict:
    """The workdir is renamed, between two starts or while the run goes on."""
    workdir, label = lab.half(), "workdir renamed"
    if draw.random() < 0.3:
        return judge(lab, workdir.rename(lab.new()), label, "between two starts")
    running, target = lab.start(workdir), lab.new()
    detail, come = moment(workdir, draw)
    running.stop_at(come)
    workdir.rename(target)
    ended = running.wait()
    if ended.code != 0 and not ended.is_clear:
        return Verdict(label, detail, "lost", f"code {ended.code}: {ended.error.strip()[-600:]}")
    return judge(lab, target, label, f"{detail}, code {ended.code}")


KINDS["workdir renamed"] = workdir_renamed


def finished_damaged(lab: Lab, draw: random.Random) -> Verdict:
    """The same command on a finished run, one of whose files is gone or damaged."""
    workdir = shutil.copytree(lab.whole, lab.new())
    path = draw.choice(sorted(workdir.glob("*.json*")))
    how = damage(path, draw.choice(DAMAGES), draw)
    return judge(lab, workdir, "finished run damaged", f"{path.name} {how}")


KINDS["finished run damaged"] = finished_damaged

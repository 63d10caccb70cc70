"""Disks that are full, fail, or cannot be written, until the fault is gone."""

import contextlib
import errno
import random
import shutil
import subprocess
from pathlib import Path

from tests.faults.campaign import Kind, Lab, Verdict, complete, judge
from tests.faults.starts import OPENS, READS, WRITES, Inside

KINDS: dict[str, Kind] = {}


def failing(label: str, what: int, number: int, most: int) -> None:
    """Adds a kind: from a random call on, some or all calls on files of the workdir fail with one errno."""

    def fault(lab: Lab, draw: random.Random) -> Verdict:
        workdir = draw.choice((lab.new, lab.half))()
        after, count = draw.randrange(most), draw.choice((1, 3, 10**9, 10**9))
        before = complete(workdir)
        ended = lab.start(workdir, inside=Inside(files=(what, number, after, count))).wait()
        detail = f"{min(count, 10**6)} calls after {after}, code {ended.code}"
        return judge(lab, workdir, label, detail, first=ended, before=before)

    KINDS[label] = fault


failing("no space left (ENOSPC)", WRITES, errno.ENOSPC, 400)
failing("write error (EIO)", WRITES, errno.EIO, 400)
failing("read error (EIO)", READS, errno.EIO, 100)
failing("quota exceeded (EDQUOT)", WRITES, errno.EDQUOT, 400)
failing("read-only file system (EROFS)", OPENS, errno.EROFS, 120)


def limit_of_a_file(lab: Lab, draw: random.Random) -> Verdict:
    """No file may grow beyond a few kilobytes (RLIMIT_FSIZE)."""
    workdir, limit = draw.choice((lab.new, lab.half))(), 1024 * draw.choice((1, 4, 8, 16, 32))
    before = complete(workdir)
    ended = lab.start(workdir, inside=Inside(limit_bytes=limit)).wait()
    return judge(lab, workdir, "limit of a file's size", f"{limit} bytes", first=ended, before=before)


KINDS["limit of a file's size"] = limit_of_a_file


def full(lab: Lab, draw: random.Random) -> Verdict:
    """A small file system that is full; where none can be mounted, the library's ENOSPC stands in for it."""
    workdir, kilobytes = lab.new(), draw.choice((64, 256, 512, 1024, 2048, 4096))
    workdir.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(workdir)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        return KINDS["no space left (ENOSPC)"](lab, draw)
    try:
        ended = lab.start(workdir / "run").wait()
        subprocess.run([*mount[:3], "-o", "remount,size=64m", "tmpfs", str(workdir)], check=True)
        return judge(lab, workdir / "run", "full file system", f"{kilobytes} kB", first=ended)
    finally:
        _unmount(workdir)


def _unmount(folder: Path) -> None:
    with contextlib.suppress(subprocess.SubprocessError):
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)
    shutil.rmtree(folder, ignore_errors=True)


KINDS["full file system"] = full

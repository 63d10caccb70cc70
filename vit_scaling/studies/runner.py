"""Runs the runs of a study or a sweep, each in a process and a folder of its own.

A killed study continues where it was, and a run that fails does not stop the others.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from vit_scaling import UserError, flops
from vit_scaling import config as config_lib
from vit_scaling.config import Config
from vit_scaling.data.sources import SourceConfig, open_source
from vit_scaling.training import identity


@dataclasses.dataclass(frozen=True)
class Job:
    """One run. Its folder is `runs/<name>`; `needs` names the trunk that must have finished before."""

    name: str
    group: str  # table.SWEEP, table.SEED, "trunk" or the name of a comparison or claim
    size: int
    config: Config
    steps: int  # from the start of its trunk
    own_steps: int
    data_images: int
    needs: str | None = None


def folder(workdir: Path, name: str) -> Path:
    return workdir / "runs" / name


def done(job: Job, workdir: Path) -> bool:
    """Whether the run has finished.

    Raises:
        UserError: its folder holds a run of another config.
    """
    record, result = folder(workdir, job.name) / "config.json", folder(workdir, job.name) / "result.json"
    if not record.exists() or not result.exists():
        return False
    resolved = config_lib.resolve(job.config, job.data_images)
    stored = json.loads(record.read_text())["config"]
    if differing := identity.differences(stored, config_lib.to_dict(resolved)):
        raise UserError(f"{workdir} belongs to another study: in {job.name} {differing[0]}; name another --workdir")
    return True


def lock(workdir: Path, name: str) -> IO[str]:
    """Returns the run's lock, which the process holds until it ends; waits while another process holds it.

    So a run that outlives a killed study is waited for, not run twice in one folder.
    """
    path = workdir / "locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"another process runs {name}; waiting for it", flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


def work(job: Job) -> float:
    """Returns the training FLOPs of the run's own steps."""
    cost = flops.count(job.config.model, image_size=job.config.data.transform.size, num_classes=num_classes(job.config))
    return cost.train_flops * job.own_steps * job.config.data.batch_size


def num_classes(config: Config) -> int:
    """Returns the length of the logits that the run's training set asks for."""
    return training_set(config)[1]


def training_set(config: Config) -> tuple[int, int]:
    """Returns the numbers of examples and of classes. Runs that share a set open it once."""
    return _training_set(json.dumps(dataclasses.asdict(config.data.train)))


@functools.lru_cache(maxsize=64)
def _training_set(source: str) -> tuple[int, int]:
    opened = open_source(SourceConfig.from_json(json.loads(source)))
    return len(opened), opened.num_classes


def run_all(
    jobs: Sequence[Job],
    workdir: Path,
    command: Callable[[Job], list[str]],
    *,
    parallel: int,
    say: Callable[[str], None],
) -> dict[str, str]:
    """Runs what has not finished, each in a process of its own, and returns {name: reason} of what failed.

    Args:
        jobs: as `plan` orders them.
        command: of a job's process.
        parallel: processes at a time; with more than one, process i sees GPU i alone and has its share of the cores.
        say: prints a line of progress.
    """
    finished = {job.name for job in jobs if done(job, workdir)}
    waiting = [job for job in jobs if job.name not in finished]
    works = {job.name: work(job) for job in jobs}
    total, left = len(jobs), sum(works[job.name] for job in waiting)
    if finished:
        say(f"{len(finished)} of {total} runs have finished before")

    def remaining(runs: int) -> str:
        """By the clocks of what has finished, earlier too: steps take time by their FLOPs, all else by the run."""
        clocks = [(works[job.name], _clock(job, workdir)) for job in jobs if job.name in finished]
        if not clocks:
            return ""
        stepping = sum(seconds["step"] for _, seconds in clocks)
        around = sum(sum(seconds.values()) for _, seconds in clocks) - stepping
        seconds = stepping / sum(spent for spent, _ in clocks) * left + around / len(clocks) * runs
        return f"; about {seconds / parallel / 60:.0f} min left"

    failed: dict[str, str] = {}
    running: dict[int, tuple[Job, subprocess.Popen, float]] = {}
    try:
        while waiting or running:
            for job in [job for job in waiting if job.needs in failed]:
                waiting.remove(job)
                left -= works[job.name]
                failed[job.name] = f"its trunk {job.needs} failed"
            for slot in set(range(parallel)) - set(running):
                ready = next((job for job in waiting if job.needs is None or job.needs in finished), None)
                if ready is not None:
                    waiting.remove(ready)
                    running[slot] = ready, _start(ready, workdir, command(ready), slot, parallel), time.monotonic()
            time.sleep(0.1)
            for slot, (job, process, since) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[slot]
                seconds = time.monotonic() - since
                left -= works[job.name]
                if process.returncode == 0 and done(job, workdir):
                    finished.add(job.name)
                    outcome = f"finished in {seconds:.0f} s"
                else:
                    failed[job.name] = _last_line(log_file(workdir, job.name))
                    outcome = f"failed after {seconds:.0f} s: {failed[job.name]}"
                ended = len(finished) + len(failed)
                say(f"[{ended}/{total}] {job.name} {outcome}" + remaining(len(waiting) + len(running)))
    finally:
        for _, process, _ in running.values():
            process.send_signal(signal.SIGTERM)  # it saves where it is
        for _, process, _ in running.values():
            process.wait()
    return failed


def _clock(job: Job, workdir: Path) -> dict[str, float]:
    """Returns the seconds of a finished run by what they went into."""
    return json.loads((folder(workdir, job.name) / "result.json").read_text())["seconds"]


def log_file(workdir: Path, name: str) -> Path:
    return workdir / "logs" / f"{name}.txt"


def _start(job: Job, workdir: Path, command: list[str], slot: int, parallel: int) -> subprocess.Popen:
    path = log_file(workdir, job.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if parallel > 1:
        environment["CUDA_VISIBLE_DEVICES"] = str(slot)
    # Runs of one size compile the same programs; the second one reads them.
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(workdir.absolute() / "compiled"))
    with path.open("w") as log:
        # A session of its own: Ctrl-C reaches the study, which then asks its runs to save and stop.
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    # Operations that are split over cores would wait for another run's. All runs get the same number of cores, because
    # the order in which XLA adds on a CPU depends on that number.
    if parallel > 1 and hasattr(os, "sched_setaffinity"):  # Linux
        cores = sorted(os.sched_getaffinity(0))
        share = len(cores) // parallel
        if share:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.sched_setaffinity(process.pid, cores[slot * share : (slot + 1) * share])
    return process


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else "it said nothing"

"""One run for each workdir: who holds the lock, who is refused, and what frees it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clocks import FakeClock
from vit_scaling import UserError
from vit_scaling.training import lock

ROOT = Path(__file__).parents[2]


def test_a_second_run_in_the_same_workdir_is_refused_by_host_and_process(tmp_path: Path) -> None:
    """The kernel or a growing count shows that the first lives."""
    path = tmp_path / "lock"
    with lock._hold(path) as token:
        assert lock._sees(path, token)
        with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on {socket.gethostname()}; wait"):
            lock._hold(path).__enter__()
    assert path.read_text() == ""

    def other(beats: int) -> None:
        path.write_text(json.dumps({"host": "far", "pid": 7, "token": "t", "beats": beats}))

    other(3)
    with pytest.raises(UserError, match="in use by process 7 on far"):
        lock._hold(path, sleep=lambda _: other(5)).__enter__()
    with lock._hold(path, sleep=lambda _: None):  # its count stands still: it is dead
        assert json.loads(path.read_text())["pid"] == os.getpid()


@contextlib.contextmanager
def owner(workdir: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of a workdir until it is killed."""
    code = (
        "import sys, time; from pathlib import Path; from vit_scaling.training import lock\n"
        "with lock.locked(Path(sys.argv[1])):\n"
        "    print('held', flush=True); time.sleep(600)\n"
    )
    command = [sys.executable, "-c", code, str(workdir)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_kill_nine_of_the_owner_frees_the_workdir(tmp_path: Path) -> None:
    """Two real processes: the second is refused while the first lives, at once, and not after its death."""
    with owner(tmp_path) as first:
        before = (tmp_path / "lock").read_text()
        with pytest.raises(UserError, match=rf"in use by process {first.pid} on {socket.gethostname()}"):
            lock.locked(tmp_path).__enter__()
        assert (tmp_path / "lock").read_text() == before  # a refusal leaves the owner's name
        first.send_signal(signal.SIGKILL)
        first.wait()
        with lock.locked(tmp_path):
            assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_process_that_sees_another_folder_finds_out(tmp_path: Path) -> None:
    """After VISIBLE_SECONDS, in which a network file system may show the file of process 0."""
    path, slept = tmp_path / "lock", []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if sum(slept) == 50.0:
            path.write_text(json.dumps({"token": "late"}))

    assert lock._sees(path, "late", sleep)
    assert sum(slept) == 50.0
    assert not lock._sees(path, "never", sleep)
    assert sum(slept) == 50.0 + lock.VISIBLE_SECONDS


def test_the_owner_counts_heartbeats() -> None:
    beats: list[int] = []

    def beat(count: int) -> None:
        beats.append(count)
        if count == 2:
            raise OSError("a disk that is full")  # does not end the thread

    clock = FakeClock(3)
    with lock._beating(beat, clock):
        clock.over.wait(20.0)
    assert beats == [1, 2, 3]
    assert clock.waits == [lock.HEARTBEAT_SECONDS] * 4

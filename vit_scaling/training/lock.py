"""One run for each workdir: a lock that the owner's death releases, and a check that all processes see one folder.

The owner counts heartbeats in the file `lock`. On a local disk the kernel holds a lock on that file too. A bucket has
no such locks: there heartbeats alone decide, so a start that finds the lock of a run that was killed waits for two of
them, and an owner that finds another's name in its lock writes no more heartbeats.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vit_scaling import UserError, paths
from vit_scaling.parallel import processes

HEARTBEAT_SECONDS = 5.0
VISIBLE_SECONDS = 60.0  # network file systems may show a new file this much later


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds workdir/lock, in process 0, for as long as the run lasts; every process checks that it sees that file.

    Raises:
        UserError: another run holds it, named by host and process id; or a process sees another folder.
    """
    with contextlib.ExitStack() as exits:
        hold = _hold_object if paths.in_bucket(workdir) else _hold
        token = processes.first(lambda: exits.enter_context(hold(workdir / "lock")))
        with processes.together():
            if not processes.is_first() and not _sees(workdir / "lock", token):
                raise UserError(
                    f"{paths.absolute(workdir)} on {socket.gethostname()} is not the folder that process 0 sees under "
                    f"this name; all processes of a run need one shared workdir"
                )
        yield


@contextlib.contextmanager
def _hold(path: Path, host: str | None = None, sleep: Callable[[float], None] = time.sleep) -> Iterator[str]:
    """Holds the lock and yields its token.

    The kernel releases a lock when its owner dies, but does not share it between hosts on every file system. So the
    owner also counts heartbeats in the file, and a count that grows is a run on another host that is alive.
    """
    host = socket.gethostname() if host is None else host
    owner = None
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _refusal(path, _read(path)) from None
        except OSError:
            pass  # a file system without locks: heartbeats alone decide
        before = _read(path)
        if before and before.get("host") != host:
            _refuse_if_alive(path, before, sleep)
        owner = _owner(host)
        _write(file, owner | {"beats": 0})
        with _beating(lambda beats: _write(file, owner | {"beats": beats})):
            yield owner["token"]
    finally:
        if owner is not None:
            os.ftruncate(file, 0)
        os.close(file)


@contextlib.contextmanager
def _hold_object(path: Path, host: str | None = None, sleep: Callable[[float], None] = time.sleep) -> Iterator[str]:
    """Holds the lock of a workdir in a bucket and yields its token.

    Of two that start at once the later one wins: each writes its name, waits, and reads who is there.
    """
    owner = _owner(socket.gethostname() if host is None else host)
    if before := _read(path):
        _refuse_if_alive(path, before, sleep)
    path.write_text(json.dumps(owner | {"beats": 0}))
    sleep(2.0)
    if (now := _read(path)).get("token") != owner["token"]:
        raise _refusal(path, now)

    def write_own(text: str) -> None:
        if _read(path).get("token") == owner["token"]:  # another run takes over from one that stood still
            path.write_text(text)

    try:
        with _beating(lambda beats: write_own(json.dumps(owner | {"beats": beats}))):
            yield owner["token"]
    finally:
        with contextlib.suppress(Exception):  # the next start waits two heartbeats instead
            write_own("{}")


def _owner(host: str) -> dict[str, Any]:
    return {"host": host, "pid": os.getpid(), "token": os.urandom(8).hex()}


def _refuse_if_alive(path: Path, before: dict[str, Any], sleep: Callable[[float], None]) -> None:
    sleep(2 * HEARTBEAT_SECONDS)
    if _read(path).get("beats") != before.get("beats"):
        raise _refusal(path, before)


@contextlib.contextmanager
def _beating(beat: Callable[[int], None], stop: threading.Event | None = None) -> Iterator[None]:
    """Calls `beat` with 1, 2, ... every HEARTBEAT_SECONDS, in a thread; `stop` ends it."""
    stop = threading.Event() if stop is None else stop

    def loop() -> None:
        beats = 0
        while not stop.wait(HEARTBEAT_SECONDS):
            beats += 1
            with contextlib.suppress(Exception):  # a full disk or a bucket that fails is reported by what has to write
                beat(beats)

    thread = threading.Thread(target=loop, name="workdir lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _write(file: int, owner: dict[str, Any]) -> None:
    text = json.dumps(owner).encode()
    os.pwrite(file, text, 0)
    os.ftruncate(file, len(text))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _refusal(path: Path, owner: dict[str, Any]) -> UserError:
    who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
    return UserError(f"{path.parent} is in use by {who}; wait for that run, stop it, or name another --workdir")


def _sees(path: Path, token: str, sleep: Callable[[float], None] = time.sleep) -> bool:
    for _ in range(int(VISIBLE_SECONDS)):
        if _read(path).get("token") == token:
            return True
        sleep(1.0)
    return False

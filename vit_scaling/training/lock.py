"""One run for each workdir: a lock that the owner's death releases, and a check that all processes see one folder."""

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

from vit_scaling import UserError
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
        token = processes.first(lambda: exits.enter_context(_hold(workdir / "lock")))
        with processes.together():
            if not processes.is_first() and not _sees(workdir / "lock", token):
                raise UserError(
                    f"{workdir.absolute()} on {socket.gethostname()} is not the folder that process 0 sees under this "
                    f"name; all processes of a run need one shared workdir"
                )
        yield


@contextlib.contextmanager
def _hold(path: Path, host: str | None = None, sleep: Callable[[float], None] = time.sleep) -> Iterator[str]:
    """Holds the lock and yields its token.

    The kernel releases a lock when its owner dies, but does not share it between hosts on every file system. So the
    owner also counts heartbeats in the file, and a count that grows is a run on another host that is alive.
    """
    host = socket.gethostname() if host is None else host
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
            sleep(2 * HEARTBEAT_SECONDS)
            if _read(path).get("beats") != before.get("beats"):
                raise _refusal(path, before)
        token = os.urandom(8).hex()
        owner = {"host": host, "pid": os.getpid(), "token": token}
        _write(file, owner | {"beats": 0})
        stop = threading.Event()
        thread = threading.Thread(target=_beat, args=(file, owner, stop), name="workdir lock", daemon=True)
        thread.start()
        try:
            yield token
        finally:
            stop.set()
            thread.join()
            os.ftruncate(file, 0)
    finally:
        os.close(file)


def _beat(file: int, owner: dict[str, Any], stop: threading.Event) -> None:
    beats = 0
    while not stop.wait(HEARTBEAT_SECONDS):
        beats += 1
        with contextlib.suppress(OSError):  # a full disk is reported by what needs to be written
            _write(file, owner | {"beats": beats})


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


def _sees(path: Path, token: str) -> bool:
    end = time.monotonic() + VISIBLE_SECONDS
    while _read(path).get("token") != token:
        if time.monotonic() > end:
            return False
        time.sleep(1.0)
    return True

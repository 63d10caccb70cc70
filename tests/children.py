"""Other processes, as a test sees them."""

import subprocess
import time
from collections.abc import Iterable


def of(pid: int) -> list[int]:
    """Returns the children of a process."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(child) for child in found.stdout.split()]


def end(pids: Iterable[int], seconds: float = 20.0) -> bool:
    """Waits until none of these processes runs any more; returns whether that came to be."""

    def running(pid: int) -> bool:
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
        return bool(state) and not state.startswith("Z")

    deadline = time.monotonic() + seconds
    while any(map(running, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True

"""How a run ends early: a request to stop that all processes follow at the same step, and a watchdog."""

import faulthandler
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

SIGNALS = (signal.SIGTERM, signal.SIGINT)

# Added to the watchdog's time where XLA may be compiling: minutes for a large model on many chips.
COMPILE_SECONDS = 1800.0


class Stopped(Exception):  # noqa: N818 (not an error)
    """The run was asked to stop during an evaluation."""


def _listen(hear: Callable[[int], None]) -> tuple[int, socket.socket]:
    """Calls `hear`, in a thread and at once, for each of SIGNALS that has a Python handler.

    Returns:
        The wakeup file descriptor of before, and a socket whose closing ends the thread.
    """
    reading, writing = socket.socketpair()
    writing.setblocking(False)

    def read() -> None:
        while number := reading.recv(1):
            if number[0] in SIGNALS:
                hear(number[0])
        reading.close()

    before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=read, name="signals", daemon=True).start()
    return before, writing


def exit_on_interrupt() -> None:
    """Makes Ctrl-C end this process at once, with one line, also while XLA compiles; for commands that save nothing."""

    def leave(number: int) -> None:
        if number == signal.SIGINT:
            os.write(2, b"stopped\n")
            os._exit(128 + number)

    _kept_open.append(_listen(leave)[1])


_kept_open: list[socket.socket] = []


class StopRequest:
    """Turns the first SIGTERM or SIGINT to any process into the same answer for all; the second ends at once.

    Python runs signal handlers between two of its own instructions, so not while XLA compiles for minutes. A thread
    that the signal itself wakes acknowledges the first one at once, and exits at the second.
    """

    def __init__(self) -> None:
        self.granted = False  # whether `asked` has answered yes
        self._noticed = False  # a signal came to this process
        self._handled = 0
        self._first = threading.Lock()
        self._previous: dict[int, Any] = {}
        self._any_process: _AnyProcess | None = None

    def __enter__(self) -> "StopRequest":
        self._heard = 0
        self._previous_fd, self._writing = _listen(self._hear)
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal in Python's main thread, as soon as that runs Python."""
        self._acknowledge()
        self._handled += 1
        if self._handled > 1:
            os._exit(128 + number)

    def _hear(self, number: int) -> None:
        """Handles the same signal in a thread, at once."""
        self._acknowledge()
        self._heard += 1
        if self._heard > 1:
            os._exit(128 + number)

    def _acknowledge(self) -> None:
        self._noticed = True
        if self._first.acquire(blocking=False):  # and never released
            os.write(2, b"stop requested: saving after this step or compilation; a second signal ends it\n")

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._writing.close()

    def asked(self) -> bool:
        """Returns whether to stop now.

        All processes must call it at the same points of the run and get the same answer. With several, a call
        all-reduces the stop flag beside the step and returns the flag of the call before, so it never blocks training.
        """
        if self.granted or jax.process_count() == 1:
            self.granted = self.granted or self._noticed
            return self.granted
        self._any_process = self._any_process or _AnyProcess()
        self.granted = self._any_process.reduce(self._noticed)
        return self.granted


class _AnyProcess:
    """The logical or of one flag for each process, all-reduced on the devices and read one call later."""

    def __init__(self) -> None:
        mesh = Mesh(np.asarray(jax.devices()), "all", axis_types=(jax.sharding.AxisType.Auto,))
        self._each = NamedSharding(mesh, PartitionSpec("all"))
        self._combine = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._last: jax.Array | None = None

    def reduce(self, flag: bool) -> bool:
        last = self._last
        with jax.transfer_guard_host_to_device("allow"):
            flags = jax.make_array_from_callback((jax.device_count(),), self._each, lambda _: np.asarray([flag]))
        self._last = self._combine(flags)
        return last is not None and bool(jax.device_get(last))


class Watchdog:
    """Ends a process that makes no progress: stacks of all threads to stderr, exit code 1.

    It is faulthandler's, in C, and works while Python waits for a device that never answers.

    Args:
        seconds: the longest time between two heartbeats; 0 for no watchdog.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds

    def beat(self, *, compiles: bool = False) -> None:
        """Notes progress. `compiles`: XLA may compile before the next heartbeat."""
        if self._seconds:
            seconds = self._seconds + (COMPILE_SECONDS if compiles else 0.0)
            faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or 2)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()

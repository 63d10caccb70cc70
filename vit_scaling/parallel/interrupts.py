"""How a run ends before its end: a request to stop that all processes heed at one step, and a watchdog."""

import faulthandler
import signal
import sys
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

SIGNALS = (signal.SIGTERM, signal.SIGINT)

# Added to the watchdog's time where XLA may be compiling: minutes for a large model on many chips.
COMPILE_SECONDS = 1800.0


class Stopped(Exception):  # noqa: N818 (no error)
    """The run was asked to stop while it was measuring something."""


class StopRequest:
    """Turns the first SIGTERM or SIGINT to any process into the same answer for all; the second ends at once."""

    def __init__(self) -> None:
        self.granted = False  # whether `asked` has said yes
        self._noticed = False  # a signal came to this process
        self._previous: dict[int, Any] = {}
        self._any_process: _AnyProcess | None = None

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._noticed = True
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)  # the kernel's: it acts even where Python is waiting for a device

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Returns whether to stop now.

        All processes must call it at the same points of the run and get the same answer. With several, a call sends
        this process's word over the devices and returns what all said at the call before it, so that nobody waits.
        """
        if self.granted or jax.process_count() == 1:
            self.granted = self.granted or self._noticed
            return self.granted
        self._any_process = self._any_process or _AnyProcess()
        self.granted = self._any_process.says(self._noticed)
        return self.granted


class _AnyProcess:
    """One bit from each process, combined on the devices and read a call later."""

    def __init__(self) -> None:
        mesh = Mesh(np.asarray(jax.devices()), "all", axis_types=(jax.sharding.AxisType.Auto,))
        self._each = NamedSharding(mesh, PartitionSpec("all"))
        self._combine = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._last: jax.Array | None = None

    def says(self, word: bool) -> bool:
        last = self._last
        with jax.transfer_guard_host_to_device("allow"):
            words = jax.make_array_from_callback((jax.device_count(),), self._each, lambda _: np.asarray([word]))
        self._last = self._combine(words)
        return last is not None and bool(jax.device_get(last))


class Watchdog:
    """Ends a process that makes no progress: stacks of all threads to stderr, exit code 1.

    It is faulthandler's, in C, and works while Python waits for a device that will never answer.

    Args:
        seconds: the longest time between two beats; 0 for no watchdog.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds

    def beat(self, *, compiles: bool = False) -> None:
        """There was progress. `compiles`: before the next beat something may be compiled."""
        if self._seconds:
            seconds = self._seconds + (COMPILE_SECONDS if compiles else 0.0)
            faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or 2)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()

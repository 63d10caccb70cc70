"""Clocks for tests, on which no time passes."""

import threading


class FakeClock(threading.Event):
    """An event that a thread waits for: `count` of its waits time out at once, the next one ends.

    Attributes:
        waits: the seconds of each wait.
        over: set when the last wait has ended.
    """

    def __init__(self, count: int):
        super().__init__()
        self.waits: list[float | None] = []
        self.over = threading.Event()
        self._left = count

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout)
        self._left -= 1
        if self._left < 0:
            self.over.set()
        return self._left < 0

"""Prefetching: batches in their order from threads or worker processes, and which record is at fault when none comes.

Every reading thread owns one row of a small table of heartbeats, `ReadStatus`, where it notes which record it reads
and since when. The table lies in a temporary file that worker processes map into memory: a note costs about a
microsecond and needs no lock, as every cell has one writer. So a stalled read or a dead worker is reported with the
record's name.
"""

import itertools
import os
import signal
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import grain
import numpy as np
from absl import flags

from vit_scaling import TransientError
from vit_scaling.data.config import DataConfig
from vit_scaling.data.sources import Source
from vit_scaling.data.workers import end_with_parent

Batch = dict[str, np.ndarray]

_START_SECONDS = 120.0  # worker processes may take this long to start on a busy host

PID, RECORD, SINCE, SKIPPED, ALPHA, WARNING, UNLABELLED, UNMATCHED, COLUMNS = range(9)
COUNTED = {
    "skipped": SKIPPED,
    "alpha": ALPHA,
    "warning": WARNING,
    "unlabelled": UNLABELLED,
    "unmatched": UNMATCHED,
}  # what happened to images, beyond being read
_worker = 0  # the number of this worker process, 0 in the training process


class Reading(NamedTuple):
    """A thread that is reading a record."""

    pid: int
    record: int
    seconds: float


class ReadStatus:
    """The table of heartbeats: one row for each thread of each reading process.

    A copy that is pickled to another process shows and writes the same table. The file is deleted with the original.
    """

    def __init__(self, data: DataConfig):
        self._threads = data.threads
        descriptor, self._path = tempfile.mkstemp(prefix="vit_scaling_reads_")
        os.truncate(descriptor, max(data.workers, 1) * data.threads * COLUMNS * 8)
        os.close(descriptor)
        weakref.finalize(self, Path(self._path).unlink, missing_ok=True)
        self._open()

    def _open(self) -> None:
        self._table = np.memmap(self._path, np.int64, "r+").reshape(-1, COLUMNS)
        self._own = threading.local()
        self._count = itertools.count()

    def __getstate__(self):
        return {"_path": self._path, "_threads": self._threads}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open()

    def _row(self) -> np.ndarray:
        if not hasattr(self._own, "row"):
            self._own.row = self._table[_worker * self._threads + next(self._count) % self._threads]
            self._own.row[PID] = os.getpid()
        return self._own.row

    def begin(self, record: int) -> None:
        """This thread starts to read a record."""
        row = self._row()
        row[RECORD] = record
        row[SINCE] = time.monotonic_ns()

    def end(self) -> None:
        """This thread has the record, or an exception."""
        self._row()[SINCE] = 0

    def count(self, event: str) -> None:
        """Counts one of `COUNTED`."""
        self._row()[COUNTED[event]] += 1

    @property
    def counts(self) -> dict[str, int]:
        """How many images were skipped, composited, decoded with a warning, or unlabelled, over all threads."""
        return {event: int(self._table[:, column].sum()) for event, column in COUNTED.items()}

    def reading(self) -> list[Reading]:
        """Everything that is being read now, the longest first."""
        now = time.monotonic_ns()
        rows = [
            Reading(int(r[PID]), int(r[RECORD]), (now - int(r[SINCE])) / 1e9) for r in self._table.copy() if r[SINCE]
        ]
        return sorted(rows, key=lambda row: -row.seconds)


class Batches:
    """An iterator over batches that are read ahead; `close()` it, drop it, or end Python to stop the prefetcher.

    Args:
        batches: batch number i at `batches[i]`; it is pickled to worker processes.
        source: names the records in errors.
        status: where `batches` notes what it reads.
        data: workers, threads, prefetch and timeout.
    """

    def __init__(self, batches: Any, source: Source, status: ReadStatus, data: DataConfig):
        _one_thread_per_image()
        self._source = source
        self._status = status
        self._timeout = data.timeout
        self._workers: _Workers | None = None
        if data.workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain's workers read flags, also in a program that has none
            self._workers = _Workers(batches, data)
            self._threads = _Threads(self._workers.take, len(batches), threads=1, depth=1)
        else:
            self._threads = _Threads(batches.__getitem__, len(batches), threads=data.threads, depth=data.prefetch)
        # Called once: by `close`, when the batches are dropped, or when Python ends, while threads can still end too:
        # Python kills those that are left, and inside a decoder that aborts the process.
        self._stop = weakref.finalize(self, _stop, self._threads, self._workers)

    @property
    def counts(self) -> dict[str, int]:
        """{"skipped", "alpha", ...}: reads of such images so far, those of batches read ahead included."""
        return self._status.counts

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        asked = time.monotonic()
        while not self._threads.ready(seconds=1.0):
            reading = self._status.reading()
            if reading and reading[0].seconds > self._timeout:
                self._abandon(reading[0].pid)
                raise TransientError(
                    f"{self._source.id(reading[0].record)} has been read for {reading[0].seconds:.0f} s, longer than "
                    f"data.timeout = {self._timeout:g} s; check that its file system responds"
                )
            if not reading and time.monotonic() - asked > self._timeout + _START_SECONDS:
                self._abandon()
                raise TransientError(f"no batch for {time.monotonic() - asked:.0f} s, and no record is being read")
        try:
            return self._threads.take()
        except (ValueError, TransientError) as error:
            raise type(error)(*error.args) from error  # raised here too: a worker's traceback leads nowhere
        except RuntimeError as error:
            if self._workers is None:
                raise
            dead = [row for row in self._status.reading() if not _alive(row.pid)]
            if not dead and "terminated unexpectedly" not in str(error):
                raise
            what = f" while it read {self._names(dead)}" if dead else ""
            raise TransientError(f"a worker process died{what}: {str(error).splitlines()[0]}") from None
        finally:
            if self._threads.ended:
                self.close()

    @property
    def summary(self) -> str:
        """What `counts` says in words; "" where nothing happened."""
        words = {"skipped": "corrupt and skipped", "alpha": "transparent", "warning": "decoded with a warning"}
        words |= {"unlabelled": "unlabelled and left out", "unmatched": "of other classes and left out"}
        return ", ".join(f"{count} {words[event]}" for event, count in self.counts.items() if count)

    def close(self) -> None:
        """Stops the prefetcher once the records that are being read are finished."""
        self._stop()

    def _abandon(self, pid: int | None = None) -> None:
        """Stops without waiting for a read that is stuck: a thread is left behind, a worker process is killed."""
        self._stop.detach()
        self._threads.close(seconds=0.0)
        if self._workers is not None:
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
            threading.Thread(target=self._workers.close, daemon=True).start()

    def _names(self, reading: list[Reading]) -> str:
        return "; ".join(self._source.id(row.record) for row in reading)


class _Workers:
    """Worker processes, which start when their first batch is taken.

    Ctrl-C and cluster managers signal all processes of a run, but the training process decides when to stop: it saves
    first. So the thread that takes batches blocks these signals, and its children inherit the mask from their first
    moment. (Python's resource tracker, which comes with the first child, unblocks them: it is started before.)
    """

    def __init__(self, batches: Any, data: DataConfig):
        depth = max(1, data.prefetch // data.workers)
        read = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=max(depth, data.threads))
        options = grain.MultiprocessingOptions(num_workers=data.workers, per_worker_buffer_size=depth)
        dataset = grain.MapDataset.source(batches).to_iter_dataset(read)
        self._dataset = dataset.mp_prefetch(options, worker_init_fn=_start_worker)
        self._iterator: Any = None

    def take(self, step: int) -> Batch:
        if self._iterator is None:
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
            self._iterator = iter(self._dataset)
        return next(self._iterator)

    def close(self) -> None:
        iterator, self._iterator = self._iterator, None  # Grain complains of one that is left when Python ends
        if iterator is not None:
            iterator.close()


def _stop(threads: "_Threads", workers: _Workers | None) -> None:
    threads.close(seconds=5.0)
    if workers is not None:
        workers.close()


class _Threads:
    """Calls `fetch(0)`, `fetch(1)`, ... in daemon threads and returns the results in their order.

    Daemon threads, and not an executor's: when Python ends it waits for an executor's threads, forever if one is stuck.
    """

    def __init__(self, fetch: Callable[[int], Batch], count: int, *, threads: int, depth: int):
        self.ended = False
        self._fetch = fetch
        self._count = count
        self._depth = max(depth, threads)
        self._claimed = 0
        self._taken = 0
        self._results: dict[int, Batch | BaseException] = {}
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._run, name="batches", daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self.ended or self._claimed < min(self._taken + self._depth, self._count)
                )
                if self.ended:
                    return
                step = self._claimed
                self._claimed += 1
            result: Batch | BaseException
            try:
                result = self._fetch(step)
            except BaseException as error:
                result = error
            with self._changed:
                self._results[step] = result
                self._changed.notify_all()

    def ready(self, seconds: float) -> bool:
        """Waits up to `seconds` for the next result, or the end."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self.ended or self._taken in self._results or self._taken >= self._count, seconds
            )

    def take(self) -> Batch:
        """Returns the next result, or raises what its reading raised, or StopIteration after the last."""
        with self._changed:
            if self.ended or self._taken >= self._count:
                self.ended = True
                raise StopIteration
            result = self._results.pop(self._taken)
            self._taken += 1
            self.ended = isinstance(result, BaseException)
            self._changed.notify_all()
        if isinstance(result, BaseException):
            raise result
        return result

    def close(self, seconds: float) -> None:
        """Ends the threads after what they are reading now, and waits at most `seconds` for that."""
        with self._changed:
            self.ended = True
            self._changed.notify_all()
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            if thread is not threading.current_thread():  # Python may collect garbage in any thread
                thread.join(max(deadline - time.monotonic(), 0))
        self._results.clear()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _start_worker(number: int, _: int) -> None:
    """Runs in a worker process before anything else."""
    global _worker
    _worker = number
    end_with_parent()
    _one_thread_per_image()


def _one_thread_per_image() -> None:
    """Images are read in parallel: OpenCV's own threads inside an image would only compete with the readers."""
    cv2.setNumThreads(1)

"""What a run tells about itself: metrics in files, a bar or lines on the terminal, clocks, utilisation."""

import collections
import contextlib
import io
import json
import logging
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO, runtime_checkable

import absl.logging
import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar
from tqdm import tqdm

from vit_scaling import paths
from vit_scaling.training import loggers


@runtime_checkable
class Writer(Protocol):
    """The part of clu's MetricWriter interface that a run uses; clu's own package imports only with TensorFlow."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class JsonlWriter:
    """One JSON object a line: {"step": the step at which it was measured, name: value, ...}.

    Rows after `resume_step`, or all where it is None, are dropped on opening: the run that wrote them died before it
    saved that far, and this one will write the same rows again. In a bucket the file is written whole by `flush`.
    """

    def __init__(self, path: Path, resume_step: int | None):
        rows = [row for row in read_jsonl(path) if resume_step is not None and row["step"] <= resume_step]
        kept = "".join(json.dumps(row) + "\n" for row in rows)
        self._bucket = path if paths.in_bucket(path) else None
        if self._bucket is None:
            paths.write(path, kept)
            self._file: TextIO = path.open("a")
        else:
            self._file = io.StringIO(kept)
            self._file.seek(0, io.SEEK_END)
            self.flush()

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        # JSON has no NaN and no infinity; null says that there was no number.
        values = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def flush(self) -> None:
        if self._bucket is not None:
            self._bucket.write_text(self._file.getvalue())  # type: ignore[attr-defined]

    def close(self) -> None:
        self.flush()
        self._file.close()


class TensorBoardWriter:
    """TensorBoard event files, written without TensorFlow; for a bucket here, and uploaded whole by `flush`.

    They are written in the caller's thread, so that a full disk is the run's error and not that of a thread.
    """

    def __init__(self, directory: Path, resume_step: int | None):
        self._target = directory if paths.in_bucket(directory) else None
        self._temporary = None if self._target is None else tempfile.TemporaryDirectory(prefix="vit_scaling-")
        self._folder = directory if self._temporary is None else Path(self._temporary.name)
        self._folder.mkdir(parents=True, exist_ok=True)
        # Files are named by the second; in a bucket a start within the same one would replace the file before it.
        self._writer = EventsWriter(str(self._folder / "events"), filename_suffix=f".{os.urandom(4).hex()}")
        # TensorBoard hides what earlier starts wrote from here on.
        start = 0 if resume_step is None else resume_step + 1
        self._write(step=start, session_log=SessionLog(status=SessionLog.START))

    def _write(self, **fields: Any) -> None:
        self._writer.write_event(Event(wall_time=time.time(), **fields))

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._write(step=step, summary=scalar(name, value))

    def flush(self) -> None:
        self._writer.flush()
        if self._target is not None:
            paths.upload(self._folder, self._target)

    def close(self) -> None:
        self.flush()
        self._writer.close()
        if self._temporary is not None:
            self._temporary.cleanup()


class Writers:
    """Writes to all of `writers`."""

    def __init__(self, *writers: Writer):
        self._writers = writers

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write_scalars(step, scalars)

    def flush(self) -> None:
        for writer in self._writers:
            writer.flush()

    def finish(self, result: Mapping[str, Any]) -> None:
        """Hands the result of a run to the trackers."""
        for writer in self._writers:
            if isinstance(writer, loggers.Tracked):
                writer.finish(result)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def create_writer(
    workdir: Path, resume_step: int | None, names: Sequence[str] = loggers.FILES, *tracker: Any
) -> Writers:
    """Returns the writer of a run that goes on from its own checkpoint of `resume_step`, or begins where it is None.

    Silent on all processes but the first.

    Args:
        names: log.writers.
        tracker: what `loggers.Tracked` takes beside its name and the workdir.
    """
    if jax.process_index() != 0:
        return Writers()
    writers: list[Writer] = [JsonlWriter(workdir / "metrics.jsonl", resume_step)]
    if "tensorboard" in names:
        writers.append(TensorBoardWriter(workdir / "tensorboard", resume_step))
    writers += [loggers.Tracked(name, workdir, *tracker) for name in names if name in loggers.TRACKERS]
    return Writers(*writers)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics file; none if it is absent. Damaged lines are left out and counted in a warning."""
    if not path.exists():
        return []
    rows, damaged = [], 0
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line) if line else None
            if row is not None:
                rows.append(row | {"step": int(row["step"])})
        except (ValueError, KeyError, TypeError):
            damaged += 1
    if damaged:
        absl.logging.warning("%s has %d damaged lines, which are left out", path, damaged)
    return rows


class Clock:
    """Seconds of the run by what they went into, over all of its restarts. Every second is booked once.

    As a context manager it books what XLA compiles on "compile", wherever that happens.
    """

    _COMPILED = "/jax/core/compile/backend_compile_duration"

    def __init__(self, started: float | None = None):
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter() if started is None else started
        self._before = 0.0  # seconds of earlier processes
        self._inside: list[float] = []  # for each booking that is open, what was booked inside it

    def __enter__(self) -> "Clock":
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        return self

    def __exit__(self, *error: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == self._COMPILED:
            self._add("compile", duration_secs)

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        if self._inside:
            self._inside[-1] += seconds

    def resume(self, step: int, saved: Mapping[str, float], last_step: int, last: Mapping[str, float]) -> None:
        """Adds the seconds of earlier processes.

        Args:
            step: that of the checkpoint from which the run goes on.
            saved: the seconds in that checkpoint.
            last_step: the step at which the last process noted its seconds for the last time, and
            last: those seconds. What steps after the checkpoint took is "lost": they are run again.
        """
        more = sum(last.values()) - sum(saved.values())
        earlier = dict(last if last_step <= step and more > 0 else saved)
        if last_step > step and more > 0:
            earlier["lost"] = earlier.get("lost", 0.0) + more
        for name, seconds in earlier.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self._before = sum(earlier.values())

    @contextlib.contextmanager
    def book(self, name: str) -> Iterator[None]:
        """Books the time inside, but what is booked inside of it."""
        start = time.perf_counter()
        self._inside.append(0.0)
        try:
            yield
        finally:
            self._add(name, time.perf_counter() - start - self._inside.pop())

    def book_rest(self, name: str) -> None:
        """Books what has passed in this process and was booked on nothing yet."""
        passed = time.perf_counter() - self._started
        self._add(name, max(0.0, passed - (self.total - self._before)))

    @property
    def total(self) -> float:
        """All that was booked, in seconds."""
        return sum(self.seconds.values())

    @property
    def useful_share(self) -> float:
        """Which part of all went into steps that count."""
        return self.seconds.get("step", 0.0) / max(self.total, 1e-9)


# What the run does, how far it is and how long that will take; the values come last, where a narrow terminal cuts them.
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"


class Progress:
    """A bar with the time left where a person watches, plain lines where a log is kept."""

    def __init__(self, step: int, total: int):
        self._start_step, self._total, self._start = step, total, time.perf_counter()
        watched = sys.stderr.isatty() and jax.process_index() == 0
        self._bar = tqdm(total=total, initial=step, bar_format=_BAR, dynamic_ncols=True) if watched else None

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def doing(self, what: str, *, line: bool = False) -> None:
        """Says beside the bar what the run does now; in a log that is a line only where `line`."""
        if self._bar is not None:
            self._bar.set_description_str(what)
        elif line:
            self.say(what)

    def say(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        if jax.process_index() != 0:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the newest values, the most important first: beside the bar, or in a line with the time left."""
        if jax.process_index() != 0:
            return
        text = ", ".join(f"{name} {value:{',.0f' if abs(value) >= 1000 else '.4g'}}" for name, value in values.items())
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            return
        done = step - self._start_step
        left = (time.perf_counter() - self._start) / done * (self._total - step) if done else math.nan
        self.say(f"step {step}/{self._total}, {text}, {duration(left)} left")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Warnings(logging.Handler):
    """Says what this process logs and warns of in lines that do not break the bar.

    A warning is said once, of different ones from one place in the code the 1st, 2nd, 4th, 8th, ...; how many there
    were is said at the end. Of several processes only the first does so; the others write as ever.
    """

    def __init__(self, say: Callable[[str], None]):
        super().__init__()
        self._say = say
        self._seen: dict[tuple[Any, ...], collections.Counter[str]] = {}  # by place, how often each text came
        self._root, self._show = logging.getLogger(), warnings.showwarning
        streams = (sys.stderr, sys.stdout, sys.__stderr__, sys.__stdout__)
        terminal = absl.logging.get_absl_handler()
        self._removed: list[logging.Handler] = []
        if jax.process_index() != 0:
            return
        self._removed = [h for h in self._root.handlers if h is terminal or getattr(h, "stream", None) in streams]
        for handler in self._removed:
            self._root.removeHandler(handler)
        self._root.addHandler(self)
        warnings.showwarning = self._warned

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING:
            self._say(f"{record.levelname.lower()}: {self.format(record)}")
        else:  # "error: " begins the one sentence that ends a run; what a library logs does not end it
            self._once(f"warning: {self.format(record)}", record.pathname, record.lineno)

    def _warned(self, message: Any, category: Any, filename: str, lineno: int, *_: Any, **__: Any) -> None:
        self._once(f"warning: {message}", filename, lineno)

    def _once(self, text: str, *place: Any) -> None:
        texts = self._seen.setdefault(place, collections.Counter())
        texts[text] += 1
        different = len(texts)
        if texts[text] == 1 and different & (different - 1) == 0:
            self._say(text if different == 1 else f"{text} ({different} like it)")

    def close(self) -> None:
        """Writes to the terminal again as before."""
        for texts in self._seen.values():
            if texts.total() > 1:
                self._say(f"{texts.total()} times: {next(iter(texts))}")
        self._seen.clear()
        warnings.showwarning = self._show
        self._root.removeHandler(self)
        for handler in self._removed:
            self._root.addHandler(handler)
        self._removed = []
        super().close()


def duration(seconds: float) -> str:
    """Returns seconds as a person reads them: 42s, 3m10s, 2h05m."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"

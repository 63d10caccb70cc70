"""Batches of NumPy arrays whose content is a pure function of (seed, step).

The global order is an endless sequence (order.py). Batch t is its stretch from t * batch_size on, across the end of an
epoch too, and every process reads some of the equal parts of that stretch. An example's augmentation is drawn from
(seed, position in the sequence). So neither workers, threads, processes nor restarts change which images make up
batch t, and to resume one needs the step alone.

Whole batches are read ahead, in threads (the decoders release Python's lock) or in Grain's worker processes.
"""

import dataclasses
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import jax
import numpy as np
from absl import logging

from vit_scaling import UserError
from vit_scaling.data.images.codec import CorruptImageError
from vit_scaling.data.images.transforms import Transform, TransformConfig
from vit_scaling.data.mixing import MixingConfig
from vit_scaling.data.order import Order, endless
from vit_scaling.data.prefetch import Batch, Batches, Board
from vit_scaling.data.sources import Source, SourceConfig
from vit_scaling.parallel.sharding import put_batch

Example = dict[str, Any]

_ENDLESS = 2**60  # examples: more than any run reads, and still an index everywhere
ON_CORRUPT = ("error", "skip")
_ATTEMPTS = 100  # so many corrupt records in a row are no accident


@dataclasses.dataclass
class DataConfig:
    """What is read, what is made of it, and with how many hands."""

    train: SourceConfig = dataclasses.field(default_factory=SourceConfig)
    transform: TransformConfig = dataclasses.field(default_factory=TransformConfig)
    eval_transform: TransformConfig = dataclasses.field(
        default_factory=lambda: TransformConfig(crop="central", resize="area")
    )
    mixing: MixingConfig = dataclasses.field(default_factory=MixingConfig)
    batch_size: int = 1024
    """Examples in a step, over all processes."""
    repeats: int = 1
    """Repeated augmentation (arXiv 1901.09335): so many differently augmented copies of an image follow each other."""
    on_corrupt: str = "error"
    """What a corrupt image does: "error" stops the run and names it; "skip" logs it and takes the next record."""
    workers: int = 0
    """Worker processes on each host; 0 reads in threads of the training process."""
    threads: int = 2
    """Threads in each reading process."""
    prefetch: int = 4
    """Batches that are read ahead."""
    timeout: float = 600.0
    """Seconds after which a record that is still being read stops the run, with its name."""


def train_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    parts: Sequence[int] = (0,),
    part_count: int = 1,
    repeats: int = 1,
    on_corrupt: str = "error",
    workers: int = 0,
    threads: int = 2,
    prefetch: int = 4,
    timeout: float = 600.0,
) -> Batches:
    """Returns this process's part of the endless training batches from `start_step` on.

    Args:
        source: where records come from.
        transform: (record, generator) -> {"image", "label"}; see `transforms.transform`.
        batch_size: examples in the global batch.
        seed: fixes order and augmentation, 0 <= seed < 2^32.
        start_step: the first batch; `train_batches(start_step=t)` continues a run that made t steps.
        parts, part_count: which of how many equal parts of each batch, in this order; see `sharding.batch_parts`.
        repeats, on_corrupt: see `DataConfig`.
        workers, threads, prefetch, timeout: see `DataConfig`; they never change a batch.

    Returns:
        An iterator of {"image": uint8 [rows, height, width, 3], "label": int32 [rows], or float32 multi-hot
        [rows, classes]}, where rows = batch_size * len(parts) / part_count.

    Raises:
        UserError: the batch is larger than the data set or cannot be divided, or a number is out of range. While
            reading: a record cannot be read, or is corrupt and `on_corrupt` is "error"; the message names it.
        RuntimeError: while reading: a record is stuck, or a worker process died; the message names the records.
    """
    rows = _rows(batch_size, parts, part_count)
    if batch_size > len(source):
        raise UserError(f"the batch of {batch_size} is larger than the data set of {len(source)} examples")
    if not 0 <= seed < 2**32:
        raise UserError(f"the data seed {seed} must be at least 0 and below 2^32")
    if start_step < 0:
        raise UserError(f"the first step {start_step} cannot be negative")
    if repeats < 1:
        raise UserError(f"data.repeats is {repeats} and must be at least 1")
    board = _board(workers, threads, prefetch)
    read = _Read(source, transform, on_corrupt, board)
    examples = _TrainExamples(read, endless(source, seed), seed, repeats)
    steps = range(start_step, _ENDLESS // batch_size)
    return Batches(_Rows(examples, steps, batch_size, rows), source, board, workers, threads, prefetch, timeout)


def eval_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    parts: Sequence[int] = (0,),
    part_count: int = 1,
    on_corrupt: str = "error",
    workers: int = 0,
    threads: int = 2,
    prefetch: int = 4,
    timeout: float = 600.0,
) -> Batches:
    """Returns this process's part of one pass over `source`: over all processes every example exactly once, in order.

    The arguments and the batches are those of `train_batches`, and every batch also has "mask": bool, False where the
    last batch is filled up, and where `on_corrupt="skip"` left an example out; image and label are zero there. Every
    process yields the same number of batches.

    Raises:
        UserError: the batch cannot be divided, or the source is empty.
    """
    rows = _rows(batch_size, parts, part_count)
    if not len(source):
        raise UserError("the evaluation set is empty")
    board = _board(workers, threads, prefetch)
    examples = _EvalExamples(_Read(source, transform, on_corrupt, board))
    steps = range(-(-len(source) // batch_size))
    return Batches(_Rows(examples, steps, batch_size, rows), source, board, workers, threads, prefetch, timeout)


def to_device(
    batches: Iterator[Batch], sharding: jax.sharding.Sharding, ahead: int = 2
) -> Iterator[dict[str, jax.Array]]:
    """Puts batches on the devices, `ahead` of them before they are asked for; transfers run beside the computation.

    Args:
        batches: each process's own part.
        sharding: how the leading axis of the global batch lies on the mesh.
        ahead: batches in flight; each takes device memory.
    """
    flying: deque[dict[str, jax.Array]] = deque()
    for batch in batches:
        flying.append(put_batch(batch, sharding))
        if len(flying) > ahead:
            yield flying.popleft()
    yield from flying


# ---- reading ---------------------------------------------------------------------------------------------------------


class _Generators:
    """A random generator for every position of the sequence: Philox, with the position in its counter.

    Each thread keeps one generator and moves it, which costs a tenth of making one.
    """

    def __init__(self, seed: int):
        self._seed = seed
        self._key = np.random.SeedSequence(seed).generate_state(2, np.uint64)
        self._own = threading.local()

    def __reduce__(self):
        return _Generators, (self._seed,)

    def at(self, position: int) -> np.random.Generator:
        own = self._own
        if not hasattr(own, "generator"):
            own.generator = np.random.Generator(np.random.Philox(key=self._key))
            own.state = own.generator.bit_generator.state
        own.state["state"]["counter"][:] = 0, 0, 0, position
        own.generator.bit_generator.state = own.state
        return own.generator


class _Read:
    """From the index of a record to its transformed example."""

    def __init__(self, source: Source, transform: Transform, on_corrupt: str, board: Board):
        if on_corrupt not in ON_CORRUPT:
            raise UserError(f"data.on_corrupt is {on_corrupt!r}; choose one of {', '.join(ON_CORRUPT)}")
        self.source = source
        self.transform = transform
        self._skip = on_corrupt == "skip"
        self._board = board

    def __call__(self, index: int, rng: np.random.Generator | None, out: np.ndarray | None) -> Example | None:
        """Returns the example of a record, or None if it is corrupt and that is no error; for `out` see `Transform`."""
        self._board.begin(index)
        try:
            return self.transform(self.source[index], rng, out)
        except CorruptImageError as error:
            message = f"{self.source.id(index)} is corrupt: {error}"
            if not self._skip:
                raise CorruptImageError(f"{message} (data.on_corrupt=skip goes on without it)") from None
            self._board.skip()
            logging.warning("%s; skipped", message)
            return None
        except (ValueError, OSError, RuntimeError, cv2.error) as error:
            raise UserError(f"{self.source.id(index)} cannot be read: {error}") from error
        finally:
            self._board.end()


class _TrainExamples:
    """From a position of the endless sequence to its example."""

    def __init__(self, read: _Read, order: Order, seed: int, repeats: int):
        self._read = read
        self._order = order
        self._generators = _Generators(seed)
        self._repeats = repeats

    def __call__(self, position: int, out: np.ndarray | None) -> Example:
        first = self._order[position // self._repeats]
        rng = self._generators.at(position)
        for attempt in range(_ATTEMPTS):  # the next record stands in for a corrupt one: the same in every run
            example = self._read((first + attempt) % len(self._read.source), rng, out)
            if example is not None:
                return example
        raise CorruptImageError(f"{self._read.source.id(first)} and the {_ATTEMPTS - 1} records after it are corrupt")


class _EvalExamples:
    """From a position, which may lie behind the last record, to an example with its mask."""

    def __init__(self, read: _Read):
        source = read.source
        label = np.zeros(source.num_classes, np.float32) if source.multi_label else np.int32(0)
        image = np.zeros((*read.transform.size, 3), np.uint8)
        self._read = read
        self._nothing = {"image": image, "label": label, "mask": np.bool_(False)}

    def __call__(self, position: int, out: np.ndarray | None) -> Example:
        example = self._read(position, None, out) if position < len(self._read.source) else None
        return self._nothing if example is None else example | {"mask": np.bool_(True)}


class _Rows:
    """This process's rows of every batch, at random access: number i is its share of batch `steps[i]`.

    A transform is offered the image's place in the batch, which spares a copy of every image.
    """

    def __init__(self, examples: _TrainExamples | _EvalExamples, steps: range, batch_size: int, rows: list[int]):
        self._examples = examples
        self._steps = steps
        self._batch_size = batch_size
        self._rows = rows

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, number: int) -> Batch:
        start = self._steps[number] * self._batch_size
        batch: Batch = {}
        for place, row in enumerate(self._rows):
            out = batch["image"][place] if batch else None
            example = self._examples(start + row, out)
            if not batch:
                batch = {key: np.empty((len(self._rows), *value.shape), value.dtype) for key, value in example.items()}
            for key, value in example.items():
                if value is not out:
                    batch[key][place] = value
        return batch


def _board(workers: int, threads: int, prefetch: int) -> Board:
    for name, value, low in (("workers", workers, 0), ("threads", threads, 1), ("prefetch", prefetch, 1)):
        if value < low:
            raise UserError(f"data.{name} is {value} and must be at least {low}")
    return Board(max(workers, 1), threads)


def _rows(batch_size: int, parts: Sequence[int], part_count: int) -> list[int]:
    if batch_size < 1 or batch_size % part_count:
        raise UserError(f"batch_size {batch_size} must be a positive multiple of its {part_count} parts")
    if not parts or not all(0 <= part < part_count for part in parts):
        raise UserError(f"parts {tuple(parts)} of a batch must be at least 0 and below part_count {part_count}")
    size = batch_size // part_count
    return [row for part in parts for row in range(part * size, (part + 1) * size)]

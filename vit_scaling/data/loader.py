"""Batches of NumPy arrays whose content is a pure function of (seed, step).

The global order is an endless sequence (order.py). Batch t is the stretch of it that starts at t * batch_size, across
the end of an epoch too, and every process reads its shard of that stretch. An example's augmentation is drawn from
(seed, position in the sequence). So neither workers, threads, processes nor restarts change which images make up
batch t, and resuming needs the step alone.

prefetch.py reads whole batches ahead, in threads (the decoders release Python's lock) or in Grain's worker processes.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from vit_scaling import TransientError, UserError
from vit_scaling.data import config as data_config
from vit_scaling.data.config import DataConfig
from vit_scaling.data.images import codec
from vit_scaling.data.images.codec import CorruptImageError
from vit_scaling.data.images.transforms import Transform
from vit_scaling.data.order import Order, endless
from vit_scaling.data.prefetch import Batch, Batches, ReadStatus
from vit_scaling.data.sources import Source
from vit_scaling.parallel.sharding import put_batch

Example = dict[str, Any]

_ENDLESS = 2**60  # examples: more than any run reads, and still a valid index
_ATTEMPTS = 100  # this many corrupt records in a row are no accident


class Shard(NamedTuple):
    """This process's part of every batch: `parts` of `part_count` equal parts, in order (`sharding.batch_parts`)."""

    parts: Sequence[int] = (0,)
    part_count: int = 1

    def rows(self, batch_size: int) -> list[int]:
        """Returns the rows of the global batch that belong to this process.

        Raises:
            UserError: the batch cannot be divided, or there is no such part.
        """
        if batch_size < 1 or batch_size % self.part_count:
            raise UserError(f"batch_size {batch_size} must be a positive multiple of its {self.part_count} parts")
        if not self.parts or not all(0 <= part < self.part_count for part in self.parts):
            raise UserError(
                f"parts {tuple(self.parts)} of a batch must be at least 0 and below part_count {self.part_count}"
            )
        size = batch_size // self.part_count
        return [row for part in self.parts for row in range(part * size, (part + 1) * size)]


WHOLE = Shard()


def train_batches(
    source: Source, transform: Transform, data: DataConfig, *, seed: int, start_step: int = 0, shard: Shard = WHOLE
) -> Batches:
    """Returns this process's shard of the endless training batches from `start_step` on.

    Args:
        source: where records come from.
        transform: (record, generator) -> {"image", "label"}; see `transforms.transform`.
        data: batch_size, repeats, on_corrupt, and workers, threads, prefetch and timeout, which never change a batch.
        seed: fixes order and augmentation, 0 <= seed < 2^32.
        start_step: the first batch; `train_batches(start_step=t)` continues a run that made t steps.
        shard: which rows of every batch.

    Returns:
        An iterator of {"image": uint8 [rows, height, width, 3], "label": int32 [rows], or float32 multi-hot
        [rows, classes]}, where rows is the size of the shard.

    Raises:
        UserError: the batch is larger than the data set or cannot be divided, or a number is out of range. While
            reading: a record is corrupt and `data.on_corrupt` is "error"; the message names it.
        TransientError: while reading: a record cannot be read or is stuck, or a worker process died; the message names
            the records.
    """
    data_config.validate(data)
    rows = shard.rows(data.batch_size)
    if data.batch_size > len(source):
        raise UserError(f"the batch of {data.batch_size} is larger than the data set of {len(source)} examples")
    if not 0 <= seed < 2**32:
        raise UserError(f"the data seed {seed} must be at least 0 and below 2^32")
    if start_step < 0:
        raise UserError(f"the first step {start_step} cannot be negative")
    status = ReadStatus(data)
    read = _Read(source, transform, data.on_corrupt, status)
    examples = _TrainExamples(read, endless(source, seed), seed, data.repeats)
    steps = range(start_step, _ENDLESS // data.batch_size)
    return Batches(_Rows(examples, steps, data.batch_size, rows), source, status, data)


def eval_batches(
    source: Source, transform: Transform, data: DataConfig, *, batch_size: int, shard: Shard = WHOLE
) -> Batches:
    """Returns this process's shard of one pass over `source`: over all processes every example exactly once, in order.

    The arguments and the batches are those of `train_batches`, with `batch_size` in place of `data.batch_size`. Every
    batch also has "mask": bool [rows], False where the last batch is padded, and where `on_corrupt="skip"` left an
    example out; image and label are zero there. Every process yields the same number of batches.

    Raises:
        UserError: the batch cannot be divided, a number is out of range, or the source is empty.
    """
    data_config.validate(data)
    rows = shard.rows(batch_size)
    if not len(source):
        raise UserError("the evaluation set is empty")
    status = ReadStatus(data)
    examples = _EvalExamples(_Read(source, transform, data.on_corrupt, status))
    steps = range(-(-len(source) // batch_size))
    return Batches(_Rows(examples, steps, batch_size, rows), source, status, data)


def to_device(
    batches: Iterator[Batch], sharding: jax.sharding.Sharding, ahead: int = 2
) -> Iterator[dict[str, jax.Array]]:
    """Transfers batches to the devices, `ahead` of them before they are needed, while the devices compute.

    Args:
        batches: each process's own shard.
        sharding: how the leading axis of the global batch lies on the mesh.
        ahead: batches in flight; each takes device memory.
    """
    in_flight: deque[dict[str, jax.Array]] = deque()
    for batch in batches:
        in_flight.append(put_batch(batch, sharding))
        if len(in_flight) > ahead:
            yield in_flight.popleft()
    yield from in_flight


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

    def __init__(self, source: Source, transform: Transform, on_corrupt: str, status: ReadStatus):
        self.source = source
        self.transform = transform
        self._skip = on_corrupt == "skip"
        self._status = status

    def __call__(self, index: int, rng: np.random.Generator | None, out: np.ndarray | None) -> Example | None:
        """Returns the example of a record, or None if it is left out: unlabelled, unmatched, or corrupt.

        For `out` see `Transform`.
        """
        self._status.begin(index)
        try:
            codec.take_notes()
            record = self.source[index]
            if not self.source.multi_label and record["label"] < 0:
                self._status.count("unlabelled" if record["label"] == -1 else "unmatched")
                return None
            example = self.transform(record, rng, out)
            for note in codec.take_notes():
                self._status.count(note.kind)
                if note.kind == "warning":
                    logging.log_first_n(logging.WARNING, "%s: %s", 100, self.source.id(index), note.text)
            return example
        except CorruptImageError as error:
            message = f"{self.source.id(index)} is corrupt: {error}"
            if not self._skip:
                raise CorruptImageError(f"{message} (on_corrupt=skip continues without it)") from None
            self._status.count("skipped")
            logging.warning("%s; skipped", message)
            return None
        except UserError as error:
            raise UserError(f"{self.source.id(index)} cannot be used: {error}") from error
        except (OSError, RuntimeError) as error:
            raise TransientError(f"{self.source.id(index)} cannot be read: {error}") from error
        finally:
            self._status.end()


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
        for attempt in range(_ATTEMPTS):  # the next record replaces one that is left out: the same in every run
            example = self._read((first + attempt) % len(self._read.source), rng, out)
            if example is not None:
                return example
        raise CorruptImageError(
            f"{self._read.source.id(first)} and the {_ATTEMPTS - 1} records after it are corrupt or unlabelled"
        )


class _EvalExamples:
    """From a position, which may lie behind the last record, to an example with its mask."""

    def __init__(self, read: _Read):
        source = read.source
        label = np.zeros(source.num_classes, np.float32) if source.multi_label else np.int32(0)
        image = np.zeros((*read.transform.size, 3), np.uint8)
        self._read = read
        self._padding = {"image": image, "label": label, "mask": np.bool_(False)}

    def __call__(self, position: int, out: np.ndarray | None) -> Example:
        example = self._read(position, None, out) if position < len(self._read.source) else None
        return self._padding if example is None else example | {"mask": np.bool_(True)}


class _Rows:
    """This process's rows of every batch, at random access: number i is its shard of batch `steps[i]`.

    The transform gets the image's place in the batch as `out`, which saves one copy of every image.
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

"""Batches of NumPy arrays whose content is a pure function of (seed, step).

The global order is an endless sequence: the source's records, shuffled anew in every epoch. Batch t is its stretch
from t * batch_size on, across the end of an epoch too, and process p of P reads the p-th of P equal parts of that
stretch. An example's augmentation is drawn from (seed, position in the sequence). So neither workers, threads,
processes nor restarts change which images make up batch t, and to resume one needs the step alone.

Grain reads ahead, in threads (the decoders release Python's lock) or in worker processes.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import grain
import numpy as np
from absl import flags

from vit_scaling.data.codec import CorruptImageError
from vit_scaling.data.mixing import MixingConfig
from vit_scaling.data.sources import Source, SourceConfig
from vit_scaling.data.transforms import TransformConfig

Batch = dict[str, np.ndarray]
Transform = Callable[[dict[str, Any], np.random.Generator | None], dict[str, Any]]


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
    workers: int = 0
    """Worker processes on each host; 0 reads in threads of the training process."""
    threads: int = 2
    """Threads in each reading process. With 0 and no workers a batch is read when it is asked for."""
    prefetch: int = 4
    """Batches that are read ahead."""


def train_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    threads: int = 2,
    prefetch: int = 4,
) -> Iterator[Batch]:
    """Returns this process's part of the endless training batches from `start_step` on.

    Args:
        source: where records come from.
        transform: (record, generator) -> {"image", "label"}; see `transforms.transform`.
        batch_size: examples in the global batch.
        seed: fixes order and augmentation, 0 <= seed < 2^32.
        start_step: the first batch; `train_batches(start_step=t)` continues a run that made t steps.
        process_index, process_count: which of how many equal parts of each batch.
        workers, threads, prefetch: see `DataConfig`; they never change a batch.

    Returns:
        An iterator of {"image": uint8 [batch_size / process_count, height, width, 3], "label": int32
        [batch_size / process_count], or float32 multi-hot [..., classes]}.

    Raises:
        ValueError: the batch is larger than the data set or cannot be divided, or a number is out of range.
    """
    local_size = _local_size(batch_size, process_index, process_count)
    if batch_size > len(source):
        raise ValueError(f"the batch of {batch_size} is larger than the data set of {len(source)} examples")
    if not 0 <= seed < 2**32:
        raise ValueError(f"the data seed {seed} must be at least 0 and below 2^32")
    if start_step < 0:
        raise ValueError(f"the first step {start_step} cannot be negative")
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    batches = order.random_map(_Read(source, transform)).batch(local_size)
    return _iterate(batches[process_index::process_count][start_step:], workers, threads, prefetch)


def eval_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    threads: int = 2,
    prefetch: int = 4,
) -> Iterator[Batch]:
    """Returns this process's part of one pass over `source`: over all processes every example exactly once, in order.

    The arguments and the batches are those of `train_batches`, and every batch also has "mask": bool, False where the
    last batch is filled up with black images of label 0. Every process yields the same number of batches.

    Raises:
        ValueError: the batch cannot be divided, or the source is empty.
    """
    local_size = _local_size(batch_size, process_index, process_count)
    if not len(source):
        raise ValueError("the evaluation set is empty")
    steps = -(-len(source) // batch_size)
    batches = grain.MapDataset.range(steps * batch_size).map(_ReadMasked(source, transform)).batch(local_size)
    return _iterate(batches[process_index::process_count], workers, threads, prefetch)


class _Read(grain.transforms.RandomMap):
    """From the index of a record to its transformed example."""

    def __init__(self, source: Source, transform: Transform):
        self.source = source
        self.transform = transform

    def random_map(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        return self.read(int(index), rng)

    def read(self, index: int, rng: np.random.Generator | None) -> dict[str, Any]:
        try:
            return self.transform(self.source[index], rng)
        except CorruptImageError as error:
            raise CorruptImageError(f"{self.source.id(index)}: {error}") from None


class _ReadMasked(grain.transforms.Map):
    """From an index, which may lie behind the last record, to an example with its mask."""

    def __init__(self, source: Source, transform: Transform):
        self._read = _Read(source, transform)

    def map(self, index: int) -> dict[str, Any]:
        count = len(self._read.source)
        if index < count:
            return self._read.read(int(index), None) | {"mask": np.bool_(True)}
        example = self._read.read(count - 1, None)
        return {key: np.zeros_like(value) for key, value in example.items()} | {"mask": np.bool_(False)}


def _local_size(batch_size: int, process_index: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} must be a positive multiple of the {process_count} processes")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} must be at least 0 and below process_count {process_count}")
    return batch_size // process_count


def _iterate(batches: grain.MapDataset, workers: int, threads: int, prefetch: int) -> Iterator[Batch]:
    """Reads batches ahead, in their order, in threads or worker processes."""
    for name, value, low in (("workers", workers, 0), ("threads", threads, 0), ("prefetch", prefetch, 1)):
        if value < low:
            raise ValueError(f"data.{name} is {value} and must be at least {low}")
    _one_thread_an_image()
    if workers:
        prefetch = max(1, prefetch // workers)
    dataset = batches.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads))
    )
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers ask for flags, also in a program that has none
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_one_thread_an_image)
    return iter(dataset)


def _one_thread_an_image(*_: int) -> None:
    """Images are read in parallel: OpenCV's own threads inside an image would only get in their way."""
    cv2.setNumThreads(1)

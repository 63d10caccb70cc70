"""Accuracy and loss over a whole set: every example once, whatever the batch, the devices and the hosts."""

from typing import Any, NamedTuple

import jax
import numpy as np

from vit_scaling.data import loader
from vit_scaling.data.sources import Source
from vit_scaling.data.transforms import TransformConfig, transform
from vit_scaling.parallel import sharding
from vit_scaling.step import Program


class Result(NamedTuple):
    accuracy: float  # share of the examples whose most likely class is (one of) their label(s)
    loss: float  # mean over the examples, without label smoothing
    predictions: np.ndarray  # [examples] int32, in the order of the source


def evaluate(
    program: Program,
    params: Any,
    statistics: Any,
    source: Source,
    transform_config: TransformConfig,
    *,
    batch_size: int,
    threads: int,
) -> Result:
    """Classifies every example of `source`.

    Every process must call it, with the same arguments; every process gets the same result.

    Raises:
        ValueError: the batch cannot be divided over the devices.
    """
    sharding.check_batch(batch_size, program.mesh, name="evaluation.batch_size")
    on = sharding.batch_sharding(program.mesh)
    correct: list[np.ndarray] = []
    losses: list[np.ndarray] = []
    predictions: list[np.ndarray] = []
    for local in loader.eval_batches(
        source,
        transform(transform_config, train=False),
        batch_size=batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        threads=threads,
    ):
        batch = sharding.put_batch(local, on)
        row = jax.device_get(program.classify(params, statistics, batch))
        real = row["mask"]
        correct.append(row["correct"][real])
        losses.append(row["loss"][real])
        predictions.append(row["prediction"][real])
    return Result(
        accuracy=float(np.concatenate(correct).mean()),
        loss=float(np.concatenate(losses).mean(dtype=np.float64)),
        predictions=np.concatenate(predictions),
    )

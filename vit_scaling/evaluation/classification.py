"""Accuracy and loss over a whole set: every example once, whatever the batch, the devices and the hosts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from vit_scaling.data.config import DataConfig
from vit_scaling.data.sources import Source
from vit_scaling.evaluation.network import Network
from vit_scaling.evaluation.passes import one_pass


class Result(NamedTuple):
    accuracy: float  # share of the examples whose most likely class is (one of) their label(s)
    loss: float  # mean over the examples, without label smoothing
    predictions: np.ndarray  # [examples of the source] int32, in order; -1 where an example was left out


def evaluate(
    network: Network,
    params: Any,
    batch_stats: Any,
    source: Source,
    data: DataConfig,
    *,
    batch_size: int,
    before_batch: Callable[[], None] | None = None,
) -> Result:
    """Classifies every example of `source` as `data.eval_transform` shows it.

    Every process must call it, with the same arguments; every process gets the same result.

    Raises:
        UserError: the batch cannot be divided over the devices.
    """
    correct: list[np.ndarray] = []
    losses: list[np.ndarray] = []
    predictions: list[np.ndarray] = []
    for batch in one_pass(source, data.eval_transform, data, network.mesh, batch_size, before_batch):
        row = jax.device_get(network.classify(params, batch_stats, batch))
        real = row["mask"]
        correct.append(row["correct"][real])
        losses.append(row["loss"][real])
        predictions.append(np.where(real, row["prediction"], -1))
    return Result(
        accuracy=float(np.concatenate(correct).mean()),
        loss=float(np.concatenate(losses).mean(dtype=np.float64)),
        predictions=np.concatenate(predictions)[: len(source)],
    )

"""One pass over a set: what every evaluator reads."""

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import jax

from vit_scaling.data import loader
from vit_scaling.data.config import DataConfig
from vit_scaling.data.images.transforms import TransformConfig, transform
from vit_scaling.data.sources import Source
from vit_scaling.parallel import sharding


@runtime_checkable
class Features(Protocol):
    """What features are read with: features(params, statistics, images) -> [B, D] in float32, jitted for `mesh`."""

    @property
    def mesh(self) -> jax.sharding.Mesh: ...
    @property
    def features(self) -> Any: ...


@runtime_checkable
class Network(Features, Protocol):
    """What accuracy is measured with as well.

    classify(params, statistics, batch) -> {"prediction", "correct", "loss", "mask"}, each [B] and whole on every device
    """

    @property
    def classify(self) -> Any: ...


def one_pass(
    source: Source, transform_config: TransformConfig, data: DataConfig, mesh: jax.sharding.Mesh, batch_size: int
) -> Iterator[dict[str, jax.Array]]:
    """Yields global batches on the devices; over all processes every example once, in order, "mask" telling fillers.

    Raises:
        ValueError: the batch cannot be divided over the devices.
    """
    sharding.check_batch(batch_size, mesh, name="evaluation.batch_size")
    on = sharding.batch_sharding(mesh)
    shard = loader.Shard(*sharding.batch_parts(on))
    batches = loader.eval_batches(
        source, transform(transform_config, train=False), data, batch_size=batch_size, shard=shard
    )
    with contextlib.closing(batches):
        yield from loader.to_device(batches, on, ahead=1)

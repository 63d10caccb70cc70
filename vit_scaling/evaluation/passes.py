"""One pass over a set: what every evaluator reads."""

import contextlib
from collections.abc import Callable, Iterator

import jax

from vit_scaling.data import loader
from vit_scaling.data.config import DataConfig
from vit_scaling.data.images.transforms import TransformConfig, transform
from vit_scaling.data.sources import Source
from vit_scaling.parallel import sharding


def one_pass(
    source: Source,
    transform_config: TransformConfig,
    data: DataConfig,
    mesh: jax.sharding.Mesh,
    batch_size: int,
    before_batch: Callable[[], None] | None = None,
    counts: dict[str, int] | None = None,
) -> Iterator[dict[str, jax.Array]]:
    """Yields global batches on the devices: over all processes every example once, in order; padding has mask False.

    Args:
        before_batch: called before each batch; what it raises ends the pass.
        counts: receives at the end what this process counted: "skipped", "unlabelled", "unmatched", ...

    Raises:
        UserError: the batch cannot be divided over the devices.
    """
    sharding.check_batch(batch_size, mesh, name="evaluation.batch_size")
    on = sharding.batch_sharding(mesh)
    shard = loader.Shard(*sharding.batch_parts(on))
    batches = loader.eval_batches(
        source, transform(transform_config, train=False), data, batch_size=batch_size, shard=shard
    )
    with contextlib.closing(batches):
        for batch in loader.to_device(batches, on, ahead=1):
            if before_batch is not None:
                before_batch()
            yield batch
        if counts is not None:
            counts.update(batches.counts)

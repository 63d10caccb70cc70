"""Measures weights on any labelled set: what the command evaluate.py prints and writes."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_scaling import flops, models
from vit_scaling.config import FewShotConfig
from vit_scaling.data.config import DataConfig
from vit_scaling.data.images.transforms import TransformConfig
from vit_scaling.data.sources import Source, SourceConfig
from vit_scaling.evaluation.fewshot import FewShot
from vit_scaling.evaluation.network import Network, network
from vit_scaling.evaluation.passes import one_pass
from vit_scaling.evaluation.report import Report, report
from vit_scaling.interop import Weights
from vit_scaling.optim.losses import LossConfig
from vit_scaling.parallel import chips, sharding
from vit_scaling.parallel import mesh as mesh_lib


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A model and its arrays, on the devices of a mesh."""

    params: Any
    batch_stats: Any
    network: Network

    def logits(self, images: Any) -> jax.Array:
        """Returns the logits [B, M] of uint8 images [B, H, W, 3]."""
        return self.network.logits(self.params, self.batch_stats, images)


def freeze(weights: Weights, mesh_config: mesh_lib.MeshConfig) -> Frozen:
    """Returns the model on a mesh, parameters sharded by the table of rules.

    Raises:
        UserError: it is unknown which mean and std the weights' images have.
    """
    weights.known_normalisation()
    mesh = mesh_lib.create(mesh_config)
    graphdef = models.split(weights.abstract())[0]

    def put(tree: Any) -> Any:
        on = sharding.tree_shardings(tree, mesh)
        return jax.tree.map(
            lambda leaf, to: jax.make_array_from_callback(leaf.shape, to, lambda index: leaf[index]), tree, on
        )

    functions = network(weights.config, graphdef, num_classes=weights.num_classes, loss=LossConfig(), mesh=mesh)
    return Frozen(put(weights.parameters), put(weights.statistics), functions)


def on_set(
    model: Frozen, source: Source, transform: TransformConfig, data: DataConfig, batch_size: int, loss: str
) -> Report:
    """Returns the report of one pass over a set, every example once.

    Its numbers tell how many images were left out, and of those how many were corrupt ("skipped"), "unlabelled", or of
    classes that the model lacks ("unmatched").

    Args:
        source: under the model's class numbers (`classes.match`).

    Raises:
        UserError: no image is left, or the batch cannot be divided over the devices.
    """
    logits, labels = [], []
    counts: dict[str, int] = {}
    for batch in one_pass(source, transform, data, model.network.mesh, batch_size, counts=counts):
        rows = model.logits(batch["image"])
        real = np.asarray(jax.device_get(batch["mask"]))
        logits.append(np.asarray(jax.device_get(rows))[real])
        labels.append(np.asarray(jax.device_get(batch["label"]))[real])
    found = report(np.concatenate(logits), np.concatenate(labels), loss=loss)
    found.numbers["left_out"] = len(source) - found.numbers["examples"]
    found.numbers.update({name: float(counts[name]) for name in ("skipped", "unlabelled", "unmatched") if counts[name]})
    return found


def few_shot(
    model: Frozen,
    train: SourceConfig,
    test: SourceConfig,
    transform: TransformConfig,
    data: DataConfig,
    batch_size: int,
    shots: tuple[int, ...],
) -> dict[str, float]:
    """Returns the accuracy of ridge regression on frozen features: {"10shot": ..., "10shot_std": ...}."""
    evaluation = FewShot(FewShotConfig(train=train, test=test, transform=transform, shots=shots))
    return evaluation.evaluate(model.network, model.params, model.batch_stats, data, batch_size=batch_size)


def throughput(model: Frozen, weights: Weights, batch_size: int, seconds: float) -> dict[str, float]:
    """Returns how fast the model classifies images that lie on the devices, over at least `seconds`."""
    shape = (batch_size, *weights.image_size, 3)
    images = jax.device_put(jnp.zeros(shape, jnp.uint8), sharding.batch_sharding(model.network.mesh))
    run = lambda: jax.block_until_ready(model.logits(images))  # noqa: E731
    run()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    rate = batch_size / float(np.median(times))
    cost = flops.count(weights.config, image_size=weights.image_size, num_classes=weights.num_classes)
    found = {"images_per_second": rate, "batch_size": float(batch_size), "runs": float(len(times))}
    peak = chips.peak_flops(jax.devices()[0])
    if peak is not None:
        found["mfu"] = rate * cost.forward_flops / peak / model.network.mesh.size
    return found

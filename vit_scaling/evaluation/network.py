"""The functions that every evaluation calls, jitted for a mesh. A training program has the same ones."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vit_scaling import models
from vit_scaling.data import mixing
from vit_scaling.optim import losses
from vit_scaling.parallel import mesh as mesh_lib
from vit_scaling.parallel import sharding
from vit_scaling.parallel.sharding import Mesh

Batch = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Network:
    """A model without its arrays. Every result is replicated, so each process can read it.

    logits(params, batch_stats, images) -> [B, M]
    features(params, batch_stats, images) -> [B, D] in float32
    classify(params, batch_stats, batch) -> {"prediction", "correct", "loss", "mask"}, each [B]
    replicate(arrays) -> the same arrays
    """

    mesh: Any  # as given to `network`; only a mesh of devices can run the functions
    logits: Any
    features: Any
    classify: Any
    replicate: Any


def network(
    model_config: models.ModelConfig, graphdef: Any, *, num_classes: int, loss: losses.LossConfig, mesh: Mesh
) -> Network:
    """Returns the evaluation functions of a model.

    Args:
        model_config: its mean and std say how images are normalized.
        graphdef: the static part of the model (`models.split`).
        num_classes: length of the logits.
        loss: which loss `classify` reports, without its label smoothing.
        mesh: axes as `mesh.AXES`.
    """
    loss = dataclasses.replace(loss, label_smoothing=0.0)
    jit = functools.partial(jit_in, mesh, model_config.dtype, out_shardings=sharding.replicated(mesh))
    return Network(
        mesh=mesh,
        logits=jit(_logits, model_config, graphdef),
        features=jit(_features, model_config, graphdef),
        classify=jit(_classify, model_config, graphdef, num_classes, loss),
        replicate=jit(_replicate),
    )


def jit_in(mesh: Mesh, dtype: str, function: Callable[..., Any], *static: Any, **options: Any) -> Any:
    """Returns `function` of its remaining arguments, jitted, with the mesh visible to `sharding.constrain`.

    Args:
        dtype: of the computation; see `mesh.tracing`.
    """

    def traced(*args: Any) -> Any:
        with mesh_lib.tracing(mesh, dtype):
            return function(*static, *args)

    traced.__name__ = function.__name__.strip("_")
    return jax.jit(traced, compiler_options=mesh_lib.compiler_options(mesh), **options)


def to_float(model_config: models.ModelConfig, images: Array) -> Array:
    """Returns uint8 images as the model sees them, the batch sharded."""
    return mixing.to_float(sharding.constrain(images), model_config.mean, model_config.std)


def _replicate(arrays: Any) -> Any:
    return arrays


def _logits(model_config: models.ModelConfig, graphdef: Any, params: Any, batch_stats: Any, images: Array) -> Array:
    return models.merge(graphdef, params, batch_stats)(to_float(model_config, images))


def _features(model_config: models.ModelConfig, graphdef: Any, params: Any, batch_stats: Any, images: Array) -> Array:
    return models.merge(graphdef, params, batch_stats).features(to_float(model_config, images))


def _classify(
    model_config: models.ModelConfig,
    graphdef: Any,
    num_classes: int,
    loss: losses.LossConfig,
    params: Any,
    batch_stats: Any,
    batch: Batch,
) -> Batch:
    logits = _logits(model_config, graphdef, params, batch_stats, batch["image"])
    targets = losses.targets(batch["label"], num_classes)
    prediction = jnp.argmax(logits, axis=-1)
    return {
        "prediction": prediction.astype(jnp.int32),
        "correct": jnp.take_along_axis(targets, prediction[:, None], axis=-1)[:, 0] > 0,
        "loss": losses.loss(loss, logits, targets),
        "mask": batch["mask"],
    }

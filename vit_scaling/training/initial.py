"""Weights to start from or to look at: a file of any layout, or a checkpoint of a run."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_scaling import UserError, interop
from vit_scaling.config import Config
from vit_scaling.data.sources import SourceConfig, open_source
from vit_scaling.interop import Target, Weights, hub
from vit_scaling.interop.run import find_checkpoint, leaves, numpy_digest, record_of
from vit_scaling.training.step import Program, TrainState


def run_of(path: str | Path) -> dict[str, Any] | None:
    """Returns the config of the run that a path belongs to, as JSON; None for other weights."""
    found = find_checkpoint(hub.place(path))
    return None if found is None else record_of(found)["config"]


def class_names(path: str | Path, weights: Weights) -> tuple[str, ...] | None:
    """Returns the names of the classes of weights: their own, or else their run's training set's; None if unknown."""
    found = find_checkpoint(hub.place(path))
    if weights.class_names is not None or found is None:
        return weights.class_names
    try:  # a run of before names were noted
        names = open_source(SourceConfig.from_json(record_of(found)["config"]["data"]["train"])).class_names
    except (UserError, OSError):
        return None
    return tuple(names) if names and len(names) == weights.num_classes else None


def read(path: str | Path, target: Target | None = None, *, ignore: Sequence[str] = (), ema: bool = False) -> Weights:
    """Reads weights as `interop.read` does; `ema` takes their average of the parameters."""
    return interop.read(path, dataclasses.replace(target or Target(), ema=ema), ignore=ignore)


def start_of(config: Config, num_classes: int) -> Weights | None:
    """Returns the weights that a new run starts from; None for random ones.

    Raises:
        UserError: they cannot be read, or are no weights of the config's model; nothing is written.
    """
    init = config.init
    if not init.path:
        return None
    if init.keep_head and init.class_map:
        raise UserError("init.keep_head and init.class_map exclude each other; set one of them")
    weights = read(
        init.path,
        Target(config.model, config.data.transform.size, num_classes, init.class_map or None),
        ignore=init.ignore,
        ema=init.ema,
    )
    found, model = weights.known_normalisation(), config.model
    if (found.mean, found.std) != (model.mean, model.std):
        raise UserError(
            f"{init.path} expects images of {found}, and the config has model.mean {model.mean} and model.std "
            f"{model.std}; set these two to the weights' values"
        )
    if init.keep_head and weights.fresh_head:
        raise UserError(f"init.keep_head: {init.path} has no classifier of {num_classes} classes to keep")
    if not init.keep_head and not init.class_map:
        bias = np.full(num_classes, config.loss.head_bias, np.float32)
        return weights.with_head(np.zeros_like(weights.leaves["head/kernel"]), bias)
    return weights


def digest(*read: Weights | None) -> str | None:
    """Returns a digest of weights, by which processes compare what they have read; None for none."""
    if not any(read):
        return None
    each = ""
    for weights in read:
        arrays = {} if weights is None else {**leaves(weights.parameters), **leaves(weights.statistics)}
        each += "".join(f"{path}={numpy_digest(array)};" for path, array in sorted(arrays.items())) + "|"
    return hashlib.sha256(each.encode()).hexdigest()


def begin(program: Program, weights: Weights | None) -> TrainState:
    """Returns the state before the first step: as initialized, with these weights and the teacher's, if any."""
    state = program.init()

    def place(shape: jax.ShapeDtypeStruct, array: np.ndarray) -> jax.Array:
        # Every process has read the whole array; each device gets its part.
        return jax.make_array_from_callback(shape.shape, shape.sharding, lambda index: array[index])

    shapes = program.state_shape
    if program.teacher is not None:
        arrays = program.teacher.parameters, program.teacher.statistics
        state = dataclasses.replace(state, teacher=jax.tree.map(place, shapes.teacher, arrays))
    if weights is None:
        return state
    params = jax.tree.map(place, shapes.params, weights.parameters)
    statistics = jax.tree.map(place, shapes.statistics, weights.statistics)
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    return dataclasses.replace(state, params=params, statistics=statistics, ema=ema)

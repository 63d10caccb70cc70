"""This project's own weight folder: model.safetensors under the parameters' paths, and config.json with the model.

It holds every model of this project with its batch statistics, and is what `weights import` writes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from vit_scaling import UserError, models
from vit_scaling.interop.layout import Json
from vit_scaling.interop.normalisation import Normalisation
from vit_scaling.interop.weights import Weights
from vit_scaling.models import ModelConfig

KEY = "vit_scaling"  # of config.json: the version of this format
VERSION = 1
STATISTICS = "statistics/"


def is_native(neighbour: Json | None) -> bool:
    return neighbour is not None and KEY in neighbour


def model_config(fields: Mapping[str, Any], name: str | None = None) -> ModelConfig:
    """Returns the model config that JSON holds: the class of that name, or the one that has just these fields.

    Raises:
        UserError: there is none.
    """
    own = {config_class: {field.name for field in dataclasses.fields(config_class)} for config_class in models.MODELS}
    # A field that came later has its default in an older file.
    fitting = [each for each in own if each.__name__ == name or (name is None and set(fields) <= own[each])]
    if len(fitting) == 1:
        if unknown := sorted(set(fields) - own[fitting[0]]):
            raise UserError(f"the model config has the field {unknown[0]!r}, which no {fitting[0].__name__} has")
        return fitting[0](**{key: _tuples(value) for key, value in fields.items()})
    raise UserError(f"no model config is called {name!r} or has the fields {', '.join(sorted(fields))}")


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value


class Header(NamedTuple):
    """What config.json says."""

    config: ModelConfig
    image_size: tuple[int, int]
    num_classes: int
    normalisation: Normalisation
    class_names: tuple[str, ...] | None
    antialias: bool
    loss: str


def read_config(neighbour: Json) -> Header:
    """Returns what config.json says.

    Raises:
        UserError: the file is of another version, or says something that is no config.
    """
    if neighbour[KEY] != VERSION:
        raise UserError(f"config.json is of version {neighbour[KEY]!r} of this project's weights; this is {VERSION}")
    try:
        height, width = neighbour["image_size"]
        config = model_config(neighbour["config"], neighbour["model"])
        fields = {key: _tuples(value) for key, value in (neighbour.get("normalisation") or {}).items()}
        found = Normalisation(config.mean, config.std, **fields)
        names = neighbour.get("class_names")
        names = tuple(map(str, names)) if names else None
        return Header(
            config,
            (int(height), int(width)),
            int(neighbour["num_classes"]),
            found,
            names,
            bool(neighbour.get("antialias")),
            str(neighbour.get("loss", "softmax")),
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"config.json is no config of this project's weights: {error!r}") from None


def write_config(weights: Weights) -> dict[str, Any]:
    fields = dataclasses.asdict(weights.known_normalisation())
    return {
        KEY: VERSION,
        "model": type(weights.config).__name__,
        "config": dataclasses.asdict(weights.config),
        "image_size": list(weights.image_size),
        "num_classes": weights.num_classes,
        "normalisation": {key: value for key, value in fields.items() if key not in ("mean", "std")},
        **({"antialias": True} if weights.antialias else {}),
        **({"loss": weights.loss} if weights.loss != "softmax" else {}),
        **({"class_names": list(weights.class_names)} if weights.class_names else {}),
    }


def named(leaves: Mapping[str, Any], running: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {name in the file: leaf} of parameters and batch statistics."""
    return {**leaves, **{STATISTICS + path: leaf for path, leaf in running.items()}}

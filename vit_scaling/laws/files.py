"""Files of fitted laws: JSON that another program can read, and that loads again as the law it was."""

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vit_scaling import UserError, paths
from vit_scaling.laws.curve import CurveLaw
from vit_scaling.laws.fitting import Fitted
from vit_scaling.laws.joint import JointLaw
from vit_scaling.laws.power_law import Extrapolation, Law
from vit_scaling.laws.repeated import RepeatedLaw
from vit_scaling.laws.sovit import DimensionLaw

KINDS: dict[str, type[Fitted]] = {law.__name__: law for law in (Law, JointLaw, RepeatedLaw, CurveLaw, DimensionLaw)}


def to_json(law: Fitted) -> dict[str, Any]:
    """Returns the law's kind and fields as JSON values; numbers that are not finite are written as strings."""
    fields = dataclasses.asdict(typing.cast(Any, law))
    return {"law": type(law).__name__} | {name: _value(value) for name, value in fields.items()}


def from_json(stored: Any) -> Fitted:
    """Returns the law of which `to_json` made these values.

    Raises:
        UserError: there is no law of that kind, or it lacks a field.
    """
    if not isinstance(stored, dict) or stored.get("law") not in KINDS:
        kind = stored.get("law") if isinstance(stored, dict) else stored
        raise UserError(f"law is {kind!r}; it is one of {', '.join(KINDS)}")
    law = KINDS[stored["law"]]
    hints = typing.get_type_hints(law)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(typing.cast(Any, law)):
        if field.name not in stored:
            raise UserError(f"the {stored['law']} has no {field.name}; it was written by another version or by hand")
        try:
            fields[field.name] = _of_type(hints[field.name], stored[field.name])
        except (TypeError, ValueError) as error:
            raise UserError(f"{field.name} of the {stored['law']} cannot be read: {error}") from error
    return law(**fields)


def save(law: Fitted, path: str | Path) -> None:
    """Writes the law as a JSON file."""
    paths.local(path).write_text(json.dumps(to_json(law)) + "\n")


def load(path: str | Path) -> Fitted:
    """Reads a law that `save` wrote.

    Raises:
        UserError: the file is not there, is no JSON, or holds no law.
    """
    try:
        stored = json.loads(paths.local(path).read_text())
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    try:
        return from_json(stored)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _value(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _value(value.tolist())
    if isinstance(value, list | tuple):
        return [_value(each) for each in value]
    if isinstance(value, dict):
        return {name: _value(each) for name, each in value.items()}
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value


def _of_type(hint: Any, value: Any) -> Any:
    if typing.get_origin(hint) in (np.ndarray, NDArray):  # NDArray is an alias of its own from NumPy 2.5 on
        last = typing.get_args(hint)[-1]
        return np.array(value, dtype=(typing.get_args(last) or (last,))[0])
    if typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]
        return tuple(kind(each) for each in value)
    if hint == Extrapolation | None:
        return None if value is None else Extrapolation(**value)
    return hint(value)

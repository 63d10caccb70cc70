"""The fields of the config as text for `--help`, and the types that their values must have."""

import ast
import dataclasses
import inspect
import re
import textwrap
import types
import typing
from typing import Any

from vit_scaling import UserError, config


def describe() -> list[str]:
    """Returns lines for every field of the config: its name, type, default and meaning, from the dataclasses."""
    lines = [
        "fields of the config, each set by --config.NAME=VALUE after --config; a config",
        "sets its own values, which train --print_config shows. A Duration has an amount",
        "and a unit (steps, epochs, examples), as in --config.duration.amount=90 and",
        "--config.duration.unit=epochs.",
    ]
    places: dict[type, list[str]] = {}
    _places(config.Config, "", places)
    for kind, prefixes in places.items():
        if kind.__name__ == "Duration":
            continue
        sentence = (inspect.getdoc(kind) or "").partition("\n")[0]
        lines += ["", *textwrap.wrap(f"{', '.join(prefixes) or 'the config itself'} ({kind.__name__}): {sentence}", 80)]
        meanings = _meanings(kind)
        for field in dataclasses.fields(kind):
            hint = _hints(kind)[field.name]
            if not _dataclasses_in(hint) or _dataclasses_in(hint)[0].__name__ == "Duration":  # others are listed apart
                lines += wrapped(f"{field.name}: {_type_name(hint)}{_default(field)}", meanings.get(field.name, ""))
    return lines


def _places(kind: type, prefix: str, places: dict[type, list[str]]) -> None:
    """Notes at which paths of the config each dataclass stands."""
    places.setdefault(kind, []).append(prefix)
    for name, hint in _hints(kind).items():
        for inner in _dataclasses_in(hint):
            _places(inner, f"{prefix}.{name}" if prefix else name, places)


def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _dataclasses_in(hint: Any) -> list[type]:
    """Returns the dataclasses of which a field holds one."""
    return [
        kind for kind in (hint, *typing.get_args(hint)) if isinstance(kind, type) and dataclasses.is_dataclass(kind)
    ]


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _default(field: dataclasses.Field) -> str:
    """Returns " = value" as the command line writes it, or nothing for a field that every config must set."""
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        return f" = {value.amount:g} {value.unit}" if type(value).__name__ == "Duration" else f" = {value!r}"
    return "" if field.default is dataclasses.MISSING else f" = {field.default!r}"


def _meanings(kind: type) -> dict[str, str]:
    """Returns what the fields of a dataclass mean: the string or comment beside each, or its line under Attributes."""
    source = textwrap.dedent(inspect.getsource(kind))
    body, lines = ast.parse(source).body[0].body, source.splitlines()  # type: ignore[attr-defined]
    found: dict[str, str] = {}
    doc = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2]
    for name, text in re.findall(r"^ {4}(\w[\w, ]*): (.*(?:\n {8,}.*)*)", doc, re.MULTILINE):
        found |= {each.strip(): " ".join(text.split()) for each in name.split(",")}
    for node, after in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        rest = lines[node.end_lineno - 1][node.end_col_offset :]  # type: ignore[operator]
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[node.target.id] = " ".join(str(after.value.value).split())
        elif "#" in rest:
            found[node.target.id] = rest.partition("#")[2].strip()
    return found


def wrapped(name: str, text: str) -> list[str]:
    """Returns a name and its explanation in lines of at most 80 columns."""
    head = textwrap.wrap(name, 80, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    return [*head, *textwrap.wrap(text, 80, initial_indent="      ", subsequent_indent="      ")]


def check_types(node: Any, prefix: str) -> None:
    """Raises UserError for a value that does not have the type of its field; a tuple is not checked when parsed."""
    for name, hint in _hints(type(node)).items():
        value = getattr(node, name)
        if not _fits(value, hint):
            raise UserError(f"{prefix}.{name} is {value!r}; it must be {_type_name(hint)}")
        if dataclasses.is_dataclass(value):
            check_types(value, f"{prefix}.{name}")


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any or isinstance(hint, str):
        return True
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(_fits(value, each) for each in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        each = typing.get_args(hint)
        if not isinstance(value, tuple):
            return False
        each = each[:1] * len(value) if each[-1] is Ellipsis else each
        return len(each) == len(value) and all(map(_fits, value, each))
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True

"""Names of parameters: the one vocabulary of decay patterns, sharding rules, checkpoints and weight import.

Parameters are nested dicts of arrays. The path of a leaf joins its keys with "/", for example
"blocks/attention/query/kernel". Layers of one shape are stored stacked: every part of a path that is
called "blocks" stands for one leading axis, over layers, of the leaf. That axis is bookkeeping and no part of
the parameter: it is never sharded and never factored across.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from vit_scaling import UserError

T = TypeVar("T")

STACK = "blocks"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {path: leaf} of a nested dict, in the dict's own order."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            leaves |= flatten(value, path + "/")
        else:
            leaves[path] = value
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested dict whose `flatten` is `leaves`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def stacked_dims(path: str) -> int:
    """Returns how many leading axes of the leaf at `path` run over stacked layers."""
    return path.split("/").count(STACK)


def first_match(rules: Sequence[tuple[str, T]], path: str) -> T:
    """Returns the value of the first rule whose regular expression matches all of `path`.

    Raises:
        UserError: no rule matches.
    """
    for pattern, value in rules:
        if re.fullmatch(pattern, path):
            return value
    patterns = ", ".join(repr(pattern) for pattern, _ in rules)
    raise UserError(f"no rule names the parameter {path!r}; the rules are {patterns}: add one that matches it")

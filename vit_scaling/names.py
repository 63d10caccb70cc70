"""Names of parameters, as decay patterns, sharding rules, checkpoints and weight import use them.

And `render_table`, which renders every table of the package, so that all layers can use it.

Parameters are nested dicts of arrays. The path of a leaf joins its keys with "/", for example
"blocks/attention/query/kernel". Layers of one shape are stored stacked: each part of a path that
is "blocks" stands for one leading axis of the leaf, over layers. That axis is not part of the parameter: it is never
sharded, and Adafactor never factors over it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
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


def matches(pattern: str, path: str) -> bool:
    """Returns whether a regular expression matches all of `path`.

    Raises:
        UserError: the pattern is no regular expression.
    """
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as error:
        raise UserError(f"{pattern!r} is no regular expression: {error}") from None


def first_match(rules: Sequence[tuple[str, T]], path: str) -> T:
    """Returns the value of the first rule whose regular expression matches all of `path`.

    Raises:
        UserError: no rule matches, or a pattern is no regular expression.
    """
    for pattern, value in rules:
        if matches(pattern, path):
            return value
    patterns = ", ".join(repr(pattern) for pattern, _ in rules)
    raise UserError(f"no rule names the parameter {path!r}; the rules are {patterns}: add one that matches it")


_NUMBER = re.compile(r"[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?%?|-|")


def render_table(header: Sequence[str], rows: Iterable[Sequence[object]], *, markdown: bool = False) -> str:
    """Returns a table as text: columns padded to one width, or a Markdown table. No line ends in a space.

    Columns of numbers are flush right.

    Raises:
        ValueError: a row has more or fewer cells than the header.
    """
    table = [[str(cell) for cell in row] for row in (header, *rows)]
    if markdown:
        table = [[cell.replace("|", r"\|") for cell in row] for row in table]
        table.insert(1, ["---"] * len(header))
        return "\n".join(f"| {' | '.join(row)} |" for row in table)
    columns = []
    for name, *cells in zip(*table, strict=True):
        width = max(map(len, (name, *cells)))
        justify = str.rjust if cells and all(_NUMBER.fullmatch(cell) for cell in cells) else str.ljust
        columns.append([justify(cell, width) for cell in (name, *cells)])
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns, strict=True))

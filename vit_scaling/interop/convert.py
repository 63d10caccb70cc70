"""Between a foreign tensor and parameters of ours: which belong together, and how their axes lie.

A layout's name map is a list of entries. Our parameters are named by their path, with a layer's number in place of the
stack: "blocks/3/attention/query/kernel".
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from vit_scaling import UserError
from vit_scaling import names as paths
from vit_scaling.interop.families import Family

Shape = tuple[int, ...]
MAX_LAYERS = 1000


class Entry(NamedTuple):
    """One foreign tensor, which holds one parameter of ours or several, one after the other along `axis`.

    A name of ours that ends in "+" is added to the parameter instead (and exported as zeros).
    """

    theirs: str
    ours: tuple[str, ...]
    kind: str
    axis: int = 0


# For each kind: their shape and array from ours, and ours from theirs and our shape. PyTorch's linear maps are
# [out, in], its convolutions [out, in, height, width]; ours have heads as an axis of their own.
_SHAPES = {
    "same": lambda s: s,
    "flat": lambda s: (math.prod(s),),
    "lead": lambda s: (1, *s),
    "column": lambda s: (*s, 1, 1),
    "linear": lambda s: (math.prod(s[1:]), s[0]),
    "out": lambda s: (s[-1], math.prod(s[:-1])),
    "conv": lambda s: (s[3], s[2], s[0], s[1]),
}
_EXPORT = {
    "same": lambda a: a,
    "flat": lambda a: a.reshape(-1),
    "lead": lambda a: a[None],
    "column": lambda a: a[:, None, None],
    "linear": lambda a: a.reshape(a.shape[0], -1).T,
    "out": lambda a: a.reshape(-1, a.shape[-1]).T,
    "conv": lambda a: a.transpose(3, 2, 0, 1),
}
_IMPORT = {
    "same": lambda a, s: a,
    "flat": lambda a, s: a.reshape(s),
    "lead": lambda a, s: a[0],
    "column": lambda a, s: a.reshape(s),
    "linear": lambda a, s: a.T.reshape(s),
    "out": lambda a, s: a.T.reshape(s),
    "conv": lambda a, s: a.transpose(2, 3, 1, 0),
}


# ---- which tensor holds which parameter


def their_name(family: Family, path: str) -> tuple[str, int, str] | None:
    """Returns (name, row of the family's table, kind) of the tensor of our parameter; None if the family has none."""
    place, numbers = path, {}
    if match := re.fullmatch(r"blocks/(\d+)/(.*)", path):
        place, numbers = f"blocks/{match[2]}", {"i": int(match[1])}
    elif match := re.fullmatch(r"stage(\d+)/blocks/(\d+)/(plain|shifted)/(.*)", path):
        place, numbers = (
            f"blocks/{match[4]}",
            {"s": int(match[1]) - 1, "b": 2 * int(match[2]) + (match[3] == "shifted")},
        )
    elif match := re.fullmatch(r"stage(\d+)/(merging/.*)", path):
        place, numbers = match[2], {"s": int(match[1]) - 1, "next": int(match[1])}
    module, _, leaf = place.rpartition("/")
    own = place if place in family.table else module
    if own not in family.table:
        return None
    row = list(family.table).index(own)
    name, _, kind = family.table[own].partition("|")
    name = name.format(**numbers)
    if kind:
        return name, row, kind
    if family.layout == "big_vision":
        return f"{name}/{leaf}", row, "same"
    kinds = {"bias": "flat", "scale": "same", "kernel": "out" if own.endswith("attention/out") else "linear"}
    return (
        f"{name}.{'bias' if leaf == 'bias' else 'weight'}",
        row,
        "conv" if place == "embedding/kernel" else kinds[leaf],
    )


def entries(family: Family, shapes: Mapping[str, Shape], prefix: Iterable[str] = ()) -> list[Entry]:
    """Returns the name map of a network.

    Args:
        family: whose names.
        shapes: of our parameters, layers numbered.
        prefix: the parameters that have rows of their own at the start of the position table.

    Raises:
        UserError: the family has no tensor for one of our parameters.
    """
    found: dict[str, list[tuple[int, str, str]]] = {}
    for path in shapes:
        theirs = their_name(family, path)
        if theirs is None:
            raise UserError(f"{family.name} has no tensor for the parameter {path}")
        found.setdefault(theirs[0], []).append((theirs[1], path, theirs[2]))
    result = [Entry(name, tuple(path for _, path, _ in sorted(rows)), rows[0][2]) for name, rows in found.items()]
    rows = tuple(f"{path}+" for path in prefix)
    return [
        Entry(each.theirs, (*rows, *each.ours), each.kind, axis=int(each.kind == "lead"))
        if rows and each.ours == ("position_embedding",)
        else each
        for each in result
    ]


# ---- arrays


def _own_shape(entry: Entry, shapes: Mapping[str, Shape]) -> list[Shape]:
    return [shapes[name.removesuffix("+")] for name in entry.ours]


def their_shape(entry: Entry, shapes: Mapping[str, Shape]) -> Shape:
    """Returns the shape that the foreign tensor must have, from the shapes of our parameters."""
    parts = [list(_SHAPES[entry.kind](shape)) for shape in _own_shape(entry, shapes)]
    parts[0][entry.axis] = sum(part[entry.axis] for part in parts)
    return tuple(parts[0])


def to_ours(entry: Entry, tensor: np.ndarray, shapes: Mapping[str, Shape]) -> dict[str, np.ndarray]:
    """Returns our parameters (float32) that the foreign tensor holds, "+" kept in their names."""
    own = _own_shape(entry, shapes)
    sizes = [_SHAPES[entry.kind](shape)[entry.axis] for shape in own]
    parts = np.split(tensor, np.cumsum(sizes)[:-1], axis=entry.axis)
    return {
        name: np.ascontiguousarray(_IMPORT[entry.kind](part, shape), dtype=np.float32)
        for name, part, shape in zip(entry.ours, parts, own, strict=True)
    }


def to_theirs(entry: Entry, parameters: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the foreign tensor of these parameters."""
    parts = [
        np.zeros_like(parameters[name.removesuffix("+")]) if name.endswith("+") else parameters[name]
        for name in entry.ours
    ]
    return np.concatenate([_EXPORT[entry.kind](part) for part in parts], axis=entry.axis)


# ---- stacks


def unstack(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {path: leaf} with stacks taken apart; leaves are arrays or have a shape."""
    result = {}
    for path, leaf in leaves.items():
        if not paths.stacked_dims(path):
            result[path] = leaf
            continue
        for index in range(leaf.shape[0]):
            result[_numbered(path, index)] = leaf[index] if isinstance(leaf, np.ndarray) else Part(leaf.shape[1:])
    return result


def stack(leaves: Mapping[str, np.ndarray], like: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns what `unstack` took apart; `like` is {path: leaf} of the stacked tree."""
    return {
        path: np.stack([leaves[_numbered(path, index)] for index in range(leaf.shape[0])])
        if paths.stacked_dims(path)
        else leaves[path]
        for path, leaf in like.items()
    }


class Part(NamedTuple):
    """One layer of a stacked shape."""

    shape: Shape


def _numbered(path: str, index: int) -> str:
    stack_name = paths.STACK
    return re.sub(rf"(^|/){stack_name}/", rf"\g<1>{stack_name}/{index}/", path, count=1)


# ---- what names and shapes tell


def count(names: Iterable[str], pattern: str) -> int:
    """Returns one more than the largest number that the pattern's group finds; 0 where it finds none.

    Raises:
        UserError: it is no number of layers.
    """
    found = [int(match[1][:9]) for name in names if (match := re.match(pattern, name))]
    if found and max(found) >= MAX_LAYERS:
        raise UserError(f"the weights name a layer {max(found)}; a model has at most {MAX_LAYERS}")
    return max(found) + 1 if found else 0

"""Which class of a model is which class of a set? They are matched by name wherever both have names."""

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit_scaling import UserError
from vit_scaling.data.sources import Source
from vit_scaling.data.sources.listing import normal_name, shown, summary

COMMON, NUMBER = "common", "number"
UNMATCHED = -2
"""The label of an image whose class the model lacks; the loader leaves it out and counts it."""


@dataclasses.dataclass
class MatchedSource:
    """A set under the class numbers of a model.

    Attributes:
        unmatched: the set under its own numbers.
        table: for each class of the set the model's number of it, or UNMATCHED.
        class_names: the model's.
        num_classes: the model's.
    """

    unmatched: Source
    table: np.ndarray
    class_names: tuple[str, ...] | None
    num_classes: int

    def __post_init__(self) -> None:
        self.multi_label = self.unmatched.multi_label

    def __len__(self) -> int:
        return len(self.unmatched)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.unmatched[index]
        label = record["label"]
        if not self.multi_label:
            return record | {"label": np.int32(self.table[label] if label >= 0 else label)}
        there = self.table[np.flatnonzero(label)]
        multi_hot = np.zeros(self.num_classes, np.float32)
        multi_hot[there[there >= 0]] = 1
        return record | {"label": multi_hot}

    def id(self, index: int) -> str:
        return self.unmatched.id(index)

    @property
    def left_out(self) -> list[str]:
        """The names of the set's classes that the model lacks."""
        return [name for name, number in zip(self.unmatched.class_names or (), self.table, strict=False) if number < 0]


def match(
    source: Source,
    model_names: Sequence[str] | None,
    num_classes: int,
    class_map: Mapping[str, str] | str | None = None,
    owners: tuple[str, str] = ("the model", "the set"),
) -> Source:
    """Returns a set under the class numbers of a model: itself if they are the same, else a MatchedSource.

    Args:
        source: the set.
        model_names: the model's classes, by number; None if they have no names.
        num_classes: of the model.
        class_map: as in `match_classes`, or "number": class i of the set is class i of the model.
        owners: what messages call the model and the set.

    Raises:
        UserError: as `match_classes`; or classes are matched by number and there are not equally many.
    """
    if class_map == NUMBER or not model_names or not source.class_names:
        if class_map not in (None, NUMBER):
            nameless = owners[1] if model_names else owners[0]
            raise UserError(f"{nameless} has no names of classes, so no class map but {NUMBER} can be used")
        if source.num_classes == num_classes:
            return source
        if source.num_classes > num_classes or class_map != NUMBER:
            raise UserError(
                f"{owners[1]} has {source.num_classes} classes and {owners[0]} has {num_classes}; classes without "
                "names are matched by number, so give both the same classes"
            )
        names = None if model_names is None else tuple(model_names)
        return MatchedSource(source, np.arange(source.num_classes), names, num_classes)
    same = tuple(map(normal_name, source.class_names)) == tuple(map(normal_name, model_names))
    if same and not isinstance(class_map, Mapping):
        return source
    matched = match_classes(model_names, source.class_names, class_map, owners)
    table = np.array([matched.get(number, UNMATCHED) for number in range(source.num_classes)], np.int64)
    return MatchedSource(source, table, tuple(model_names), num_classes)


def match_classes(
    model_names: Sequence[str],
    set_names: Sequence[str],
    class_map: Mapping[str, str] | str | None = None,
    owners: tuple[str, str] = ("the model", "the set"),
) -> dict[int, int]:
    """Returns {class number in the set: class number of the model} for every class of the set that is evaluated.

    Without `class_map` every class of the set must be one of the model's; the set may lack some. Classes of the set
    that are absent from the result have no counterpart: their images are left out and counted by the caller.

    Args:
        model_names: the model's classes, by number.
        set_names: the set's classes, by number.
        class_map: "common" evaluates the classes that both have; a mapping {name in the set: name of the model} says
            which is which, and names that it does not mention are matched as they are, or else left out.
        owners: what messages call the model and the set.

    Raises:
        UserError: the classes differ, a name is there twice, or the map names an unknown class.
    """
    model, own = _numbered(model_names, owners[0]), _numbered(set_names, owners[1])
    if isinstance(class_map, str) and class_map != COMMON:
        raise UserError(f"the class map {class_map!r} is neither {COMMON!r} nor a mapping of names")
    mapping = {normal_name(k): normal_name(v) for k, v in class_map.items()} if isinstance(class_map, Mapping) else {}
    for name, target in mapping.items():
        if name not in own:
            raise UserError(f"the class map names {shown(name)!r}, which is no class of the set; it has {_few(own)}")
        if target not in model:
            raise UserError(
                f"the class map names {shown(target)!r}, which is no class of the model; it has {_few(model)}"
            )
    matched = {number: model[target] for name, number in own.items() if (target := mapping.get(name, name)) in model}
    unknown = [name for name, number in own.items() if number not in matched]
    if unknown and class_map is None:
        raise UserError(
            f"{owners[0]} lacks {summary(unknown)} of the {len(own)} classes of {owners[1]}"
            + (f"; {_CHOICES}" if owners == ("the model", "the set") else "; give both the same classes")
        )
    if not matched:
        raise UserError(f"model and set have no class in common: the model has {_few(model)}, the set {_few(own)}")
    return matched


def parse_class_map(text: str) -> dict[str, str] | str | None:
    """Returns the class map that --class_map gives: common, number, NAME=NAME pairs with commas between, or a table.

    A table is a .csv file of two columns: the name in the set, and that of the model.

    Raises:
        UserError: the text has another form, or the table cannot be read.
    """
    if text in ("", COMMON, NUMBER):
        return text or None
    if text.endswith(".csv"):
        try:
            with Path(text).open(newline="", encoding="utf-8-sig") as stream:
                pairs = [[cell.strip() for cell in row] for row in csv.reader(stream) if row]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"--class_map: {text} cannot be read as a table in UTF-8: {error}") from None
    else:
        pairs = [[name.strip() for name in part.split("=")] for part in text.split(",")]
    for pair in pairs:
        if len(pair) != 2 or not all(pair):
            raise UserError(
                f"--class_map has {shown('='.join(pair))!r}; write {COMMON}, {NUMBER}, NAME IN THE SET=NAME OF THE "
                "MODEL,..., or the name of a .csv file with these two columns"
            )
    names = [pair[0] for pair in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--class_map maps {shown(twice)!r} twice")
    return {pair[0]: pair[1] for pair in pairs}


_CHOICES = (
    "--class_map=common evaluates those that both have, --class_map=NAME=NAME,... or a .csv file says which class is "
    "which, and --class_map=number takes them by number"
)


def _numbered(names: Sequence[str], owner: str) -> dict[str, int]:
    numbered = {normal_name(name): number for number, name in enumerate(names)}
    if len(numbered) < len(names):
        twice = next(name for name in names if [normal_name(x) for x in names].count(normal_name(name)) > 1)
        raise UserError(f"{owner} has the class {shown(twice)!r} twice, so classes cannot be matched by name")
    return numbered


def _few(names: Mapping[str, int]) -> str:
    return summary(list(names), most=3)

"""Which class of a model is which class of a set? They are matched by name, never by number."""

from collections.abc import Mapping, Sequence

from vit_scaling import UserError
from vit_scaling.data.sources.listing import normal_name, shown, summary

COMMON = "common"


def match_classes(
    model_names: Sequence[str], set_names: Sequence[str], class_map: Mapping[str, str] | str | None = None
) -> dict[int, int]:
    """Returns {class number in the set: class number of the model} for every class of the set that is evaluated.

    Without `class_map` every class of the set must be one of the model's; the set may lack some. Classes of the set
    that are absent from the result have no counterpart: their images are left out and counted by the caller.

    Args:
        model_names: the model's classes, by number.
        set_names: the set's classes, by number.
        class_map: "common" evaluates the classes that both have; a mapping {name in the set: name of the model} says
            which is which, and names that it does not mention are matched as they are, or else left out.

    Raises:
        UserError: the classes differ, a name is there twice, or the map names an unknown class.
    """
    model = _numbered(model_names, "the model")
    own = _numbered(set_names, "the set")
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
            f"the model lacks {summary(unknown)} of the set's {len(own)} classes; --class_map=common evaluates the "
            f"{len(matched)} that both have, and --class_map=NAME=NAME,... says which class is which"
        )
    if not matched:
        raise UserError(f"model and set have no class in common: the model has {_few(model)}, the set {_few(own)}")
    return matched


def parse_class_map(text: str) -> dict[str, str] | str | None:
    """Returns the class map that --class_map gives: "common", or NAME=NAME pairs separated by commas.

    Raises:
        UserError: the text has another form.
    """
    if text in ("", COMMON):
        return text or None
    pairs = [part.partition("=") for part in text.split(",")]
    bad = next((name for name, equals, target in pairs if not (name.strip() and equals and target.strip())), None)
    if bad is not None:
        raise UserError(f"--class_map has {shown(bad)!r}; write {COMMON}, or NAME IN THE SET=NAME OF THE MODEL,...")
    names = [name.strip() for name, _, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--class_map maps {shown(twice)!r} twice")
    return {name.strip(): target.strip() for name, _, target in pairs}


def _numbered(names: Sequence[str], owner: str) -> dict[str, int]:
    numbered = {normal_name(name): number for number, name in enumerate(names)}
    if len(numbered) < len(names):
        twice = next(name for name in names if [normal_name(x) for x in names].count(normal_name(name)) > 1)
        raise UserError(f"{owner} has the class {shown(twice)!r} twice, so classes cannot be matched by name")
    return numbered


def _few(names: Mapping[str, int]) -> str:
    return summary(list(names), most=3)

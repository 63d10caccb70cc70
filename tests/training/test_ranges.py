"""Every numeric field of every config has a range, and what lies outside is refused in one sentence."""

import copy
import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

import pytest

from tests import tiny
from vit_scaling import UserError
from vit_scaling import config as c
from vit_scaling.data.images.transforms import TransformConfig
from vit_scaling.models import MODELS


def parts(hint: Any) -> set[Any]:
    return {hint}.union(*map(parts, typing.get_args(hint)))


def numeric(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (path, type) of all numeric fields; those of every model under model."""
    for name, hint in typing.get_type_hints(kind).items():
        inner = [part for part in parts(hint) if dataclasses.is_dataclass(part)]
        for each in inner:
            yield from numeric(each, f"{prefix}{name}.")
        if not inner and {int, float} & parts(hint):
            yield f"{prefix}{name}", hint


FIELDS = dict(numeric(c.Config))


def whole(model: type) -> c.Config:
    """A config in which every field that may be None is there."""
    fewshot = c.FewShotConfig(train=tiny.digits("train"), test=tiny.digits("test"), transform=TransformConfig())
    evaluation = c.EvaluationConfig(
        every=c.Duration(1), validation=tiny.digits("train"), test=tiny.digits("test"), fewshot=fewshot
    )
    return tiny.config(model=model(), evaluation=evaluation)


CONFIGS = [whole(model) for model in MODELS]


def put(config: c.Config, path: str, hint: Any, number: float) -> c.Config | None:
    """Returns the config with a field set to a number, or to a tuple of it; None if this model has no such field."""
    changed = copy.copy(config)
    node: Any = changed
    *owners, name = path.split(".")
    for owner in owners:
        setattr(node, owner, copy.copy(getattr(node, owner)))
        node = getattr(node, owner)
    if not hasattr(node, name):
        return None
    is_tuple = isinstance(getattr(node, name), tuple) or any(typing.get_origin(part) is tuple for part in parts(hint))
    setattr(node, name, (number,) if is_tuple else number)
    return changed


def test_every_numeric_field_has_a_range() -> None:
    assert len(FIELDS) > 100
    assert [path for path in FIELDS if c.range_of(path) is None] == []
    keys = {key for path in FIELDS for key in c.RANGES if path == key or path.endswith(f".{key}")}
    assert set(c.RANGES) == keys, "a range of no field"


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf"), -1e31, 1e31], ids=str)
def test_numbers_that_no_field_takes_are_refused(number: float) -> None:
    for path, hint in FIELDS.items():
        if number > 0 and "inf" in str(c.range_of(path)):
            continue
        configs = [found for config in CONFIGS if (found := put(config, path, hint, number)) is not None]
        assert configs, path
        for config in configs:
            with pytest.raises(UserError) as refused:
                c.check(config)
            assert str(refused.value).startswith(f"{path} is "), path
            assert "\n" not in str(refused.value)


def test_ends_of_a_range() -> None:
    def is_refused(path: str, number: float) -> bool:
        try:
            c.check_ranges(put(CONFIGS[0], path, FIELDS[path], number))
        except UserError:
            return True
        return False

    for path in FIELDS:
        if put(CONFIGS[0], path, FIELDS[path], 1) is None:
            continue
        interval = str(c.range_of(path))
        low, high = map(float, interval[1:-1].split(","))
        assert is_refused(path, low) == (interval[0] == "("), path
        assert is_refused(path, high) == (interval[-1] == ")"), path
        assert is_refused(path, low - max(1.0, 1e-3 * abs(low))), path
        assert is_refused(path, high + max(1.0, 1e-3 * high)) or high == float("inf"), path


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("evaluation.batch_size", 0),
        ("data.batch_size", 0),
        ("model.width", 10**9),
        ("data.transform.size", 100_000),
        ("log.watchdog", -1),
        ("optim.lr", -1),
        ("checkpoint.keep", 0),
        ("seed", 2**32),
    ],
)
def test_refused_before_anything_is_read(path: str, value: int) -> None:
    config = put(CONFIGS[0], path, FIELDS[path], value)
    assert config is not None
    with pytest.raises(UserError, match=f"^{path} is .*; it must be "):
        c.resolve(config, 1000)


def test_the_defaults_and_the_small_run_are_within() -> None:
    for config in [*CONFIGS, tiny.config()]:
        c.check(config)

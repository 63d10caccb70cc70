"""The run-time type checker of the tests: beartype, taking an int for a float as Python's own typing does, and a path
in a bucket for a path."""

from pathlib import Path

from beartype import BeartypeConf, FrozenDict, beartype
from etils import epath

check = beartype(conf=BeartypeConf(is_pep484_tower=True, hint_overrides=FrozenDict({Path: Path | epath.Path})))

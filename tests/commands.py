"""The commands' own parsers, in this process: each test starts from flags as they were before."""

import contextlib
import copy
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
from absl import flags
from array_record.python import array_record_data_source  # noqa: F401  # defines a flag, which is not to be forgotten


@contextlib.contextmanager
def loaded(command: str, *arguments: str) -> Iterator[ModuleType]:
    """Imports `vit_scaling.COMMAND` as if it were started with these arguments, and then forgets its flags."""
    before = {name: copy.copy(value) for name, value in flags.FLAGS.__dict__.items()}
    name = f"vit_scaling.{command}"
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, name, raising=False)
        patch.setattr(sys, "argv", [command, *arguments])
        try:
            yield importlib.import_module(name)
        finally:
            sys.modules.pop(name, None)
            flags.FLAGS.__dict__.clear()
            flags.FLAGS.__dict__.update(before)


def parse(command: str, *arguments: str) -> object:
    """Returns the parsed config of a command line, or None where it has none.

    Raises:
        UserError: the command line has a mistake.
    """
    from vit_scaling import cli

    with loaded(command, *arguments) as module:
        argv = module.joined(sys.argv) if hasattr(module, "joined") else sys.argv
        cli.parse(argv, getattr(module, "COMMANDS", ()), words=command == "predict")
        return flags.FLAGS["config"].value if "config" in flags.FLAGS else None

"""timm without torchvision, of which there is no build for every torch: its networks use nothing of it."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types


class _Anything(type):
    """A class that has every attribute."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Module(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        own = name.split(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if own else None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


def timm():
    """Returns timm, with stand-ins for torchvision where that is not installed."""
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.insert(0, _Finder())
    return importlib.import_module("timm")

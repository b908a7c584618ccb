"""Imports a framework from a folder of its source, with empty modules in the place of packages that are not installed.

Frameworks import far more than a search needs (servers, data sets, plots). What is missing becomes a module whose
attributes are empty classes, so that what does need it fails where it uses it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any


class _Empty(ModuleType):
    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (), {"__init__": lambda *_, **__: None})
        setattr(self, name, value)
        return value


class _Missing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: Iterable[str]) -> None:
        self._names = {name for name in names if name not in sys.modules and importlib.util.find_spec(name) is None}

    def find_spec(self, fullname: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        known = fullname.partition(".")[0] in self._names
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def add_source(folder: str | Path, missing: Iterable[str] = ()) -> None:
    """Put a folder of Python source first on the path; ``missing`` packages become empty modules if not installed."""
    if not Path(folder).is_dir():
        raise SystemExit(f"{folder}: no such folder; get the framework's source first")
    sys.meta_path.append(_Missing(missing))
    sys.path.insert(0, str(folder))

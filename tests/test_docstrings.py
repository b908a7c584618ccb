"""The examples in the docstrings run and give the results that they show."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import tts_kernels

FOUND = [m.name for m in pkgutil.walk_packages(tts_kernels.__path__, "tts_kernels.") if not m.ispkg]
# _ops is no Python module, and those of triton need triton (test_triton.py).
MODULES = ["tts_kernels", *(m for m in FOUND if not m.endswith(("__main__", "._ops")) and ".triton." not in m)]
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
    assert results.failed == 0


def test_every_public_function_has_an_example() -> None:
    public = [getattr(tts_kernels, name) for name in tts_kernels.__all__]
    functions = [f for f in public if callable(f) and not isinstance(f, type)]
    assert functions
    assert [f.__name__ for f in functions if ">>>" not in (f.__doc__ or "")] == []

"""A pytest plugin that runs an op's tests on its Triton kernels, in Triton's interpreter.

``TRITON_INTERPRET=1 PYTHONPATH=tests pytest -p triton_backend.plugin tests/test_prune.py``. The interpreter takes
milliseconds for a program, so only the small sizes of tables are tested, unless ``--triton-all`` is given. Tests of
threads, of instruction sets and of the C++ operators themselves do not apply.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
from rules import draw_less

import tts_kernels as tk
from tts_kernels import triton as backend

NOT_FOR_TRITON = ("thread", "instruction_set", "opcheck", "distribution", "chi_square", "independent_draws", "any_plan",
                  "misleading_row")  # fmt: skip
# Hundreds of draws, each a program that takes seconds here; the emulator runs these.
MANY_DRAWS = ("smallest_set", "renormalises", "kth_stay", "cuts_through_ties", "min_p_is", "random_rows",
              "infinite_logits", "extreme_temperatures")  # fmt: skip
LARGEST = {"vocab": 1100, "steps": 40, "width": 600, "tokens": 140, "rows": 20, "head_dim": 128}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--triton-all", action="store_true", help="the large cases too: hours")


def pytest_configure(config: pytest.Config) -> None:  # noqa: ARG001
    if not backend.INTERPRETED:
        raise pytest.UsageError("set TRITON_INTERPRET=1: no GPU is needed then")
    tk.use_backend("triton")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("triton_all"):
        return
    draw_less(items)
    left_out = NOT_FOR_TRITON + MANY_DRAWS
    dropped = [i for i in items if any(word in i.name for word in left_out) or _is_large(i)]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [i for i in items if i not in dropped]


def _is_large(item: pytest.Item) -> bool:
    parameters: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    for name, value in parameters.items():
        if name in LARGEST and isinstance(value, int) and value > LARGEST[name]:
            return True
        if name == "lengths" and sum(value) > 500:
            return True
        if name == "size" and math.prod(value) > 400_000:
            return True
    return False


@pytest.fixture(autouse=True)
def _on_triton() -> Any:
    """Tests that choose a backend put this one back."""
    tk.use_backend("triton")
    yield
    tk.use_backend("triton")

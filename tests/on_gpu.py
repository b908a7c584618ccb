"""A pytest plugin that runs an op's tests on a GPU.

``PYTHONPATH=tests pytest -p on_gpu tests/test_prune.py``: the GPU is torch's default device, so that a test's tensors
are there unless the test says otherwise, and values are checked as on a CPU. ``--on-backend triton`` chooses the
implementation; ``--pretend-gpu`` tries the tests themselves on a machine without a GPU (`pretend_gpu`). Tests of
threads, of instruction sets and of layouts that only exist on a CPU are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from pretend_gpu import PretendGpu

import tts_kernels as tk

NOT_FOR_GPU = (
    "thread", "instruction_set", "opcheck", "any_plan",
    # A GPU keeps a packed weight as it is, and multiplies by torch's library.
    "documented_layout", "does_not_depend_on_its_company", "one_row_for_all", "test_decoder_layers.py::test_bad_input",
    # Have opcheck in them, of operators that C++ has no kernel of on a GPU.
    "test_a_quantised_cache_gets_what_append_makes", "test_decoder_layers.py::test_quantised_caches",
    # A tensor k on a GPU needs max_k, which these leave out.
    "a_k_for_each_group", "nothing_kept_of_a_group", "prune.py::test_bad_input",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--on-backend", default="auto", help="as tts_kernels.use_backend takes it")
    parser.addoption("--pretend-gpu", action="store_true", help="on the CPU")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = (*NOT_FOR_GPU, "fp8_cache") if config.getoption("pretend_gpu") else NOT_FOR_GPU  # C++ has none
    dropped = [item for item in items if any(word in item.nodeid for word in left_out)]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in dropped]


@pytest.fixture(autouse=True)
def _on_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test starts on the GPU, with this backend and checks of values."""
    option = request.config.getoption
    device = PretendGpu(watches=False) if option("pretend_gpu") else nullcontext()
    with device, torch.device("cuda"), tk.use_backend(option("on_backend")), tk.debug_checks(True):
        yield

"""A pytest plugin that runs an op's tests on its Triton kernels as compiled for a GPU, in the GPU emulator.

``PYTHONPATH=tests pytest -p triton_backend.emulated tests/test_prune.py [--emulate-seed 3] [--emulate-sanitize
thread]``. Each launch is compiled for sm_80 as Triton's own launcher would do, and its PTX runs on the CPU's tensors.
Every tensor is a buffer with bounds. A launch with another specialisation is compiled again, twice, so few tests should
be chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from gpu_emulator import Kernel, Pointers, load
from rules import draw_less
from torch import Tensor
from triton.runtime.jit import JITFunction

import tts_kernels as tk
from tts_kernels import triton as backend
from tts_kernels.triton import configs, copy_pages
from tts_kernels.triton.copy_pages import copy_pages_

from .ahead_of_time import TARGETS, Launch, compiled, launch_of, specialised
from .plugin import NOT_FOR_TRITON

TARGET, DEVICE_CLASS, SHARED_LIMIT = TARGETS["sm_80"]
HANG = 600.0  # seconds: tests launch thousands of programs at a time, which is no endless loop


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("GPU emulator")
    group.addoption("--emulate-sanitize", choices=("address", "thread"), help="run kernels under a sanitizer")
    group.addoption("--emulate-seed", type=int, default=0, help="shuffles programs and threads; 0: in order")


class Emulator:
    """Takes the place of Triton's launcher."""

    def __init__(self, sanitize: str | None, seed: int) -> None:
        self.sanitize, self.seed, self.launches = sanitize, seed, 0
        self._kernels: dict[tuple[str, ...], tuple[Kernel, Any]] = {}
        self._caches: dict[int, Tensor] = {}

    def launch(self, launch: Launch) -> None:
        if self.sanitize == "thread":  # a block's threads must be few enough to be told apart
            launch.options["num_warps"] = min(4, launch.options.get("num_warps", 4))
        given = specialised(launch)
        key = (launch.kernel.fn.__module__, launch.name, str(given), str(launch.options))
        if key not in self._kernels:
            binary = compiled(launch, TARGET)
            kernel = load(binary.asm["ptx"], binary.metadata.name, sanitize=self.sanitize)
            self._kernels[key] = kernel, binary.metadata
        kernel, about = self._kernels[key]
        assert about.shared <= SHARED_LIMIT
        args = [self._argument(name, value) for name, value in launch.arguments.items() if name not in given.constants]
        scratch = [None] * (len(kernel.params) - len(args))  # Triton's own buffers, unused here
        options = {"dynamic_smem": about.shared, "seed": self.seed, "timeout": HANG, "duplicate_stores": True}
        kernel.launch(launch.grid, 32 * about.num_warps, [*args, *scratch], **options)
        self.launches += 1

    def copy_pages_(self, caches: Sequence[Tensor], src: Tensor, dst: Tensor) -> None:
        """The op; its kernel finds the caches by a table of addresses, which the emulator has to know as tensors."""
        self._caches = {cache.data_ptr(): cache for cache in caches}
        copy_pages_(caches, src, dst)

    def _argument(self, name: str, value: Any) -> Any:
        return Pointers([self._caches[address] for address in value.tolist()]) if name == "table" else value


EMULATOR = pytest.StashKey[Emulator]()


def pytest_configure(config: pytest.Config) -> None:
    if backend.INTERPRETED:
        raise pytest.UsageError("TRITON_INTERPRET=1 is set: nothing would be compiled")
    emulator = Emulator(config.getoption("emulate_sanitize"), config.getoption("emulate_seed"))
    config.stash[EMULATOR] = emulator

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:  # noqa: ARG001
        emulator.launch(launch_of(kernel, grid, args, kwargs))

    JITFunction.run = run
    copy_pages.copy_pages_ = emulator.copy_pages_  # type: ignore[method-assign]
    configs.device_class = lambda _device: DEVICE_CLASS
    backend.DEVICES = frozenset({"cpu"})  # type: ignore[misc]
    backend.missing = lambda: ""  # type: ignore[assignment]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    dropped = [i for i in items if any(word in i.name for word in NOT_FOR_TRITON)]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [i for i in items if i not in dropped]
    draw_less(items)


@pytest.fixture(autouse=True)
def _on_triton() -> Any:
    """Tests that choose a backend put this one back."""
    tk.use_backend("triton")
    yield
    tk.use_backend("triton")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    terminalreporter.write_line(f"{config.stash[EMULATOR].launches} emulated launches")

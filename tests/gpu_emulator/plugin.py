"""A pytest plugin: ``pytest -p gpu_emulator.plugin tests/test_prune.py`` runs those tests on emulated CUDA kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from rules import draw_less

from .library import CSRC, Library, operators


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("GPU emulator")
    group.addoption("--emulate", default=",".join(operators()), help="operators to emulate, by name; all by default")
    group.addoption("--emulate-sanitize", choices=("address", "thread"), help="run kernels under a sanitizer")
    group.addoption("--emulate-sources", type=Path, default=CSRC, help="a folder like csrc")
    group.addoption("--emulate-seed", type=int, default=0, help="shuffles blocks and threads; 0: in order")


def pytest_configure(config: pytest.Config) -> None:
    from tts_kernels.op import OPS  # the CPU's kernels come first, to be replaced

    names = config.getoption("emulate").split(",")
    library = Library(names, *map(config.getoption, ("emulate_sanitize", "emulate_seed", "emulate_sources")))
    config.stash[LIBRARY] = library
    for op in (OPS[name] for base in names for name in (base, f"{base}_") if name in OPS):
        op.no_cpp_for = lambda *_: ""  # as on a GPU


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    draw_less(items)


LIBRARY = pytest.StashKey[Library]()


@pytest.fixture
def emulated(request: pytest.FixtureRequest) -> Library:
    """The library, its record of launches empty."""
    library = request.config.stash[LIBRARY]
    library.launches.clear()
    return library


@pytest.fixture(autouse=True)
def values_are_checked() -> Iterator[None]:
    """CUDA kernels take index values as they come: tests of bad ones need what a user of a GPU would switch on."""
    import tts_kernels as tk

    with tk.debug_checks(True):
        yield


def pytest_report_header(config: pytest.Config) -> str:
    library = config.stash[LIBRARY]
    return f"emulated CUDA: {config.getoption('emulate')}, sanitizer {library.sanitize}, seed {library.seed}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    terminalreporter.write_line(f"{len(config.stash[LIBRARY].launches)} emulated launches")

"""``--device cuda``: the same benchmarks on a GPU, by making it torch's default device."""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the benchmarks' tensors are: cpu (default) or cuda")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_default_device(config.getoption("device"))

"""``--device cuda``: the same benchmarks on a GPU, by making it torch's default device."""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the benchmarks' tensors are: cpu (default) or cuda")


def pytest_configure(config: pytest.Config) -> None:
    device = config.getoption("device")
    if device != "cpu":  # a default device costs each call of torch about a microsecond, even where it is the CPU
        torch.set_default_device(device)

"""Traffic between the host and a model's device: only indices go up, and only tokens and scores come down.

In a search on a GPU, the host plans while the device computes. So indices are copied from pinned memory while the host
goes on. The host waits for the device only in `read_tokens` and `read_scores`: once in a decode step, and once in a
round of scoring. On a CPU nothing is copied.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

import tts_kernels as tk

__all__ = ["read_scores", "read_tokens", "refill", "upload"]

_CPU: Final = torch.device("cpu")


def upload(host: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on a device, without waiting for the copy. torch keeps the pinned memory until it is done."""
    return host if host.device.type == device.type else host.pin_memory().to(device, non_blocking=True)


def refill(buffer: Tensor, host: Tensor) -> None:
    """Write a CPU tensor over one on any device, without waiting for the copy."""
    buffer.copy_(host if buffer.device.type == "cpu" else host.pin_memory(), non_blocking=True)


def read_tokens(sampled: tk.Sampled | tk.SampledTop) -> tuple[Tensor, Tensor]:
    """The tokens of a decode step [B] and their log-probabilities [B], on the host. Waits for the device once."""
    tokens, logprobs = _read(*sampled[:2])
    return tokens, logprobs


def read_scores(*columns: Tensor) -> list[list[Any]]:
    """The results of a round of scoring, [S] each: scores, indices, flags. Waits for the device once."""
    return [tensor.tolist() for tensor in _read(*columns)]


def _read(*tensors: Tensor) -> list[Tensor]:
    """Copies of one device's tensors on the host. Only the last copy waits; the others are then done, too."""
    *before, last = tensors
    host = [tensor.to(_CPU, non_blocking=True) for tensor in before]
    return [*host, last.cpu()]

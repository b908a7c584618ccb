"""Tile sizes and warps of each kernel, for each class of device.

This is a table instead of autotuning, because a search at run time would synchronise the device, time kernels that
write in place, and fail inside a CUDA graph. An entry overrides that of ``"default"``. None has been timed yet.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from . import INTERPRETED

_Config = dict[str, Any]

CONFIGS: dict[str, dict[str, _Config]] = {
    "default": {
        "rows": {"num_warps": 4},  # one program for each row: norms, activations, copies
        "step_scores": {"BLOCK": 2048, "num_warps": 4},
        "hidden_layer": {"BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
        "hidden_layer_float32": {"BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
        "prune": {"BLOCK": 128, "num_warps": 4},
        "linear_logprob": {"BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
        "linear_logprob_float32": {"BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
        "linear": {"BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
        "linear_float32": {"BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
        "sample": {"BLOCK": 4096, "num_warps": 16},
        "tree_attention": {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
        # float32, or a head above 128
        "tree_attention_wide": {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    },
    "ampere": {},
    "ada": {"linear_logprob": {"BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}},
    "hopper": {"sample": {"BLOCK": 8192, "num_warps": 16}},
    "blackwell": {"sample": {"BLOCK": 8192, "num_warps": 16}},
    "cdna": {  # 64 KB of shared memory, warps of 64
        "hidden_layer": {"BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2},
        "linear_logprob": {"BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2},
        "sample": {"BLOCK": 4096, "num_warps": 8},
        # Several warps need more rows than one instruction of the matrix cores takes, or Triton 3.7 fails to compile.
        "tree_attention": {
            "BLOCK_M": 32,
            "BLOCK_N": 64,
            "num_warps": 4,
            "num_stages": 2,
            "matrix_instr_nonkdim": 16,
        },
        "tree_attention_wide": {
            "BLOCK_M": 32,
            "BLOCK_N": 16,
            "num_warps": 4,
            "num_stages": 1,
            "matrix_instr_nonkdim": 16,
        },
    },
    "interpreter": {},
}

_CAPABILITIES = {(8, 0): "ampere", (8, 6): "ada", (8, 9): "ada", (9, 0): "hopper", (10, 0): "blackwell", (12, 0): "ada"}


@functools.cache
def device_class(device: torch.device) -> str:
    """The name of a device in `CONFIGS`."""
    if INTERPRETED or device.type == "cpu":
        return "interpreter"
    if device.type != "cuda":
        return "default"
    if torch.version.hip:
        return "cdna"
    return _CAPABILITIES.get(torch.cuda.get_device_capability(device), "default")


def config(kernel: str, device: torch.device) -> _Config:
    """The entry of a kernel for a device."""
    return CONFIGS[device_class(device)].get(kernel, CONFIGS["default"][kernel])

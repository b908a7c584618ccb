"""Folders with quantised weights in the published formats, written here without the formats' libraries."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import save_checkpoint
from torch import Tensor
from transformers import PreTrainedModel

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(numbers: Tensor, bits: int = 4) -> Tensor:
    """Unsigned numbers [rows, n] in int32 words [rows, n * bits / 32], the lowest first."""
    count = 32 // bits
    shifted = numbers.to(torch.int64).view(len(numbers), -1, count) << torch.arange(0, 32, bits)
    return shifted.sum(-1).to(torch.int32)


def rounded(weight: Tensor, bits: int, group_size: int | None, zeros: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers [N, K], scales and zero points [N, groups] of a weight; numbers from 0 on."""
    groups = weight.unflatten(1, (-1, group_size or weight.shape[1]))
    top, half = 2**bits - 1, 2 ** (bits - 1)
    low, high = groups.amin(2), groups.amax(2)
    if zeros:
        scale = ((high - low) / top).half()
        zero = (-low / scale.float()).round().clamp(0, top)
    else:
        scale = (groups.abs().amax(2) / (half - 1)).half()
        zero = torch.full_like(low, half)
    numbers = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(0, top)
    return numbers.flatten(1).to(torch.int64), scale, zero.to(torch.int64)


def gptq(weight: Tensor, group_size: int | None, zeros: bool, version: int = 1) -> tuple[dict[str, Tensor], Tensor]:
    numbers, scale, zero = rounded(weight, 4, group_size, zeros)
    less = 1 if version == 1 else 0
    zero = zero.clamp(min=less)
    parts = {
        "qweight": words(numbers).T.contiguous(),
        "qzeros": words((zero - less).T.contiguous()),
        "scales": scale.T.contiguous(),
        "g_idx": (torch.arange(weight.shape[1]) // (group_size or weight.shape[1])).to(torch.int32),
    }
    return parts, whole(numbers, scale, zero, group_size)


def awq(weight: Tensor, group_size: int | None) -> tuple[dict[str, Tensor], Tensor]:
    numbers, scale, zero = rounded(weight, 4, group_size, True)

    def ordered(each: Tensor) -> Tensor:
        return words(each.T.reshape(each.shape[1], -1, 8)[..., list(AWQ_ORDER)].flatten(1))

    parts = {"qweight": ordered(numbers), "qzeros": ordered(zero), "scales": scale.T.contiguous()}
    return parts, whole(numbers, scale, zero, group_size)


def compressed(
    weight: Tensor, bits: int, group_size: int | None, zeros: bool, packed: bool
) -> tuple[dict[str, Tensor], Tensor]:
    numbers, scale, zero = rounded(weight, bits, group_size, zeros)
    half = 2 ** (bits - 1)
    parts = {"weight_scale": scale}
    if packed:
        parts |= {"weight_packed": words(numbers, bits), "weight_shape": torch.tensor(weight.shape)}
    else:
        parts["weight"] = (numbers - half).to(torch.int8)
    if zeros:
        parts["weight_zero_point"] = words(zero.T.contiguous(), bits).T.contiguous() if packed else (zero - half).char()
    return parts, whole(numbers, scale, zero, group_size)


def whole(numbers: Tensor, scale: Tensor, zero: Tensor, group_size: int | None) -> Tensor:
    size = group_size or numbers.shape[1]
    return (numbers - zero.repeat_interleave(size, 1)) * scale.float().repeat_interleave(size, 1)


def save(
    folder: Path,
    model: PreTrainedModel,
    config: dict[str, Any],
    quantise: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]],
) -> PreTrainedModel:
    """Write a model with its projections quantised; returns the model on the weights that a reader should find."""
    save_checkpoint(folder, model)
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("_proj.weight"):
            parts, value = quantise(tensor)
            state |= {f"{name.removesuffix('.weight')}.{part}": each for part, each in parts.items()}
            tensor.copy_(value)
        elif name != "lm_head.weight" or not model.config.tie_word_embeddings:
            state[name] = tensor.clone()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, config)
    return model


def change_config(folder: Path, quantization: dict[str, Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"] = quantization
    path.write_text(json.dumps(config), encoding="utf-8")

"""Checkpoints of compressed-tensors (llm-compressor) with whole numbers: W8A8, and W4A16 or W8A16 packed in int32.

``int-quantized``: ``weight`` [N, K] int8. ``pack-quantized``: ``weight_packed`` [N, K * bits / 32] int32, the lowest
first, numbers above their values by half of their range. Beside it ``weight_scale`` [N, groups], and with zero points
``weight_zero_point`` [N, groups] int8, packed [N * bits / 32, groups] int32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tts_search.models.formats.few_bits import FewBitsCheckpoint, check_order, expect, group_size_of, nibbles, refuse
from tts_search.models.quantised import Quantised

__all__ = ["CompressedCheckpoint"]

_METHOD = "compressed-tensors"


class CompressedCheckpoint(FewBitsCheckpoint):
    """A folder with weights of compressed-tensors."""

    sign = "weight_scale"
    parts = frozenset({"weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"})

    def _configure(self, config: Mapping[str, Any]) -> None:
        where, kind = self.path_or_id, config.get("format")
        if kind not in ("int-quantized", "pack-quantized"):
            raise refuse(where, _METHOD, f"format {kind!r}")
        sparsity = config.get("sparsity_config") or {}
        if sparsity.get("format", "dense") != "dense" or config.get("transform_config"):
            raise refuse(where, _METHOD, "sparsity_config or transform_config")
        groups = config.get("config_groups")
        schemes = list(groups.values()) if isinstance(groups, Mapping) else []
        if not schemes or not all(isinstance(scheme, Mapping) for scheme in schemes):
            raise refuse(where, _METHOD, "config_groups without a scheme")
        forms = {self._form(scheme) for scheme in schemes}
        if len(forms) > 1:
            raise refuse(where, _METHOD, "more than one scheme")
        self._bits, self._group_size = forms.pop()
        self._packed = kind == "pack-quantized"
        if self._bits != 8 and not self._packed:
            raise refuse(where, _METHOD, f"{self._bits} bits in format 'int-quantized'")

    def _form(self, scheme: Mapping[str, Any]) -> tuple[int, int | None]:
        """Bits and group size of a scheme."""
        weights, inputs = scheme.get("weights"), scheme.get("input_activations")
        if not isinstance(weights, Mapping) or weights.get("type", "int") != "int":
            raise refuse(self.path_or_id, _METHOD, "weights that are no whole numbers")
        if weights.get("num_bits") not in (4, 8):
            raise refuse(self.path_or_id, _METHOD, f"{weights.get('num_bits')!r} bits")
        if inputs is not None and not (isinstance(inputs, Mapping) and inputs.get("dynamic") is True):
            raise refuse(self.path_or_id, _METHOD, "activations that have a scale in the file")
        if inputs is not None and (inputs.get("num_bits"), inputs.get("type", "int")) != (8, "int"):
            raise refuse(self.path_or_id, _METHOD, "activations that are not whole numbers of 8 bits")
        strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
        if strategy not in ("channel", "group"):
            raise refuse(self.path_or_id, _METHOD, f"strategy {strategy!r}")
        size = weights.get("group_size") if strategy == "group" else None
        return weights["num_bits"], group_size_of(self.path_or_id, _METHOD, size)

    def _size(self, shape: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        rows, columns = shape["weight_packed" if self._packed else "weight"]
        return rows, columns * 32 // self._bits if self._packed else columns

    def _quantised(self, where: str, parts: Mapping[str, Tensor]) -> Quantised:
        rows, columns = self._size({name: tuple(part.shape) for name, part in parts.items()})
        groups = -(-columns // self._group_size) if self._group_size else 1
        check_order(where, _METHOD, parts.get("weight_g_idx"), self._group_size)
        if self._packed:
            shape = expect(where, parts, "weight_shape", (2,), torch.int64, torch.int32).tolist()
            if shape != [rows, columns]:
                raise ValueError(f"{where}: expected weight_shape {[rows, columns]}, got {shape}")
            words = expect(where, parts, "weight_packed", (rows, columns * self._bits // 32), torch.int32)
            numbers = self._numbers(words)
        else:
            numbers = expect(where, parts, "weight", (rows, columns), torch.int8)
        scale = expect(where, parts, "weight_scale", (rows, groups))
        if "weight_zero_point" not in parts:
            return Quantised(numbers, scale, None, self._group_size)
        if not self._packed:
            zero = expect(where, parts, "weight_zero_point", (rows, groups), torch.int8)
        else:
            words = expect(where, parts, "weight_zero_point", (-(-rows * self._bits // 32), groups), torch.int32)
            zero = self._numbers(words.T)[:, :rows].T
        return Quantised(numbers, scale, zero.float(), self._group_size)

    def _numbers(self, words: Tensor) -> Tensor:
        """The numbers in int32 words, as `Quantised` has them."""
        if self._bits == 4:
            return nibbles(words)
        return (words.contiguous().view(torch.uint8) ^ 128).view(torch.int8)

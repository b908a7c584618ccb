"""Checkpoints of GPTQ (AutoGPTQ, GPTQModel): ``qweight``, ``qzeros``, ``scales`` and ``g_idx`` for each projection.

A projection [N, K] has eight columns in an int32 of ``qweight`` [K / 8, N], the lowest first, and eight rows in an
int32 of ``qzeros`` [groups, N / 8]. In files of the first version, zeros are 1 too small.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tts_search.models.formats.few_bits import FewBitsCheckpoint, check_order, expect, group_size_of, nibbles, refuse
from tts_search.models.quantised import Quantised

__all__ = ["GPTQCheckpoint"]


class GPTQCheckpoint(FewBitsCheckpoint):
    """A folder with weights of GPTQ in 4 bits."""

    sign = "qweight"
    parts = frozenset({"qweight", "qzeros", "scales", "g_idx"})

    def _configure(self, config: Mapping[str, Any]) -> None:
        if config.get("bits") != 4:
            raise refuse(self.path_or_id, "gptq", f"{config.get('bits')!r} bits")
        kind = config.get("checkpoint_format", "gptq")
        if kind not in ("gptq", "gptq_v2"):
            raise refuse(self.path_or_id, "gptq", f"checkpoint_format {kind!r}")
        self._group_size = group_size_of(self.path_or_id, "gptq", config.get("group_size", -1))
        self._less = 1 if kind == "gptq" else 0

    def _size(self, shape: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        words, rows = shape["qweight"]
        return rows, 8 * words

    def _quantised(self, where: str, parts: Mapping[str, Tensor]) -> Quantised:
        rows, columns = self._size({name: tuple(part.shape) for name, part in parts.items()})
        groups = -(-columns // self._group_size) if self._group_size else 1
        check_order(where, "gptq", parts.get("g_idx"), self._group_size)
        words = expect(where, parts, "qweight", (columns // 8, rows), torch.int32)
        zeros = expect(where, parts, "qzeros", (groups, -(-rows // 8)), torch.int32)
        scale = expect(where, parts, "scales", (groups, rows)).T
        zero = nibbles(zeros)[:, :rows].T.float() + self._less
        return Quantised(nibbles(words.T), scale, None if bool((zero == 8).all()) else zero, self._group_size)

"""Checkpoints of AWQ (AutoAWQ's "gemm"): ``qweight``, ``qzeros`` and ``scales`` for each projection.

A projection [N, K] has eight rows in an int32 of ``qweight`` [K, N / 8] and of ``qzeros`` [groups, N / 8], in the
order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from tts_search.models.formats.few_bits import FewBitsCheckpoint, expect, group_size_of, nibbles, refuse
from tts_search.models.quantised import Quantised

__all__ = ["AWQCheckpoint"]

_PLACES: Final = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # where each of eight rows is


class AWQCheckpoint(FewBitsCheckpoint):
    """A folder with weights of AWQ in 4 bits."""

    sign = "qweight"
    parts = frozenset({"qweight", "qzeros", "scales"})

    def _configure(self, config: Mapping[str, Any]) -> None:
        if config.get("bits") != 4:
            raise refuse(self.path_or_id, "awq", f"{config.get('bits')!r} bits")
        if str(config.get("version", "gemm")).lower() != "gemm":
            raise refuse(self.path_or_id, "awq", f"version {config.get('version')!r}")
        self._group_size = group_size_of(self.path_or_id, "awq", config.get("group_size", -1))

    def _size(self, shape: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        columns, words = shape["qweight"]
        return 8 * words, columns

    def _quantised(self, where: str, parts: Mapping[str, Tensor]) -> Quantised:
        rows, columns = self._size({name: tuple(part.shape) for name, part in parts.items()})
        groups = -(-columns // self._group_size) if self._group_size else 1
        numbers = _in_order(expect(where, parts, "qweight", (columns, rows // 8), torch.int32))
        zero = _in_order(expect(where, parts, "qzeros", (groups, rows // 8), torch.int32)).float()
        return Quantised(numbers, expect(where, parts, "scales", (groups, rows)).T, zero, self._group_size)


def _in_order(words: Tensor) -> Tensor:
    """[rows, columns] of words [columns, rows / 8]."""
    each = nibbles(words).view(*words.shape, 8)
    return each[..., _PLACES.to(words.device)].flatten(1).T.contiguous()

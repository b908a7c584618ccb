"""Folders whose safetensors hold projections of few bits: code that these formats share.

Each projection is several tensors, ``<name>.<part>`` for each part of the format. Everything else is stored as
transformers does. A format defines which parts a projection has, and which numbers and scales they are.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from tts_search.models.checkpoint import Checkpoint
from tts_search.models.quantised import Quantised, Weight

__all__ = ["FewBitsCheckpoint", "check_order", "expect", "group_size_of", "nibbles", "refuse"]

_GROUP_SIZES = (32, 64, 128)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class FewBitsCheckpoint(Checkpoint, abc.ABC):
    """A checkpoint whose projections are stored in parts.

    Parameters
    ----------
    path_or_id : str
        Folder or hub id.
    config : dict
        The ``"quantization_config"`` of its configuration.

    Raises
    ------
    ValueError
        If the configuration has an option that is not supported; the message names it.
    """

    sign: ClassVar[str]  # the part that marks a quantised projection
    parts: ClassVar[frozenset[str]]  # all parts that may exist

    def __init__(self, path_or_id: str, config: Mapping[str, Any]) -> None:
        super().__init__(path_or_id)
        self._configure(config)

    @abc.abstractmethod
    def _configure(self, config: Mapping[str, Any]) -> None:
        """Take the options of the format."""

    @abc.abstractmethod
    def _size(self, shape: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """[N, K] of a projection, from the shapes of its parts."""

    @abc.abstractmethod
    def _quantised(self, where: str, parts: Mapping[str, Tensor]) -> Quantised:
        """The weight of a projection from its parts; ``where`` names it in errors."""

    @property
    def few_bits(self) -> bool:
        """Whether weights are quantised."""
        return bool(self._projections)

    @cached_property
    def _stored_names(self) -> frozenset[str]:
        return super().names

    @cached_property
    def _projections(self) -> frozenset[str]:
        """Projections that are stored in parts, by their names without ``.weight``."""
        end = f".{self.sign}"
        return frozenset(name.removesuffix(end) for name in self._stored_names if name.endswith(end))

    @property
    def names(self) -> frozenset[str]:
        """Names of the tensors as transformers has them, without a wrapper's prefix."""
        parts = {f"{stem}.{part}" for stem in self._projections for part in self.parts}
        return (self._stored_names - parts) | {f"{stem}.weight" for stem in self._projections}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of everything that is not quantised."""
        whole = sorted(name for name in self.names if self._stem(name) is None)
        return super().tensor(whole[0]).dtype if whole else torch.bfloat16

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor of the weights."""
        stem = self._stem(name)
        if stem is None:
            return super().shape(name)
        shapes = {}
        for part in self._parts_of(stem):
            shapes[part] = super().shape(f"{stem}.{part}")
        try:
            return self._size(shapes)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{self.path_or_id}: {stem} has no parts of this format: {shapes}") from error

    def weight(self, name: str) -> Weight:
        """A tensor of the weights, with the scales of its file."""
        stem = self._stem(name)
        if stem is None:
            return super().tensor(name)
        found = {}
        for part in self._parts_of(stem):
            found[part] = super().tensor(f"{stem}.{part}")
        return self._quantised(f"{self.path_or_id}: {stem}", found)

    def tensor(self, name: str, rows: list[int] | None = None) -> Tensor:
        """A tensor of the weights in float, or some of its rows."""
        if self._stem(name) is None:
            return super().tensor(name, rows)
        weight = self.weight(name)
        assert isinstance(weight, Quantised)
        return (weight if rows is None else weight[torch.tensor(rows)]).dequantised(torch.float32)

    def _stem(self, name: str) -> str | None:
        """The projection whose weight has this name; None for a tensor that is not quantised."""
        stem = name.removesuffix(".weight")
        return stem if stem != name and stem in self._projections else None

    def _parts_of(self, stem: str) -> list[str]:
        return [part for part in sorted(self.parts) if f"{stem}.{part}" in self._stored_names]


def refuse(where: str, method: str, what: str) -> ValueError:
    """The error for an unsupported option of a method."""
    return ValueError(f"{where}: weights of {method} with {what} are not read")


def group_size_of(where: str, method: str, size: Any) -> int | None:
    """Number of columns that share a scale; None for -1 (all columns); ValueError if the kernels lack this size."""
    if size in (None, -1):
        return None
    if type(size) is not int or size not in _GROUP_SIZES:
        raise refuse(where, method, f"groups of {size!r}")
    return size


def expect(where: str, parts: Mapping[str, Tensor], name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
    """A part of a projection, of one of the dtypes (by default any float dtype).

    Raises
    ------
    ValueError
        If it is missing, or has another shape or dtype.
    """
    found = parts.get(name)
    if found is None:
        raise ValueError(f"{where}: expected a {name}, got {', '.join(sorted(parts))}")
    if tuple(found.shape) != shape or found.dtype not in (dtypes or _FLOATS):
        raise ValueError(f"{where}: expected {name} of shape {list(shape)}, got {list(found.shape)} of {found.dtype}")
    return found


def check_order(where: str, method: str, order: Tensor | None, group_size: int | None) -> None:
    """Refuse columns that were sorted before they were grouped: the place of a column must give its group."""
    if order is not None:
        expected = torch.arange(len(order)) // (group_size or max(len(order), 1))
        if not torch.equal(order.to(torch.int64).cpu(), expected):
            raise refuse(where, method, "columns in order of their activations (desc_act, actorder)")


def nibbles(words: Tensor) -> Tensor:
    """The eight numbers of 4 bits of each int32, the lowest first [..., 8 * words] uint8."""
    data = words.contiguous().view(torch.uint8)
    return torch.stack([data & 15, data >> 4], -1).flatten(-2)

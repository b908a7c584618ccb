"""Tensors of a checkpoint by name, as transformers lays checkpoints out: safetensors, whole or in shards."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

# TRL's wrapper of a model with a value head may have been saved with its own name in front of the model's.
WRAPPER: Final = "pretrained_model."


class Checkpoint:
    """A checkpoint's tensors. Nothing is unpickled but tensors, and no code of the checkpoint is run.

    Parameters
    ----------
    path_or_id : str
        Folder or hub id.
    """

    def __init__(self, path_or_id: str) -> None:
        self.path_or_id = path_or_id

    @cached_property
    def files(self) -> dict[str, str]:
        """The file that each tensor of the weights is in; empty if there are no safetensors weights."""
        if whole := self._file("model.safetensors"):
            with safe_open(whole, framework="pt") as opened:
                return dict.fromkeys(opened.keys(), whole)
        if index := self._file("model.safetensors.index.json"):
            weight_map: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
            shards = {shard: self._file(shard) or "" for shard in set(weight_map.values())}
            return {name: shards[shard] for name, shard in weight_map.items()}
        return {}

    @property
    def names(self) -> frozenset[str]:
        """Names of the tensors, without a wrapper's prefix."""
        return frozenset(name.removeprefix(WRAPPER) for name in self.files)

    def tensor(self, name: str, rows: list[int] | None = None) -> Tensor:
        """A tensor of the weights, or some of its rows.

        Raises
        ------
        FileNotFoundError
            If the checkpoint has no safetensors weights.
        KeyError
            If there is no such tensor.
        """
        if not self.files:
            raise FileNotFoundError(f"{self.path_or_id}: no model.safetensors (weights in pickle files are not read)")
        stored = name if name in self.files else WRAPPER + name
        with safe_open(self.files[stored], framework="pt") as opened:
            if rows is None:
                whole: Tensor = opened.get_tensor(stored)
                return whole
            part = opened.get_slice(stored)
            return torch.cat([part[row : row + 1] for row in rows])

    def tensors_of(self, file_name: str) -> dict[str, Tensor]:
        """All tensors of another file: .safetensors, or a state dict of tensors (.pt), of which nothing else is read.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If it holds something else than tensors by name.
        """
        path = self._file(file_name)
        if path is None:
            raise FileNotFoundError(f"{self.path_or_id}: no {file_name}, which holds the head of this format")
        if path.endswith(".safetensors"):
            with safe_open(path, framework="pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (not a dict)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{path}: expected a file with nothing but tensors, got one that is not safe to load"
            ) from error
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError(f"{path}: expected tensors by name, got {type(state).__name__}")
        return state

    def _file(self, name: str) -> str | None:
        found: str | None = cached_file(self.path_or_id, name, _raise_exceptions_for_missing_entries=False)
        return found

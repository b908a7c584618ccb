"""Tensors of a checkpoint by name, as transformers lays checkpoints out: safetensors, whole or in shards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

from tts_search.models.quantised import Weight

# TRL's wrapper of a model with a value head may have been saved with its own name in front of the model's.
WRAPPER: Final = "pretrained_model."


class Checkpoint:
    """A checkpoint's tensors. From pickles only tensors are loaded, and no code of the checkpoint is run.

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
        if whole := self.file("model.safetensors"):
            with opened_tensors(whole) as opened:
                return dict.fromkeys(opened.keys(), whole)
        if index := self.file("model.safetensors.index.json"):
            weight_map = _weight_map(index)
            shards = {shard: self.file(shard) or "" for shard in set(weight_map.values())}
            return {name: shards[shard] for name, shard in weight_map.items()}
        return {}

    @property
    def names(self) -> frozenset[str]:
        """Names of the tensors, without a wrapper's prefix."""
        return frozenset(name.removeprefix(WRAPPER) for name in self.files)

    @property
    def few_bits(self) -> bool:
        """Whether weights are quantised in the file."""
        return False

    @property
    def merged(self) -> bool:
        """Whether a weight can be made of several tensors in files, so that only this class can read it."""
        return False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first tensor."""
        return self.tensor(next(iter(self.files)).removeprefix(WRAPPER)).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor of the weights; KeyError if there is none."""
        stored = self._stored(name)
        with opened_tensors(self.files[stored]) as opened:
            return tuple(opened.get_slice(stored).get_shape())

    def weight(self, name: str) -> Weight:
        """A tensor of the weights, as it is stored; KeyError if there is none."""
        return self.tensor(name)

    def tensor(self, name: str, rows: list[int] | None = None) -> Tensor:
        """A tensor of the weights as floats, or some of its rows.

        Raises
        ------
        FileNotFoundError
            If the checkpoint has no safetensors weights.
        KeyError
            If there is no such tensor.
        """
        stored = self._stored(name)
        with opened_tensors(self.files[stored]) as opened:
            if rows is None:
                whole: Tensor = opened.get_tensor(stored)
                return whole
            part = opened.get_slice(stored)
            return torch.cat([part[row : row + 1] for row in rows])

    def tensors_of(self, file_name: str) -> dict[str, Tensor]:
        """All tensors of another file: .safetensors, or a state dict (.pt), from which only tensors are read.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If it contains anything else than tensors by name.
        """
        path = self.file(file_name)
        if path is None:
            raise FileNotFoundError(f"{self.path_or_id}: no {file_name}, which holds the head of this format")
        if path.endswith(".safetensors"):
            with opened_tensors(path) as opened:
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

    def _stored(self, name: str) -> str:
        if not self.files:
            raise FileNotFoundError(f"{self.path_or_id}: no model.safetensors (weights in pickle files are not read)")
        return name if name in self.files else WRAPPER + name

    def file(self, name: str) -> str | None:
        """The path of a file of the checkpoint; None if there is none."""
        found: str | None = cached_file(self.path_or_id, name, _raise_exceptions_for_missing_entries=False)
        return found


@contextmanager
def opened_tensors(path: str) -> Iterator[Any]:
    """A safetensors file. The library checks its header before it reads.

    Raises
    ------
    ValueError
        If the file is broken; with its name.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file that can be read: {error}") from error


def read_json(path: str) -> dict[str, Any]:
    """The object in a file of JSON.

    Raises
    ------
    ValueError
        If there is no such object; with the file's name.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def _weight_map(index: str) -> dict[str, str]:
    """The file of each tensor, as an index says."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(shard, str) for shard in found.values()):
        raise ValueError(f"{index}: expected a weight_map of names and files")
    return found

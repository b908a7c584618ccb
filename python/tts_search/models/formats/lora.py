"""LoRA adapters as peft saves them, merged into the weights of their base model while these are loaded.

A projection's weight becomes ``W + scale * B @ A`` with A [r, in], B [out, r] and ``scale`` = alpha / r, or
alpha / sqrt(r) with rank-stabilised LoRA (Hu et al., arXiv 2106.09685; Kalajdzievski, arXiv 2312.03732). Modules that
were trained and saved as a whole, such as the head of a verifier, replace those of the base model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor

from tts_search.models.checkpoint import Checkpoint, opened_tensors, read_json

__all__ = ["LoRACheckpoint", "adapter_config", "base_of"]

_CONFIG: Final = "adapter_config.json"
_WEIGHTS: Final = "adapter_model.safetensors"
_PREFIX: Final = "base_model.model."
_PART: Final = re.compile(r"(.+)\.lora_([AB])\.weight")
# Options that change what is added to a weight, each with the values that have no effect.
_REFUSED: Final[Mapping[str, tuple[Any, ...]]] = {
    "use_dora": (None, False),
    "fan_in_fan_out": (None, False),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "megatron_config": (None,),
    "layer_replication": (None,),
    "target_parameters": (None, []),
}


def adapter_config(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The configuration of a peft adapter in a folder; None if the folder is a model's, or has no adapter."""
    path = None if checkpoint.file("config.json") else checkpoint.file(_CONFIG)
    if path is None:
        return None
    config = read_json(path)
    if not isinstance(config.get("base_model_name_or_path"), str):
        raise ValueError(f"{path}: expected base_model_name_or_path, got none")
    return config


def base_of(path_or_id: str) -> str:
    """The folder or hub id of the model that an adapter is for; if it is no adapter, the given one."""
    config = adapter_config(Checkpoint(path_or_id))
    return path_or_id if config is None else str(config["base_model_name_or_path"])


class LoRACheckpoint(Checkpoint):
    """An adapter and its base model as one checkpoint. Weights are merged when they are read.

    Sums are computed in float32 and rounded once, to the base weight's dtype.

    Parameters
    ----------
    path_or_id : str
        Folder or hub id of the adapter.
    config : dict
        Its configuration.
    base : Checkpoint
        The checkpoint of the base model, with weights as floats.

    Raises
    ------
    ValueError
        If the adapter is of another kind, the base model is quantised, or a tensor does not belong to it; the message
        names it.
    """

    def __init__(self, path_or_id: str, config: Mapping[str, Any], base: Checkpoint) -> None:
        super().__init__(path_or_id)
        if config.get("peft_type") != "LORA":
            raise ValueError(f"{path_or_id}: expected peft_type LORA, got {config.get('peft_type')!r}")
        for name, harmless in _REFUSED.items():
            if config.get(name) not in harmless:
                raise ValueError(f"{path_or_id}: expected an adapter without {name}, got {config[name]!r}")
        if base.few_bits:
            raise ValueError(
                f"{path_or_id}: expected a base model in float, got weights of few bits in {base.path_or_id}"
            )
        self._config, self._base = config, base
        self._check()

    @cached_property
    def _adapter(self) -> dict[str, Tensor]:
        path = self.file(_WEIGHTS)
        if path is None:
            raise FileNotFoundError(f"{self.path_or_id}: no {_WEIGHTS} (weights in pickle files are not read)")
        with opened_tensors(path) as opened:
            return {_plain(name): opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (not a dict)

    @cached_property
    def _modules(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The matrices A and B of each projection, by the name of its weight."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self._adapter.items():
            if found := _PART.fullmatch(name):
                parts.setdefault(f"{found[1]}.weight", {})[found[2]] = tensor
        return {name: (both["A"], both["B"]) for name, both in parts.items() if len(both) == 2}

    @cached_property
    def _saved(self) -> dict[str, Tensor]:
        """Tensors that the adapter replaces as a whole."""
        return {name: tensor for name, tensor in self._adapter.items() if "lora_" not in name}

    @cached_property
    def _stored_at(self) -> dict[str, str]:
        """Names of the base model's tensors, by their names in adapters."""
        return {name.removeprefix("model."): name for name in self._base.names}

    def _check(self) -> None:
        rest = {name for name in self._adapter if not _PART.fullmatch(name)} - self._saved.keys()
        halves = {found[1] for name in self._adapter if (found := _PART.fullmatch(name))}
        for name in sorted(rest | {half for half in halves if f"{half}.weight" not in self._modules}):
            raise ValueError(
                f"{self.path_or_id}: {name} is no pair of LoRA's A and B, and nothing that was saved whole"
            )
        for name, (a, b) in self._modules.items():
            if name not in self._stored_at:
                raise ValueError(f"{self.path_or_id}: found no {name} in {self._base.path_or_id}")
            shape = self._base.shape(self._stored_at[name])
            if (b.shape[0], a.shape[1]) != shape or a.shape[0] != b.shape[1]:
                raise ValueError(
                    f"{self.path_or_id}: {name}: expected A [r, {shape[1]}] and B [{shape[0]}, r], got "
                    f"{list(a.shape)} and {list(b.shape)}"
                )

    @property
    def names(self) -> frozenset[str]:
        """Names of the base model's tensors, and of those that only the adapter has."""
        return self._base.names | {name for name in self._saved if name not in self._stored_at}

    @property
    def merged(self) -> bool:
        """Whether weights are made of several tensors."""
        return True

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base model."""
        return self._base.dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor of the weights; KeyError if there is none."""
        saved = self._saved.get(name.removeprefix("model."))
        return self._base.shape(name) if saved is None else tuple(saved.shape)

    def weight(self, name: str) -> Tensor:
        """A tensor of the weights, merged; KeyError if there is none."""
        return self.tensor(name)

    def tensor(self, name: str, rows: list[int] | None = None) -> Tensor:
        """A tensor of the weights, or some of its rows, merged; KeyError if there is none."""
        plain = name.removeprefix("model.")
        if plain in self._saved:
            whole = self._saved[plain]
            return whole if rows is None else whole[rows]
        weight = self._base.tensor(name, rows)
        if plain not in self._modules:
            return weight
        a, b = self._modules[plain]
        b = b if rows is None else b[rows]
        return (weight.float() + self._scale(plain, len(a)) * (b.float() @ a.float())).to(weight.dtype)

    def _scale(self, name: str, rank: int) -> float:
        """Alpha for a module. As in peft, a pattern is a regular expression that matches the end of its name."""
        module = name.removesuffix(".weight")
        patterns = self._config.get("alpha_pattern") or {}
        alpha = next(
            (own for pattern, own in patterns.items() if re.match(rf"(.*\.)?({pattern})$", f"model.{module}")),
            self._config.get("lora_alpha", 8),
        )
        return float(alpha) / (math.sqrt(rank) if self._config.get("use_rslora") else rank)


def _plain(name: str) -> str:
    """A name as in the base model, without the prefixes of peft and of a causal model."""
    return name.removeprefix(_PREFIX).removeprefix("model.").replace(".modules_to_save.", ".").replace(".default.", ".")

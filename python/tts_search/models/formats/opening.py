"""The checkpoint behind a path: a GGUF file, an adapter, weights of few bits, or a folder as transformers writes it."""

from __future__ import annotations

from typing import Any, Final

from tts_search.models.checkpoint import Checkpoint, read_json
from tts_search.models.formats.awq import AWQCheckpoint
from tts_search.models.formats.compressed_tensors import CompressedCheckpoint
from tts_search.models.formats.few_bits import FewBitsCheckpoint
from tts_search.models.formats.gguf import GGUFCheckpoint, is_gguf
from tts_search.models.formats.gptq import GPTQCheckpoint
from tts_search.models.formats.lora import LoRACheckpoint, adapter_config

__all__ = ["open_checkpoint"]

_METHODS: Final[dict[str, type[FewBitsCheckpoint]]] = {
    "compressed-tensors": CompressedCheckpoint,
    "gptq": GPTQCheckpoint,
    "awq": AWQCheckpoint,
}


def open_checkpoint(path_or_id: str) -> Checkpoint:
    """Open the checkpoint of a path or a hub id.

    Raises
    ------
    ValueError
        If its file is broken, or of an unsupported kind; the message names it.
    """
    if is_gguf(path_or_id):
        return GGUFCheckpoint(path_or_id)
    plain = Checkpoint(path_or_id)
    if (adapter := adapter_config(plain)) is not None:
        return LoRACheckpoint(path_or_id, adapter, open_checkpoint(adapter["base_model_name_or_path"]))
    config = _quantization(plain)
    if config is None:
        return plain
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in _METHODS:
        raise ValueError(
            f"{path_or_id}: expected weights that are not quantised, or by {', '.join(_METHODS)}, got quant_method "
            f"{method!r}"
        )
    return _METHODS[method](path_or_id, config)


def _quantization(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The part of the configuration about quantised weights; None if there is none."""
    path = checkpoint.file("config.json")
    if path is None:
        return None
    found = read_json(path).get("quantization_config")
    return found if isinstance(found, dict) else None

"""GGUF files of the Llama family as checkpoints: one file that holds configuration, tokenizer and weights."""

from __future__ import annotations

import logging
import re
from typing import Any, Final

import torch
from torch import Tensor

from tts_search.models.checkpoint import Checkpoint
from tts_search.models.formats.gguf_blocks import GROUP, blocks
from tts_search.models.formats.gguf_header import GGUFHeader, read_header
from tts_search.models.quantised import Quantised, Weight, join, nearest

__all__ = ["GGUFCheckpoint", "gguf_config", "is_gguf"]

_LOG: Final = logging.getLogger("tts_search")

_FAMILIES: Final = ("llama", "qwen2", "qwen3")  # as both llama.cpp and transformers call them
_WHOLE: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PARTS: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FREQUENCIES: Final = "rope_freqs.weight"  # Llama 3's rotation, as divisors of its frequencies
_LONGEST: Final = 2**21  # context in tokens: the rotary table has this length
_ROWS: Final = 2048


def is_gguf(path_or_id: str) -> bool:
    """Whether a path names a GGUF file."""
    return path_or_id.lower().endswith(".gguf")


class GGUFCheckpoint(Checkpoint):
    """The tensors of a GGUF file by their names in transformers.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If the file is broken, or has an unsupported model or type of weights; the message names it.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.header = read_header(path)
        self.config = gguf_config(self.header)
        self._places = _names(self.header)
        kinds = sorted({info.kind_name for info in self.header.tensors.values() if len(info.shape) > 1})
        note = "; Q6_K is quantised anew, to 8 bits in groups of 32" if "Q6_K" in kinds else ""
        _LOG.info("%s: weights in %s%s", path, ", ".join(kinds), note)

    @property
    def names(self) -> frozenset[str]:
        """Names of the tensors."""
        return frozenset(self._places)

    @property
    def few_bits(self) -> bool:
        """Whether weights are quantised."""
        return any(info.kind_name[0] == "Q" for info in self.header.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the largest part of the weights; bfloat16 for quantised weights."""
        kind = self.header.tensors["token_embd.weight"].kind_name
        if self.few_bits:
            return torch.bfloat16
        return {"F32": torch.float32, "F16": torch.float16}.get(kind, torch.bfloat16)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.header.tensors[self._places[name]].shape

    def weight(self, name: str) -> Weight:
        """A tensor. Quantised ones stay as in the file, except Q6_K, which has too many scales for that."""
        stored = self._places[name]
        info = self.header.tensors[stored]
        data = self._rows_in_order(self.header.bytes_of(stored), name)
        if info.kind_name == "Q6_K":
            parts = [nearest(self._floats(stored, part), GROUP) for part in torch.split(data, _ROWS)]
            return join(parts)
        found = blocks(data, info.kind_name)
        return found if isinstance(found, Quantised) else found.reshape(info.shape)

    def tensor(self, name: str, rows: list[int] | None = None) -> Tensor:
        """A tensor of the weights in float, or some of its rows."""
        stored = self._places[name]
        data = self._rows_in_order(self.header.bytes_of(stored), name)
        if rows is not None:
            return self._floats(stored, data[rows])
        whole = torch.cat([self._floats(stored, part) for part in torch.split(data, _ROWS)])
        return whole.reshape(self.shape(name))

    def tensors_of(self, file_name: str) -> dict[str, Tensor]:
        """Empty: there are no other files beside a GGUF file."""
        raise FileNotFoundError(
            f"{self.path_or_id}: a GGUF file has no {file_name}, which holds the head of this format"
        )

    def _floats(self, stored: str, data: Tensor) -> Tensor:
        found = blocks(data, self.header.tensors[stored].kind_name)
        return found.dequantised(torch.float32) if isinstance(found, Quantised) else found

    def _rows_in_order(self, data: Tensor, name: str) -> Tensor:
        """Rows in transformers' order: llama.cpp pairs the two halves of each head of Llama's queries and keys."""
        part = re.search(r"\.([qk])_proj\.", name)
        if self.config.model_type != "llama" or part is None:
            return data
        heads = self.config.num_attention_heads if part[1] == "q" else self.config.num_key_value_heads
        if name.endswith(".bias"):  # one row
            size = data.shape[1] // self.shape(name)[0]
            return data.view(heads, -1, 2, size).transpose(1, 2).reshape(1, -1)
        order = torch.arange(len(data)).view(heads, -1, 2).transpose(1, 2).flatten()
        return data[order]


def gguf_config(header: GGUFHeader) -> Any:
    """The configuration of transformers that the metadata of a file describes.

    Raises
    ------
    ValueError
        If this is no model of the Llama family; the message names the file and its model.
    """
    import transformers

    says = _Metadata(header)
    family = says.family
    heads, size = says.count("attention.head_count"), says.count("embedding_length")
    head_dim = says.count("attention.key_length", size // heads)
    if says.count("attention.value_length", head_dim) != head_dim or head_dim % 2:
        raise ValueError(f"{header.path}: expected keys and values of one even size, got {head_dim} and others")
    if says.count("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"{header.path}: rotary embedding of a part of each head is not supported")
    if says.get("expert_count", int, 0):
        raise ValueError(f"{header.path}: mixtures of experts are not supported")
    options: dict[str, Any] = {
        "hidden_size": size,
        "intermediate_size": says.count("feed_forward_length"),
        "num_hidden_layers": says.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": says.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": says.count("context_length", at_most=_LONGEST),
        "rms_norm_eps": says.get("attention.layer_norm_rms_epsilon", float),
        "rope_parameters": _rope(says, head_dim),
        "vocab_size": _shape(header, "token_embd.weight")[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        **{
            f"{name}_token_id": header.metadata.get(f"tokenizer.ggml.{stored}_token_id")
            for name, stored in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        },
    }
    if family != "qwen2":
        options["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    if family == "llama":
        options["mlp_bias"] = "blk.0.ffn_gate.bias" in header.tensors
    try:
        # The name is for errors that come later.
        return transformers.AutoConfig.for_model(family, **options, name_or_path=header.path)
    except Exception as error:  # its checks have errors of their own
        raise ValueError(f"{header.path}: no configuration of a {family} model: {error}") from error


def _rope(says: _Metadata, head_dim: int) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": says.get("rope.freq_base", float, 10000.0)}
    kind = says.get("rope.scaling.type", str, "none")
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": says.get("rope.scaling.factor", float)}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = says.count("rope.scaling.original_context_length")
    elif kind != "none":
        raise ValueError(f"{says.header.path}: rotary embedding of type {kind!r} is not supported")
    if _FREQUENCIES in says.header.tensors:
        rope |= _llama3(says, rope, head_dim)
    return rope


def _llama3(says: _Metadata, rope: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Options of Llama 3's scaling. A file has the divisor of each frequency."""
    header = says.header
    kind = header.tensors[_FREQUENCIES].kind_name
    if kind != "F32" or header.tensors[_FREQUENCIES].shape != (head_dim // 2,):
        raise ValueError(f"{header.path}: expected {_FREQUENCIES} [{head_dim // 2}] in F32, got {kind}")
    divisors = header.bytes_of(_FREQUENCIES).view(torch.float32).flatten()
    options = {
        "rope_type": "llama3", "factor": divisors.max().item(), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    lengths = 2 * torch.pi * rope["rope_theta"] ** (torch.arange(0, head_dim, 2).double() / head_dim)
    smooth = ((8192 / lengths - 1) / 3).clamp(0, 1)
    expected = 1 / ((1 - smooth) / options["factor"] + smooth)
    if rope["rope_type"] != "default" or not torch.allclose(divisors.double(), expected, rtol=1e-4):
        raise ValueError(f"{header.path}: {_FREQUENCIES} are not those of Llama 3, and no others are supported")
    return options


class _Metadata:
    """The metadata of a file about its model, with types and ranges checked."""

    def __init__(self, header: GGUFHeader) -> None:
        self.header = header
        self.family = header.metadata.get("general.architecture")
        if self.family not in _FAMILIES:
            raise ValueError(
                f"{header.path}: expected a model of {', '.join(_FAMILIES)}, got general.architecture {self.family!r}"
            )
        if header.metadata.get("split.count", 0) not in (0, 1):
            raise ValueError(f"{header.path}: one of several files; merge them (llama-gguf-split --merge)")

    def get(self, key: str, of: type, default: Any = None) -> Any:
        value = self.header.metadata.get(f"{self.family}.{key}", default)
        if type(value) is not of:
            raise ValueError(f"{self.header.path}: expected {self.family}.{key} as {of.__name__}, got {value!r:.80}")
        return value

    def count(self, key: str, default: int | None = None, at_most: int = 2**24) -> int:
        value: int = self.get(key, int, default)
        if not 1 <= value <= at_most:
            raise ValueError(f"{self.header.path}: expected {self.family}.{key} from 1 to {at_most}, got {value}")
        return value


def _shape(header: GGUFHeader, name: str) -> tuple[int, ...]:
    if name not in header.tensors:
        raise ValueError(f"{header.path}: no tensor {name}")
    return header.tensors[name].shape


def _names(header: GGUFHeader) -> dict[str, str]:
    """The stored name of each tensor by its name in transformers."""
    found: dict[str, str] = {}
    for stored in header.tensors:
        if stored == _FREQUENCIES:
            continue
        match = re.fullmatch(r"blk\.(\d{1,6})\.(\w+)\.(weight|bias)", stored)
        if stored in _WHOLE:
            found[_WHOLE[stored]] = stored
        elif match and match[2] in _PARTS:
            found[f"model.layers.{int(match[1])}.{_PARTS[match[2]]}.{match[3]}"] = stored
        else:
            raise ValueError(f"{header.path}: tensor {stored!r} belongs to no model of {', '.join(_FAMILIES)}")
    return found

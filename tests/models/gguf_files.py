"""GGUF files of small models, written by PyPI's gguf, and their weights as dequantised by gguf."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from tiny import CHAT, tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import PreTrainedModel

PLAIN = ("F32", "F16", "BF16")
SMALL = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
LARGE = ("Q4_K", "Q5_K", "Q6_K")  # blocks of 256 weights
WIDTH = 256
MINIMA = ("Q4_1", "Q5_1", "Q4_K", "Q5_K")


def wide_model(family: str = "llama", **options: Any) -> PreTrainedModel:
    """Two layers, wide enough for every type."""
    sizes = {
        "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2, "initializer_range": 0.05,
        "head_dim": WIDTH // 4, "use_sliding_window": False,
    }  # fmt: skip
    model = tiny_model(family, **{**sizes, **options})
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") or "norm" in name:
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def quantised(weight: Tensor, kind: str) -> np.ndarray[Any, Any]:
    """Rows of bytes of a type; K types, which the package does not write, hold random numbers of a like size."""
    size, width = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    values = weight.float().numpy()
    if kind not in LARGE:
        return quants.quantize(values, GGMLQuantizationType[kind])
    rng = np.random.default_rng(values.size)
    raw = rng.integers(0, 256, (len(values), values.shape[1] // size, width), dtype=np.uint8)
    scales = (rng.uniform(0.5, 1, (*raw.shape[:2], 2)) * 1e-4).astype(np.float16)
    if kind == "Q6_K":
        scales *= 0.3
        raw[..., -2:] = scales[..., :1].view(np.uint8)
    else:
        scales[..., 1] *= 10  # near the middle of the numbers
        raw[..., :4] = scales.view(np.uint8)
    return raw.reshape(len(values), -1)


def dequantised(raw: np.ndarray[Any, Any], kind: str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(quants.dequantize(raw, GGMLQuantizationType[kind]))).float()


def paired(weight: Tensor, heads: int, *, back: bool = False) -> Tensor:
    """Rows as llama.cpp has them, whose rotation turns neighbours; or back again."""
    halves = (heads, -1, 2) if back else (heads, 2, -1)
    return weight.reshape(*halves, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def write(
    path: Path,
    model: PreTrainedModel,
    kind: str,
    kinds: dict[str, str] | None = None,
    *,
    changes: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray[Any, Any]] | None = None,
    pre: str = "smollm",
    sentence_piece: dict[str, list[Any]] | None = None,
) -> dict[str, Tensor]:
    """Write a model in a type; returns the state that a reader should find.

    ``kinds`` has other types for parts of names, ``changes`` other metadata (None: none), ``extra`` more tensors.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    add_tokenizer(writer, pre, sentence_piece)
    change(writer, changes or {})
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
    found = {}
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, suffix = name.rpartition(".")
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(stem[-6:-5], 0)
        turned = heads if config.model_type == "llama" and stem.endswith(("q_proj", "k_proj")) else 0
        weight = paired(parameter, turned) if turned else parameter
        chosen = next((k for part, k in (kinds or {}).items() if part in name), kind)
        chosen = "F32" if parameter.dim() == 1 else chosen
        raw = quantised(weight, chosen)
        of = GGMLQuantizationType[chosen]
        writer.add_tensor(names.get_name(stem) + "." + suffix, raw, raw_dtype=of if chosen not in PLAIN[:2] else None)
        value = dequantised(raw, chosen)
        found[name] = paired(value, turned, back=True) if turned else value
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def change(writer: Any, changes: dict[str, Any]) -> None:
    types = {str: gguf.GGUFValueType.STRING, int: gguf.GGUFValueType.UINT32}
    for name, value in changes.items():
        writer.kv_data[0].pop(name, None)
        if value is not None:
            writer.add_key_value(name, value, types[type(value)])


def add_tokenizer(writer: Any, pre: str, sentence_piece: dict[str, list[Any]] | None) -> None:
    if sentence_piece is not None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(sentence_piece["tokens"])
        writer.add_token_scores(sentence_piece["scores"])
        writer.add_token_types(sentence_piece["token_types"])
        for number, name in enumerate(("unk", "bos", "eos")):
            getattr(writer, f"add_{name}_token_id")(number)
        return
    tokenizer = tiny_tokenizer()
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = set(tokenizer.all_special_ids) | {i for token, i in vocab if token.startswith("<|")}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in vocab])
    writer.add_token_types([3 if number in special else 1 for _, number in vocab])
    merges = tokenizer.backend_tokenizer.model.__getstate__()
    writer.add_token_merges([" ".join(pair) for pair in json.loads(merges)["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT)


def with_state(model: PreTrainedModel, state: dict[str, Tensor]) -> PreTrainedModel:
    """The model of transformers on the weights of a file."""
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model.eval()

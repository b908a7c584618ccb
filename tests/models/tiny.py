"""Small models with random weights and a small tokenizer, for the tests of this folder."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from tts_search.models.decoder import Decoder, KVPool
from tts_search.models.pool import BranchPool

SPECIAL = ("<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|step|>")
# Tokens that hold a delimiter and more than it, or a part of one; "Ċ" is a newline and "Ġ" a space in byte-level BPE.
MERGES = (
    ("Ċ", "Ċ"), (".", "ĊĊ"), ("ĊĊ", "Ċ"), ("Ċ", "Ġ"), ("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "s"), ("Ġ", "is"),
    ("Y", "e"), ("Ye", "s"), ("N", "o"), ("ĊĊ", "the"),
)  # fmt: skip
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "qwen3": {"head_dim": 24},
    "mistral": {"sliding_window": 7},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 5.0},
}


def tiny_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a handful of merges; any text, any cut between texts."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = [*map(chr, printable), *(chr(256 + i) for i in range(len(others)))]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet, *("".join(pair) for pair in MERGES)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    if chat:
        fast.chat_template = CHAT
    return fast


def tiny_model(kind: str = "llama", *, head: str = "lm", seed: int = 0, **options: Any) -> PreTrainedModel:
    """Three layers of 4 query and 2 KV heads. Weights are large enough for attention to matter."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(tiny_tokenizer()), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "num_labels": 2,
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **{**settings, **CONFIGS.get(kind, {}), **options})
    auto = AutoModelForCausalLM if head == "lm" else AutoModelForTokenClassification
    return auto.from_config(config, attn_implementation="eager", dtype=torch.float32).eval().requires_grad_(False)


def save_checkpoint(
    folder: Path, model: PreTrainedModel, *, chat: bool = True, verifier: dict[str, Any] | None = None
) -> str:
    """Write a checkpoint as users have them; returns its folder."""
    if verifier is not None:
        model.config.tts_verifier = verifier
    model.save_pretrained(folder)
    tiny_tokenizer(chat).save_pretrained(folder)
    return str(folder)


def small_pool(decoder: Decoder, num_pages: int, page_size: int = 4, max_tokens: int = 2048) -> BranchPool:
    """A pool of exactly so many pages, filled with NaN."""
    pool = KVPool(decoder.shape, num_pages, page_size, decoder.dtype, decoder.device)
    for tensor in (*pool.kv.k, *pool.kv.v):
        tensor.fill_(float("nan"))
    return BranchPool(pool, max_tokens)


def random_text(rng: random.Random, length: int, pieces: Sequence[str] = ()) -> str:
    """Text of letters, signs, white space and ``pieces``."""
    signs = [*"abcdefgh  ..=+-0123456789", "\n", "é", "π", *pieces]
    return "".join(rng.choice(signs) for _ in range(length))


def talkative(model: PreTrainedModel) -> PreTrainedModel:
    """Make newlines and the end of the answer likelier, so that steps end in all the ways they can."""
    ids = tiny_tokenizer().convert_tokens_to_ids(["Ċ", "ĊĊ", ".ĊĊ", "ĊĊĊ", "<|end|>"])
    model.lm_head.weight[ids] *= 1.6
    return model

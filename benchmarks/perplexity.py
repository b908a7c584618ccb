"""Perplexity of a checkpoint on problems with solutions, unquantised and quantised.

python benchmarks/perplexity.py --checkpoint PATH --data math500.jsonl [--limit 200] [--formats bf16 int8 int4]
    [--gguf Q8_0=PATH ...] [--kv int8 int4 xquant-4 ...] [--pack 1024] [--write NAME]

The text of a problem is the problem, a blank line and the solution, and every token except the first counts. With
--chat it is the solution after the problem in the chat template, and the tokens of the solution count. With --pack,
texts are joined, with a blank line between them, and cut into pieces of this many tokens. A GGUF file of the same model
is read twice: by our decoder, and by transformers with its weights as floats. The format "mha" is bf16 with each KV
head repeated for each of its query heads: it computes the same as the model, with as many KV heads as query heads. With
--kv, the first format is also read with this kv_dtype. Besides the perplexity, two numbers compare a format with the
first one: on how many tokens the likeliest one is the same, and the mean KL divergence.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import record
import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer
from tts_search.models import llama
from tts_search.models.decoder import Decoder, KvDtype
from tts_search.models.formats.opening import open_checkpoint
from tts_search.models.loading import lean_decoder, load_decoder
from tts_search.models.sizing import pool_for
from tts_search.models.transformers import load_config
from tts_search.policies.prompt import prompt_of

FORMATS = {
    "bf16": (None, None), "fp32": (None, None), "int8": ("int8", None), "int4": ("int4", 32), "int4-64": ("int4", 64),
    "mha": (None, None),
}  # fmt: skip
NAMES = {"int4": "int4, groups of 32", "int4-64": "int4, groups of 64", "mha": "bf16, a KV head for each query head"}
# Log-probabilities [len(ids) - 1, V] of every next token.
Reader = Callable[[list[int]], Tensor]


def texts(path: Path, limit: int, tokenizer: Any, chat: bool) -> list[tuple[list[int], int]]:
    """The tokens of each text, and the number of the first one that counts."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines()[:limit]:
        one = json.loads(line)
        front = prompt_of(one["problem"], None, tokenizer) if chat else f"{one['problem']}\n\n"
        known, ids = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (front, front + one["solution"])
        )
        rows.append((ids[:2048], len(known) if chat else 1))
    return rows


def quantised(checkpoint: str, name: str) -> Decoder:
    quantize, group_size = FORMATS[name]
    if name == "mha":
        return with_all_heads(checkpoint)
    before = llama.INT4_GROUP
    llama.INT4_GROUP = group_size or before
    dtype = torch.float32 if name == "fp32" else torch.bfloat16
    decoder = load_decoder(checkpoint, dtype=dtype, device="cpu", decoder="lean", quantize=quantize)
    llama.INT4_GROUP = before
    return decoder


def with_all_heads(checkpoint: str) -> Decoder:
    """The model with each KV head once for each of its query heads."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    config = model.config
    heads, config.num_key_value_heads = config.num_key_value_heads, config.num_attention_heads
    for layer in model.base_model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            for parameter in projection.parameters():
                each = parameter.data.unflatten(0, (heads, -1))
                parameter.data = each.repeat_interleave(config.num_attention_heads // heads, 0).flatten(0, 1)
    return lean_decoder(model)


def packed(rows: list[tuple[list[int], int]], size: int, between: list[int]) -> list[tuple[list[int], int]]:
    """Texts one behind the other, in pieces of so many tokens; the last tokens, that fill no piece, are left out."""
    ids = [token for text, _ in rows for token in (*text, *between)]
    return [(ids[i : i + size], 1) for i in range(0, len(ids) - size + 1, size)]


def reader(decoder: Decoder, kv_dtype: KvDtype | None = None) -> Reader:
    pool = pool_for(decoder, "512MiB", kv_dtype=kv_dtype)

    @torch.inference_mode()
    def read(ids: list[int]) -> Tensor:
        root, step = pool.forest.add_root(), pool.block or len(ids)
        parts = (ids[i : i + step] for i in range(0, len(ids), step))
        logits = torch.cat([decoder.logits(pool.pack([root], [part]), pool.kv) for part in parts])
        pool.forest.free([root])
        return logits[:-1].float().log_softmax(-1)

    return read


def in_transformers(path: str) -> Reader:
    """The model of transformers on what a file's weights stand for."""
    checkpoint = open_checkpoint(path)
    model = transformers.AutoModelForCausalLM.from_config(load_config(path), dtype=torch.bfloat16)
    model.load_state_dict({name: checkpoint.tensor(name) for name in checkpoint.names}, strict=False)
    model.tie_weights()

    @torch.inference_mode()
    def read(ids: list[int]) -> Tensor:
        logits: Tensor = model(torch.tensor([ids])).logits[0, :-1]
        return logits.float().log_softmax(-1)

    return read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["bf16", "int8", "int4"])
    parser.add_argument("--gguf", nargs="*", default=[], metavar="TYPE=PATH")
    parser.add_argument("--kv", nargs="*", default=[], choices=get_args(KvDtype))
    parser.add_argument("--pack", type=int, help="tokens of a piece of the texts, joined")
    parser.add_argument("--write", help="the name of a measurement in benchmarks/results")
    parser.add_argument("--table", default="formats", help="its name there")
    parser.add_argument("--what", default="SmolLM2-135M-Instruct", help="the model, for its title")
    parser.add_argument("--beside", default="nothing")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    rows = texts(options.data, options.limit, tokenizer, options.chat)
    if options.pack:
        rows = packed(rows, options.pack, tokenizer("\n\n", add_special_tokens=False)["input_ids"])
    decoders = {NAMES.get(name, name): quantised(options.checkpoint, name) for name in options.formats}
    readers = {name: reader(decoder) for name, decoder in decoders.items()}
    first = next(iter(decoders))
    readers |= {f"{first}, KV in {bits}": reader(decoders[first], bits) for bits in options.kv}
    for kind, _, path in (one.partition("=") for one in options.gguf):
        readers[f"GGUF {kind}"] = reader(load_decoder(path, dtype="bfloat16", device="cpu"))
        readers[f"GGUF {kind}, float in transformers"] = in_transformers(path)
    table = measure(readers, rows)
    if options.write:
        tokens = sum(len(ids) - start for ids, start in rows)
        record.write(
            options.write,
            what=f"{options.what} on {texts_of(options, len(rows))} of {options.data.stem}, {tokens} tokens: "
            f"perplexity, and tokens beside those of {next(iter(readers))}",
            command=f"python benchmarks/perplexity.py {shlex.join(map(record.hidden, sys.argv[1:]))}",
            beside=options.beside,
            tables={options.table: table},
            packages=("torch", "transformers"),
        )


def texts_of(options: argparse.Namespace, count: int) -> str:
    """What the rows are."""
    if options.pack:
        return f"{count} pieces of {options.pack} tokens of problems with solutions"
    return f"{count} problems with solutions"


def measure(readers: dict[str, Reader], rows: list[tuple[list[int], int]]) -> dict[str, dict[str, record.Cell]]:
    """The table's rows by format."""
    loss, same, divergence = (dict.fromkeys(readers, 0.0) for _ in range(3))
    for number, (ids, start) in enumerate(rows, 1):
        first: Tensor | None = None
        for name, read in readers.items():
            found = read(ids)[start - 1 :]
            first = found if first is None else first
            loss[name] -= found.gather(1, torch.tensor(ids[start:])[:, None]).double().sum().item()
            same[name] += (found.argmax(1) == first.argmax(1)).sum().item()
            divergence[name] += (first.exp() * (first - found)).sum().item()
        if number % 50 == 0 or number == len(rows):
            tokens = sum(len(one) - start for one, start in rows[:number])
            print(number, tokens, {name: round(math.exp(loss[name] / tokens), 4) for name in readers}, flush=True)
    return {
        name: {
            "weights": name,
            "perplexity": round(math.exp(loss[name] / tokens), 3),
            "worse by, %": round(100 * (math.exp((loss[name] - loss[next(iter(readers))]) / tokens) - 1), 2),
            "same likeliest token, %": round(100 * same[name] / tokens, 1),
            "KL divergence": round(divergence[name] / tokens, 4),
        }
        for name in readers
    }


if __name__ == "__main__":
    main()

"""Perplexity of a checkpoint on problems with solutions, as it is and quantised while it is loaded.

python benchmarks/perplexity.py --checkpoint PATH --data math500.jsonl [--limit 200] [--formats bf16 int8 int4]

The text of a problem is the problem, a blank line and the solution; every token but the first counts. Beside the
perplexity: on how many tokens the likeliest one is that of the first format, and the mean KL divergence from it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer
from tts_search.models.decoder import Decoder, KVPool
from tts_search.models.loading import load_decoder

import tts_kernels as tk

FORMATS = ("bf16", "fp32", "int8", "int4")


def texts(path: Path, limit: int) -> list[str]:
    problems = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:limit]]
    return [f"{one['problem']}\n\n{one['solution']}" for one in problems]


def load(checkpoint: str, name: str) -> Decoder:
    dtype = torch.float32 if name == "fp32" else torch.bfloat16
    return load_decoder(checkpoint, dtype=dtype, device="cpu", decoder="lean", quantize=name if "int" in name else None)


@torch.inference_mode()
def logprobs(decoder: Decoder, pool: KVPool, ids: list[int]) -> Tensor:
    """Of every next token at every place [len(ids) - 1, V]."""
    root = pool.forest.add_root()
    logits = decoder.logits(pool.pack([root], [ids]), pool.kv)
    pool.forest.free([root])
    return logits[:-1].float().log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["bf16", "int8", "int4"])
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    rows = [
        tokenizer(text, add_special_tokens=False)["input_ids"][:2048] for text in texts(options.data, options.limit)
    ]
    decoders = [load(options.checkpoint, name) for name in options.formats]
    pools = [KVPool(one.shape, 160, 16, one.dtype, one.device) for one in decoders]
    loss, same, divergence = ([0.0] * len(decoders) for _ in range(3))
    began = time.perf_counter()
    for ids in rows:
        first: Tensor | None = None
        for i, (decoder, pool) in enumerate(zip(decoders, pools, strict=True)):
            found = logprobs(decoder, pool, ids)
            first = found if first is None else first
            loss[i] -= found.gather(1, torch.tensor(ids[1:])[:, None]).double().sum().item()
            same[i] += (found.argmax(1) == first.argmax(1)).sum().item()
            divergence[i] += (first.exp() * (first - found)).sum().item()
    tokens = sum(len(ids) - 1 for ids in rows)
    print(f"{len(rows)} texts, {tokens} tokens, level {tk.backend_info().cpu_isa}, {time.perf_counter() - began:.0f} s")
    for i, name in enumerate(options.formats):
        print(
            f"{name}: perplexity {math.exp(loss[i] / tokens):.4f}, likeliest token {same[i] / tokens:.2%} as "
            f"{options.formats[0]}, KL {divergence[i] / tokens:.5f}"
        )


if __name__ == "__main__":
    main()

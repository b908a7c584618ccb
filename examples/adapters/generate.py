"""Plain model.generate() over a KV forest, beside transformers' own cache::

    python examples/adapters/generate.py /path/to/SmolLM2-135M-Instruct --prompt-tokens 1024 --branches 16

Time, and the most KV memory held, of num_return_sequences and of num_beams; in float32 both give the same tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel
from tts_search.adapters.generate import GenerationCache
from tts_search.models.transformers import ATTENTION, register

Run = tuple[Tensor, float, int]  # tokens, seconds, bytes of KV


def with_dynamic_cache(model: PreTrainedModel, ids: Tensor, **options: Any) -> Run:
    """As transformers does it; KV at the end, without what its cat and index_select take for a moment."""
    cache = DynamicCache(config=model.config)
    out, seconds = timed(lambda: model.generate(ids, past_key_values=cache, **options))
    return out, seconds, sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def over_forest(model: PreTrainedModel, ids: Tensor, cache: GenerationCache, **options: Any) -> Run:
    """The same call with our cache; the most that pages with tokens took."""
    cache.reset()
    out, seconds = timed(lambda: model.generate(ids, past_key_values=cache, **options))
    return out, seconds, cache.peak_bytes


def timed(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    torch.manual_seed(0)
    start = time.perf_counter()
    out = call()
    return out, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub id of a causal language model")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--branches", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, in turn")
    args = parser.parse_args()

    register()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    before = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    after = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype, attn_implementation=ATTENTION)
    cache = GenerationCache(after)
    text = "Natural numbers are added, multiplied and sometimes divided. " * args.prompt_tokens
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : args.prompt_tokens]
    length = {"min_new_tokens": args.new_tokens, "max_new_tokens": args.new_tokens, "pad_token_id": 0}
    modes = {
        "num_return_sequences": {"num_return_sequences": args.branches, "do_sample": True},
        "num_beams": {"num_beams": args.branches, "do_sample": False},
    }
    for name, mode in modes.items():
        runs: list[tuple[Run, Run]] = []
        for _ in range(args.rounds):
            options = {**length, **mode}
            runs.append((with_dynamic_cache(before, ids, **options), over_forest(after, ids, cache, **options)))
        old, new = (statistics.median(pair[which][1] for pair in runs) for which in (0, 1))
        (old_ids, _, old_kv), (new_ids, _, new_kv) = runs[-1]
        print(
            f"{name}={args.branches}, {args.prompt_tokens} + {args.new_tokens} tokens, {args.dtype}: "
            f"{old:.2f} s -> {new:.2f} s ({old / new:.1f} times as fast); KV {old_kv / 2**20:.0f} MiB -> "
            f"{new_kv / 2**20:.0f} MiB; {(old_ids == new_ids).all(1).sum()} of {len(old_ids)} texts equal"
        )


if __name__ == "__main__":
    main()

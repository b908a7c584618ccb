"""Decode steps of a policy: N branches that share a prompt of P tokens, sampling included.

    python benchmarks/bench_decode.py --checkpoint PATH     # a checkpoint of SmolLM2-135M
    python benchmarks/bench_decode.py                       # random weights of the same shape

A step is the work of `HFPolicy` for one token of every branch: reserve KV slots, plan, forward, sample, check whether
the step ends. It is timed from the start of one forward to the start of the next. Cases run in turn, several times, and
the number of a case is the median of all its steps. The baseline, with ``--baseline``, is the same model in
transformers with its own attention (SDPA) and a `DynamicCache` of N full rows; it samples with `tts_kernels.sample`,
too. With ``--decoder lean transformers``, transformers' modules with attention over the forest are compared with the
lean decoder.

The bound is the larger of two times, with rates measured here: reading the weights and the unique KV once from memory,
and the operations of the linear layers and the attention at the speed of a large matrix product in the same type.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import record
import torch
from measure import multiplied
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from tts_search import HFPolicy, StepParams
from tts_search.models.block_cache import BlockPool
from tts_search.models.branches import TokenBranch
from tts_search.models.decoder import Batch, Decoder, KvDtype, KVPool
from tts_search.models.meter import Meter
from tts_search.models.pool import BranchPool
from tts_search.policies.jobs import SampledProblem
from tts_search.search.protocol import Expand

import tts_kernels as tk

SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """N branches on P shared tokens."""

    branches: int
    prefix: int


@dataclass
class Times:
    """Milliseconds of each step, and of the model's forward in it."""

    step: list[float]
    forward: list[float]

    def row(self, case: Case, name: str, bound: float) -> dict[str, record.Cell]:
        step = statistics.median(self.step)
        return {
            "N": case.branches,
            "P": case.prefix,
            "engine": name,
            "step, ms": round(step, 1),
            "forward, ms": round(statistics.median(self.forward), 1),
            "tokens a second": round(1000 * case.branches / step),
            "bound, ms": round(bound, 1),
        }


class Stopwatch:
    """A decoder that notes when each forward begins and how long it takes."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.shape = decoder, decoder.shape
        self.begins: list[float] = []
        self.lengths: list[float] = []

    def logits(self, batch: Batch, kv: tk.KVCache, rows: Tensor | None = None) -> Tensor:
        self.begins.append(time.perf_counter())
        out = self.decoder.logits(batch, kv, rows)
        self.lengths.append(time.perf_counter() - self.begins[-1])
        return out


def run_ours(policy: HFPolicy, case: Case, num_tokens: int, times: Times) -> None:
    """Sample ``num_tokens`` in each branch; the last of its steps count, when all branches decode together."""
    policy._lane.pool = BranchPool(pool_like(policy._lane.pool.pool, case, num_tokens))
    root = TokenBranch(Meter(), tokens=prompt(case), given=case.prefix)
    policy._problems[0] = SampledProblem(root)
    watch = Stopwatch(policy.decoder)
    policy._lane.decoder = watch
    params = StepParams(temperature=0.8, top_p=0.95, max_tokens=num_tokens, delimiter="\n\n\n\n\n\n")
    children = tuple(range(1, case.branches + 1))
    policy.expand([Expand(0, 0, children, (), tuple(range(case.branches)), params)])
    policy._lane.decoder = watch.decoder
    policy.end(0)
    # The first forward reads the prompt; the second one copies the prompt's last page for each branch.
    times.step += [1000 * (after - before) for before, after in itertools.pairwise(watch.begins[-num_tokens + 2 :])]
    times.forward += [1000 * length for length in watch.lengths[-num_tokens + 2 : -1]]


@torch.inference_mode()
def run_transformers(model: LlamaForCausalLM, case: Case, num_tokens: int, times: Times) -> None:
    """The usual way: N rows, each with the whole prompt in its cache."""
    cache = DynamicCache(config=model.config)
    model(torch.tensor([prompt(case)]), past_key_values=cache, logits_to_keep=1)
    cache.batch_repeat_interleave(case.branches)
    tokens = torch.arange(10, 10 + case.branches)
    seeds = torch.arange(case.branches)
    for number in range(num_tokens):
        begin = time.perf_counter()
        logits = model(tokens[:, None], past_key_values=cache, logits_to_keep=1).logits[:, -1]
        middle = time.perf_counter()
        tokens, _ = tk.sample(logits, temperature=0.8, top_p=0.95, seeds=seeds, offsets=seeds * 0 + number)
        times.step.append(1000 * (time.perf_counter() - begin))
        times.forward.append(1000 * (middle - begin))


def pool_like(pool: KVPool, case: Case, num_tokens: int) -> KVPool:
    """A pool of the same kind with room for the case."""
    pages = pages_for(case, num_tokens)
    if isinstance(pool, BlockPool):
        kv, blocks = pool.kv, case.prefix // 128 + 1 + case.branches * (num_tokens // 128 + 1)
        return BlockPool(kv.layers, pool.shape, blocks, pages, kv.pages[0].dtype, kv.dtype)
    return KVPool(pool.shape, pages, 16, pool.kv.dtype)


def prompt(case: Case) -> list[int]:
    """P tokens that mean nothing."""
    return [10 + (7 * i) % 40000 for i in range(case.prefix)]


def pages_for(case: Case, num_tokens: int) -> int:
    """Room for the prompt and the branches' own tokens."""
    return case.prefix // 16 + 2 + case.branches * (num_tokens // 16 + 3)


def median_rate(work: Callable[[], object], amount: float, repeats: int = 9) -> float:
    """Amount of work a second, the median of several runs."""
    work()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return amount / statistics.median(seconds)


def bound_ms(decoder: Decoder, case: Case, num_tokens: int, read_rate: float, gemm_rate: float) -> float:
    """The larger of the time to read weights and unique KV once, and the time of the arithmetic."""
    shape, size = decoder.shape, decoder.dtype.itemsize
    own = num_tokens // 2
    weights = size * (shape.body_parameters + shape.head_parameters)
    kv = shape.kv_bytes(decoder.dtype) * (case.prefix + case.branches * own)
    flops = shape.flops(case.branches, case.branches * (case.prefix + own), case.branches)
    return 1000 * max((weights + kv) / read_rate, flops / gemm_rate)


def checkpoint_of_shape(folder: str, dtype: str) -> str:
    """A checkpoint of SmolLM2's shape with random weights and a tokenizer that is never asked."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMOLLM2)).to(getattr(torch, dtype)).save_pretrained(folder)
    vocab = {f"<{number}>": number for number in range(SMOLLM2["vocab_size"])}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, "<0>"))).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a checkpoint; by default random weights of SmolLM2's shape")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--decoder", nargs="+", default=["lean"], choices=["lean", "transformers"])
    parser.add_argument("--quantize", nargs="+", default=["none"], choices=["none", "int8", "int4"], help="lean only")
    parser.add_argument("--kv", nargs="+", default=["none"], choices=["none", *get_args(KvDtype)], help="kv_dtype")
    parser.add_argument("--branches", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--prefix", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--tokens", type=int, default=16, help="tokens of each branch in a run")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each case, in turn with the others")
    parser.add_argument("--baseline", action="store_true", help="time transformers' own attention as well")
    parser.add_argument("--json", type=Path, help="write the rows to this file, for another program")
    parser.add_argument("--write", help="the name of a measurement in benchmarks/results")
    parser.add_argument("--beside", default="nothing")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        path = options.checkpoint or checkpoint_of_shape(scratch, options.dtype)
        policies = {
            ", ".join([kind, *(bits,) * (bits != "none"), *(f"KV {kv}",) * (kv != "none")]): HFPolicy(
                path,
                dtype=options.dtype,
                kv_memory="64MiB",
                decoder=kind,
                quantize=None if bits == "none" else bits,
                kv_dtype=None if kv == "none" else kv,
            )
            for kind in options.decoder
            for bits in options.quantize
            for kv in options.kv
        }
        decoder = next(iter(policies.values())).decoder
        model = AutoModelForCausalLM.from_pretrained(path, dtype=decoder.dtype) if options.baseline else None
    for policy in policies.values():
        policy._eos = frozenset()  # every branch runs to its limit
    cases = [Case(branches, prefix) for branches in options.branches for prefix in options.prefix]
    times = {(case, kind): Times([], []) for case in cases for kind in (*policies, "SDPA")}
    for _ in range(options.repeats):
        for case in cases:
            for kind, policy in policies.items():
                run_ours(policy, case, options.tokens, times[case, kind])
            if model is not None:
                run_transformers(model, case, 4, times[case, "SDPA"])

    block = torch.zeros(2**28, dtype=torch.uint8).view(torch.int64)
    read_rate = median_rate(block.sum, 2**28)
    square = torch.randn(2048, 2048, dtype=multiplied(decoder.dtype))
    gemm_rate = median_rate(lambda: square @ square, 2 * 2048**3)
    rows = []
    for case in cases:
        bound = bound_ms(decoder, case, options.tokens, read_rate, gemm_rate)
        for kind in policies:
            rows.append(times[case, kind].row(case, kind, bound))
        if model is not None:
            rows.append(times[case, "SDPA"].row(case, "transformers, SDPA", bound))
    report(rows, options, read_rate, gemm_rate)


def report(rows: list[dict[str, record.Cell]], options: argparse.Namespace, read_rate: float, gemm_rate: float) -> None:
    """Print a table and the rates behind its bound, and write it."""
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n|" + " --- |" * len(names))
    for row in rows:
        print("| " + " | ".join(str(row[name]) for name in names) + " |")
    rates = {
        "memory, GB a second": round(read_rate / 1e9, 1),
        f"gemm {options.dtype}, GFLOP a second": round(gemm_rate / 1e9),
    }
    print(rates)
    if options.json is not None:
        options.json.write_text(json.dumps(rows))
    if options.write is not None:
        model = "SmolLM2-135M" if options.checkpoint else "random weights of SmolLM2-135M's shape"
        record.write(
            options.write,
            what=f"Decode steps of {model}: N branches that share a prompt of P tokens, {options.dtype}, sampling "
            "included; medians",
            command=f"python {shlex.join(record.hidden(argument) for argument in sys.argv)}",
            beside=options.beside,
            tables={
                "steps": {f"{row['N']} behind {row['P']}, {row['engine']}": row for row in rows},
                "rates": {"of this run": rates},
            },
        )


if __name__ == "__main__":
    main()

"""`linear` on packed weights against torch's, plain and packed: layers of SmolLM2-135M, in decode steps and a prefill.

A call runs every layer's weights in turn, so that they come from memory as in a model. With few rows, reading the
weights once is the bound; from about 10 bfloat16 rows on it is arithmetic. The packed baseline is the op that
inductor's freezing calls: oneDNN with weights that were reordered for exactly this number of rows.

    python benchmarks/bench_linear.py [--write NAME]

prints the table of RESULTS.md: weights of few bits and our bfloat16, in turn.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any, Literal

import costs
import pytest
import record
import torch
from measure import compare, medians
from torch import Tensor
from torch.nn import functional

import tts_kernels as tk

LAYERS, HIDDEN, INNER, Q_HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 30, 576, 1536, 9, 3, 64, 49152
BODY = {
    "qkv": ((Q_HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate_up": (2 * INNER, HIDDEN),
    "down": (HIDDEN, INNER),
}


def weights(names: list[str], dtype: torch.dtype) -> list[Tensor]:
    """The projections of these names in all layers; "lm_head" is one."""
    shapes = [BODY[name] for _ in range(LAYERS) for name in names if name in BODY]
    shapes += [(VOCABULARY, HIDDEN)] * ("lm_head" in names)
    return [(torch.randn(shape) / shape[1] ** 0.5).to(dtype) for shape in shapes]


def run(benchmark: Any, name: str, names: list[str], rows: int, dtype: torch.dtype, rounds: int) -> None:
    dense = weights(names, dtype)
    packed = [tk.pack_linear(weight) for weight in dense]
    inputs = {depth: torch.randn(rows, depth).to(dtype) for depth in (HIDDEN, INNER)}

    def ours() -> None:
        for weight in packed:
            tk.linear(inputs[weight.in_features], weight)

    def theirs() -> None:
        for weight in dense:
            functional.linear(inputs[weight.shape[1]], weight)

    mkldnn = torch.ops.mkldnn
    reordered = [(weight.shape[1], mkldnn._reorder_linear_weight(weight, rows)) for weight in dense]

    def theirs_packed() -> None:
        for depth, weight in reordered:
            mkldnn._linear_pointwise(inputs[depth], weight, None, "none", [], "")

    elements = sum(weight.numel() for weight in dense)
    benchmark.group = f"linear {name}, {str(dtype)[6:]}"
    bound = costs.linear(rows, elements, dtype)
    compare(benchmark, ours, {"torch": theirs, "torch packed": theirs_packed}, rounds=rounds, bound=bound)


@pytest.mark.parametrize(
    ("dtype", "rows"),
    [*((torch.bfloat16, rows) for rows in (1, 4, 16, 64, 256)), *((torch.float32, rows) for rows in (1, 16, 64))],
)
def test_decode_step(benchmark: Any, rows: int, dtype: torch.dtype) -> None:
    run(benchmark, "decode step", [*BODY, "lm_head"], rows, dtype, rounds=7)


@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("name", [*BODY, "lm_head"])
def test_projection(benchmark: Any, name: str, rows: int) -> None:
    run(benchmark, name, [name], rows, torch.bfloat16, rounds=7)


@pytest.mark.parametrize("rows", [1, 4, 16, 64, 256])
@pytest.mark.parametrize(("quantize", "group_size"), [("int8", None), ("int4", 64), ("int4", 32)])
def test_quantised_decode_step(
    benchmark: Any, rows: int, quantize: Literal["int8", "int4"], group_size: int | None
) -> None:
    """Beside our own bfloat16 and torch's: as it is, and by whole numbers (rows quantised in advance, no scales)."""
    dense = weights([*BODY, "lm_head"], torch.bfloat16)
    plain = [tk.pack_linear(weight) for weight in dense]
    packed = [tk.pack_linear(weight, quantize=quantize, group_size=group_size) for weight in dense]
    inputs = {depth: torch.randn(rows, depth).to(torch.bfloat16) for depth in (HIDDEN, INNER)}
    whole_rows = {depth: (32 * x).to(torch.int8) for depth, x in inputs.items()}
    whole = [(100 * weight).to(torch.int8).T for weight in dense]

    def ours() -> None:
        for weight in packed:
            tk.linear(inputs[weight.in_features], weight)

    def ours_plain() -> None:
        for weight in plain:
            tk.linear(inputs[weight.in_features], weight)

    def theirs() -> None:
        for weight in dense:
            functional.linear(inputs[weight.shape[1]], weight)

    def theirs_whole() -> None:
        for weight in whole:
            torch._int_mm(whole_rows[weight.shape[0]], weight)

    name = quantize if group_size is None else f"{quantize} g{group_size}"
    benchmark.group = f"linear decode step, {name}"
    bound = costs.linear_quantized(sum(w.numel() for w in dense), 8 if quantize == "int8" else 4, group_size, HIDDEN)
    baselines = {"our bfloat16": ours_plain, "torch bfloat16": theirs, "torch int8 without scales": theirs_whole}
    compare(benchmark, ours, baselines, rounds=7, bound=bound)


def test_prefill(benchmark: Any) -> None:
    run(benchmark, "prefill", [*BODY], 2048, torch.bfloat16, rounds=3)


# ---- the table of RESULTS.md -----------------------------------------------------------------------------------------

Bits = Literal["int8", "int4"]
GROUPS: dict[Bits, int | None] = {"int8": None, "int4": 32}
ROWS = (1, 4, 16, 64, 256, 2048)


def run_all(packed: list[tk.PackedLinear], inputs: dict[int, Tensor]) -> None:
    """Multiply by each weight once."""
    for weight in packed:
        tk.linear(inputs[weight.in_features], weight)


def table(runs: int) -> dict[str, dict[str, record.Cell]]:
    """A row for each number of rows and of bits; a prefill's last row alone needs the LM head, which is left out."""
    found: dict[str, dict[str, record.Cell]] = {}
    for rows in ROWS:
        dense = weights([*BODY] if rows == max(ROWS) else [*BODY, "lm_head"], torch.bfloat16)
        inputs = {depth: torch.randn(rows, depth).to(torch.bfloat16) for depth in (HIDDEN, INNER)}
        packed = {"bfloat16": [tk.pack_linear(weight) for weight in dense]}
        for bits, group in GROUPS.items():
            packed[bits] = [tk.pack_linear(weight, quantize=bits, group_size=group) for weight in dense]
        elements = sum(weight.numel() for weight in dense)
        bounds = {"bfloat16": costs.linear(rows, elements, torch.bfloat16)}
        for bits, group in GROUPS.items():
            bounds[bits] = costs.linear_quantized(elements, int(bits[3:]), group, HIDDEN)
        rates = bounds["bfloat16"].rates()
        calls = {name: call for name, (call, _) in rates.items()}
        times = medians(calls | {name: partial(run_all, own, inputs) for name, own in packed.items()}, runs)
        rate = {name: amount / times[name] for name, (_, amount) in rates.items()}
        for name in packed:
            of_memory = bounds[name].bytes / rate["memory"] / times[name]
            found[f"{rows} rows, {name}"] = {
                "rows": rows,
                "weights": name,
                "ms": round(1000 * times[name], 2),
                "times faster than bfloat16": round(times["bfloat16"] / times[name], 2),
                "of memory": round(of_memory, 2),
                "of bfloat16 gemm": round(bounds["bfloat16"].operations / rate["gemm"] / times[name], 2),
            }
            print(found[f"{rows} rows, {name}"], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", help="the name of a measurement in benchmarks/results")
    parser.add_argument("--beside", default="nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = table(options.runs)
    if options.write:
        record.write(
            options.write,
            what="Linear layers of SmolLM2-135M on so many rows, weights from memory; int4 in groups of 32; medians",
            command="python benchmarks/bench_linear.py",
            beside=options.beside,
            tables={"linear": found},
        )


if __name__ == "__main__":
    main()

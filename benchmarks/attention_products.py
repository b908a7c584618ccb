"""The effect of lower precision in attention's products: errors with int8 queries and keys, or with float16 sums.

    python benchmarks/attention_products.py [--write NAME]

An output may be at most twice as far from the float64 result as plain torch in bfloat16 (the tolerance rule of the
tests). Queries and keys are normally distributed, scaled so that scores have the standard deviation of the row. Each
query and each key has a scale, as in the products of `linear` with int8 weights. Float16 sums are computed one product
after the other, like a chain of multiply-adds. The error is the root mean square, relative to that of torch's bfloat16.
"""

from __future__ import annotations

import argparse

import record
import torch
from torch import Tensor

QUERIES, KEYS, DIM = 64, 2048, 64


def attend(scores: Tensor, v: Tensor) -> Tensor:
    """[queries, D]"""
    return scores.softmax(-1) @ v


def in_int8(x: Tensor) -> Tensor:
    """Rows rounded to 8 bits with a scale each, as float64."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


def summed_in_half(q: Tensor, k: Tensor) -> Tensor:
    """Scores of float16 products added up in float16, an element after the other."""
    q, k = q.half(), k.half()
    total = torch.zeros(q.shape[0], k.shape[0], dtype=torch.float16)
    for d in range(q.shape[1]):
        total = (q[:, d, None].float() * k[None, :, d].float() + total.float()).half()  # rounded once
    return total.double()


def errors(deviation: float, seeds: int = 8) -> dict[str, record.Cell]:
    """The errors of each form, as multiples of torch's in bfloat16."""
    found: dict[str, list[float]] = {"int8 products": [], "float16 sums": []}
    for seed in range(seeds):
        torch.manual_seed(seed)
        q = (deviation**0.5 * torch.randn(QUERIES, DIM)).bfloat16()
        k = (deviation**0.5 * torch.randn(KEYS, DIM)).bfloat16()
        v = torch.randn(KEYS, DIM).bfloat16()
        scale = DIM**-0.5
        right = attend(scale * (q.double() @ k.double().T), v.double())
        in_bfloat16 = torch.nn.functional.scaled_dot_product_attention(*(x[None, None] for x in (q, k, v)))[0, 0]
        forms = {
            "int8 products": scale * (in_int8(q.double()) @ in_int8(k.double()).T),
            "float16 sums": scale * summed_in_half(q, k),
        }
        unit = (in_bfloat16.double() - right).square().mean().sqrt()
        for name, scores in forms.items():
            out = attend(scores, v.double()).bfloat16().double()
            found[name].append(float((out - right).square().mean().sqrt() / unit))
    return {name: round(sum(values) / seeds, 2) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", help="the name of a measurement in benchmarks/results")
    options = parser.parse_args()
    rows = {f"{deviation:g}": {"deviation of scores": deviation, **errors(deviation)} for deviation in (1.0, 2.0, 4.0)}
    print(*rows.values(), sep="\n")
    if options.write:
        record.write(
            options.write,
            what="Errors of attention with products of fewer bits, in times of torch's bfloat16",
            command="python benchmarks/attention_products.py",
            beside="other work (errors do not depend on it)",
            tables={"errors": rows},
        )


if __name__ == "__main__":
    main()

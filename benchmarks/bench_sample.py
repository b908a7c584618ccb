"""`sample` against the chain of torch ops in transformers' logits processors.

Bound: reading a row from memory once, plus 2 V exponentials (V at temperature 1).
"""

from __future__ import annotations

from typing import Any

import costs
import pytest
import torch
from measure import compare
from torch import Tensor

import tts_kernels as tk

Options = dict[str, Any]

CASES: dict[str, Options] = {
    "top_p": {"temperature": 0.8, "top_p": 0.95},
    "top_k": {"temperature": 0.8, "top_k": 50},
    "top_k, top_p": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
    "min_p": {"temperature": 0.8, "min_p": 0.05},
    "temperature": {"temperature": 0.8},
    "plain": {},
    "greedy": {"temperature": 0},
}


def logits(kind: str, rows: int, vocab: int) -> Tensor:
    """ "flat": normal, a nucleus of 80,000 tokens. "peaked": like a language model's, a nucleus of a few."""
    x = torch.randn(rows, vocab)
    if kind == "peaked":
        x *= 2
        x[:, torch.randint(0, vocab, (200,))] += 18 * torch.rand(rows, 200)
    return x


def transformers_chain(
    scores: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """What transformers 5 runs for these options, and the log-probability of the draw."""
    raw = scores
    if temperature == 0:
        tokens = scores.argmax(-1, keepdim=True)
        return tokens, torch.log_softmax(raw, -1).gather(1, tokens)
    if temperature != 1.0:
        scores = scores / temperature
    if top_k:
        scores = scores.masked_fill(scores < torch.topk(scores, top_k)[0][..., -1, None], -torch.inf)
    if top_p < 1.0:
        ordered, indices = torch.sort(scores, descending=False)
        remove = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        remove[..., -1:] = False
        scores = scores.masked_fill(remove.scatter(1, indices, remove), -torch.inf)
    if min_p:
        probs = scores.softmax(-1)
        scores = scores.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), -torch.inf)
    tokens = torch.multinomial(scores.softmax(-1), 1)
    return tokens, torch.log_softmax(raw, -1).gather(1, tokens)


@pytest.mark.parametrize("kind", ["flat", "peaked"])
@pytest.mark.parametrize("rows", [64, 1])
@pytest.mark.parametrize("name", CASES)
def test_sample(benchmark: Any, name: str, rows: int, kind: str) -> None:
    torch.manual_seed(0)
    x = logits(kind, rows, 151_936)
    seeds, offsets = torch.arange(rows), torch.zeros(rows, dtype=torch.int64)

    def run() -> tk.Sampled:
        return tk.sample(x, seeds=seeds, offsets=offsets, **CASES[name])

    # The baseline's run also empties the cache of the rows, as a model's forward does.
    benchmark.group = f"sample, {rows} x 151,936, {kind}"
    compare(
        benchmark,
        run,
        {"torch": lambda: transformers_chain(x, **CASES[name])},
        rounds=5 if rows > 1 else 30,
        bound=costs.sample(*x.shape, x.dtype),
    )

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from rules import DTYPES, assert_names, assert_rule
from torch import Tensor
from torch.library import opcheck

import tts_kernels as tk
from tts_kernels import reference

# Each option alone, and together with others.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 2.5},
    "greedy": {"temperature": 0},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "top_k, top_p": {"top_k": 20, "top_p": 0.7, "temperature": 0.8},
    "top_p, min_p": {"top_p": 0.95, "min_p": 0.2, "temperature": 1.5},
    "all": {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.05},
}
DRAWS = 4000  # of a row, to see all of its tokens; fewer where kernels are emulated


def draw(logits: Tensor, seeds: Tensor | None = None, offsets: Tensor | None = None, **options: Any) -> Any:
    rows = logits.shape[0]
    seeds = torch.arange(rows) if seeds is None else seeds
    offsets = torch.zeros(rows, dtype=torch.int64) if offsets is None else offsets
    return tk.sample(logits, seeds=seeds, offsets=offsets, **options)


def many(row: Tensor, draws: int, **options: Any) -> Tensor:
    """Tokens of `draws` draws from one row."""
    return draw(row.expand(draws, -1), torch.full((draws,), 1234), torch.arange(draws), **options).tokens


def kept(row: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """The distribution that the options leave, by brute force in float64."""
    p = torch.softmax(row.double() / temperature, 0).tolist()
    order = sorted(range(len(p)), key=lambda i: (-row[i].item(), i))
    left = [i for i in order if row[i] >= row[order[min(top_k, len(p)) - 1]]] if top_k else order
    total, mass, nucleus = sum(p[i] for i in left), 0.0, []
    for i in left:
        nucleus.append(i)
        mass += p[i]
        if mass >= top_p * total:
            break
    out = torch.zeros(len(p), dtype=torch.float64)
    for i in nucleus:
        out[i] = p[i] if p[i] >= min_p * max(p) else 0.0
    return out / out.sum()


# ---- against the definition --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("vocab", [1, 2, 37, 1024, 1025, 5003, 40001])
def test_draws_exactly_the_definition(name: str, dtype: torch.dtype, vocab: int) -> None:
    logits = 3 * torch.randn(6, vocab)
    logits[1] = logits[1].round()  # ties
    logits[2, 1:vocab:3] = -torch.inf
    logits[3] = 0.5
    logits[4] *= 10
    logits = logits.to(dtype)
    seeds, offsets = torch.randint(-(2**63), 2**63 - 1, (6,)), torch.randint(-(2**63), 2**63 - 1, (6,))
    out = draw(logits, seeds, offsets, **OPTIONS[name])
    with tk.use_backend("reference"):
        expected = draw(logits, seeds, offsets, **OPTIONS[name])
    assert out.tokens.dtype == torch.int64
    assert out.logprobs.dtype == torch.float32
    assert torch.equal(out.tokens, expected.tokens)
    exact = torch.log_softmax(logits.double(), 1).gather(1, out.tokens[:, None])[:, 0]
    plain = torch.log_softmax(logits, 1).gather(1, out.tokens[:, None])[:, 0]
    assert_rule(out.logprobs, exact, plain)


@pytest.mark.parametrize("name", ["plain", "greedy", "top_k, top_p", "all"])
@pytest.mark.parametrize("vocab", [2051, 20_011])
def test_rows_whose_ends_decide(name: str, vocab: int) -> None:
    """Where blocks of a GPU share a row, each has a part of it, and one finds the token."""
    logits = torch.randn(6, vocab)
    logits[0, -3:] = 30.0  # the last part has it all
    logits[1] = 0.25
    logits[2, [5, -5, -4]] = torch.inf
    logits[3, -1] = torch.nan
    logits[4] = -torch.inf
    logits[5, : vocab // 2] = -torch.inf
    seeds, offsets = torch.arange(6), torch.arange(6) * 7
    out = draw(logits, seeds, offsets, **OPTIONS[name])
    with tk.use_backend("reference"):
        expected = draw(logits, seeds, offsets, **OPTIONS[name])
    assert torch.equal(out.tokens, expected.tokens)
    torch.testing.assert_close(out.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", ["top_k", "top_p", "top_k, top_p", "top_p, min_p", "all"])
@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0])
def test_a_misleading_row(name: str, spread: float) -> None:
    """The kernel guesses where to cut from every so many logits: here those are unlike all others."""
    vocab = 90_011
    looked_at = (torch.arange(256) * (vocab - 16) // 255)[:, None] + torch.arange(16)
    logits = spread * torch.randn(6, vocab)
    logits[0, looked_at] = -20.0
    logits[1, looked_at] += 6 * spread
    logits[2, looked_at] -= 3 * spread
    logits[3, looked_at] = 0.0
    logits[4] = logits[4].sort().values
    logits[5] = 10 * logits[5].round()
    out = draw(logits, **OPTIONS[name])
    with tk.use_backend("reference"):
        expected = draw(logits, **OPTIONS[name])
    assert torch.equal(out.tokens, expected.tokens)


def test_the_reference_agrees_with_float64() -> None:
    """Weights are rounded to 2**-39 and float32: that moves a draw about never."""
    logits = 2 * torch.randn(300, 50)
    seeds, offsets = torch.arange(300), torch.arange(300)
    for options in ((1.0, 0, 1.0, 0.0), (0.7, 20, 0.9, 0.01)):
        rest = (*options, None, None, None, None, 0)
        narrow, *_ = reference.sample(logits, seeds, offsets, *rest)
        wide, logprobs, *_ = reference.sample(logits.double(), seeds, offsets, *rest)
        assert logprobs.dtype == torch.float64
        assert torch.equal(narrow, wide)


# ---- distributions -----------------------------------------------------------------------------------------------


def assert_distribution(tokens: Tensor, expected: Tensor) -> None:
    """Chi-square over bins of at least 10 expected draws; nothing drawn that has no probability."""
    counts = torch.bincount(tokens, minlength=len(expected)).double()
    assert counts[expected == 0].sum() == 0
    mean = expected * len(tokens)
    rare = mean < 10
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    mean = torch.cat([mean[~rare], mean[rare].sum()[None]])
    counts, mean = counts[mean > 0], mean[mean > 0]
    if len(mean) == 1:
        return
    statistic = ((counts - mean) ** 2 / mean).sum()
    p_value = torch.special.gammaincc(torch.tensor((len(mean) - 1) / 2.0).double(), statistic / 2)
    assert p_value > 1e-4, f"chi-square {statistic:.1f} over {len(mean)} bins"


@pytest.mark.parametrize("name", [n for n in OPTIONS if n != "greedy"])
def test_distribution_of_each_option(name: str) -> None:
    """200,000 draws: probabilities wrong by 2% would raise the statistic by about 80 over its mean of 50."""
    row = 1.5 * torch.randn(61)
    assert_distribution(many(row, 200_000, **OPTIONS[name]), kept(row, **OPTIONS[name]))


def test_distribution_over_many_blocks() -> None:
    row = torch.randn(20_011)
    for options in ({"temperature": 0.7}, {"top_p": 0.6}, {"top_k": 9000, "top_p": 0.9, "temperature": 1.2}):
        tokens, expected = many(row, 3000, **options), kept(row, **options)
        assert (expected[tokens] > 0).all()
        bins = torch.arange(20_011) * 40 // 20_011
        assert_distribution(bins[tokens], torch.zeros(40, dtype=torch.float64).index_add_(0, bins, expected))


def test_the_chi_square_test_sees_two_percent() -> None:
    row = torch.zeros(60)
    wrong = torch.cat([torch.full((30,), 1.02), torch.full((30,), 0.98)]).double() / 60
    with pytest.raises(AssertionError, match="chi-square"):
        assert_distribution(many(row, 200_000), wrong)


def test_offsets_and_seeds_give_independent_draws() -> None:
    """Pairs of neighbouring draws fill the square evenly."""
    row = torch.zeros(1, 16)
    n = 60_000
    for seeds, offsets in ((torch.zeros(n).long(), torch.arange(n)), (torch.arange(n), torch.zeros(n).long())):
        tokens = draw(row.expand(n, -1), seeds, offsets).tokens
        assert_distribution(16 * tokens[:-1] + tokens[1:], torch.full((256,), 1 / 256, dtype=torch.float64))


def test_philox_known_answer() -> None:
    """Key 0, counter 0 gives e169c58d6627e8d5 (Random123); 2**16 equal logits show its leading 16 bits."""
    zero = torch.zeros(1, dtype=torch.int64)
    assert draw(torch.zeros(1, 1 << 16), zero, zero).tokens.item() == 0xE169
    assert reference._philox(0, 0) == 0xE169C58D6627E8D5


# ---- the sets that remain ----------------------------------------------------------------------------------------

LOG2E = 1.4426950408889634  # at this temperature logits are powers of two, exactly
POWERS = torch.tensor([0.0, 3, 1, 4, 0, 2])  # 1 8 2 16 1 4, of 32


def support(row: Tensor, **options: Any) -> list[int]:
    return torch.unique(many(row, DRAWS, **options)).tolist()


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(0.25, [3]), (0.5, [3]), (0.5001, [1, 3]), (0.75, [1, 3]), (0.875, [1, 3, 5]), (0.96875, [0, 1, 2, 3, 5])],
)
def test_top_p_is_the_smallest_set(top_p: float, expected: list[int]) -> None:
    """The last case takes one of two tokens that tie: the lower id."""
    assert support(POWERS, temperature=LOG2E, top_p=top_p) == expected


def test_top_p_renormalises_what_top_k_leaves() -> None:
    """16 + 8 of 28 are 0.857."""
    assert support(POWERS, temperature=LOG2E, top_k=3, top_p=0.85) == [1, 3]
    assert support(POWERS, temperature=LOG2E, top_k=3, top_p=0.86) == [1, 3, 5]


def test_ties_with_the_kth_stay() -> None:
    row = torch.tensor([1.0, 2.0, 1.0, -0.0, 0.0, 1.0])
    assert support(row, top_k=1) == [1]
    assert support(row, top_k=2) == [0, 1, 2, 5]
    assert support(row, top_k=5) == [0, 1, 2, 3, 4, 5]
    assert support(row, top_k=100) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("vocab", [5, 4099])
def test_top_p_cuts_through_ties_at_the_lower_id(vocab: int) -> None:
    row = torch.zeros(vocab)
    for count in (1, 2, vocab // 2, vocab - 1):
        tokens = many(row, DRAWS, top_p=(count - 0.5) / vocab)
        assert tokens.max() < count
        assert tokens.max() >= count - 1 - count // 50


def test_min_p_is_relative_to_the_maximum() -> None:
    assert support(POWERS, temperature=LOG2E, min_p=0.125) == [1, 2, 3, 5]
    assert support(POWERS, temperature=LOG2E, min_p=0.126) == [1, 3, 5]
    assert support(POWERS, temperature=LOG2E, min_p=1.0) == [3]


def test_sets_equal_brute_force_on_random_rows() -> None:
    """Random options; a token near the edge of the nucleus (within 1e-6) may go either way."""
    torch.manual_seed(3)
    for trial in range(40):
        row = (2 * torch.randn(23)).round(decimals=1 if trial % 2 else 4)
        options = {
            "temperature": 0.5 + torch.rand(()).item(),
            "top_k": int(torch.randint(0, 25, ())),
            "top_p": 0.05 + 0.9 * torch.rand(()).item(),
            "min_p": 0.1 * torch.rand(()).item(),
        }
        w = reference._weights(row, options["temperature"])
        keep = reference._kept(row, w, *(options[o] for o in ("top_k", "top_p", "min_p")))
        assert torch.equal(keep, kept(row, **options) > 0), options
        assert set(support(row, **options)) <= set(keep.nonzero()[:, 0].tolist())


# ---- the likeliest tokens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab", "top"), [(1, 1), (9, 9), (37, 20), (1025, 5), (5003, 128), (40001, 20)])
def test_likeliest_tokens_are_those_of_a_stable_sort(vocab: int, top: int, dtype: torch.dtype) -> None:
    logits = 3 * torch.randn(6, vocab)
    logits[1] = logits[1].round()  # ties
    logits[2, vocab // 3 + 1 :: 2] = -torch.inf
    logits[3] = 0.5
    logits[4] = torch.arange(vocab) / 64  # each larger than all before
    logits[5] = -logits[4]
    logits = logits.to(dtype)
    out = draw(logits, temperature=0.7, top_p=0.9, top_logprobs=top)
    plain = draw(logits, temperature=0.7, top_p=0.9)
    assert torch.equal(out.tokens, plain.tokens)
    assert torch.equal(out.logprobs.nan_to_num(9), plain.logprobs.nan_to_num(9))
    assert out.top_ids.dtype == torch.int64
    assert torch.equal(out.top_ids, logits.sort(dim=1, descending=True, stable=True).indices[:, :top])
    exact = torch.log_softmax(logits.double(), 1).gather(1, out.top_ids)
    assert_rule(out.top_logprobs, exact, torch.log_softmax(logits, 1).gather(1, out.top_ids))
    own = out.top_ids == out.tokens[:, None]
    assert torch.equal(out.top_logprobs[own], out.logprobs[own.any(1)])


def test_likeliest_tokens_of_rows_without_a_distribution() -> None:
    logits = torch.randn(3, 1300)
    logits[0, 1299] = torch.nan
    logits[1] = -torch.inf
    logits[2, [5, 1200]] = torch.inf
    out = draw(logits, top_logprobs=3)
    assert out.top_ids[:2].tolist() == [[-1] * 3] * 2
    assert out.top_logprobs[:2].isnan().all()
    assert out.top_ids[2].tolist() == [5, 1200, int(logits[2].masked_fill(logits[2] == torch.inf, 0).argmax())]
    torch.testing.assert_close(out.top_logprobs[2], torch.tensor([-math.log(2), -math.log(2), -torch.inf]))
    with tk.use_backend("reference"):
        expected = draw(logits, top_logprobs=3)
    assert torch.equal(out.top_ids, expected.top_ids)


# ---- what a draw depends on --------------------------------------------------------------------------------------


def test_alone_in_any_batch_and_in_any_order() -> None:
    logits = 3 * torch.randn(33, 3001)
    seeds, offsets = torch.randint(0, 2**62, (33,)), torch.arange(33) % 4
    options = {"temperature": 0.9, "top_p": 0.9, "top_k": 100}
    together = draw(logits, seeds, offsets, **options)
    order = torch.randperm(33)
    shuffled = draw(logits[order], seeds[order], offsets[order], **options)
    assert torch.equal(shuffled.tokens, together.tokens[order])
    assert torch.equal(shuffled.logprobs, together.logprobs[order])
    for r in (0, 13, 32):
        alone = draw(logits[r : r + 1], seeds[r : r + 1], offsets[r : r + 1], **options)
        assert torch.equal(alone.tokens, together.tokens[r : r + 1])
        assert torch.equal(alone.logprobs, together.logprobs[r : r + 1])


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_threads_do_not_change_the_result(rows: int) -> None:
    logits = 2 * torch.randn(rows, 100_003)
    logits[0, ::2] = logits[0, ::2].round()
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([draw(logits, **options) for options in OPTIONS.values()])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for a, b in zip(results[0], result, strict=True):
            assert torch.equal(a.tokens, b.tokens)
            assert torch.equal(a.logprobs, b.logprobs)


DIGEST = """
import hashlib, torch, tts_kernels as tk
torch.manual_seed(5)
torch.set_num_threads(1)
digest = hashlib.sha256()
for vocab, dtype in ((151_936, torch.float32), (49_152, torch.bfloat16), (32_003, torch.float16), (7, torch.float32)):
    for spread in (0.1, 1.0, 8.0):
        logits = (spread * torch.randn(8, vocab)).to(dtype)
        for options in ({}, {"temperature": 0.8, "top_p": 0.95}, {"temperature": 1.2, "top_k": 50}, {"min_p": 0.02}):
            out = tk.sample(logits, seeds=torch.arange(8), offsets=torch.arange(8), top_logprobs=7, **options)
            for values in out:
                digest.update(values.numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.skipif("TTS_KERNELS_CPU_ISA" in os.environ, reason="compares the instruction sets itself")
def test_instruction_sets_draw_the_same_to_the_bit() -> None:
    digests = {}
    for isa in tk.backend_info().cpu_isas:
        done = subprocess.run(
            [sys.executable, "-c", DIGEST],
            env={**os.environ, "TTS_KERNELS_CPU_ISA": isa},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        digests[isa] = done.stdout
    assert len(next(iter(digests.values())).strip()) == hashlib.sha256().digest_size * 2
    assert len(set(digests.values())) == 1, digests


def test_options_by_row_equal_the_numbers() -> None:
    logits = 2 * torch.randn(6, 500)
    columns = {
        "temperature": [0.0, 0.5, 1.0, 1.5, 0.8, 0.3],
        "top_k": [0, 10, 0, 500, 1, 60],
        "top_p": [1.0, 0.5, 0.9, 1.0, 0.2, 0.95],
        "min_p": [0.0, 0.0, 0.1, 0.2, 0.0, 1.0],
    }
    seeds, offsets = torch.arange(6) + 9, torch.arange(6)
    tensors = {name: torch.tensor(values) for name, values in columns.items()}
    by_row = draw(logits, seeds, offsets, **tensors)
    assert torch.equal(
        by_row.tokens, draw(logits, seeds, offsets, **{**tensors, "top_k": tensors["top_k"].int()}).tokens
    )
    for r in range(6):
        one = slice(r, r + 1)
        alone = draw(logits[one], seeds[one], offsets[one], **{name: values[r] for name, values in columns.items()})
        assert torch.equal(alone.tokens, by_row.tokens[one])


# ---- edges -------------------------------------------------------------------------------------------------------


def test_greedy_takes_the_lower_id() -> None:
    logits = torch.zeros(4, 3000)
    logits[0, [2999, 1500, 1501]] = 4.0
    logits[1] = -1.0
    logits[1, 7] = -0.0
    logits[1, 5] = 0.0
    logits[2] = -torch.inf
    logits[2, 2050] = -3e38
    out = draw(logits, temperature=0, top_k=3, top_p=0.1, min_p=0.5)
    assert out.tokens.tolist() == [1500, 5, 2050, 0]
    assert out.logprobs[2] == 0


def test_masked_tokens_are_never_drawn() -> None:
    row = torch.full((2500,), -torch.inf)
    row[[3, 1023, 1024, 2499]] = torch.tensor([1.0, 1.0, 0.0, 1.0])
    for options in OPTIONS.values():
        assert set(many(row, DRAWS // 8, **options).tolist()) <= {3, 1023, 1024, 2499}
    assert draw(row[None], top_p=1e-30).tokens.item() == 3


@pytest.mark.parametrize("name", OPTIONS)
def test_rows_without_a_distribution(name: str) -> None:
    """NaN, or no finite logit: (-1, nan); other rows are not disturbed."""
    logits = torch.randn(5, 1300)
    expected = draw(logits, **OPTIONS[name])
    logits[0, 1299] = torch.nan
    logits[1] = -torch.inf
    logits[2] = torch.inf
    logits[2, 4] = -torch.inf
    logits[3] = torch.inf
    logits[3, 5] = -torch.nan
    out = draw(logits, **OPTIONS[name])
    assert out.tokens.tolist() == [-1, -1, -1, -1, expected.tokens[4].item()]
    assert out.logprobs[:4].isnan().all()
    assert out.logprobs[4] == expected.logprobs[4]


def test_infinite_logits_are_certain_and_share() -> None:
    row = torch.tensor([0.0, torch.inf, 3e38, -torch.inf, torch.inf, torch.inf])
    assert support(row, temperature=1e30) == [1, 4, 5]
    assert support(row, top_p=0.6) == [1, 4]
    assert support(row, top_k=1) == [1, 4, 5]
    assert support(row, temperature=0) == [1]
    out = draw(row[None])
    torch.testing.assert_close(out.logprobs, torch.tensor([-math.log(3)]))
    rows = row.expand(50, -1)
    with tk.use_backend("reference"):
        expected = draw(rows, top_p=0.6)
    assert torch.equal(draw(rows, top_p=0.6).tokens, expected.tokens)


def test_extreme_temperatures_and_logits() -> None:
    row = torch.tensor([1.0, 1.0 + 2**-20, 0.0, 1.0 + 2**-20])
    assert support(row, temperature=1e-38) == [1, 3]
    assert support(row, temperature=1e-12, top_p=0.5) == [1]
    assert support(row, temperature=3e38) == [0, 1, 2, 3]
    far = torch.tensor([-3e38, 3e38, 3e38, -torch.inf])
    assert support(far, temperature=1e30) == [1, 2]
    assert support(torch.tensor([-3e38, -3.4e38]), temperature=1e30) == [0]
    subnormal = torch.tensor([1e-40, 2e-40, 0.0])
    assert support(subnormal) == [0, 1, 2]
    assert draw(subnormal[None], temperature=0).tokens.item() == 1


def test_strided_logits() -> None:
    wide = torch.randn(8, 700)
    for view in (wide[::2, 3:600], wide.t()[:8], wide[:, ::3]):
        for options in ({}, {"top_p": 0.5}):
            assert torch.equal(draw(view, **options).tokens, draw(view.contiguous(), **options).tokens)
    options = {"temperature": torch.tensor([0.5, 9.0] * 8)[::2], "seeds": torch.arange(16)[::2]}
    dense = {name: value.contiguous() for name, value in options.items()}  # type: ignore[attr-defined]
    assert torch.equal(draw(wide, **options).tokens, draw(wide, **dense).tokens)


def test_empty_batch() -> None:
    out = draw(torch.randn(0, 9), top_p=0.5)
    assert out.tokens.shape == out.logprobs.shape == (0,)


# ---- torch -------------------------------------------------------------------------------------------------------


def test_opcheck_and_compile() -> None:
    logits, seeds, offsets = torch.randn(3, 50), torch.arange(3), torch.arange(3)
    by_row = (torch.tensor([0.5, 1.0, 0.0]), torch.tensor([0, 5, 9]), torch.tensor([1.0, 0.5, 0.9]), torch.zeros(3))
    op = torch.ops.tts_kernels.sample.default
    opcheck(op, (logits, seeds, offsets, 0.8, 5, 0.9, 0.0, None, None, None, None, 0))
    opcheck(op, (logits, seeds, offsets, 1.0, 0, 1.0, 0.0, *by_row, 4))

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        a = tk.sample(x, temperature=0.7, top_p=0.9, seeds=seeds, offsets=offsets)
        b = tk.sample(x, temperature=by_row[0], top_k=by_row[1], seeds=seeds, offsets=offsets)
        return a.tokens + b.tokens, a.logprobs

    for got, expected in zip(
        torch.compile(both, fullgraph=True, backend="aot_eager")(logits), both(logits), strict=True
    ):
        assert torch.equal(got, expected)


def test_bad_input_names_the_argument() -> None:
    x = torch.randn(2, 9)
    for backend in ("cpp", "reference"):
        with tk.use_backend(backend):
            assert_names(TypeError, "logits", draw, x.double())
            assert_names(
                ValueError, "logits", tk.sample, x[0], seeds=torch.zeros(2).long(), offsets=torch.zeros(2).long()
            )
            assert_names(ValueError, "logits", draw, x[:, :0])
            assert_names(TypeError, "seeds", draw, x, seeds=torch.zeros(2))
            assert_names(TypeError, "seeds", draw, x, seeds=torch.zeros(2, dtype=torch.int32))
            assert_names(TypeError, "seeds", draw, x, seeds=[1, 2])
            assert_names(ValueError, "seeds", draw, x, seeds=torch.zeros(3).long())
            assert_names(ValueError, "offsets", draw, x, offsets=torch.zeros(2, 1).long())
            assert_names(TypeError, "offsets", draw, x, offsets=5)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *(("temperature", v) for v in (-1.0, math.nan, math.inf, 1e39)),
        *(("top_k", v) for v in (-1,)),
        *(("top_p", v) for v in (0.0, -0.5, 1.5, math.nan, math.inf)),
        *(("min_p", v) for v in (-0.1, 1.1, math.nan)),
    ],
)
def test_bad_options_name_the_argument(name: str, bad: float) -> None:
    x = torch.randn(2, 9)
    for backend in ("cpp", "reference"):
        with tk.use_backend(backend):
            assert_names(ValueError, name, draw, x, **{name: bad})
            assert_names(ValueError, name, draw, x, **{name: torch.tensor([1, bad])})
            assert_names(ValueError, name, draw, x, **{name: torch.ones(3, dtype=torch.tensor(bad).dtype)})
            assert_names(TypeError, name, draw, x, **{name: "1"})
            assert_names(TypeError, name, draw, x, **{name: torch.tensor([1, 1], dtype=torch.bool)})
            assert_names(TypeError, name, draw, x, **{name: None})
    assert_names(TypeError, "top_k", draw, x, top_k=2.0)
    assert_names(TypeError, "top_k", draw, x, top_k=torch.ones(2))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_bad_number_of_likeliest_tokens_is_named(backend: str) -> None:
    with tk.use_backend(backend):
        for vocab, bad in ((9, -1), (9, 10), (500, 129)):
            assert_names(ValueError, "top_logprobs", draw, torch.randn(2, vocab), top_logprobs=bad)
        assert_names(TypeError, "top_logprobs", draw, torch.randn(2, 9), top_logprobs=1.0)

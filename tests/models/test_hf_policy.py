"""HFPolicy: where steps end, what they cost, and that batches, forks and a full pool change nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tiny import save_checkpoint, small_pool, talkative, tiny_model, tiny_tokenizer
from torch import Tensor
from tts_search import HFPolicy, Step, StepParams
from tts_search.models.decoder import Batch, DecoderShape
from tts_search.search.protocol import Expand

import tts_kernels as tk

PROBLEM = "What is the sum?"
TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_checkpoint(tmp_path_factory.mktemp("policy"), talkative(tiny_model()))


@pytest.fixture(scope="module")
def plain():
    return talkative(tiny_model())


@pytest.fixture
def policy(checkpoint: str) -> HFPolicy:
    return HFPolicy(checkpoint, kv_memory="4MiB")


def expand(
    branch: int,
    children: tuple[int, ...],
    steps: tuple[str, ...] = (),
    *,
    problem: int = 0,
    seeds: tuple[int, ...] | None = None,
    **params,
) -> Expand:
    seeds = tuple(1000 * problem + 7 * child for child in children) if seeds is None else seeds
    return Expand(problem, branch, children, steps, seeds, StepParams(**{"max_tokens": 24, **params}))


class Counter:
    """Counts what a policy's decoder is given."""

    def __init__(self, policy: HFPolicy) -> None:
        self.shape, self.decoder = policy.decoder.shape, policy.decoder
        self.sizes: list[int] = []
        self.logit_rows: list[int] = []
        policy._lane.decoder = self

    def logits(self, batch: Batch, kv, rows: Tensor | None = None) -> Tensor:
        out = self.decoder.logits(batch, kv, rows)
        self.sizes.append(batch.tokens.numel())
        self.logit_rows.append(out.shape[0])
        return out


class Scripted:
    """A decoder that continues a prompt of ``begin`` tokens with a script, whatever it reads."""

    def __init__(self, begin: int, script: list[int]) -> None:
        self.shape = DecoderShape(1, 1, 1, 8, 400, 1, 1)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.begin, self.script = begin, script

    def logits(self, batch: Batch, _, rows: Tensor | None = None) -> Tensor:
        positions = batch.positions if rows is None else batch.positions[rows]
        out = torch.zeros(len(positions), len(TOKENIZER))
        for row, position in enumerate(positions.tolist()):
            out[row, self.script[position + 1 - self.begin]] = 50.0
        return out


def scripted(policy: HFPolicy, pieces: list[str | int]) -> list[int]:
    """Let the policy's model say these tokens: byte-level vocabulary entries, or ids."""
    ids = [piece if isinstance(piece, int) else TOKENIZER.convert_tokens_to_ids(piece) for piece in pieces]
    policy.begin(0, PROBLEM)
    policy._lane.decoder = Scripted(len(policy._problems[0].root.tokens), ids)
    policy._lane.pool = small_pool(policy.decoder, 100)
    return ids


NL, NL2, NL3 = "Ċ", "ĊĊ", "ĊĊĊ"
E_ACUTE = ["Ã", "©"]  # the two bytes of é


@pytest.mark.parametrize(
    ("pieces", "text", "num_tokens"),
    [
        (["a", "b", NL, NL, "c"], "ab\n\n", 4),  # split between tokens
        (["a", ".ĊĊ", "c"], "a.\n\n", 2),  # part of a longer token
        (["a", NL3, "c"], "a\n\n\n", 2),  # with more of the same behind it
        (["a", "ĊĊthe", "c"], "a\n\nthe", 2),  # with text behind it: the step keeps it
        (["a", NL, NL2, "c"], "a\n\n\n", 3),  # across tokens, one of which is a delimiter itself
        ([NL2, "a", NL2, "c"], "\n\na\n\n", 3),  # at the start: there is no step yet
        (["Ġ", NL, NL, "Ġ", "a", NL, "b", NL2], " \n\n a\nb\n\n", 8),  # blank lines and single newlines
        ([".ĊĊ", "a"], ".\n\n", 1),
        (["a", *E_ACUTE, NL2], "aé\n\n", 4),
        (["a", 0, 3, NL2, "c"], "a\n\n", 4),  # special tokens have no text
    ],
)
def test_a_step_ends_at_its_delimiter(policy: HFPolicy, pieces: list[str], text: str, num_tokens: int) -> None:
    ids = scripted(policy, [*pieces, "x"])
    assert policy.expand([expand(0, (1,), temperature=0.0)]) == [
        [Step(text, False, num_tokens, pytest.approx(0.0, abs=1e-6), "stop")]
    ]
    assert policy._problems[0].known.longest(1, text)[1].tokens == ids[:num_tokens]


def test_the_next_step_goes_on_where_the_last_one_ended(policy: HFPolicy) -> None:
    scripted(policy, ["a", ".ĊĊ", NL, "b", *E_ACUTE, NL, NL, "c", EOS])
    first = policy.expand([expand(0, (1,))])[0][0].text
    second = policy.expand([expand(1, (2,), (first,))])[0][0].text
    third = policy.expand([expand(2, (3,), (first, second))])[0][0]
    assert (first, second, third.text) == ("a.\n\n", "\nbé\n\n", "c")
    assert (third.finished, third.reason, third.num_tokens) == (True, "eos", 2)


@pytest.mark.parametrize("delimiter", ["###", "e#", "\n", "é", "the"])
def test_other_delimiters(policy: HFPolicy, delimiter: str) -> None:
    text = "one\ntwo #### é then e### done"
    scripted(policy, [*TOKENIZER(text)["input_ids"], EOS])
    step = policy.expand([expand(0, (1,), delimiter=delimiter)])[0][0]
    assert step.text.endswith(delimiter)
    assert step.text == text[: text.index(delimiter) + len(delimiter)]


def test_without_a_delimiter_the_answer_runs_to_its_end(policy: HFPolicy) -> None:
    scripted(policy, ["a", NL2, "b", NL2, EOS])
    assert policy.expand([expand(0, (1,), delimiter=None)])[0][0].text == "a\n\nb\n\n"


@pytest.mark.parametrize(
    ("pieces", "limit", "step"),
    [
        (["a", "b", "c", "d"], 3, ("abc", False, 3, "length")),
        (["a", *E_ACUTE, "b"], 2, ("a", False, 2, "length")),  # not within a character
        (["a", *E_ACUTE, "b"], 3, ("aé", False, 3, "length")),
        (["a", NL2, "b"], 2, ("a\n\n", False, 2, "stop")),
        ([EOS], 5, ("", True, 1, "eos")),
        ([0, 0, 0], 2, ("", True, 2, "length")),  # no text at all
    ],
)
def test_token_limits(policy: HFPolicy, pieces: list, limit: int, step: tuple) -> None:
    scripted(policy, [*pieces, "x"])
    got = policy.expand([expand(0, (1,), max_tokens=limit)])[0][0]
    assert (got.text, got.finished, got.num_tokens, got.reason) == step


def test_a_character_cut_by_the_limit_is_written_in_the_next_step(policy: HFPolicy) -> None:
    scripted(policy, ["a", *E_ACUTE, "b", "c"])
    first = policy.expand([expand(0, (1,), max_tokens=2)])[0][0].text
    assert policy.expand([expand(1, (2,), (first,), max_tokens=2)])[0][0].text == "é"


def test_the_end_of_the_context_ends_a_branch(policy: HFPolicy) -> None:
    scripted(policy, ["a"] * 500)
    room = 400 - len(policy._problems[0].root.tokens)
    step = policy.expand([expand(0, (1,), max_tokens=room - 1)])[0][0]
    assert (step.finished, step.reason) == (False, "length")
    last = policy.expand([expand(1, (2,), (step.text,), max_tokens=100)])[0][0]
    assert (last.text, last.finished, last.reason) == ("a", True, "length")
    step = policy.expand([expand(0, (3,), max_tokens=room)])[0][0]
    assert policy.expand([expand(3, (4,), (step.text,))])[0] == [Step("", True, reason="length")]


def reference(plain, prompt: list[int], request: Expand, seed: int) -> tuple[list[int], float]:
    """One child the plain way: the whole text through eager attention for each token, one row, the same stream."""
    params, own, total = request.params, [], 0.0
    while len(own) < params.max_tokens:
        logits = plain(torch.tensor([prompt + own]), use_cache=False).logits[0, -1:]
        token, logprob = tk.sample(
            logits,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            seeds=torch.tensor([seed]),
            offsets=torch.tensor([len(own)]),
        )
        total += logprob.item()
        own.append(token.item())
        if own[-1] == EOS:
            break
        text = TOKENIZER.decode(own)
        if params.delimiter is not None and params.delimiter in text[len(text) - len(text.lstrip()) + 1 :]:
            break
    return own, total


class Grown(NamedTuple):
    """A step, what was asked for, and the tokens before it."""

    request: Expand
    step: Step
    before: list[int]


def tree(policy: HFPolicy, problems: int = 2, rounds: int = 3) -> dict[tuple[int, int], Grown]:
    """Grow trees of several problems: 4 children of each root, then 2 of every branch that goes on."""
    found: dict[tuple[int, int], Grown] = {}
    paths: dict[tuple[int, int], tuple[str, ...]] = {}
    for problem in range(problems):
        policy.begin(problem, f"{PROBLEM} {problem}")
        paths[problem, 0] = ()
    frontier, number = [(problem, 0) for problem in range(problems)], 0
    for turn in range(rounds):
        requests, before = [], []
        for problem, branch in frontier:
            children = tuple(range(number + 1, number + (5 if not turn else 3)))
            number += len(children)
            params = {"temperature": 0.8 + problem, "top_p": 0.9, "top_k": 40 * problem}
            requests.append(expand(branch, children, paths[problem, branch], problem=problem, **params))
            _, parent = policy._problems[problem].known.longest(branch, "".join(paths[problem, branch]))
            before.append(parent.path())
        frontier = []
        for request, path, steps in zip(requests, before, policy.expand(requests), strict=True):
            for child, step in zip(request.children, steps, strict=True):
                key = (request.problem, child)
                found[key], paths[key] = Grown(request, step, path), (*request.steps, step.text)
                if not step.finished:
                    frontier.append(key)
        for request in requests:
            policy.release(request.problem, [request.branch] if request.branch else [])
    return found


def test_steps_are_those_of_eager_attention_on_the_whole_text(policy: HFPolicy, plain) -> None:
    found = tree(policy)
    assert {grown.step.reason for grown in found.values()} == {"stop", "eos", "length"}
    for (_, child), (request, step, before) in found.items():
        own, logprob = reference(plain, before, request, request.seeds[request.children.index(child)])
        assert step.num_tokens == len(own)
        assert step.logprob == pytest.approx(logprob, abs=1e-3)
        assert step.text == TOKENIZER.decode(own, skip_special_tokens=True) or step.reason == "length"


def test_a_small_pool_gives_the_same_steps(checkpoint: str, policy: HFPolicy) -> None:
    large = tree(policy)
    small = HFPolicy(checkpoint)
    small._lane.pool = small_pool(small.decoder, 40)
    assert [grown.step for grown in tree(small).values()] == [
        replace(grown.step, logprob=pytest.approx(grown.step.logprob, abs=1e-4)) for grown in large.values()
    ]
    costs = [(policy.end(problem), small.end(problem)) for problem in (0, 1)]
    for much, little in costs:
        assert (much.waves, much.recomputed_tokens) == (0, 0)
        assert (much.tokens, much.prefill_tokens) == (little.tokens, little.prefill_tokens)
        assert little.peak_unique_kv_tokens < much.peak_unique_kv_tokens
    assert sum(little.waves for _, little in costs) > 0
    assert sum(little.recomputed_tokens for _, little in costs) > 0
    assert small._pool.pool.forest.stats().pages_free == 40


def test_every_token_is_forwarded_once(policy: HFPolicy) -> None:
    counter = Counter(policy)
    found = tree(policy)
    prompts = [len(policy._problems[problem].root.tokens) for problem in (0, 1)]
    usages = [policy.end(problem) for problem in (0, 1)]
    steps = [grown.step for grown in found.values()]
    expanded = len({(grown.request.problem, grown.request.branch) for grown in found.values()}) - 2
    # Of a step, all tokens but the last one; that one when the branch is expanded, once for all its children.
    assert sum(counter.sizes) == sum(prompts) + sum(step.num_tokens - 1 for step in steps) + expanded
    assert sum(counter.logit_rows) == sum(step.num_tokens - 1 for step in steps) + expanded + 2
    assert [usage.prefill_tokens for usage in usages] == prompts
    assert [usage.tokens for usage in usages] == [
        sum(grown.step.num_tokens for (problem, _), grown in found.items() if problem == number) for number in (0, 1)
    ]
    assert all(usage.flops > 2 * policy.decoder.shape.body_parameters * usage.tokens for usage in usages)


def test_kv_of_branches_is_counted_shared_and_unshared(policy: HFPolicy) -> None:
    scripted(policy, ["a", "b", NL2, "c", NL2])
    prompt = len(policy._problems[0].root.tokens)
    policy.expand([expand(0, (1, 2, 3, 4))])
    policy.expand([expand(1, (5, 6), ("ab\n\n",))])
    usage = policy.end(0)
    # The KV of a step's last token comes when its branch is expanded: 2 tokens for each child, then 1 + 2 * 1.
    assert usage.peak_unique_kv_tokens == prompt + 4 * 2 + 1 + 2 * 1
    assert usage.peak_logical_kv_tokens == prompt + 3 * (prompt + 2) + (prompt + 3) + 2 * (prompt + 4)


def test_a_child_is_the_same_alone_and_in_a_batch(policy: HFPolicy) -> None:
    policy.begin(0, PROBLEM)
    policy.begin(1, PROBLEM * 3)
    together = policy.expand([expand(0, (1, 2, 3), seeds=(11, 12, 13)), expand(0, (1,), problem=1, temperature=1.5)])[0]
    for child, step in zip((4, 5, 6), together, strict=True):
        alone = policy.expand([expand(0, (child,), seeds=(child + 7,))])[0][0]
        assert (alone.text, alone.num_tokens, alone.reason) == (step.text, step.num_tokens, step.reason)


def test_long_prompts_are_read_in_chunks(policy: HFPolicy, plain) -> None:
    counter = Counter(policy)
    policy._pool.max_tokens = 64
    policy.begin(0, PROBLEM * 15)
    policy.begin(1, PROBLEM)
    answers = policy.expand([expand(0, (1,)), expand(0, (1,), problem=1)])
    assert max(counter.sizes) == 64
    for problem, request in enumerate((expand(0, (1,)), expand(0, (1,), problem=1))):
        own, _ = reference(plain, policy._problems[problem].root.tokens, request, request.seeds[0])
        assert answers[problem][0].num_tokens == len(own)


def test_one_problem_that_does_not_fit_fails_alone(checkpoint: str) -> None:
    policy = HFPolicy(checkpoint)
    policy._lane.pool = small_pool(policy.decoder, 40)  # 160 tokens
    policy.begin(0, "x" * 600)
    policy.begin(1, "y" * 200)
    policy.begin(2, PROBLEM)
    too_long, too_large, fine = policy.expand([expand(0, (1, 2), problem=problem) for problem in range(3)])
    assert isinstance(too_long, ValueError)
    assert "context of 512 tokens" in str(too_long)
    assert "KV pool of 160 tokens" in str(too_large)
    assert [step.num_tokens > 0 for step in fine] == [True, True]
    for problem in range(3):
        policy.end(problem)
    assert policy._pool.pool.forest.stats().pages_free == 40


def test_steps_from_elsewhere_are_read_from_their_text(policy: HFPolicy, plain) -> None:
    policy.begin(0, PROBLEM)
    steps = ("The the\n\n", "is.\n\n")
    request = expand(7, (8,), steps)
    (step,) = policy.expand([request])[0]
    prompt = [*policy._problems[0].root.tokens, *TOKENIZER("".join(steps))["input_ids"]]
    own, logprob = reference(plain, prompt, request, request.seeds[0])
    assert step.num_tokens == len(own)
    assert step.logprob == pytest.approx(logprob, abs=1e-3)


def test_a_branch_can_be_expanded_again(policy: HFPolicy) -> None:
    policy.begin(0, PROBLEM)
    first = policy.expand([expand(0, (1, 2))])[0]
    again = policy.expand([expand(0, (3, 4), seeds=(7, 14))])[0]
    assert [step.text for step in again] == [step.text for step in first]


def test_a_step_of_one_token_keeps_what_its_parent_read(policy: HFPolicy) -> None:
    scripted(policy, ["a", NL2, ".ĊĊ", "b", NL2])
    policy.expand([expand(0, (1,))])
    policy.expand([expand(1, (2,), ("a\n\n",))])
    policy.release(0, [0, 1])
    assert policy.expand([expand(2, (3,), ("a\n\n", ".\n\n"))])[0][0].text == "b\n\n"
    assert policy.end(0).recomputed_tokens == 0


def test_a_model_without_finite_logits_fails_its_problem(policy: HFPolicy) -> None:
    scripted(policy, ["a"] * 9)
    logits = policy.decoder.logits
    policy.decoder.logits = lambda *args: logits(*args) * torch.nan
    (error,) = policy.expand([expand(0, (1, 2))])
    assert isinstance(error, FloatingPointError)


def test_prompts(checkpoint: str, tmp_path: Path) -> None:
    policy = HFPolicy(checkpoint, system_prompt="Think.")
    assert policy._prompt("2+2?") == "<|bos|><|system|>Think.\n<|user|>2+2?\n<|assistant|>"
    assert HFPolicy(checkpoint)._prompt("2+2?") == "<|bos|><|user|>2+2?\n<|assistant|>"
    base = HFPolicy(save_checkpoint(tmp_path, tiny_model(), chat=False), system_prompt="Think.")
    assert base._prompt("2+2?") == "Think.\n\n2+2?\n\n"


def test_the_pool_is_sized_from_memory_or_from_the_configuration(checkpoint: str) -> None:
    page = 16 * 2 * 3 * 2 * 16 * 4
    assert HFPolicy(checkpoint, kv_memory=10 * page + 1)._pool.pool_tokens == 160
    assert HFPolicy(checkpoint)._pool.pool_tokens == 64 * 512
    half = HFPolicy(checkpoint, dtype=torch.bfloat16, kv_memory=10 * page)
    assert half._pool.pool_tokens == 320
    assert half.decoder.dtype == torch.bfloat16
    assert half._pool.pool.kv.k[0].dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"kv_memory: expected room for one page of 16 tokens"):
        HFPolicy(checkpoint, kv_memory=100)

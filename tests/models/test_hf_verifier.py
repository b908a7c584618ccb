"""HFVerifier: scores read incrementally along random trees are those of the whole text, and each token is read once."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SPECIAL, random_text, save_checkpoint, small_pool, tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import PreTrainedModel
from tts_search import HFVerifier
from tts_search.models.decoder import Batch
from tts_search.search.protocol import Score, ScoreAndPrune, Scored

import tts_kernels as tk

TOKENIZER = tiny_tokenizer()
PROBLEM = "What is the sum?"
FORMATS: dict[str, dict[str, Any]] = {
    "special token": {
        "head": "label_pair",
        "prompt": "<|user|>{problem}<|assistant|>{steps}",
        "boundary": "<|step|>",
        "labels": ["+", "-"],
    },
    "plain text": {  # the tokenizer merges newlines with each other, a full stop before them and a "the" behind them
        "head": "label_pair",
        "prompt": "{problem}\n{steps}",
        "boundary": "\n",
        "labels": ["+", 50],
        "strip": False,
    },
    "separator": {
        "head": "label_pair",
        "chat": [{"role": "user", "content": "{problem}"}, {"role": "assistant", "content": "{steps}"}],
        "boundary": ".\n",
        "separator": "\n",
        "labels": ["Yes", "No"],
    },
    "closing": {
        "head": "label_pair",
        "chat": [{"role": "user", "content": "{problem}\n{steps}\n\nthe Yes?"}],
        "separator": "\n\n",
        "score_at": "closing",
        "labels": ["Yes", "No"],
    },
    "pieces": {"head": "two_class", "prompt": "{problem}\n{steps}", "boundary": "\n", "encoding": "pieces", "good": 0},
    "two_class": {},
}


def model_of(name: str) -> PreTrainedModel:
    return tiny_model("llama", head="tokens" if "two_class" in (name, FORMATS[name].get("head")) else "lm", seed=3)


def harmless(text: str) -> str:
    """Special tokens broken up, as documented."""
    for token in SPECIAL:
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def texts(name: str, problem: str, steps: tuple[str, ...]) -> list[str]:
    """The pieces of text up to the scored token behind the last of ``steps``, by the definition of each format."""
    entry = FORMATS[name]
    strip = (lambda step: step) if name == "plain text" else str.strip
    parts = [harmless(strip(step)) for step in steps]
    boundary, separator = entry.get("boundary", "\n"), entry.get("separator", "")
    body = [text for i, step in enumerate(parts) for text in (separator if i else "", step, boundary)]
    problem = harmless(problem)
    if name == "two_class":
        return [f"<|bos|>{problem}", *body]
    if name == "pieces":
        return [problem, "\n", *body]
    if name == "special token":
        return ["<|user|>", problem, "<|assistant|>", *body]
    if name == "plain text":
        return [problem, "\n", *body]
    if name == "separator":
        return ["<|bos|><|user|>", problem, "\n<|assistant|>", *body]
    return ["<|bos|><|user|>", problem, "\n", separator.join(parts), "\n\nthe Yes?\n<|assistant|>"]


def encoded(name: str, problem: str, steps: tuple[str, ...]) -> list[int]:
    pieces = texts(name, problem, steps)
    if name not in ("pieces", "two_class"):
        pieces = ["".join(pieces)]
    return [token for piece in pieces for token in TOKENIZER(piece)["input_ids"]]


def exact(name: str, model: PreTrainedModel, problem: str, steps: tuple[str, ...]) -> list[float]:
    """Each step's score from its own whole text, full logits and a softmax in float64."""
    found = []
    for count in range(1, len(steps) + 1):
        ids = torch.tensor([encoded(name, problem, steps[:count])])
        logits = model(ids, use_cache=False).logits[0, -1].double()
        labels = FORMATS[name].get("labels")
        good = FORMATS[name].get("good", 1)
        pair = [good, 1 - good] if labels is None else [
            label if isinstance(label, int) else TOKENIZER.convert_tokens_to_ids(label) for label in labels
        ]  # fmt: skip
        found.append(logits[pair].softmax(0)[0].item())
    return found


class Counter:
    """Counts what a verifier's decoder is given."""

    def __init__(self, verifier: HFVerifier) -> None:
        self.decoder, self.shape = verifier.decoder, verifier.decoder.shape
        self.sizes: list[int] = []
        verifier._lane.decoder = self

    def hidden(self, batch: Batch, kv, rows: Tensor | None = None) -> Tensor:
        self.sizes.append(batch.tokens.numel())
        return self.decoder.hidden(batch, kv, rows)


@pytest.fixture(scope="module", params=FORMATS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, PreTrainedModel]:
    name = request.param
    model = model_of(name)
    path = save_checkpoint(tmp_path_factory.mktemp("verifier"), model, verifier=FORMATS[name] or None)
    return name, path, model


def random_step(rng: random.Random) -> str:
    pieces = ("\n\n", "the", ".\n\n", "<|step|>", "<|end|>", "Yes", "\n\n\n", " the")
    return random_text(rng, rng.randint(1, 7), pieces) + rng.choice(("x\n\n", ".\n\n", "x\n\n\n", "x", "x\n\nthe"))


def random_search(verifier: HFVerifier, rng: random.Random, rounds: int = 6):
    """Score random trees of two problems: (problem, steps, scores) of every request."""
    problems = {number: random_text(rng, 20, ("<|user|>", "the")) + "?" for number in (4, 9)}
    nodes: dict[int, dict[int, tuple[str, ...]]] = {number: {0: ()} for number in problems}
    for number, text in problems.items():
        verifier.begin(number, text)
    counter = itertools.count(1)
    for _ in range(rounds):
        requests = []
        for number in rng.choices(sorted(problems), k=rng.randint(1, 4)):
            parent = rng.choice(sorted(nodes[number]))
            steps = (*nodes[number][parent], *(random_step(rng) for _ in range(rng.choice((1, 1, 1, 3)))))
            ahead = tuple(random_step(rng) for _ in range(rng.choice((0, 0, 1, 2))))
            requests.append(Score(number, next(counter), steps, parent, ahead))
        for request, scores in zip(requests, verifier.score(requests), strict=True):
            yield problems[request.problem], (*request.steps, *request.lookahead), scores
            nodes[request.problem][request.branch] = request.steps
        for number in problems:
            gone = rng.sample(sorted(nodes[number])[1:], k=len(nodes[number]) // 3)
            verifier.release(number, gone)
            for branch in gone:
                del nodes[number][branch]


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_the_whole_text(made: tuple[str, str, PreTrainedModel], seed: int) -> None:
    name, path, model = made
    verifier = HFVerifier(path, kv_memory="4MiB")
    verifier._pool.max_tokens = (2048, 40, 15)[seed]
    for problem, steps, scores in random_search(verifier, random.Random(seed)):
        assert scores == pytest.approx(exact(name, model, problem, steps), abs=1e-5)
    usages = [verifier.end(number) for number in (4, 9)]
    assert sum(usage.tokens for usage in usages) > 0
    assert sum(usage.recomputed_tokens for usage in usages) == 0
    stats = verifier._pool.pool.forest.stats()
    assert stats.branches == 0
    assert stats.pages_free == stats.pages_total


@pytest.mark.parametrize(("name", "cuts"), [("special token", True), ("pieces", True), ("plain text", False)])
def test_boundaries_that_the_tokenizer_keeps_and_one_that_it_does_not(name: str, cuts: bool) -> None:
    """What the test above compares is not trivial for plain text: tokens change when text follows."""
    rng = random.Random(0)
    clean = []
    for _ in range(50):
        steps = (random_step(rng), random_step(rng))
        before, after = encoded(name, PROBLEM, steps[:1]), encoded(name, PROBLEM, steps)
        clean.append(after[: len(before)] == before)
    assert all(clean) if cuts else 5 < clean.count(False) < 45


def test_a_small_pool_gives_the_same_scores(made: tuple[str, str, PreTrainedModel]) -> None:
    _, path, _ = made
    verifier = HFVerifier(path, kv_memory="4MiB")
    large = list(random_search(verifier, random.Random(5)))
    longest = max(text.branch.length for known in verifier._problems.values() for _, text in known._known.values())
    small = HFVerifier(path)
    small._lane.pool = small_pool(small.decoder, longest // 4 + 24)
    for (_, _, scores), (_, _, wanted) in zip(random_search(small, random.Random(5)), large, strict=True):
        assert scores == pytest.approx(wanted, abs=1e-5)
    much, little = ([each.end(number) for number in (4, 9)] for each in (verifier, small))
    assert sum(usage.waves + usage.recomputed_tokens for usage in little) > 0
    assert [usage.tokens for usage in little] == [usage.tokens for usage in much]
    assert small._pool.pool.forest.stats().branches == 0


def test_a_scored_step_costs_its_tokens_and_its_boundary(tmp_path: Path) -> None:
    name = "special token"
    verifier = HFVerifier(save_checkpoint(tmp_path, model_of(name), verifier=FORMATS[name]), kv_memory="4MiB")
    counter = Counter(verifier)
    verifier.begin(0, PROBLEM)
    steps = [f"step {i}" for i in range(6)]
    cost = [len(TOKENIZER(step)["input_ids"]) + 1 for step in steps]
    prompt = len(TOKENIZER(f"<|user|>{PROBLEM}<|assistant|>")["input_ids"])
    verifier.score([Score(0, 1, (steps[0],), 0), Score(0, 2, (steps[1],), 0)])
    assert sum(counter.sizes) == prompt + cost[0] + cost[1]
    verifier.release(0, [2])
    verifier.score([Score(0, 3, (steps[0], steps[2]), 1), Score(0, 4, (steps[0], steps[3], steps[4]), 1)])
    assert sum(counter.sizes[2:]) == cost[2] + cost[3] + cost[4]
    verifier.score([Score(0, 4, (steps[0], steps[3], steps[4]), 1)])
    assert sum(counter.sizes[2:]) == cost[2] + cost[3] + cost[4]  # it knows
    verifier.score([Score(0, 4, (steps[0], steps[3], steps[4]), 1, (steps[5],))])
    assert sum(counter.sizes[2:]) == cost[2] + cost[3] + cost[4] + cost[5]
    usage = verifier.end(0)
    assert (usage.prefill_tokens, usage.tokens) == (prompt, sum(cost))
    forwarded = prompt + sum(cost)
    weights = verifier.decoder.shape.body_parameters
    assert 2 * weights * forwarded < usage.flops < 2.5 * weights * forwarded  # the rest is attention: no logits
    assert usage.peak_unique_kv_tokens == prompt + sum(cost) - cost[1]


def test_many_steps_at_once_are_read_in_one_forward(tmp_path: Path) -> None:
    name = "special token"
    verifier = HFVerifier(save_checkpoint(tmp_path, model_of(name), verifier=FORMATS[name]), kv_memory="4MiB")
    counter = Counter(verifier)
    verifier.begin(0, PROBLEM)
    verifier.score([Score(0, 1, ("a",), 0)])
    verifier.score([Score(0, branch, ("a", "b", f"{branch}", "d", "e"), 1) for branch in (2, 3, 4)])
    assert len(counter.sizes) == 3  # the prompt, whose last page is not full, "a", and the rest


def test_released_branches_can_be_read_again(tmp_path: Path) -> None:
    name = "special token"
    verifier = HFVerifier(save_checkpoint(tmp_path, model_of(name), verifier=FORMATS[name]), kv_memory="4MiB")
    verifier.begin(0, PROBLEM)
    (first,) = verifier.score([Score(0, 1, ("a", "b"), 0)])
    verifier.release(0, [0, 1, 5])
    assert verifier._pool.pool.forest.stats().branches == 0
    (again,) = verifier.score([Score(0, 2, ("a", "b"), 1)])
    assert again == pytest.approx(first, abs=1e-5)


def test_an_own_head(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, model_of("pieces"))
    head = tk.ScoreHead.scalar(torch.linspace(-1, 1, 64), 0.25, "identity")
    verifier = HFVerifier(path, format=FORMATS["special token"], head=head, kv_memory="4MiB")
    verifier.begin(0, PROBLEM)
    (scores,) = verifier.score([Score(0, 1, ("one",), 0)])
    ids = torch.tensor([encoded("special token", PROBLEM, ("one",))])
    hidden = model_of("pieces").model(ids).last_hidden_state[0, -1]
    assert scores == pytest.approx([(hidden @ head.weight + 0.25).item()], abs=1e-4)


def test_bfloat16_scores_are_close(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, tiny_model(initializer_range=0.05), verifier=FORMATS["special token"])
    found = []
    for dtype in ("float32", "bfloat16"):
        verifier = HFVerifier(path, dtype=dtype, kv_memory="4MiB")
        verifier.begin(0, PROBLEM)
        found.append(verifier.score([Score(0, 1, ("one\n\n", "two"), 0)])[0])
    assert found[1] == pytest.approx(found[0], abs=0.02)
    assert found[1] != found[0]


def test_texts_that_do_not_fit_fail_alone(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, model_of("separator"), verifier=FORMATS["separator"])
    verifier = HFVerifier(path)
    verifier._lane.pool = small_pool(verifier.decoder, 40)  # 160 tokens
    verifier.begin(0, PROBLEM)
    verifier.begin(1, PROBLEM)
    too_long, fine, too_large = verifier.score(
        [Score(0, 1, ("x" * 600,), 0), Score(1, 1, ("x",), 0), Score(0, 2, ("x" * 200,), 0)]
    )
    assert "its context of 512 tokens" in str(too_long)
    assert "KV pool of 160 tokens" in str(too_large)
    assert len(fine) == 1
    (again,) = verifier.score([Score(0, 3, ("x",), 0)])
    assert again == fine


@pytest.mark.parametrize("how", ["last", "min", "sum"])
def test_where_no_new_text_fits_earlier_scores_compete(tmp_path: Path, how: str) -> None:
    verifier = HFVerifier(save_checkpoint(tmp_path, model_of("separator"), verifier=FORMATS["separator"]))
    verifier.begin(0, PROBLEM)
    long = Score(0, 1, ("x" * 600,), 0)
    groups = ((3, 0, 1), (2, 4))
    request = ScoreAndPrune(0, (long, 0.25, 0.5, 0.75, 0.5), groups, (2, 1), how)
    (answer,) = verifier.score_and_prune([request])
    assert isinstance(answer, Scored)
    assert isinstance(answer.scores[0], ValueError)
    assert answer.survivors == (None if how == "sum" else [[3, 1], [2]])
    (second,) = verifier.score_and_prune([ScoreAndPrune(0, (long, 0.25), ((0, 1),), (2,), how)])
    assert second.survivors == (None if how == "sum" else [[1, 0]])  # who has no score comes last


@pytest.mark.parametrize("step", ["", " \n\n"])
def test_an_empty_step_fails_alone(made: tuple[str, str, PreTrainedModel], step: str) -> None:
    _, path, _ = made
    verifier = HFVerifier(path, kv_memory="4MiB")
    verifier.begin(0, PROBLEM)
    found = verifier.score([Score(0, 1, ("x", step), 0), Score(0, 2, ("x",), 0), Score(0, 3, ("x",), 0, (step,))])
    assert isinstance(found[0], ValueError)
    assert f"step 2 is empty: {step!r}" in str(found[0])
    assert isinstance(found[2], ValueError)
    (again,) = verifier.score([Score(0, 4, ("x", "y"), 2)])
    assert again[:1] == found[1]
    verifier.end(0)
    assert verifier._pool.pool.forest.stats().branches == 0


def test_a_step_that_the_tokenizer_drops_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {**FORMATS["pieces"], "boundary": ""}  # the step's own last token is scored
    verifier = HFVerifier(save_checkpoint(tmp_path, model_of("pieces"), verifier=entry), kv_memory="4MiB")
    encode = verifier._reader.encode
    monkeypatch.setattr(verifier._reader, "encode", lambda text: [] if text == "\u200b" else encode(text))
    verifier.begin(0, PROBLEM)
    broken, fine = verifier.score([Score(0, 1, ("\u200b",), 0), Score(0, 2, ("x",), 0)])
    assert isinstance(broken, ValueError)
    assert "step 1 is empty to the tokenizer" in str(broken)
    assert len(fine) == 1


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_hidden_state_that_is_not_finite_fails_alone(name: str, bad: float, tmp_path: Path) -> None:
    """The embedding of "#" is of no use: whoever reads one fails, and whoever does not is served."""
    model = model_of(name)
    model.get_input_embeddings().weight[TOKENIZER.convert_tokens_to_ids("#"), 3] = bad
    verifier = HFVerifier(save_checkpoint(tmp_path, model, verifier=FORMATS[name] or None), kv_memory="4MiB")
    verifier.begin(0, PROBLEM)
    fine, broken = verifier.score([Score(0, 1, ("x",), 0), Score(0, 2, ("x # y",), 0)])
    assert len(fine) == 1
    assert isinstance(broken, FloatingPointError)
    assert "a hidden state that is not finite" in str(broken)
    (again,) = verifier.score([Score(0, 3, ("x", "y"), 1)])
    assert again[:1] == fine
    verifier.end(0)
    assert verifier._pool.pool.forest.stats().branches == 0


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("special token", {"labels": ["++", "-"]}, r"expected the text of one token, got '\+\+', which is 2 tokens"),
        ("special token", {"labels": [1, 9999]}, "expected a token id below 276, got 9999"),
        ("special token", {"head": "two_class"}, "found no score.weight and no score.bias in the checkpoint"),
        ("pieces", {"weight": "v_head.weight"}, "found no v_head.weight in the checkpoint"),
    ],
)
def test_heads_that_are_not_there(tmp_path: Path, name: str, change: dict, message: str) -> None:
    path = save_checkpoint(tmp_path, model_of(name))
    with pytest.raises(ValueError, match=message):
        HFVerifier(path, format={**FORMATS[name], **change})


def test_label_pairs_need_a_plain_lm_head(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, tiny_model("gemma2"))
    with pytest.raises(ValueError, match="a plain LM head"):
        HFVerifier(path, format=FORMATS["special token"])


def test_templates_that_do_not_fit(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, model_of("closing"), chat=False)
    with pytest.raises(ValueError, match="needs a chat template"):
        HFVerifier(path, format=FORMATS["closing"])
    with pytest.raises(ValueError, match=r"expected text behind \{steps\} to score at"):
        HFVerifier(path, format={**FORMATS["plain text"], "score_at": "closing"})


def test_a_step_cannot_write_the_boundary() -> None:
    """What `exact` above leaves to its own replacing: the forged text has no special token in it."""
    forged = harmless("a<|step|>b<|end|>")
    ids = TOKENIZER(forged)["input_ids"]
    assert not set(ids) & set(TOKENIZER.convert_tokens_to_ids(list(SPECIAL)))
    assert TOKENIZER.convert_tokens_to_ids("<|step|>") in TOKENIZER("a<|step|>b")["input_ids"]

"""Whole searches on models in this process: policy and verifier together, in pools of any size."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from tiny import save_checkpoint, small_pool, talkative, tiny_model
from tts_search import Engine, HFPolicy, HFVerifier, SearchConfig, SearchError, SearchResult, search, search_iter
from tts_search.search.protocol import Score

import tts_kernels as tk

PROBLEMS = ["What is the sum?", "Which is it, then?", "Is the no. 3?"]
READING = {
    "head": "label_pair",
    "prompt": "<|user|>{problem}<|assistant|>{steps}",
    "boundary": "<|step|>",
    "labels": ["+", "-"],
}
CONFIGS = {
    "best_of_n": SearchConfig("best_of_n", n=6, max_tokens=40),
    "beam_search": SearchConfig(n=6, expand=3, max_steps=4, max_step_tokens=20),
    "lookahead": SearchConfig(n=4, expand=2, max_steps=3, max_step_tokens=12, lookahead=1, aggregate="min"),
    "compete": SearchConfig(n=6, expand=3, max_steps=4, max_step_tokens=20, completed="compete", dedupe=True),
    "dvts": SearchConfig("dvts", n=6, expand=3, max_steps=4, max_step_tokens=20, top_p=0.9),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return (
        save_checkpoint(folder / "policy", talkative(tiny_model())),
        save_checkpoint(folder / "verifier", tiny_model("qwen2", seed=3), verifier=READING),
    )


def assert_same(found: list[SearchResult], wanted: list[SearchResult]) -> None:
    """Equal texts; scores equal up to rounding."""
    for one, other in zip(found, wanted, strict=True):
        for mine, theirs in zip(one.completions, other.completions, strict=True):
            assert (mine.text, mine.finished, mine.num_tokens) == (theirs.text, theirs.finished, theirs.num_tokens)
            assert mine.step_scores == pytest.approx(theirs.step_scores, abs=1e-4)


def tokens_of(result: SearchResult) -> tuple[int, int]:
    """Tokens sampled; and those read, or found in the cache."""
    stats = result.stats
    return stats.policy_tokens, stats.policy_prefill_tokens + stats.verifier_tokens + stats.cached_tokens


@pytest.mark.parametrize("name", CONFIGS)
def test_a_search_is_the_same_in_a_pool_far_too_small(paths: tuple[str, str], name: str) -> None:
    config = CONFIGS[name]
    policy, verifier = HFPolicy(paths[0], kv_memory="4MiB"), HFVerifier(paths[1], kv_memory="4MiB")
    large = search(PROBLEMS, policy, verifier, config, progress=False)
    small_policy, small_verifier = HFPolicy(paths[0]), HFVerifier(paths[1])
    small_policy._lane.pool = small_pool(small_policy.decoder, 36)
    small_verifier._lane.pool = small_pool(small_verifier.decoder, 72)
    small = search(PROBLEMS, small_policy, small_verifier, config, progress=False)
    assert_same(small, large)
    for each in (policy, verifier, small_policy, small_verifier):
        each.prefix_cache = False
        assert each._pool.pool.forest.stats().branches == 0
    assert sum(result.stats.recomputed_tokens + result.stats.waves for result in small) > 0
    assert sum(result.stats.recomputed_tokens + result.stats.waves for result in large) == 0
    assert [tokens_of(result) for result in small] == [tokens_of(result) for result in large]


def test_scores_are_those_of_the_final_texts(paths: tuple[str, str]) -> None:
    """Scores that were read step by step along the search, against the finished texts read in one go."""
    policy, verifier = HFPolicy(paths[0], kv_memory="4MiB"), HFVerifier(paths[1], kv_memory="4MiB")
    for config in CONFIGS.values():
        for result in search(PROBLEMS, policy, verifier, replace(config, lookahead=0), progress=False):
            verifier.begin(7, result.problem)
            steps = [completion.steps for completion in result.completions if completion.steps]
            again = verifier.score([Score(7, number, each, 0) for number, each in enumerate(steps, 1)])
            verifier.end(7)
            assert [pytest.approx(c.step_scores, abs=1e-4) for c in result.completions if c.steps] == again


def test_the_seed_fixes_a_search_whatever_else_is_in_flight(paths: tuple[str, str]) -> None:
    policy, verifier = HFPolicy(paths[0], kv_memory="4MiB"), HFVerifier(paths[1], kv_memory="4MiB")
    config = CONFIGS["beam_search"]
    together = search(PROBLEMS, policy, verifier, config, progress=False)
    alone = [search([problem], policy, verifier, config, progress=False)[0] for problem in PROBLEMS]
    assert_same(alone, together)
    other = search(PROBLEMS, policy, verifier, replace(config, seed=1), progress=False)
    assert [c.text for r in other for c in r.completions] != [c.text for r in together for c in r.completions]


class ScoresAlone:
    """A verifier that cannot prune."""

    def __init__(self, verifier: HFVerifier) -> None:
        self.begin, self.score, self.release, self.end = (
            verifier.begin, verifier.score, verifier.release, verifier.end
        )  # fmt: skip


@pytest.mark.parametrize("how", ["last", "min", "max", "mean"])
@pytest.mark.parametrize("name", ["beam_search", "lookahead", "compete", "dvts", "occupy"])
def test_one_call_scores_and_prunes(
    paths: tuple[str, str], monkeypatch: pytest.MonkeyPatch, name: str, how: str
) -> None:
    """The decisions of a problem's round come from one op, and are those of the search's own ranking."""
    base = CONFIGS["beam_search"] if name == "occupy" else CONFIGS[name]
    config = replace(base, aggregate=how, completed="occupy" if name == "occupy" else base.completed)
    policy, verifier = HFPolicy(paths[0], kv_memory="4MiB"), HFVerifier(paths[1], kv_memory="4MiB")
    expected = search(PROBLEMS, policy, ScoresAlone(verifier), config, progress=False)
    calls: Counter[str] = Counter()

    def count(op: str) -> None:
        call = getattr(tk, op)
        monkeypatch.setattr(tk, op, lambda *args, **options: calls.update([op]) or call(*args, **options))

    count("step_scores")
    count("score_and_prune")
    found = search(PROBLEMS, policy, verifier, config, progress=False, speculate=False)
    rounds = [result.stats.rounds for result in found]
    (count_of,) = calls.values()
    assert calls.keys() == {"step_scores" if how == "mean" else "score_and_prune"}
    assert max(rounds) <= count_of <= sum(rounds)
    assert [result.tree.to_json() for result in found] == [result.tree.to_json() for result in expected]


@pytest.mark.parametrize("name", ["beam_search", "dvts"])
def test_a_hidden_state_that_is_not_finite_fails_its_problem_alone(paths: tuple[str, str], name: str) -> None:
    policy, verifier = HFPolicy(paths[0], kv_memory="4MiB"), HFVerifier(paths[1], kv_memory="4MiB")
    hidden, seen = verifier.decoder.hidden, []

    def poisoned(batch, kv, rows):
        states = hidden(batch, kv, rows).clone()
        if len(states) and not seen:  # the first candidate that is read, whichever problem is the first
            seen.append(states)
            states[0, 0] = float("nan")
        return states

    verifier.decoder.hidden = poisoned
    outcomes = dict(search_iter(PROBLEMS, policy, verifier, CONFIGS[name], progress=False))
    (error,) = [outcome for outcome in outcomes.values() if isinstance(outcome, SearchError)]
    assert "not finite" in str(error)
    assert sum(isinstance(outcome, SearchResult) for outcome in outcomes.values()) == len(PROBLEMS) - 1


def test_the_prefix_is_shared(paths: tuple[str, str]) -> None:
    policy, verifier = HFPolicy(paths[0], kv_memory="4MiB"), HFVerifier(paths[1], kv_memory="4MiB")
    (result,) = search(PROBLEMS[:1], policy, verifier, CONFIGS["beam_search"], progress=False)
    stats = result.stats
    assert stats.peak_unique_kv_tokens < stats.peak_logical_kv_tokens / 2
    sampled = sum(node.num_tokens for node in result.tree.nodes)
    assert stats.policy_tokens == sampled
    assert stats.policy_prefill_tokens == len(policy.prompt_tokens(PROBLEMS[0]))


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_events_count_as_they_happen(paths: tuple[str, str], name: str, speculate: bool) -> None:
    """After each round the tokens of the tree so far; the KV that is held; in the end what the result says."""
    policy, verifier = HFPolicy(paths[0], kv_memory="4MiB"), HFVerifier(paths[1], kv_memory="4MiB")
    with Engine(policy, verifier, speculate=speculate) as engine:
        running = engine.submit(PROBLEMS[0], CONFIGS[name])
        told = list(running.events())
        stats = running.result().stats
        late = list(running.events())
    counts = [event.usage for event in told]
    for before, after in itertools.pairwise(counts):
        for each in ("policy_tokens", "verifier_tokens", "peak_unique_kv_tokens", "peak_logical_kv_tokens"):
            assert getattr(before, each) <= getattr(after, each)
    sampled = 0
    for event in told:
        if event.kind == "expanded":
            sampled += sum(node.num_tokens for node in event.nodes)
        if speculate or CONFIGS[name].lookahead:  # what is ready of steps that are not in the tree yet counts
            assert event.usage.policy_tokens >= sampled
        else:
            assert event.usage.policy_tokens == sampled
        assert event.usage.unique_kv_tokens <= event.usage.peak_unique_kv_tokens
        assert event.usage.logical_kv_tokens <= event.usage.peak_logical_kv_tokens
    assert any(0 < one.unique_kv_tokens < one.logical_kv_tokens for one in counts)
    for last in (told[-1].usage, late[-1].usage):
        assert (last.policy_tokens, last.verifier_tokens) == (stats.policy_tokens, stats.verifier_tokens)
        assert last.peak_unique_kv_tokens == stats.peak_unique_kv_tokens
        assert last.peak_logical_kv_tokens == stats.peak_logical_kv_tokens
        assert last.unique_kv_tokens == last.logical_kv_tokens == 0


def test_events_count_without_cost_for_a_token(paths: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = HFPolicy(paths[0], kv_memory="4MiB")
    calls: Counter[int] = Counter()
    usage = policy.usage
    monkeypatch.setattr(policy, "usage", lambda problem: calls.update([problem]) or usage(problem))
    with Engine(policy, HFVerifier(paths[1], kv_memory="4MiB")) as engine:
        result = engine.submit(PROBLEMS[0], CONFIGS["beam_search"]).result()
        assert calls.total() <= 1  # nobody listens: only the end asks
        running = engine.submit(PROBLEMS[0], CONFIGS["beam_search"])
        list(running.events())
    assert calls.total() <= 4 * result.stats.rounds < result.stats.policy_tokens

"""Policies and verifiers made of a function, sync or async."""

from __future__ import annotations

import asyncio
import functools
import threading

import pytest
from tts_search import SearchConfig, SearchError, Step, StepRequest, TextPolicy, TextVerifier, search, search_iter

CONFIG = SearchConfig(n=4, expand=2, max_steps=3)


class Server:
    """Answers with text made of the request, and remembers what it was asked."""

    def __init__(self) -> None:
        self.requests: list[list[StepRequest]] = []
        self.branches: list[list[tuple[str, tuple[str, ...]]]] = []
        self.threads: set[str] = set()

    def generate(self, requests: list[StepRequest]) -> list[list[Step]]:
        self.requests.append(requests)
        self.threads.add(threading.current_thread().name)
        return [[Step(f"{r.problem}{seed}\n\n", False, 5) for seed in r.seeds] for r in requests]

    def score(self, branches: list[tuple[str, tuple[str, ...]]]) -> list[list[float]]:
        self.branches.append(branches)
        return [[len(step) / 100 for step in steps] for _, steps in branches]

    async def agenerate(self, requests: list[StepRequest]) -> list[list[Step]]:
        await asyncio.sleep(0)
        return self.generate(requests)

    async def ascore(self, branches: list[tuple[str, tuple[str, ...]]]) -> list[list[float]]:
        await asyncio.sleep(0)
        return self.score(branches)


def test_requests():
    server = Server()
    results = search(["a", "b"], TextPolicy(server.generate), TextVerifier(server.score), CONFIG, progress=False)
    assert len(server.requests) == len(server.branches) == 3
    first = server.requests[0]
    assert [(r.problem, r.steps, r.num_samples, r.branch, len(r.seeds)) for r in first] == [
        ("a", (), 4, 0, 4),
        ("b", (), 4, 0, 4),
    ]
    assert first[0].params.delimiter == "\n\n"
    assert [r.num_samples for r in server.requests[1]] == [2, 2, 2, 2]
    assert [len(steps) for _, steps in server.branches[1]] == [2] * 8
    assert [branch[0] for branch in server.branches[0]] == ["a"] * 4 + ["b"] * 4
    assert results[0].stats.policy_tokens == 12 * 5
    assert results[0].best.num_tokens == 15


def test_async_functions_give_the_same():
    sync, other = Server(), Server()
    expected = search(["a"], TextPolicy(sync.generate), TextVerifier(sync.score), CONFIG, progress=False)
    (result,) = search(["a"], TextPolicy(other.agenerate), TextVerifier(other.ascore), CONFIG, progress=False)
    assert result.completions == expected[0].completions
    assert other.threads == {"tts_search"}
    assert sync.threads == {"MainThread"}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda server: functools.partial(server.agenerate),
        lambda server: lambda requests: server.agenerate(requests),
        lambda server: type("Callable", (), {"__call__": lambda _, requests: server.agenerate(requests)})(),
    ],
    ids=["partial", "lambda", "object"],
)
def test_any_awaitable(wrap):
    server = Server()
    (result,) = search(["a"], TextPolicy(wrap(server)), TextVerifier(server.score), CONFIG, progress=False)
    assert len(result.completions) == 4


def test_inside_a_running_loop():
    server = Server()

    async def main():
        return search(["a"], TextPolicy(server.agenerate), TextVerifier(server.ascore), CONFIG, progress=False)

    assert len(asyncio.run(main())[0].completions) == 4


def test_one_loop_for_all_calls():
    loops = set()

    async def generate(requests):
        loops.add(asyncio.get_running_loop())
        return Server().generate(requests)

    for _ in range(2):
        search(["a"], TextPolicy(generate), TextVerifier(Server().score), CONFIG, progress=False)
    assert len(loops) == 1  # a client that is bound to its loop works in every round


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_function_that_fails_for_one_problem(kind):
    calls = []

    def generate(requests):
        calls.append([request.problem for request in requests])
        if any(request.problem == "bad" for request in requests):
            raise RuntimeError("cannot do this one")
        return Server().generate(requests)

    async def agenerate(requests):
        return generate(requests)

    policy = TextPolicy(generate if kind == "sync" else agenerate)
    outcomes = dict(search_iter(["a", "bad", "b"], policy, TextVerifier(Server().score), CONFIG, progress=False))
    assert str(outcomes[1]) == "problem 1, round 1: RuntimeError: cannot do this one"
    assert not isinstance(outcomes[0], SearchError)
    assert not isinstance(outcomes[2], SearchError)
    assert calls[:4] == [["a", "bad", "b"], ["a"], ["bad"], ["b"]]
    assert calls[4] == ["a", "a", "b", "b"]


def test_wrong_number_of_lists():
    with pytest.raises(SearchError, match=r"round 1: ValueError: fn: expected 1 lists, one per request, got 2"):
        search(["a"], TextPolicy(lambda _: [[], []]), TextVerifier(Server().score), CONFIG, progress=False)
    with pytest.raises(SearchError, match=r"round 1: ValueError: fn: expected 4 lists, one per request, got 0"):
        search(["a"], TextPolicy(Server().generate), TextVerifier(lambda _: []), CONFIG, progress=False)


def test_too_few_scores():
    verifier = TextVerifier(lambda branches: [[] for _ in branches])
    with pytest.raises(SearchError, match=r"problem 0, round 1: verifier: expected 1 scores for branch 1"):
        search(["a"], TextPolicy(Server().generate), verifier, CONFIG, progress=False)


def test_lookahead_is_read_by_the_verifier_alone():
    server = Server()
    config = SearchConfig(n=2, expand=2, max_steps=2, lookahead=2)
    search(["a"], TextPolicy(server.generate), TextVerifier(server.score), config, progress=False)
    assert [len(steps) for _, steps in server.branches[0]] == [3, 3]
    assert [len(steps) for _, steps in server.branches[1]] == [2, 2]


def test_fn_must_be_a_function():
    with pytest.raises(TypeError, match=r"^fn: expected a function"):
        TextPolicy("model")
    with pytest.raises(TypeError, match=r"^fn: expected a function"):
        TextVerifier(None)


def test_two_searches_at_a_time_need_two_policies():
    server = Server()
    policy = TextPolicy(server.generate)
    outcomes = search_iter(["a", "b"], policy, TextVerifier(server.score), CONFIG, progress=False, max_in_flight=1)
    next(outcomes)  # "b" is not begun yet
    search(["c"], policy, TextVerifier(server.score), CONFIG, progress=False)
    policy.begin(1, "d")
    with pytest.raises(ValueError, match=r"one search at a time"):
        policy.begin(1, "e")

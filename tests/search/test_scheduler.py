"""The scheduler: a search has the same result for any order of answers and any other searches."""

from __future__ import annotations

import operator
import random
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import RandomTree, ScriptedPolicy, ScriptedVerifier, by_name, score_names
from test_engine import CONFIGS, PROBLEMS, TREES, Pruner
from tts_search import SearchConfig, SearchError, Step, TextPolicy, TextVerifier, search, search_iter
from tts_search.engine.scheduler import Scheduler
from tts_search.engine.sharing import SharedVerifier
from tts_search.search.answers import boxed
from tts_search.search.protocol import Load, Score


class Shuffled:
    """A driver that answers some of what waits, in any order; it fails where something is answered after `cancel`."""

    def __init__(self, driver: Any, call: str, rng: random.Random) -> None:
        self.begin, self.release, self.end = driver.begin, driver.release, driver.end
        self._call, self._rng = getattr(driver, call), rng
        self.waiting: list[Any] = []

    def submit(self, requests: Sequence[Any]) -> None:
        self.waiting += requests

    def step(self) -> list[tuple[Any, Any]]:
        self._rng.shuffle(self.waiting)
        count = self._rng.randint(0, len(self.waiting))
        now, self.waiting = self.waiting[:count], self.waiting[count:]
        return [(request, self._call([request])[0]) for request in now]

    def cancel(self, problem: int) -> None:
        self.waiting = [request for request in self.waiting if request.problem != problem]


class ShuffledPruner(Shuffled):
    """Some of the requests are rounds."""

    def __init__(self, driver: Pruner, rng: random.Random) -> None:
        super().__init__(driver, "score", rng)
        self._score, self.score_and_prune, self.score = driver.score, driver.score_and_prune, driver.score
        self._call = self._answer

    def _answer(self, requests: list[Any]) -> Any:
        (request,) = requests
        return self.score(requests) if isinstance(request, Score) else self.score_and_prune(requests)


def content(outcome: Any) -> Any:
    """All of a result but what it cost; what and where of an error."""
    if isinstance(outcome, SearchError):
        return outcome.message, outcome.round
    return outcome.tree.to_json(), outcome.completions, outcome.best


def alone(tree: RandomTree, config: SearchConfig) -> list[Any]:
    """The outcome of each problem, searched by itself by drivers of batches."""
    drivers = ScriptedPolicy(tree.step), ScriptedVerifier(tree.scores)
    return [content(outcome) for p in PROBLEMS for _, outcome in search_iter([p], *drivers, config, progress=False)]


def shuffled(tree: RandomTree, rng: random.Random, prunes: bool) -> tuple[ScriptedPolicy, ScriptedVerifier, Scheduler]:
    """Drivers, and a scheduler over them that gets its answers in any order."""
    policy, verifier = ScriptedPolicy(tree.step), (Pruner if prunes else ScriptedVerifier)(tree.scores)
    reading = ShuffledPruner(verifier, rng) if prunes else Shuffled(verifier, "score", rng)
    return policy, verifier, Scheduler(Shuffled(policy, "expand", rng), reading, boxed, operator.eq)


def run(scheduler: Scheduler, config: SearchConfig, in_flight: int, cancel: dict[int, int]) -> dict[int, Any]:
    """Search all problems, some of which are cancelled after a number of steps."""
    outcomes: dict[int, Any] = {}
    waiting = list(enumerate(PROBLEMS))
    for turn in range(10**6):
        while waiting and scheduler.num_problems < in_flight:
            outcomes |= dict(scheduler.start(*waiting.pop(0), config))
        for number in [number for number, when in cancel.items() if when == turn]:
            scheduler.cancel(number)
        if not scheduler.num_problems and not waiting:
            break
        outcomes |= dict(scheduler.step())
    assert scheduler.num_streams == scheduler.num_candidates == 0
    return outcomes


@settings(max_examples=150, deadline=None)
@given(TREES, CONFIGS, st.integers(1, 7), st.booleans(), st.integers(0, 10**6))
def test_the_order_of_answers_changes_nothing(tree, config, in_flight, prunes, seed):
    policy, verifier, scheduler = shuffled(tree, random.Random(seed), prunes)
    outcomes = run(scheduler, config, in_flight, {})
    assert [content(outcomes[number]) for number in range(len(PROBLEMS))] == alone(tree, config)
    assert not policy.problems
    assert not verifier.problems


@settings(max_examples=150, deadline=None)
@given(
    TREES,
    CONFIGS,
    st.integers(1, 7),
    st.booleans(),
    st.integers(0, 10**6),
    st.dictionaries(st.integers(0, 6), st.integers(0, 12)),
)
def test_cancelling_some_frees_them_and_leaves_the_others_as_they_are(tree, config, in_flight, prunes, seed, cancel):
    policy, verifier, scheduler = shuffled(tree, random.Random(seed), prunes)
    outcomes = run(scheduler, config, in_flight, cancel)
    expected = alone(tree, config)
    for number, outcome in outcomes.items():
        assert content(outcome) == expected[number]
    assert outcomes.keys() >= set(range(len(PROBLEMS))) - cancel.keys()
    assert not policy.problems
    assert not verifier.problems
    assert not scheduler.policy.waiting  # type: ignore[attr-defined]


def test_a_problem_does_not_wait_for_another():
    """One whose policy is never answered holds nobody up."""

    class Stuck(Shuffled):
        def step(self):
            stuck = [request for request in self.waiting if request.problem == 0]
            self.waiting = [request for request in self.waiting if request.problem]
            answered = super().step()
            self.waiting += stuck
            return answered

    policy = ScriptedPolicy(by_name())
    verifier = ScriptedVerifier(score_names({}))
    scheduler = Scheduler(Stuck(policy, "expand", random.Random(0)), verifier, boxed, operator.eq)
    config = SearchConfig(n=4, expand=2, max_steps=5)
    for number in range(3):
        assert not list(scheduler.start(number, f"problem {number}", config))
    done: list[int] = []
    for _ in range(200):
        done += [number for number, _ in scheduler.step()]
    assert sorted(done) == [1, 2]
    scheduler.close()
    assert not policy.problems


@pytest.mark.parametrize("prunes", [False, True])
def test_problems_do_not_pile_up_before_a_verifier_that_is_slow(prunes):
    class Stuck(ShuffledPruner if prunes else Shuffled):  # type: ignore[misc]
        def step(self):
            return []

    verifier = (Pruner if prunes else ScriptedVerifier)(score_names({}))
    args: Any = (verifier, random.Random(0)) if prunes else (verifier, "score", random.Random(0))
    scheduler = Scheduler(ScriptedPolicy(by_name()), Stuck(*args), boxed, operator.eq, max_rows=10)
    config = SearchConfig(n=4, expand=2, max_steps=5)
    begun = 0
    for _ in range(30):
        while scheduler.has_room:
            list(scheduler.start(begun, f"problem {begun}", config))
            begun += 1
        list(scheduler.step())
    assert begun == 3
    assert (scheduler.num_streams, scheduler.num_candidates) == (0, 12)
    scheduler.close()
    assert (scheduler.num_streams, scheduler.num_candidates) == (0, 0)


def test_samples_that_have_ended_leave_room_for_another_problem():
    class Loaded(Shuffled):
        load = Load(0, rows=2, max_rows=4, kv_tokens=0, max_kv_tokens=1, waiting=1)

        def step(self):
            return []

    policy = Loaded(ScriptedPolicy(by_name()), "expand", random.Random(0))
    scheduler = Scheduler(policy, ScriptedVerifier(score_names({})), boxed, operator.eq, max_rows=4)
    list(scheduler.start(0, "p", SearchConfig(n=4)))
    assert scheduler.num_streams == 4  # a request's samples are answered together
    assert scheduler.has_room  # but only three of them go on
    Loaded.load = Load(0, rows=4, max_rows=4, kv_tokens=0, max_kv_tokens=1)
    assert not scheduler.has_room
    scheduler.close()


def test_a_driver_that_raises_fails_who_waits_for_it_alone():
    class Breaking(Shuffled):
        def step(self):
            if self.waiting:
                raise ConnectionError("gone")
            return []

    policy, verifier = ScriptedPolicy(by_name()), ScriptedVerifier(score_names({}))
    breaking = Breaking(verifier, "score", random.Random(0))
    scheduler = Scheduler(policy, breaking, boxed, operator.eq)
    list(scheduler.start(0, "p", SearchConfig(n=4, expand=2)))
    ((number, error),) = scheduler.step()
    assert number == 0
    assert str(error) == "problem 0, round 1: ConnectionError: gone"
    assert not policy.problems
    assert not verifier.problems
    assert not breaking.waiting


class TestCandidatesWithoutScores:
    """An exception in the place of one candidate's answer."""

    @staticmethod
    def verifier(fails: set[str], prunes: bool = False) -> ScriptedVerifier:
        class Failing(Pruner if prunes else ScriptedVerifier):
            def score(self, requests):
                answers = super().score(requests)
                names = [request.steps[-1].strip().removeprefix("end ") for request in requests]
                pairs = zip(names, answers, strict=True)
                return [OverflowError("too long") if name in fails else scores for name, scores in pairs]

        return Failing(score_names({"0": 0.9, "2": 0.8}, default=0.5))

    @pytest.mark.parametrize("method", ["beam_search", "dvts", "best_of_n"])
    def test_it_ranks_last_with_the_reason_in_the_tree(self, method):
        config = (
            SearchConfig(method, n=4, expand=2, max_steps=2) if method != "best_of_n" else SearchConfig(method, n=4)
        )
        (result,) = search(["p"], ScriptedPolicy(by_name()), self.verifier({"0"}), config, progress=False)
        failed = next(node for node in result.tree.nodes if node.text.strip().removeprefix("end ") == "0")
        assert failed.why == "not scored: OverflowError: too long"
        assert failed.score == float("-inf")
        assert failed.id not in {node.parent for node in result.tree.nodes}
        assert result.best.score > float("-inf")

    def test_a_problem_fails_when_no_candidate_is_left(self):
        config = SearchConfig(n=4, expand=2, max_steps=3)
        policy, verifier = ScriptedPolicy(by_name()), self.verifier({"0", "1", "2", "3"})
        with pytest.raises(SearchError, match=r"problem 0, round 1: OverflowError: too long"):
            search(["p"], policy, verifier, config, progress=False)
        assert not policy.problems

    def test_it_takes_nothing_from_the_votes_of_others(self):
        texts = ["\\boxed{4}", "so \\boxed{4}", "\\boxed{5}", "\\boxed{4} x"]
        policy = TextPolicy(lambda requests: [[Step(text, True, 1) for text in texts] for _ in requests])
        verifier = ScriptedVerifier(lambda _, steps: [0.5] * len(steps))
        score = verifier.score
        verifier.score = lambda requests: [
            ValueError("too long") if request.steps[-1].endswith("x") else score([request])[0] for request in requests
        ]
        (result,) = search(["2+2"], policy, verifier, SearchConfig("best_of_n", n=4), progress=False)
        assert [result.answer(vote) for vote in ("majority", "prm_vote", "prm_max")] == ["4"] * 3


def test_a_text_that_is_on_its_way_is_not_asked_for_again():
    inner = Shuffled(ScriptedVerifier(score_names({})), "score", random.Random(3))
    shared = SharedVerifier(inner)
    shared.begin(0, "p")
    first, second = Score(0, 1, ("a",), 0), Score(0, 2, ("a",), 0)
    shared.submit([first])
    shared.submit([second])
    assert inner.waiting == [first]
    answered: list[Any] = []
    while len(answered) < 2:
        answered += shared.step()
    assert answered == [(first, [0.0]), (second, [0.0])]


def test_a_function_is_called_with_all_that_waits_in_the_callers_thread():
    calls: list[tuple[int, list[tuple[str, int]]]] = []

    def sample(requests):
        calls.append((threading.get_ident(), [(request.problem, request.branch) for request in requests]))
        return [[Step(f"{request.seeds[i]}\n\n", False, 1) for i in range(request.num_samples)] for request in requests]

    config = SearchConfig(n=4, expand=2, max_steps=3)
    verifier = TextVerifier(lambda branches: [[0.5] * len(steps) for _, steps in branches])
    search(PROBLEMS[:3], TextPolicy(sample), verifier, config, progress=False)
    assert {thread for thread, _ in calls} == {threading.get_ident()}
    assert len(calls) == 3
    for _, asked in calls:
        assert [problem for problem, _ in asked] == sorted(problem for problem, _ in asked)
        assert asked == sorted(asked)

"""Drivers on an event loop: whatever is answered when, a search comes to the same, and nothing is left behind."""

from __future__ import annotations

import asyncio
import operator
import random
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import ScriptedPolicy, ScriptedVerifier, by_name, score_names
from test_engine import CONFIGS, PROBLEMS, TREES
from test_scheduler import alone, content
from tts_search import Engine, SearchConfig, SearchError, TextVerifier, asearch_iter, search, search_iter
from tts_search.api import search_with
from tts_search.engine.drivers import Lifted, Opened, lift
from tts_search.engine.scheduler import Scheduler
from tts_search.search.answers import boxed
from tts_search.search.protocol import Expand, Generate, GenerateParams, Score
from tts_search.search.types import StepParams

CONFIG = SearchConfig(n=4, expand=2, max_steps=3)


class Away:
    """A driver on an event loop, which answers after any number of the loop's turns."""

    is_concurrent = True

    def __init__(self, driver: Any, call: str, rng: random.Random) -> None:
        self.begin, self.release, self.end = driver.begin, driver.release, driver.end
        self._call, self._rng = getattr(driver, call), rng
        self.calls: list[list[Any]] = []
        self.num_hung_up = 0

    async def answer(self, requests: Sequence[Any]) -> list[Any]:
        self.calls.append(list(requests))
        for _ in range(self._rng.randint(0, 6)):
            await asyncio.sleep(0)
        return self._call(requests)

    async def hang_up(self) -> None:
        self.num_hung_up += 1


class AwayPolicy(Away):
    def __init__(self, driver: Any, rng: random.Random | None = None) -> None:
        super().__init__(driver, "expand", rng or random.Random(0))
        self.expand = driver.expand


class AwayVerifier(Away):
    def __init__(self, driver: Any, rng: random.Random | None = None) -> None:
        super().__init__(driver, "score", rng or random.Random(0))
        self.score = driver.score


class Held(AwayPolicy):
    """Answers nothing about some problems, until it is told to."""

    def __init__(self, held: set[int], driver: Any | None = None) -> None:
        super().__init__(driver or ScriptedPolicy(by_name()))
        self.held = held
        self.release_all = threading.Event()

    async def answer(self, requests: Sequence[Any]) -> list[Any]:
        while requests[0].problem in self.held and not self.release_all.is_set():
            await asyncio.sleep(0.001)
        return await super().answer(requests)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@settings(max_examples=60, deadline=None)
@given(TREES, CONFIGS, st.sampled_from(["policy", "verifier", "both"]), st.integers(0, 10**6))
def test_the_order_of_answers_changes_nothing(tree, config, away, seed):
    rng = random.Random(seed)
    policy, verifier = ScriptedPolicy(tree.step), ScriptedVerifier(tree.scores)
    drivers = (
        policy if away == "verifier" else AwayPolicy(policy, rng),
        verifier if away == "policy" else AwayVerifier(verifier, rng),
    )
    outcomes = dict(search_iter(PROBLEMS, *drivers, config, progress=False))
    assert [content(outcomes[number]) for number in range(len(PROBLEMS))] == alone(tree, config)
    assert not policy.problems
    assert not verifier.problems
    assert all(driver.num_hung_up == 1 for driver in drivers if isinstance(driver, Away) and driver.calls)


@settings(max_examples=40, deadline=None)
@given(TREES, CONFIGS, st.integers(0, 10**6), st.sets(st.integers(0, 6)))
def test_cancelling_some_leaves_the_others_as_they_are(tree, config, seed, cancelled):
    rng = random.Random(seed)
    policy, verifier = ScriptedPolicy(tree.step), ScriptedVerifier(tree.scores)
    expected = alone(tree, config)
    with Engine(AwayPolicy(policy, rng), AwayVerifier(verifier, rng), equal=operator.eq) as engine:
        searches = [engine.submit(problem, config) for problem in PROBLEMS]
        for number in cancelled:
            searches[number].cancel()
        for number in set(range(len(PROBLEMS))) - cancelled:
            try:
                outcome: Any = searches[number].result()
            except SearchError as error:
                outcome = error
            assert content(outcome) == expected[number]
    assert not policy.problems
    assert not verifier.problems


def test_a_problem_does_not_wait_for_another():
    policy = Held({0})
    with Engine(policy, ScriptedVerifier(score_names({}))) as engine:
        slow, quick = engine.submit("a", CONFIG), engine.submit("b", CONFIG)
        assert quick.result().completions
        assert not slow.done()
        policy.release_all.set()
        assert slow.result().completions


def test_what_is_cancelled_is_broken_off_at_once():
    class Waiting(AwayPolicy):
        async def answer(self, requests: Sequence[Any]) -> list[Any]:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()
            return list(requests)

    begun, ended = threading.Event(), threading.Event()
    policy = ScriptedPolicy(by_name())
    with Engine(Waiting(policy), ScriptedVerifier(score_names({}))) as engine:
        held = engine.submit("a", CONFIG)
        assert begun.wait(30)
        held.cancel()
        assert ended.wait(30)
    assert not policy.problems


def test_answers_come_in_the_order_in_which_they_are_given():
    class Gated(AwayPolicy):
        async def answer(self, requests: Sequence[Any]) -> list[Any]:
            gates[requests[0].branch] = gate = asyncio.Event()
            await gate.wait()
            return [requests[0].branch]

    gates: dict[int, asyncio.Event] = {}
    driver = lift(Gated(ScriptedPolicy(by_name())))
    assert isinstance(driver, Opened)
    requests = [Expand(0, branch, (branch + 9,), (), (1,), StepParams()) for branch in range(4)]
    driver.submit(requests)
    loop = driver._loop.get()
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result()
    for branch in (2, 0, 3, 1):
        loop.call_soon_threadsafe(gates[branch].set)
        assert driver.step() == [(requests[branch], branch)]
    driver.close()


def test_a_policy_is_asked_apart_and_a_verifier_for_all_candidates_of_a_problem():
    policy, verifier = AwayPolicy(ScriptedPolicy(by_name())), AwayVerifier(ScriptedVerifier(score_names({})))
    search(["a", "b"], policy, verifier, CONFIG, progress=False)
    assert {len(call) for call in policy.calls} == {1}
    assert [len(call) for call in verifier.calls] == [4] * 6
    assert all(len({request.problem for request in call}) == 1 for call in verifier.calls)


def test_a_local_verifier_works_while_requests_of_the_policy_are_open():
    def score(branches: Sequence[tuple[str, tuple[str, ...]]]) -> list[list[float]]:
        if any(problem == "b" for problem, _ in branches):
            policy.release_all.set()
        return [[0.5] * len(steps) for _, steps in branches]

    policy = Held({0})  # until problem 1 is scored
    assert len(search(["a", "b"], policy, TextVerifier(score), CONFIG, progress=False)) == 2


def test_no_thread_turns_in_circles_while_a_server_is_at_work(monkeypatch):
    steps = []
    step = Opened.step
    monkeypatch.setattr(Opened, "step", lambda self: steps.append(self) or step(self))
    policy = Held({0})
    with Engine(policy, ScriptedVerifier(score_names({}))) as engine:
        slow, quick = engine.submit("a", CONFIG), engine.submit("b", CONFIG)
        quick.result()
        while not engine._scheduler.is_idle:
            time.sleep(0.001)
        time.sleep(0.02)
        before = len(steps)
        time.sleep(0.05)
        assert len(steps) == before
        slow.cancel()


@pytest.mark.parametrize("answer", ["raises", "too few"])
def test_errors_belong_to_a_request(answer):
    class Failing(AwayPolicy):
        async def answer(self, requests: Sequence[Any]) -> list[Any]:
            if requests[0].problem != 1:
                return await super().answer(requests)
            if answer == "raises":
                raise ConnectionError("gone")
            return []

    policy = ScriptedPolicy(by_name())
    outcomes = dict(
        search_iter(["a", "b", "c"], Failing(policy), ScriptedVerifier(score_names({})), CONFIG, progress=False)
    )
    message = "ConnectionError: gone" if answer == "raises" else "ValueError: expected 1 answers"
    assert str(outcomes[1]).startswith(f"problem 1, round 1: {message}")
    assert not isinstance(outcomes[0], SearchError)
    assert not isinstance(outcomes[2], SearchError)
    assert not policy.problems


def test_requests_that_it_cannot_answer():
    driver = lift(AwayPolicy(ScriptedPolicy(by_name())))
    for request in (Score(0, 1, ("a",), 0), Generate((1,), GenerateParams(), 1, (1,))):
        with pytest.raises(TypeError, match="expected a policy of a local model for a"):
            driver.submit([request])
    driver.cancel(0)
    off = AwayPolicy(ScriptedPolicy(by_name()))
    off.is_concurrent = False
    assert isinstance(lift(off), Lifted)


@pytest.mark.parametrize("how", ["interrupt", "closed iterator", "closed engine"])
def test_everything_ends_with_the_search(how):
    def score(branches: Any) -> Any:
        if how == "interrupt":
            raise KeyboardInterrupt
        return [[0.5] * len(steps) for _, steps in branches]

    inner = ScriptedPolicy(by_name())
    policy, verifier = Held({0}, inner), TextVerifier(score)
    if how == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            search(["a", "b"], policy, verifier, CONFIG, progress=False)
    elif how == "closed iterator":
        outcomes = search_iter(["a", "b"], policy, verifier, CONFIG, progress=False)
        assert next(outcomes)[0] == 1
        outcomes.close()  # type: ignore[attr-defined]
    else:
        engine = Engine(policy, verifier)
        held, other = engine.submit("a", CONFIG), engine.submit("b", CONFIG)
        other.result()
        engine.close()
        with pytest.raises(SearchError, match="it was closed"):
            held.result()
    assert not inner.problems
    assert policy.num_hung_up == 1


def test_an_async_search_that_is_closed_does_not_wait_for_the_server():
    policy = Held({0})

    async def main() -> None:
        outcomes = asearch_iter(["a", "b"], policy, ScriptedVerifier(score_names({})), CONFIG, progress=False)
        assert (await anext(outcomes))[0] == 1
        await outcomes.aclose()  # type: ignore[attr-defined]

    asyncio.run(main())


def test_a_scheduler_can_be_used_again_after_its_threads_have_ended():
    policy = AwayPolicy(ScriptedPolicy(by_name()))
    scheduler = Scheduler(policy, ScriptedVerifier(score_names({})), boxed, operator.eq)
    for turn in (1, 2):
        assert len(list(search_with(scheduler, ["a", "b"], CONFIG, lambda: False))) == 2
        assert policy.num_hung_up == turn

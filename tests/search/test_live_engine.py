"""The engine with its own thread: searches from any thread, at any time, with events, and memory freed at once."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import operator
import queue
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import RandomTree, ScriptedPolicy, ScriptedVerifier, by_name, score_names
from test_engine import CONFIGS, PROBLEMS, TREES, drivers
from test_scheduler import alone, content
from tts_search import (
    Engine,
    RuleStrategy,
    SearchConfig,
    SearchError,
    SearchEvent,
    SearchResult,
    Step,
    TextPolicy,
    TextVerifier,
    TreeNode,
    asearch_iter,
    search,
    search_iter,
)
from tts_search.api import LoadNote
from tts_search.engine.scheduler import Scheduler
from tts_search.search.answers import boxed
from tts_search.search.protocol import Load

CONFIG = SearchConfig(n=4, expand=2, max_steps=4)


class Gate:
    """A policy that waits in every call until it is let through."""

    def __init__(self) -> None:
        self.entered, self.open = threading.Semaphore(0), threading.Semaphore(0)
        self.policy = ScriptedPolicy(RandomTree(3, end=0.1).step)
        self.begin, self.release, self.end = self.policy.begin, self.policy.release, self.policy.end

    def expand(self, requests: Any) -> Any:
        self.entered.release()
        assert self.open.acquire(timeout=20)
        return self.policy.expand(requests)


@contextmanager
def gated(**options: Any) -> Iterator[tuple[Gate, ScriptedVerifier, Engine]]:
    gate, verifier = Gate(), ScriptedVerifier(RandomTree(3).scores)
    engine = Engine(gate, verifier, **options)  # type: ignore[arg-type]
    try:
        yield gate, verifier, engine
    finally:
        gate.open.release(10**6)
        engine.close()
    assert not gate.policy.problems
    assert not verifier.problems


def outcome_of(search: Any) -> Any:
    try:
        return search.result(20)
    except SearchError as error:
        return error


@settings(max_examples=60, deadline=None)
@given(TREES, CONFIGS, st.integers(1, 7), st.integers(1, 40), st.sets(st.integers(0, 6)))
def test_results_are_those_of_each_alone_whoever_is_cancelled(tree, config, in_flight, rows, cancelled):
    policy, verifier = drivers(tree)
    with Engine(policy, verifier, max_in_flight=in_flight, max_rows=rows) as engine:
        searches = [engine.submit(problem, config) for problem in PROBLEMS]
        gone = {number for number in cancelled if searches[number].cancel()}
        found = {number: outcome_of(one) for number, one in enumerate(searches) if number not in gone}
    expected = alone(tree, config)
    for number, outcome in found.items():
        assert content(outcome) == expected[number]
    assert not policy.problems
    assert not verifier.problems
    for number in gone:
        with pytest.raises(concurrent.futures.CancelledError):
            searches[number].result()


def test_any_thread_may_submit_while_searches_run():
    tree = RandomTree(5, end=0.1)
    with Engine(*drivers(tree)) as engine, concurrent.futures.ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda problem: engine.submit(problem, CONFIG).result(20), PROBLEMS * 5))
    assert list(map(content, found)) == alone(tree, CONFIG) * 5


def test_a_problem_joins_those_that_run():
    with gated() as (gate, _, engine):
        first = engine.submit("first", CONFIG)
        gate.entered.acquire()
        second = engine.submit("second", CONFIG)
        gate.open.release()
        gate.entered.acquire()
        assert (engine.num_in_flight, engine.num_waiting) == (2, 0)
        gate.open.release(100)
        first.result(20)
        second.result(20)
        assert {request.problem for request in gate.policy.calls[1]} == {0, 1}


def test_a_problem_waits_while_there_is_no_room():
    with gated(max_rows=4) as (gate, _, engine):
        searches = [engine.submit(problem, CONFIG) for problem in PROBLEMS[:3]]
        gate.entered.acquire()
        assert (engine.num_in_flight, engine.num_streams) == (1, 4)
        gate.open.release(100)
        assert [search.result(20).problem for search in searches] == PROBLEMS[:3]
        assert all(sum(len(one.children) for one in call) <= 7 for call in gate.policy.calls)


def test_cancelling_frees_before_the_next_call():
    with gated() as (gate, verifier, engine):
        first, second = engine.submit("first", CONFIG), engine.submit("second", CONFIG)
        gate.entered.acquire()
        assert first.cancel()
        assert first.done()
        gate.open.release()
        gate.entered.acquire()
        assert len(gate.policy.problems) == len(verifier.problems) == 1
        gate.open.release(100)
        second.result(20)
        assert not second.cancel()


def test_waiting_has_a_limit_that_does_not_end_the_search():
    with gated() as (gate, _, engine):
        one = engine.submit("p", CONFIG)
        with pytest.raises(TimeoutError, match="timeout: "):
            one.result(0.01)
        gate.open.release(100)
        assert one.result(20).problem == "p"


@pytest.mark.parametrize("failure", [ZeroDivisionError, KeyboardInterrupt])  # the latter is Ctrl-C
def test_closing_cancels_and_frees(failure):
    gate, verifier, searches = Gate(), ScriptedVerifier(score_names({})), []

    def open_when_closed(engine: Engine) -> None:
        while engine.is_open:
            time.sleep(0.001)
        gate.open.release(10**6)

    def fail_in_the_middle() -> None:
        with Engine(gate, verifier, max_rows=4) as engine:  # type: ignore[arg-type]
            searches.extend(engine.submit(problem, CONFIG) for problem in PROBLEMS)
            gate.entered.acquire()
            threading.Thread(target=open_when_closed, args=(engine,)).start()
            raise failure

    with pytest.raises(failure):
        fail_in_the_middle()
    assert not gate.policy.problems
    assert not verifier.problems
    assert any(isinstance(outcome_of(one), SearchError) for one in searches)


def test_a_closed_engine_takes_nothing():
    engine = Engine(*drivers(RandomTree(1)))
    engine.close()
    engine.close()
    with pytest.raises(SearchError, match="engine: expected one that is open"):
        engine.submit("p", CONFIG)


def test_a_driver_that_ends_the_thread_is_told_to_all():
    def step(*_: Any) -> Step:
        raise SystemExit(3)

    policy, verifier = ScriptedPolicy(step), ScriptedVerifier(score_names({}))
    with Engine(policy, verifier) as engine:
        one = engine.submit("p", CONFIG)
        with pytest.raises(SearchError, match="engine: SystemExit: 3"):
            one.result(20)
    assert not policy.problems


def test_bad_problems_fail_by_themselves():
    with Engine(*drivers(RandomTree(1))) as engine:
        bad = engine.submit(" ", CONFIG)
        with pytest.raises(SearchError, match="expected a problem that is not empty"):
            bad.result(20)
        with pytest.raises(SearchError, match="messages: expected texts with roles, a user's last"):
            engine.submit([{"role": "assistant", "content": "hi"}], CONFIG).result(20)
        assert isinstance(engine.submit("p", CONFIG).result(20), SearchResult)
    with (
        Engine(ScriptedPolicy(by_name())) as engine,
        pytest.raises(SearchError, match="verifier: beam_search needs one"),
    ):
        engine.submit("p", CONFIG)
    with pytest.raises(SearchError, match="max_rows: expected an int >= 1, got 0"):
        Engine(ScriptedPolicy(by_name()), max_rows=0)


def test_messages_go_to_the_policy_and_their_last_to_the_verifier():
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "What?"}]
    told: list[Any] = []
    policy, verifier = ScriptedPolicy(by_name()), ScriptedVerifier(score_names({}))
    begin = policy.begin
    policy.begin = lambda problem, text: (told.append(text), begin(problem, text))[1]  # type: ignore[method-assign]
    with Engine(policy, verifier) as engine:
        assert engine.submit(messages, CONFIG).result(20).problem == "What?"
    assert told == [messages]
    assert verifier.ended[0].text == "What?"
    with Engine(TextPolicy(lambda _: [])) as engine, pytest.raises(SearchError, match="a TextPolicy takes a text"):
        engine.submit(messages, SearchConfig("best_of_n", n=2)).result(20)


def test_seed_text_stands_for_the_problem_in_the_draws():
    tree, config = RandomTree(1, words=1000), SearchConfig("best_of_n", n=4)
    with Engine(*drivers(tree)) as engine:
        results = [engine.submit("p", config, seed_text=text).result(20) for text in ("q", "q", None)]
        other = engine.submit("q", config).result(20)
    texts = [[one.text for one in result.completions] for result in (*results, other)]
    assert texts[0] == texts[1] == texts[3] != texts[2]


class TestEvents:
    @staticmethod
    def replayed(events: list[SearchEvent]) -> dict[int, TreeNode]:
        nodes: dict[int, TreeNode] = {}
        for event in events:
            for node in event.nodes:
                assert (node.id not in nodes) == (event.kind == "expanded")
                nodes[node.id] = node
        return nodes

    @settings(max_examples=40, deadline=None)
    @given(TREES, CONFIGS)
    def test_they_tell_the_whole_tree(self, tree, config):
        with Engine(*drivers(tree)) as engine:
            one = engine.submit("p", config)
            events = list(one.events())
            late = list(one.events())
            outcome = outcome_of(one)
        if isinstance(outcome, SearchError):
            return
        for told in (events, late):
            nodes = self.replayed(told)
            for node in outcome.tree.nodes:
                known = nodes[node.id]
                assert (known.text, known.scores, known.parent) == (node.text, node.scores, node.parent)
                assert known.state == node.state or node.state == "expanded"
        rounds = [event.round for event in events if event.kind == "round"]
        assert rounds == sorted(set(rounds))
        assert rounds[-1] == outcome.stats.rounds
        assert len(late) <= 5

    def test_they_come_as_they_happen(self):
        with gated() as (gate, _, engine):
            engine.submit("before", CONFIG)
            gate.entered.acquire()
            one, told = engine.submit("p", CONFIG), queue.SimpleQueue[Any]()
            one.listen(lambda news: [told.put(event) for event in news or [None]])  # before it begins
            gate.open.release()
            kinds = [told.get(timeout=20).kind for _ in range(2)]
            assert kinds == ["expanded", "round"]
            gate.entered.acquire()
            assert told.empty()  # its first call runs
            gate.open.release()
            kinds = [told.get(timeout=20).kind for _ in range(4)]
            assert kinds[:3] == ["expanded", "scored", "pruned"]
            assert not one.done()
            gate.open.release(100)
            one.result(20)
            events = list(iter(lambda: told.get(timeout=20), None))
            assert events[-1].kind in ("pruned", "finished", "scored")

    def test_who_stops_listening_is_forgotten(self):
        with Engine(*drivers(RandomTree(1, end=0.2))) as engine:
            one = engine.submit("p", CONFIG)
            events = one.events()
            next(events)
            events.close()  # type: ignore[attr-defined]
            one.result(20)
            engine.submit("q", CONFIG).result(20)
            assert not one._listeners

    def test_after_the_end_and_after_closing(self):
        with Engine(*drivers(RandomTree(1, end=0.2))) as engine:
            one = engine.submit("p", CONFIG)
            tree = one.result(20).tree
            never = engine.submit("q", CONFIG)
            never.cancel()
            list(never.events())
        assert self.replayed(list(one.events())).keys() == {node.id for node in tree.nodes}


class TestAsyncio:
    def test_searches_are_awaited_and_watched(self):
        tree = RandomTree(5, end=0.1)

        async def main() -> tuple[list[Any], list[SearchEvent]]:
            with Engine(*drivers(tree)) as engine:
                searches = [engine.submit(problem, CONFIG) for problem in PROBLEMS]
                events = [event async for event in searches[0]]
                return list(await asyncio.gather(*searches)), events

        results, events = asyncio.run(main())
        assert list(map(content, results)) == alone(tree, CONFIG)
        assert {node.id for event in events for node in event.nodes} == {node.id for node in results[0].tree.nodes}

    def test_a_task_that_is_cancelled_cancels_its_search(self):
        async def main(gate: Gate, engine: Engine) -> None:
            one = engine.submit("p", CONFIG)
            task = asyncio.ensure_future(one)
            await asyncio.to_thread(gate.entered.acquire)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert one.done()

        with gated() as (gate, _, engine):
            asyncio.run(main(gate, engine))

    def test_a_listener_whose_loop_is_closed_harms_nobody(self):
        async def listen(one: Any) -> SearchEvent:
            async for event in one:
                return event
            raise AssertionError

        def step(*_: Any) -> Step:
            time.sleep(0.001)
            return Step("y\n\n", False)

        with Engine(ScriptedPolicy(step), ScriptedVerifier(score_names({}))) as engine:
            one = engine.submit("p", SearchConfig(n=2, expand=2, max_steps=10**6))
            assert asyncio.run(listen(one)).kind == "expanded"
            time.sleep(0.05)  # it goes on
            assert not one.done()
            assert one.cancel()

    @pytest.mark.parametrize("config", [CONFIG, RuleStrategy(3e9, n=8, samples=2)])
    def test_asearch_iter_is_search_iter(self, config):
        tree = RandomTree(5, end=0.1, answers=("1", "2"))

        async def main() -> dict[int, Any]:
            options: dict[str, Any] = {"progress": False, "max_in_flight": 3}
            return {
                index: content(one) async for index, one in asearch_iter(PROBLEMS, *drivers(tree), config, **options)
            }

        expected = {index: content(one) for index, one in search_iter(PROBLEMS, *drivers(tree), config, progress=False)}
        assert asyncio.run(main()) == expected

    def test_asearch_iter_takes_async_functions_and_leaves_the_loop_free(self):
        async def sample(requests: list[Any]) -> list[list[Step]]:
            await asyncio.sleep(0.02)
            return [[Step("x", True, 1)] * request.num_samples for request in requests]

        verifier = TextVerifier(lambda branches: [[0.5] * len(steps) for _, steps in branches])

        async def main() -> tuple[int, int]:
            turns = 0

            async def count() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0.001)

            counting = asyncio.ensure_future(count())
            found = [one async for one in asearch_iter(PROBLEMS, TextPolicy(sample), verifier, CONFIG, progress=False)]
            counting.cancel()
            return len(found), turns

        found, turns = asyncio.run(main())
        assert found == len(PROBLEMS)
        assert turns > 3

    def test_closing_asearch_iter_frees_everything_soon(self):
        def step(problem: str, *_: Any) -> Step:
            time.sleep(0.001)
            return Step("x", True) if problem == "short" else Step("y\n\n", False)

        policy, verifier = ScriptedPolicy(step), ScriptedVerifier(score_names({}))

        async def main() -> None:
            config = SearchConfig(n=4, max_steps=10**6)
            outcomes = asearch_iter(["long", "short"], policy, verifier, config, progress=False)
            assert (await anext(outcomes))[0] == 1
            await outcomes.aclose()  # type: ignore[attr-defined]
            assert not policy.problems
            task = asyncio.ensure_future(anext(asearch_iter(["long"], policy, verifier, config, progress=False)))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(main())
        assert not policy.problems
        assert not verifier.problems

    def test_asearch_iter_refuses_at_once(self):
        with pytest.raises(SearchError, match="verifier: "):
            asearch_iter(["p"], ScriptedPolicy(by_name()))


def test_an_exception_in_a_consumer_frees_everything():
    policy, verifier = drivers(RandomTree(1, end=0.5))
    with suppress(ZeroDivisionError):
        for _ in search_iter(PROBLEMS, policy, verifier, CONFIG, progress=False):
            raise ZeroDivisionError
    gc.collect()
    assert not policy.problems
    assert not verifier.problems


def test_search_takes_max_rows():
    policy, verifier = drivers(RandomTree(1, end=0.3))
    search(PROBLEMS, policy, verifier, CONFIG, progress=False, max_rows=5)
    assert max(len({request.problem for request in call}) for call in policy.calls) == 2


class TestProgress:
    class Busy(ScriptedPolicy):
        """Says that it samples a thousand tokens in each call."""

        max_rows = 0

        @property
        def load(self) -> Load:
            return Load(1000 * len(self.calls), 3, self.max_rows, 25, 100)

    def test_a_local_model_says_how_busy_it_is(self):
        tree = RandomTree(1, end=0.2)
        scheduler = Scheduler(self.Busy(tree.step), ScriptedVerifier(tree.scores), boxed, operator.eq, max_rows=8)
        note = LoadNote(scheduler)
        list(scheduler.start(0, "p", CONFIG))
        list(scheduler.step())
        speed, of, kv = note().split(", ")
        assert speed.endswith(" tokens/s")
        assert int(speed.split()[0].replace(",", "")) > 0
        assert (of, kv) == ("3 of 8 rows", "KV 25%")
        assert note().startswith("0 tokens/s")  # since the last time
        scheduler.close()

    def test_others_say_what_is_on_its_way(self):
        scheduler = Scheduler(*drivers(RandomTree(1)), boxed, operator.eq)
        list(scheduler.start(0, "p", CONFIG))
        assert LoadNote(scheduler)() == "4 steps on their way"
        scheduler.close()

    def test_the_engine_tells_it(self):
        policy = self.Busy(RandomTree(1).step)
        with Engine(policy, ScriptedVerifier(score_names({})), max_rows=5) as engine:
            assert engine.load == Load(0, 3, 5, 25, 100)

    def test_it_is_shown_on_a_terminal(self, monkeypatch, capsys):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "150")
        tree = RandomTree(1, end=0.2)

        def slow(*args: Any) -> Step:
            time.sleep(0.02)
            return tree.step(*args)

        search(PROBLEMS, self.Busy(slow), ScriptedVerifier(tree.scores), CONFIG, max_in_flight=1)
        shown = capsys.readouterr().err
        assert "tokens/s, 3 of 1024 rows, KV 25%" in shown
        assert "/7" in shown

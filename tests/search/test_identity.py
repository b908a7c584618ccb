"""Local models on a CPU: the same search to the bit, for any other searches and any size of the pool."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tts_search import HFPolicy, HFVerifier, SearchConfig, SearchError
from tts_search.api import search_with
from tts_search.engine.scheduler import Scheduler
from tts_search.models.decoder import KVPool
from tts_search.models.pool import BranchPool
from tts_search.search.answers import boxed
from tts_search.search.protocol import Generate, GenerateParams

MODELS = files("tts_search.lab") / "models"
PROBLEMS = ["12+34-5", "7*8+9", "90-17+4*3", "6*(5+4)"]
SHORT: dict[str, Any] = {"max_steps": 4, "max_step_tokens": 12}
CONFIGS = [
    SearchConfig("beam_search", n=4, expand=2, **SHORT),
    SearchConfig("beam_search", n=4, expand=2, lookahead=1, aggregate="min", **SHORT),
    SearchConfig("beam_search", n=6, expand=3, dedupe=True, completed="compete", temperature=1.2, **SHORT),
    SearchConfig("dvts", n=4, expand=2, top_p=0.9, **SHORT),
    SearchConfig("best_of_n", n=5, max_tokens=40),
    SearchConfig("rebase", n=5, **SHORT),
    SearchConfig("puct", n=4, expand=2, **SHORT),
]
PAGE = 4


@cache
def models(dtype: str) -> tuple[HFPolicy, HFVerifier]:
    options: dict[str, Any] = {"dtype": dtype, "kv_memory": "8MiB", "self_test": False, "decoder": "lean"}
    return HFPolicy(str(MODELS / "policy-0.1m"), **options), HFVerifier(str(MODELS / "prm-weak"), **options)


def give_pools(drivers: tuple[HFPolicy, HFVerifier], policy_pages: int, verifier_pages: int) -> None:
    for lane, pages in ((drivers[0]._lane, policy_pages), (drivers[1]._lane, verifier_pages)):
        lane.pool = BranchPool(KVPool(lane.decoder.shape, pages, PAGE, lane.decoder.dtype), 64)


def content(outcome: Any) -> Any:
    if isinstance(outcome, SearchError):
        return outcome.message, outcome.round
    return outcome.tree.to_json(), outcome.completions, outcome.best


@cache
def alone(dtype: str, number: int, config: int) -> Any:
    """A problem by itself: what it comes to, and the longest branch of either model, in pages."""
    drivers = models(dtype)
    give_pools(drivers, 2000, 2000)
    scheduler = Scheduler(*drivers, boxed, operator.eq, prefix_cache=False, speculate=False)
    ((_, outcome),) = search_with(scheduler, [PROBLEMS[number]], CONFIGS[config], lambda: False)
    return content(outcome)


def together(
    scheduler: Scheduler, wanted: list[tuple[int, int]], cancel: dict[int, int], texts: list[int]
) -> Iterator[tuple[int, Any]]:
    """Search problems, some of which are cancelled after a number of steps, beside requests for text."""
    waiting = list(enumerate(wanted))
    for number, length in enumerate(texts, start=1000):
        params = GenerateParams(max_tokens=length, ignore_eos=True)
        scheduler.generate(Generate((5, 6, 7, 8), params, 2, (number, 3), number), lambda _: None)
    turn = 0
    while waiting or scheduler.num_problems:
        while waiting and scheduler.has_room:
            number, (problem, config) = waiting.pop(0)
            yield from scheduler.start(number, PROBLEMS[problem], CONFIGS[config])
        for number in [number for number, when in cancel.items() if when == turn]:
            scheduler.cancel(number)
        yield from scheduler.step()
        turn += 1
    assert scheduler.num_streams == 0


def assert_same_alone(
    dtype: str,
    wanted: list[tuple[int, int]],
    cancel: dict[int, int],
    texts: list[int],
    room: tuple[int, int],
    bounds: tuple[int, int],
    prefix_cache: bool,
    speculate: Any,
    threads: int,
) -> None:
    expected = [alone(dtype, *each) for each in wanted]
    drivers = models(dtype)
    give_pools(drivers, *room)
    torch.set_num_threads(threads)
    try:
        rows, in_flight = bounds
        options: dict[str, Any] = {"prefix_cache": prefix_cache, "speculate": speculate}
        scheduler = Scheduler(*drivers, boxed, operator.eq, max_rows=rows, max_in_flight=in_flight, **options)
        found = dict(together(scheduler, wanted, cancel, texts))
    finally:
        torch.set_num_threads(1)
    assert found.keys() >= set(range(len(wanted))) - cancel.keys()
    for number, outcome in found.items():
        assert content(outcome) == expected[number]
    for driver in drivers:
        assert not driver._problems
        assert not driver._pool.workers
        driver.prefix_cache = False
        assert driver._pool.pool.forest.stats().branches == 0


CASES = given(
    st.sampled_from(["float32", "float32", "bfloat16"]),
    st.lists(st.tuples(st.integers(0, len(PROBLEMS) - 1), st.integers(0, len(CONFIGS) - 1)), min_size=1, max_size=4),
    st.dictionaries(st.integers(0, 3), st.integers(0, 30), max_size=2),
    st.lists(st.integers(1, 20), max_size=2),
    st.tuples(st.sampled_from([24, 32, 60, 1000]), st.sampled_from([60, 90, 1000])),
    st.tuples(st.sampled_from([1, 2, 3, 7, 40]), st.sampled_from([1, 2, 10])),
    st.booleans(),
    st.sampled_from([False, "auto", True, True]),
    st.sampled_from([1, 2]),
)


@pytest.mark.parametrize("examples", [25, pytest.param(3000, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])])
def test_a_search_is_the_same_to_the_bit_in_any_company(examples):
    settings(max_examples=examples, deadline=None)(CASES(assert_same_alone))()


def test_the_pools_of_these_tests_are_too_small_for_all():
    drivers = models("float32")
    give_pools(drivers, 24, 60)
    scheduler = Scheduler(*drivers, boxed, operator.eq)
    outcomes = dict(together(scheduler, [(0, 2), (1, 2), (2, 0), (3, 3)], {}, []))
    assert sum(outcome.stats.waves + outcome.stats.recomputed_tokens for outcome in outcomes.values()) > 0


def test_nobody_starves():
    """The pool has room for one; others come all the time, and the first one still ends, as the first."""
    drivers = models("float32")
    give_pools(drivers, 24, 60)
    scheduler = Scheduler(*drivers, boxed, operator.eq)
    config = SearchConfig("best_of_n", n=4, max_tokens=40)
    done: list[int] = []
    started = 0
    for _ in range(4000):
        if scheduler.num_problems < 4 and started < 30:
            done += [number for number, _ in scheduler.start(started, PROBLEMS[started % 4], config)]
            started += 1
        done += [number for number, _ in scheduler.step()]
        if len(done) == 30:
            break
    assert sorted(done) == list(range(30))
    late = [number - place for place, number in enumerate(done)]
    assert max(map(abs, late)) <= 4  # nobody is overtaken by more than those that were there with it

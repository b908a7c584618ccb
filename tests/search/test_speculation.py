"""Speculation: which steps are sampled ahead, what happens to them, and that no result changes."""

from __future__ import annotations

import itertools
import operator
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import ScriptedPolicy, ScriptedVerifier
from test_engine import CONFIGS, PROBLEMS, TREES, Pruner
from test_scheduler import Shuffled, ShuffledPruner, alone, content, run
from tts_search import SearchConfig, SearchError, Step, TextVerifier, Usage
from tts_search.api import search_with
from tts_search.engine.scheduler import Scheduler
from tts_search.engine.speculation import AUTO_ROWS, can_speculate
from tts_search.search.answers import boxed
from tts_search.search.protocol import Expand, Load
from tts_search.search.seeds import seed_of


class Local(Shuffled):
    """A policy that answers in any order, takes requests back, and now and then has no room."""

    def __init__(self, policy: ScriptedPolicy, rng: random.Random) -> None:
        super().__init__(policy, "expand", rng)
        self.withdrawn = 0

    @property
    def load(self) -> Load:
        return Load(0, sum(len(one.children) for one in self.waiting), 1000, 0, 1, waiting=self._rng.random() < 0.1)

    def withdraw(self, requests: Sequence[Expand]) -> int:
        assert all(any(one is waiting for waiting in self.waiting) for one in requests)
        self.waiting = [one for one in self.waiting if not any(one is gone for gone in requests)]
        self.withdrawn += len(requests)
        return 2 * len(requests)


@settings(max_examples=300, deadline=None)
@given(
    TREES,
    CONFIGS,
    st.integers(1, 7),
    st.booleans(),
    st.integers(0, 10**6),
    st.sampled_from([3, 8, 1000]),
    st.dictionaries(st.integers(0, 6), st.integers(0, 12), max_size=2),
)
def test_no_search_notices_in_whatever_order_answers_come(tree, config, in_flight, prunes, seed, rows, cancel):
    """The drivers fail at any use of a branch that was released, or never made."""
    rng, policy = random.Random(seed), ScriptedPolicy(tree.step)
    verifier = (Pruner if prunes else ScriptedVerifier)(tree.scores)
    reading = ShuffledPruner(verifier, rng) if prunes else Shuffled(verifier, "score", rng)
    scheduler = Scheduler(Local(policy, rng), reading, boxed, operator.eq, max_rows=rows, speculate=True)
    outcomes = run(scheduler, config, in_flight, cancel)
    expected = alone(tree, config)
    for number, outcome in outcomes.items():
        assert content(outcome) == expected[number]
    assert outcomes.keys() >= set(range(len(PROBLEMS))) - cancel.keys()
    assert not policy.problems
    assert not verifier.problems
    ahead: Any = scheduler.speculation
    assert [*ahead._searches, *ahead._steps, *ahead._reads, *ahead._answered] == []


class Timed(Local):
    """A policy whose steps take as long as a table says, by their paths, else 1; it says when each began, and ended."""

    def __init__(self, lengths: dict[str, int], broken: str = "") -> None:
        super().__init__(ScriptedPolicy(lambda *_: Step("", True)), random.Random(0))
        paths = [path for depth in (1, 2, 3) for path in itertools.product(range(-1, 4), repeat=depth)]
        self._names = {seed_of(0, "p", path): ".".join(map(str, path)) for path in paths}
        self.lengths, self.broken, self.clock, self.room = lengths, broken, 0, True
        self.ends: dict[int, int] = {}
        self.begun: dict[str, int] = {}
        self.gone: dict[str, int] = {}
        self.begin = self.release = lambda *_: None
        self.end = lambda _: Usage(tokens=100)

    @property
    def load(self) -> Load:
        return Load(0, len(self.waiting), 1000, 0, 1, waiting=not self.room)

    def names(self, request: Expand) -> list[str]:
        return [self._names[seed] for seed in request.seeds]

    def submit(self, requests):
        for request in requests:
            self.begun |= dict.fromkeys(self.names(request), self.clock)
            self.ends[id(request)] = self.clock + max(self.lengths.get(name, 1) for name in self.names(request))
        super().submit(requests)

    def withdraw(self, requests):
        self.gone |= {name: self.clock for request in requests for name in self.names(request)}
        return super().withdraw(requests)

    def step(self):
        self.clock += bool(self.waiting)
        done = [request for request in self.waiting if self.ends[id(request)] == self.clock]
        self.waiting = [request for request in self.waiting if self.ends[id(request)] > self.clock]
        return [(request, self.answer(request)) for request in done]

    def answer(self, request: Expand) -> Any:
        names, last = self.names(request), request.params.delimiter is None
        if self.broken in names:
            return ValueError("no room")
        return [Step(f"{name}\n\n", last, self.lengths.get(name, 1)) for name in names]


class Scores(Shuffled):
    """Scores a step by its name, at once."""

    def __init__(self, scores: dict[str, float]) -> None:
        super().__init__(ScriptedVerifier(lambda *_: []), "score", random.Random(0))
        self.begin = self.release = lambda *_: None
        self.end = lambda _: Usage()
        self.scores, self.asked = scores, list[str]()

    def step(self):
        now, self.waiting = self.waiting, []
        self.asked += [request.steps[-1].strip() for request in now]
        return [
            (request, [self.scores.get(step.strip(), 0.0) for step in request.steps + request.lookahead])
            for request in now
        ]


CONFIG = SearchConfig(n=4, expand=2, max_steps=3)
SCORES = {"0": 0.1, "1": 0.9, "2": 0.5, "3": 0.4}


def searched(policy: Timed, speculate: Any = True, config: SearchConfig = CONFIG, verifier: Any = None) -> Any:
    verifier = verifier or Scores(SCORES)
    scheduler = Scheduler(policy, verifier, boxed, operator.eq, speculate=speculate)
    ((_, outcome),) = search_with(scheduler, ["p"], config, lambda: False)
    return outcome


def test_steps_below_the_best_begin_while_the_round_waits():
    lengths = {"2": 3, "3": 10, "1.0": 9, "1.1": 12, "2.1": 4}
    policy, plain, verifier = Timed(lengths), Timed(lengths), Scores(SCORES)
    outcome, expected = searched(policy, verifier=verifier), searched(plain, speculate=False)
    assert content(outcome) == content(expected)
    assert plain.clock == 10 + 12 + 1
    assert policy.clock == 2 + 12  # 1.1 began at 2; what came below the others was there when it had ended
    assert verifier.asked[:4] == ["0", "1", "2", "3"]
    assert {name: policy.begun[name] for name in ("1.0", "1.1", "2.0", "2.1")} == dict.fromkeys(
        ("1.0", "1.1"), 2
    ) | dict.fromkeys(("2.0", "2.1"), 4)


def test_what_cannot_survive_any_more_is_withdrawn_at_once():
    policy = Timed({"0.0": 30, "2": 5, "3": 20})
    outcome = searched(policy)
    assert policy.gone == {"0.0": 6}  # at 5, 2 has ended; then it is read, and is better
    assert "3.0" not in policy.begun
    assert outcome.stats.speculated_tokens == 2 + 1  # what was withdrawn, and 0.1, which was there
    assert outcome.stats.policy_tokens == 100 - 3


@pytest.mark.parametrize("cancelled_at", [None, 6, 15])
def test_tokens_ahead_are_counted_by_what_becomes_of_them(cancelled_at):
    policy = Timed({"0.0": 30, "2": 5, "3": 20})
    scheduler = Scheduler(policy, Scores(SCORES), boxed, operator.eq, speculate=True)
    list(scheduler.start(0, "p", CONFIG))
    while scheduler.num_problems:
        list(scheduler.step())
        if policy.clock == cancelled_at:
            scheduler.cancel(0)
    ahead: Any = scheduler.speculation
    used = 4 if cancelled_at is None else 0  # 1.0, 1.1, 2.0 and 2.1 were there when the round was over
    left = {None: 0, 6: 2 + 2 * 2, 15: 4}[cancelled_at]  # at 6, 2.0 and 2.1 are on their way
    assert (ahead.used, ahead.in_vain) == (used, 2 + 1 + left)


def test_only_children_of_the_best_of_each_group_are_foreseen():
    """In DVTS, 0 and 1 compete, and 2 and 3."""
    policy = Timed({"1": 5, "3": 20})
    searched(policy, config=SearchConfig("dvts", n=4, expand=2, max_steps=3))
    begun = {name for name, at in policy.begun.items() if at < 20 and "." in name and name.count(".") == 1}
    assert begun == {"0.0", "0.1", "1.0", "1.1", "2.0", "2.1"}


def test_rows_that_others_want_are_given_back():
    policy = Timed({"3": 20, "1.0": 9, "1.1": 9})
    step = policy.step

    def stepped():
        policy.room = policy.clock < 5
        return step()

    policy.step = stepped
    searched(policy)
    assert policy.gone == {"1.0": 6, "1.1": 6}
    assert policy.begun["1.0"] == 20  # not begun anew before it is asked for


def test_a_failure_ahead_is_told_when_it_is_asked_for():
    policy, plain = (Timed({"3": 9}, broken="1.0") for _ in range(2))
    assert content(searched(policy)) == content(searched(plain, speculate=False))
    assert isinstance(searched(Timed({"3": 9}, broken="0.0")).best.score, float)  # 0 does not survive


def test_the_first_failure_ends_a_round():
    policy, plain = (Timed({"3": 9}, broken="1") for _ in range(2))
    outcome = searched(policy)
    assert isinstance(outcome, SearchError)
    assert content(outcome) == content(searched(plain, speculate=False))
    assert policy.gone == {"3": 1}


@pytest.mark.parametrize(
    ("config", "speculate"),
    [
        (SearchConfig(n=4, expand=2, max_steps=3, lookahead=1), True),
        (SearchConfig("rebase", n=4, max_steps=3), True),
        (CONFIG, False),
    ],
)
def test_of_other_searches_nothing_is_foreseen(config, speculate):
    policy, verifier = Timed({"3": 9}), Scores(SCORES)
    outcome = searched(policy, speculate, config, verifier)
    assert outcome.stats.speculated_tokens == policy.withdrawn == 0
    assert min(at for name, at in policy.begun.items() if "." in name) == 9


def test_auto_is_for_local_models_and_few_rows():
    local, text = Scores({}), TextVerifier(lambda branches: [[0.5] * len(steps) for _, steps in branches])
    assert can_speculate(Timed({}), local, "auto")
    assert not can_speculate(Timed({}), text, "auto")
    assert can_speculate(Timed({}), text, True)
    assert not can_speculate(Timed({}), None, True)
    assert not can_speculate(ScriptedPolicy(lambda *_: Step("", True)), local, True)

    class Tiny(Timed):
        token_flops = 1e6

    assert not can_speculate(Tiny({}), local, "auto")
    assert can_speculate(Tiny({}), local, True)

    class Busy(Timed):
        load = Load(0, AUTO_ROWS, 1000, 0, 1)  # type: ignore[assignment]

    policy = Busy({"3": 9})
    searched(policy, "auto")
    assert policy.begun["1.0"] == 9


def test_what_speculate_can_be():
    with pytest.raises(SearchError, match="speculate: expected 'auto', True or False, got 'always'"):
        searched(Timed({}), "always")

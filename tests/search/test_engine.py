"""The engine: merged calls, seeds independent of other problems, failures of single problems, no leaks."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import RandomTree, ScriptedPolicy, ScriptedVerifier, by_name, score_names
from tts_search import VOTES, SearchConfig, SearchError, Step, beam_search, best_of_n, dvts, search, search_iter
from tts_search.search.protocol import Policy, PruningVerifier, Release, Score, Scored, Verifier
from tts_search.search.seeds import Seeds, seed_of
from tts_search.search.voting import AGGREGATES, aggregate

PROBLEMS = [f"problem {i}" for i in range(7)]
CONFIGS = st.builds(
    lambda method, expand, groups, **rest: SearchConfig(n=expand * groups, expand=expand, **rest).with_method(method),
    st.sampled_from(["best_of_n", "beam_search", "dvts"]),
    st.integers(1, 4),
    st.integers(1, 3),
    max_steps=st.integers(1, 5),
    max_tokens=st.sampled_from([None, 3]),
    completed=st.sampled_from(["leave", "occupy", "compete"]),
    dedupe=st.booleans(),
    lookahead=st.integers(0, 2),
    sort_completed=st.booleans(),
    stop_when_full=st.booleans(),
    budget_tokens=st.sampled_from([None, None, 6, 20]),
    seed=st.integers(-5, 5),
)
TREES = st.builds(
    RandomTree,
    st.integers(0, 10**9),
    end=st.sampled_from([0.0, 0.2, 0.7]),
    length=st.sampled_from([0.0, 0.2]),
    empty=st.sampled_from([0.0, 0.3]),
    blank=st.sampled_from([0.0, 0.0, 0.3]),
)


def drivers(tree: RandomTree) -> tuple[ScriptedPolicy, ScriptedVerifier]:
    return ScriptedPolicy(tree.step), ScriptedVerifier(tree.scores)


def outcome(result):
    return result.completions, result.best, result.tree, result.stats.rounds


@settings(max_examples=200, deadline=None)
@given(TREES, CONFIGS)
def test_any_search_keeps_the_protocol_and_the_contract(tree, config):
    policy, verifier = drivers(tree)  # they fail at any use of a branch after its release, and at a second release
    try:
        (result,) = search(["p"], policy, verifier, config, progress=False)
    except SearchError as error:
        assert "it returned nothing" in str(error)  # noqa: PT017
        assert tree.empty
        return
    assert not policy.problems
    assert len(policy.ended) == len(verifier.ended) == 1
    nodes = result.tree.nodes
    assert [node.id for node in nodes] == list(range(len(nodes)))
    assert nodes[0].state == "expanded"
    made = policy.ended[0].live.keys() | policy.ended[0].released
    assert made - {node.id for node in nodes} == {child for child in made if child >= 1 << 30}  # lookahead
    parents = {node.parent for node in nodes}
    for node in nodes:
        assert (node.state == "expanded") == (node.id in parents)
        assert node.parent is None or nodes[node.parent].round == node.round - 1
    for completion in result.completions:
        assert "".join(completion.steps) == completion.text
        assert all(step.strip() for step in completion.steps) or not completion.text.strip()
    scores = [one.score for one in result.completions if one.finished] or [one.score for one in result.completions]
    assert result.best.score == max(scores)
    assert result.best.finished == any(one.finished for one in result.completions)
    if config.sort_completed:
        assert all(a.score >= b.score for a, b in zip(result.completions, result.completions[1:], strict=False))
    elif config.method != "best_of_n":
        finished = [one.finished for one in result.completions]
        assert finished == sorted(finished, reverse=True)


@settings(max_examples=50, deadline=None)
@given(TREES, CONFIGS, st.integers(1, 8))
def test_what_else_is_in_flight_changes_nothing(tree, config, max_in_flight):
    alone = {}
    for problem in PROBLEMS:
        ((_, alone[problem]),) = search_iter([problem], *drivers(tree), config, progress=False)
    together = search_iter(PROBLEMS, *drivers(tree), config, progress=False, max_in_flight=max_in_flight)
    for index, result in together:
        expected = alone[PROBLEMS[index]]
        if isinstance(result, SearchError):
            assert isinstance(expected, SearchError)
            assert (result.message, result.round) == (expected.message, expected.round)
        else:
            assert outcome(result) == outcome(expected)


@pytest.mark.parametrize("method", ["beam_search", "dvts"])
@pytest.mark.parametrize("lookahead", [0, 2])
def test_one_call_a_round_for_all_problems(method, lookahead):
    policy, verifier = drivers(RandomTree(1, end=0.1))
    config = SearchConfig(method=method, max_steps=6, lookahead=lookahead)
    results = search(PROBLEMS, policy, verifier, config, progress=False)
    rounds = max(result.stats.rounds for result in results)
    assert len(verifier.calls) == rounds
    assert rounds <= len(policy.calls) <= rounds * (1 + lookahead)
    assert {request.problem for request in policy.calls[0]} == set(range(7))


def test_best_of_n_is_two_calls():
    policy, verifier = drivers(RandomTree(1))
    search(PROBLEMS, policy, verifier, SearchConfig(method="best_of_n"), progress=False)
    assert (len(policy.calls), len(verifier.calls)) == (1, 1)


def test_max_in_flight_limits_and_refills():
    policy, verifier = drivers(RandomTree(1, end=0.3))
    results = search(PROBLEMS, policy, verifier, SearchConfig(max_steps=5), progress=False, max_in_flight=3)
    assert [result.problem for result in results] == PROBLEMS
    in_flight = [{request.problem for request in call} for call in policy.calls]
    assert max(map(len, in_flight)) == 3
    for now, then in itertools.pairwise(in_flight):  # a place is taken as soon as it is free
        assert len(then) == 3 or max(then) == len(PROBLEMS) - 1, (now, then)


def test_results_come_as_they_finish():
    step_fn = lambda problem, *_: Step("x", True) if problem == "short" else Step("y\n\n", False)  # noqa: E731
    outcomes = search_iter(
        ["long", "short"],
        ScriptedPolicy(step_fn),
        ScriptedVerifier(score_names({})),
        SearchConfig(n=4, max_steps=3),
        progress=False,
    )
    assert [index for index, _ in outcomes] == [1, 0]


def test_problems_are_read_as_there_is_room():
    taken = []

    def problems():
        for problem in PROBLEMS:
            taken.append(problem)
            yield problem

    outcomes = search_iter(
        problems(), *drivers(RandomTree(1)), SearchConfig(method="best_of_n"), progress=False, max_in_flight=2
    )
    next(outcomes)
    assert len(taken) == 2
    assert len(list(outcomes)) == 6


class TestSeeds:
    def test_seeds_are_of_paths(self):
        policy, verifier = ScriptedPolicy(by_name()), ScriptedVerifier(score_names({"1": 0.9}))
        search(["p"], policy, verifier, SearchConfig(n=2, expand=2, max_steps=2, seed=3), progress=False)
        assert policy.calls[0][0].seeds == (seed_of(3, "p", (0,)), seed_of(3, "p", (1,)))
        assert policy.calls[1][0].seeds == (seed_of(3, "p", (1, 0)), seed_of(3, "p", (1, 1)))

    def test_streams_are_the_same_on_every_machine(self):
        head = hashlib.blake2b(b"7\nWhat is 1 + 1?\n0.3.1", digest_size=8).digest()
        assert seed_of(7, "What is 1 + 1?", (0, 3, 1)) == int.from_bytes(head, "big") >> 1 == 1030468918574127126
        assert Seeds(7, "What is 1 + 1?").of((0, 3, 1)) == 1030468918574127126
        others = {seed_of(7, "p", (1, 2)), seed_of(7, "p", (12,)), seed_of(7, "p", ()), seed_of(7, "q", (1, 2))}
        assert len(others | {seed_of(-7, "p", (1, 2))}) == 5

    def test_smaller_best_of_n_is_the_beginning_of_a_larger_one(self):
        few, many = (
            search(["p"], *drivers(RandomTree(1)), SearchConfig(method="best_of_n", n=n), progress=False)[0]
            for n in (4, 16)
        )
        assert few.completions == many.completions[:4]

    def test_another_seed_is_another_search(self):
        texts = []
        for seed in (0, 1):
            config = SearchConfig(method="best_of_n", seed=seed)
            (result,) = search(["p"], *drivers(RandomTree(1, words=1000)), config, progress=False)
            texts.append([completion.text for completion in result.completions])
        assert texts[0] != texts[1]


class TestErrors:
    @pytest.mark.parametrize("problem", ["", "  \n", None, 3])
    def test_empty_problem(self, problem):
        outcomes = dict(
            search_iter(["a", problem, "b"], *drivers(RandomTree(1)), SearchConfig(max_steps=3), progress=False)
        )
        assert isinstance(outcomes[1], SearchError)
        assert (outcomes[1].problem, outcomes[1].round) == (1, 0)
        assert not isinstance(outcomes[0], SearchError)
        assert not isinstance(outcomes[2], SearchError)

    def test_one_bad_problem_does_not_stop_the_others(self):
        tree = RandomTree(1, end=0.1)

        def scores(problem, steps):
            return tree.scores(problem, steps)[:-1] if problem == PROBLEMS[3] else tree.scores(problem, steps)

        policy, verifier = ScriptedPolicy(tree.step), ScriptedVerifier(scores)
        config = SearchConfig(max_steps=3)
        outcomes = dict(search_iter(PROBLEMS, policy, verifier, config, progress=False))
        assert [i for i, one in outcomes.items() if isinstance(one, SearchError)] == [3]
        assert str(outcomes[3]).startswith("problem 3, round 1: verifier: expected 1 scores")
        assert len(outcomes) == len(policy.ended) == len(verifier.ended) == 7
        assert outcome(outcomes[0]) == outcome(search(PROBLEMS[:1], *drivers(tree), config, progress=False)[0])

    def test_a_driver_may_answer_one_problem_with_an_exception(self):
        class Policy(ScriptedPolicy):
            def expand(self, requests):
                answers = super().expand(requests)
                return [
                    OverflowError("too long") if r.problem == 1 else a for r, a in zip(requests, answers, strict=True)
                ]

        policy = Policy(by_name())
        outcomes = dict(
            search_iter(
                PROBLEMS[:3], policy, ScriptedVerifier(score_names({})), SearchConfig(max_steps=2), progress=False
            )
        )
        assert str(outcomes[1]) == "problem 1, round 1: OverflowError: too long"
        assert isinstance(outcomes[1].__cause__, OverflowError)
        assert not isinstance(outcomes[0], SearchError)
        assert not isinstance(outcomes[2], SearchError)

    def test_a_driver_that_raises_fails_the_problems_of_that_call(self):
        class Policy(ScriptedPolicy):
            def expand(self, requests):
                if len(self.calls) == 1:
                    self.calls.append([])
                    raise ConnectionError("gone")
                return super().expand(requests)

        policy, verifier = Policy(by_name()), ScriptedVerifier(score_names({}))
        outcomes = search_iter(
            PROBLEMS[:3], policy, verifier, SearchConfig(max_steps=3), progress=False, max_in_flight=2
        )
        messages = {index: str(one) if isinstance(one, SearchError) else None for index, one in outcomes}
        assert messages == {
            0: "problem 0, round 2: ConnectionError: gone",
            1: "problem 1, round 2: ConnectionError: gone",
            2: None,
        }
        assert len(policy.ended) == 3
        assert not policy.problems
        assert not verifier.problems

    def test_wrong_number_of_answers(self):
        class Policy(ScriptedPolicy):
            def expand(self, _):
                return []

        with pytest.raises(SearchError, match=r"problem 0, round 1: ValueError: expected 1 answers"):
            search(["p"], Policy(by_name()), ScriptedVerifier(score_names({})), SearchConfig(), progress=False)

    def test_search_raises_the_first_error_and_ends_the_rest(self):
        step_fn = lambda problem, *_: Step("", False) if problem == "bad" else Step("a\n\n", False)  # noqa: E731
        policy, verifier = ScriptedPolicy(step_fn), ScriptedVerifier(score_names({}))
        with pytest.raises(SearchError, match=r"problem 1, round 1"):
            search(["good", "bad", "good"], policy, verifier, SearchConfig(), progress=False)
        assert len(policy.ended) == 3
        assert not policy.problems

    def test_extract_answer_that_raises(self):
        def extract(_):
            raise KeyError("no")

        outcomes = dict(
            search_iter(
                ["p"], *drivers(RandomTree(1)), SearchConfig(max_steps=2), extract_answer=extract, progress=False
            )
        )
        assert str(outcomes[0]).startswith("problem 0, round 2: KeyError")

    def test_arguments(self):
        policy, verifier = drivers(RandomTree(1))
        for method in ("beam_search", "dvts"):
            with pytest.raises(SearchError, match=r"^verifier: "):
                search(["p"], policy, None, SearchConfig(method=method))
        with pytest.raises(SearchError, match=r"^problems: "):
            search("p", policy, verifier)
        with pytest.raises(SearchError, match=r"^max_in_flight: "):
            search(["p"], policy, verifier, max_in_flight=0)
        assert search([], policy, verifier) == []


class TestInterrupt:
    def test_ctrl_c_loses_no_finished_result(self):
        def step_fn(problem, steps, *_):
            if len(steps) == 2:
                raise KeyboardInterrupt
            return Step("x", True) if problem == "short" else Step("y\n\n", False)

        policy, verifier = ScriptedPolicy(step_fn), ScriptedVerifier(score_names({}))
        outcomes = search_iter(["long", "short"], policy, verifier, SearchConfig(), progress=False)
        assert next(outcomes)[0] == 1
        with pytest.raises(KeyboardInterrupt):
            next(outcomes)
        assert len(policy.ended) == len(verifier.ended) == 2

    def test_closing_the_iterator_ends_the_problems_in_flight(self):
        policy, verifier = drivers(RandomTree(1, end=0.5))
        outcomes = search_iter(PROBLEMS, policy, verifier, SearchConfig(max_steps=5), progress=False)
        next(outcomes)
        outcomes.close()  # type: ignore[attr-defined]
        assert len(policy.ended) == len(verifier.ended) == 7


def test_releases_keep_memory_to_the_beam():
    class Watching(ScriptedPolicy):
        most = 0

        def expand(self, requests):
            answers = super().expand(requests)
            self.most = max(self.most, *(len(problem.live) for problem in self.problems.values()))
            return answers

    policy, verifier = Watching(by_name()), ScriptedVerifier(score_names({}))
    search(["p"], policy, verifier, SearchConfig(n=16, expand=4, max_steps=20), progress=False)
    assert policy.most == 4 + 16  # survivors and their children; nothing older
    assert max(verifier.ended[0].released) < len(policy.ended[0].live | dict.fromkeys(policy.ended[0].released))


def test_release_is_one_request_a_round():
    from tts_search.search.algorithms import ALGORITHMS
    from tts_search.search.run import Run

    run = Run(0, "p", SearchConfig(n=2, expand=2, max_steps=3), scored=True)
    moves = ALGORITHMS["beam_search"](run)
    requests, kinds = moves.send(None), []
    while True:
        kinds.append(type(requests[0]).__name__)
        answers: list = [None] * len(requests)
        if kinds[-1] == "Expand":
            answers = [[Step("a\n\n", False)] * len(request.children) for request in requests]
        elif kinds[-1] == "ScoreAndPrune":
            answers = [Scored([[0.5] * len(each.steps) for each in request.candidates]) for request in requests]
        else:
            assert requests == [Release(0, requests[0].branches)]
        try:
            requests = moves.send(answers)
        except StopIteration:
            break
    assert kinds == ["Expand", "ScoreAndPrune", "Release"] * 2 + ["Expand", "ScoreAndPrune"]


class Pruner(ScriptedVerifier):
    """Ranks candidates itself; `choose` may change its mind."""

    choose = staticmethod(lambda keep, ranked: ranked[:keep])

    def score_and_prune(self, requests):
        return [self._round(request) for request in requests]

    def _round(self, request):
        scores = iter(self.score([each for each in request.candidates if isinstance(each, Score)]))
        found = [next(scores) if isinstance(each, Score) else each for each in request.candidates]
        values = [each if isinstance(each, float) else aggregate(each, request.how) for each in found]
        survivors = [
            self.choose(keep, sorted(group, key=lambda number: -values[number]))
            for group, keep in zip(request.groups, request.keep, strict=True)
        ]
        return Scored([each for each in found if not isinstance(each, float)], survivors)


@pytest.mark.parametrize("seed", range(40))
def test_a_verifier_may_prune(seed):
    rng = random.Random(seed)
    method = rng.choice(["beam_search", "dvts"])
    completed = rng.choice(["leave", "occupy", "compete"])
    tree = RandomTree(seed, end=0.3, length=0.1, empty=0.1, blank=0.1)
    config = SearchConfig(method, n=8, expand=rng.choice([2, 4]), max_steps=5, completed=completed,
                          aggregate=rng.choice(["last", "min", "prod"]), dedupe=rng.random() < 0.5,
                          lookahead=rng.choice([0, 1]))  # fmt: skip
    try:
        expected = search(PROBLEMS[:3], *drivers(tree), config, progress=False)
    except SearchError as error:  # a tree of nothing but empty texts
        with pytest.raises(SearchError, match=re.escape(str(error))):
            search(PROBLEMS[:3], ScriptedPolicy(tree.step), Pruner(tree.scores), config, progress=False)
        return
    found = search(PROBLEMS[:3], ScriptedPolicy(tree.step), Pruner(tree.scores), config, progress=False)
    assert list(map(outcome, found)) == list(map(outcome, expected))


@pytest.mark.parametrize(
    "choose",
    [
        lambda keep, ranked: ranked[: keep - 1],
        lambda keep, ranked: [ranked[0]] * keep,
        lambda keep, ranked: [*ranked[: keep - 1], 99],
    ],
)
def test_survivors_that_are_not_of_their_group_are_an_error(choose):
    verifier = Pruner(score_names({}))
    verifier.choose = choose
    config = SearchConfig(n=4, expand=2, max_steps=3)
    with pytest.raises(SearchError, match=r"verifier: expected \[2\] survivors of the groups \(\(0, 1, 2, 3\),\), got"):
        search(["p"], ScriptedPolicy(by_name()), verifier, config, progress=False)


@pytest.mark.parametrize("how", AGGREGATES)
@pytest.mark.parametrize("method", ["best_of_n", "beam_search", "dvts", "rebase", "ets", "puct"])
@pytest.mark.parametrize("seed", range(3))
def test_infinite_scores_lose_no_search(seed, method, how):
    """Where their aggregate is not defined a branch ranks last: nothing is NaN, and every order is one."""
    tree = RandomTree(seed, end=0.3, answers=("1", "2"))
    levels = (math.inf, -math.inf, 0.0, 0.5)
    verifier = ScriptedVerifier(lambda *branch: [levels[int(4 * score)] for score in tree.scores(*branch)])
    base = SearchConfig(n=8, expand=2, max_steps=5, aggregate=how, sort_completed=True)
    config = base.with_method(method)
    (result,) = search(["p"], ScriptedPolicy(tree.step), verifier, config, progress=False)
    assert any(math.isinf(score) for node in result.tree.nodes for score in node.scores)
    scores = [completion.score for completion in result.completions]
    assert scores == sorted(scores, reverse=True)
    finished = [one for one in result.completions if one.finished] or result.completions
    assert result.best.score == max(one.score for one in finished)
    for vote in VOTES:
        assert result.answer(vote) in {one.answer for one in finished if one.answer} or {""}


def test_shorthands():
    tree = RandomTree(5, end=0.3)
    for shorthand, method in ((best_of_n, "best_of_n"), (beam_search, "beam_search"), (dvts, "dvts")):
        (result,) = shorthand(["p"], *drivers(tree), n=8, aggregate="min", progress=False)
        (expected,) = search(["p"], *drivers(tree), SearchConfig(method, n=8, aggregate="min"), progress=False)
        assert outcome(result) == outcome(expected)
        assert result.config.method == method


def test_scripted_drivers_follow_the_protocol():
    policy, verifier = drivers(RandomTree(1))
    assert isinstance(policy, Policy)
    assert isinstance(verifier, Verifier)
    assert not isinstance(verifier, PruningVerifier)
    assert isinstance(Pruner(score_names({})), PruningVerifier)


def test_stats():
    tree = RandomTree(1, end=0.1)
    (result,) = search(["p"], *drivers(tree), SearchConfig(n=4, expand=2, max_steps=4), progress=False)
    assert result.stats.branches == len(result.tree.nodes) - 1
    assert result.stats.rounds == max(node.round for node in result.tree.nodes)
    assert result.stats.wall_s > 0

"""Equal texts are one branch for the verifier, and this changes no search."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import tts_search.engine.scheduler
from hypothesis import given, settings
from scripted import RandomTree, ScriptedPolicy, ScriptedVerifier, by_name, score_names
from test_engine import CONFIGS, PROBLEMS, TREES, Pruner, outcome
from tts_search import SearchConfig, SearchError, Step, Usage, search, search_iter
from tts_search.engine.sharing import SharedVerifier
from tts_search.evaluation.smaller_n import with_smaller_n
from tts_search.search.protocol import Score, ScoreAndPrune, Scored, Verifier, answers_of


class Apart:
    """Shows the verifier every branch, and leaves the pruning to the search."""

    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier
        self.begin, self.end = verifier.begin, verifier.end
        self.scored: set[tuple[int, int]] = set()

    def score(self, requests: Sequence[Score]) -> Sequence[Sequence[float] | Exception]:
        self.scored |= {(request.problem, request.branch) for request in requests}
        return self.verifier.score(requests)

    def score_and_prune(self, requests: Sequence[ScoreAndPrune]) -> list[Scored | Exception]:
        return [Scored(self.score([c for c in r.candidates if isinstance(c, Score)])) for r in requests]

    def release(self, problem: int, branches: Sequence[int]) -> None:
        own = {(problem, branch) for branch in branches} & self.scored
        self.scored -= own
        self.verifier.release(problem, [branch for _, branch in own])


class Watching(ScriptedVerifier):
    """Fails at a text that it has already."""

    def _score(self, request: Score) -> Sequence[float]:
        text = (request.steps, request.lookahead)
        assert text not in self._texts(request.problem).values()
        self._texts(request.problem)[request.branch] = text
        return super()._score(request)

    def release(self, problem: int, branches: Sequence[int]) -> None:
        super().release(problem, branches)
        for branch in branches:
            del self._texts(problem)[branch]

    def _texts(self, problem: int) -> dict:
        self.texts = getattr(self, "texts", {})
        return self.texts.setdefault(problem, {})


class WatchingPruner(Watching, Pruner):
    pass


def outcomes(tree: RandomTree, verifier: Verifier, config: SearchConfig) -> dict:
    found = search_iter(PROBLEMS[:3], ScriptedPolicy(tree.step), verifier, config, progress=False)
    return {index: str(one) if isinstance(one, SearchError) else outcome(one) for index, one in found}


@pytest.mark.parametrize("kind", [Watching, WatchingPruner])
@settings(max_examples=150, deadline=None)
@given(tree=TREES, config=CONFIGS)
def test_a_search_decides_as_without_sharing(kind, tree, config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tts_search.engine.scheduler, "SharedVerifier", Apart)
        apart = ScriptedVerifier(tree.scores)
        expected = outcomes(tree, apart, config)
    verifier = kind(tree.scores)
    assert outcomes(tree, verifier, config) == expected
    assert not verifier.problems
    assert sum(map(len, verifier.calls)) <= sum(map(len, apart.calls))


def test_texts_are_read_once_whoever_their_parents_are():
    """Two of three first steps are alike, and so are all that follow the same text."""
    step = lambda _, steps, number, *__: Step("ab"[number == 2] + "\n\n" if not steps else "c\n\n", False)  # noqa: E731
    verifier = Watching(score_names({"a": 0.9, "b": 0.5, "c": 0.1}))
    config = SearchConfig(n=3, expand=1, max_steps=3)
    (result,) = search(["p"], ScriptedPolicy(step), verifier, config, progress=False)
    assert [node.text for node in result.tree.nodes[1:4]] == ["a\n\n", "a\n\n", "b\n\n"]
    assert [[request.branch for request in call] for call in verifier.calls] == [[1, 3], [4, 6], [7, 9]]
    assert [request.parent for request in verifier.calls[1]] == [1, 3]
    assert [node.score for node in result.tree.nodes[1:4]] == [0.9, 0.9, 0.5]


def test_ties_go_to_the_earlier_of_equal_candidates():
    folded = []

    class Looking(Pruner):
        def _round(self, request):
            folded.append(request)
            return super()._round(request)

    texts = ("b", "a", "a", "b", "a", "c")
    shared = SharedVerifier(Looking(score_names({"a": 0.9, "b": 0.5, "c": 0.5})))
    shared.begin(0, "p")
    candidates = tuple(Score(0, number, (text,), 0) for number, text in enumerate(texts, 1))
    (answer,) = answers_of(shared, [ScoreAndPrune(0, (*candidates, 0.5), ((0, 1, 2, 3, 6, 4), (5,)), (5, 1), "last")])
    assert answer == Scored([[0.5], [0.9], [0.9], [0.5], [0.9], [0.5]], [[1, 2, 4, 0, 3], [5]])
    (request,) = folded
    assert [each.branch if isinstance(each, Score) else each for each in request.candidates] == [1, 2, 6, 0.5]
    assert request.groups == ((0, 1, 1, 0, 3, 1), (2,))


def test_a_text_that_is_known_is_a_candidate_with_its_score():
    verifier = Pruner(score_names({"a": 0.9, "b": 0.95}))
    shared = SharedVerifier(verifier)
    shared.begin(0, "p")
    assert answers_of(shared, [Score(0, 1, ("a",), 0)]) == [[0.9]]
    known, new = Score(0, 2, ("a",), 0), Score(0, 3, ("b",), 0)
    (answer,) = answers_of(shared, [ScoreAndPrune(0, (known, new), ((0, 1),), (1,), "min")])
    assert answer == Scored([[0.9], [0.95]], [[1]])
    (answer,) = answers_of(shared, [ScoreAndPrune(0, (Score(0, 4, ("a",), 0),), ((0,),), (1,), "min")])
    assert answer == Scored([[0.9]])  # there was nothing to ask
    assert [[request.branch for request in call] for call in verifier.calls] == [[1], [3]]


def test_a_text_is_released_with_its_last_branch():
    verifier = Watching(score_names({}))
    shared = SharedVerifier(verifier)
    shared.begin(0, "p")
    answers_of(shared, [Score(0, 1, ("a",), 0), Score(0, 2, ("a",), 0), Score(0, 3, ("a",), 0, ("b",))])
    live = verifier.problems[0].live
    shared.release(0, [0, 1, 7])  # the root and a branch without a step were never scored
    assert set(live) == {0, 1, 3}
    answers_of(shared, [Score(0, 4, ("a", "c"), 2)])
    assert verifier.calls[-1][0].parent == 1
    shared.release(0, [2])
    assert set(live) == {0, 3, 4}
    assert answers_of(shared, [Score(0, 5, ("a",), 0)]) == [[0.0]]  # forgotten, so read anew
    assert set(live) == {0, 3, 4, 5}
    shared.end(0)
    assert not verifier.problems


def test_the_failure_of_a_text_is_that_of_all_its_branches():
    class Failing(ScriptedVerifier):
        def score(self, requests):
            return [ValueError(request.steps[0]) if request.steps[0] == "a" else [1.0] for request in requests]

    shared = SharedVerifier(Failing(score_names({})))
    shared.begin(0, "p")
    answers = answers_of(shared, [Score(0, number, (text,), 0) for number, text in enumerate("aba", 1)])
    assert [str(answer) for answer in answers] == ["a", "[1.0]", "a"]


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_verifier_that_prunes_has_to_score_each_candidate(extra):
    class Short(Pruner):
        def _round(self, request):
            scored = super()._round(request)
            return Scored([*scored.scores, [0.0]][: len(scored.scores) + extra], scored.survivors)

    config = SearchConfig(n=4, expand=2, max_steps=3)
    with pytest.raises(SearchError, match=f"expected scores of 4 candidates, got {4 + extra}"):
        search(["p"], ScriptedPolicy(by_name()), Short(score_names({})), config, progress=False)


def test_survivors_of_too_many_groups_are_refused():
    class Many(Pruner):
        def _round(self, request):
            scored = super()._round(request)
            return Scored(scored.scores, [*scored.survivors, [0]])

    with pytest.raises(SearchError, match=r"expected \[2\] survivors of the groups"):
        search(["p"], ScriptedPolicy(by_name()), Many(score_names({})), SearchConfig(n=4, expand=2), progress=False)


def test_the_first_completions_cost_what_they_would_have_cost_alone():
    """Four words, so that most of 16 completions repeat another; each counts once for the verifier."""

    class Counting(ScriptedVerifier):
        def end(self, problem):
            tokens = sum(2 * len(steps) for steps in self.problems[problem].live.values())
            super().end(problem)
            return Usage(tokens=tokens)

    tree = RandomTree(3, words=4)
    few, many = (
        search(["p"], ScriptedPolicy(tree.step), Counting(tree.scores), SearchConfig("best_of_n", n=n), progress=False)[
            0
        ]
        for n in (4, 16)
    )
    assert few.stats.verifier_tokens == 2 * sum({one.text: len(one.steps) for one in few.completions}.values())
    assert 0 < many.stats.verifier_tokens < 16 / 4 * few.stats.verifier_tokens
    assert with_smaller_n(many, 4).stats.verifier_tokens == few.stats.verifier_tokens


def test_nan_fails_whoever_shares_it():
    scores = lambda _, steps: [math.nan] * len(steps)  # noqa: E731
    with pytest.raises(SearchError, match="got NaN among"):
        search(["p"], ScriptedPolicy(lambda *_: Step("a", True)), ScriptedVerifier(scores), progress=False)

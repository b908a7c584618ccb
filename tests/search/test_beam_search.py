"""The decisions of beam search, DVTS and best-of-N, on trees that are small enough to follow by hand."""

from __future__ import annotations

import math

import pytest
from scripted import ScriptedPolicy, ScriptedVerifier, by_name, name_of, names, score_names
from tts_search import SearchConfig, SearchError, SearchResult, Step, search


def run(step_fn, score_fn, **options) -> tuple[SearchResult, ScriptedPolicy, ScriptedVerifier]:
    policy, verifier = ScriptedPolicy(step_fn), ScriptedVerifier(score_fn)
    return search(["problem"], policy, verifier, SearchConfig(**options), progress=False)[0], policy, verifier


def nodes(result: SearchResult, state: str, at_round: int | None = None) -> list[str]:
    found = [node for node in result.tree.nodes[1:] if node.state == state]
    return [name_of(node.text) for node in found if at_round in (None, node.round)]


def completions(result: SearchResult) -> list[str]:
    return [name_of(completion.steps[-1]) for completion in result.completions]


def scored(verifier: ScriptedVerifier, call: int) -> list[str]:
    return [name_of(request.steps[-1]) for request in verifier.calls[call]]


def test_children_are_dealt_cyclically_to_survivors_in_candidate_order():
    scores = {"1": 0.5, "3": 0.9, "4": 0.7}
    result, policy, verifier = run(by_name(), score_names(scores), n=5, expand=2, keep=3, max_steps=2)
    assert scored(verifier, 0) == ["0", "1", "2", "3", "4"]
    assert nodes(result, "expanded") == ["1", "3", "4"]  # not in order of score
    assert scored(verifier, 1) == ["1.0", "3.0", "4.0", "1.1", "3.1"]
    # A request a branch, in the order of their first children; a branch's samples go to its children in order.
    assert [(name_of(r.steps[-1]), len(r.children)) for r in policy.calls[1]] == [("1", 2), ("3", 2), ("4", 1)]
    assert [r.children for r in policy.calls[1]] == [(6, 9), (7, 10), (8,)]


def test_default_keep_is_n_over_expand():
    result, _, _ = run(by_name(), score_names({}), n=16, expand=4, max_steps=3)
    assert [len(nodes(result, "expanded", r)) for r in (1, 2, 3)] == [4, 4, 0]
    assert [len(nodes(result, "pruned", r)) for r in (1, 2, 3)] == [12, 12, 0]
    assert len(result.completions) == 16


def test_n_smaller_than_expand_keeps_one():
    result, _, _ = run(by_name(), score_names({}), n=2, expand=4, max_steps=3)
    assert nodes(result, "expanded") == ["0", "0.0"]


def test_ties_go_to_the_earlier_candidate():
    result, _, _ = run(by_name(), score_names({}, default=0.5), n=6, expand=2, max_steps=2)
    assert nodes(result, "expanded") == ["0", "1", "2"]


def test_negative_zero_ties_with_zero():
    result, _, _ = run(by_name(), score_names({"0": -0.0, "1": 0.0}), n=2, expand=2, max_steps=2)
    assert nodes(result, "expanded") == ["0"]


def test_last_round_runs_without_a_delimiter():
    _, policy, _ = run(by_name(), score_names({}), n=4, expand=2, max_steps=3)
    assert [call[0].params.delimiter for call in policy.calls] == ["\n\n", "\n\n", None]


def test_params_reach_the_policy():
    options = {"temperature": 0.3, "top_p": 0.5, "top_k": 7, "max_step_tokens": 9, "delimiter": "##"}
    _, policy, _ = run(by_name(), score_names({}), n=2, expand=2, max_steps=2, **options)
    params = policy.calls[0][0].params
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.3, 0.5, 7, 9)
    assert params.delimiter == "##"


def test_finished_at_first_round_ends_the_search():
    result, policy, verifier = run(by_name(finished="0123"), score_names({"2": 0.9}), n=4, expand=2)
    assert len(policy.calls) == len(verifier.calls) == result.stats.rounds == 1
    assert completions(result) == ["0", "1", "2", "3"]
    assert result.best.text == "end 2"


class TestLeave:
    """completed="leave": finished branches leave, the beam is refilled."""

    def test_refill(self):
        # 0 and 3 finish; among 1 and 2 both survive (keep 2), and share four new candidates
        result, _, verifier = run(by_name(finished="03"), score_names({"0": 0.9}), n=4, expand=2, max_steps=2)
        assert scored(verifier, 0) == ["0", "1", "2", "3"]  # finished ones are scored as well
        assert scored(verifier, 1) == ["1.0", "2.0", "1.1", "2.1"]
        assert completions(result) == ["0", "3", "1.0", "2.0", "1.1", "2.1"]  # in order of finishing

    def test_refill_from_fewer_than_keep(self):
        _, policy, verifier = run(by_name(finished="013"), score_names({}), n=4, expand=2, max_steps=2)
        assert scored(verifier, 1) == ["2.0", "2.1", "2.2", "2.3"]
        assert len(policy.calls[1]) == 1

    def test_a_low_score_does_not_prune_a_finished_branch(self):
        result, _, _ = run(by_name(finished="0"), score_names({"0": -5.0}), n=4, expand=2, max_steps=2)
        assert completions(result)[0] == "0"
        assert nodes(result, "finished")[0] == "0"

    def test_unfinished_come_last(self):
        unfinished = Step("cut", False, 1, reason="length")
        step_fn = by_name(finished=["1"], **{"0.0": unfinished, "2.1": Step("2.1", True)})
        result, _, _ = run(step_fn, score_names({"0": 0.2, "2": 0.1}), n=4, expand=2, max_steps=2)
        assert completions(result) == ["1", "2.0", "0.1", "2.1", "cut"]
        assert [completion.finished for completion in result.completions] == [True] * 4 + [False]
        assert nodes(result, "open") == ["cut"]

    def test_stop_when_full(self):
        step_fn = by_name(finished=["0", "1", "2.0", "3.0"])
        options = {"n": 4, "expand": 2, "max_steps": 9}
        result, policy, _ = run(step_fn, score_names({}), stop_when_full=True, **options)
        assert len(policy.calls) == 2
        assert completions(result) == ["0", "1", "2.0", "3.0", "2.1", "3.1"]  # two were still alive
        result, policy, _ = run(step_fn, score_names({}), **options)
        assert len(policy.calls) == 9


class TestOccupy:
    """completed="occupy": a finished branch that survives keeps its place for good."""

    def test_frozen_place_makes_no_candidates(self):
        scores = {"1": 0.9, "2": 0.8}
        result, _, verifier = run(
            by_name(finished="1"), score_names(scores), n=6, expand=3, max_steps=2, completed="occupy"
        )
        assert scored(verifier, 1) == ["2.0", "2.1", "2.2"]  # one place of two is left
        assert completions(result) == ["1", "2.0"]  # the last round, too, has one place
        assert nodes(result, "pruned", 2) == ["2.1", "2.2"]

    def test_a_finished_branch_has_to_win_its_place(self):
        result, _, _ = run(
            by_name(finished="0"), score_names({"0": -1.0}), n=4, expand=2, max_steps=2, completed="occupy"
        )
        assert "0" not in completions(result)
        assert "0" in nodes(result, "pruned", 1)

    def test_frozen_place_is_safe_from_better_ones(self):
        scores = {"0": 0.5, "1": 0.4, "1.0": 0.9, "1.1": 0.9}
        result, _, _ = run(by_name(finished="0"), score_names(scores), n=4, expand=2, max_steps=2, completed="occupy")
        assert completions(result) == ["0", "1.0"]

    def test_all_places_taken_ends_the_search(self):
        scores = {"0": 0.9, "2": 0.8}
        result, policy, _ = run(by_name(finished="02"), score_names(scores), n=4, expand=2, completed="occupy")
        assert len(policy.calls) == 1
        assert completions(result) == ["0", "2"]


class TestCompete:
    """completed="compete": a finished branch keeps its score and competes each round."""

    def test_it_can_lose_its_place(self):
        scores = {"0": 0.5, "1": 0.4, "1.0": 0.6, "1.1": 0.9}
        result, _, verifier = run(
            by_name(finished="0"), score_names(scores), n=4, expand=2, max_steps=3, completed="compete"
        )
        assert scored(verifier, 1) == ["1.0", "1.1"]  # its place makes no candidates, and it is not scored again
        assert nodes(result, "pruned", 1) == ["0", "2", "3"]
        assert "0" not in completions(result)

    def test_it_can_win_again(self):
        scores = {"0": 0.5, "1": 0.4, "1.0": 0.1, "1.1": 0.2}
        result, _, _ = run(by_name(finished="0"), score_names(scores), n=4, expand=2, max_steps=2, completed="compete")
        assert completions(result) == ["0", "1.1"]
        assert result.best.text == "end 0"

    def test_it_ties_by_its_turn(self):
        scores = {"0": 0.5, "1": 0.5, "0.0": 0.5, "0.1": 0.5}
        result, _, _ = run(by_name(finished="1"), score_names(scores), n=4, expand=2, max_steps=2, completed="compete")
        assert completions(result) == ["1", "0.0"]  # candidates: 0.0, 1, 0.1, the first two of which survive


class TestDVTS:
    def test_one_survivor_in_each_subtree(self):
        scores = {"1": 0.1, "4": 0.9, "5": 0.8}
        result, _, verifier = run(by_name(), score_names(scores), method="dvts", n=6, expand=3, max_steps=2)
        assert nodes(result, "expanded") == ["1", "4"]  # 5 is better than 1, but in another subtree
        assert scored(verifier, 1) == ["1.0", "1.1", "1.2", "4.0", "4.1", "4.2"]

    def test_one_call_a_round_for_all_subtrees(self):
        _, policy, verifier = run(by_name(), score_names({}), method="dvts", n=16, expand=4, max_steps=3)
        assert len(policy.calls) == len(verifier.calls) == 3
        assert len(policy.calls[0]) == 1  # the root once, for all its 16 children
        assert len(policy.calls[1]) == 4

    def test_a_subtree_ends_by_itself(self):
        result, policy, _ = run(by_name(finished="01"), score_names({}), method="dvts", n=4, expand=2, max_steps=3)
        assert [len(call) for call in policy.calls] == [1, 1, 1]
        assert completions(result) == ["0", "1", "2.0.0", "2.0.1"]

    @pytest.mark.parametrize("completed", ["occupy", "compete"])
    def test_a_finished_winner_ends_its_subtree(self, completed):
        result, _, _ = run(
            by_name(finished="1"),
            score_names({"1": 0.9}),
            method="dvts",
            n=4,
            expand=2,
            max_steps=2,
            completed=completed,
        )
        assert completions(result) == ["1", "2.0"]


class TestBestOfN:
    def test_one_call_without_a_delimiter(self):
        texts = ["a\n\nb\n\n\\boxed{1}", "c", "d\n\n", "\n\ne\n\n\n\nf"]
        step_fn = lambda _, __, number, ___, ____: Step(texts[number], number != 1, 3)  # noqa: E731
        result, policy, verifier = run(step_fn, lambda _, steps: range(len(steps)), method="best_of_n", n=4)
        assert len(policy.calls) == len(verifier.calls) == 1
        assert policy.calls[0][0].params.delimiter is None
        # Cut into steps for the verifier, none of them blank
        assert [request.steps for request in verifier.calls[0]] == [
            ("a\n\n", "b\n\n", "\\boxed{1}"),
            ("c",),
            ("d\n\n",),
            ("\n\ne\n\n", "\n\nf"),
        ]
        assert [completion.text for completion in result.completions] == texts
        assert [completion.score for completion in result.completions] == [2, 0, 0, 1]
        assert [completion.finished for completion in result.completions] == [True, False, True, True]

    def test_best_is_finished_if_any_is(self):
        step_fn = lambda _, __, number, ___, ____: Step(str(number), number == 1)  # noqa: E731
        result, _, _ = run(step_fn, lambda _, steps: [0.9 if steps[0] != "1" else 0.1], method="best_of_n", n=3)
        assert result.best.text == "1"
        result, _, _ = run(
            lambda _, __, number, ___, ____: Step(str(number), False),
            lambda _, steps: [int(steps[0]) % 2],
            method="best_of_n",
            n=4,
        )
        assert result.best.text == "1"  # none is: the best of all, the earliest of 1 and 3

    def test_without_a_verifier(self):
        step_fn = lambda _, __, number, ___, ____: Step(f"\\boxed{{{number % 2}}}", True)  # noqa: E731
        result = search(["p"], ScriptedPolicy(step_fn), config=SearchConfig(method="best_of_n", n=3), progress=False)[0]
        assert all(math.isnan(completion.score) for completion in result.completions)
        assert result.completions[0].step_scores == ()
        assert result.answer("majority") == "0"
        with pytest.raises(ValueError, match=r"majority"):
            result.answer("prm_max")

    def test_token_limit(self):
        for options, limit in (({}, 2048), ({"max_step_tokens": 9}, 9), ({"max_step_tokens": 9, "max_tokens": 30}, 30)):
            _, policy, _ = run(by_name(), score_names({}), method="best_of_n", n=1, **options)
            assert policy.calls[0][0].params.max_tokens == limit

    def test_sorted(self):
        result, _, _ = run(by_name(), score_names({"1": 0.5, "2": 0.5}), method="best_of_n", n=4, sort_completed=True)
        assert completions(result) == ["1", "2", "0", "3"]


def test_sort_completed():
    scores = {"0": 0.1, "1": 0.9, "2.0": 0.5, "3.0": 0.1}
    step_fn = by_name(finished=["0", "1", "2.0", "3.0", "2.1", "3.1"])
    result, _, _ = run(step_fn, score_names(scores), n=4, expand=2, sort_completed=True)
    assert completions(result) == ["1", "2.0", "0", "3.0", "2.1", "3.1"]


def test_dedupe_drops_later_candidates_of_equal_text():
    same = Step("same\n\n", False, 1)
    step_fn = by_name(**{"0": same, "2": same, "3": Step("3\n\n", False)})
    scores = {"same": 0.9, "1": 0.5, "3": 0.6}
    result, _, verifier = run(step_fn, score_names(scores), n=4, expand=2, max_steps=2, dedupe=True)
    assert nodes(result, "expanded") == ["same", "3"]
    assert scored(verifier, 0) == ["same", "1", "3"]  # what is dropped need not be read
    assert nodes(result, "pruned", 1) == ["1", "same"]
    result, _, _ = run(step_fn, score_names(scores), n=4, expand=2, max_steps=2)
    assert nodes(result, "expanded") == ["same", "same"]


def test_dedupe_compares_whole_texts_and_spares_the_finished():
    same = {"1.0": Step("x", True), "2.0": Step("x", True)}
    step_fn = by_name(finished=["1"], **{"0": Step("end 1", False), **same})
    result, _, _ = run(step_fn, score_names({}), n=3, expand=1, max_steps=2, dedupe=True)
    # 0 has the text of 1, which has left; their children add the same text to different ones
    assert completions(result)[:3] == ["1", "x", "x"]


class TestLookahead:
    def test_only_the_verifier_reads_it(self):
        step_fn = by_name(finished=["1.0"])
        scores = {"0.0.0": 0.1, "1.0": 0.9}
        result, policy, verifier = run(step_fn, score_names(scores, 0.5), n=2, expand=2, max_steps=2, lookahead=2)
        first = verifier.calls[0]
        assert [names(request.steps) for request in first] == [["0"], ["1"]]
        assert [names(request.lookahead) for request in first] == [["0.0", "0.0.0"], ["1.0"]]  # 1.0 ends the answer
        assert [len(call) for call in policy.calls] == [1, 2, 1, 1]
        for call in policy.calls[1:3]:
            assert all(r.params.temperature == 0 and r.params.top_k == 0 and r.params.top_p == 1 for r in call)
        assert nodes(result, "expanded") == ["1"]  # by the score of what came after
        # The lookahead is no part of the tree or of any text
        assert [name_of(node.text) for node in result.tree.nodes[1:]] == ["0", "1", "1.0", "1.1"]
        assert policy.calls[3][0].steps == ("1\n\n",)
        assert policy.calls[3][0].branch == 2

    def test_scores_of_the_last_scoring(self):
        result, _, _ = run(
            by_name(finished=["0"]), score_names({"1.0": 0.7}, 0.5), n=2, expand=2, max_steps=2, lookahead=1
        )
        states = {name_of(node.text): node for node in result.tree.nodes[1:]}
        assert states["0"].scores == (0.5,)  # finished: nothing to look ahead to
        assert states["1"].scores == (0.5, 0.7)
        assert states["1.0"].scores == (0.5, 0.7)  # the last round has no lookahead; the verifier read "1", "end 1.0"

    def test_greedy_step_of_no_text(self):
        def step_fn(problem, steps, number, seed, params):
            return Step("", False) if params.temperature == 0 else by_name()(problem, steps, number, seed, params)

        _, policy, verifier = run(step_fn, score_names({}), n=2, expand=2, max_steps=2, lookahead=3)
        assert [request.lookahead for request in verifier.calls[0]] == [(), ()]
        assert len(policy.calls) == 3


class TestTokens:
    def test_max_tokens_caps_a_branch(self):
        step_fn = lambda _, __, ___, ____, params: Step("x\n\n", False, min(4, params.max_tokens))  # noqa: E731
        result, policy, _ = run(step_fn, score_names({}), n=2, expand=2, max_steps=9, max_step_tokens=6, max_tokens=10)
        assert [call[0].params.max_tokens for call in policy.calls] == [6, 6, 2]
        assert [completion.num_tokens for completion in result.completions] == [10, 10]
        assert not any(completion.finished for completion in result.completions)

    def test_a_capped_branch_leaves_the_beam(self):
        def step_fn(_, steps, number, *__):
            return Step(f"{number}\n\n", False, 10 if number == 0 and not steps else 1)

        result, policy, _ = run(step_fn, score_names({"0": 0.9}), n=2, expand=2, max_steps=2, max_tokens=10)
        assert policy.calls[1][0].steps == ("1\n\n",)
        assert [completion.num_tokens for completion in result.completions] == [10, 2, 2]


class TestBlankSteps:
    def test_blank_step_joins_the_next(self):
        blank = Step("\n\n", False, 1)

        def step_fn(_, steps, number, *__):
            return blank if not steps else Step("a" if number else "b", True, 1)

        result, policy, verifier = run(step_fn, lambda _, steps: [0.5] * len(steps), n=2, expand=2)
        assert policy.calls[1][0].steps == ("\n\n",)  # the policy's text is as generated
        assert len(verifier.calls) == 1
        assert [request.steps for request in verifier.calls[0]] == [("\n\nb",), ("\n\na",)]
        assert [completion.text for completion in result.completions] == ["\n\nb", "\n\na"]
        assert result.tree.nodes[1].score == -math.inf  # no step yet

    def test_blank_end_stays_with_the_last_step(self):
        def step_fn(_, steps, *__):
            return Step("a\n\n", False) if not steps else Step(" \n", True)

        result, _, verifier = run(step_fn, lambda _, steps: [0.25] * len(steps), n=2, expand=2)
        assert len(verifier.calls) == 1  # nothing new to read
        assert result.best.steps == ("a\n\n \n",)
        assert result.best.step_scores == (0.25,)
        assert result.best.text == "".join(result.best.steps)

    def test_empty_finished_text_adds_no_step(self):
        def step_fn(_, steps, number, *__):
            return Step("", True) if steps and number else Step(f"{len(steps)}\n\n", False)

        result, _, verifier = run(step_fn, lambda _, steps: [0.5, 0.75][: len(steps)], n=2, expand=2, max_steps=2)
        best = result.completions[0]
        assert (best.text, best.steps, best.step_scores, best.score) == ("0\n\n", ("0\n\n",), (0.5,), 0.5)
        assert best.finished
        assert [len(call) for call in verifier.calls] == [1, 1]  # both first steps are alike

    def test_empty_answer(self):
        result, _, verifier = run(lambda *_: Step("", True), score_names({}), n=2, expand=2)
        assert verifier.calls == []
        assert result.best.text == ""
        assert result.best.steps == ()
        assert result.best.score == -math.inf

    def test_one_empty_sample_is_dropped(self):
        step_fn = by_name(**{"1": Step("", False)})
        result, _, verifier = run(step_fn, score_names({"2": 1.0}), n=3, expand=3, max_steps=2)
        assert scored(verifier, 0) == ["0", "2"]
        assert result.tree.nodes[2].state == "pruned"


class TestBadDrivers:
    """Bad answers raise an error that names the problem and the round."""

    @pytest.mark.parametrize("method", ["best_of_n", "beam_search", "dvts"])
    def test_policy_returns_nothing(self, method):
        with pytest.raises(SearchError, match=r"^problem 0, round 1: policy: .*nothing") as caught:
            run(lambda *_: Step("", False), score_names({}), method=method, n=4)
        assert (caught.value.problem, caught.value.round) == (0, 1)

    def test_policy_returns_nothing_later(self):
        step_fn = lambda _, steps, *__: Step("", False) if len(steps) == 2 else Step("a\n\n", False)  # noqa: E731
        with pytest.raises(SearchError, match=r"problem 0, round 3: policy: .*nothing"):
            run(step_fn, score_names({}), n=4, expand=2)

    def test_nothing_more_is_fine_where_something_is_finished(self):
        step_fn = lambda _, steps, number, *__: Step("" if steps else f"{number}", not steps and number == 0)  # noqa: E731
        for completed in ("leave", "occupy", "compete"):
            result, _, _ = run(step_fn, score_names({"0": 0.9}), n=4, expand=2, completed=completed)
            assert completions(result) == ["0"]

    def test_policy_returns_too_few(self):
        class Short(ScriptedPolicy):
            def expand(self, requests):
                return [steps[:-1] for steps in super().expand(requests)]

        with pytest.raises(SearchError, match=r"round 1: policy: expected 4 steps for branch 0, one per sample, got 3"):
            search(["p"], Short(by_name()), ScriptedVerifier(score_names({})), SearchConfig(n=4), progress=False)

    def test_policy_returns_no_steps(self):
        with pytest.raises(SearchError, match=r"policy: expected a Step"):
            run(lambda *_: Step(None, True), score_names({}), n=4)  # type: ignore[arg-type]

    def test_verifier_returns_nan(self):
        scores = lambda _, steps: [math.nan if len(steps) == 2 else 0.5] * len(steps)  # noqa: E731
        with pytest.raises(SearchError, match=r"problem 0, round 2: verifier: expected numbers for branch .*NaN"):
            run(by_name(), scores, n=4)

    @pytest.mark.parametrize("count", [0, 1, 3])
    def test_verifier_returns_another_number_of_scores(self, count):
        scores = lambda _, steps: [0.5] * (len(steps) if len(steps) < 2 else count)  # noqa: E731
        with pytest.raises(SearchError, match=rf"round 2: verifier: expected 2 scores for branch .*, got {count}"):
            run(by_name(), scores, n=4)

    def test_verifier_returns_no_numbers(self):
        with pytest.raises(SearchError, match=r"verifier: expected numbers"):
            run(by_name(), lambda _, steps: ["good"] * len(steps), n=4)

    def test_infinite_scores_are_scores(self):
        result, _, _ = run(by_name(), score_names({"1": math.inf, "0": -math.inf}), n=2, expand=2, max_steps=2)
        assert nodes(result, "expanded") == ["1"]

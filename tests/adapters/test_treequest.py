"""TreeQuest with our models: a batch of trials is one call; its own AB-MCTS if the package is installed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from scripted import ScriptedPolicy, ScriptedVerifier
from tts_search import MissingExtraError, SearchError, Step
from tts_search.adapters.treequest import Answer, Generator, ab_mcts, refined


def generator(score=lambda steps: [len(steps[-1]) % 10 / 10] * len(steps), **options):
    """Answers say what they refine; the score is the last digit of the length."""

    def step(problem, _, __, seed, params):
        assert params.delimiter is None
        return Step(f"{'better ' if 'earlier' in problem else ''}{'x' * (seed % 7)} end", True, 3, reason="eos")

    policy, verifier = ScriptedPolicy(step), ScriptedVerifier(lambda _, steps: score(steps))
    return Generator("p", policy, verifier, **options), policy


def test_a_node_below_an_answer_refines_it():
    generate, policy = generator()
    first, score = generate(None)
    assert score == len(first.text.strip()) % 10 / 10
    second, _ = generate(first)
    assert second.text.startswith("better ")
    assert first.text in refined("p", first.text)
    assert len(policy.calls) == 2
    generate.close()
    assert not policy.problems


def test_a_batch_is_one_call_and_siblings_differ():
    generate, policy = generator()
    parent = Answer("a", True)
    found = generate.many([None, parent, None, parent])
    assert len(policy.calls) == 1
    assert [answer.text.startswith("better ") for answer, _ in found] == [False, True, False, True]
    again, _ = generator()
    assert [again(one) for one in (None, parent, None, parent)] == found, "one by one the same"


def test_scores_outside_of_what_priors_are_made_for():
    generate, _ = generator(lambda steps: [-3.0] * len(steps))
    with pytest.raises(SearchError, match=r"expected scores in \[0, 1\], got -3.0"):
        generate(None)


class Fake:
    """Asks below the root, then below the best; what it is told is noted."""

    def __init__(self):
        self.told = []

    def init_tree(self):
        return []

    def ask_batch(self, state, batch_size, actions):
        assert len(actions) == 1
        parent = max(state, key=lambda pair: pair[1])[0] if state else None
        return state, [SimpleNamespace(trial_id=str(i), parent_state=parent) for i in range(batch_size)]

    def tell(self, state, trial_id, result):
        self.told.append(trial_id)
        return [*state, result]


def test_the_budget_is_kept():
    generate, policy = generator()
    algorithm = Fake()
    found = ab_mcts(generate, budget=7, batch=3, algorithm=algorithm)
    assert algorithm.told == ["0", "1", "2", "0", "1", "2", "0"]
    assert len(policy.calls) == 3
    scores = [score for _, score in found]
    assert scores == sorted(scores, reverse=True)
    assert len(found) == 7
    with pytest.raises(ValueError, match="budget, batch: expected at least 1, got 0 and 5"):
        ab_mcts(generate, budget=0, algorithm=algorithm)


def test_without_treequest(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "treequest", None)
    with pytest.raises(MissingExtraError, match="treequest"):
        ab_mcts(generator()[0], budget=1)


def test_ab_mcts_itself():
    """Its own steps and batches of one grow the same tree; larger ones go deeper than the root, too."""
    treequest = pytest.importorskip("treequest")
    import numpy as np

    pairs = []
    for own in (True, False):
        np.random.seed(3)
        generate, _ = generator()
        algorithm = treequest.ABMCTSA(dist_type="beta")
        if own:
            state = algorithm.init_tree()
            for _ in range(12):
                state = algorithm.step(state, {"answer": generate})
            found = sorted(algorithm.get_state_score_pairs(state), key=lambda pair: -pair[1])
        else:
            found = ab_mcts(generate, budget=12, batch=1, algorithm=algorithm)
        pairs.append(found)
    assert pairs[0] == pairs[1]
    np.random.seed(0)
    found = ab_mcts(generator()[0], budget=40)
    assert len(found) == 40
    assert any(answer.text.startswith("better ") for answer, _ in found)

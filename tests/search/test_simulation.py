"""Search on trees of hidden quality: what should be better is better, by more than chance."""

from __future__ import annotations

import functools
import random

import pytest
from scripted import ScriptedPolicy, ScriptedVerifier
from tts_search import SearchConfig, Step, search

STEPS = 8
RIGHT = 0.7  # a step is right with this probability, if all before it were
PROBLEMS = [f"problem {i}" for i in range(100)]


def policy() -> ScriptedPolicy:
    """Each step is right or wrong; an answer is right if all of its steps are: 0.7**8, one sample in seventeen."""

    def step_fn(_, steps, __, seed, params):
        rng = random.Random(seed)
        count = len(steps)
        texts = []
        while count < STEPS:
            count += 1
            texts.append(f"{'right' if rng.random() < RIGHT else 'wrong'} {rng.randrange(10**6)}\n\n")
            if params.delimiter is not None:
                break
        finished = count == STEPS
        good = all(text.startswith("right") for text in [*steps, *texts])
        box = f"\\boxed{{{1 if good else rng.randrange(2, 10**6)}}}" if finished else ""
        return Step("".join(texts) + box, finished, len(texts))

    return ScriptedPolicy(step_fn)


def verifier(noise: float) -> ScriptedVerifier:
    """Sees whether all steps so far are right, through noise."""

    def score_fn(problem, steps):
        good, scores = True, []
        for count, step in enumerate(steps):
            good = good and "wrong" not in step
            scores.append(float(good) + noise * _noise(problem, steps[: count + 1]))
        return scores

    return ScriptedVerifier(score_fn)


@functools.cache
def _noise(problem, steps):
    return random.Random(f"{problem}{steps}").gauss(0, 1)


def accuracy(method: str, n: int, noise: float = 0.3, vote: str = "prm_max", **options) -> float:
    config = SearchConfig(max_steps=STEPS + 2).with_method(method, n=n, **options)
    results = search(PROBLEMS, policy(), verifier(noise), config, progress=False)
    return sum(result.answer(vote) == "1" for result in results) / len(results)


@pytest.fixture(scope="module")
def single():
    return accuracy("best_of_n", 1)


@pytest.fixture(scope="module")
def best_of_16():
    return accuracy("best_of_n", 16)


def test_single_samples_are_as_expected(single):
    assert single == pytest.approx(RIGHT**STEPS, abs=0.08)  # three standard deviations


def test_best_of_n_beats_the_single_sample(single, best_of_16):
    assert best_of_16 > single + 0.2


@pytest.mark.parametrize("completed", ["leave", "occupy", "compete"])
def test_beam_search_beats_best_of_n(best_of_16, completed):
    assert accuracy("beam_search", 16, completed=completed) > best_of_16 + 0.1


def test_dvts_beats_best_of_n(best_of_16):
    assert accuracy("dvts", 16) > best_of_16 + 0.1


def test_a_larger_budget_is_better():
    accuracies = [accuracy("beam_search", n) for n in (4, 16)]
    assert accuracies[1] > accuracies[0]


def test_a_worse_verifier_is_worse():
    assert accuracy("beam_search", 16, noise=1.5) < accuracy("beam_search", 16, noise=0.3) - 0.1


def test_beam_search_with_lookahead_beats_best_of_n(best_of_16):
    assert accuracy("beam_search", 16, lookahead=1) > best_of_16 + 0.1

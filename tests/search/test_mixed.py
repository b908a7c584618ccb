"""Several verifiers combined into one, and the gain over a single one without any known answers."""

from __future__ import annotations

import math
import random
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tts_search import SearchConfig, Step, TextPolicy, TextVerifier, search
from tts_search.search.protocol import Score, Usage
from tts_search.verifiers.mixed import MixedVerifier, Mixture, Normalization

SCORES = st.lists(st.floats(-1e6, 1e6), min_size=1)


def constant(value: float) -> TextVerifier:
    return TextVerifier(lambda branches: [[value] * len(steps) for _, steps in branches])


class Failing:
    def begin(self, problem, text): ...
    def release(self, problem, branches): ...
    def end(self, problem):  # noqa: ARG002
        return Usage(tokens=5, flops=2.0)

    def score(self, requests):
        return [ValueError("too long") if len(each.steps) > 1 else [0.0] for each in requests]


@given(SCORES, st.lists(st.floats(-1e7, 1e7), min_size=2))
def test_a_normalisation_keeps_order_and_stays_between_0_and_1(past, scores):
    normalize = Normalization.fitted(past)
    places = [normalize(score) for score in sorted(scores)]
    assert places == sorted(places)
    assert all(0 <= place <= 1 for place in places)


@given(SCORES, st.floats(0.001, 1000), st.integers(-1000, 1000))
def test_a_normalisation_does_not_see_the_scale(past, factor, offset):
    past = [round(score) for score in past]
    there = Normalization.fitted([factor * score + offset for score in past])
    for score in past:
        assert there(factor * score + offset) == pytest.approx(Normalization.fitted(past)(score))


def test_half_of_the_past_lies_above_the_middle():
    normalize = Normalization.fitted([0.99, 0.99, 0.5, math.nan, 0.999])
    assert [normalize(score) for score in (0.5, 0.99, 0.999)] == [0.125, 0.5, 0.875]
    assert normalize(0.745) == pytest.approx(0.3125)
    assert math.isnan(normalize(math.nan))


def test_a_weighted_mean_in_every_step_of_a_search():
    policy = TextPolicy(lambda requests: [[Step("a\n\nb", True)] * r.num_samples for r in requests])
    mixed = MixedVerifier([constant(0.2), constant(0.8)], weights=[1, 3])
    (result,) = search(["p"], policy, mixed, SearchConfig("best_of_n", n=2))
    assert result.best.step_scores == (pytest.approx(0.65), pytest.approx(0.65))


def test_one_that_fails_for_a_candidate_is_left_out_and_said_so():
    mixed = MixedVerifier([constant(0.5), Failing()])
    mixed.begin(0, "p")
    requests = [Score(0, 1, ("a",), 0), Score(0, 2, ("a", "b"), 0)]
    assert mixed.score(requests) == [[0.25], [0.5, 0.5]]
    assert mixed.left_out == ["problem 0, branch 2, verifier 1: ValueError: too long"]
    assert mixed.end(0) == Usage(tokens=5, flops=2.0)


def test_costs_add_up_and_failures_of_all_are_the_first_ones():
    mixed = MixedVerifier([Failing(), Failing()])
    mixed.begin(0, "p")
    (answer,) = mixed.score([Score(0, 2, ("a", "b"), 0)])
    assert isinstance(answer, ValueError)
    assert mixed.end(0).tokens == 10


def test_a_mixture_survives_a_file(tmp_path):
    mixture = Mixture.fitted([[("1", (0.1, 3.0)), ("2", (0.2, 1.0))]], [1, 2])
    mixture.save(tmp_path / "m.json")
    assert Mixture.load(tmp_path / "m.json") == mixture
    (tmp_path / "m.json").write_text("{}")
    with pytest.raises(ValueError, match=r"m\.json: expected a file of Mixture\.save"):
        Mixture.load(tmp_path / "m.json")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: MixedVerifier([]), "verifiers: expected at least one"),
        (lambda: MixedVerifier([constant(1)], "agreement"), "needs mixture"),
        (lambda: MixedVerifier([constant(1)], [1, 2]), "weights: expected 1 numbers"),
        (lambda: MixedVerifier([constant(1)], [-1]), "weights: expected 1 numbers"),
        (
            lambda: MixedVerifier([constant(1)] * 2, mixture=Mixture.fitted([[("1", (0.1,))]])),
            "mixture: expected one of 2",
        ),
        (lambda: Mixture.fitted([[("1", (0.1,)), ("1", (0.1, 0.2))]]), "past: expected"),
    ],
)
def test_bad_arguments(make, match):
    with pytest.raises(ValueError, match=match):
        make()


ACCURACIES = (0.55, 0.61, 0.67, 0.73, 0.79, 0.85)
CORRELATION = 0.3
N = 16


def simulated(problems: int, rng: random.Random):
    """Problems whose completions are right by a chance of each problem's own, and the scores of six verifiers.

    A verifier is a normal score with a shared and an own part of noise, so that errors are correlated, put so far apart
    for right and wrong completions that a threshold in the middle has its accuracy.
    """
    shifts = [NormalDist().inv_cdf(accuracy) for accuracy in ACCURACIES]
    made = []
    for _ in range(problems):
        rate, own = rng.betavariate(1.2, 1.2), []
        for _ in range(N):
            right = rng.random() < rate
            answer = "right" if right else f"wrong {rng.randrange(4)}"
            shared = rng.gauss(0, 1)
            noise = [math.sqrt(CORRELATION) * shared + math.sqrt(1 - CORRELATION) * rng.gauss(0, 1) for _ in shifts]
            own.append((answer, [(1 if right else -1) * s + e for s, e in zip(shifts, noise, strict=True)]))
        made.append(own)
    return made


def accuracy(mixture: Mixture, problems) -> float:
    """Share of problems whose completion of the highest mean is right."""
    return sum(max(own, key=lambda one: mixture.mean(one[1]))[0] == "right" for own in problems) / len(problems)


def best_weights() -> list[float]:
    """Of normal scores of equal variances and correlations: the inverse of their covariance times their shifts."""
    shifts = [NormalDist().inv_cdf(each) for each in ACCURACIES]
    total, count = sum(shifts), len(shifts)
    shared = CORRELATION * total / (1 + (count - 1) * CORRELATION)
    return [max(0.0, (shift - shared) / (1 - CORRELATION)) for shift in shifts]


def gains(seeds) -> dict[str, float]:
    """Accuracies on 300 problems of each seed: of verifiers alone (their mean, the best) and of mixtures.

    What is fitted is fitted to 300 other problems, whose right answers nobody is told.
    """
    found: dict[str, list[float]] = {}
    for seed in seeds:
        rng = random.Random(seed)
        past, problems = simulated(300, rng), simulated(300, rng)
        raw = (Normalization(),) * len(ACCURACIES)
        alone = [accuracy(Mixture(raw, tuple(float(i == j) for j in range(6))), problems) for i in range(6)]
        now = {
            "one": sum(alone) / 6,
            "best one": alone[-1],
            "equal": accuracy(Mixture.fitted(past), problems),
            "agreement": accuracy(Mixture.fitted(past, "agreement"), problems),
            "best weights": accuracy(Mixture(raw, tuple(best_weights())), problems),
        }
        for name, value in now.items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


@pytest.mark.parametrize("seeds", [range(3), pytest.param(range(20), marks=pytest.mark.slow)])
def test_agreement_finds_most_of_what_the_best_weights_gain(seeds):
    found = gains(seeds)
    assert found["agreement"] - found["one"] >= 0.8 * (found["best weights"] - found["one"])
    assert found["agreement"] > found["equal"] > found["one"]

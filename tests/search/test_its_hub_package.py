"""The its_hub presets against the package its_hub itself, driven by the same scripts.

It needs the package (``pip install --no-deps 'its-hub==1.2.*'``: the parts used here only need numpy), which the extra
`test` does not install.
"""

from __future__ import annotations

import importlib
import random
import re

import pytest
from scripted import ScriptedPolicy, ScriptedVerifier
from tts_search import SearchConfig, Step, search
from tts_search.search.seeds import seed_of

pytest.importorskip("its_hub", reason="compares with the package: pip install --no-deps 'its-hub==1.2.*'")

STEP, STOP = "\n\n", "STOP"
PROBLEM = "p"


def step_after(seed: int, text: str, number: int) -> str:
    """The k-th sample after a text, without its delimiter: names tell it from all others, so texts tell paths."""
    rng = random.Random(f"{seed}/{text}/{number}")
    return f"{rng.randrange(10**9)}" + (STOP if rng.random() < 0.25 else "")


def score_of(seed: int, text: str) -> float:
    return random.Random(f"{seed}/{text}").randrange(5) / 4


class Model:
    """What its_hub asks for the next steps: equal texts in one batch are samples of one path."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    async def agenerate(self, messages, stop=None, **_):
        assert stop == STEP
        seen: dict[str, int] = {}
        responses = []
        for conversation in messages:
            text = conversation[-1].content if conversation[-1].role == "assistant" else ""
            number = seen[text] = seen.get(text, -1) + 1
            responses.append({"role": "assistant", "content": step_after(self.seed, text, number)})
        return responses


class Reward:
    def __init__(self, seed: int) -> None:
        self.seed = seed

    async def ascore(self, prompt, texts):
        assert prompt == PROBLEM
        return [score_of(self.seed, text) for text in texts]


def theirs(algorithm: str, seed: int, budget: int, max_steps: int, **options):
    from its_hub.core.lms.step_generation import StepGeneration

    name = {"BeamSearch": "beam_search", "ParticleFiltering": "particle_gibbs"}[algorithm]
    module = importlib.import_module(f"its_hub.core.algorithms.{name}")
    generation = StepGeneration(max_steps, step_token=STEP, stop_token=STOP)
    method = getattr(module, algorithm)(generation, Reward(seed), **options)
    result = method.infer(Model(seed), PROBLEM, budget, return_response_only=False)
    return [response["content"] for response in result.responses], result.selected_index


def ours(method: str, seed: int, **options):
    def sample(_, steps, number, __, params):
        text = step_after(seed, "".join(steps), number)
        return Step(text + params.delimiter, False, 1)

    def scores(_, steps):
        texts = ["".join(steps[: count + 1]).removesuffix(STEP) for count in range(len(steps))]
        return [score_of(seed, text) for text in texts]

    config = SearchConfig.its_hub(method, stop_token=STOP, **options)
    result = search([PROBLEM], ScriptedPolicy(sample), ScriptedVerifier(scores), config, progress=False)[0]
    best = next(i for i, one in enumerate(result.completions) if one is result.best)
    return [one.text.removesuffix(STEP) for one in result.completions], best


@pytest.mark.parametrize("chunk", range(2))
def test_beam_search(chunk):
    for seed in range(chunk, 1000, 2):
        rng = random.Random(seed)
        beam_width, num_beams, max_steps = rng.randrange(1, 5), rng.randrange(1, 5), rng.randrange(6)
        budget = beam_width * num_beams
        expected = theirs("BeamSearch", seed, budget, max_steps, beam_width=beam_width)
        assert ours("beam_search", seed, budget=budget, beam_width=beam_width, max_steps=max_steps) == expected


@pytest.mark.parametrize("chunk", range(2))
def test_particle_filtering(chunk, monkeypatch):
    module = importlib.import_module("its_hub.core.algorithms.particle_gibbs")

    class Draws:
        """Its draws come from the seeds that ours come from: one for each round."""

        def __init__(self) -> None:
            self.round = 0

        def choices(self, population, weights, k):
            self.round += 1
            return random.Random(seed_of(0, PROBLEM, (-2, self.round))).choices(population, weights, k=k) if k else []

    for seed in range(chunk, 1000, 2):
        rng = random.Random(seed)
        budget, max_steps = rng.randrange(1, 10), rng.randrange(6)
        monkeypatch.setattr(module, "random", Draws())
        expected = theirs("ParticleFiltering", seed, budget, max_steps)
        assert ours("particle_filtering", seed, budget=budget, max_steps=max_steps) == expected


def test_the_scripts_tell_paths_apart():
    texts = {step_after(0, "", number) for number in range(100)}
    assert len(texts) == 100
    assert any(re.search(STOP, text) for text in texts)

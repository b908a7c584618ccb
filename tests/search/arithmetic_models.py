"""Scripted models of the demo task: policies that err at a given rate, verifiers that see errors through noise."""

from __future__ import annotations

import random
import re
import time

from tts_search import Step, StepRequest, TextPolicy, TextVerifier
from tts_search.lab.arithmetic import check_steps, solve


def policy(error_rate: float, prefix: str = "") -> TextPolicy:
    """Solves step by step; each operation goes wrong with `error_rate`, greedily just the third one."""

    def sample(problem: str, steps: tuple[str, ...], seed: int, greedy: bool, one: bool) -> Step:
        rng = random.Random(seed)
        reference = solve(problem)
        texts: list[str] = []
        for index in range(len(steps), len(reference)):
            results = re.findall(r"= (\d+)", "".join([*steps, *texts]))
            wrong = index == 2 if greedy else rng.random() < error_rate
            if index == len(reference) - 1:
                text = f"The answer is \\boxed{{{results[-1]}}}."
            else:
                text = _operation(reference[index], results[-1:], 1 + rng.randrange(98) if wrong else 0)
            texts.append(prefix + text)
            if one:
                break
        finished = len(steps) + len(texts) == len(reference)
        return Step("".join(texts), finished, 8 * len(texts), reason="eos" if finished else "stop")

    return TextPolicy(
        lambda requests: [
            [
                sample(r.problem, r.steps, seed, r.params.temperature == 0, r.params.delimiter is not None)
                for seed in r.seeds
            ]
            for r in requests
        ]
    )


def _operation(reference: str, value: list[str], offset: int) -> str:
    """Do a step's operation on the value so far (if there is one) and add `offset`."""
    first, symbol, operand = reference.split()[:3]
    left = int(value[0]) if value else int(first)
    result = {"+": left + int(operand), "-": left - int(operand), "*": left * int(operand)}[symbol]
    return f"{left} {symbol} {operand} = {(result + offset) % 100}\n\n"


def verifier(noise: float, prefix: str = "") -> TextVerifier:
    """Scores a step 0.8 if it and all before are right, else 0.2, with noise that belongs to the text."""

    def score(problem: str, steps: tuple[str, ...]) -> list[float]:
        labels = check_steps(problem, [step.removeprefix(prefix) for step in steps])
        texts = ["".join(steps[: count + 1]) for count in range(len(steps))]
        return [
            (0.8 if label else 0.2) + random.Random(problem + text).gauss(0, noise)
            for label, text in zip(labels, texts, strict=True)
        ]

    return TextVerifier(lambda branches: [score(*branch) for branch in branches])


def endless(text: str, seconds: float = 0.0) -> TextPolicy:
    """Writes a text again and again and comes to no end; each round takes so long."""

    def write(requests: list[StepRequest]) -> list[list[Step]]:
        time.sleep(seconds)
        return [[Step(f"{text} {seed}\n\n", False, 8) for seed in request.seeds] for request in requests]

    return TextPolicy(write)

r"""Multi-step arithmetic in the shape of MATH: a problem text, steps ended by a blank line, a boxed answer.

A problem is a chain of additions, subtractions and multiplications modulo 100::

    Start with 47, add 38, multiply by 6. What is the result modulo 100?

and its solution makes one operation in each step (equality is meant modulo 100)::

    47 + 38 = 85

    85 * 6 = 10

    The answer is \boxed{10}.

Every step is determined by the problem, so whether a step is right can be decided exactly: the labels that process
reward models are trained on, and that annotators or Monte-Carlo roll-outs only estimate, are known here.

Only the standard library is used, and everything is a function of its arguments: the same seed gives the same problems
on every machine.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["DELIMITER", "LEVELS", "MODULUS", "Problem", "check_steps", "endless", "generate", "solve", "split_of"]

MODULUS = 100
DELIMITER = "\n\n"
LEVELS = (1, 2, 3, 4, 5)

Split = Literal["train", "test"]


@dataclass(frozen=True)
class _Level:
    """Sizes of one level: number of operations and the largest operands, all inclusive."""

    min_operations: int
    max_operations: int
    max_addend: int
    max_factor: int


_SIZES = {
    1: _Level(2, 2, max_addend=9, max_factor=3),
    2: _Level(3, 3, max_addend=9, max_factor=4),
    3: _Level(4, 5, max_addend=12, max_factor=5),
    4: _Level(6, 7, max_addend=16, max_factor=6),
    5: _Level(8, 10, max_addend=40, max_factor=9),
}
_TEST_SHARE = 10  # one problem in ten is a test problem
_GIVE_UP = 1000  # after this many known problems in a row, a level has no more

_VERBS = {"add": "+", "subtract": "-", "multiply by": "*"}
_PROBLEM = re.compile(
    r"Start with (\d+)((?:, (?:add|subtract|multiply by) \d+)+)\. What is the result modulo 100\?", re.ASCII
)
_OPERATION = re.compile(r", (add|subtract|multiply by) (\d+)", re.ASCII)


@dataclass(frozen=True)
class Problem:
    r"""A problem, its reference solution and its answer.

    Attributes
    ----------
    problem : str
        The text of the problem.
    solution : tuple of str
        The reference steps. All but the last end with a blank line; joined, they are the solution's text.
    answer : str
        The content of ``\boxed{}`` in the last step.
    level : int
        1 (easiest) to 5.
    """

    problem: str
    solution: tuple[str, ...]
    answer: str
    level: int


def split_of(problem: str) -> Split:
    """Return the split of a problem text, ``"train"`` or ``"test"``: its hash decides, so they are disjoint."""
    digest = hashlib.blake2b(problem.encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") % _TEST_SHARE == 0 else "train"


def solve(problem: str) -> tuple[str, ...]:
    """Return the reference solution of a problem text, one string for each step.

    Raises
    ------
    ValueError
        If `problem` is not a text that this task generates.
    """
    match = _PROBLEM.fullmatch(problem)
    if match is None:
        raise ValueError(f"problem: expected a problem of the arithmetic task, got {problem!r}")
    value = int(match[1]) % MODULUS
    steps = []
    for verb, operand in _OPERATION.findall(match[2]):
        symbol = _VERBS[verb]
        result = _apply(value, symbol, int(operand))
        steps.append(f"{value} {symbol} {int(operand)} = {result}{DELIMITER}")
        value = result
    steps.append(f"The answer is \\boxed{{{value}}}.")
    return tuple(steps)


def check_steps(problem: str, steps: Sequence[str]) -> list[bool]:
    """Label the steps of an attempt exactly: a step is right if it and all steps before it are.

    White space at the end of a step is ignored, so the last step may or may not end with a delimiter.

    Parameters
    ----------
    problem : str
        A problem text of this task.
    steps : sequence of str
        The attempt, right or wrong, complete or not.

    Returns
    -------
    list of bool
        One label for each step: some number of ``True``, then ``False`` to the end.

    Raises
    ------
    ValueError
        If `problem` is not a text that this task generates.
    """
    reference = solve(problem)
    right = True
    labels = []
    for index, step in enumerate(steps):
        right = right and index < len(reference) and step.rstrip() == reference[index].rstrip()
        labels.append(right)
    return labels


def endless(split: Split, level: int, seed: int) -> Iterator[Problem]:
    """Yield problems of a split and level without end. A text may be repeated.

    Raises
    ------
    ValueError
        If `split` or `level` does not exist.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    if level not in _SIZES:
        raise ValueError(f"level: expected one of {LEVELS}, got {level!r}")
    return _endless(split, level, seed)


def generate(split: Split, level: int, count: int, seed: int = 0) -> list[Problem]:
    """Return `count` different problems of a split and level; a larger count only appends to the list.

    Raises
    ------
    ValueError
        If `split` or `level` does not exist, or the level does not have `count` different problems.
    """
    if count < 0:
        raise ValueError(f"count: expected a number >= 0, got {count}")
    problems: dict[str, Problem] = {}
    supply, repeated = endless(split, level, seed), 0
    while len(problems) < count:
        problem = next(supply)
        repeated = repeated + 1 if problem.problem in problems else 0
        if repeated == _GIVE_UP:
            raise ValueError(f"count: expected about {len(problems)} at most at level {level}, got {count}")
        problems[problem.problem] = problem
    return list(problems.values())


def _endless(split: Split, level: int, seed: int) -> Iterator[Problem]:
    rng = random.Random(f"arithmetic/{split}/{level}/{seed}")  # a str seed is hashed by SHA-512: the same everywhere
    while True:
        text = _problem_text(_SIZES[level], rng)
        if split_of(text) == split:
            solution = solve(text)
            answer = solution[-1][solution[-1].index("{") + 1 : solution[-1].index("}")]
            yield Problem(text, solution, answer, level)


def _problem_text(size: _Level, rng: random.Random) -> str:
    parts = [f"Start with {rng.randint(1, MODULUS - 1)}"]
    for _ in range(rng.randint(size.min_operations, size.max_operations)):
        verb = rng.choice(("add", "subtract", "multiply by"))
        if verb == "multiply by":
            parts.append(f"{verb} {rng.randint(2, size.max_factor)}")
        else:
            parts.append(f"{verb} {rng.randint(1, size.max_addend)}")
    return ", ".join(parts) + ". What is the result modulo 100?"


def _apply(value: int, symbol: str, operand: int) -> int:
    if symbol == "+":
        return (value + operand) % MODULUS
    if symbol == "-":
        return (value - operand) % MODULUS
    return value * operand % MODULUS

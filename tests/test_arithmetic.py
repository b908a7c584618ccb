"""The arithmetic task: deterministic, split without overlap, and checked exactly."""

from __future__ import annotations

import ast
import hashlib
import sys
from dataclasses import FrozenInstanceError
from itertools import islice

import pytest
from tts_search.lab import arithmetic
from tts_search.lab.arithmetic import DELIMITER, LEVELS, Problem, check_steps, endless, generate, solve, split_of

EXAMPLE = "Start with 47, add 38, multiply by 6, subtract 11. What is the result modulo 100?"
SOLUTION = ("47 + 38 = 85\n\n", "85 * 6 = 10\n\n", "10 - 11 = 99\n\n", "The answer is \\boxed{99}.")


def test_the_same_seed_gives_the_same_problems_everywhere() -> None:
    problems = [problem for level in LEVELS for split in ("train", "test") for problem in generate(split, level, 20, 3)]
    digest = hashlib.sha256("\n".join(problem.problem for problem in problems).encode()).hexdigest()
    assert digest[:16] == "2724fcfbe52608d2"
    assert generate("test", 5, 20, 3) == generate("test", 5, 20, 3) == generate("test", 5, 50, 3)[:20]
    assert generate("test", 5, 20, 3) != generate("test", 5, 20, 4)


@pytest.mark.parametrize("level", LEVELS)
def test_train_and_test_never_share_a_problem(level: int) -> None:
    train = {problem.problem for problem in islice(endless("train", level, 0), 3000)}
    test = {problem.problem for problem in islice(endless("test", level, 0), 3000)}
    assert not train & test
    assert {split_of(text) for text in train} == {"train"}
    assert {split_of(text) for text in test} == {"test"}


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_has_its_number_of_steps_and_right_solutions(level: int) -> None:
    problems = generate("test", level, 200, 1)
    assert len({problem.problem for problem in problems}) == 200
    operations = {1: {2}, 2: {3}, 3: {4, 5}, 4: {6, 7}, 5: {8, 9, 10}}[level]
    assert {len(problem.solution) - 1 for problem in problems} == operations
    for problem in problems:
        assert problem.level == level
        assert all(step.endswith(DELIMITER) for step in problem.solution[:-1])
        assert problem.solution[-1] == f"The answer is \\boxed{{{problem.answer}}}."
        for step in problem.solution[:-1]:
            expression, result = step.split(" = ")
            assert (eval(expression) - int(result)) % 100 == 0
        assert check_steps(problem.problem, problem.solution) == [True] * len(problem.solution)


def test_solve_follows_the_text() -> None:
    assert solve(EXAMPLE) == SOLUTION


@pytest.mark.parametrize(
    ("steps", "labels"),
    [
        ([], []),
        (SOLUTION, [True] * 4),
        (SOLUTION[:2], [True, True]),
        ([step.rstrip() for step in SOLUTION], [True] * 4),
        (["47 + 38 = 85", "85 * 6 = 11", "11 - 11 = 0", "The answer is \\boxed{0}."], [True, False, False, False]),
        (["47 + 38 = 75", *SOLUTION[1:]], [False] * 4),
        ([SOLUTION[0], SOLUTION[2]], [True, False]),
        ([SOLUTION[0], SOLUTION[0]], [True, False]),
        ([SOLUTION[0], SOLUTION[3]], [True, False]),
        ([*SOLUTION[:3], "The answer is \\boxed{9}."], [True, True, True, False]),
        ([*SOLUTION, "And so on."], [True] * 4 + [False]),
        ([SOLUTION[0] + SOLUTION[1]], [False]),
    ],
    ids=("none all prefix stripped result first skipped repeated early boxed longer glued").split(),  # noqa: SIM905
)
def test_check_steps(steps: list[str], labels: list[bool]) -> None:
    assert check_steps(EXAMPLE, steps) == labels


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="problem: expected a problem of the arithmetic task, got 'What is 1"):
        solve("What is 1 + 1?")
    with pytest.raises(ValueError, match=r"level: .* got 6"):
        endless("test", 6, 0)
    with pytest.raises(ValueError, match=r"split: .* got 'dev'"):
        endless("dev", 1, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"count: .* got -1"):
        generate("test", 1, -1)
    with pytest.raises(ValueError, match="count: expected about"):
        generate("test", 1, 100_000)


def test_problems_are_frozen() -> None:
    problem = generate("test", 1, 1)[0]
    assert isinstance(problem, Problem)
    with pytest.raises(FrozenInstanceError):
        problem.answer = "0"  # type: ignore[misc]


def test_the_module_needs_the_standard_library_alone() -> None:
    with open(arithmetic.__file__, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    names = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names

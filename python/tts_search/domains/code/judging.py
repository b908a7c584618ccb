"""What programs do on tests: how many they pass, how they behave, which of them agree."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tts_search.domains.code.plain import same_value
from tts_search.domains.code.sandbox import Outcome, Sandbox
from tts_search.domains.code.tasks import Asserts, Call, CodeTask, Program, Test

__all__ = ["CodeGrader", "Judge", "Verdict", "codet_scores", "written_tests"]

_REMEMBERED: Final = 65536
_DECIMAL_BITS: Final = 4096  # Python refuses to write the digits of integers of more than some 14,000 bits


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a program on tests.

    Attributes
    ----------
    passed : tuple of bool
        Test by test.
    outcomes : tuple of str
        What each came to, in words that are equal where behaviour is: a value, or the kind of a failure.
    """

    passed: tuple[bool, ...]
    outcomes: tuple[str, ...]

    @property
    def share(self) -> float:
        """Share of the tests that passed."""
        return sum(self.passed) / len(self.passed)


class Judge:
    """Runs programs in a sandbox; what it has found out it does not find out again.

    Parameters
    ----------
    sandbox : Sandbox or None
        By default one of the full level, with the limits of :class:`Limits`.
    """

    def __init__(self, sandbox: Sandbox | None = None) -> None:
        self.sandbox = sandbox or Sandbox()
        self._known: OrderedDict[Hashable, Verdict] = OrderedDict()

    def public(self, task: CodeTask, program: str) -> Verdict:
        """Run the tests that a search may see; without any, whether the program can be loaded is the one test."""
        return self._remembered(task, program, task.public)

    def hidden(self, task: CodeTask, program: str) -> Verdict:
        """Run the tests that decide."""
        return self._remembered(task, program, task.hidden)

    def written(self, task: CodeTask, program: str, tests: Sequence[str]) -> Verdict:
        """Run assertions that a policy wrote."""
        return self._remembered(task, program, tuple(map(Asserts, tests)))

    def passes(self, task: CodeTask, program: str) -> bool:
        """Whether a program passes all hidden tests."""
        return bool(program) and all(self.hidden(task, program).passed)

    def behaviour(self, task: CodeTask, program: str) -> tuple[str, ...]:
        """Return what a program does on the public inputs."""
        return self.public(task, program).outcomes if program else ()

    def _remembered(self, task: CodeTask, program: str, tests: tuple[Test, ...]) -> Verdict:
        key = (task.id, task.entry, program, repr(tests))
        if key not in self._known:
            self._known[key] = self._run(task, program, tests)
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        return self._known[key]

    def _run(self, task: CodeTask, program: str, tests: tuple[Test, ...]) -> Verdict:
        if not tests:
            with self.sandbox.open() as session:
                outcome = session.load(program)
            return Verdict((outcome.is_value,), (_words(outcome),))
        calls = [test for test in tests if isinstance(test, Call)]
        found = dict(zip(map(id, calls), self._calls(task, program, calls), strict=True))
        for test in tests:
            if isinstance(test, Program):
                found[id(test)] = self._program(program, test)
            elif isinstance(test, Asserts):
                found[id(test)] = self._asserts(task, program, test)
        return Verdict(*zip(*(found[id(test)] for test in tests), strict=True))

    def _calls(self, task: CodeTask, program: str, calls: Sequence[Call]) -> list[tuple[bool, str]]:
        """Of each call, whether it is right and what it came to; all in one process."""
        if not calls:
            return []
        with self.sandbox.open() as session:
            loaded = session.load(program)
            if not loaded.is_value:
                return [(False, _words(loaded))] * len(calls)
            outcomes = [session.call(task.entry, call.args) for call in calls]
        return [
            (outcome.is_value and same_value(call.expected, outcome.value), _words(outcome))
            for call, outcome in zip(calls, outcomes, strict=True)
        ]

    def _program(self, program: str, test: Program) -> tuple[bool, str]:
        with self.sandbox.open() as session:
            outcome = session.run(program, test.stdin)
            printed = session.printed
        words = _lines(printed)
        return outcome.is_value and words == _lines(test.stdout), repr(words) if outcome.is_value else _words(outcome)

    def _asserts(self, task: CodeTask, program: str, test: Asserts) -> tuple[bool, str]:
        """The tests run in one process, the program in another one."""
        with self.sandbox.open() as session:
            loaded = session.load(program)
            if not loaded.is_value:
                return False, _words(loaded)
            with self.sandbox.open() as checker:
                outcome = checker.check(test.setup, test.source, task.entry, session)
        return outcome.is_value, "passed" if outcome.is_value else _words(outcome)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _words(outcome: Outcome) -> str:
    """An outcome in words: a value as `repr` has it, sets sorted; of an exception its type."""
    if outcome.is_value:
        return _stable(outcome.value)
    return f"raised {outcome.text.partition(':')[0]}" if outcome.kind == "raised" else outcome.kind


def _stable(value: Any) -> str:
    if isinstance(value, (set, frozenset)):
        return f"{type(value).__name__}({', '.join(sorted(map(_stable, value)))})"
    if isinstance(value, dict):
        return f"dict({', '.join(sorted(f'{_stable(key)}: {_stable(item)}' for key, item in value.items()))})"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({', '.join(map(_stable, value))})"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.9g}"
    if isinstance(value, int) and value.bit_length() > _DECIMAL_BITS:
        return hex(value)
    return repr(value)


class CodeGrader:
    """What an answer to a task of programming is worth.

    Its methods are what a search takes: ``extract_answer=grader.extract, equal=grader.equal``.

    Parameters
    ----------
    task : CodeTask
        Of one problem.
    judge : Judge
        Runs programs.
    """

    def __init__(self, task: CodeTask, judge: Judge) -> None:
        self.task = task
        self.judge = judge

    def extract(self, text: str) -> str:
        """Return the program of a completion; empty if it has none."""
        return self.task.program_of(text)

    def equal(self, one: str, other: str) -> bool:
        """Whether two programs behave alike on the public inputs, without failing on all of them."""
        mine, yours = (self.judge.behaviour(self.task, program) for program in (one, other))
        return mine == yours and not all(map(_is_failure, mine))

    def correct(self, answer: str) -> bool:
        """Whether a program passes the hidden tests."""
        return self.judge.passes(self.task, answer)


def _is_failure(words: str) -> bool:
    return words.startswith("raised ") or words in ("syntax", "timeout", "output", "died")


_ASSERT = re.compile(r"^\s*(assert\b.+)$", re.MULTILINE)


def written_tests(text: str, entry: str, limit: int = 5) -> list[str]:
    r"""Return the assertions about a function that a policy wrote, a line each, the first ones.

    Examples
    --------
    >>> written_tests("Tests:\n    assert f(1) == 2\n    assert g(1)\n    assert f(", "f")
    ['assert f(1) == 2']
    """
    found: list[str] = []
    for match in _ASSERT.finditer(text):
        line = match[1].strip()
        if re.search(rf"\b{re.escape(entry)}\(.*\)", line) and line not in found and _balanced(line):
            found.append(line)
    return found[:limit]


def _balanced(line: str) -> bool:
    return all(line.count(one) == line.count(other) for one, other in ("()", "[]", "{}"))


def codet_scores(
    programs: Sequence[str], tests: Sequence[str], passes: Callable[[str, Sequence[str]], Sequence[bool]]
) -> list[float]:
    """Return the scores of dual execution agreement.

    Programs that pass the same tests are one consensus set; a program's score is the number of programs in its set
    times the number of tests that these pass. Programs and tests count as often as they were drawn.

    Parameters
    ----------
    programs, tests : sequence of str
        As a policy wrote them.
    passes : callable
        Of a program and the different tests, which it passes: for a :class:`Judge`,
        ``lambda program, tests: judge.written(task, program, tests).passed``.

    Notes
    -----
    CodeT (Chen et al., arXiv 2207.10397), section 2.2. O(programs x tests) executions, of different ones.

    Examples
    --------
    >>> good = {"a": (True, True), "b": (True, True), "c": (True, False)}
    >>> codet_scores(["a", "b", "c"], ["s", "t"], lambda program, tests: good[program])
    [4.0, 4.0, 1.0]
    """
    different = list(dict.fromkeys(tests))
    weights = [tests.count(test) for test in different]
    passed = {program: tuple(passes(program, different)) if different else () for program in dict.fromkeys(programs)}
    sizes: dict[tuple[bool, ...], int] = {}
    for program in programs:
        sizes[passed[program]] = sizes.get(passed[program], 0) + 1
    return [
        float(sizes[passed[program]] * sum(w for w, ok in zip(weights, passed[program], strict=True) if ok))
        for program in programs
    ]

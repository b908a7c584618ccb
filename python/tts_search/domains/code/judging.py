"""Runs programs on tests: how many they pass, how they behave, and which programs behave alike."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from tts_search.domains.code.plain import same_value
from tts_search.domains.code.sandbox import Outcome, Sandbox
from tts_search.domains.code.tasks import Asserts, Call, CodeTask, Program, Test

__all__ = ["CodeGrader", "ProgramJudge", "Verdict"]

_REMEMBERED: Final = 65536
# Seconds of CPU and of waiting for a written test. There are many such tests, and some cannot be passed.
_WRITTEN_CPU_S, _WRITTEN_WALL_S = 1, 2.0
_ENDINGS: Final = ("timeout", "output", "died")  # the process answers nothing after these
_DECIMAL_BITS: Final = 4096  # Python refuses to convert integers with more than about 14,000 bits to decimal


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of a program on tests.

    Attributes
    ----------
    passed : tuple of bool
        Whether each test passed.
    outcomes : tuple of str
        The outcome of each test as text: a value, or the kind of a failure. Equal behaviour gives equal text.
    """

    passed: tuple[bool, ...]
    outcomes: tuple[str, ...]

    @property
    def share(self) -> float:
        """The share of the tests that passed."""
        return sum(self.passed) / len(self.passed)


class ProgramJudge:
    """Runs programs in a sandbox, and remembers the results.

    Parameters
    ----------
    sandbox : Sandbox or None
        By default one of the full level, with the limits of :class:`Limits`.
    """

    def __init__(self, sandbox: Sandbox | None = None) -> None:
        self.sandbox = sandbox or Sandbox()
        own = self.sandbox
        cpu_s, wall_s = min(own.limits.cpu_s, _WRITTEN_CPU_S), min(own.limits.wall_s, _WRITTEN_WALL_S)
        limits = replace(own.limits, cpu_s=cpu_s, wall_s=wall_s)
        self._for_written = Sandbox(limits, require=own.require, threads=own.threads)
        self._known: OrderedDict[Hashable, Verdict] = OrderedDict()

    def public(self, task: CodeTask, program: str) -> Verdict:
        """Run the tests that a search may use. Without any, the only test is whether the program can be loaded."""
        return self._remembered(task, program, task.public)

    def hidden(self, task: CodeTask, program: str) -> Verdict:
        """Run the hidden tests, which decide."""
        return self._remembered(task, program, task.hidden)

    def written(self, task: CodeTask, program: str) -> Verdict:
        """Run the tests that a policy wrote. Each counts as often as it was drawn.

        If a test ends its process or takes long, the others are not affected: it runs in a process of its own, with at
        most a second of CPU time. Without any written tests, this is :meth:`public`.
        """
        verdict = self._remembered(task, program, task.suite, written=True)
        if not task.written:
            return verdict
        found = dict(zip(dict.fromkeys(task.written), zip(verdict.passed, verdict.outcomes, strict=True), strict=True))
        return Verdict(*zip(*(found[test] for test in task.written), strict=True))

    def visible(self, task: CodeTask, program: str) -> Verdict:
        """Run the tests that guide a search: the written tests if the task has any, else the public ones."""
        return self.public(task, program) if task.written is None else self.written(task, program)

    def passes(self, task: CodeTask, program: str) -> bool:
        """Whether a program passes all hidden tests."""
        return bool(program) and all(self.hidden(task, program).passed)

    def behaviour(self, task: CodeTask, program: str) -> tuple[str, ...]:
        """Return a program's outcomes on the public inputs. With written tests: which of them it passes."""
        if not program:
            return ()
        if task.written is None:
            return self.public(task, program).outcomes
        return tuple("passed" if one else "failed" for one in self.written(task, program).passed)

    def _remembered(self, task: CodeTask, program: str, tests: tuple[Test, ...], *, written: bool = False) -> Verdict:
        key = (task.id, task.entry, program, repr(tests), written)
        if key not in self._known:
            self._known[key] = self._run(task, program, tests, written)
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        return self._known[key]

    def _run(self, task: CodeTask, program: str, tests: tuple[Test, ...], written: bool) -> Verdict:
        sandbox = self._for_written if written else self.sandbox
        if not tests:
            with sandbox.open() as session:
                outcome = session.load(program)
            return Verdict((outcome.is_value,), (_words(outcome),))
        calls = [test for test in tests if isinstance(test, Call)]
        outcomes = _calls(sandbox, task, program, calls, apart=written)
        found = dict(zip(map(id, calls), map(_judged, calls, outcomes), strict=True))
        for test in tests:
            if isinstance(test, Program):
                found[id(test)] = _program(sandbox, program, test)
            elif isinstance(test, Asserts):
                found[id(test)] = _asserts(sandbox, task, program, test)
        return Verdict(*zip(*(found[id(test)] for test in tests), strict=True))


def _judged(call: Call, outcome: Outcome) -> tuple[bool, str]:
    return outcome.is_value and same_value(call.expected, outcome.value), _words(outcome)


def _calls(sandbox: Sandbox, task: CodeTask, program: str, calls: Sequence[Call], *, apart: bool) -> list[Outcome]:
    """The outcomes of calls in one process. `apart`: a call that ends the process is tried again in a new one."""
    found: list[Outcome] = []
    while len(found) < len(calls):
        with sandbox.open() as session:
            loaded = session.load(program)
            first = len(found)
            for call in calls[first:]:
                outcome = session.call(task.entry, call.args) if loaded.is_value else loaded
                is_over = apart and loaded.is_value and outcome.kind in _ENDINGS
                if not is_over or len(found) == first:
                    found.append(outcome)
                if is_over:
                    break
    return found


def _program(sandbox: Sandbox, program: str, test: Program) -> tuple[bool, str]:
    with sandbox.open() as session:
        outcome = session.run(program, test.stdin)
        printed = session.printed
    words = _lines(printed)
    return outcome.is_value and words == _lines(test.stdout), repr(words) if outcome.is_value else _words(outcome)


def _asserts(sandbox: Sandbox, task: CodeTask, program: str, test: Asserts) -> tuple[bool, str]:
    """The tests run in one process, the program in another one."""
    with sandbox.open() as session:
        loaded = session.load(program)
        if not loaded.is_value:
            return False, _words(loaded)
        with sandbox.open() as checker:
            outcome = checker.check(test.setup, test.source, task.entry, session)
    return outcome.is_value, "passed" if outcome.is_value else _words(outcome)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _words(outcome: Outcome) -> str:
    """An outcome as text: a value in the form of `repr`, with sorted sets; for an exception its type."""
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
    """Extracts, compares and judges answers to a task of programming.

    A search can use its methods: ``extract_answer=grader.extract, equal=grader.equal``.

    Parameters
    ----------
    task : CodeTask
        The task of one problem.
    judge : ProgramJudge
        Runs programs.
    """

    def __init__(self, task: CodeTask, judge: ProgramJudge) -> None:
        self.task = task
        self.judge = judge

    def extract(self, text: str) -> str:
        """Return the program of a completion; empty if it has none."""
        return self.task.program_of(text)

    def equal(self, one: str, other: str) -> bool:
        """Whether two programs behave alike on the public inputs, and do not fail on all of them.

        With written tests: whether they pass the same tests, and at least one. They are then one consensus set.
        """
        mine, yours = (self.judge.behaviour(self.task, program) for program in (one, other))
        return mine == yours and not all(map(_is_failure, mine))

    def correct(self, answer: str) -> bool:
        """Whether a program passes the hidden tests."""
        return self.judge.passes(self.task, answer)


def _is_failure(words: str) -> bool:
    return words.startswith("raised ") or words in ("failed", "syntax", *_ENDINGS)

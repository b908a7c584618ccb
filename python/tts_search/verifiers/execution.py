"""A verifier that runs programs on a problem's public tests, or on tests that a policy wrote."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tts_search.domains.code.judging import ProgramJudge
from tts_search.domains.code.tasks import CodeTask
from tts_search.search.protocol import Score, Usage

__all__ = ["ExecutionVerifier"]


class ExecutionVerifier:
    """Scores a step by running the program in the text up to it: the share of the public tests that it passes.

    A step gets this score if the text up to it contains a program that defines the requested function. After any other
    step nothing is known, and its score is `pending`. This value lies between 0 (the program fails every test, does not
    compile or takes too long) and the score of a program that passes some tests. Hidden tests are never run.

    If a task has written tests (``CodeTask.written``), these are run instead. A test that was drawn several times is
    counted as often. The vote ``prm_vote`` is then the dual execution agreement of CodeT (Chen et al., arXiv
    2207.10397, section 2.2): programs that pass the same tests are one answer
    (:meth:`~tts_search.domains.code.CodeGrader.equal`). The score of this answer is the number of programs times the
    number of tests that they pass.

    Parameters
    ----------
    tasks : iterable of CodeTask
        The tasks that will be searched. A problem's text identifies its task.
    judge : ProgramJudge or None
        Runs programs; by default in a sandbox of the full level.
    pending : float
        The score of a step without a program.

    Raises
    ------
    ValueError
        If two tasks have the same text but different tests.

    Examples
    --------
    >>> from tts_search.domains.code import humaneval  # doctest: +SKIP
    >>> verifier = ExecutionVerifier(humaneval())  # doctest: +SKIP
    """

    def __init__(self, tasks: Iterable[CodeTask], judge: ProgramJudge | None = None, *, pending: float = 0.1) -> None:
        self.judge = judge or ProgramJudge()
        self.pending = pending
        self._tasks: dict[str, CodeTask] = {}
        for task in tasks:
            known = self._tasks.setdefault(task.problem, task)
            if (known.public, known.written) != (task.public, task.written):
                raise ValueError(f"tasks: expected one task for a text, got two for {task.problem[:60]!r}")
        self._problems: dict[int, CodeTask] = {}

    def begin(self, problem: int, text: str) -> None:
        """Announce a problem.

        Raises
        ------
        ValueError
            If none of the tasks has this text.
        """
        if text not in self._tasks:
            raise ValueError(f"an ExecutionVerifier knows the tests of its own tasks only; none is {text[:60]!r}")
        self._problems[problem] = self._tasks[text]

    def score(self, requests: Sequence[Score]) -> list[list[float]]:
        """Answer requests of any number of problems."""
        return [self._scores(self._problems[each.problem], each.steps + each.lookahead) for each in requests]

    def release(self, problem: int, branches: Sequence[int]) -> None:
        """Do nothing: a program is not a branch."""

    def end(self, problem: int) -> Usage:
        """Forget the problem; no token was read."""
        self._problems.pop(problem, None)
        return Usage()

    def _scores(self, task: CodeTask, steps: Sequence[str]) -> list[float]:
        text, scores = "", []
        for step in steps:
            text += step
            program = task.program_of(text)
            scores.append(self.judge.visible(task, program).share if program else self.pending)
        return scores

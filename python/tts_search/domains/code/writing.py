"""Tests that a policy writes: the prompt that asks for them, and reading them from its answer."""

from __future__ import annotations

import re
from typing import Final

from tts_search.domains.code.tasks import CodeTask, asserts_about

__all__ = ["PER_TEXT", "ask_for_tests", "written_tests"]

PER_TEXT: Final = 5
"""How many tests of a text are used, from the beginning."""

_ASSERT: Final = re.compile(r"^\s*(assert\b.+)$", re.MULTILINE)


def ask_for_tests(task: CodeTask) -> str:
    """Return the question by which a policy is asked for tests of a task.

    Raises
    ------
    ValueError
        If the task asks for a whole program, which assertions cannot call.
    """
    if not task.entry:
        raise ValueError(f"expected tasks that ask for a function, got {task.id}, which asks for a whole program")
    owner, _, method = task.entry.rpartition(".")
    call = f"{owner}().{method}" if owner else method
    return (
        f"{task.problem}\n\nDo not write that code. Write {PER_TEXT} tests for it instead, each a line "
        f"`assert {call}(...) == ...` with arguments and the right result, in one code block."
    )


def written_tests(text: str, entry: str, limit: int = PER_TEXT) -> list[str]:
    r"""Return the first different assertions about a function in a policy's text, one line each.

    Parameters
    ----------
    text : str
        The policy's text.
    entry : str
        The function, or a method ``Class.method``, which is called as ``Class().method``.
    limit : int
        The largest number of assertions.

    Examples
    --------
    >>> written_tests("Tests:\n    assert f(1) == 2\n    assert g(1)\n    assert f(", "f")
    ['assert f(1) == 2']
    """
    lines = dict.fromkeys(match[1].strip() for match in _ASSERT.finditer(text))
    return [line for line in lines if asserts_about(line, entry)][:limit]

"""Code: tasks with public and hidden tests, and a sandbox in which programs are run.

>>> from tts_search.domains.code import Judge, humaneval  # doctest: +SKIP
"""

from __future__ import annotations

from tts_search.domains.code.judging import CodeGrader, Judge, Verdict, codet_scores, written_tests
from tts_search.domains.code.sandbox import Level, Limits, Outcome, Sandbox, SandboxError, Session
from tts_search.domains.code.tasks import Asserts, Call, CodeTask, Program, humaneval

__all__ = [
    "Asserts",
    "Call",
    "CodeGrader",
    "CodeTask",
    "Judge",
    "Level",
    "Limits",
    "Outcome",
    "Program",
    "Sandbox",
    "SandboxError",
    "Session",
    "Verdict",
    "codet_scores",
    "humaneval",
    "written_tests",
]

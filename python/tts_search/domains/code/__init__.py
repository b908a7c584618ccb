"""Code: tasks with public and hidden tests, and a sandbox in which programs are run.

>>> from tts_search.domains.code import ProgramJudge, humaneval  # doctest: +SKIP
"""

from __future__ import annotations

from tts_search.domains.code.judging import CodeGrader, ProgramJudge, Verdict
from tts_search.domains.code.sandbox import Level, Limits, Outcome, Sandbox, SandboxError, Session
from tts_search.domains.code.tasks import Asserts, Call, CodeTask, Program, humaneval
from tts_search.domains.code.writing import ask_for_tests, written_tests

__all__ = [
    "Asserts",
    "Call",
    "CodeGrader",
    "CodeTask",
    "Level",
    "Limits",
    "Outcome",
    "Program",
    "ProgramJudge",
    "Sandbox",
    "SandboxError",
    "Session",
    "Verdict",
    "ask_for_tests",
    "humaneval",
    "written_tests",
]

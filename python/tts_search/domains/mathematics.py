"""Mathematics: whether two answers mean the same.

Equal numbers are equal answers, whatever is installed. Beyond that, math-verify (extra ``search``) decides; without it
two answers are the same if their texts are, up to spelling variants of LaTeX that change nothing.

math-verify runs in a process of its own, so that a time limit holds whatever sympy is doing. A Python signal handler
does not interrupt a C function, such as a power of large integers, and runs in the main thread only. Here the limit is
one of CPU time, and exceeding it ends the process: a busy machine changes no verdict.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from tts_search.search.answers import canonical_form

__all__ = ["MathVerify", "equivalent", "work"]

_MAX_CHARS = 500  # longer answers are compared as text
_CHANCES = 2


class MathVerify:
    """Compares answers by math-verify, in a worker process. The worker starts on use, and again after a timeout.

    An answer is first parsed alone. If this takes too long, the answer is equal to nothing, and the worker is not asked
    about it again. If a comparison takes too long, the two answers are not equal. After a second such comparison an
    answer is not asked about again.

    Parameters
    ----------
    limit_s : float
        Seconds of CPU time for one answer, and for one comparison.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._chances: dict[str, int] = {}  # for each answer: how many more timeouts are allowed

    def equal(self, gold: str, answer: str) -> bool | None:
        """Whether two LaTeX texts mean the same; None without math-verify, or after a timeout."""
        if importlib.util.find_spec("math_verify") is None or not self._may_ask(gold, answer):
            return None
        with self._lock:
            for each in (gold, answer):
                if each not in self._chances:
                    self._chances[each] = _CHANCES if self._reply([each]) is not None else 0
            if not self._may_ask(gold, answer):
                return None
            verdict = self._reply([gold, answer])
            if verdict is None:
                for each in (gold, answer):
                    self._chances[each] -= 1
            return verdict

    def _may_ask(self, *answers: str) -> bool:
        return all(self._chances.get(answer, 1) for answer in answers)

    def _reply(self, question: list[str]) -> bool | None:
        """The worker's reply to one or two answers; None after a timeout."""
        reply, status = self._ask(question)
        if not reply and status != -signal.SIGPROF:  # no timeout: it was killed, perhaps before it got the question
            reply, _ = self._ask(question)
        return bool(json.loads(reply)) if reply else None

    def _ask(self, question: list[str]) -> tuple[bytes, int | None]:
        """The worker's reply. If the worker ended instead: no reply, and its exit status."""
        worker = self._started()
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            worker.stdin.write(json.dumps(question).encode() + b"\n")
            worker.stdin.flush()
            reply = worker.stdout.readline()
        except BrokenPipeError:
            reply = b""
        except BaseException:  # Ctrl-C: a late reply would be read as the answer to the next question
            worker.kill()
            self._end(worker)
            raise
        if not reply:
            self._end(worker)
        return reply, worker.returncode

    def _end(self, worker: subprocess.Popen[bytes]) -> None:
        self._worker = None
        with contextlib.suppress(BrokenPipeError):
            worker.communicate()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._worker is None or self._owner != os.getpid():  # after a fork, the child starts its own worker
            self._owner = os.getpid()
            self._worker = subprocess.Popen(
                [sys.executable, "-c", f"from tts_search.domains.mathematics import work; work({self.limit_s})"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        return self._worker


_MATH_VERIFY = MathVerify(limit_s=5)  # for one answer: sympy can run forever on a hostile one


def equivalent(gold: str, answer: str) -> bool:
    r"""Whether an answer means the same as the right one.

    Parameters
    ----------
    gold : str
        The right answer, as LaTeX without ``\boxed`` or dollars.
    answer : str
        The answer to judge, in the same form. An empty one is never right.

    Notes
    -----
    math-verify works in a separate process, with a limit of 5 seconds of CPU time for an answer. An answer that takes
    longer is equivalent to nothing. It is used only if comparing texts and numbers does not decide. A percentage equals
    both its value and its number, as in math-verify: 75% is 0.75 and 75.
    """
    return bool(answer.strip()) and _equivalent(gold, answer)


@functools.lru_cache(maxsize=65536)
def _equivalent(gold: str, answer: str) -> bool:
    gold_form, answer_form = canonical_form(gold), canonical_form(answer)
    if gold_form == answer_form:
        return True
    if isinstance(gold_form, Fraction) and isinstance(answer_form, Fraction):
        return False
    if max(len(gold), len(answer)) > _MAX_CHARS:
        return False
    return bool(_MATH_VERIFY.equal(gold, answer))


def work(limit_s: float) -> None:
    """Judge until standard input ends. Each input line is JSON [right answer, answer], each output line true or false.

    A line with one answer only tests whether it can be compared: it is compared with 1, which evaluates it.

    An answer is parsed only once, however often it is compared, because parsing is most of the work.
    """
    from math_verify import parse, verify

    @functools.lru_cache(maxsize=4096)
    def parsed(answer: str) -> Any:
        return parse(f"\\boxed{{{answer}}}", parsing_timeout=None)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main program
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, even in C code
    replies, sys.stdout = sys.stdout, sys.stderr  # output of libraries must not mix with replies
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        equal = _equal(parsed, verify, *["1", *json.loads(line)][-2:])
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(equal), file=replies, flush=True)


def _equal(parsed: Callable[[str], Any], verify: Callable[..., bool], gold: str, answer: str) -> bool:
    try:
        return bool(verify(parsed(gold), parsed(answer), timeout_seconds=None))
    except Exception:  # sympy raises any kind of error on hostile input
        return False

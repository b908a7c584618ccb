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
    """math-verify: asks a worker, which is started on use, and again after it ran out of time.

    An answer is looked at by itself first. One that takes too long then is equal to nothing, and is not asked about
    again; so are two that take too long only when they are compared, and whoever is among those twice.

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
        self._chances: dict[str, int] = {}  # of each answer, how often it may still take too long

    def equal(self, gold: str, answer: str) -> bool | None:
        """Whether two LaTeX texts mean the same; None without math-verify, or if it could not tell within the limit."""
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
        """The worker's reply to one or two answers; None if it ran out of time."""
        reply, status = self._ask(question)
        if not reply and status != -signal.SIGPROF:  # not out of time: it was killed, perhaps before it was asked
            reply, _ = self._ask(question)
        return bool(json.loads(reply)) if reply else None

    def _ask(self, question: list[str]) -> tuple[bytes, int | None]:
        """The worker's reply; if it ended instead, no reply and its exit status."""
        worker = self._started()
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            worker.stdin.write(json.dumps(question).encode() + b"\n")
            worker.stdin.flush()
            reply = worker.stdout.readline()
        except BrokenPipeError:
            reply = b""
        except BaseException:  # Ctrl-C: a reply that is still to come would be taken for that to the next question
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
        if self._worker is None or self._owner != os.getpid():  # a fork starts one of its own
            self._owner = os.getpid()
            self._worker = subprocess.Popen(
                [sys.executable, "-c", f"from tts_search.domains.mathematics import work; work({self.limit_s})"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        return self._worker


_MATH_VERIFY = MathVerify(limit_s=5)  # for one answer: sympy can take for ever over a hostile one


def equivalent(gold: str, answer: str) -> bool:
    r"""Whether an answer means the same as the right one.

    Parameters
    ----------
    gold : str
        The right answer, as LaTeX without ``\boxed`` or dollars.
    answer : str
        The answer to judge, likewise. An empty one is never right.

    Notes
    -----
    math-verify works in a process of its own, under a limit of 5 seconds of CPU time for an answer; what takes longer
    is equivalent to nothing. It is asked only where texts and numbers do not tell. A percentage is what it stands for,
    and its number as well, as math-verify has it: 75% is 0.75 and 75.
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
    """Judge until standard input ends: lines of JSON [right answer, answer] in, lines of JSON true or false out.

    A line of one answer asks for nothing but that it can be compared at all: with 1, which takes its value.

    An answer is parsed once, however many others it is compared with: that is most of the work.
    """
    from math_verify import parse, verify

    @functools.lru_cache(maxsize=4096)
    def parsed(answer: str) -> Any:
        return parse(f"\\boxed{{{answer}}}", parsing_timeout=None)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that asks
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, in C code too
    replies, sys.stdout = sys.stdout, sys.stderr  # nothing that a library prints may get among the replies
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        equal = _equal(parsed, verify, *["1", *json.loads(line)][-2:])
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(equal), file=replies, flush=True)


def _equal(parsed: Callable[[str], Any], verify: Callable[..., bool], gold: str, answer: str) -> bool:
    try:
        return bool(verify(parsed(gold), parsed(answer), timeout_seconds=None))
    except Exception:  # sympy raises whatever it likes on hostile input
        return False

"""A sandbox for code that nobody has read: a process of its own, confined before it gets the code.

Verdicts are formed outside of it. The process in the sandbox gets a function's arguments, and answers with its result
as plain data. The expected value, and tests that call the function, never enter it.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from tts_search.domains.code.plain import NotPlainError, from_json, to_json
from tts_search.errors import SearchError

__all__ = ["Level", "Limits", "Outcome", "Sandbox", "SandboxError", "Session"]


class SandboxError(SearchError):
    """No sandbox of the required level is possible on this machine."""


class Level(IntEnum):
    """The protection of a sandbox, found by trying, lowest first. Each level includes those before it."""

    LIMITS = 1
    """Limits of time, memory and output; an own environment and session."""
    FILES = 2
    """Files outside the sandbox can be neither read nor written."""
    FULL = 3
    """No network, no signals to other processes, no new processes."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The resources that a process in a sandbox may use.

    Attributes
    ----------
    cpu_s : int
        Seconds of CPU time for all requests together.
    wall_s : float
        Seconds of waiting for anything except a processor, for all requests together. So a busy machine changes no
        verdict.
    memory : int
        Bytes of address space.
    output : int
        Bytes that it may print.
    answer : int
        Bytes of a returned value.
    file_size, folder_size : int
        Bytes of a file, and of all files together. Files are in memory.
    files : int
        Files open at once.
    threads : int
        Number of threads, where threads are allowed, for a user who is not root.
    """

    cpu_s: int = 5
    wall_s: float = 10.0
    memory: int = 512 << 20
    output: int = 1 << 20
    answer: int = 4 << 20
    file_size: int = 16 << 20
    folder_size: int = 16 << 20
    files: int = 64
    threads: int = 64


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a request to a sandbox.

    Attributes
    ----------
    kind : str
        ``"value"``; ``"raised"``: an exception, whose type is `text`; ``"syntax"``: the code does not compile;
        ``"timeout"``; ``"output"``: it printed, or returned, too much; ``"died"``: its process ended.
    value : object
        The returned value, as plain data.
    text : str
        More information about a failure.
    """

    kind: str
    value: Any = None
    text: str = ""

    @property
    def is_value(self) -> bool:
        """Whether the outcome is a value."""
        return self.kind == "value"


# The packages' own __init__ are not run: the process has only the standard library.
_START: Final = """
import sys, types
sys.path.pop(0)
for name, folder in {packages!r}:
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from tts_search.domains.code.worker import main
main({questions}, {answers})
"""
_HERE: Final = Path(__file__).resolve()
_PACKAGES: Final = [
    (name, str(_HERE.parents[up]))
    for name, up in (("tts_search", 2), ("tts_search.domains", 1), ("tts_search.domains.code", 0))
]
_PART: Final = 1 << 16
_LOOK_S: Final = 0.25  # seconds between two checks of a process that sends nothing
_STARVED: Final = 60  # factor of the time that it may wait, for any machine load


class Sandbox:
    r"""Starts processes that run code.

    Parameters
    ----------
    limits : Limits
        The limits of each process.
    require : Level
        Code is not run if the level is lower than this.
    threads : bool
        Whether code may start threads. If the user is root, only memory limits their number.

    Raises
    ------
    SandboxError
        From :meth:`open`, if `require` is not reached. The message names what is missing.

    Notes
    -----
    Linux only. ``docs/code.md`` describes each layer, and what is not protected.

    Examples
    --------
    >>> with Sandbox().open() as session:
    ...     session.load("def double(x):\n    return 2 * x").kind
    ...     session.call("double", (21,)).value
    'value'
    42
    """

    def __init__(self, limits: Limits | None = None, *, require: Level = Level.FULL, threads: bool = False) -> None:
        self.limits = limits or Limits()
        self.require = require
        self.threads = threads

    def open(self) -> Session:
        """Start a process. As a context manager it ends the process at the end."""
        return Session(self)

    def level(self) -> Level:
        """Find the level that is possible on this machine."""
        with Session(Sandbox(self.limits, require=Level.LIMITS, threads=self.threads)) as session:
            return session.level


class Session:
    """A process in a sandbox.

    Attributes
    ----------
    level : Level
        The level that was reached.
    held : dict of str to bool
        For ``files``, ``network``, ``signals``, ``processes``: whether they are out of reach.
    """

    def __init__(self, sandbox: Sandbox) -> None:
        self._limits = sandbox.limits
        self._patience = sandbox.limits.wall_s
        self._longest = time.monotonic() + _STARVED * sandbox.limits.wall_s
        self._printed = bytearray()
        self._over: Outcome | None = None
        self._process, self._questions, self._answers = _started()
        self._selector = selectors.DefaultSelector()
        assert self._process.stdout is not None
        for file in (self._answers, self._process.stdout.fileno()):
            os.set_blocking(file, False)
            self._selector.register(file, selectors.EVENT_READ)
        try:
            self.held = self._confined(sandbox)
            self.level = _level(self.held)
            if self.level < sandbox.require:
                missing = ", ".join(name for name, holds in self.held.items() if not holds)
                raise SandboxError(
                    f"sandbox: expected level {sandbox.require.name}, got {self.level.name}: this system does not keep "
                    f"code from {missing}; Sandbox(require=Level.{self.level.name}) runs it all the same"
                )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    @property
    def printed(self) -> str:
        """What the code has printed so far."""
        return self._printed.decode(errors="replace")

    def load(self, source: str) -> Outcome:
        """Execute code that defines functions and classes."""
        return self._asked({"do": "load", "source": source})

    def call(self, name: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Outcome:
        """Call a loaded function, or a method ``Class.method``. The arguments are plain data."""
        given = {"args": to_json(list(args)), "kwargs": to_json(dict(kwargs or {}))}
        return self._asked({"do": "call", "name": name, **given})

    def run(self, source: str, stdin: str) -> Outcome:
        """Run a program. Its output is in `printed`."""
        return self._asked({"do": "run", "source": source, "stdin": stdin})

    def check(self, source: str, tests: str, name: str, under_test: Session) -> Outcome:
        """Run tests in this session. Each call of the function under test runs in another session.

        So tests and the tested code never share a process.

        Parameters
        ----------
        source : str
            Code that the tests use; it is executed first.
        tests : str
            Code that raises an error if a test fails.
        name : str
            Name of the function; tests may also call it ``candidate``.
        under_test : Session
            The session with the function.

        Returns
        -------
        Outcome
            A value if the tests raise no error. If a call ends its process or takes too long, the outcome of that call.
        """
        reply = self._exchange({"do": "check", "source": source, "tests": tests, "name": name})
        while isinstance(reply, dict) and "ask" in reply:
            try:
                outcome = under_test.call(name, from_json(reply["ask"]), from_json(reply.get("kwargs", {"dict": []})))
            except (NotPlainError, TypeError, ValueError) as error:
                return self._end("died", f"the tests asked for something else: {error}")
            if outcome.is_value:
                reply = self._exchange({"value": to_json(outcome.value)})
            elif outcome.kind == "raised":
                reply = self._exchange({"raised": outcome.text.partition(":")[0], "text": outcome.text})
            else:
                return outcome
        return self._outcome(reply)

    def close(self) -> None:
        """End the process and all processes of its group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        self._selector.close()
        assert self._process.stdout is not None
        self._process.stdout.close()
        for file in (self._questions, self._answers):
            with contextlib.suppress(OSError):
                os.close(file)
        self._questions = self._answers = -1
        self._over = self._over or Outcome("died", text="the session is closed")

    def _confined(self, sandbox: Sandbox) -> dict[str, bool]:
        limits = asdict(sandbox.limits)
        setup = {"limits": limits, "threads": sandbox.threads, "secret": str(_HERE)}
        reply = self._exchange(setup)
        if isinstance(reply, Outcome):
            raise SandboxError(f"sandbox: its process {reply.kind} before it was confined: {reply.text}")
        return {str(name): value is True for name, value in reply["held"].items()}

    def _asked(self, question: dict[str, Any]) -> Outcome:
        return self._outcome(self._exchange(question))

    def _outcome(self, reply: dict[str, Any] | Outcome) -> Outcome:
        if isinstance(reply, Outcome):
            return reply
        if "value" in reply:
            try:
                return Outcome("value", from_json(reply["value"]))
            except (NotPlainError, RecursionError) as error:
                return Outcome("raised", text=f"NotPlainError: {error}")
        if "syntax" in reply:
            return Outcome("syntax", text=str(reply["syntax"])[:200])
        return Outcome("raised", text=f"{reply.get('raised')}: {reply.get('text')}"[:300])

    def _exchange(self, question: dict[str, Any]) -> dict[str, Any] | Outcome:
        """Send a request, and wait for a frame. Return an outcome if there will be none, now or later."""
        if self._over is not None:
            return self._over
        data = json.dumps(question).encode()
        frame = memoryview(struct.pack("!I", len(data)) + data)
        answer = bytearray()
        self._selector.register(self._questions, selectors.EVENT_WRITE)
        writing = True
        while True:
            if writing and not frame:
                self._selector.unregister(self._questions)
                writing = False
            begin = time.monotonic()
            ready = [key.fd for key, _ in self._selector.select(min(_LOOK_S, self._patience))]
            if not ready and self._is_over(begin):
                return self._end("timeout")
            for file in ready:
                if file == self._questions:
                    try:
                        frame = frame[os.write(file, frame[:_PART]) :]
                    except BrokenPipeError:
                        return self._died()
                    continue
                part = _read(file)
                if file != self._answers:
                    self._printed += part
                    if not part:
                        self._selector.unregister(file)
                    if len(self._printed) > self._limits.output:
                        return self._end("output", f"more than {self._limits.output} bytes were printed")
                    continue
                if not part:
                    return self._died()
                answer += part
            if len(answer) >= 4:
                (size,) = struct.unpack_from("!I", answer)
                if size > self._limits.answer:
                    return self._end("output", f"a value of more than {self._limits.answer} bytes")
                if len(answer) >= 4 + size:
                    return self._parsed(bytes(answer[4 : 4 + size]))

    def _is_over(self, begin: float) -> bool:
        """Count the time since `begin`, in which nothing came, as waiting; return whether the limit is exceeded.

        If the process could run, or was stopped, the machine had no time for it, and the time is not counted. If this
        process itself stood still, a check counts no longer than it should have taken.
        """
        now = time.monotonic()
        if _state(self._process.pid) not in ("R", "T", "t"):
            self._patience -= min(now - begin, 2 * _LOOK_S)
        return self._patience <= 0 or now > self._longest

    def _parsed(self, data: bytes) -> dict[str, Any] | Outcome:
        self._drain()
        try:
            reply = json.loads(data)
        except (ValueError, RecursionError):
            reply = None
        return reply if isinstance(reply, dict) else self._end("died", "an answer that is no object of JSON")

    def _drain(self) -> None:
        """Read the output that was printed before the answer."""
        assert self._process.stdout is not None
        file = self._process.stdout.fileno()
        with contextlib.suppress(BlockingIOError):
            while len(self._printed) <= self._limits.output and (part := os.read(file, _PART)):
                self._printed += part

    def _died(self) -> Outcome:
        try:
            status = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return self._end("died", "it closed its pipes")
        # The kernel ends a process that exceeds its CPU time by SIGKILL. No other process sends this signal.
        kind = "timeout" if status in (-signal.SIGKILL, -signal.SIGXCPU) else "died"
        return self._end(kind, f"its process ended with status {status}")

    def _end(self, kind: str, text: str = "") -> Outcome:
        self._over = Outcome(kind, text=text)
        self.close()
        return self._over


def _started() -> tuple[subprocess.Popen[bytes], int, int]:
    """A process that waits for its set-up, and the ends of its pipes."""
    questions, mine = os.pipe()
    theirs, answers = os.pipe()[::-1]
    code = _START.format(packages=_PACKAGES, questions=questions, answers=theirs)
    # -I would leave hashes random, and so the order of sets. These flags and this environment isolate the process, too.
    command = [getattr(sys, "_base_executable", sys.executable), "-s", "-S", "-B", "-X", "utf8", "-c", code]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={"PYTHONHASHSEED": "0"},
            pass_fds=(questions, theirs),
            start_new_session=True,
            bufsize=0,
        )
    except BaseException:
        os.close(mine)
        os.close(answers)
        raise
    finally:
        os.close(questions)
        os.close(theirs)
    os.set_blocking(mine, False)
    return process, mine, answers


def _state(process: int) -> str:
    """The letter of a process's state, as in ps."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0].decode()
    except OSError:
        return ""


def _read(file: int) -> bytes:
    try:
        return os.read(file, _PART)
    except BlockingIOError:
        return b""


def _level(held: Mapping[str, bool]) -> Level:
    if not held.get("files"):
        return Level.LIMITS
    return Level.FULL if all(held.get(name) for name in ("network", "signals", "processes")) else Level.FILES

"""The process in the sandbox: it confines itself, reports which layers hold, and then answers questions.

Questions and answers are frames in pipes of their own: a length in four bytes, and JSON. Candidate code prints to
another place. It could find the pipe and write an answer of its own. But an answer is only the result of a function,
which candidate code may choose anyway. Whether the result is right is decided outside, by a process that never sends
the expected result.
"""

from __future__ import annotations

import builtins
import gc
import json
import os
import struct
import sys
import types
from collections.abc import Callable
from typing import Any

from tts_search.domains.code.confine import confine, held
from tts_search.domains.code.plain import from_json, to_json

__all__ = ["main"]


class _Pipe:
    def __init__(self, questions: int, answers: int) -> None:
        self._questions, self._answers = questions, answers

    def receive(self) -> Any:
        (size,) = struct.unpack("!I", self._read(4))
        return json.loads(self._read(size))

    def send(self, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        view = memoryview(struct.pack("!I", len(data)) + data)
        while view:
            view = view[os.write(self._answers, view) :]

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = os.read(self._questions, size - len(data))
            if not part:  # there will be no more questions
                os._exit(0)
            data += part
        return data


def main(questions: int, answers: int) -> None:
    """Answer questions until they end."""
    pipe = _Pipe(questions, answers)
    setup = pipe.receive()
    os.environ.clear()
    confine(setup["limits"], threads=setup["threads"])
    pipe.send({"held": held(setup["secret"])})
    serve = {"load": _load, "call": _call, "check": _check, "run": _run}
    space = types.ModuleType("__main__")
    sys.modules["__main__"] = space
    gc.freeze()
    while True:
        question = pipe.receive()
        pipe.send(_guarded(lambda: serve[question["do"]](question, space.__dict__, pipe)))  # noqa: B023


def _guarded(serve: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The answer to a question. Whatever candidate code raises becomes an answer, even if it tries to exit."""
    try:
        return serve()
    except SyntaxError as error:
        return {"syntax": str(error)[:200]}
    except BaseException as error:
        try:
            text = str(error)[:200]
        except BaseException:
            text = ""
        return {"raised": type(error).__name__, "text": text}


def _load(question: dict[str, Any], space: dict[str, Any], _pipe: _Pipe) -> dict[str, Any]:
    exec(compile(question["source"], "<candidate>", "exec", dont_inherit=True), space)
    return {"value": None}


def _call(question: dict[str, Any], space: dict[str, Any], _pipe: _Pipe) -> dict[str, Any]:
    function = _found(question["name"], space)
    args, kwargs = from_json(question["args"]), from_json(question["kwargs"])
    return {"value": to_json(function(*args, **kwargs))}


def _found(name: str, space: dict[str, Any]) -> Callable[..., Any]:
    """A function by its name, or a method ``Class.method`` of an object that is made without arguments."""
    owner, _, method = name.rpartition(".")
    if name not in space and owner not in space:
        raise NameError(f"name {name!r} is not defined")
    found: Callable[..., Any] = getattr(space[owner](), method) if owner else space[name]
    return found


def _check(question: dict[str, Any], space: dict[str, Any], pipe: _Pipe) -> dict[str, Any]:
    """Run tests of a function in another process. Each of its calls is sent as a question to the parent."""

    def under_test(*args: Any, **kwargs: Any) -> Any:
        pipe.send({"ask": to_json(args), "kwargs": to_json(kwargs)})
        answer = pipe.receive()
        if "value" in answer:
            return from_json(answer["value"])
        kind = getattr(builtins, answer["raised"], None)
        raise (kind if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError)(answer["text"])

    _load(question, space, pipe)
    owner, _, method = question["name"].rpartition(".")
    space[owner or method] = type(owner, (), {method: staticmethod(under_test)}) if owner else under_test
    space["candidate"] = under_test
    exec(compile(question["tests"], "<tests>", "exec", dont_inherit=True), space)
    return {"value": None}


def _run(question: dict[str, Any], space: dict[str, Any], _pipe: _Pipe) -> dict[str, Any]:
    """Run a whole program with a text as its standard input. Its output goes to standard output."""
    import io

    sys.stdin = io.TextIOWrapper(io.BytesIO(question["stdin"].encode(errors="surrogatepass")), encoding="utf-8")
    try:
        _load(question, space, _pipe)
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    sys.stdout.flush()
    return {"value": None}

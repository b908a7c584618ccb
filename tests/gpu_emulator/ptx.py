"""Parse PTX text into functions, variables and instructions; nothing here knows what an instruction means."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from .errors import UnsupportedPTX

MOST_THREADS = 1024  # of a block


@dataclass(frozen=True)
class Variable:
    """``.global .align 4 .b8 name[16] = {...};`` and the like."""

    name: str
    space: str  # global, const, shared, local, param
    type: str
    align: int
    count: int | None  # elements of an array, 0 for one of unknown size, None for a scalar
    initializer: str
    extern: bool
    line: int
    vector: int = 1


@dataclass(frozen=True)
class Registers:
    """``.reg .b32 %r<8>;`` declares r0 to r7, ``.reg .pred p, q;`` the names as they stand (count None)."""

    type: str
    names: tuple[tuple[str, int | None], ...]


@dataclass(frozen=True)
class Label:
    name: str


@dataclass(frozen=True)
class Scope:
    """A brace within a body."""

    opens: bool


@dataclass(frozen=True)
class Targets:
    """``name: .branchtargets a, b, c;``"""

    name: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Instruction:
    line: int
    guard: str  # register of the predicate, "" for none
    negated: bool
    opcode: str  # "ld.global.v4.f32"
    operands: tuple[str, ...]
    location: tuple[int, int]  # file number and line of the source, (0, 0) if unknown

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def modifiers(self) -> tuple[str, ...]:
        return tuple(self.opcode.split(".")[1:])


Statement = Variable | Registers | Label | Scope | Targets | Instruction


@dataclass
class Function:
    name: str
    entry: bool
    params: tuple[Variable, ...]
    results: tuple[Variable, ...]
    body: list[Statement] | None  # None: declared here, defined elsewhere
    line: int
    most_threads: int = MOST_THREADS  # of a block


@dataclass
class Module:
    target: str = ""
    files: dict[int, str] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    functions: dict[str, Function] = field(default_factory=dict)


_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}


def type_size(ptx_type: str) -> int:
    """Bytes of a type: 4 for f32, 2 for bf16, 4 for f16x2."""
    if ptx_type == "pred":
        return 1
    match = re.fullmatch(r"(?:bf|tf|[busf])(\d+)(x2)?", ptx_type)
    if not match:
        raise UnsupportedPTX(f"type .{ptx_type}")
    return _SIZES[match[1]] * (2 if match[2] else 1)


def parse(text: str) -> Module:
    """Parse a PTX module.

    Raises
    ------
    UnsupportedPTX
        A directive that is not known.
    """
    return _Parser(text).module()


def _blank(match: re.Match[str]) -> str:
    return "\n" * match[0].count("\n")


class _Parser:
    def __init__(self, text: str) -> None:
        text = re.sub(r"/\*.*?\*/", _blank, text, flags=re.S)
        text = re.sub(r"//[^\n]*", "", text)
        # directives that end with their line get a semicolon like the rest
        text = re.sub(r"^(\s*\.(?:loc|file|version|target|address_size)\b[^\n;]*)$", r"\1;", text, flags=re.M)
        self.text = text
        self.at = 0
        self.line = 1
        self.location = (0, 0)

    # -- text --
    def _skip_space(self) -> None:
        match = re.compile(r"\s*").match(self.text, self.at)
        assert match
        self._advance(match.end())

    def _advance(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def _until(self, stops: str) -> str:
        """Text up to one of `stops` outside of quotes and parentheses; the stop itself is left."""
        depth, i, quoted = 0, self.at, False
        while i < len(self.text):
            char = self.text[i]
            if char == '"':
                quoted = not quoted
            elif not quoted:
                if depth == 0 and char in stops:
                    break
                depth += char in "([{"
                depth -= char in ")]}"
            i += 1
        found = self.text[self.at : i]
        self._advance(i)
        return found.strip()

    def _take(self, char: str) -> None:
        self._skip_space()
        if not self.text.startswith(char, self.at):
            raise UnsupportedPTX(f"line {self.line}: expected {char!r}, found {self.text[self.at : self.at + 40]!r}")
        self._advance(self.at + len(char))

    # -- module --
    def module(self) -> Module:
        module = Module()
        while True:
            self._skip_space()
            if self.at >= len(self.text):
                return module
            self._top_level(module)

    def _top_level(self, module: Module) -> None:
        start = self.line
        rest = self.text[self.at :]
        if rest.startswith(".section"):
            self._until("{")
            depth_end = self._matching_brace()
            self._advance(depth_end)
            return
        head = re.match(r"(?:\.(?:visible|weak|extern|common|noreturn)\s+)*\.(entry|func)\b", rest)
        if head:
            self._function(module, head[1] == "entry", head.end())
            return
        statement = self._until(";")
        self._take(";")
        if statement.startswith(".file"):
            number, path = re.match(r'\.file\s+(\d+)\s+"([^"]*)"', statement).groups()  # type: ignore[union-attr]
            module.files[int(number)] = path
        elif statement.startswith(".target"):
            module.target = statement.split(None, 1)[1]
        elif statement.startswith((".version", ".address_size", ".pragma", ".loc")) or not statement:
            pass
        elif re.match(r"(\.(visible|weak|extern|common)\s+)*\.(global|const|shared)\b", statement):
            module.variables.extend(_variables(statement, start))
        else:
            raise UnsupportedPTX(f"line {start}: directive {statement.split()[0]}")

    def _matching_brace(self) -> int:
        depth = 0
        for match in re.compile(r"[{}]").finditer(self.text, self.at):
            depth += 1 if match[0] == "{" else -1
            if depth == 0:
                return match.end()
        raise UnsupportedPTX(f"line {self.line}: a brace is never closed")

    def _function(self, module: Module, entry: bool, head_length: int) -> None:
        start = self.line
        self._advance(self.at + head_length)
        results: tuple[Variable, ...] = ()
        self._skip_space()
        if self.text[self.at] == "(":
            results = self._params()
        match = re.compile(r"\s*([\w$.%]+)").match(self.text, self.at)
        assert match
        self._advance(match.end())
        self._skip_space()
        params = self._params() if self.text[self.at] == "(" else ()
        bounds = re.search(r"\.(?:maxntid|reqntid)\s+([\d,\s]+)", self._until(";{"))  # the rest binds the compiler only
        threads = math.prod(map(int, bounds[1].split(","))) if bounds else MOST_THREADS
        function = Function(match[1], entry, params, results, None, start, threads)
        if self.text[self.at] == ";":
            self._take(";")
            module.functions.setdefault(function.name, function)
            return
        self._take("{")
        self.location = (0, 0)
        function.body = list(self._body())
        module.functions[function.name] = function

    def _params(self) -> tuple[Variable, ...]:
        self._take("(")
        text = self._until(")")
        self._take(")")
        declarations = [d for d in split_operands(text) if d]
        return tuple(variable for d in declarations for variable in _variables(d, self.line))

    # -- body --
    def _body(self) -> Iterator[Statement]:
        depth = 0
        while True:
            self._skip_space()
            char = self.text[self.at]
            if char == "{":
                depth += 1
                self._take("{")
                yield Scope(True)
            elif char == "}":
                self._take("}")
                if depth == 0:
                    return
                depth -= 1
                yield Scope(False)
            elif char == ";":
                self._take(";")
            else:
                yield from self._statement()

    def _statement(self) -> Iterator[Statement]:
        label = re.compile(r"([\w$]+)\s*:(?!:)").match(self.text, self.at)
        start = self.line
        if label:
            self._advance(label.end())
            self._skip_space()
            if self.text.startswith(".branchtargets", self.at):
                targets = self._until(";").split(None, 1)[1]
                yield Targets(label[1], tuple(t.strip() for t in targets.split(",")))
            elif self.text.startswith(".callprototype", self.at):
                raise UnsupportedPTX(f"line {start}: .callprototype (a call through a pointer)")
            else:
                yield Label(label[1])
            return
        text = " ".join(self._until(";").split())
        self._take(";")
        if text.startswith(".loc "):
            self._locate(text)
        elif text.startswith(".reg"):
            yield _registers(text)
        elif text.startswith(".pragma"):
            pass
        elif text.startswith("."):
            yield from _variables(text, start)
        else:
            yield self._instruction(text, start)

    def _locate(self, text: str) -> None:
        """The line of the function's own file: of inlined code, the line that it was inlined at."""
        match = re.match(r"\.loc (\d+) (\d+)", text)
        inlined = re.search(r"inlined_at (\d+) (\d+)", text)
        assert match, text
        if inlined is None:
            self.location = (int(match[1]), int(match[2]))
        elif int(inlined[1]) == self.location[0]:
            self.location = (int(inlined[1]), int(inlined[2]))

    def _instruction(self, text: str, line: int) -> Instruction:
        match = re.fullmatch(r"(?:@(!?)([%\w$]+)\s+)?([\w.:]+)\s*(.*)", text)
        if not match:
            raise UnsupportedPTX(f"line {line}: {text}")
        negated, guard, opcode, operands = match.groups()
        opcode = opcode.replace("::", "__")
        return Instruction(line, guard or "", negated == "!", opcode, split_operands(operands), self.location)


def split_operands(text: str) -> tuple[str, ...]:
    """Split at the commas that no bracket encloses."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += char in "([{"
        depth -= char in ")]}"
        if char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return (*parts, last) if last or parts else ()


def _registers(text: str) -> Registers:
    match = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text)
    if not match:
        raise UnsupportedPTX(text)
    names: list[tuple[str, int | None]] = []
    for name in match[2].split(","):
        ranged = re.fullmatch(r"\s*([%\w$]+)\s*(?:<(\d+)>)?\s*", name)
        assert ranged
        names.append((ranged[1], int(ranged[2]) if ranged[2] else None))
    return Registers(match[1], tuple(names))


_VARIABLE = re.compile(
    r"(?P<linkage>(?:\.(?:visible|weak|extern|common)\s+)*)\.(?P<space>global|const|shared|local|param)\s+"
    r"(?P<attributes>(?:\.attribute\([^)]*\)\s*|\.ptr\s*(?:\.(?:global|const|shared|local)\s*)?|\.align\s+\d+\s*)*)"
    r"(?:\.v(?P<vector>[248])\s+)?\.(?P<type>\w+)\s+(?:\.ptr\s*(?:\.(?:global|const|shared|local)\s*)?(?:\.align\s+\d+\s*)?)?(?P<rest>.*)",
    re.S,
)


def _variables(text: str, line: int) -> list[Variable]:
    match = _VARIABLE.fullmatch(text.strip())
    if not match:
        raise UnsupportedPTX(f"line {line}: {text[:80]}")
    align = re.search(r"\.align\s+(\d+)", match["attributes"])  # of the variable; after .ptr it is the pointee's
    if ".ptr" in match["attributes"]:
        align = None
    vector = int(match["vector"] or 1)
    found = []
    for declaration in split_operands(match["rest"]):
        named = re.fullmatch(r"([\w$%.]+)\s*((?:\[\s*\w*\s*\]\s*)*)(?:=\s*(.*))?", declaration, re.S)
        if not named:
            raise UnsupportedPTX(f"line {line}: {declaration[:80]}")
        count: int | None = None
        for dimension in re.findall(r"\[\s*(\w*)\s*\]", named[2]):
            count = (1 if count is None else count) * (int(dimension, 0) if dimension else 0)
        natural = type_size(match["type"]) * vector
        found.append(
            Variable(
                named[1],
                match["space"],
                match["type"],
                int(align[1]) if align else natural,
                count,
                (named[3] or "").strip(),
                "extern" in match["linkage"],
                line,
                vector,
            )
        )
    return found

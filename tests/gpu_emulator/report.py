"""Reads the output of a sanitizer: which threads touched which memory, at which line of the PTX."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_ACCESS = re.compile(
    r"^ *(?P<what>(?:Previous )?(?:atomic )?(?:read|write)) of size (?P<size>\d+) at \w+(?: by (?P<who>.*?):)?",
    re.M | re.I,
)
_THREAD = re.compile(r"block \((\d+),(\d+),(\d+)\)(?: thread \((\d+),(\d+),(\d+)\))?")
_OFFSET = re.compile(r"\((?:[^()]*/)?kernel\+0x([0-9a-f]+)\)")


@dataclass(frozen=True)
class Access:
    """One side of a report: ``what`` is "Write of size 4", ``line`` its PTX line (0 if it is not the kernel's)."""

    what: str
    block: tuple[int, ...]
    thread: tuple[int, ...]
    line: int


@dataclass(frozen=True)
class Report:
    title: str
    accesses: list[Access]


def parse(text: str, program: Path) -> Report | None:
    """The first report in a sanitizer's output, None if there is none."""
    start = re.search(r"(?:WARNING: Thread|ERROR: Address)Sanitizer: (.*)", text)
    if start is None:
        return None
    body = text[start.start() :].split("==================")[0]
    names = {m[1]: _THREAD.search(m[0]) for m in re.finditer(r"^ *Thread (T\d+) '[^']*'", body, re.M)}
    running = re.search(rf"^running: {_THREAD.pattern}", text, re.M)
    accesses = []
    for match in _ACCESS.finditer(body):
        numbered = re.search(r"T\d+", match["who"] or "")
        who = names.get(numbered[0]) if numbered else running
        numbers = tuple(int(n) for n in who.groups() if n) if who else ()
        stack = body[match.end() :].split("\n\n")[0]
        line = _ptx_line(_OFFSET.findall(stack), program)
        accesses.append(Access(f"{match['what'].strip()} of size {match['size']}", numbers[:3], numbers[3:], line))
    title = re.sub(r" on address.*| \(pid=.*| 0x\w+.*", "", start[0].split(": ", 1)[1])
    return Report(title, accesses)


def _ptx_line(offsets: list[str], program: Path) -> int:
    """Each statement of the translated file ends with the line of its instruction."""
    addr2line = shutil.which("addr2line") or shutil.which("llvm-addr2line")
    if not offsets or addr2line is None:
        return 0
    command = [addr2line, "-i", "-e", str(program), *(f"0x{offset}" for offset in offsets)]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    source = (program.parent / "kernel.cpp").read_text().split("\n")
    for number in re.findall(r"kernel\.cpp:(\d+)", found):
        match = re.search(r"// (\d+): ", source[int(number) - 1])
        if match:
            return int(match[1])
    return 0

"""Finds the code in the text of a chat model."""

from __future__ import annotations

import re

__all__ = ["code_blocks", "code_of", "defines"]

_FENCE = re.compile(r"^[ \t]*(?P<mark>`{3,}|~{3,})[ \t]*(?P<language>[\w+#.-]*)[^\n`]*$", re.MULTILINE)
_PYTHON = ("", "python", "python3", "py", "py3")
_CODE_LINE = re.compile(r"(?:async )?def |class |import |from \S+ import |@\w|#|[A-Za-z_][\w.]*(?:\[[^\]]*\])? *=[^=]")
_BEGIN = re.compile(r"^(?:async def |def |class |import |from \S+ import |@\w)", re.MULTILINE)


def code_blocks(text: str) -> list[str]:
    r"""Return the fenced blocks of Python, or of no language, in order; the last one may still be open. O(len(text)).

    Examples
    --------
    >>> code_blocks("So:\n```python\nx = 1\n```\nand\n```sh\nls\n```\n```\ny =")
    ['x = 1\n', 'y =']
    """
    blocks: list[str] = []
    opened: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        if opened is None:
            opened = fence
        elif fence["mark"].startswith(opened["mark"]) and not fence["language"]:
            blocks += _block(opened, text[opened.end() : fence.start()])
            opened = None
    return blocks if opened is None else [*blocks, *_block(opened, text[opened.end() :])]


def _block(fence: re.Match[str], inside: str) -> list[str]:
    return [inside.removeprefix("\n")] if fence["language"].lower() in _PYTHON else []


def defines(code: str, name: str) -> bool:
    """Whether code has a definition of a function or class of this name at its top level."""
    return bool(re.search(rf"^(?:async def|def|class) +{re.escape(name)}\b", code, re.MULTILINE))


def code_of(text: str, entry: str = "") -> str:
    """Return the code of a reply; empty if it has none.

    Parameters
    ----------
    text : str
        What a model said: prose with fenced blocks, or code with prose around it.
    entry : str
        The function or class that the code is to define.

    Returns
    -------
    str
        The last fenced block that defines `entry`, with the blocks before it that it may need; without such a block the
        longest one. Without a fence: from the first line that looks like code to the first later line that does not.
    """
    blocks = code_blocks(text)
    if not blocks:
        return _bare(text)
    if entry:
        last = max((number for number, block in enumerate(blocks) if defines(block, entry)), default=None)
        if last is not None:
            helpers = [block for block in blocks[:last] if _BEGIN.match(block) and not defines(block, entry)]
            return "\n".join([*helpers, blocks[last]])
    return max(blocks, key=len)


def _bare(text: str) -> str:
    begin = _BEGIN.search(text)
    if begin is None:
        return ""
    lines = text[begin.start() :].split("\n")
    depth, end = 0, 0
    for number, line in enumerate(lines):
        goes_on = depth > 0 or not line.strip() or line[0] in " \t)]}" or _CODE_LINE.match(line)
        if not goes_on:
            break
        depth += sum(line.count(each) for each in "([{") - sum(line.count(each) for each in ")]}")
        end = number + 1
    return "\n".join(lines[:end]).rstrip() + "\n"

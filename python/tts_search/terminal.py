"""The terminal: what a model wrote, made safe to print, and a progress bar."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress_bar", "sanitize"]

_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"  # CSI: colours, cursor, erase
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"  # OSC, DCS: titles, links, clipboard
    r"|\x1b[ -/]*[0-~]?"  # other escape sequences
)
# Control characters but tab and newline, those that change the direction of text, line separators, lone surrogates
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u061c\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def sanitize(text: str) -> str:
    """Return a text that is safe to print: no control sequences, no control or direction-changing characters.

    Newlines and tabs stay. What is left of a text cannot move the cursor, colour, retitle, or reorder what is on
    screen.
    """
    return _CONTROL.sub("", _SEQUENCE.sub("", text))


@contextmanager
def progress_bar(total: int | None, *, enabled: bool, label: str = "search") -> Iterator[Callable[[], None]]:
    """Show a progress bar on stderr; the context is a function to call after each of the `total` problems.

    Nothing is shown if it is not `enabled`, stderr is not a terminal, or rich is not installed.
    """
    if not enabled or not sys.stderr.isatty():
        yield lambda: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ModuleNotFoundError:
        yield lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda: bar.advance(task)

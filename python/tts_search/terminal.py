"""The terminal: makes text of a model safe to print, and shows a progress bar."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

__all__ = ["Progress", "progress_bar", "sanitize"]

_PERIOD: Final = 0.5  # seconds between two notes

_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"  # CSI: colours, cursor, erase
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"  # OSC, DCS: titles, links, clipboard
    r"|\x1b[ -/]*[0-~]?"  # other escape sequences
)
# Control characters but tab and newline, those that change the direction of text, line separators, lone surrogates
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u061c\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def sanitize(text: str) -> str:
    """Return a text that is safe to print: no control sequences, no control or direction-changing characters.

    Newlines and tabs stay. The remaining text cannot move the cursor, change colours or the title, or reorder what is
    on screen.
    """
    return _CONTROL.sub("", _SEQUENCE.sub("", text))


class Progress:
    """The progress of a series of problems. This class shows nothing."""

    def advance(self) -> None:
        """A problem is done."""

    def tell(self, note: Callable[[], str]) -> None:
        """Show a note beside the progress. The note is made only when it is time for a new one."""


class _Bar(Progress):
    """Progress shown by rich."""

    def __init__(self, bar: Any, total: int | None, label: str) -> None:
        self._bar = bar
        self._task = bar.add_task(label, total=total, note="")
        self._next = 0.0

    def advance(self) -> None:
        self._bar.advance(self._task)

    def tell(self, note: Callable[[], str]) -> None:
        if (now := time.monotonic()) >= self._next:
            self._next = now + _PERIOD
            self._bar.update(self._task, note=note())


@contextmanager
def progress_bar(total: int | None, *, enabled: bool, label: str = "search") -> Iterator[Progress]:
    """Show a progress bar of `total` problems on stderr, with the time left and a note.

    Nothing is shown if it is not `enabled`, stderr is not a terminal, or rich is not installed.
    """
    if not enabled or not sys.stderr.isatty():
        yield Progress()
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars
    except ModuleNotFoundError:
        yield Progress()
        return
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *times,
        TextColumn("{task.fields[note]}"),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _Bar(bar, total, label)

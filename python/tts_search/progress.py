"""A progress bar on stderr, where there is a terminal to show it and rich to draw it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(total: int | None, *, enabled: bool, label: str = "search") -> Iterator[Callable[[], None]]:
    """Show a progress bar; the context is a function to call after each of the `total` problems.

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

"""The command line: ``tts-search demo | solve | eval | study | report``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

from tts_search.errors import MissingExtraError, SearchError, require
from tts_search.terminal import sanitize

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    with _errors_as_text():
        require("typer", "search")
        from tts_search.cli.commands import app

        app(_with_ray_address(sys.argv[1:]))


def _with_ray_address(arguments: Sequence[str]) -> list[str]:
    """Give ``--ray`` without an address the one that means Ray's own choice: typer has no options of optional value."""
    without = [one == "--ray" and after.startswith("-") for one, after in pairwise([*arguments, "-"])]
    return [f"{one}=" if bare else one for one, bare in zip(arguments, without, strict=True)]


@contextmanager
def _errors_as_text() -> Iterator[None]:
    """End the program with a line about an error that the user can mend, not with a traceback."""
    try:
        yield
    except (SearchError, MissingExtraError, ValueError, OSError) as error:
        sys.exit(f"tts-search: {sanitize(str(error))}")

"""The command line: ``tts-search demo | solve | eval | study | report | serve``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NoReturn

from tts_search.errors import MissingExtraError, SearchError, require
from tts_search.terminal import sanitize

__all__ = ["main"]


def main() -> None:
    """Run the command line. The exit status is 0 after success, 2 for invalid options, else 1."""
    with _errors_as_text():
        typer = require("typer", "search")
        from tts_search.cli.serving import app

        usage_error = typer.BadParameter.__base__  # the parser's errors about options
        try:
            status = app(_with_ray_address(sys.argv[1:] or ["--help"]), standalone_mode=False)
        except usage_error as error:
            _end(error.format_message(), 2)
        sys.stdout.flush()  # a full disk or a closed pipe is an error, too
        sys.exit(status or 0)


def _with_ray_address(arguments: Sequence[str]) -> list[str]:
    """Give ``--ray`` without an address the value for Ray's own choice: typer has no options with an optional value."""
    without = [one == "--ray" and after.startswith("-") for one, after in pairwise([*arguments, "-"])]
    return [f"{one}=" if bare else one for one, bare in zip(arguments, without, strict=True)]


@contextmanager
def _errors_as_text() -> Iterator[None]:
    """End the program with one line for an error that the user can correct, without a traceback."""
    try:
        yield
    except (SearchError, MissingExtraError, ValueError, OSError) as error:
        _end(str(error), 1)
    except KeyboardInterrupt:
        _end("interrupted", 130)


def _end(message: str, status: int) -> NoReturn:
    print(f"tts-search: {sanitize(' '.join(message.split()))}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # the remaining output cannot be written, and would be tried again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)

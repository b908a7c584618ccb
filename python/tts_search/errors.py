"""Errors of the search API."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["ConfigError", "MissingExtraError", "SearchError", "ServerError", "require"]


class SearchError(RuntimeError):
    """A search failed.

    Attributes
    ----------
    message : str
        What went wrong.
    problem : int or None
        Index of the problem in the run, if the failure belongs to one.
    round : int or None
        Round of the search, counted from 1; 0 before the first one.
    """

    def __init__(self, message: str, problem: int | None = None, round: int | None = None) -> None:  # noqa: A002
        super().__init__(message, problem, round)  # all of it in args, so that the error can be pickled
        self.message = message
        self.problem = problem
        self.round = round

    def __str__(self) -> str:
        place = [] if self.problem is None else [f"problem {self.problem}"]
        place += [] if self.round is None else [f"round {self.round}"]
        return f"{', '.join(place)}: {self.message}" if place else self.message


class ConfigError(SearchError, ValueError):
    """An option of a search has a value that it cannot have."""


class ServerError(RuntimeError):
    """A server gave no answer, or none that can be used."""


class MissingExtraError(ImportError):
    """An optional dependency is not installed; the message names the extra that installs it."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency on use.

    Raises
    ------
    MissingExtraError
        If the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(
            f"{module} is not installed: pip install 'tts-kernels[{extra}]'", name=error.name
        ) from error

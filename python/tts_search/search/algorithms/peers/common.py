"""Code that the searches of several frameworks share."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tts_search.search.run import Branch, Run
from tts_search.search.types import StepParams

__all__ = ["stop_short", "to_delimiter"]


def stop_short(branches: Iterable[Branch]) -> None:
    """Stop those whose step is empty or was cut by its length."""
    for branch in branches:
        if branch.cut or not branch.text:
            branch.stop()


def to_delimiter(run: Run) -> Callable[[Branch], StepParams]:
    """Return how to sample a step that ends at the delimiter, in the last round too."""
    return lambda branch: run.config.step_params(last=False, tokens_left=run.tokens_left(branch))

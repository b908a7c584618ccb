"""Best-of-N with a smaller n, out of a search with a larger one: its completions are the first ones."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, replace

from tts_search.search.result import SearchResult, best_of
from tts_search.search.stats import SearchStats
from tts_search.search.tree import SearchTree
from tts_search.search.types import Completion

__all__ = ["with_smaller_n"]

_OF_THE_PROMPT = ("rounds", "policy_prefill_tokens")  # the same for any n


def with_smaller_n(result: SearchResult, n: int) -> SearchResult:
    """Return the result that best-of-N with a smaller n would have had: that of the first n completions.

    It has no tree. Tokens are those of the n completions, equal ones counted once for the verifier; other costs of the
    models are taken in proportion to them, and the time is not known (NaN).

    Raises
    ------
    ValueError
        If this is no best-of-N in order of sampling, or has less than n completions.
    """
    config, everyone = result.config, result.completions
    if not config.is_best_of_n or config.sort_completed or not 1 <= n <= len(everyone):
        raise ValueError(f"n: expected 1 to {len(everyone)} of the completions of a best-of-N, got {n!r}")
    completions = everyone[:n]
    share, verifier_share = (count(completions) / max(1, count(everyone)) for count in (_tokens_sampled, _tokens_read))
    return replace(
        result,
        completions=completions,
        best=best_of(result.ballot.voters(completions)),
        tree=SearchTree(result.tree.nodes[:1]),
        stats=_part(result.stats, n, share, verifier_share),
        config=replace(config, n=n),
    )


def _tokens_sampled(completions: Iterable[Completion]) -> int:
    return sum(one.num_tokens for one in completions)


def _tokens_read(completions: Iterable[Completion]) -> int:
    """A verifier reads equal texts once."""
    return sum({one.text: one.num_tokens for one in completions}.values())


def _part(stats: SearchStats, branches: int, share: float, verifier_share: float) -> SearchStats:
    """The cost of some of the branches, which hold these shares of the tokens of each model."""
    costs = asdict(stats)
    for name, value in costs.items():
        part = (verifier_share if "verifier" in name else share) * value
        if name not in _OF_THE_PROMPT:
            costs[name] = round(part) if isinstance(value, int) else part
    return SearchStats(**{**costs, "branches": branches, "wall_s": math.nan})

"""Questions that algorithms ask about the branches of a round: which have grown, which are best, and in which order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from tts_search.search.run import Branch, Run

__all__ = ["best", "check_growth", "distinct", "has_grown", "in_order", "mark_pruned"]


def has_grown(branch: Branch) -> bool:
    """Whether a new branch has a text, or has ended without one."""
    return bool(branch.text) or branch.finished or branch.stopped


def check_growth(run: Run, branches: Iterable[Branch]) -> None:
    """Raise the error of a policy that returned nothing, if none of these has grown."""
    if not any(map(has_grown, branches)):
        raise run.error("policy: it returned nothing, an empty text for each sample")


def distinct(branches: Iterable[Branch]) -> list[Branch]:
    """Return branches of different texts: of equal ones the first."""
    first: dict[str, Branch] = {}
    for branch in branches:
        first.setdefault("".join(branch.texts), branch)
    return list(first.values())


def best(branches: Iterable[Branch], count: int) -> list[Branch]:
    """Return the `count` branches with the highest scores, best first; the earlier on ties."""
    return sorted(branches, key=lambda branch: -branch.score)[:count]


def mark_pruned(run: Run, before: Sequence[Branch], after: Iterable[Branch], why: str) -> None:
    """Mark those that this round left out; in `why`, ``{rank}`` and ``{count}`` are their place by score among all."""
    kept = {branch.id for branch in after}
    ranked = {branch.id: rank for rank, branch in enumerate(sorted(before, key=_descending), start=1)}
    for branch in before:
        if branch.id not in kept:
            branch.state, branch.pruned_in = "pruned", run.round
            if not branch.unscored:
                branch.why = why.format(rank=ranked[branch.id], count=len(ranked))


def _descending(branch: Branch) -> float:
    return math.inf if math.isnan(branch.score) else -branch.score


def in_order(run: Run, members: Iterable[Branch]) -> list[Branch]:
    """Return branches in the order of completions: as they finished, then the unfinished; or by score."""
    ordered = sorted(members, key=lambda branch: branch.id)  # rounds in order, and the candidates of a round in order
    ordered.sort(key=lambda branch: not branch.finished)
    if run.config.sort_completed and run.scored:
        ordered.sort(key=lambda branch: -branch.score)
    return ordered

"""From step scores to one score, and from many completions to one answer.

The rules and their names are the paper's (Can 1B LLM Surpass 405B LLM?, arXiv 2502.06703):
PRM-{Min,Last,Avg}-{Max,Vote} and majority vote.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tts_search.search.answers import Equality, Equivalence, same
from tts_search.search.types import Completion

__all__ = ["AGGREGATES", "VOTES", "Ballot", "aggregate", "canonical", "vote"]

AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "last": lambda scores: scores[-1],
    "min": min,
    "prod": math.prod,
    "mean": lambda scores: sum(scores) / len(scores),
    "max": max,
    "sum": sum,
}
_VOTE_AGGREGATES = ("min", "last", "mean", "prod")

VOTES = (
    "majority",
    "prm_max",
    "prm_vote",
    *(f"prm_{how}_{rule}" for how in _VOTE_AGGREGATES for rule in ("max", "vote")),
)
"""Names of the votes; ``prm_avg_max`` and ``prm_avg_vote`` are accepted for ``prm_mean_max`` and ``prm_mean_vote``."""


def canonical(name: str) -> str:
    """Return a vote's name as `VOTES` has it.

    Raises
    ------
    ValueError
        If there is no such vote.

    Examples
    --------
    >>> canonical("prm_avg_max")
    'prm_mean_max'
    """
    meant = name.replace("_avg_", "_mean_")
    if meant not in VOTES:
        raise ValueError(f"vote: expected one of {', '.join(VOTES)}, got {name!r}")
    return meant


def aggregate(scores: Sequence[float], how: str) -> float:
    """Return the aggregate of a branch's step scores: -inf without any step, NaN if one of them is.

    Infinite scores are scores. Where their aggregate is not defined (inf - inf, 0 * inf) it is -inf: such a branch
    ranks last and loses nothing else. (:func:`tts_kernels.aggregate_steps` gives NaN there, which ranks last, too.)

    Examples
    --------
    >>> aggregate([0.5, 0.25], "prod")
    0.125
    >>> aggregate([math.inf, -math.inf, 1.0], "mean")
    -inf
    """
    if not scores:
        return -math.inf
    if any(map(math.isnan, scores)):
        return math.nan
    value = float(AGGREGATES[how](scores))
    return -math.inf if math.isnan(value) else value


@dataclass(frozen=True, slots=True)
class Ballot:
    """Who elects the best completion and votes on the answer, and how.

    Attributes
    ----------
    everyone : bool
        The unfinished, too; otherwise only if none has finished.
    exact : bool
        Answers count as one only if their texts are equal.
    vote_aggregate : str or None
        The aggregate of ``prm_vote``, if it is not the config's.
    """

    everyone: bool = False
    exact: bool = False
    vote_aggregate: str | None = None

    def voters(self, completions: Sequence[Completion]) -> Sequence[Completion]:
        """Return those of the completions that vote."""
        finished = [completion for completion in completions if completion.finished]
        return completions if self.everyone or not finished else finished


def vote(
    completions: Sequence[Completion], how: str, default: str = "last", *, exact: bool = False, equal: Equality = same
) -> str:
    """Return the answer that a vote elects.

    Completions without an answer do not vote; answers that mean the same count as one, in
    the spelling that comes first. Ties go to the answer that comes first.

    Parameters
    ----------
    completions : sequence of Completion
        Who votes, in order.
    how : str
        ``"majority"``: the most frequent answer. ``"prm_max"``: the answer with the highest score. ``"prm_vote"``: the
        one with the highest sum of scores. ``"prm_min_max"``, ``"prm_mean_vote"``, ...: the same by another aggregate
        of the step scores.
    default : str
        The aggregate of ``prm_max`` and ``prm_vote``.
    exact : bool
        Answers count as one only if their texts are equal.
    equal : callable
        Otherwise: whether two answers mean the same; by default, if they are one number or one text.

    Returns
    -------
    str
        The answer; empty if no completion has one.

    Raises
    ------
    ValueError
        If there is no such vote, or it needs scores and there are none.
    """
    rule, how_aggregated = _parse(how, default)
    voters = [completion for completion in completions if completion.answer]
    if not voters:
        return ""
    weights = [1.0] * len(voters)
    if how_aggregated is not None:
        if any(math.isnan(completion.score) for completion in voters):
            raise ValueError(f"vote: {how!r} needs the scores of a verifier, there are none: use 'majority'")
        weights = [aggregate(completion.step_scores, how_aggregated) for completion in voters]
    if rule == "max":
        return voters[max(range(len(voters)), key=weights.__getitem__)].answer
    answers = [completion.answer for completion in voters]
    weights_of: dict[str, list[float]] = {}
    for completion, spelling, weight in zip(
        voters, answers if exact else Equivalence(equal).firsts(answers), weights, strict=True
    ):
        own = weights_of.setdefault(spelling, [])
        if how_aggregated is None or completion.step_scores:  # a voter without scores takes nothing from others
            own.append(weight)
    return max(weights_of, key=lambda answer: _total(weights_of[answer]))


def _total(weights: Sequence[float]) -> float:
    """The sum of weights, which does not depend on their order; -inf without any."""
    return math.fsum(weights) if weights and all(map(math.isfinite, weights)) else aggregate(weights, "sum")


def _parse(how: str, default: str) -> tuple[str, str | None]:
    """Split a vote's name into its rule (max or vote) and its aggregate (None: every voter counts 1)."""
    if how == "majority":
        return "vote", None
    _, *aggregated, rule = canonical(how).split("_")
    return rule, aggregated[0] if aggregated else default

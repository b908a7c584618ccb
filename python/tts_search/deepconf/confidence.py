"""The rules of DeepConf (Fu et al., arXiv 2508.15260): how sure a model was of its tokens, and votes weighted by this.

The confidence of a token is minus the mean log-probability of the k likeliest tokens at its place (`Generated.top`). It
is high if the distribution has one peak, because the other tokens then have small probabilities. The confidence of a
trace is that of its least sure stretch, or that of its end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Final, Literal

from tts_search.search.answers import Equality, Equivalence, same

__all__ = [
    "MEASURES",
    "WINDOW",
    "Measure",
    "Stopping",
    "confidence_vote",
    "tally",
    "token_confidence",
    "trace_confidence",
    "windows",
]

Measure = Literal["mean", "tail", "bottom", "min"]
MEASURES: Final[tuple[Measure, ...]] = ("mean", "tail", "bottom", "min")
WINDOW: Final = 2048
_BOTTOM: Final = 0.1


def token_confidence(top: Sequence[tuple[int, float]]) -> float:
    """Return the confidence of a token from the likeliest tokens in its place and their log-probabilities.

    Examples
    --------
    >>> token_confidence([(5, -0.5), (9, -3.5)])
    2.0
    """
    return -math.fsum(logprob for _, logprob in top) / len(top)


def windows(confidences: Sequence[float], window: int = WINDOW) -> list[float]:
    """Return the mean of each window of `window` tokens; if the trace is shorter, the mean of all of it. O(tokens).

    Examples
    --------
    >>> windows([1.0, 2.0, 6.0], 2), windows([1.0, 2.0], 5)
    ([1.5, 4.0], [1.5])
    """
    if len(confidences) <= window:
        return [math.fsum(confidences) / len(confidences)] if confidences else [0.0]
    sums = list(accumulate(confidences, initial=0.0))
    return [(high - low) / window for low, high in zip(sums, sums[window:], strict=False)]


def trace_confidence(confidences: Sequence[float], how: Measure, window: int = WINDOW) -> float:
    """Return the confidence of a trace.

    Parameters
    ----------
    confidences : sequence of float
        Confidences of its tokens.
    how : str
        ``"mean"``: the mean of all tokens. ``"tail"``: the mean of the last `window` tokens. ``"min"``: that of the
        least sure window. ``"bottom"``: the mean of the least sure tenth of windows, at least one.
    window : int
        Tokens of a window.

    Raises
    ------
    ValueError
        For another measure, or a window below 1.
    """
    if how not in MEASURES or window < 1:
        raise ValueError(f"how, window: expected one of {', '.join(MEASURES)} and at least 1, got {how!r}, {window!r}")
    if how in ("mean", "tail"):
        own = confidences if how == "mean" else confidences[-window:]
        return math.fsum(own) / len(own) if own else 0.0
    ascending = sorted(windows(confidences, window))
    return ascending[0] if how == "min" else _mean(ascending[: max(1, int(len(ascending) * _BOTTOM))])


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def tally(answers: Sequence[str], confidences: Sequence[float], equal: Equality = same) -> dict[str, float]:
    """Return the sum of confidences of each answer, in its first spelling and place; empty answers are left out.

    Examples
    --------
    >>> tally(["7", "8", "", "8"], [9.0, 2.0, 1.0, 3.0])
    {'7': 9.0, '8': 5.0}
    """
    voters = [index for index, answer in enumerate(answers) if answer]
    sums: dict[str, list[float]] = {}
    for index, first in zip(voters, Equivalence(equal).firsts([answers[i] for i in voters]), strict=True):
        sums.setdefault(first, []).append(confidences[index])
    return {answer: math.fsum(own) for answer, own in sums.items()}


def confidence_vote(
    answers: Sequence[str], confidences: Sequence[float], keep: float = 1.0, *, equal: Equality = same
) -> str:
    """Return the answer with the largest sum of confidences among the surest traces.

    Parameters
    ----------
    answers : sequence of str
        The answer of each trace; an empty one does not vote.
    confidences : sequence of float
        The confidence of each trace.
    keep : float
        The share of the traces with an answer that vote: the surest ones, at least one. The paper's filters keep 0.1
        and 0.9.
    equal : callable
        Whether two answers mean the same.

    Returns
    -------
    str
        In the spelling that comes first; of equal sums, the answer that comes first. Empty if there is none.

    Raises
    ------
    ValueError
        If `keep` is not in (0, 1].

    Examples
    --------
    >>> confidence_vote(["7", "8", "8"], [9.0, 2.0, 3.0]), confidence_vote(["7", "8", "8"], [4.0, 3.0, 3.0])
    ('7', '8')
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep: expected a share in (0, 1], got {keep!r}")
    voters = [index for index, answer in enumerate(answers) if answer]
    surest = sorted(voters, key=lambda index: -confidences[index])[: max(1, int(len(voters) * keep))]
    chosen = sorted(surest)
    sums = tally([answers[i] for i in chosen], [confidences[i] for i in chosen], equal)
    return max(sums, key=lambda answer: sums[answer], default="")


class Stopping:
    """Decides when a trace is stopped while it is written: at a window that is less sure than the warm-up traces.

    The threshold is taken from the least sure windows of the warm-up traces, as the percentile that a share `keep` of
    them reaches. 0.1 is the paper's DeepConf-low, 0.9 its DeepConf-high.

    Parameters
    ----------
    warm_up : sequence of sequence of float
        Confidences of the tokens of whole traces; the paper draws 16.
    keep : float
        The share of the warm-up traces that would not have been stopped.
    window : int
        Tokens of a window; a trace is not stopped before it has this many.

    Raises
    ------
    ValueError
        Without warm-up traces, or if `keep` is not in (0, 1].
    """

    def __init__(self, warm_up: Sequence[Sequence[float]], keep: float = 0.1, window: int = WINDOW) -> None:
        if not warm_up or not 0 < keep <= 1:
            raise ValueError(f"warm_up, keep: expected traces and a share in (0, 1], got {len(warm_up)} and {keep!r}")
        self.window = window
        least = sorted(trace_confidence(trace, "min", window) for trace in warm_up)
        place = (1 - keep) * (len(least) - 1)
        low, share = int(place), place - int(place)
        self.threshold = least[low] + share * (least[min(low + 1, len(least) - 1)] - least[low])

    def stops(self, confidences: Sequence[float]) -> bool:
        """Whether a trace ends here, by its last window. O(window)."""
        return len(confidences) >= self.window and _mean(confidences[-self.window :]) < self.threshold

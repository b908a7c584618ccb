"""Statistics of accuracies: intervals, a test of the difference of two, and a correction for many tests."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["holm", "interval", "sign_test", "wilson"]


def wilson(successes: float, total: float, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion, by default at 95%; `z` is the normal quantile.

    Unlike the normal approximation it stays within [0, 1] and holds for few trials and for proportions near 0 and 1
    (E. B. Wilson, JASA 22, 1927). Without any trial it is all of [0, 1].

    Examples
    --------
    >>> [round(bound, 3) for bound in wilson(5, 10)]
    [0.237, 0.763]
    """
    if total == 0:
        return 0.0, 1.0
    rate = successes / total
    centre = (rate + z * z / (2 * total)) / (1 + z * z / total)
    spread = z / (1 + z * z / total) * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
    return max(0.0, centre - spread), min(1.0, centre + spread)


def interval(shares: Sequence[float], trials: int) -> tuple[float, float]:
    """Return the 95% interval of an accuracy over tasks that were tried several times: Wilson's interval.

    Trials of one task are correlated, so they count as fewer independent trials. Their number is chosen to match the
    variance of the tasks' means (the design effect of a cluster sample; E. L. Korn and B. I. Graubard, Survey
    Methodology 24, 1998), and is at least one for each task. With one trial of each task it is plain Wilson's interval.

    Parameters
    ----------
    shares : sequence of float
        For each task, the share of its trials that were right.
    trials : int
        The number of trials of all tasks together.

    Examples
    --------
    >>> interval([1.0, 0.0, 1.0, 1.0], 4) == wilson(3, 4) == interval([1.0, 0.0, 1.0, 1.0], 40)
    True
    """
    if not shares:
        return 0.0, 1.0
    count = len(shares)
    mean = math.fsum(shares) / count
    variance = math.fsum((share - mean) ** 2 for share in shares) / count
    effective = min(float(trials), mean * (1 - mean) * count / variance) if variance > 0 else float(trials)
    if mean in (0.0, 1.0):
        effective = float(count)  # the variance is not known
    return wilson(mean * effective, effective)


def sign_test(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the probability of a difference at least this large if two searches are equally good.

    This is the two-sided sign test over the tasks that one of the searches solved more often. (With one trial of each
    task it is McNemar's exact test.)

    Parameters
    ----------
    first, second : sequence of float
        For each task, the share of its trials that were right.

    Examples
    --------
    >>> sign_test([1, 1, 1, 1, 0], [0, 0, 0, 0, 0])
    0.125
    """
    wins = sum(a > b for a, b in zip(first, second, strict=True))
    losses = sum(a < b for a, b in zip(first, second, strict=True))
    tail = sum(math.comb(wins + losses, count) for count in range(min(wins, losses) + 1))
    return min(1.0, float(2 * tail / 2 ** (wins + losses)))


def holm(values: Sequence[float]) -> list[float]:
    """Return the p-values of several tests, corrected for the number of tests.

    If a finding is a corrected value below 5%, at most one in twenty such families of tests has a false finding,
    whatever the truth (S. Holm, Scandinavian Journal of Statistics 6, 1979).

    Examples
    --------
    >>> holm([0.01, 0.2, 0.02])
    [0.03, 0.2, 0.04]
    """
    corrected = [0.0] * len(values)
    least = 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=lambda place: values[place])):
        least = max(least, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = least
    return corrected

"""How sure a measured accuracy is: intervals, and a test of two of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tts_search.evaluation.rows import Row

__all__ = ["bootstrap", "sign_test", "wilson"]


def wilson(successes: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion, at 95% unless another quantile is given.

    Unlike the normal approximation it stays within [0, 1] and holds for few trials and for proportions near 0 and 1
    (E. B. Wilson, JASA 22, 1927). Without any trial it is all of [0, 1].
    """
    if total == 0:
        return 0.0, 1.0
    rate = successes / total
    centre = (rate + z * z / (2 * total)) / (1 + z * z / total)
    spread = z / (1 + z * z / total) * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
    return max(0.0, centre - spread), min(1.0, centre + spread)


def bootstrap(values: Sequence[float], *, samples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Return the 95% percentile bootstrap interval of a mean: `samples` resamplings with replacement."""
    import torch

    data = torch.tensor(values, dtype=torch.float64)
    drawn = torch.randint(len(data), (samples, len(data)), generator=torch.Generator().manual_seed(seed))
    means = data[drawn].mean(1).sort().values
    return float(means[int(0.025 * samples)]), float(means[int(0.975 * samples) - 1])


def sign_test(first: Row, second: Row) -> tuple[float, float]:
    """Compare two rows over the same tasks.

    Returns
    -------
    difference : float
        Accuracy of the first less that of the second.
    p : float
        Probability of a difference at least as large if both were equally good: two-sided sign test over the tasks that
        only one of them solved (McNemar's test, exact).
    """
    solved_by_second = {record.task: record.is_correct(second.vote) for record in second.records}
    outcomes = [(record.is_correct(first.vote), solved_by_second[record.task]) for record in first.records]
    wins, losses = outcomes.count((True, False)), outcomes.count((False, True))
    decided = wins + losses
    tail = sum(math.comb(decided, count) for count in range(min(wins, losses) + 1)) / 2**decided
    return (wins - losses) / max(1, len(outcomes)), min(1.0, 2 * tail)

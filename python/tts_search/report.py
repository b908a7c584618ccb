"""Tables of an evaluation: accuracy with confidence intervals, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tts_search.evaluate import Record

__all__ = ["Row", "accuracy_table", "cost_table", "format_table", "sign_test", "wilson"]


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


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text: the first column to the left, the others to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([_line(header, widths), rule, *(_line(row, widths) for row in rows)])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (
        cell.ljust(width) if index == 0 else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join([first, *rest]).rstrip()


@dataclass(frozen=True)
class Row:
    """A row of the tables: the records of an experiment, and the vote whose answer counts."""

    label: str
    records: Sequence[Record]
    vote: str = "prm_max"


def accuracy_table(rows: Sequence[Row]) -> str:
    """Return accuracy in percent by row and level, with 95% Wilson intervals. An error counts as a wrong answer."""
    levels = sorted({record.level for row in rows for record in row.records})
    shown = levels if len(levels) > 1 else []
    lines = []
    for row in rows:
        cells = [_accuracy([record for record in row.records if record.level == level], row.vote) for level in shown]
        lines.append([row.label, *cells, _accuracy(row.records, row.vote)])
    names = [f"level {level}" if level.isdigit() else level or "no level" for level in shown]
    return format_table(["accuracy % (95% interval)", *names, "all"], lines)


def _accuracy(records: Sequence[Record], vote: str) -> str:
    if not records:
        return "-"
    correct = sum(record.is_correct(vote) for record in records)
    low, high = wilson(correct, len(records))
    return f"{100 * correct / len(records):.0f} ({100 * low:.0f}-{100 * high:.0f})"


def cost_table(rows: Sequence[Row], seconds: Mapping[str, float]) -> str:
    """Return what the searches cost: tokens and peak KV slots a problem, and seconds in all.

    KV slots are means over problems of the peak of the policy's cache: shared between branches, and as it would be if
    each branch held a copy of its own.

    Parameters
    ----------
    rows : sequence of Row
        One for each search.
    seconds : mapping
        Label of a row to the seconds that all its problems took together.
    """
    lines = []
    for row in rows:
        stats = [record.stats for record in row.records if record.error is None]
        shared, unshared = _mean(stats, "peak_unique_kv_tokens"), _mean(stats, "peak_logical_kv_tokens")
        lines.append(
            [
                row.label,
                f"{_mean(stats, 'policy_tokens'):.0f}",
                f"{_mean(stats, 'verifier_tokens'):.0f}",
                f"{shared:.0f}",
                f"{unshared:.0f}",
                f"{unshared / shared:.1f}x" if shared else "-",
                f"{seconds[row.label]:.1f}" if row.label in seconds else "-",
            ]
        )
    header = [
        "cost a problem",
        "policy tokens",
        "verifier tokens",
        "KV shared",
        "KV unshared",
        "saved",
        "seconds in all",
    ]
    return format_table(header, lines)


def _mean(stats: Sequence[Mapping[str, float]], name: str) -> float:
    return sum(one.get(name, 0.0) for one in stats) / len(stats) if stats else 0.0


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

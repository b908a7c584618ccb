"""Tables of an evaluation: accuracy with confidence intervals, costs, and the best strategy for each case."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from tts_search.evaluation.experiment import config_of
from tts_search.evaluation.fitting import fit
from tts_search.evaluation.records import Record
from tts_search.evaluation.rows import Difficulty, Row, Tally, compare, rows_of, strategy_map
from tts_search.evaluation.statistics import holm, interval
from tts_search.strategy import BINS

__all__ = [
    "accuracy_table",
    "comparisons_table",
    "cost_table",
    "format_table",
    "report_tables",
    "rivals_table",
    "strategy_table",
    "votes_table",
]

_SHOWN_VOTES: Final = ("majority", "prm_max", "prm_min_max", "prm_last_vote", "prm_min_vote")


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


def accuracy_table(rows: Sequence[Row]) -> str:
    """Return accuracy in percent by row and level, with 95% intervals. An error counts as a wrong answer."""
    found = [_by_level(row) for row in rows]
    levels = sorted({level for _, own in found for level in own})
    shown = levels if len(levels) > 1 else []
    lines = [
        [row.label, *(own.get(level, "-") for level in shown), whole]
        for row, (whole, own) in zip(rows, found, strict=True)
    ]
    names = [f"level {level}" if level.isdigit() else level or "no level" for level in shown]
    return format_table(["accuracy % (95% interval)", *names, "all"], lines)


def _by_level(row: Row) -> tuple[str, dict[str, str]]:
    """A row's accuracy as text: over all its answers, and at each level."""
    found = row.by_level()
    whole = Tally.of(found.values())
    return _accuracy(whole), {level: _accuracy(own) for level, own in found.items()}


def _accuracy(tally: Tally) -> str:
    return _percent(tally.accuracy, tally.interval)


def _percent(share: float, bounds: tuple[float, float]) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f} ({100 * bounds[0]:.0f}-{100 * bounds[1]:.0f})"


def votes_table(rows: Sequence[Row]) -> str:
    """Return accuracy in percent by row and vote, and pass@n, with 95% intervals."""
    lines = []
    for row in rows:
        known = {vote for record in row.records for vote in record.correct}
        cells = [_accuracy(replace(row, vote=vote).tally()) if vote in known else "-" for vote in _SHOWN_VOTES]
        solved = list(row.by_task(lambda record: record.solved).values())
        passed = _percent(sum(solved) / len(solved), interval(solved, len(row.records)))
        lines.append([row.label, passed, *cells])
    return format_table(["accuracy %", "pass@n", *_SHOWN_VOTES], lines)


_COSTS: Final = (
    *("policy_tokens", "policy_logical_tokens", "verifier_tokens", "flops_policy", "flops_verifier"),
    *("peak_unique_kv_tokens", "peak_logical_kv_tokens"),
)


def cost_table(rows: Sequence[Row]) -> str:
    """Return the cost of a problem in each search: tokens, floating-point operations, peak KV slots, seconds.

    Three counts of tokens: those the policy sampled, those it would have forwarded if it read each branch anew for
    every step, and those the verifier read. KV slots are the mean peak of the policy's cache, once as it is, shared
    between branches, and once as if each branch held its own copy. Seconds are a problem's share of the total time.
    """
    lines = []
    for row in rows:
        *tokens, policy, verifier, shared, unshared = row.means(*_COSTS)
        lines.append(
            [
                row.label,
                *(_number(one, ".0f") for one in tokens),
                *(_number(one, ".3g") for one in (policy, verifier)),
                *(_number(one, ".0f") for one in (shared, unshared)),
                f"{unshared / shared:.1f}x" if shared > 0 else "-",
                _number(row.seconds, ".3g"),
            ]
        )
    header = ["cost of a problem", "sampled", "read anew", "verified", "policy FLOPs", "verifier FLOPs"]
    return format_table([*header, "KV shared", "unshared", "saved", "seconds"], lines)


def _number(value: float, how: str) -> str:
    return "-" if math.isnan(value) else format(value, how)


def comparisons_table(rows: Sequence[Row]) -> str:
    """Compare each method with best-of-N of the same models and n: the difference in points, and p.

    p is from a two-sided sign test over the tasks, corrected for the number of lines of the table (:func:`holm`).
    """
    pairs = [(row, rival) for row in rows if row.verifier and (rival := _rival(row, rows)) is not None]
    found = [compare(row, rival) for row, rival in pairs]
    corrected = holm([p for _, p in found])
    lines = [
        [row.label, f"{100 * difference:+.1f}", f"{p:.2g}", f"{holms:.2g}"]
        for (row, _), (difference, p), holms in zip(pairs, found, corrected, strict=True)
    ]
    return format_table(["beside best-of-N", "points", "p", f"p, corrected for {len(lines)} tests"], lines)


def _rival(row: Row, rows: Sequence[Row]) -> Row | None:
    """The best-of-N of the same models and n; None if there is none."""
    own = (row.policy, row.verifier, row.n)
    alike = [one for one in rows if one.method == "best_of_n" and (one.policy, one.verifier, one.n) == own]
    return alike[0] if len(alike) == 1 and row.method != "best_of_n" else None


def _map_table(rows: Sequence[Row]) -> str:
    best = strategy_map(rows)
    if not best:
        return "no table of the best method by difficulty: that needs a best-of-N of another seed, which is not judged"
    sizes = sorted({n for *_, n in best})
    lines = []
    for policy, verifier, one in sorted({key[:3] for key in best}, key=lambda key: (*key[:2], BINS.index(key[2]))):
        cells = [best.get((policy, verifier, one, n)) for n in sizes]
        count = max(cell[2] for cell in cells if cell is not None)
        texts = ["-" if cell is None else f"{cell[0]} {100 * cell[1]:.0f}" for cell in cells]
        lines.append([f"{policy}, {verifier}, {one} ({count} tasks)", *texts])
    return format_table(["best method, accuracy %", *(f"n={n}" for n in sizes)], lines)


def strategy_table(records: Sequence[Record]) -> str:
    """Return the cross-validated accuracy of a fitted strategy by policy, verifier and n, beside the best fixed choice.

    A strategy chooses method and vote by the problem's difficulty; the fixed choice is the same for all problems.
    Neither choice is made with the problem that it is evaluated on. There are up to two rows. In the first, the
    difficulty is found as in a search of a new problem: it is estimated from the smallest best-of-N of at least 4
    samples, which are not counted in n. The second is there if there are several seeds: the difficulty is the pass@1 in
    the best-of-N of the other seeds, which needs the right answers. This is the limit for better estimates.
    """
    searches = [row for row in rows_of(records) if row.verifier]
    difficulty = Difficulty(searches)
    sizes = sorted({row.n for row in searches})
    lines = []
    for policy, verifier in sorted({(row.policy, row.verifier) for row in searches}):
        own = [one for row in searches if (row.policy, row.verifier) == (policy, verifier) for one in row.records]
        own = [record for record in own if record.config]
        sampled = [one for one in own if one.method == "best_of_n" and one.num_completions]
        if not sampled:
            continue
        results = [("difficulty known", _with_known_difficulty(own, difficulty))]
        results.append(("one for all", fit(own, budget=sampled[0].n).fixed))
        probes = [one for one in sampled if one.n >= 4 and one.pass_estimate is not None]
        if probes:
            probe = config_of(min(probes, key=lambda record: record.n).config)
            results.insert(0, (f"difficulty from {probe.n} samples", fit(own, budget=probe.n, probe=probe).accuracy))
        for name, accuracy in results:
            cells = [f"{100 * accuracy[n]:.1f}" if n in accuracy else "-" for n in sizes]
            if accuracy:
                lines.append([f"{policy}, {verifier}, {name}", *cells])
    return format_table(["cross-validated accuracy %", *(f"n={n}" for n in sizes)], lines)


def _with_known_difficulty(records: Sequence[Record], difficulty: Difficulty) -> dict[int, float]:
    """Mean accuracy over seeds, by budget, of a strategy that takes each task's bin from samples of other seeds."""
    found: list[dict[int, float]] = []
    for seed in sorted({record.seed for record in records}):
        own = [record for record in records if record.seed == seed]
        rates = {record.task: rate for record in own if (rate := difficulty.pass_rate(record)) is not None}
        if rates:
            found.append(fit(own, budget=own[0].n, pass_rates=rates).accuracy)
    sizes = [size for size in (found[0] if found else ()) if all(size in one for one in found)]
    return {size: sum(one[size] for one in found) / len(found) for size in sizes}


def rivals_table(rows: Sequence[Row]) -> str:
    """Return which larger policies' greedy answers a search of a smaller policy matches, and at what inference cost.

    For each smaller policy, verifier and larger policy: among the searches that are at least as accurate, the one with
    the fewest FLOPs of policy and verifier together, and the ratio of these FLOPs to those of the greedy answer.
    """
    greedy = {row.policy: row for row in rows if not row.verifier and row.n == 1 and "greedy" in row.label}
    ordered = sorted(greedy, key=lambda policy: greedy[policy].means("flops_policy")[0])
    lines = []
    for place, larger in enumerate(ordered):
        rival = greedy[larger]
        for smaller in ordered[:place]:
            own = [row for row in rows if row.policy == smaller and row.verifier]
            for verifier in sorted({row.verifier for row in own}):
                enough = [row for row in own if row.verifier == verifier and row.accuracy() >= rival.accuracy()]
                best = min(enough, key=_total_flops, default=None)
                name = f"{smaller} + {verifier} against {larger} ({100 * rival.accuracy():.1f})"
                if best is None:
                    lines.append([name, "none", "-", "-"])
                else:
                    ratio = _total_flops(best) / max(1.0, rival.means("flops_policy")[0])
                    lines.append([name, f"{best.method}, n={best.n}", f"{100 * best.accuracy():.1f}", f"{ratio:.2g}x"])
    return format_table(["as accurate as a larger policy alone", "search", "accuracy %", "FLOPs"], lines)


def _total_flops(row: Row) -> float:
    return sum(row.means("flops_policy", "flops_verifier"))


def report_tables(records: Sequence[Record], vote: str | None = None) -> str:
    """Return all tables of a report as text."""
    rows = rows_of(records, vote)
    sections = [accuracy_table(rows), votes_table(rows), cost_table(rows)]
    if any(_rival(row, rows) for row in rows):
        sections.append(comparisons_table(rows))
    if any(row.method == "best_of_n" and row.verifier for row in rows):
        sections += [_map_table(rows), strategy_table(records)]
    if len({row.policy for row in rows if "greedy" in row.label}) > 1:
        sections.append(rivals_table(rows))
    errors = sum(record.error is not None for record in records)
    tasks = len({record.task for record in records})
    sections.append(f"{tasks} tasks; intervals: 95%, Wilson's over tasks; {errors} searches failed and count as wrong")
    return "\n\n".join(sections)

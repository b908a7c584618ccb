"""Tables of an evaluation: accuracy with confidence intervals, what it cost, which strategy is best where."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tts_search.evaluation.evaluate import Record
from tts_search.evaluation.fitting import fit
from tts_search.evaluation.rows import Row, rows_of, strategy_map
from tts_search.evaluation.statistics import bootstrap, wilson
from tts_search.search.config import SearchConfig
from tts_search.strategy import BINS

__all__ = [
    "accuracy_table",
    "cost_table",
    "flops_table",
    "format_table",
    "levels_table",
    "report_tables",
    "rivals_table",
    "strategy_table",
    "votes_table",
]


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


def _with_interval(values: Sequence[float]) -> str:
    if not values:
        return "-"
    low, high = bootstrap(values)
    return f"{100 * sum(values) / len(values):.1f} ({100 * low:.0f}-{100 * high:.0f})"


def votes_table(rows: Sequence[Row]) -> str:
    """Return accuracy in percent by row and vote, and pass@n, with 95% bootstrap intervals over the tasks."""
    votes = ("majority", "prm_max", "prm_min_max", "prm_last_vote", "prm_min_vote")
    lines = []
    for row in rows:
        known = {vote for record in row.records for vote in record.correct}
        cells = [
            _with_interval(list(row.by_task(lambda record, vote=vote: record.is_correct(vote)).values()))  # type: ignore[misc]
            if vote in known
            else "-"
            for vote in votes
        ]
        lines.append([row.label, _with_interval(list(row.by_task(lambda record: record.solved).values())), *cells])
    return format_table(["accuracy %", "pass@n", *votes], lines)


def levels_table(rows: Sequence[Row]) -> str:
    """Return accuracy in percent by row and level, with 95% bootstrap intervals over the tasks."""
    levels = sorted({record.level for row in rows for record in row.records})
    lines = []
    for row in rows:
        right = row.by_task(lambda record, vote=row.vote: record.is_correct(vote))  # type: ignore[misc]
        of_level = {level: {one.task for one in row.records if one.level == level} for level in levels}
        cells = [_with_interval([right[task] for task in sorted(of_level[level])]) for level in levels]
        lines.append([f"{row.label} ({row.vote})", *cells, _with_interval(list(right.values()))])
    return format_table(["accuracy %", *(f"level {level}" if level else "-" for level in levels), "all"], lines)


def flops_table(rows: Sequence[Row]) -> str:
    """Return what a problem costs: tokens forwarded and logical, FLOPs of both models, peak KV, seconds."""
    names = ("policy_tokens", "policy_logical_tokens", "verifier_tokens")
    lines = []
    for row in rows:
        policy, verifier = row.mean("flops_policy"), row.mean("flops_verifier")
        peaks = [row.mean("peak_unique_kv_tokens"), row.mean("peak_logical_kv_tokens")]
        lines.append(
            [
                row.label,
                *(f"{row.mean(name):.0f}" for name in names),
                *(f"{one:.3g}" for one in (policy, verifier, policy + verifier)),
                *(f"{one:.0f}" for one in peaks),
                "-" if math.isnan(row.seconds) else f"{row.seconds:.3g}",
            ]
        )
    header = ["cost a problem", "policy tokens", "if read anew", "verifier tokens", "policy FLOPs", "verifier FLOPs"]
    return format_table([*header, "total FLOPs", "peak KV", "unshared", "seconds"], lines)


def _map_table(rows: Sequence[Row]) -> str:
    best = strategy_map(rows)
    sizes = sorted({n for *_, n in best})
    lines = []
    for policy, verifier, one in sorted({key[:3] for key in best}, key=lambda key: (*key[:2], BINS.index(key[2]))):
        cells = [best.get((policy, verifier, one, n)) for n in sizes]
        count = max(cell[2] for cell in cells if cell is not None)
        texts = ["-" if cell is None else f"{cell[0]} {100 * cell[1]:.0f}" for cell in cells]
        lines.append([f"{policy}, {verifier}, {one} ({count} tasks)", *texts])
    return format_table(["best method, accuracy %", *(f"n={n}" for n in sizes)], lines)


def strategy_table(records: Sequence[Record], configs: Mapping[str, SearchConfig]) -> str:
    """Return the cross-validated accuracy of a fitted strategy by policy, verifier and n, beside the best fixed choice.

    A strategy chooses method and vote by the problem's difficulty; the fixed choice is the same for all problems.
    Neither is chosen by a problem that it is counted on. A row each for the difficulty as a search of a new problem
    finds it (estimated from the smallest best-of-N of at least 4 samples, which are not counted in n), and as only the
    right answer tells it (pass@1 in the largest best-of-N): the most that better estimates could bring.
    """
    searches = [row for row in rows_of(records) if row.verifier]
    sizes = sorted({row.n for row in searches})
    lines = []
    for policy, verifier in sorted({(row.policy, row.verifier) for row in searches}):
        own = [one for row in searches if (row.policy, row.verifier) == (policy, verifier) for one in row.records]
        own = [record for record in own if record.experiment in configs]
        sampled = [one for one in own if one.method == "best_of_n" and one.num_completions]
        if not sampled:
            continue
        fitted = fit(own, configs, budget=sampled[0].n)
        results = [("difficulty known", fitted.accuracy), ("one for all", fitted.fixed)]
        probes = [configs[one.experiment] for one in sampled if one.n >= 4 and one.pass_estimate is not None]
        if probes:
            probe = min(probes, key=lambda config: config.n)
            estimated = fit(own, configs, budget=probe.n, probe=probe).accuracy
            results.insert(0, (f"difficulty from {probe.n} samples", estimated))
        for name, accuracy in results:
            cells = [f"{100 * accuracy[n]:.1f}" if n in accuracy else "-" for n in sizes]
            lines.append([f"{policy}, {verifier}, {name}", *cells])
    return format_table(["cross-validated accuracy %", *(f"n={n}" for n in sizes)], lines)


def rivals_table(rows: Sequence[Row]) -> str:
    """Return which larger policies' greedy answers a search of a smaller policy matches, and at what inference cost.

    For each smaller policy, verifier and larger policy: the search with the fewest FLOPs of policy and verifier
    together that is at least as accurate, and their ratio to those of the greedy answer.
    """
    greedy = {row.policy: row for row in rows if not row.verifier and row.n == 1 and "greedy" in row.label}
    ordered = sorted(greedy, key=lambda policy: greedy[policy].mean("flops_policy"))
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
                    ratio = _total_flops(best) / max(1.0, rival.mean("flops_policy"))
                    lines.append([name, f"{best.method}, n={best.n}", f"{100 * best.accuracy():.1f}", f"{ratio:.2g}x"])
    return format_table(["as accurate as a larger policy alone", "search", "accuracy %", "FLOPs"], lines)


def _total_flops(row: Row) -> float:
    return row.mean("flops_policy") + row.mean("flops_verifier")


def report_tables(
    records: Sequence[Record], vote: str | None = None, configs: Mapping[str, SearchConfig] | None = None
) -> str:
    """Return all tables of a report as text; with the configs by experiment, that of a fitted strategy, too."""
    rows = rows_of(records, vote, configs)
    sections = [votes_table(rows), levels_table(rows), flops_table(rows)]
    if any(row.method == "best_of_n" and row.verifier for row in rows):
        sections.append(_map_table(rows))
        if configs:
            sections.append(strategy_table(records, configs))
    if len({row.policy for row in rows if "greedy" in row.label}) > 1:
        sections.append(rivals_table(rows))
    errors = sum(record.error is not None for record in records)
    tasks = len({record.task for record in records})
    sections.append(f"{tasks} tasks; intervals: 95%, bootstrap over tasks; {errors} searches failed and count as wrong")
    return "\n\n".join(sections)

"""Reports of an evaluation: accuracy with confidence intervals, what it cost, which strategy is best where."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tts_search.config import SearchConfig
from tts_search.evaluate import Record, latest, read_configs, read_records
from tts_search.strategy import BINS, Bin, difficulty_bin, fit
from tts_search.terminal import sanitize
from tts_search.voting import canonical

__all__ = [
    "Row",
    "accuracy_table",
    "bootstrap",
    "cost_table",
    "format_table",
    "read_folder",
    "report_tables",
    "rivals_table",
    "rows_of",
    "sign_test",
    "strategy_map",
    "strategy_table",
    "wilson",
    "write_report",
]


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
    """A row of the tables: the records of an experiment, and the vote whose answer counts.

    Attributes
    ----------
    label : str
        Its name.
    records : sequence of Record
        Of one search, seeds together.
    vote : str
        One of :data:`tts_search.VOTES`, or an alias.
    settings : str
        What tells it from rows of the same models, method and n; part of the label.

    Raises
    ------
    ValueError
        If there is no such vote.
    """

    label: str
    records: Sequence[Record]
    vote: str = "prm_max"
    settings: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "vote", canonical(self.vote))

    @property
    def method(self) -> str:
        """Method of its searches."""
        return self.records[0].method

    @property
    def n(self) -> int:
        """Budget of its searches."""
        return self.records[0].n

    @property
    def policy(self) -> str:
        """Name of the policy."""
        return (*self.records[0].models, "")[0]

    @property
    def verifier(self) -> str:
        """Name of the verifier; empty without one."""
        return (*self.records[0].models, "", "")[1]

    def by_task(self, value: Callable[[Record], float]) -> dict[str, float]:
        """Return the mean of a value over the seeds, for each task."""
        values: dict[str, list[float]] = {}
        for record in self.records:
            values.setdefault(record.task, []).append(value(record))
        return {task: sum(own) / len(own) for task, own in values.items()}

    def accuracy(self, vote: str | None = None, tasks: Container[str] | None = None) -> float:
        """Return the share of right answers by a vote, over all tasks or some."""
        chosen = vote or self.vote
        right = self.by_task(lambda record: record.is_correct(chosen))
        values = [value for task, value in right.items() if tasks is None or task in tasks]
        return sum(values) / len(values) if values else math.nan

    def mean(self, name: str) -> float:
        """Return the mean of one of the stats; NaN if it is not known of all."""
        return _average([record.stats.get(name, math.nan) for record in self.records if record.error is None])

    @property
    def seconds(self) -> float:
        """Mean share of a task in the time of all; NaN if it is not known of all."""
        return _average([math.nan if record.seconds is None else record.seconds for record in self.records])


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


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


# Reports of a folder


def read_folder(folder: str | Path) -> list[Record]:
    """Read all ``results*.jsonl`` of a folder: of each task and experiment, the last record, if possible no error.

    If the folder holds several data sets, tasks of different problems that have the same id are told apart by a hash of
    the problem behind the id.

    Raises
    ------
    ValueError
        If there are none.
    """
    paths = sorted(Path(folder).glob("results*.jsonl"))
    records = list(latest(record for path in paths for record in read_records(path)).values())
    if not records:
        raise ValueError(f"{folder}: expected results in results*.jsonl, found none")
    problems = Counter(task for task, _ in {(record.task, record.problem) for record in records})
    return [_with_own_id(record) if problems[record.task] > 1 else record for record in records]


def _with_own_id(record: Record) -> Record:
    digest = hashlib.blake2b(record.problem.encode(errors="surrogatepass"), digest_size=4).hexdigest()
    return replace(record, task=f"{record.task} #{digest}")


def rows_of(
    records: Iterable[Record], vote: str | None = None, configs: Mapping[str, SearchConfig] | None = None
) -> list[Row]:
    """Group records into rows, seeds together: by models, then method, then n.

    With the configs by experiment, searches with other settings are rows of their own, whose labels say what differs.

    Raises
    ------
    ValueError
        If there is no such vote.
    """
    known: dict[tuple[str, tuple[str, ...]], str] = {}  # settings of an experiment
    groups: dict[tuple[str, str, str, int], dict[str, list[Record]]] = {}
    for record in records:
        source = (record.experiment, record.models)
        if source not in known:
            known[source] = json.dumps(_settings(record, configs or {}), sort_keys=True)
        group = ((*record.models, "")[0], _label(record), record.method, record.n)
        groups.setdefault(group, {}).setdefault(known[source], []).append(record)
    rows = []
    for (_, label, _, _), alike in groups.items():
        for own, difference in zip(alike.values(), _differences([json.loads(one) for one in alike]), strict=True):
            elected = vote or ("prm_max" if any("prm_max" in record.correct for record in own) else "majority")
            rows.append(Row(", ".join(filter(None, (label, difference))), own, elected, difference))
    return sorted(rows, key=lambda row: (row.policy, row.verifier, row.method, row.n))


def _label(record: Record) -> str:
    title = re.sub(r",? ?seed=-?\d+", "", record.label)
    verifier = (*record.models, "", "")[1]
    return f"{title} [{verifier}]" if verifier else title


def _settings(record: Record, configs: Mapping[str, SearchConfig]) -> dict[str, object]:
    """What tells a search from others: the names of its models, by place, and its config but for the seed."""
    names: dict[str, object] = {str(place): name for place, name in enumerate(record.models)}
    if record.experiment in configs:
        names |= asdict(replace(configs[record.experiment], seed=0))
    return names


def _differences(settings: Sequence[Mapping[str, object]]) -> list[str]:
    """Return for each search what tells it from the others, such as ``temperature=0.5``."""
    shared = [name for name in settings[0] if all(name in one for one in settings)]
    names = [name for name in shared if any(one[name] != settings[0][name] for one in settings)]
    return [
        ", ".join(f"{one[name] or '-'}" if name.isdigit() else f"{name}={one[name]}" for name in names)
        for one in settings
    ]


def bootstrap(values: Sequence[float], *, samples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Return the 95% percentile bootstrap interval of a mean: `samples` resamplings with replacement."""
    import torch

    data = torch.tensor(values, dtype=torch.float64)
    drawn = torch.randint(len(data), (samples, len(data)), generator=torch.Generator().manual_seed(seed))
    means = data[drawn].mean(1).sort().values
    return float(means[int(0.025 * samples)]), float(means[int(0.975 * samples) - 1])


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


def pass_rates(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Return, by policy and task, the share of right completions in the largest best-of-N."""
    rates: dict[str, dict[str, float]] = {}
    for row in sorted(rows, key=lambda row: row.n):
        if row.method == "best_of_n":
            rates.setdefault(row.policy, {}).update(row.by_task(lambda record: record.pass_rate))
    return rates


def strategy_map(rows: Sequence[Row]) -> dict[tuple[str, str, Bin, int], tuple[str, float, int]]:
    """Return the best method by (policy, verifier, bin of difficulty, n): its name, its accuracy, how many tasks.

    Of equally good methods, best-of-N before others, then by name.
    """
    rates = pass_rates(rows)
    best: dict[tuple[str, str, Bin, int], tuple[str, float, int]] = {}
    for row in sorted(rows, key=lambda row: (row.method != "best_of_n", row.method)):
        for one in BINS:
            known = rates.get(row.policy, {})
            tasks = {
                task for task in row.by_task(lambda _: 0.0) if task in known and difficulty_bin(known[task]) == one
            }
            key = (row.policy, row.verifier, one, row.n)
            if row.verifier and tasks and row.accuracy(tasks=tasks) > best.get(key, ("", -1.0, 0))[1]:
                best[key] = (row.method, row.accuracy(tasks=tasks), len(tasks))
    return best


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


def write_report(folder: str | Path, out: str | Path, *, vote: str | None = None, plots: bool = True) -> str:
    """Write ``tables.txt``, ``trees.html`` and, with matplotlib, plots of an evaluation's folder; return the tables.

    Raises
    ------
    ValueError
        If the folder holds no results.
    MissingExtraError
        If plots are asked for and matplotlib is not installed.
    """
    from tts_search.page import tree_page

    records = read_folder(folder)
    configs = {}
    for path in sorted(Path(folder).glob("manifest*.json")):
        configs.update(read_configs(path))
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tables = sanitize(report_tables(records, vote, configs))  # labels and levels may be anybody's words
    (out / "tables.txt").write_text(tables + "\n", encoding="utf-8")
    (out / "trees.html").write_text(tree_page(records), encoding="utf-8")
    if plots:
        from tts_search.plots import draw_plots

        draw_plots(rows_of(records, vote, configs), out)
    return tables

"""Rows of tables and lines of plots: the records of one search, seeds together."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tts_search.evaluation.evaluate import Record, latest, read_records
from tts_search.search.config import SearchConfig
from tts_search.search.voting import canonical
from tts_search.strategy import BINS, Bin, difficulty_bin

__all__ = ["Row", "pass_rates", "read_folder", "rows_of", "strategy_map"]


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
        names |= replace(configs[record.experiment], seed=0).as_dict()
    return names


def _differences(settings: Sequence[Mapping[str, object]]) -> list[str]:
    """Return for each search what tells it from the others, such as ``temperature=0.5``."""
    shared = [name for name in settings[0] if all(name in one for one in settings)]
    names = [name for name in shared if any(one[name] != settings[0][name] for one in settings)]
    return [
        ", ".join(f"{one[name] or '-'}" if name.isdigit() else f"{name}={one[name]}" for name in names)
        for one in settings
    ]


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

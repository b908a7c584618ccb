"""Rows of tables and lines of plots: each joins the records of one search with all its seeds."""

from __future__ import annotations

import hashlib
import json
import math
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tts_search.evaluation.records import Record, latest, read_records
from tts_search.evaluation.statistics import interval, sign_test
from tts_search.search.voting import canonical
from tts_search.strategy import BINS, Bin, difficulty_bin

__all__ = ["Difficulty", "Row", "Tally", "Where", "compare", "read_folder", "rows_of", "strategy_map"]

Where = Callable[[Record], bool]
"""Which records of a row count."""


@dataclass(frozen=True)
class Row:
    """A row of the tables: the records of an experiment, and the vote whose answer counts.

    Attributes
    ----------
    label : str
        Its name.
    records : sequence of Record
        Records of one search, with all its seeds.
    vote : str
        One of :data:`tts_search.VOTES`, or an alias.
    settings : str
        The settings in which it differs from rows of the same models, method and n. Part of the label.

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

    def by_task(self, value: Callable[[Record], float], where: Where | None = None) -> dict[str, float]:
        """Return the mean of a value over the seeds, for each task; with `where`, only over its records."""
        values: dict[str, list[float]] = {}
        for record in self.records:
            if where is None or where(record):
                values.setdefault(record.task, []).append(value(record))
        return {task: sum(own) / len(own) for task, own in values.items()}

    def right(self, where: Where | None = None) -> dict[str, float]:
        """Return, for each task, the share of seeds with the right answer."""
        return self.by_task(lambda record: record.is_correct(self.vote), where)

    def by_level(self) -> dict[str, Tally]:
        """Return the answers of each level, in one pass over the records."""
        found: dict[str, Tally] = {}
        for record in self.records:
            found.setdefault(record.level, Tally()).add(record.task, record.is_correct(self.vote))
        return found

    def accuracy(self, where: Where | None = None) -> float:
        """Return the share of right answers: the mean over the tasks; NaN without any."""
        return self.tally(where).accuracy

    def interval(self, where: Where | None = None) -> tuple[float, float]:
        """Return the 95% interval of the accuracy."""
        return self.tally(where).interval

    def tally(self, where: Where | None = None) -> Tally:
        """Count the right answers. With `where`: only of records for which it holds."""
        found = Tally()
        for record in self.records:
            if where is None or where(record):
                found.add(record.task, record.is_correct(self.vote))
        return found

    def means(self, *names: str) -> list[float]:
        """Return the means of some stats, in one pass over the records. NaN for one that some record does not have."""
        values = [array("d") for _ in names]
        for record in self.records:
            if record.error is None:
                for name, own in zip(names, values, strict=True):
                    own.append(record.stats.get(name, math.nan))
        return [_average(own) for own in values]

    @property
    def seconds(self) -> float:
        """Mean share of a task in the time of the experiment; NaN if some record does not have it."""
        return _average(array("d", (math.nan if one.seconds is None else one.seconds for one in self.records)))


class Tally:
    """Right and wrong answers, by task. Answers to one task are correlated, so they count as fewer answers."""

    def __init__(self) -> None:
        self._right: dict[str, list[bool]] = {}

    @classmethod
    def of(cls, tallies: Iterable[Tally]) -> Tally:
        """Return the answers of several tallies together."""
        found = cls()
        for task, answers in (each for one in tallies for each in one._right.items()):
            found._right.setdefault(task, []).extend(answers)
        return found

    def add(self, task: str, right: bool) -> None:
        """Count an answer."""
        self._right.setdefault(task, []).append(right)

    @property
    def accuracy(self) -> float:
        """The share of right answers: the mean over the tasks; NaN without any."""
        return _average(self._shares)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the accuracy."""
        return interval(self._shares, sum(map(len, self._right.values())))

    @property
    def _shares(self) -> list[float]:
        return [sum(own) / len(own) for own in self._right.values()]


def compare(first: Row, second: Row) -> tuple[float, float]:
    """Compare two rows over the tasks that both have.

    Returns
    -------
    difference : float
        Accuracy of the first minus that of the second.
    p : float
        Probability of a difference at least as large if both were equally good (:func:`sign_test`).
    """
    one, other = first.right(), second.right()
    tasks = [task for task in one if task in other]
    mine, theirs = [one[task] for task in tasks], [other[task] for task in tasks]
    return _average(mine) - _average(theirs), sign_test(mine, theirs)


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def read_folder(folder: str | Path) -> list[Record]:
    """Read all ``results*.jsonl`` of a folder; return the latest record of each task and experiment.

    A record without an error is preferred to a later one with an error. The folder may hold several data sets: if tasks
    of different problems have the same id, a hash of the problem is added to it.

    Raises
    ------
    ValueError
        If there are no results, or a newer version wrote them.
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


def rows_of(records: Iterable[Record], vote: str | None = None) -> list[Row]:
    """Group the records of all seeds into rows, ordered by models, then method, then n.

    Searches with different settings, models or instruction-set levels have separate rows, and the labels say what
    differs. Values that are missing in a record are not assumed to be equal: records without settings are grouped only
    within their experiment.

    Raises
    ------
    ValueError
        If there is no such vote.
    """
    known: dict[str, str] = {}  # what distinguishes an experiment
    groups: dict[tuple[str, str, str, int], dict[str, list[Record]]] = {}
    for record in records:
        source = f"{record.experiment}\0{record.instruction_set}"
        if source not in known:
            known[source] = json.dumps(_settings(record), sort_keys=True)
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


def _settings(record: Record) -> dict[str, object]:
    """What distinguishes a search: the names of its models, by place, its config without the seed, and its level."""
    names: dict[str, object] = {str(place): name for place, name in enumerate(record.models)}
    known = {name: value for name, value in record.config.items() if name != "seed"}
    return {**names, **(known or {"experiment": record.experiment}), "level": record.instruction_set}


def _differences(settings: Sequence[Mapping[str, object]]) -> list[str]:
    """Return for each search the settings in which it differs from the others, such as ``temperature=0.5``."""
    names = list(dict.fromkeys(name for one in settings for name in one))
    names = [name for name in names if any(_text(name, one) != _text(name, settings[0]) for one in settings)]
    return [", ".join(filter(None, (_text(name, one) for name in names))) for one in settings]


def _text(name: str, settings: Mapping[str, object]) -> str:
    """A setting as text; empty if the search has no setting of that name."""
    if name not in settings:
        return ""
    return f"{settings[name] or '-'}" if name.isdigit() else f"{name}={settings[name]}"


class Difficulty:
    """How difficult a task is for a policy, judged by samples that are not part of the comparison.

    The bin of a record is given by the largest best-of-N of the *other* seeds. If the record's own samples gave the
    bin, the hard bin would collect unlucky samples, and any new search would look better than it is. With only one
    seed, the difficulty is not known.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        sampled: dict[tuple[str, str], dict[int, Record]] = {}
        for row in rows:
            if row.method == "best_of_n":
                for record in row.records:
                    own = sampled.setdefault((row.policy, record.task), {})
                    if record.num_completions > (own[record.seed].num_completions if record.seed in own else 0):
                        own[record.seed] = record
        self._sampled = sampled

    def pass_rate(self, record: Record) -> float | None:
        """Return the policy's pass@1 on a record's task, over all samples of other seeds; None if there are none."""
        others = self._sampled.get(((*record.models, "")[0], record.task), {})
        counts = [(one.num_correct, one.num_completions) for seed, one in others.items() if seed != record.seed]
        return sum(right for right, _ in counts) / sum(total for _, total in counts) if counts else None

    def bin(self, record: Record) -> Bin | None:
        """Return the bin of a record's task; None if it is not known."""
        rate = self.pass_rate(record)
        return None if rate is None else difficulty_bin(rate)

    def within(self, one: Bin) -> Where:
        """Return the condition that a record is in a bin."""
        return lambda record: self.bin(record) == one


def strategy_map(rows: Sequence[Row]) -> dict[tuple[str, str, Bin, int], tuple[str, float, int]]:
    """Return the best method by (policy, verifier, bin of difficulty, n): its name, its accuracy, how many tasks.

    If methods are equally good, best-of-N comes first, then the order of names decides.
    """
    difficulty = Difficulty(rows)
    best: dict[tuple[str, str, Bin, int], tuple[str, float, int]] = {}
    for row in sorted(rows, key=lambda row: (row.method != "best_of_n", row.method)):
        for one in BINS:
            right = list(row.right(difficulty.within(one)).values())
            key = (row.policy, row.verifier, one, row.n)
            if row.verifier and right and _average(right) > best.get(key, ("", -1.0, 0))[1]:
                best[key] = (row.method, _average(right), len(right))
    return best

"""Records: the result of each task, as one line of a results file, and the file to which processes append them."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any, overload

from tts_search.search.voting import canonical

__all__ = ["Journal", "Record", "Records", "Stored", "latest", "lock", "read_record", "read_records", "record_as_json"]


@dataclass(frozen=True)
class Record:
    """The outcome of one task in one experiment: a line of the results file.

    Attributes
    ----------
    experiment, task : str
        Key of the experiment, id of the task.
    label, level, problem, gold : str
        For tables.
    method, n, seed, models
        Settings of the search. `models` are the names in the experiment.
    config : dict
        All settings of the search, so that experiments can be told apart without another file.
    instruction_set : str
        Instruction-set level of the CPU kernels during the run.
    answers : dict
        By the name of a vote: the answer that it elects.
    correct : dict
        By the name of a vote: whether this answer is right.
    solved : bool
        Whether any completion is right (pass@n).
    num_completions, num_correct : int
        How many completions there are, and how many are right.
    pass_estimate : float or None
        The policy's pass@1, estimated from the verifier's scores (:func:`~tts_search.strategy.estimate_pass_rate`).
    best : str
        Text of the best completion.
    score : float or None
        Its score.
    stats : dict
        Fields of :class:`~tts_search.SearchStats`.
    seconds : float or None
        Time since the previous task was done, so that the sum over the tasks is the time of the experiment. The search
        itself takes longer, because tasks run at the same time (``stats["wall_s"]``). None: not known.
    tree : str or None
        The search tree as JSON.
    error : str or None
        Why the search failed. The fields for its results are empty then.
    """

    experiment: str
    task: str
    label: str
    level: str
    problem: str
    gold: str
    method: str = ""
    n: int = 0
    seed: int = 0
    models: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    instruction_set: str = ""
    answers: dict[str, str] = field(default_factory=dict)
    correct: dict[str, bool] = field(default_factory=dict)
    solved: bool = False
    num_completions: int = 0
    num_correct: int = 0
    pass_estimate: float | None = None
    best: str = ""
    score: float | None = None
    stats: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    tree: str | None = None
    error: str | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """Experiment, task and problem. The problem's text separates data sets whose tasks have the same ids."""
        return self.experiment, self.task, self.problem

    @property
    def pass_rate(self) -> float:
        """Share of the completions that are right."""
        return self.num_correct / self.num_completions if self.num_completions else 0.0

    def is_correct(self, vote: str) -> bool:
        """Whether a vote elects the right answer. Without a verifier, every vote is a majority vote.

        Raises
        ------
        ValueError
            If there is no such vote.
        """
        name = canonical(vote)
        return self.correct.get("majority" if set(self.correct) == {"majority"} else name, False)


Records = dict[tuple[str, str, str], Record]
"""Records by their key."""


def latest(records: Iterable[Record]) -> Records:
    """Return the last record without an error for each experiment, task and problem; else the last one."""
    found: Records = {}
    for record in records:
        known = found.get(record.key)
        if record.error is None or known is None or known.error is not None:
            found[record.key] = record
    return found


def record_as_json(record: Record) -> str:
    """Return a record as a line of JSON, without the newline."""
    return json.dumps(asdict(record), allow_nan=False)


def read_record(line: str | bytes) -> Record:
    """Read a line of a results file.

    Raises
    ------
    TypeError, AttributeError, ValueError
        If it is no record.
    LookupError
        If it has fields that are unknown.
    """
    entry: dict[str, Any] = json.loads(line)
    known = {one.name for one in fields(Record)}
    record = Record(**{name: value for name, value in entry.items() if name in known})
    if len(entry) > len(known & entry.keys()):
        raise LookupError(f"unknown fields {', '.join(sorted(map(repr, entry.keys() - known)))}")
    return replace(record, models=tuple(record.models))


def read_records(path: str | Path) -> list[Record]:
    """Read a results file, oldest record first. Lines that a crash left incomplete are skipped.

    A file that does not exist has no records.

    Raises
    ------
    ValueError
        If the path is no file, or if a newer version wrote it: an unknown field might distinguish its experiments.
    """
    return [record for _, record in _read(Path(path))]


def _read(path: Path) -> Iterator[tuple[int, Record]]:
    """The records of a file, each with the place where its line begins."""
    if not path.exists():
        return
    if not path.is_file():
        raise ValueError(f"{path}: expected a file of results")
    begin = 0
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if record := _parsed(line, path, number):
                yield begin, record
            begin += len(line)


def _parsed(line: bytes, path: Path, number: int | None = None) -> Record | None:
    """The record of a line, if it is one."""
    try:
        return read_record(line.decode("utf-8", errors="replace"))
    except LookupError as error:
        place = path if number is None else f"{path}, line {number}"
        raise ValueError(f"{place}: {error}: a newer version wrote this") from None
    except (ValueError, AttributeError, TypeError, RecursionError):
        return None


@contextmanager
def lock(file: int) -> Iterator[None]:
    """Lock a file, given by its descriptor, against other processes that lock it. If a process dies, its lock ends."""
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


class Stored(Sequence[Record]):
    """Records that stay in their files. Each is read again whenever it is asked for.

    Holds 16 bytes for each record. Equal to any sequence of the same records.

    Parameters
    ----------
    paths : sequence of Path
        The files.
    places : iterable of (int, int)
        For each record: the number of its file, and where its line begins.
    """

    def __init__(self, paths: Sequence[Path], places: Iterable[tuple[int, int]]) -> None:
        self._paths = paths
        self._places = array("q", (number for place in places for number in place))

    def __len__(self) -> int:
        return len(self._places) // 2

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Stored: ...
    def __getitem__(self, index: int | slice) -> Record | Stored:
        chosen = range(len(self))[index]
        if isinstance(chosen, range):
            return Stored(self._paths, map(self._place, chosen))
        return next(self._read([chosen]))

    def __iter__(self) -> Iterator[Record]:
        return self._read(range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    def _place(self, index: int) -> tuple[int, int]:
        return self._places[2 * index], self._places[2 * index + 1]

    def _read(self, indices: Iterable[int]) -> Iterator[Record]:
        files: dict[int, IO[bytes]] = {}
        try:
            for number, begin in map(self._place, indices):
                if number not in files:
                    files[number] = open(self._paths[number], "rb")  # noqa: SIM115  # closed below
                files[number].seek(begin)
                yield read_record(files[number].readline().decode("utf-8", errors="replace"))
        finally:
            for file in files.values():
                file.close()


class Journal:
    """A results file that any number of processes append to; a context manager.

    A record is on disk as a whole line or not at all. Processes write one after the other, and each first removes an
    incomplete line that a killed process or a full disk left. If another process has finished a task meanwhile, the
    task is not written a second time.

    For each record, memory holds a hash of its key and right answer, and its place: about 250 bytes.

    Parameters
    ----------
    path : str or Path
        The file. It and its folder are created if they do not exist.
    also : iterable of str or Path
        Other results files, whose records count as well.

    Raises
    ------
    OSError
        If the file cannot be written, or is no longer there when a record is appended.
    ValueError
        As from :func:`read_records`.
    """

    def __init__(self, path: str | Path, also: Iterable[str | Path] = ()) -> None:
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._end = 0  # everything before is read
        self._paths = (self._path, *map(Path, also))
        self._done: dict[bytes, tuple[int, int]] = {}  # file and place of the last record without an error, by hash
        self._failed: dict[bytes, tuple[int, int]] = {}  # the same for the last error of tasks that only failed
        self._levels: dict[str, str] = {}  # instruction-set level of an experiment's results
        for number, file in enumerate(self._paths[1:], 1):
            for begin, record in _read(file):
                self._add(record, (number, begin))
        if self._path.exists() and not self._path.is_file():
            raise ValueError(f"{self._path}: expected a file of results")
        self._file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)

    def __enter__(self) -> Journal:
        try:
            with self._named_errors(), lock(self._file):
                self._read_on()
        except BaseException:
            os.close(self._file)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def __len__(self) -> int:
        """How many records it knows of."""
        return len(self._done) + len(self._failed)

    def is_done(self, experiment: str, task: str, problem: str, gold: str) -> bool:
        """Whether there is a record without an error for a task with this right answer."""
        return _digest(experiment, task, problem, gold) in self._done

    def find(self, keys: Iterable[tuple[str, str, str, str]]) -> Stored:
        """Return the records of experiments, tasks, problems and right answers. They stay in their files.

        Raises
        ------
        KeyError
            If there is none.
        """
        hashes = (_digest(*key) for key in keys)
        return Stored(self._paths, (self._done.get(one) or self._failed[one] for one in hashes))

    def append(self, record: Record) -> Record:
        """Write a record and return it. If another process has finished this task meanwhile, return that record."""
        key = (*record.key, record.gold)
        with self._named_errors(), lock(self._file):
            self._check_that_it_is_there()
            self._read_on()
            if self.is_done(*key):
                return self.find([key])[0]
            self.check_level(record.experiment, record.instruction_set)
            begin = self._end
            self._write(record_as_json(record).encode() + b"\n")
        self._add(record, (0, begin))
        return record

    def check_level(self, experiment: str, level: str) -> None:
        """Check that all results of an experiment have one instruction-set level: two levels differ by rounding.

        Raises
        ------
        ValueError
            If there are results of another level.
        """
        known = self._levels.get(experiment, level)
        if known != level:
            raise ValueError(
                f"{self._path}: expected instruction-set level {level}, got results of {experiment!r} with {known}; go "
                f"on with TTS_KERNELS_CPU_ISA={known}, or into another folder"
            )

    def _add(self, record: Record, place: tuple[int, int]) -> None:
        key = _digest(*record.key, record.gold)
        if record.error is None:
            self._done[key] = place
            self._failed.pop(key, None)
            if record.instruction_set:
                self._levels.setdefault(record.experiment, record.instruction_set)
        elif key not in self._done:
            self._failed[key] = place

    def _read_on(self) -> None:
        """Read the lines that others have written. Remove a last line that was not finished."""
        with open(self._file, "rb", closefd=False) as lines:
            lines.seek(self._end)
            for line in lines:
                record = _parsed(line, self._path)
                whole = line.endswith(b"\n")
                if record is None and not whole:
                    os.ftruncate(self._file, self._end)
                    return
                if record is not None:
                    self._add(record, (0, self._end))
                self._end += len(line)
                if not whole:
                    self._write(b"\n")
                    return

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except BaseException:
            os.ftruncate(self._file, self._end)
            raise
        self._end += len(data)

    def _check_that_it_is_there(self) -> None:
        """Raise an error if the file was removed: writes to it would still succeed, and be lost."""
        try:
            there = os.path.samestat(os.stat(self._path), os.fstat(self._file))
        except FileNotFoundError:
            there = False
        if not there:
            raise FileNotFoundError(errno.ENOENT, "the file of results vanished while it was written")

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None


def _digest(*texts: str) -> bytes:
    """A hash that stands for some texts. Two of them are equal by chance only among about 2^64 records."""
    return hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).digest()

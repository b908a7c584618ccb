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
    """What became of one task in one experiment: a line of the results file.

    Attributes
    ----------
    experiment, task : str
        Key of the experiment, id of the task.
    label, level, problem, gold : str
        For tables.
    method, n, seed, models
        Of the search: `models` are the experiment's names.
    config : dict
        All settings of the search, so that no other file is needed to tell experiments apart.
    instruction_set : str
        Level of the CPU's kernels that it ran with.
    answers : dict
        The answer that each vote elects.
    correct : dict
        Whether it is right.
    solved : bool
        Whether any completion is right (pass@n).
    num_completions, num_correct : int
        How many there are, and how many of them are right.
    pass_estimate : float or None
        The policy's pass@1 by the verifier's scores (:func:`~tts_search.strategy.estimate_pass_rate`).
    best : str
        Text of the best completion.
    score : float or None
        Its score.
    stats : dict
        Fields of :class:`~tts_search.SearchStats`.
    seconds : float or None
        Its share of the experiment's time: since the task before it was done. Tasks run side by side, so a search
        itself takes longer (``stats["wall_s"]``). None: not known.
    tree : str or None
        The search tree as JSON.
    error : str or None
        Why the search failed; what it would have found is empty then.
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
        """Experiment, task, problem: the text tells data sets apart whose tasks have the same ids."""
        return self.experiment, self.task, self.problem

    @property
    def pass_rate(self) -> float:
        """Share of the completions that are right."""
        return self.num_correct / self.num_completions if self.num_completions else 0.0

    def is_correct(self, vote: str) -> bool:
        """Whether a vote elects the right answer; without a verifier, every vote is the majority's.

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
    """Return, by experiment, task and problem, the last record that is no error; if all are, the last one."""
    found: Records = {}
    for record in records:
        known = found.get(record.key)
        if record.error is None or known is None or known.error is not None:
            found[record.key] = record
    return found


def record_as_json(record: Record) -> str:
    """Return a record as a line of JSON, without its end."""
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
    """Read a results file, oldest first; what a crash left half-written is passed over. No file is no records.

    Raises
    ------
    ValueError
        If it is no file, or a newer version wrote it: what tells its experiments apart might be in a field that is
        not known.
    """
    return [record for _, record in _read(Path(path))]


def _read(path: Path) -> Iterator[tuple[int, Record]]:
    """The records of a file, and where their lines begin."""
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
    """Hold a file, given by its descriptor, against other processes that lock it; a killed process lets go of it."""
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


class Stored(Sequence[Record]):
    """Records that stay in their files: each is read when it is asked for, and again when it is asked for again.

    Holds 16 bytes for each record. Equal to any sequence of the same records.

    Parameters
    ----------
    paths : sequence of Path
        The files.
    places : iterable of (int, int)
        Of each record: which file, and where its line begins.
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

    A record is on disk as a whole line or not at all: processes write one after the other, and the next one takes away
    what a killed one left of a line, or a full disk. A task that another process has finished meanwhile is not written
    a second time.

    What it holds of a record is a hash of its key and right answer, and where it stands: about 250 bytes.

    Parameters
    ----------
    path : str or Path
        The file; made with its folder where there is none.
    also : iterable of str or Path
        Other results files: what they hold is known, too.

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
        self._end = 0  # what lies before is read
        self._paths = (self._path, *map(Path, also))
        self._done: dict[bytes, tuple[int, int]] = {}  # file and place of the last record that is no error, by its hash
        self._failed: dict[bytes, tuple[int, int]] = {}  # and of the last error of those that have none
        self._levels: dict[str, str] = {}  # of an experiment's results
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
        """Whether there is a record of a task with this right answer that is no error."""
        return _digest(experiment, task, problem, gold) in self._done

    def find(self, keys: Iterable[tuple[str, str, str, str]]) -> Stored:
        """Return the records of experiments, tasks, problems and right answers, which stay where they are.

        Raises
        ------
        KeyError
            If there is none.
        """
        hashes = (_digest(*key) for key in keys)
        return Stored(self._paths, (self._done.get(one) or self._failed[one] for one in hashes))

    def append(self, record: Record) -> Record:
        """Write a record, unless another process has finished this task meanwhile; return the one that holds."""
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
        """Check that results of an experiment are of one instruction-set level: those of two differ by rounding.

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
        """Read what others have written; take away the rest of a line that one of them did not come to finish."""
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
        """A file whose folder was removed takes everything that is written, and nobody will find it."""
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
    """A hash of some texts that stands for them; 2^64 records would be needed for two to be taken for one."""
    return hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).digest()

"""How the jobs of a verifier go through its model: the streams that they wait for, and the scores that come out."""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

import tts_kernels as tk
from tts_search.models.branches import TokenBranch
from tts_search.models.device import read_scores, upload
from tts_search.models.reading import Place, ReadStream, ReadStreams
from tts_search.models.streams import Lane, Stream
from tts_search.search.protocol import Usage
from tts_search.verifiers.reader import Tail

__all__ = ["Contest", "HeadScorer", "Job", "branch_at"]


@dataclass(slots=True, eq=False)
class Job:
    """Steps to score, or the reason why they cannot be scored.

    Attributes
    ----------
    chain : list of TokenBranch
        The branches that hold the new steps. Each is the parent of the next.
    questions : list of TokenBranch
        Branches after the steps. Their last token is scored, if it is not a token of the step itself.
    places : list of (TokenBranch, int)
        The place where each new step is scored: a branch and a position in its path.
    tails : dict
        For each question: the end of its text, and the number of the judged step.
    reads : list of ReadStream
        The reads for this job.
    found : dict
        The scores, by place.
    settled : set of TokenBranch
        Branches whose scores are known from earlier, so that they need no output.
    error : Exception or None
        The reason why the job cannot be answered.
    """

    chain: list[TokenBranch] = field(default_factory=list)
    questions: list[TokenBranch] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    tails: dict[TokenBranch, tuple[Tail, int]] = field(default_factory=dict)
    reads: list[ReadStream] = field(default_factory=list)
    found: dict[Place, float] = field(default_factory=dict)
    settled: set[TokenBranch] = field(default_factory=set)
    error: Exception | None = None

    @property
    def asked(self) -> list[TokenBranch]:
        """The branches whose outputs are scored."""
        return [branch for branch in self.questions or self.chain if branch not in self.settled]


Stages = Generator[list[Stream], None, None]
"""The stages of a job: streams that have been submitted, which the job waits for together."""


@dataclass(slots=True)
class Contest:
    """The groups of competing candidates, candidate by candidate, group after group.

    Attributes
    ----------
    how : str
        The aggregate that decides: one that continues without rounding, ``"last"``, ``"min"`` or ``"max"``.
    places : list of list of (TokenBranch, int)
        The places where the new steps of each candidate are scored.
    prior : list of float
        The aggregate of each candidate's earlier steps; -inf if it has none.
    sizes, keep : list of int
        For each group: how many candidates it has, and how many survive.
    """

    how: str
    places: list[list[Place]] = field(default_factory=list)
    prior: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    keep: list[int] = field(default_factory=list)

    def best_so_far(self) -> list[list[int]]:
        """The best of each group by earlier steps alone, as indices of all candidates; ties go to the earlier one."""
        ends = list(accumulate(self.sizes))
        groups = [range(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]
        ranked = [sorted(group, key=lambda number: -self.prior[number]) for group in groups]
        return [best[:count] for best, count in zip(ranked, self.keep, strict=True)]


class HeadScorer:
    """Scores places by a head over their hidden states. There are no logits, and the head runs only at these places."""

    def __init__(self, lane: Lane, head: tk.ScoreHead) -> None:
        self.lane = lane
        self.head = head
        self.reading = ReadStreams(lane)

    def begin(self, _root: TokenBranch) -> None:
        """Called when a problem begins."""

    def release(self, _branches: Iterable[TokenBranch]) -> None:
        """Called when branches are no longer needed."""

    def usage(self, _root: TokenBranch) -> Usage:
        """Return the cost of a problem so far, without that of the verifier's own branches."""
        return Usage()

    def end(self, root: TokenBranch) -> Usage:
        """Called at the end of a problem. Return its cost, without that of the verifier's own branches."""
        return self.usage(root)

    def stages(self, job: Job) -> Stages:
        """Submit what a job needs, stage by stage. The job is complete at the end, or when it has an error."""
        try:
            job.reads = [self.reading.submit(branch) for branch in job.asked]
            yield list(job.reads)
        finally:
            self.lane.pool.release(job.questions)

    def step(self) -> Sequence[Stream]:
        """Advance the submitted streams; return those that ended."""
        return self.reading.step()

    def cancel(self, gone: Collection[Stream]) -> None:
        """Drop streams that are no longer needed."""
        self.reading.cancel([stream for stream in gone if isinstance(stream, ReadStream)])

    def score(self, jobs: Iterable[Job]) -> None:
        """Fill in the scores of jobs whose stages are complete.

        If a hidden state is not finite, its job gets an error: no score can be trusted then.
        """
        owners, places, hidden = _collected(jobs)
        if places:
            values = tk.step_scores(hidden, torch.arange(len(hidden), device=hidden.device), self.head)
            _note(owners, places, *read_scores(values, torch.isfinite(hidden).all(dim=-1)))

    def score_and_prune(self, jobs: Iterable[Job], contest: Contest) -> list[list[int]]:
        """Do what `score` does, and find the best of each group: one op over everything that was read.

        Returns
        -------
        list of list of int
            The survivors of each group, best first, by their numbers among all candidates.
        """
        owners, places, hidden = _collected(jobs)
        if not places:  # no text could be read: only earlier scores compete
            return contest.best_so_far()
        row_of = {place: row for row, place in enumerate(places)}
        rows = [[row_of[place] for place in asked if place in row_of] for asked in contest.places]

        def index(values: Iterable[int]) -> Tensor:
            return upload(torch.tensor(list(values), dtype=torch.int64), hidden.device)

        scored = [row for own in rows for row in own]
        pruned = tk.score_and_prune(
            hidden,
            index(scored),
            index(accumulate(map(len, rows), initial=0)),
            self.head,
            index(accumulate(contest.sizes, initial=0)),
            index(contest.keep),
            max_k=max(1, *contest.keep),
            how=contest.how,
            prior=upload(torch.tensor(contest.prior), hidden.device),
            prior_counts=index(prior > -math.inf for prior in contest.prior),
        )
        best, values, finite = read_scores(pruned.indices, pruned.step_scores, torch.isfinite(hidden).all(dim=-1))
        chosen = [owners[row] for row in scored], [places[row] for row in scored]
        _note(*chosen, values, [finite[row] for row in scored])
        return [[number for number in line if number >= 0] for line in best]


def _collected(jobs: Iterable[Job]) -> tuple[list[Job], list[Place], Tensor]:
    """The outputs for jobs. For each row: the job, the place, and the hidden state [rows, H]."""
    reads = [(job, read) for job in jobs if job.error is None for read in job.reads]
    owners = [job for job, read in reads for _ in read.places]
    places = [place for _, read in reads for place in read.places]
    parts = [part for _, read in reads for part in read.outputs]
    return owners, places, torch.cat(parts) if parts else torch.empty(0, 0)


def _note(owners: Sequence[Job], places: Sequence[Place], values: Sequence[float], finite: Sequence[bool]) -> None:
    for job, place, value, is_finite in zip(owners, places, values, finite, strict=True):
        job.found[place] = value
        if not is_finite:
            job.error = FloatingPointError("the verifier gave a hidden state that is not finite")


def branch_at(parent: TokenBranch, start: int, tokens: list[int]) -> TokenBranch:
    """A branch with the first ``start`` tokens of the parent's path, and then ``tokens``."""
    while start < parent.start and parent.parent is not None:
        parent = parent.parent
    return TokenBranch(parent.meter, parent, start, tokens)

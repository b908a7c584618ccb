"""A model that verifiers read with: its decoder and its KV pool, and how batches of branches go through them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import tts_kernels as tk
from tts_search.models.device import read_scores, upload
from tts_search.models.pool import Branch, BranchPool, Forwarded, PoolTooSmallError
from tts_search.search.protocol import Usage
from tts_search.verifiers.reader import Tail

if TYPE_CHECKING:
    from tts_search.models.decoder import Decoder

__all__ = ["Contest", "HeadScorer", "Lane", "Task", "branch_at"]


@dataclass(slots=True, eq=False)
class Task:
    """Steps that are to be scored, or why they cannot be.

    Attributes
    ----------
    chain : list of Branch
        The branches that hold the new steps, each one's parent before it.
    questions : list of Branch
        Branches behind the steps whose last token is scored, if the steps' own is not.
    places : list of (Branch, int)
        Where each new step is scored: a branch and a position in its path.
    tails : dict
        Of each question, the end of its text and the number of the step that is judged.
    found : dict
        What came out, by place.
    error : Exception or None
        Set by whoever finds that it cannot be answered.
    """

    chain: list[Branch] = field(default_factory=list)
    questions: list[Branch] = field(default_factory=list)
    places: list[tuple[Branch, int]] = field(default_factory=list)
    tails: dict[Branch, tuple[Tail, int]] = field(default_factory=dict)
    found: dict[tuple[Branch, int], float] = field(default_factory=dict)
    error: Exception | None = None

    @property
    def asked(self) -> list[Branch]:
        """The branches whose outputs are scored."""
        return self.questions or self.chain


@dataclass(slots=True)
class Lane:
    """A decoder and the pool of the branches that it has read."""

    decoder: Decoder
    pool: BranchPool

    def read(
        self,
        waiting: Mapping[Branch, Task],
        take: Callable[[Forwarded], None],
        model: Callable[..., Tensor] | None = None,
    ) -> None:
        """Forward what branches have pending, in as many waves as the pool needs.

        Parameters
        ----------
        waiting : mapping of Branch to Task
            What to read, and for whom. A task whose branch the pool cannot hold gets the error, and is left out.
        take : callable
            Gets what each forward gave.
        model : callable or None
            The decoder's ``hidden`` (by default) or ``logits``.
        """
        while waiting := {branch: task for branch, task in waiting.items() if task.error is None}:
            waiting = self._wave(waiting, take, model)
            for meter in {id(branch.meter): branch.meter for branch in waiting}.values():
                meter.waves += 1

    def _wave(
        self,
        waiting: dict[Branch, Task],
        take: Callable[[Forwarded], None],
        model: Callable[..., Tensor] | None,
    ) -> dict[Branch, Task]:
        """Read branches; those that found no room are returned, to come in another wave."""
        later: dict[Branch, Task] = {}
        while waiting:
            try:
                forwarded = self.pool.forward(list(waiting), model or self.decoder.hidden, head=model is not None)
            except PoolTooSmallError as error:
                failed = waiting[error.branch]
                failed.error = error
                waiting = {branch: task for branch, task in waiting.items() if task is not failed}
                continue
            later = {branch: waiting.pop(branch) for branch in forwarded.postponed} | later
            take(forwarded)
            for branch in forwarded.done:
                waiting.pop(branch)
        return later


@dataclass(slots=True)
class Contest:
    """Who compete with whom, candidate by candidate, group after group.

    Attributes
    ----------
    how : str
        The aggregate that counts: one that continues to the bit, ``"last"``, ``"min"`` or ``"max"``.
    places : list of list of (Branch, int)
        Where the new steps of each candidate are scored.
    prior : list of float
        The aggregate of each candidate's earlier steps; -inf: it has none.
    sizes, keep : list of int
        Of each group: how many candidates it has, and how many survive.
    """

    how: str
    places: list[list[tuple[Branch, int]]] = field(default_factory=list)
    prior: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    keep: list[int] = field(default_factory=list)


class HeadScorer:
    """Scores places by a head over their hidden states: no logits, and the head at those places alone."""

    def __init__(self, lane: Lane, head: tk.ScoreHead) -> None:
        self.lane = lane
        self.head = head

    def begin(self, _root: Branch) -> None:
        """A problem begins."""

    def release(self, _branches: Iterable[Branch]) -> None:
        """Nobody asks for these branches any more."""

    def end(self, _root: Branch) -> Usage:
        """A problem is over; what it cost besides what was read through the verifier's own branches."""
        return Usage()

    def score(self, waiting: Mapping[Branch, Task]) -> None:
        """Fill in what the tasks of these branches are to find.

        A hidden state that is not finite is an error of its task: no score can be trusted then.
        """
        places, hidden = self._hidden(waiting)
        if places:
            values = tk.step_scores(hidden, torch.arange(len(hidden), device=hidden.device), self.head)
            self._note(waiting, places, *read_scores(values, torch.isfinite(hidden).all(dim=-1)))

    def score_and_prune(self, waiting: Mapping[Branch, Task], contest: Contest) -> list[list[int]]:
        """Do what `score` does, and find the best of each group: one op over all that was read.

        Returns
        -------
        list of list of int
            Of each group its survivors, best first, by their numbers among all candidates.
        """
        places, hidden = self._hidden(waiting)
        if not places:  # nothing could be read
            return [[] for _ in contest.keep]
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
        self._note(waiting, [places[row] for row in scored], values, [finite[row] for row in scored])
        return [[number for number in line if number >= 0] for line in best]

    def _hidden(self, waiting: Mapping[Branch, Task]) -> tuple[list[tuple[Branch, int]], Tensor]:
        """Read branches; the places that got a hidden state, and those [places, H]."""
        places: list[tuple[Branch, int]] = []
        parts: list[Tensor] = []

        def take(forwarded: Forwarded) -> None:
            if forwarded.rows:
                places.extend(forwarded.rows)
                parts.append(forwarded.outputs)
            self.lane.pool.release([branch for branch in forwarded.done if branch in waiting[branch].questions])

        self.lane.read(waiting, take)
        return places, torch.cat(parts) if parts else torch.empty(0, 0)

    def _note(
        self,
        waiting: Mapping[Branch, Task],
        places: Sequence[tuple[Branch, int]],
        values: Sequence[float],
        finite: Sequence[bool],
    ) -> None:
        for place, value, is_finite in zip(places, values, finite, strict=True):
            task = waiting[place[0]]
            task.found[place] = value
            if not is_finite:
                task.error = FloatingPointError("the verifier gave a hidden state that is not finite")


def branch_at(parent: Branch, start: int, tokens: list[int]) -> Branch:
    """A branch of the first ``start`` tokens of the parent's path and ``tokens``."""
    while start < parent.start and parent.parent is not None:
        parent = parent.parent
    return Branch(parent.meter, parent, start, tokens)

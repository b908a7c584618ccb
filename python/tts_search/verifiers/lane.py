"""A model that verifiers read with: its decoder and its KV pool, and how batches of branches go through them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import tts_kernels as tk
from tts_search.branches import Branch, BranchPool, Forwarded, PoolTooSmallError
from tts_search.protocol import Usage
from tts_search.verifiers.reader import Tail

if TYPE_CHECKING:
    from tts_search.decoder import Decoder

__all__ = ["HeadScorer", "Lane", "Task", "branch_at"]


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

        def take(forwarded: Forwarded) -> None:
            if forwarded.rows:
                hidden = forwarded.outputs
                values = tk.step_scores(hidden, torch.arange(len(hidden), device=hidden.device), self.head)
                self._note(waiting, forwarded, values.tolist(), torch.isfinite(hidden).all(dim=-1).tolist())
            self.lane.pool.release([branch for branch in forwarded.done if branch in waiting[branch].questions])

        self.lane.read(waiting, take)

    def _note(
        self, waiting: Mapping[Branch, Task], forwarded: Forwarded, values: list[float], finite: list[bool]
    ) -> None:
        for place, value, is_finite in zip(forwarded.rows, values, finite, strict=True):
            task = waiting[place[0]]
            task.found[place] = value
            if not is_finite:
                task.error = FloatingPointError("the verifier gave a hidden state that is not finite")


def branch_at(parent: Branch, start: int, tokens: list[int]) -> Branch:
    """A branch of the first ``start`` tokens of the parent's path and ``tokens``."""
    while start < parent.start and parent.parent is not None:
        parent = parent.parent
    return Branch(parent.meter, parent, start, tokens)

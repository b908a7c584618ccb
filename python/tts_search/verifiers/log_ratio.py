"""Implicit process rewards: how much likelier a model finds the steps than a reference model does.

``score(step k) = beta * sum over the tokens of steps 1..k of log p(token) - log p_ref(token)``

(Yuan et al., "Free Process Rewards without Process Labels", arXiv 2412.01981). Log-probabilities come from hidden
states through `tts_kernels.linear_logprob`: there is no [tokens, vocabulary] tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from math import isfinite

import torch
from torch import Tensor

import tts_kernels as tk
from tts_search.models.branches import TokenBranch
from tts_search.models.device import read_scores, upload
from tts_search.models.meter import Meter
from tts_search.models.reading import Place, ReadStream, ReadStreams
from tts_search.models.streams import Lane, Stream
from tts_search.search.protocol import Usage
from tts_search.verifiers.jobs import Job, Stages

__all__ = ["Likelihood", "LogRatioScorer"]

# A branch keeps its last hidden states, which predict the first tokens of its children. This number is larger than that
# of the tokens that a tokenizer changes when text follows. Earlier states are computed again if needed.
_KEPT = 16


@dataclass(slots=True)
class _Tree:
    """The data of one problem: the log-ratio up to each own token of a branch, and the reference's branches."""

    sums: dict[TokenBranch, list[float]] = field(default_factory=dict)
    twins: dict[TokenBranch, TokenBranch] = field(default_factory=dict)


class LogRatioScorer:
    """Scores the branches of jobs by two models.

    Parameters
    ----------
    model, reference : Likelihood
        Log-probabilities under the verifier, and under its reference.
    beta : float
        Factor of the log-ratio.
    """

    def __init__(self, model: Likelihood, reference: Likelihood, beta: float) -> None:
        self.models = (model, reference)
        self.beta = beta
        self._trees: dict[TokenBranch, _Tree] = {}  # by root

    def begin(self, root: TokenBranch) -> None:
        """Called when a problem begins. The reference reads it, too."""
        self._trees[root] = _Tree(twins={root: TokenBranch(Meter(), None, 0, root.tokens, root.given)})

    def stages(self, job: Job) -> Stages:
        """Both models read the tokens that predict the first tokens of a job's branches, then the branches."""
        branches = job.asked
        sides = list(zip(self.models, (branches, [self._twin(branch) for branch in branches]), strict=True))
        yield list(dict.fromkeys(read for model, own in sides for read in model.read_before(own)))
        yield [read for model, own in sides for read in model.read(own)]

    def step(self) -> Sequence[Stream]:
        """Advance the submitted streams; return those that ended."""
        return [read for model in self.models for read in model.step()]

    def cancel(self, gone: Collection[Stream]) -> None:
        """Drop streams that are no longer needed."""
        for model in self.models:
            model.cancel([stream for stream in gone if isinstance(stream, ReadStream)])

    def score(self, jobs: Iterable[Job]) -> None:
        """Fill in the scores of jobs whose stages are complete."""
        owners = {branch: job for job in jobs if job.error is None for branch in job.asked}
        if not owners:
            return
        read = list(owners)
        twins = [self._twin(branch) for branch in read]
        columns = read_scores(self.models[0].logprobs(read), self.models[1].logprobs(twins))
        mine, theirs = (_by_branch(read, column) for column in columns)
        for branch, job in owners.items():
            self._sum(branch, job, mine[branch], theirs[branch])

    def release(self, branches: Iterable[TokenBranch]) -> None:
        """Drop branches that are no longer needed."""
        twins = [self._trees[_root(branch)].twins.get(branch) for branch in branches]
        self.models[1].lane.pool.release([twin for twin in twins if twin is not None])

    def usage(self, root: TokenBranch) -> Usage:
        """Return the cost of the reference so far."""
        return self.models[1].lane.pool.usage(self._trees[root].twins[root].meter)

    def end(self, root: TokenBranch) -> Usage:
        """End a problem, and return the cost of the reference."""
        tree = self._trees.pop(root)
        reference = self.models[1].lane
        meter = tree.twins[root].meter
        reference.pool.close(meter)
        self.models[0].forget(tree.twins)
        self.models[1].forget(tree.twins.values())
        return reference.pool.usage(meter)

    def _sum(self, branch: TokenBranch, job: Job, mine: list[float], theirs: list[float]) -> None:
        sums = self._trees[_root(branch)].sums
        holder = _holder(branch, branch.start - 1)
        total = 0.0 if holder.parent is None else sums[holder][branch.start - 1 - holder.start]
        sums[branch] = own = []
        for one, other in zip(mine, theirs, strict=True):
            total += one - other
            own.append(total)
        for place in job.places:
            if place[0] is branch:
                job.found[place] = self.beta * own[place[1] - branch.start]
        if not isfinite(total):
            job.error = FloatingPointError("the verifier gave a hidden state that is not finite")

    def _twin(self, branch: TokenBranch) -> TokenBranch:
        """The branch of the reference model with the same tokens."""
        twins = self._trees[_root(branch)].twins
        path = []
        node = branch
        while node not in twins:
            path.append(node)
            assert node.parent is not None
            node = node.parent
        for node in reversed(path):
            assert node.parent is not None
            parent = twins[node.parent]
            twins[node] = TokenBranch(parent.meter, parent, node.start, node.tokens)
        return twins[branch]


class Likelihood:
    """Log-probabilities of tokens under a model.

    Parameters
    ----------
    lane : Lane
        The model, without its head.
    weight : Tensor
        The head [V, H].
    """

    def __init__(self, lane: Lane, weight: Tensor) -> None:
        self.lane = lane
        self.reading = ReadStreams(lane)
        self.weight = weight.to(lane.decoder.device)
        self._states: dict[TokenBranch, dict[int, Tensor]] = {}  # hidden states by position
        self._before: dict[Place, ReadStream] = {}  # unfinished reads of one place

    def read_before(self, branches: Sequence[TokenBranch]) -> list[ReadStream]:
        """Read the hidden states that predict the first tokens of branches, as far as they are not known."""
        reads = []
        for branch in branches:
            position = branch.start - 1
            holder = _holder(branch, position)
            if holder in branches or position in self._states.get(holder, {}):
                continue
            if (holder, position) not in self._before:
                source = holder
                if not holder.pending or holder.length != branch.start:  # it was read before, without keeping the state
                    token = holder.tokens[position - holder.start]
                    source = TokenBranch(holder.meter, holder, position, [token])
                self._before[holder, position] = self.reading.submit(source)
            reads.append(self._before[holder, position])
        return reads

    def read(self, branches: Sequence[TokenBranch]) -> list[ReadStream]:
        """Read the hidden states of all own tokens of branches."""
        for branch in branches:
            branch.marks = list(range(branch.start, branch.length))
        return [self.reading.submit(branch) for branch in branches]

    def step(self) -> list[ReadStream]:
        """Run one forward, and keep the hidden states of the reads that ended."""
        reads = self.reading.step()
        for read in reads:
            holder = self._forget_before(read)
            if read.error is None:
                states = zip(read.places, torch.cat(read.outputs), strict=True)
                self._states.setdefault(holder, {}).update((position, state) for (_, position), state in states)
        return reads

    def cancel(self, gone: Collection[ReadStream]) -> None:
        """Drop reads that are no longer needed."""
        self.reading.cancel(gone)
        for read in gone:
            self._forget_before(read)

    def logprobs(self, branches: Sequence[TokenBranch]) -> Tensor:
        """The log-probabilities of all own tokens of branches that were read, branch after branch."""
        places = [(branch, position) for branch in branches for position in range(branch.start, branch.length)]
        states = torch.stack([self._state(branch, position - 1) for branch, position in places])
        targets = torch.tensor([branch.tokens[position - branch.start] for branch, position in places])
        logprobs = tk.linear_logprob(states, self.weight, upload(targets, states.device))
        for branch in branches:
            states_of = self._states[branch]
            for position in range(branch.start, branch.length - _KEPT):
                states_of.pop(position, None)
        return logprobs

    def forget(self, branches: Iterable[TokenBranch]) -> None:
        """Drop all data of branches."""
        for branch in branches:
            self._states.pop(branch, None)

    def _forget_before(self, read: ReadStream) -> TokenBranch:
        """Forget a read that ended; return the branch of its states. If it read a copy, the copy is dropped."""
        place = next((place for place, other in self._before.items() if other is read), None)
        if place is None:
            return read.branch
        del self._before[place]
        if read.branch is not place[0]:
            self.lane.pool.release([read.branch])
        return place[0]

    def _state(self, branch: TokenBranch, position: int) -> Tensor:
        return self._states[branch if position >= branch.start else _holder(branch, position)][position]


def _by_branch(branches: Sequence[TokenBranch], values: Sequence[float]) -> dict[TokenBranch, list[float]]:
    """Values of the own tokens of branches, branch after branch."""
    each = iter(values)
    return {branch: [next(each) for _ in branch.tokens] for branch in branches}


def _holder(branch: TokenBranch, position: int) -> TokenBranch:
    """The ancestor that owns the token at a position of a branch's path."""
    node = branch.parent
    assert node is not None, "the first token of a prompt is predicted from nothing"
    while node.start > position:
        assert node.parent is not None
        node = node.parent
    return node


def _root(branch: TokenBranch) -> TokenBranch:
    while branch.parent is not None:
        branch = branch.parent
    return branch

"""Implicit process rewards: how much likelier a model finds the steps than a reference model does.

``score(step k) = beta * sum over the tokens of steps 1..k of log p(token) - log p_ref(token)``

(Yuan et al., "Free Process Rewards without Process Labels", arXiv 2412.01981). Log-probabilities come from hidden
states through `tts_kernels.linear_logprob`: there is no [tokens, vocabulary] tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite

import torch
from torch import Tensor

import tts_kernels as tk
from tts_search.models.device import read_scores, upload
from tts_search.models.meter import Meter
from tts_search.models.pool import Branch, Forwarded
from tts_search.search.protocol import Usage
from tts_search.verifiers.lane import Lane, Task

__all__ = ["Likelihood", "LogRatioScorer"]

# Hidden states that a branch keeps: its last ones, which predict the first tokens of what is built on it. More than
# the tokens that a tokenizer takes back when text follows; what is further up is read once more.
_KEPT = 16


@dataclass(slots=True)
class _Tree:
    """What is known of one problem: the log-ratio up to each own token of a branch, and the reference's branches."""

    sums: dict[Branch, list[float]] = field(default_factory=dict)
    twins: dict[Branch, Branch] = field(default_factory=dict)


class LogRatioScorer:
    """Scores the branches of tasks by two models.

    Parameters
    ----------
    model, reference : Likelihood
        Of the verifier, and of its reference.
    beta : float
        Factor of the log-ratio.
    """

    def __init__(self, model: Likelihood, reference: Likelihood, beta: float) -> None:
        self.models = (model, reference)
        self.beta = beta
        self._trees: dict[Branch, _Tree] = {}  # by root

    def begin(self, root: Branch) -> None:
        """A problem begins; the reference reads it, too."""
        self._trees[root] = _Tree(twins={root: Branch(Meter(), None, 0, root.tokens, root.given)})

    def score(self, waiting: Mapping[Branch, Task]) -> None:
        """Fill in what the tasks of these branches are to find."""
        read, values = self.models[0].read(waiting)
        twins = {self._twin(branch): branch for branch in read}
        read_too, other_values = self.models[1].read({twin: waiting[branch] for twin, branch in twins.items()})
        columns = read_scores(values, other_values)
        own, other = (_by_branch(*each) for each in zip((read, read_too), columns, strict=True))
        for twin, theirs in other.items():
            self._sum(twins[twin], waiting[twins[twin]], own[twins[twin]], theirs)

    def release(self, branches: Iterable[Branch]) -> None:
        """Nobody asks for these branches any more."""
        twins = [self._trees[_root(branch)].twins.get(branch) for branch in branches]
        self.models[1].lane.pool.release([twin for twin in twins if twin is not None])

    def end(self, root: Branch) -> Usage:
        """A problem is over; what the reference cost."""
        tree = self._trees.pop(root)
        reference = self.models[1].lane
        meter = tree.twins[root].meter
        reference.pool.close(meter)
        self.models[0].forget(tree.twins)
        self.models[1].forget(tree.twins.values())
        return meter.usage(reference.decoder.shape)

    def _sum(self, branch: Branch, task: Task, mine: list[float], theirs: list[float]) -> None:
        sums = self._trees[_root(branch)].sums
        holder = _holder(branch, branch.start - 1)
        total = 0.0 if holder.parent is None else sums[holder][branch.start - 1 - holder.start]
        sums[branch] = own = []
        for one, other in zip(mine, theirs, strict=True):
            total += one - other
            own.append(total)
        for place in task.places:
            if place[0] is branch:
                task.found[place] = self.beta * own[place[1] - branch.start]
        if not isfinite(total):
            task.error = FloatingPointError("the verifier gave a hidden state that is not finite")

    def _twin(self, branch: Branch) -> Branch:
        """The branch of the reference model that holds the same tokens."""
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
            twins[node] = Branch(parent.meter, parent, node.start, node.tokens)
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
        self.weight = weight.to(lane.decoder.device)
        self._states: dict[Branch, dict[int, Tensor]] = {}  # hidden states by position

    def read(self, waiting: Mapping[Branch, Task]) -> tuple[list[Branch], Tensor]:
        """Read branches; those whose tasks have no error, and the log-probabilities of all their own tokens."""
        for branch in waiting:
            branch.marks = list(range(branch.start, branch.length))
        self._read_before(waiting)
        self.lane.read(waiting, self._take)
        done = [branch for branch, task in waiting.items() if task.error is None]
        places = [(branch, position) for branch in done for position in range(branch.start, branch.length)]
        if not places:
            return [], torch.empty(0)
        states = torch.stack([self._state(branch, position - 1) for branch, position in places])
        targets = torch.tensor([branch.tokens[position - branch.start] for branch, position in places])
        logprobs = tk.linear_logprob(states, self.weight, upload(targets, states.device))
        for branch in done:
            states_of = self._states[branch]
            for position in range(branch.start, branch.length - _KEPT):
                states_of.pop(position, None)
        return done, logprobs

    def forget(self, branches: Iterable[Branch]) -> None:
        """Drop what is kept of branches."""
        for branch in branches:
            self._states.pop(branch, None)

    def _read_before(self, waiting: Mapping[Branch, Task]) -> None:
        """Have the hidden states that the first tokens of branches are predicted from."""
        missing: dict[Branch, Task] = {}
        copies: dict[tuple[Branch, int], Branch] = {}
        for branch, task in waiting.items():
            position = branch.start - 1
            holder = _holder(branch, position)
            if task.error is not None or holder in waiting or position in self._states.get(holder, {}):
                continue
            if holder.pending and holder.length == branch.start:
                missing[holder] = task
            elif (holder, position) not in copies:  # it was read when nobody wanted to know
                token = holder.tokens[position - holder.start]
                copies[holder, position] = copy = Branch(holder.meter, holder, position, [token])
                missing[copy] = task
        self.lane.read(missing, self._take)
        for (holder, _), copy in copies.items():
            self._states.setdefault(holder, {}).update(self._states.pop(copy, {}))
        self.lane.pool.release(copies.values())

    def _take(self, forwarded: Forwarded) -> None:
        for (branch, position), state in zip(forwarded.rows, forwarded.outputs, strict=True):
            self._states.setdefault(branch, {})[position] = state

    def _state(self, branch: Branch, position: int) -> Tensor:
        return self._states[branch if position >= branch.start else _holder(branch, position)][position]


def _by_branch(branches: Sequence[Branch], values: Sequence[float]) -> dict[Branch, list[float]]:
    """Values of the own tokens of branches, branch after branch."""
    each = iter(values)
    return {branch: [next(each) for _ in branch.tokens] for branch in branches}


def _holder(branch: Branch, position: int) -> Branch:
    """The ancestor among whose own tokens a position of a branch's path is."""
    node = branch.parent
    assert node is not None, "the first token of a prompt is predicted from nothing"
    while node.start > position:
        assert node.parent is not None
        node = node.parent
    return node


def _root(branch: Branch) -> Branch:
    while branch.parent is not None:
        branch = branch.parent
    return branch

"""The state of one problem's search: its branches, with their texts and scores."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from tts_search.errors import SearchError
from tts_search.search.answers import Equality, Equivalence, boxed, same
from tts_search.search.config import SearchConfig
from tts_search.search.seeds import Seeds
from tts_search.search.steps import split_steps
from tts_search.search.tree import State
from tts_search.search.types import Step
from tts_search.search.voting import Ballot

__all__ = ["Branch", "Run"]

FIRST_LOOKAHEAD_ID = 1 << 30  # branches that are not part of the tree are numbered from here


@dataclass(eq=False, slots=True)
class Branch:
    """A node of the search tree, and the path that ends in it.

    The path's text is kept twice: `texts`, one entry for each node, as it was generated (what a policy continues), and
    `steps`, one entry for each step (what a verifier reads). They differ where a text was generated without a delimiter
    and holds several steps, and where it is blank: `blank` belongs to the step that will follow it.
    """

    id: int
    parent: Branch | None
    path: tuple[int, ...]  # child numbers from the root
    round: int
    texts: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()
    blank: str = ""
    text: str = ""  # of this node alone
    num_tokens: int = 0  # of this node alone
    is_grown: bool = False  # what was sampled for it is there
    path_tokens: int = 0
    finished: bool = False  # the answer is complete
    stopped: bool = False  # the policy has nothing to add
    ended: bool = False  # will not be expanded again: finished, stopped, or at a limit
    cut: bool = False  # its step reached the token limit
    scores: tuple[float, ...] = ()
    score: float = math.nan
    scored_id: int = 0  # the nearest branch up from here that the verifier has read; the root needs no reading
    unscored: bool = False  # the verifier failed for it
    num_children: int = 0
    state: State = "open"
    why: str = ""  # it was pruned, or has no scores
    pruned_in: int = 0  # the round that did it

    def fail(self, why: str, round_: int) -> None:
        """Rank last and go no further: the verifier has no scores for it."""
        self.stop()
        self.unscored, self.score, self.why = True, -math.inf, why
        if not self.finished:
            self.state, self.pruned_in = "pruned", round_

    def stop(self) -> None:
        """End the branch, whatever the policy says."""
        self.stopped = self.ended = True


class Run:
    """The search of one problem.

    Parameters
    ----------
    problem : int
        Its index in the run, for requests and errors.
    text : str
        Its text.
    config : SearchConfig
        How to search.
    scored : bool
        Whether there is a verifier.
    extract_answer : callable
        Takes the answer out of a text.
    equal : callable
        Whether two answers mean the same.

    Attributes
    ----------
    round : int
        The number of the round, from 1: an algorithm counts it.
    root : Branch
        The problem itself, without any step.
    branches : list of Branch
        All nodes of the tree, in order of their making.
    ballot : Ballot
        Who elects the best completion and the answer; an algorithm may set another.
    """

    def __init__(
        self,
        problem: int,
        text: str,
        config: SearchConfig,
        *,
        scored: bool,
        extract_answer: Callable[[str], str | None] = boxed,
        equal: Equality = same,
    ) -> None:
        self.problem = problem
        self.config = config
        self.scored = scored
        self.round = 0
        self.root = Branch(id=0, parent=None, path=(), round=0, is_grown=True)
        self.branches = [self.root]
        self.held: set[int] = {0}  # branches that the drivers still keep
        self._seeds = Seeds(config.seed, text)
        self._num_lookaheads = 0
        self._num_sampled = 0  # tokens
        self._extract_answer = extract_answer
        self.equal = equal
        self.ballot = Ballot()
        self._same = Equivalence(equal)

    def error(self, message: str) -> SearchError:
        """Return an error that names the problem and the round."""
        return SearchError(message, self.problem, self.round)

    def rounds(self) -> Iterator[bool]:
        """Count the rounds, up to the config's `max_steps`; yield for each whether it is the last."""
        limit = self.config.max_steps
        for number in range(1, limit + 1):
            self.round = number
            yield number == limit

    def add_child(self, parent: Branch) -> Branch:
        """Add a node to the tree, as yet without text."""
        child = Branch(len(self.branches), parent, (*parent.path, parent.num_children), self.round)
        parent.num_children += 1
        parent.state = "expanded"
        self.branches.append(child)
        self.held.add(child.id)
        return child

    def add_lookahead(self, parent: Branch) -> Branch:
        """Add a branch that is no part of the tree: its scores count for an ancestor."""
        child = Branch(FIRST_LOOKAHEAD_ID + self._num_lookaheads, parent, (*parent.path, -1), self.round)
        self._num_lookaheads += 1
        self.held.add(child.id)
        return child

    def seed_of(self, branch: Branch) -> int:
        """Return the seed of a branch's draws."""
        return self._seeds.of(branch.path)

    def random(self, *path: int) -> random.Random:
        """Return a generator for draws that belong to no branch; `path` tells them apart, its first number below 0."""
        return random.Random(self._seeds.of(path))

    def is_done(self, branches: Iterable[Branch]) -> bool:
        """Whether enough of these branches have finished, or agree, or the budget is spent: the search is to stop."""
        config = self.config
        if config.budget_tokens is not None and self._num_sampled >= config.budget_tokens:
            return True
        finished = [branch for branch in branches if branch.finished]
        if config.stop_when_full and len(finished) >= config.n:
            return True
        if config.agree_margin is None or len(finished) < config.agree_margin:
            return False
        answers = (self._extract_answer("".join(branch.texts)) for branch in finished)
        counts = Counter(self._same.firsts(answer for answer in answers if answer))
        first, second = [*sorted(counts.values(), reverse=True), 0, 0][:2]
        return first - second >= config.agree_margin

    def tokens_left(self, branch: Branch) -> int | None:
        """Return how many tokens the branch may still grow by; None: no limit."""
        limit = self.config.max_tokens
        return None if limit is None else limit - branch.path_tokens

    def grow(self, branch: Branch, step: Step, delimiter: str | None, *, last: bool) -> None:
        """Put the step that was sampled for a new branch into it.

        If it was sampled to another `delimiter` than the config's, or to none, it may hold several steps. One that is
        finished but for its length, as at the end of a model's context, stops its branch without finishing it.

        Raises
        ------
        SearchError
            If it is no :class:`~tts_search.Step`.
        """
        self._put(branch, step, delimiter, last)
        self._num_sampled += step.num_tokens

    def _put(self, branch: Branch, step: Step, delimiter: str | None, last: bool) -> None:
        if not isinstance(step, Step) or not isinstance(step.text, str):
            raise self.error(f"policy: expected a Step with a text for each sample, got {step!r:.200}")
        parent, config = branch.parent, self.config
        assert parent is not None
        branch.text, branch.num_tokens, branch.is_grown = step.text, step.num_tokens, True
        branch.path_tokens = parent.path_tokens + step.num_tokens
        branch.texts = (*parent.texts, step.text) if step.text else parent.texts
        uncut = delimiter != config.delimiter
        steps, branch.blank = split_steps(parent.blank + step.text, config.delimiter if uncut else None)
        branch.steps = parent.steps + steps
        branch.scored_id = parent.scored_id
        branch.cut = step.reason == "length"
        complete = step.finished and not branch.cut
        branch.finished = complete or (config.stop_text is not None and config.stop_text in step.text)
        branch.stopped = step.finished
        tokens_left = self.tokens_left(branch)
        branch.ended = branch.finished or branch.stopped or last or (tokens_left is not None and tokens_left <= 0)
        branch.state = "finished" if branch.finished else "open"

    def foreseen(self, branch: Branch, step: Step, delimiter: str | None) -> Branch:
        """Return what a new branch will be when it has grown by a step; the branch itself stays as it is.

        Raises
        ------
        SearchError
            As `grow` does.
        """
        copy = replace(branch)
        self._put(copy, step, delimiter, last=delimiter is None)  # what is only foreseen spends no budget
        return copy

    def write(self, branch: Branch, text: str, *, instead_of: str) -> None:
        """Write a text for the policy at the end of a branch, in the place of `instead_of` if its text has that."""
        parent = branch.parent
        assert parent is not None
        branch.text = branch.text.partition(instead_of)[0] + text
        branch.texts = (*parent.texts, branch.text)
        steps, branch.blank = split_steps(parent.blank + branch.text, self.config.delimiter)
        branch.steps = parent.steps + steps
        branch.finished = branch.stopped = branch.ended = False
        branch.state = "open"

"""The result of a search."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tts_search.search.answers import Equality, same
from tts_search.search.config import SearchConfig
from tts_search.search.run import Branch, Run
from tts_search.search.stats import SearchStats
from tts_search.search.tree import SearchTree, TreeNode
from tts_search.search.types import Completion
from tts_search.search.voting import Ballot
from tts_search.search.voting import vote as elect

__all__ = ["SearchResult", "best_of", "build_result", "node_of"]


@dataclass(frozen=True)
class SearchResult:
    """What the search of a problem came to.

    Attributes
    ----------
    problem : str
        The problem's text.
    completions : list of Completion
        The answers, in order of finishing, then the unfinished ones.
    best : Completion
        The one with the highest score among the finished (else among all), the earliest on ties.
    tree : SearchTree
        Everything that was tried.
    stats : SearchStats
        What it cost.
    config : SearchConfig
        How it was searched.
    vote : str
        The vote that `answer` counts by default: ``"prm_max"``, or what a strategy chose.
    ballot : Ballot
        Who elects the best completion and the answer.
    equal : callable
        Whether two answers mean the same.
    """

    problem: str
    completions: list[Completion]
    best: Completion
    tree: SearchTree
    stats: SearchStats
    config: SearchConfig
    vote: str = "prm_max"
    ballot: Ballot = field(default_factory=Ballot)
    equal: Equality = field(default=same, repr=False, compare=False)

    def answer(self, vote: str | None = None) -> str:
        """Return the answer that a vote among the finished completions (else among all) elects; empty if there is none.

        Parameters
        ----------
        vote : str or None
            ``"prm_max"`` unless a strategy chose another. ``"majority"``; ``"prm_max"``, ``"prm_vote"`` by the config's
            aggregate; ``"prm_min_max"``, ``"prm_last_vote"`` and so on (:func:`tts_search.vote`).

        Raises
        ------
        ValueError
            If there is no such vote, or it needs scores and the search had no verifier.
        """
        vote, ballot = vote or self.vote, self.ballot
        default = (ballot.vote_aggregate if vote == "prm_vote" else None) or self.config.aggregate
        return elect(ballot.voters(self.completions), vote, default, exact=ballot.exact, equal=self.equal)


def best_of(voters: Sequence[Completion]) -> Completion:
    """Return the one with the highest score, the earliest on ties; without scores, the first one."""
    return voters[0] if math.isnan(voters[0].score) else max(voters, key=lambda completion: completion.score)


def build_result(
    run: Run,
    problem: str,
    branches: Sequence[Branch],
    extract_answer: Callable[[str], str | None],
    stats: SearchStats,
) -> SearchResult:
    """Make the result of what an algorithm returned.

    Raises
    ------
    SearchError
        If there is none.
    """
    if not branches:
        raise run.error("the search ended without any completion")
    completions = [_completion(branch, extract_answer) for branch in branches]
    best = best_of(run.ballot.voters(completions))
    tree = SearchTree(tuple(node_of(branch) for branch in run.branches))
    return SearchResult(problem, completions, best, tree, stats, run.config, ballot=run.ballot, equal=run.equal)


def _completion(branch: Branch, extract_answer: Callable[[str], str | None]) -> Completion:
    steps = branch.steps
    if branch.blank:  # white space that no step follows stays with the last one, so that the steps make up the text
        steps = (*steps[:-1], steps[-1] + branch.blank) if steps else (branch.blank,)
    text = "".join(branch.texts)
    answer = extract_answer(text) or ""
    return Completion(text, steps, branch.scores, branch.score, branch.finished, branch.path_tokens, answer)


def node_of(branch: Branch) -> TreeNode:
    """Return a branch as it is now, as a node of the tree."""
    parent = None if branch.parent is None else branch.parent.id
    return TreeNode(
        branch.id,
        parent,
        branch.round,
        branch.text,
        branch.scores,
        branch.score,
        branch.state,
        branch.num_tokens,
        branch.why if branch.state == "pruned" or branch.unscored else "",
        branch.pruned_in if branch.state == "pruned" else None,
    )

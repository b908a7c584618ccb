"""TreeQuest's AB-MCTS over our policy and verifier: the function that its algorithms call to get a node and its score.

A node is a whole answer. A child of the root is a new answer; a child of an answer refines this answer. All answers
that a batch of trials needs are sampled in one batch, and children of one node share its prompt. Written against
treequest 0.3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tts_search.adapters.stateless import Continuation, StepSampler, StepScorer
from tts_search.errors import SearchError, require
from tts_search.search.protocol import Policy, Usage, Verifier
from tts_search.search.types import StepParams
from tts_search.search.voting import aggregate

__all__ = ["Answer", "Generator", "ab_mcts", "refined"]

_ACTION = "answer"


@dataclass(frozen=True, slots=True)
class Answer:
    """The state of a node: a text, and whether the policy ended it."""

    text: str
    finished: bool


def refined(problem: str, answer: str) -> str:
    """Return the text of a problem that asks for something better than an answer."""
    return f"{problem}\n\nAn earlier attempt:\n\n{answer}\n\nFind what is wrong with it, and give a better answer."


class Generator:
    """Generates answers to one problem and scores them: a ``generate_fn`` of TreeQuest, also for batches.

    Parameters
    ----------
    problem : str
        The problem.
    policy : Policy
        Samples answers.
    verifier : Verifier
        Scores their steps, between 0 and 1.
    params : StepParams
        How to sample; without a delimiter.
    seed : int
        Fixes every draw of the policy.
    how : str
        The aggregate of the steps' scores that gives the score of an answer.
    refine : callable
        Makes the text for the policy below an answer, from the problem and this answer.
    """

    def __init__(
        self,
        problem: str,
        policy: Policy,
        verifier: Verifier,
        *,
        params: StepParams = StepParams(delimiter=None),  # noqa: B008
        seed: int = 0,
        how: str = "last",
        refine: Callable[[str, str], str] = refined,
    ) -> None:
        self.problem = problem
        self.params = params
        self.how = how
        self.refine = refine
        self._sampler = StepSampler(policy, seed=seed)
        self._scorer = StepScorer(verifier)

    def __call__(self, parent: Answer | None) -> tuple[Answer, float]:
        """Generate one answer below a node; None is the root."""
        return self.many([parent])[0]

    def many(self, parents: Sequence[Answer | None]) -> list[tuple[Answer, float]]:
        """Generate an answer below each of some nodes, all in one batch.

        Raises
        ------
        SearchError
            If a text does not fit a model's context, or a score is not in [0, 1], where TreeQuest's priors are.
        """
        prompts = [self.problem if one is None else self.refine(self.problem, one.text) for one in parents]
        samples = self._sampler.sample([Continuation(prompt, "", self.params) for prompt in prompts])
        answers = [Answer(step.text, step.finished) for (step,) in samples]
        scored = self._scorer.score([(self.problem, answer.text) for answer in answers])
        scores = [aggregate(steps, self.how) if steps else 0.0 for steps in scored]  # an empty answer has score 0
        if bad := [score for score in scores if not 0 <= score <= 1]:
            raise SearchError(f"verifier: expected scores in [0, 1], got {bad[0]!r}")
        return list(zip(answers, scores, strict=True))

    def close(self) -> Usage:
        """Forget the problem; return the cost of policy and verifier together."""
        return self._sampler.close() + self._scorer.close()


def ab_mcts(generator: Generator, *, budget: int, batch: int = 5, algorithm: Any = None) -> list[tuple[Answer, float]]:
    """Search with TreeQuest until the budget is used: get a batch of trials, generate the answers, report the scores.

    Parameters
    ----------
    generator : Generator
        The generator of the problem.
    budget : int
        The total number of answers.
    batch : int
        Number of trials in a batch. TreeQuest advises at most 5, because it learns nothing within a batch.
    algorithm : treequest.Algorithm or None
        By default ``ABMCTSA()``: adaptive branching with node aggregation (arXiv 2503.04412). Its draws are those of
        numpy's global generator.

    Returns
    -------
    list of (Answer, float)
        All answers and their scores, best first. Equal ones are in the order of generation.

    Raises
    ------
    MissingExtraError
        Without treequest.
    ValueError
        If `budget` or `batch` is below 1.
    """
    if budget < 1 or batch < 1:
        raise ValueError(f"budget, batch: expected at least 1, got {budget!r} and {batch!r}")
    algorithm = require("treequest", "treequest").ABMCTSA() if algorithm is None else algorithm
    state = algorithm.init_tree()
    found: list[tuple[Answer, float]] = []
    while len(found) < budget:
        state, trials = algorithm.ask_batch(state, batch_size=min(batch, budget - len(found)), actions=[_ACTION])
        results = generator.many([trial.parent_state for trial in trials])
        for trial, result in zip(trials, results, strict=True):
            state = algorithm.tell(state, trial.trial_id, result)
        found += results
    return sorted(found, key=lambda pair: -pair[1])

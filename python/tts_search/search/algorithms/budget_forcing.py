"""Budget forcing: a model's thoughts before its answer are extended or cut to a budget of tokens."""

from __future__ import annotations

import math
from dataclasses import replace

from tts_search.search.algorithms.branches import check_growth
from tts_search.search.config import Thinking
from tts_search.search.moves import Moves, expand, release, score
from tts_search.search.run import Branch, Run
from tts_search.search.types import StepParams

__all__ = ["budget_forcing"]


def budget_forcing(run: Run) -> Moves[list[Branch]]:
    """Sample n completions with their thinking held to a budget (Muennighoff et al., s1, arXiv 2501.19393).

    Thinking that ends before ``thinking.min_tokens`` is made to go on, up to ``thinking.max_extensions`` times;
    thinking that reaches ``thinking.max_tokens`` is ended. Then the answer is sampled. What is written for the model is
    part of the completion, and of its node in the tree, but not of its sampled tokens. A policy that does not count
    tokens (``num_tokens`` 0) is extended as often as it may be, and never cut.

    Raises
    ------
    SearchError
        If the policy returns nothing, or it or the verifier something else than was asked for.
    """
    config = run.config
    thinking = config.thinking or Thinking()
    thoughts = [run.root] * config.n
    done: list[Branch] = []
    for run.round in range(1, thinking.max_extensions + 2):
        thoughts = yield from expand(run, thoughts, last=False, params=lambda branch: _think(run, thinking, branch))
        if run.round == 1:
            check_growth(run, thoughts)
        last = run.round > thinking.max_extensions
        goes_on = [branch for branch in thoughts if not last and _is_short(run, branch, thinking)]
        for branch in goes_on:
            run.write(branch, thinking.extend, instead_of=thinking.end)
        done += [branch for branch in thoughts if branch not in goes_on]
        thoughts = goes_on
        if not thoughts:
            break
        yield from release(run, [*done, *thoughts])
    for branch in done:
        if thinking.end not in branch.text and not branch.stopped:
            run.write(branch, thinking.end, instead_of=thinking.end)
    run.round += 1
    unanswered = [branch for branch in done if not branch.stopped and _room(run, branch) > 0]
    answers = (yield from expand(run, unanswered, last=True)) if unanswered else []
    answer_of = {answer.parent.id: answer for answer in answers if answer.parent is not None}
    completions = sorted((answer_of.get(branch.id, branch) for branch in done), key=lambda branch: branch.path)
    yield from score(run, completions, last=True)
    return completions


def _think(run: Run, thinking: Thinking, branch: Branch) -> StepParams:
    params = run.config.step_params(last=True, tokens_left=None)
    limit = min(thinking.max_tokens - branch.path_tokens, _room(run, branch))
    return replace(params, delimiter=thinking.end, max_tokens=int(limit))


def _room(run: Run, branch: Branch) -> float:
    left = run.tokens_left(branch)
    return math.inf if left is None else left


def _is_short(run: Run, branch: Branch, thinking: Thinking) -> bool:
    """Whether thinking ended by itself before its time."""
    ended = branch.finished or thinking.end in branch.text
    return ended and not branch.cut and branch.path_tokens < thinking.min_tokens and _room(run, branch) > 0

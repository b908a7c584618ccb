"""The moves that algorithms are made of: sample children, have them scored, free branches."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from tts_search.search.protocol import Expand, Release, Request, Score, ScoreAndPrune, Scored
from tts_search.search.run import Branch, Run
from tts_search.search.types import StepParams
from tts_search.search.voting import aggregate

__all__ = ["Algorithm", "Moves", "expand", "foresee", "release", "score", "score_and_prune"]

T = TypeVar("T")
Moves = Generator[Sequence[Request], Sequence[Any], T]
"""Yields lists of requests of one kind, is sent the list of their answers, returns T."""

Algorithm = Callable[[Run], Moves[list[Branch]]]
"""Searches one problem and returns the completions in order."""


def expand(
    run: Run, parents: Iterable[Branch], *, last: bool, params: Callable[[Branch], StepParams] | None = None
) -> Moves[list[Branch]]:
    """Sample one child for each entry of `parents`, in order: a branch named k times gets k children.

    Parameters
    ----------
    run : Run
        The search.
    parents : iterable of Branch
        One entry for each child to be.
    last : bool
        Whether no round follows: the new branches end, whatever the policy says.
    params : callable or None
        How to sample the children of a branch; by default, as the config says.

    Returns
    -------
    list of Branch
        The children, in the order of `parents`.

    Raises
    ------
    SearchError
        If the policy does not return one :class:`~tts_search.Step` a child.
    """
    families: dict[int, list[Branch]] = {}  # by parent, in order of its first child
    children = []
    for parent in parents:
        child = run.add_child(parent)
        families.setdefault(parent.id, []).append(child)
        children.append(child)
    params = params or partial(_params, run, last)
    requests = [_request(run, family, params) for family in families.values()]
    answers = yield requests
    for family, request, steps in zip(families.values(), requests, answers, strict=True):
        if len(steps) != len(family):
            raise run.error(
                f"policy: expected {len(family)} steps for branch {request.branch}, one per sample, got {len(steps)}"
            )
        for child, step in zip(family, steps, strict=True):
            run.grow(child, step, request.params.delimiter, last=last)
    return children


def foresee(run: Run, parent: Branch, number: int, name: int) -> Expand:
    """Return what `expand` will ask for in the next round as child `number` of a branch, under the number `name`."""
    child = Branch(name, parent, (*parent.path, number), run.round + 1)
    return _request(run, [child], partial(_params, run, child.round == run.config.max_steps))


def _params(run: Run, last: bool, parent: Branch) -> StepParams:
    return run.config.step_params(last=last, tokens_left=run.tokens_left(parent))


def _request(run: Run, family: list[Branch], params: Callable[[Branch], StepParams]) -> Expand:
    parent = family[0].parent
    assert parent is not None
    return Expand(
        run.problem,
        parent.id,
        tuple(child.id for child in family),
        parent.texts,
        tuple(run.seed_of(child) for child in family),
        params(parent),
    )


def score(
    run: Run, branches: Sequence[Branch], *, last: bool, ends: Callable[[Branch], bool] | None = None
) -> Moves[None]:
    """Have branches that have just grown scored; nothing happens without a verifier.

    One that grew by no step (an empty text ended it, or it is blank so far) has its parent's scores and is not read
    again.

    Parameters
    ----------
    run : Run
        The search.
    branches : sequence of Branch
        Those that have just grown.
    last : bool
        Whether no round follows: then nothing is looked ahead.
    ends : callable or None
        Whether a branch that was looked ahead to goes no further, besides those that the policy has ended.

    Raises
    ------
    SearchError
        If the verifier does not return one number for each step, or one of them is NaN.
    """
    if not run.scored:
        return
    fresh = yield from _to_score(run, branches, last, ends)
    answers = (yield list(fresh.values())) if fresh else ()
    _take_scores(run, fresh, answers)


def score_and_prune(
    run: Run, branches: Sequence[Branch], groups: Sequence[Sequence[Branch]], keep: Sequence[int], *, last: bool
) -> Moves[list[list[Branch]]]:
    """Have branches that have just grown scored, and find the best of each group, in one request.

    Parameters
    ----------
    run : Run
        The search.
    branches : sequence of Branch
        Those that have just grown, as `score` takes them.
    groups : sequence of sequence of Branch
        Who compete with each other; branches that were scored earlier may be among them.
    keep : sequence of int
        How many of each group survive.
    last : bool
        Whether no round follows.

    Returns
    -------
    list of list of Branch
        The survivors of each group, best first; ties go to the earlier in the group.

    Raises
    ------
    SearchError
        If the verifier does not return one number for each step, one of them is NaN, or its survivors are not `keep` of
        each group.
    """
    fresh = yield from _to_score(run, branches, last)
    if fresh:
        everyone = list({branch.id: branch for group in (branches, *groups) for branch in group}.values())
        place = {branch.id: index for index, branch in enumerate(everyone)}
        request = ScoreAndPrune(
            run.problem,
            tuple(fresh.get(branch, branch.score) for branch in everyone),
            tuple(tuple(place[branch.id] for branch in group) for group in groups),
            tuple(keep),
            run.config.aggregate,
        )
        (answer,) = yield [request]
        _take_scores(run, fresh, answer.scores)
        if answer.survivors is not None:
            return [[everyone[index] for index in best] for best in _checked_survivors(run, request, answer)]
    return [sorted(group, key=lambda branch: -branch.score)[:count] for group, count in zip(groups, keep, strict=True)]


def _to_score(
    run: Run, branches: Sequence[Branch], last: bool, ends: Callable[[Branch], bool] | None = None
) -> Moves[dict[Branch, Score]]:
    """What to ask about each branch that has grown; the others get their parents' scores."""
    ahead: dict[int, tuple[str, ...]] = {}
    if run.config.lookahead and not last:
        ahead = yield from _look_ahead(run, [branch for branch in branches if _is_new(branch)], ends)
    fresh = {}
    for branch in branches:
        assert branch.parent is not None
        if _is_new(branch):
            parent = branch.parent.scored_id
            fresh[branch] = Score(run.problem, branch.id, branch.steps, parent, ahead.get(branch.id, ()))
        else:  # what its parent was given for steps that it only looked ahead to does not count
            branch.scores = branch.parent.scores[: len(branch.steps)]
            branch.score = aggregate(branch.scores, run.config.aggregate)
    return fresh


def _take_scores(run: Run, fresh: dict[Branch, Score], answers: Sequence[Sequence[float] | Exception]) -> None:
    failed = [answer for answer in answers if isinstance(answer, Exception)]
    broken = [error for error in failed if isinstance(error, FloatingPointError)]  # no score of such a model counts
    if broken or (failed and len(failed) == len(fresh)):
        raise (broken or failed)[0]
    for (branch, request), scores in zip(fresh.items(), answers, strict=True):
        if isinstance(scores, Exception):
            branch.fail(f"not scored: {type(scores).__name__}: {scores}", run.round)
            continue
        branch.scores = _checked(run, request, scores)
        branch.score = aggregate(branch.scores, run.config.aggregate)
        branch.scored_id = branch.id


def _checked_survivors(run: Run, request: ScoreAndPrune, answer: Scored) -> Sequence[Sequence[int]]:
    survivors = answer.survivors or ()
    expected = [min(count, len(group)) for group, count in zip(request.groups, request.keep, strict=True)]
    if [len(best) for best in survivors] != expected or any(
        not Counter(best) <= Counter(group) for best, group in zip(survivors, request.groups, strict=True)
    ):
        raise run.error(
            f"verifier: expected {expected} survivors of the groups {request.groups}, got {survivors!r:.200}"
        )
    return survivors


def _is_new(branch: Branch) -> bool:
    return branch.parent is not None and len(branch.steps) > len(branch.parent.steps)


def _checked(run: Run, request: Score, scores: Sequence[float]) -> tuple[float, ...]:
    expected = len(request.steps) + len(request.lookahead)
    if len(scores) != expected:
        raise run.error(
            f"verifier: expected {expected} scores for branch {request.branch}, one per step, got {len(scores)}"
        )
    try:
        numbers = tuple(map(float, scores))
    except (TypeError, ValueError) as error:
        raise run.error(f"verifier: expected numbers for branch {request.branch}, got {scores!r:.200}") from error
    if any(map(math.isnan, numbers)):
        raise run.error(f"verifier: expected numbers for branch {request.branch}, got NaN among {scores!r:.200}")
    return numbers


def _look_ahead(
    run: Run, branches: Sequence[Branch], ends: Callable[[Branch], bool] | None
) -> Moves[dict[int, tuple[str, ...]]]:
    """Continue branches greedily by up to `lookahead` steps; return, by branch, the steps that this gave."""
    tips = {branch: branch for branch in branches if not branch.stopped}
    for _ in range(run.config.lookahead):
        requests = []
        children = {}
        for origin, tip in tips.items():
            tokens_left = run.tokens_left(tip)
            if tip.stopped or (tokens_left is not None and tokens_left <= 0):
                continue
            children[origin] = child = run.add_lookahead(tip)
            params = run.config.step_params(last=False, tokens_left=tokens_left)
            params = replace(params, temperature=0.0, top_p=1.0, top_k=0)  # greedy
            seeds = (run.seed_of(child),)
            requests.append(Expand(run.problem, tip.id, (child.id,), tip.texts, seeds, params))
        if not requests:
            break
        answers = yield requests
        for (origin, child), request, steps in zip(children.items(), requests, answers, strict=True):
            if len(steps) != 1:
                raise run.error(f"policy: expected 1 step for branch {request.branch}, got {len(steps)}")
            run.grow(child, steps[0], request.params.delimiter, last=False)
            child.stopped = child.stopped or not child.text or bool(ends and ends(child))  # empty: and would stay so
            tips[origin] = child
    return {origin.id: tip.steps[len(origin.steps) :] for origin, tip in tips.items()}


def release(run: Run, live: Iterable[Branch]) -> Moves[None]:
    """Release every branch but the live ones and those that the verifier will continue them from."""
    needed = {number for branch in live for number in (branch.id, branch.scored_id)}
    done = sorted(run.held - needed)
    run.held &= needed
    if done:
        yield [Release(run.problem, tuple(done))]

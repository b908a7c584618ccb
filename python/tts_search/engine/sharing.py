"""Branches of equal text are one branch for a verifier, which scores that text once."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import starmap, zip_longest
from typing import Any, Final

from tts_search.engine.drivers import lift, rests
from tts_search.search.protocol import (
    PruningVerifier,
    Score,
    ScoreAndPrune,
    Scored,
    Usage,
    Verifier,
    usage_of,
)
from tts_search.search.voting import aggregate

__all__ = ["SharedVerifier"]

_UNREAD: Final = LookupError("the verifier has not read this text")
_NOBODY: Final = -1  # stands for a survivor outside its group: the search refuses the answer


class SharedVerifier:
    """Lies between searches and a verifier, and never gives the verifier a text twice.

    Samples often repeat each other: siblings, and then the children of equal siblings. Branches with equal steps (and
    equal lookahead) share the verifier's data, even if their parents differ. The verifier knows them under the number
    of the first of them, until the last is released. Each branch has its scores, so a search decides as it would
    without sharing. Scores of equal texts are equal to the bit, and ties still go to the earlier candidate.

    A branch is scored once, as searches do.

    Parameters
    ----------
    verifier : Verifier
        Scores steps. A verifier with random scores (a server that samples its judgements) is asked once for each text.
    """

    def __init__(self, verifier: Verifier) -> None:
        self.verifier = lift(verifier)
        self._prunes = isinstance(verifier, PruningVerifier)
        self._problems: dict[int, _Problem] = {}
        self._asked: list[_Asked] = []
        self._on_the_way: dict[int, _Asked | _Reading] = {}  # by the identity of the verifier's request

    @property
    def is_idle(self) -> bool:
        """Whether a step would bring nothing now."""
        return rests(self.verifier, len(self._asked)) and not any(asked.is_answered for asked in self._asked)

    def begin(self, problem: int, text: str) -> None:
        """Announce a problem."""
        self.verifier.begin(problem, text)
        self._problems[problem] = _Problem()

    def submit(self, requests: Sequence[Score | ScoreAndPrune]) -> None:
        """Take requests in. A text that is already being scored for another request is not asked for again."""
        for request in requests:
            candidates = request.candidates if isinstance(request, ScoreAndPrune) else (request,)
            self._asked.append(_Asked(request, [self._entry(each) for each in candidates]))
        self._ask()

    def step(self) -> list[tuple[Score | ScoreAndPrune, Any]]:
        """Let the verifier take a step; return the requests that are now answered."""
        for request, answer in self.verifier.step():
            self._on_the_way.pop(id(request)).take(answer)
        answered = [asked for asked in self._asked if asked.is_answered]
        self._asked = [asked for asked in self._asked if not asked.is_answered]
        self._ask()
        return [(asked.request, asked.answer()) for asked in answered]

    def cancel(self, problem: int) -> None:
        """Forget the unanswered requests of a problem."""
        self.verifier.cancel(problem)
        self._asked = [asked for asked in self._asked if asked.request.problem != problem]
        on_the_way = self._on_the_way.items()
        self._on_the_way = {key: taker for key, taker in on_the_way if taker.request.problem != problem}
        self._problems[problem].forget_questions()

    def _ask(self) -> None:
        """Ask the verifier, all at once, for the texts that requests need and that it was not asked for."""
        questions: list[Score | ScoreAndPrune] = []
        for asked in self._asked:
            if asked.is_sent:
                continue
            asked.is_sent = True
            fresh, waits = asked.fresh, asked.waits
            for reading in fresh:
                reading.is_sent = True
            if fresh and not waits and self._prunes and isinstance(asked.request, ScoreAndPrune):
                questions.append(self._question(asked.folded(asked.request), asked))
            else:
                questions += [self._question(reading.request, reading) for reading in fresh]
        if questions:
            self.verifier.submit(questions)

    def _question(self, request: Score | ScoreAndPrune, taker: _Asked | _Reading) -> Score | ScoreAndPrune:
        """A request whose answer somebody takes."""
        taker.sent = request
        self._on_the_way[id(request)] = taker
        return request

    def release(self, problem: int, branches: Iterable[int]) -> None:
        """Forget branches that were scored. The verifier forgets a text with its last branch."""
        if done := list(self._problems[problem].drop(branches)):
            self.verifier.release(problem, done)

    def usage(self, problem: int) -> Usage:
        """Return the cost of a problem so far."""
        return usage_of(self.verifier, problem)

    def end(self, problem: int) -> Usage:
        """Forget what is left of a problem, and return its cost."""
        del self._problems[problem]
        return self.verifier.end(problem)

    def _entry(self, candidate: Score | float) -> _Reading | float:
        return self._problems[candidate.problem].reading(candidate) if isinstance(candidate, Score) else candidate


@dataclass(slots=True, eq=False)
class _Reading:
    """A text that is scored once for all branches that have it.

    Attributes
    ----------
    request : Score
        The request to the verifier.
    answer : sequence of float or Exception
        The verifier's answer.
    branches : set of int
        The branches with this text that are not released.
    is_sent : bool
        Whether the verifier has been asked for it.
    sent : Score or ScoreAndPrune or None
        The verifier's request. It is kept because requests are known by their identity.
    """

    request: Score
    answer: Sequence[float] | Exception = _UNREAD
    branches: set[int] = field(default_factory=set)
    is_sent: bool = False
    sent: Score | ScoreAndPrune | None = None

    def take(self, answer: Sequence[float] | Exception) -> None:
        """Store the verifier's answer."""
        self.answer = answer

    def candidate(self, how: str) -> Score | float:
        """The candidate for this text in a round."""
        if self.answer is _UNREAD:
            return self.request
        return -math.inf if isinstance(self.answer, Exception) else aggregate(self.answer, how)


@dataclass(slots=True)
class _Problem:
    """The texts that the verifier keeps."""

    by_branch: dict[int, _Reading] = field(default_factory=dict)
    by_text: dict[Hashable, _Reading] = field(default_factory=dict)

    def reading(self, request: Score) -> _Reading:
        """The reading for a branch's text, from now on."""
        parent = self.by_branch.get(request.parent)
        asked = request if parent is None else replace(request, parent=parent.request.branch)
        reading = self.by_text.setdefault(_text(request), _Reading(asked))
        reading.branches.add(request.branch)
        self.by_branch[request.branch] = reading
        return reading

    def forget_questions(self) -> None:
        """Drop questions without an answer, as if they had not been asked."""
        for reading in self.by_text.values():
            reading.is_sent = reading.answer is not _UNREAD

    def drop(self, branches: Iterable[int]) -> Iterator[int]:
        """Remove branches; yield the verifier's numbers of texts that no branch has any more."""
        for branch in branches:
            reading = self.by_branch.pop(branch, None)
            if reading is None:
                continue
            reading.branches.remove(branch)
            if not reading.branches:
                del self.by_text[_text(reading.request)]
                yield reading.request.branch


@dataclass(slots=True, eq=False)
class _Asked:
    """A request in progress. In a round, equal candidates become one, which competes with copies of itself.

    Attributes
    ----------
    request : Score or ScoreAndPrune
        The request of the search.
    entries : list of _Reading or float
        Its candidates: their readings, or their scores.
    is_sent : bool
        Whether the verifier was asked for all texts that needed it.
    sent : Score or ScoreAndPrune or None
        The single request to the verifier for all of it, if there was one.
    """

    request: Score | ScoreAndPrune
    entries: list[_Reading | float]
    is_sent: bool = False
    sent: Score | ScoreAndPrune | None = None
    _taken: Scored | Exception | None = None
    _fresh: list[_Reading] = field(default_factory=list)
    _distinct: list[_Reading | float] = field(init=False)
    _places: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._distinct = list(dict.fromkeys(self.entries))
        place_of = {entry: place for place, entry in enumerate(self._distinct)}
        self._places = [place_of[entry] for entry in self.entries]

    @property
    def readings(self) -> list[_Reading]:
        """The different texts among its candidates."""
        return [entry for entry in self.entries if isinstance(entry, _Reading)]

    @property
    def fresh(self) -> list[_Reading]:
        """The different texts that the verifier has not been asked for."""
        return [each for each in self._distinct if isinstance(each, _Reading) and not each.is_sent]

    @property
    def waits(self) -> bool:
        """Whether it waits for a text that another request has asked for."""
        return any(reading.is_sent and reading.answer is _UNREAD for reading in self.readings)

    @property
    def is_answered(self) -> bool:
        """Whether all answers that it needs are there."""
        if self.sent is not None:
            return self._taken is not None
        return self.is_sent and not self.waits

    def folded(self, request: ScoreAndPrune) -> ScoreAndPrune:
        """The request to the verifier: each candidate once. Groups contain it as often as it competes."""
        self._fresh = [each for each in self._distinct if isinstance(each, _Reading) and each.answer is _UNREAD]
        how = request.how
        candidates = (entry.candidate(how) if isinstance(entry, _Reading) else entry for entry in self._distinct)
        groups = (tuple(self._places[number] for number in group) for group in request.groups)
        return replace(request, candidates=tuple(candidates), groups=tuple(groups))

    def take(self, answer: Scored | Exception) -> None:
        """Store the verifier's answer to the single request."""
        if not isinstance(answer, Exception) and len(answer.scores) != len(self._fresh):
            answer = ValueError(f"expected scores of {len(self._fresh)} candidates, got {len(answer.scores)}")
        each = [answer] * len(self._fresh) if isinstance(answer, Exception) else answer.scores
        for reading, scores in zip(self._fresh, each, strict=True):
            reading.answer = scores
        self._taken = answer

    def answer(self) -> Any:
        """The answer to the search."""
        answers = [reading.answer for reading in self.readings]
        if not isinstance(self.request, ScoreAndPrune):
            return answers[0]
        if self._taken is None:
            return Scored(answers)
        if isinstance(self._taken, Exception):
            return self._taken
        survivors = self._taken.survivors
        if survivors is not None:
            survivors = list(starmap(self._unfolded, zip_longest(survivors, self.request.groups, fillvalue=())))
        return Scored(answers, survivors)

    def _unfolded(self, best: Sequence[int], group: Sequence[int]) -> list[int]:
        """The survivors of a group by the search's numbers: among equal candidates, the first ones of the group."""
        turns: dict[int, list[int]] = {}
        for number in reversed(group):
            turns.setdefault(self._places[number], []).append(number)
        return [turns[place].pop() if turns.get(place) else _NOBODY for place in best]


def _text(request: Score) -> Hashable:
    """The key that is equal for requests with the same answer."""
    return request.steps, request.lookahead

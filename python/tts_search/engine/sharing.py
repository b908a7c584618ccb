"""Branches of equal text are one branch to a verifier, which scores that text once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, starmap, zip_longest
from typing import Final, TypeVar

from tts_search.search.protocol import PruningVerifier, Score, ScoreAndPrune, Scored, Usage, Verifier
from tts_search.search.voting import aggregate

__all__ = ["SharedVerifier"]

Asked = TypeVar("Asked", Score, ScoreAndPrune)
Answer = TypeVar("Answer")

_UNREAD: Final = LookupError("the verifier has not read this text")
_NOBODY: Final = -1  # a survivor that is not of its group: the search refuses the answer


class SharedVerifier:
    """Stands between searches and a verifier, to which it shows no text twice.

    Samples repeat each other: siblings, and then the children of siblings that did. Branches of equal steps (and equal
    lookahead), whoever their parents are, share what the verifier keeps, under the number of the first of them, until
    the last of them is released. Each has its scores, so a search decides as it would without sharing; scores of equal
    texts are equal to the bit, and ties go to the earlier candidate as ever.

    A branch is scored once, as searches do.

    Parameters
    ----------
    verifier : Verifier
        Scores steps. One that draws at random (a server that samples its judgements) does so once for a text.
    """

    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier
        self._problems: dict[int, _Problem] = {}

    def begin(self, problem: int, text: str) -> None:
        """Announce a problem."""
        self.verifier.begin(problem, text)
        self._problems[problem] = _Problem()

    def score(self, requests: Sequence[Score]) -> list[Sequence[float] | Exception]:
        """Answer requests of any number of problems by one call of the verifier, or none if it knows all texts.

        Raises
        ------
        ValueError
            If the verifier does not answer each of its requests.
        """
        readings = [self._reading(request) for request in requests]
        fresh = list(dict.fromkeys(reading for reading in readings if reading.answer is _UNREAD))
        for reading, answer in zip(fresh, _ask(self.verifier.score, [each.request for each in fresh]), strict=True):
            reading.answer = answer
        return [reading.answer for reading in readings]

    def score_and_prune(self, requests: Sequence[ScoreAndPrune]) -> list[Scored | Exception]:
        """Answer requests of any number of problems likewise; of a verifier that cannot prune, with the scores alone.

        Raises
        ------
        ValueError
            If the verifier does not answer each of its requests.
        """
        if not isinstance(self.verifier, PruningVerifier):
            scores = iter(self.score([each for request in requests for each in _scores(request)]))
            return [Scored.of(list(islice(scores, len(_scores(request))))) for request in requests]
        rounds = [_Round(request, [self._entry(each) for each in request.candidates]) for request in requests]
        answers = iter(_ask(self.verifier.score_and_prune, [each.folded() for each in rounds if each.fresh]))
        return [each.answer(next(answers) if each.fresh else Scored([])) for each in rounds]

    def release(self, problem: int, branches: Iterable[int]) -> None:
        """Forget branches, as many of them as were scored; the verifier forgets a text with the last branch of it."""
        if done := list(self._problems[problem].drop(branches)):
            self.verifier.release(problem, done)

    def end(self, problem: int) -> Usage:
        """Forget what is left of a problem and say what it cost."""
        del self._problems[problem]
        return self.verifier.end(problem)

    def _reading(self, request: Score) -> _Reading:
        return self._problems[request.problem].reading(request)

    def _entry(self, candidate: Score | float) -> _Reading | float:
        return self._reading(candidate) if isinstance(candidate, Score) else candidate


@dataclass(slots=True, eq=False)
class _Reading:
    """A text on behalf of all branches that have it.

    Attributes
    ----------
    request : Score
        As the verifier is asked.
    answer : sequence of float or Exception
        What it said.
    branches : set of int
        Who has the text and is not released.
    """

    request: Score
    answer: Sequence[float] | Exception = _UNREAD
    branches: set[int] = field(default_factory=set)

    def candidate(self, how: str) -> Score | float:
        """What stands for it in a round."""
        if self.answer is _UNREAD:
            return self.request
        assert not isinstance(self.answer, Exception), "a search ends when the verifier fails it"
        return aggregate(self.answer, how)


@dataclass(slots=True)
class _Problem:
    """The texts that the verifier keeps."""

    by_branch: dict[int, _Reading] = field(default_factory=dict)
    by_text: dict[Hashable, _Reading] = field(default_factory=dict)

    def reading(self, request: Score) -> _Reading:
        """What a branch's text is read as, from now on."""
        parent = self.by_branch.get(request.parent)
        asked = request if parent is None else replace(request, parent=parent.request.branch)
        reading = self.by_text.setdefault(_text(request), _Reading(asked))
        reading.branches.add(request.branch)
        self.by_branch[request.branch] = reading
        return reading

    def drop(self, branches: Iterable[int]) -> Iterator[int]:
        """Take branches out; yield what the verifier calls the texts that nobody has any more."""
        for branch in branches:
            reading = self.by_branch.pop(branch, None)
            if reading is None:
                continue
            reading.branches.remove(branch)
            if not reading.branches:
                del self.by_text[_text(reading.request)]
                yield reading.request.branch


class _Round:
    """A round in which equal candidates are one, which competes with copies of itself.

    Parameters
    ----------
    request : ScoreAndPrune
        What the search asks for.
    entries : list of _Reading or float
        Its candidates: what is read for them, or their scores.

    Attributes
    ----------
    fresh : list of _Reading
        What the verifier is to read, in order.
    """

    def __init__(self, request: ScoreAndPrune, entries: list[_Reading | float]) -> None:
        self.request = request
        self._readings = [entry for entry in entries if isinstance(entry, _Reading)]
        self.fresh = list(dict.fromkeys(each for each in self._readings if each.answer is _UNREAD))
        self._distinct = list(dict.fromkeys(entries))
        place_of = {entry: place for place, entry in enumerate(self._distinct)}
        self._places = [place_of[entry] for entry in entries]

    def folded(self) -> ScoreAndPrune:
        """What the verifier is asked for: each candidate once, and groups that name it as often as it competes."""
        how = self.request.how
        candidates = (entry.candidate(how) if isinstance(entry, _Reading) else entry for entry in self._distinct)
        groups = (tuple(self._places[number] for number in group) for group in self.request.groups)
        return replace(self.request, candidates=tuple(candidates), groups=tuple(groups))

    def answer(self, folded: Scored | Exception) -> Scored | Exception:
        """The answer to the search, from that of the verifier."""
        if isinstance(folded, Exception):
            return folded
        if len(folded.scores) != len(self.fresh):
            return ValueError(f"expected scores of {len(self.fresh)} candidates, got {len(folded.scores)}")
        for reading, scores in zip(self.fresh, folded.scores, strict=True):
            reading.answer = scores
        survivors = folded.survivors
        if survivors is not None:
            survivors = list(starmap(self._unfolded, zip_longest(survivors, self.request.groups, fillvalue=())))
        return Scored.of([reading.answer for reading in self._readings], survivors)

    def _unfolded(self, best: Sequence[int], group: Sequence[int]) -> list[int]:
        """The survivors of a group by their own numbers: of equal ones, those that it names first."""
        turns: dict[int, list[int]] = {}
        for number in reversed(group):
            turns.setdefault(self._places[number], []).append(number)
        return [turns[place].pop() if turns.get(place) else _NOBODY for place in best]


def _text(request: Score) -> Hashable:
    """What requests that get the same answer have in common."""
    return request.steps, request.lookahead


def _scores(request: ScoreAndPrune) -> list[Score]:
    return [candidate for candidate in request.candidates if isinstance(candidate, Score)]


def _ask(call: Callable[[Sequence[Asked]], Sequence[Answer]], requests: Sequence[Asked]) -> Sequence[Answer]:
    """The answers to requests, if there are any."""
    answers = call(requests) if requests else []
    if len(answers) != len(requests):
        raise ValueError(f"expected {len(requests)} answers, one a request, got {len(answers)}")
    return answers

"""A chat model as a judge of whole solutions: whether one solution is right, or which of several is."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Generator, Iterator, Mapping, Sequence
from hashlib import blake2b
from string import ascii_uppercase
from typing import Any, Final, Literal

from tts_search.search.checks import unused
from tts_search.search.protocol import Score, Usage, usage_of
from tts_search.verifiers.formats import FORMATS, VerifierFormat
from tts_search.verifiers.labels import Labels, Question, RemoteLabels

__all__ = ["CHOICE", "OutcomeJudge", "tournament"]

CHOICE: Final = VerifierFormat(
    name="choice",
    head="label_pair",
    chat=(
        (
            "user",
            "Problem:\n{problem}\n\n{steps}\n\nWhich of these solutions comes to the right answer? If several do, or "
            "none does, name the best one. Answer with its letter alone.",
        ),
    ),
    score_at="closing",
)
_HEADING: Final = "Solution {}:\n"
_AROUND: Final = 8  # tokens of a heading and a blank line

Comparisons = Generator[list[list[int]], Sequence[Sequence[float] | Exception], list[float | Exception]]


class OutcomeJudge:
    """Scores whole solutions by the answers of a chat model. Each step gets the score of its solution.

    With ``ask="outcome"`` the model is asked for each solution whether its final answer is right. The score is the
    probability of "Yes" among "Yes" and "No".

    With ``ask="choice"`` it sees the solutions of a problem together, as A, B, C and so on, and is asked which is
    right. The score of a solution is the probability of its letter among the letters. (GenSelect, arXiv 2507.17797,
    lets a model reason about the solutions and name one.) Models prefer some letters and places. So each group is shown
    in all its rotations, where each solution stands once at every place, and the score is the mean over them (arXiv
    2309.03882). If there are more solutions than letters, or than fit in the context, there is a knock-out tournament
    of groups (arXiv 2411.19477): the best of each group goes on to the next round. The score is then the number of
    rounds won plus the share in the last round, divided by the number of rounds. Equal solutions are shown once. A hash
    of their texts decides in which order they stand and who meets whom. So scores do not depend on the order of the
    candidates, and equal sets have equal scores.

    Solutions that are scored in one call compete. Use this judge with best-of-N, which scores all completions at once.
    In a search by rounds, scores of different rounds cannot be compared.

    Parameters
    ----------
    labels : Labels
        The model: :class:`~tts_search.verifiers.labels.LocalLabels` or
        :class:`~tts_search.verifiers.server.ServerLabels`.
    ask : {"choice", "outcome"}
        The question to the model.
    most : int
        The largest number of solutions in a group, 2 to 26.
    rotate : bool
        False shows each group in only one order. This divides the number of forwards by the size of a group, but the
        model's preferences for letters stay in the scores.

    Raises
    ------
    ValueError
        If an option is not one of those above.

    Notes
    -----
    A solution that takes more than half of the context is not compared: its answer is an exception. A solution can
    contain any text, even "Solution B:" or "answer A". A space breaks up special tokens (except with `ServerLabels`,
    which does not know them); words stay as they are.

    Examples
    --------
    >>> from tts_search.verifiers.labels import LocalLabels  # doctest: +SKIP
    >>> judge = OutcomeJudge(LocalLabels("HuggingFaceTB/SmolLM2-135M-Instruct"))  # doctest: +SKIP
    """

    def __init__(
        self, labels: Labels, ask: Literal["choice", "outcome"] = "choice", *, most: int = 8, rotate: bool = True
    ) -> None:
        if ask not in ("choice", "outcome"):
            raise ValueError(f"ask: expected choice or outcome, got {ask!r}")
        if isinstance(most, bool) or not isinstance(most, int) or not 2 <= most <= len(ascii_uppercase):
            raise ValueError(f"most: expected an int from 2 to {len(ascii_uppercase)}, got {most!r}")
        self.labels = labels
        self.ask = ask
        self.most = most
        self.rotate = rotate
        self._texts: dict[int, str] = {}

    @property
    def is_concurrent(self) -> bool:
        """Whether problems are judged at the same time, each by a call of its own: if the model is on a server."""
        return isinstance(self.labels, RemoteLabels)

    async def answer(self, requests: Sequence[Score]) -> list[list[float] | Exception]:
        """Judge the candidates of a problem in a thread; if it is cancelled, its requests are broken off."""
        assert isinstance(self.labels, RemoteLabels)
        judge = copy.copy(self)
        judge.labels = line = self.labels.line()
        try:
            return await asyncio.to_thread(judge.score, requests)
        finally:
            line.hang_up()

    async def hang_up(self) -> None:
        """Do nothing: each call has connections of its own."""

    def begin(self, problem: int, text: str) -> None:
        """Announce a problem.

        Raises
        ------
        ValueError
            If the number belongs to a problem in flight.
        """
        unused(problem, self._texts, self)
        self.labels.begin(problem)
        self._texts[problem] = text

    def release(self, problem: int, branches: Sequence[int]) -> None:
        """Do nothing: a judge has no branches."""

    def usage(self, problem: int) -> Usage:
        """Return the cost of the problem so far."""
        return usage_of(self.labels, problem)

    def end(self, problem: int) -> Usage:
        """Forget the problem, and return its cost."""
        del self._texts[problem]
        return self.labels.end(problem)

    def score(self, requests: Sequence[Score]) -> list[list[float] | Exception]:
        """Answer requests of any number of problems. The requests of one problem are its candidates."""
        solutions = [_solution(request) for request in requests]
        asked = dict.fromkeys(
            (request.problem, text) for request, text in zip(requests, solutions, strict=True) if text
        )
        found: dict[tuple[int, str], float | Exception] = self._found(list(asked))
        answers: list[list[float] | Exception] = []
        for request, text in zip(requests, solutions, strict=True):
            value = found[request.problem, text] if text else ValueError("expected a solution, got an empty one")
            count = len(request.steps) + len(request.lookahead)
            answers.append(value if isinstance(value, Exception) else [value] * count)
        return answers

    def _found(self, asked: list[tuple[int, str]]) -> dict[tuple[int, str], float | Exception]:
        if self.ask == "outcome":
            questions = [Question(problem, self._texts[problem], text) for problem, text in asked]
            shares = self.labels.ask(FORMATS["outcome"], ("Yes", "No"), questions)
            return {
                one: share if isinstance(share, Exception) else share[0]
                for one, share in zip(asked, shares, strict=True)
            }
        texts = {
            problem: sorted((text for other, text in asked if other == problem), key=_place)
            for problem in dict.fromkeys(problem for problem, _ in asked)
        }
        contests = {problem: self._contest(problem, own) for problem, own in texts.items()}
        return {
            (problem, text): score
            for problem, scores in self._held(texts, contests).items()
            for text, score in zip(texts[problem], scores, strict=True)
        }

    def _held(
        self, texts: Mapping[int, Sequence[str]], contests: Mapping[int, Comparisons]
    ) -> dict[int, list[float | Exception]]:
        """Hold the tournaments of several problems together, round by round; return the scores of each."""
        over: dict[int, list[float | Exception]] = {}
        said: dict[int, Any] = dict.fromkeys(contests)
        while said:
            groups: dict[int, list[list[int]]] = {}
            for problem, shares in said.items():
                try:
                    groups[problem] = contests[problem].send(shares)
                except StopIteration as end:
                    over[problem] = end.value
            shown = [(p, [texts[p][member] for member in group]) for p, own in groups.items() for group in own]
            compared = self._compared(shown)
            said = {problem: [next(compared) for _ in own] for problem, own in groups.items()}
        return over

    def _contest(self, problem: int, texts: Sequence[str]) -> Comparisons:
        """The tournament of a problem's solutions."""
        about = [Question(problem, self._texts[problem], text) for text in ("x", *texts)]
        empty, *lengths = self.labels.lengths(CHOICE, about)
        return tournament([length - empty + _AROUND for length in lengths], self.most, self.labels.max_length - empty)

    def _compared(self, groups: Sequence[tuple[int, Sequence[str]]]) -> Iterator[list[float] | Exception]:
        """For each group (with its problem's number): the mean share of each member."""
        by_size: dict[int, list[int]] = {}
        for number, (_, texts) in enumerate(groups):
            by_size.setdefault(len(texts), []).append(number)
        found: dict[int, list[float] | Exception] = {}
        for size, numbers in by_size.items():
            turns = range(size if self.rotate else 1)
            questions = [
                Question(problem, self._texts[problem], _listing([*texts[turn:], *texts[:turn]]))
                for problem, texts in (groups[number] for number in numbers)
                for turn in turns
            ]
            shares = iter(self.labels.ask(CHOICE, tuple(ascii_uppercase[:size]), questions))
            for number in numbers:
                found[number] = _mean([next(shares) for _ in turns])
        return (found[number] for number in range(len(groups)))


def tournament(costs: Sequence[int], most: int, room: int) -> Comparisons:
    """Compare candidates in groups until one is left. Yields the groups of a round; is sent the shares of each group.

    Parameters
    ----------
    costs : sequence of int
        The room that each candidate takes in a group.
    most, room : int
        The largest number of members of a group, and the room that they may take together.

    Returns
    -------
    list of (float or Exception)
        Scores between 0 and 1: (rounds won + the share in the last round) / rounds. More rounds won give a higher
        score.
    """
    scores: list[float | Exception] = [
        0.0
        if 2 * cost <= room
        else ValueError(f"a solution of {cost} tokens takes more than half of the room of {room}")
        for cost in costs
    ]
    left = [number for number, score in enumerate(scores) if not isinstance(score, Exception)]
    rounds = 0
    while left and (len(left) > 1 or not rounds):
        groups = list(_groups(left, costs, most, room))
        contested = [group for group in groups if len(group) > 1]  # a single candidate goes on to the next round
        shares = iter((yield contested)) if contested else iter(())
        left = []
        for group in groups:
            share = next(shares) if len(group) > 1 else [1.0]
            if isinstance(share, Exception):
                scores = [share if number in group else score for number, score in enumerate(scores)]
                continue
            for number, value in zip(group, share, strict=True):
                scores[number] = rounds + value
            left.append(group[max(range(len(group)), key=share.__getitem__)])
        rounds += 1
    return [score if isinstance(score, Exception) else score / max(rounds, 1) for score in scores]


def _groups(left: Sequence[int], costs: Sequence[int], most: int, room: int) -> Iterator[list[int]]:
    """Cut candidates into as few groups of similar size as `most` and `room` allow."""
    count = -(-len(left) // most)
    group: list[int] = []
    size = -(-len(left) // count)
    taken = 0
    for number in left:
        if group and (len(group) == size or taken + costs[number] > room):
            yield group
            group, taken = [], 0
        group.append(number)
        taken += costs[number]
    yield group


def _solution(request: Score) -> str:
    """The text of all steps, joined as formats join steps."""
    steps = (step.strip() for step in (*request.steps, *request.lookahead))
    return "\n\n".join(step for step in steps if step)


def _listing(texts: Sequence[str]) -> str:
    return "\n\n".join(_HEADING.format(letter) + text for letter, text in zip(ascii_uppercase, texts, strict=False))


def _place(text: str) -> bytes:
    """The key that orders solutions. It says nothing about their quality."""
    return blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


def _mean(turns: Sequence[Any]) -> list[float] | Exception:
    """The mean share of each member of a group; in turn r member m stood at place m - r."""
    failed = [turn for turn in turns if isinstance(turn, Exception)]
    if failed:
        return failed[0]
    size = len(turns[0])
    return [
        sum(turn[(member - number) % size] for number, turn in enumerate(turns)) / len(turns) for member in range(size)
    ]

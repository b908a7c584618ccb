"""Adds the steps of a request to the tree of a verifier: their tokens, and the places where they are scored."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from tts_search.models.branches import TokenBranch
from tts_search.models.known import KnownBranches
from tts_search.models.reading import Place
from tts_search.models.streams import Stream
from tts_search.search.protocol import Score
from tts_search.verifiers.formats import STEP, VerifierFormat
from tts_search.verifiers.jobs import Job, Stages, branch_at
from tts_search.verifiers.reader import Reader, Tail

__all__ = ["KnownTexts", "ScoreJob", "ScoredText", "Writer", "known_texts"]


@dataclass(slots=True)
class ScoredText:
    """The end of the text of some steps, in the tree and as characters, and the scores of the steps."""

    branch: TokenBranch
    tail: Tail
    scores: list[float]


KnownTexts = KnownBranches[tuple[str, ...], ScoredText]


def known_texts(root: TokenBranch, tail: Tail) -> KnownTexts:
    """Return the texts of a problem: at the beginning only the prompt."""
    return KnownBranches((), ScoredText(root, tail, []), lambda start, steps: steps[: len(start)] == start)


@dataclass(slots=True, eq=False, kw_only=True)
class ScoreJob(Job):
    """One request in progress.

    Attributes
    ----------
    base, text : ScoredText
        The text that it extends, and the text that stays in the tree for the request's branch.
    tail : Tail
        The end of the text so far, as it is encoded.
    keys : dict
        For each place, the key under which its score is remembered, if it is remembered.
    stages, waiting : iterator, set of Stream
        The stages that it goes through, and the streams that it waits for now.
    """

    request: Score
    base: ScoredText
    text: ScoredText
    tail: Tail = field(init=False)
    keys: dict[Place, bytes] = field(init=False, default_factory=dict)
    stages: Stages | None = field(init=False, default=None)
    waiting: set[Stream] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.tail = self.base.tail


class Writer:
    """Writes the steps of requests into a verifier's tree, in its format.

    Parameters
    ----------
    reader : Reader
        Encodes each step.
    format : VerifierFormat
        Says where a step is scored.
    max_length : int
        The largest number of tokens in the model's context.
    """

    def __init__(self, reader: Reader, format: VerifierFormat, max_length: int) -> None:  # noqa: A002
        self._reader = reader
        self._format = format
        self._max_length = max_length

    def write(self, request: Score, texts: KnownTexts) -> ScoreJob:
        """Write the steps of a request that were not scored before, and return its job."""
        steps = (*request.steps, *request.lookahead)
        known, base = texts.longest(request.branch, request.steps)
        job = ScoreJob(request=request, base=base, text=replace(base))
        try:
            for number in range(len(known), len(steps)):
                self._add(job, steps[number], number)
                if number + 1 == len(request.steps):
                    job.text = ScoredText(job.chain[-1], job.tail, [])
            if self._format.outcome and job.chain:
                self._ask(job, len(steps) - 1)
                job.places *= len(steps) - len(known)
        except ValueError as error:  # an empty step
            job.error = error
        longest = max((branch.length for branch in job.asked), default=0)
        if longest > self._max_length:
            job.error = ValueError(
                f"the verifier's text of {longest} tokens is longer than its context of {self._max_length} tokens"
            )
        return job

    def _add(self, job: ScoreJob, step: str, number: int) -> None:
        """Add a step to a job's text, and note the position where it is scored.

        The tokens go to the branch that the job is building. They get a new branch if tokens of that branch would have
        to be removed, or if the step is the first that does not belong to the request's branch.
        """
        asks_ahead = self._format.judge is not None and STEP in self._format.judge.question
        if asks_ahead:  # the step is judged before it is added to the others
            self._ask(job, number, step)
        start, tokens, job.tail = self._reader.step(job.tail, step, number + 1)
        last = job.chain[-1] if job.chain else job.base.branch
        if job.chain and start == last.length and number != len(job.request.steps):
            last.tokens += tokens
        else:
            last = branch_at(last, start, tokens)
            job.chain.append(last)
        if self._format.score_at != "closing":
            last.marks.append(last.length - 1)
            job.places.append((last, last.length - 1))
        elif not asks_ahead and not self._format.outcome:
            self._ask(job, number)

    def _ask(self, job: ScoreJob, number: int, step: str = "") -> None:
        """Add the question after the steps so far, about the last of them, or about ``step``."""
        last = job.chain[-1] if job.chain else job.base.branch
        start, tokens, tail = self._reader.closing(job.tail, step, number + 1)
        question = branch_at(last, start, tokens)
        job.questions.append(question)
        job.tails[question] = (tail, number + 1)
        job.places.append((question, question.length - 1))

"""Generative verifiers: an analysis of the text so far is sampled, then the verdict after it is read.

All analyses of a batch decode together. Each is on a branch that is forked from the question after its step, so the
problem and the steps are read once, however many analyses there are. The verdict is not generated: it is the softmax
over two labels at the last token of the decision's text.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from typing import Final

import tts_kernels as tk
from tts_search.models.branches import TokenBranch
from tts_search.models.endings import Endings
from tts_search.models.generation import DrawOptions, SampledStream, SampledStreams
from tts_search.models.reading import ReadStream
from tts_search.models.streams import Lane, Stream
from tts_search.verifiers.formats import Judge
from tts_search.verifiers.jobs import HeadScorer, Job, Stages, branch_at
from tts_search.verifiers.reader import Reader, Tail

__all__ = ["JudgeScorer"]

_CONTEXT: Final = 8  # tokens before an analysis, decoded with it for context
_ROOM: Final = 8  # tokens of context, for how a tokenizer may join texts


class JudgeScorer(HeadScorer):
    """Scores questions by sampled analyses.

    Parameters
    ----------
    lane : Lane
        The model, with its LM head.
    head : ScoreHead
        A label pair.
    Encodes in the format of the head.
        Of the format.
    How the model is asked.
        How it goes.
    eos : frozenset of int
        Tokens that end an analysis.
    """

    def __init__(self, lane: Lane, head: tk.ScoreHead, reader: Reader, judge: Judge, eos: frozenset[int]) -> None:
        super().__init__(lane, head)
        self.reader = reader
        self.judge = judge
        self.eos = eos
        self.generation = SampledStreams(lane)
        self._sampling = DrawOptions(judge.temperature, judge.top_p, judge.top_k)
        self._ending = cache(lambda stops: Endings(stops, eos, reader.text_of, reader.encode("a")))
        self._decision_tokens = len(reader.encode(judge.decision)) + _ROOM
        self._verdicts: dict[Job, dict[TokenBranch, list[ReadStream]]] = {}  # by question

    def stages(self, job: Job) -> Stages:
        """The analyses behind all questions of a job, then their verdicts."""
        asked = {question: self._analyses(question, job) for question in job.asked}
        used = [*asked, *(analysis.branch for analyses in asked.values() for analysis in analyses)]
        try:
            if job.error is not None:
                return
            for question, analyses in asked.items():
                self.generation.submit(question, analyses)
            yield [analysis for analyses in asked.values() for analysis in analyses]
            verdicts = {
                question: [self._verdict(question, analysis) for analysis in analyses]
                for question, analyses in asked.items()
            }
            used += [verdict for own in verdicts.values() for verdict in own]
            reads = {question: [self.reading.submit(each) for each in own] for question, own in verdicts.items()}
            job.reads = [read for own in reads.values() for read in own]
            yield list(job.reads)
            self._verdicts[job] = reads
        finally:
            self.lane.pool.release(used)

    def step(self) -> Sequence[Stream]:
        """Advance the submitted streams; return those that ended."""
        return [*self.generation.step(), *self.reading.step()]

    def cancel(self, gone: Collection[Stream]) -> None:
        """Drop streams that are no longer needed."""
        super().cancel(gone)
        self.generation.cancel(gone)

    def score(self, jobs: Iterable[Job]) -> None:
        """Fill in the scores of jobs whose stages are complete: the mean of the verdicts on each question."""
        jobs = list(jobs)
        super().score(jobs)
        for job in jobs:
            for question, reads in self._verdicts.pop(job, {}).items():
                values = [job.found[read.places[-1]] for read in reads]
                job.found[question, question.length - 1] = sum(values) / len(values)

    def _analyses(self, question: TokenBranch, job: Job) -> list[_Analysis]:
        """The analyses that will be forked from a question."""
        room = self.lane.decoder.shape.max_length - question.length - self._decision_tokens
        if room < 1:
            job.error = ValueError(
                f"the verifier's text of {question.length} tokens leaves no room for an analysis in its context of "
                f"{self.lane.decoder.shape.max_length} tokens"
            )
            return []
        path = question.path()
        tail, number = job.tails[question]
        stops = tuple(stop.replace("{next}", str(number + 1)) for stop in self.judge.stop)
        limit = min(room, self.judge.max_tokens)
        return [
            _Analysis(
                TokenBranch(question.meter, question, question.length, []),
                _seed(path, sample),
                limit,
                self._sampling,
                self._ending(stops),
                self,
                tail,
                stops,
            )
            for sample in range(self.judge.samples)
        ]

    def _verdict(self, question: TokenBranch, analysis: _Analysis) -> TokenBranch:
        """The branch at whose last token the verdict on an analysis is read."""
        own, tail = analysis.branch.tokens, analysis.tail
        context = tail.tokens[-_CONTEXT:]
        before, text = self.reader.text_of(context), self.reader.text_of([*context, *own])
        text = text[len(before) :] if text.startswith(before) else self.reader.text_of(own)
        for stop in analysis.stops:
            text = text.partition(stop)[0]
        whole = Tail(tail.text, tail.token, [*tail.tokens, *own])
        start, tokens, _ = self.reader.continued(whole, text + self.judge.decision)
        return branch_at(analysis.branch if own else question, start, tokens)


@dataclass(slots=True, eq=False)
class _Analysis(SampledStream):
    """An analysis in progress, forked from a question whose text ends in ``tail``."""

    scorer: JudgeScorer = field(repr=False)
    tail: Tail
    stops: tuple[str, ...]

    def ends(self) -> bool:
        """Whether it ends with its newest token."""
        own = self.branch.tokens
        if own[-1] in self.scorer.eos:
            own.pop()
            return True
        longest = max(map(len, self.stops), default=0)
        end = self.scorer.reader.text_of(own[-longest - _CONTEXT :]) if longest else ""
        return len(own) == self.limit or any(stop in end for stop in self.stops)


def _seed(path: Sequence[int], sample: int) -> int:
    """The random stream of a sample. It depends only on the judged text and the sample's number."""
    digest = blake2b(",".join(map(str, (*path, sample))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1

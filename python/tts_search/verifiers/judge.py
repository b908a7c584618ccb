"""Generative verifiers: an analysis of the text so far is sampled, then the verdict behind it is read.

All analyses of a batch decode together, each on a branch that is forked from the question behind its step: the problem
and the steps are read once, however many analyses there are. The verdict costs no generation; it is the softmax over
two labels at the last token of the decision's text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final

import torch
from torch import Tensor

import tts_kernels as tk
from tts_search.models.device import read_tokens, upload
from tts_search.models.pool import Branch, Forwarded, PoolTooSmallError
from tts_search.verifiers.formats import Judge
from tts_search.verifiers.lane import HeadScorer, Lane, Task, branch_at
from tts_search.verifiers.reader import Reader, Tail

__all__ = ["JudgeScorer"]

_CONTEXT: Final = 8  # tokens before an analysis that are decoded with it
_ROOM: Final = 8  # tokens of context for what a tokenizer does at the seams


class JudgeScorer(HeadScorer):
    """Scores questions by sampled analyses.

    Parameters
    ----------
    lane : Lane
        The model, with its LM head.
    head : ScoreHead
        A label pair.
    reader : Reader
        Of the format.
    judge : Judge
        How it goes.
    eos : frozenset of int
        Tokens that end an analysis.
    """

    def __init__(self, lane: Lane, head: tk.ScoreHead, reader: Reader, judge: Judge, eos: frozenset[int]) -> None:
        super().__init__(lane, head)
        self.reader = reader
        self.judge = judge
        self._eos = eos
        self._decision_tokens = len(reader.encode(judge.decision)) + _ROOM

    def score(self, waiting: Mapping[Branch, Task]) -> None:
        """Fill in what the tasks of these branches are to find."""
        sources = [self._source(question, task) for question, task in waiting.items()]
        self._generate(sources)
        verdicts = {self._verdict(analysis): analysis for source in sources for analysis in source.waiting}
        readings = {verdict: Task() for verdict in verdicts if verdicts[verdict].task.error is None}
        super().score(readings)
        for source in sources:
            mine = [verdict for verdict, analysis in verdicts.items() if analysis.question is source.branch]
            for verdict in mine:
                source.task.error = source.task.error or readings.get(verdict, source.task).error
            if source.task.error is None:
                values = [readings[verdict].found[verdict, verdict.length - 1] for verdict in mine]
                source.task.found[source.branch, source.branch.length - 1] = sum(values) / len(values)
            branches = [source.branch, *(analysis.branch for analysis in source.waiting), *mine]
            self.lane.pool.release(branches)

    def _source(self, question: Branch, task: Task) -> _Run:
        """A question and the analyses that will be forked from it."""
        room = self.lane.decoder.shape.max_length - question.length - self._decision_tokens
        if room < 1:
            task.error = ValueError(
                f"the verifier's text of {question.length} tokens leaves no room for an analysis in its context of "
                f"{self.lane.decoder.shape.max_length} tokens"
            )
        path = question.path()
        tail, number = task.tails[question]
        stops = tuple(stop.replace("{next}", str(number + 1)) for stop in self.judge.stop)
        return _Run(
            question,
            task,
            [
                _Analysis(
                    Branch(question.meter, question, question.length, []),
                    task,
                    question,
                    tail,
                    _seed(path, sample),
                    min(room, self.judge.max_tokens),
                    stops,
                )
                for sample in range(self.judge.samples)
            ],
        )

    def _generate(self, sources: Sequence[_Run]) -> None:
        """Decode all analyses to their ends; those that find no room wait until others have ended."""
        active, later = list(sources), list[_Run]()
        while active or later:
            if not active:
                active, later = later, []
                for meter in {id(run.branch.meter): run.branch.meter for run in active}.values():
                    meter.waves += 1
            runs = {run.branch: run for run in active if run.task.error is None}
            active = []
            if not runs:
                continue
            try:
                forwarded = self.lane.pool.forward(list(runs), self.lane.decoder.logits, head=True)
            except PoolTooSmallError as error:
                runs[error.branch].task.error = error
                active = list(runs.values())
                continue
            later += [runs.pop(branch) for branch in forwarded.postponed]
            done = [runs.pop(branch) for branch in forwarded.done]
            active = [*runs.values(), *self._sample(done, forwarded)]

    def _sample(self, runs: Sequence[_Run], forwarded: Forwarded) -> list[_Run]:
        """Draw the next token of each analysis that got its logits; the ones that go on."""
        drawn = [analysis for run in runs for analysis in run.waiting]
        if not drawn:  # a chunk of a question
            return []
        row_of = {branch: row for row, (branch, _) in enumerate(forwarded.rows)}
        rows = torch.tensor([row_of[run.branch] for run in runs for _ in run.waiting])
        outputs = forwarded.outputs
        tokens = self._draw(outputs.index_select(0, upload(rows, outputs.device)), drawn)
        for analysis, token in zip(drawn, tokens, strict=True):
            self._push(analysis, token)
        return [_Run(each.branch, each.task, [each]) for each in drawn if not each.ended and each.task.error is None]

    def _draw(self, logits: Tensor, drawn: Sequence[_Analysis]) -> list[int]:
        judge = self.judge
        sampled = tk.sample(
            logits,
            temperature=judge.temperature,
            top_p=judge.top_p,
            top_k=judge.top_k,
            seeds=upload(torch.tensor([analysis.seed for analysis in drawn]), logits.device),
            offsets=upload(torch.tensor([len(analysis.branch.tokens) for analysis in drawn]), logits.device),
        )
        return read_tokens(sampled)[0]

    def _push(self, analysis: _Analysis, token: int) -> None:
        """Give an analysis its next token and see whether it ends there."""
        own = analysis.branch.tokens
        if token < 0:
            analysis.task.error = FloatingPointError("the verifier gave no finite logits")
        elif token in self._eos:
            analysis.ended = True
        else:
            own.append(token)
            longest = max(map(len, analysis.stops), default=0)
            end = self.reader.text_of(own[-longest - _CONTEXT :]) if longest else ""
            analysis.ended = len(own) == analysis.limit or any(stop in end for stop in analysis.stops)

    def _verdict(self, analysis: _Analysis) -> Branch:
        """The branch at whose last token the verdict on an analysis is read."""
        own, tail = analysis.branch.tokens, analysis.tail
        context = tail.tokens[-_CONTEXT:]
        before, text = self.reader.text_of(context), self.reader.text_of([*context, *own])
        text = text[len(before) :] if text.startswith(before) else self.reader.text_of(own)
        for stop in analysis.stops:
            text = text.partition(stop)[0]
        whole = Tail(tail.text, tail.token, [*tail.tokens, *own])
        start, tokens, _ = self.reader.continued(whole, text + self.judge.decision)
        return branch_at(analysis.branch if own else analysis.question, start, tokens)


@dataclass(slots=True, eq=False)
class _Analysis:
    """An analysis on its way, forked from a question whose text ends in ``tail``."""

    branch: Branch
    task: Task
    question: Branch
    tail: Tail
    seed: int
    limit: int
    stops: tuple[str, ...]
    ended: bool = False


@dataclass(slots=True, eq=False)
class _Run:
    """A branch to read, and the analyses whose next tokens are drawn from its logits."""

    branch: Branch
    task: Task
    waiting: list[_Analysis] = field(default_factory=list)


def _seed(path: Sequence[int], sample: int) -> int:
    """The stream of a sample's draws: it depends on the text that is judged, and on nothing else."""
    digest = blake2b(",".join(map(str, (*path, sample))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1

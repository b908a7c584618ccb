"""How likely a chat model answers a question with each of a few words: one forward, and no generation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch

from tts_search.errors import require
from tts_search.models.branches import TokenBranch
from tts_search.models.meter import Meter
from tts_search.models.reading import ReadStream, ReadStreams
from tts_search.search.protocol import Usage
from tts_search.verifiers.formats import VerifierFormat
from tts_search.verifiers.heads import label_token, lm_head
from tts_search.verifiers.lanes import load_lane
from tts_search.verifiers.reader import Reader

if TYPE_CHECKING:
    from tts_search.models.decoder import KvDtype

__all__ = ["Labels", "LocalLabels", "Question", "RemoteLabels", "common_prefix", "distinct_labels"]


@dataclass(frozen=True, slots=True)
class Question:
    """The texts that fill in a format.

    Attributes
    ----------
    problem : int
        The problem that the cost is counted for.
    text : str
        The problem's text.
    solution : str
        The text at the place of the steps.
    """

    problem: int
    text: str
    solution: str


class Labels(Protocol):
    """A model that answers questions by the probabilities of labels.

    Attributes
    ----------
    max_length : int
        The number of tokens in its context.
    """

    max_length: int

    def begin(self, problem: int) -> None:
        """Announce a problem."""

    def end(self, problem: int) -> Usage:
        """Forget a problem, and return its cost."""

    def lengths(self, entry: VerifierFormat, questions: Sequence[Question]) -> list[int]:
        """Return the number of tokens of each question in a format."""

    def ask(
        self, entry: VerifierFormat, labels: tuple[str, ...], questions: Sequence[Question]
    ) -> list[list[float] | Exception]:
        """Return for each question the probability of each label among the labels as the next token, or an error."""


@runtime_checkable
class RemoteLabels(Labels, Protocol):
    """A model on a server, which answers many threads at the same time."""

    def line(self) -> RemoteLabels:
        """Return the same labels over connections of their own, which can be hung up."""

    def hang_up(self) -> None:
        """Break off the requests of other threads over these connections; they raise errors."""


class LocalLabels:
    """A model in this process. From its LM head only the rows of labels are read.

    Parameters
    ----------
    path_or_id : str
        Folder or hub id of a chat model's checkpoint, or a GGUF file.
    dtype, device, kv_memory, kv_dtype, quantize, self_test
        As in :class:`~tts_search.HFPolicy`.

    Raises
    ------
    MissingExtraError
        Without transformers.
    ValueError
        If the model cannot run over a forest.
    """

    def __init__(
        self,
        path_or_id: str,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        kv_memory: int | str | None = None,
        kv_dtype: KvDtype | None = None,
        quantize: Literal["int8", "int4"] | None = None,
        self_test: bool = True,
    ) -> None:
        require("transformers", "search")
        from tts_search.models import transformers as adapter
        from tts_search.models.formats.opening import open_checkpoint

        self.tokenizer = adapter.load_tokenizer(path_or_id)
        self._config, self._checkpoint = adapter.load_config(path_or_id), open_checkpoint(path_or_id)
        self._lane = load_lane(
            path_or_id,
            False,
            dtype=dtype,
            device=device,
            kv_memory=kv_memory,
            kv_dtype=kv_dtype,
            quantize=quantize,
            self_test=self_test,
        )
        self.max_length = self._lane.decoder.shape.max_length
        self._reading = ReadStreams(self._lane)
        self._meters: dict[int, Meter] = {}
        self._readers: dict[str, Reader] = {}
        self._rows: dict[tuple[str, ...], torch.Tensor] = {}

    def begin(self, problem: int) -> None:
        """Announce a problem."""
        self._meters[problem] = Meter()

    def usage(self, problem: int) -> Usage:
        """Return the cost of a problem so far."""
        return self._lane.pool.usage(self._meters[problem])

    def end(self, problem: int) -> Usage:
        """Forget a problem, and return its cost."""
        meter = self._meters.pop(problem)
        self._lane.pool.close(meter)
        return self._lane.pool.usage(meter)

    def lengths(self, entry: VerifierFormat, questions: Sequence[Question]) -> list[int]:
        """Return the number of tokens of each question in a format."""
        return [len(self._tokens(entry, question)) for question in questions]

    def ask(
        self, entry: VerifierFormat, labels: tuple[str, ...], questions: Sequence[Question]
    ) -> list[list[float] | Exception]:
        """Return for each question the probability of each label among the labels as the next token, or an error.

        The common beginning of a problem's questions is read once. O(tokens) forwarded, O(labels H) for each question.

        Raises
        ------
        ValueError
            If a label is not a single token, different from the others.
        """
        rows = self._label_rows(entry, labels)
        of_problem: dict[int, list[int]] = {}
        tokens = [self._tokens(entry, question) for question in questions]
        for number, question in enumerate(questions):
            of_problem.setdefault(question.problem, []).append(number)
        branches: list[TokenBranch] = []
        reads: dict[ReadStream, int] = {}
        answers: list[list[float] | Exception] = [LookupError("not asked")] * len(questions)
        for problem, numbers in of_problem.items():
            fitting = [number for number in numbers if len(tokens[number]) <= self.max_length]
            for number in set(numbers).difference(fitting):
                answers[number] = too_long(len(tokens[number]), self.max_length)
            if not fitting:
                continue
            first = common_prefix([tokens[number] for number in fitting])
            root = TokenBranch(self._meters[problem], tokens=tokens[fitting[0]][:first], given=first)
            branches.append(root)
            for number in fitting:
                branch = TokenBranch(root.meter, root, first, tokens[number][first:])
                branches.append(branch)
                reads[self._reading.submit(branch)] = number
        try:
            missing = set(reads)
            while missing:
                for read in self._reading.step():
                    missing.discard(read)
                    answers[reads[read]] = read.error or _shares(read.outputs[-1][-1], rows)
        finally:
            self._reading.cancel(reads)
            self._lane.pool.release(branches[::-1])
        return answers

    def _tokens(self, entry: VerifierFormat, question: Question) -> list[int]:
        reader = self._readers.setdefault(entry.name, Reader(self.tokenizer, entry))
        tokens, tail = reader.prompt(question.text)
        start, new, tail = reader.step(tail, question.solution, 1)
        tokens[start:] = new
        start, new, _ = reader.closing(tail)
        tokens[start:] = new
        return tokens

    def _label_rows(self, entry: VerifierFormat, labels: tuple[str, ...]) -> torch.Tensor:
        if labels not in self._rows:
            ids = distinct_labels(labels, [label_token(self.tokenizer, label) for label in labels])
            rows = lm_head(entry, self._checkpoint, self._config, ids)
            self._rows[labels] = rows.to(self._lane.decoder.device, torch.float32)
        return self._rows[labels]


def common_prefix(texts: Sequence[list[int]]) -> int:
    """Return how many leading tokens all texts share, if each keeps at least one more token.

    Raises
    ------
    ValueError
        If there is no text.
    """
    end = min(map(len, texts)) - 1
    first, last = min(texts), max(texts)  # every text lies between these two, so it shares their prefix
    return next((place for place in range(end) if first[place] != last[place]), max(end, 0))


def distinct_labels(labels: Sequence[str], ids: list[int]) -> list[int]:
    """Return the tokens of labels.

    Raises
    ------
    ValueError
        If two are the same.
    """
    if len(set(ids)) < len(ids):
        raise ValueError(f"labels: expected texts of different tokens, got {list(labels)} with tokens {ids}")
    return ids


def too_long(length: int, max_length: int) -> ValueError:
    """Return the error of a question that does not fit a model's context."""
    return ValueError(f"the judge's text of {length} tokens is longer than its context of {max_length} tokens")


def _shares(hidden: Any, rows: torch.Tensor) -> list[float] | FloatingPointError:
    """The softmax over labels, of one hidden state [H] and their rows [L, H] of the LM head."""
    logits = (rows @ hidden.float()).double()
    shares: list[float] = torch.softmax(logits, 0).tolist()
    if not all(map(math.isfinite, shares)):
        return FloatingPointError("the judge gave a hidden state that is not finite")
    return shares

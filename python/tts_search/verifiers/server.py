"""A judge's model behind a server that has ``/generative_scoring``, as vLLM and ``tts-search serve`` do."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import threading
import time
import urllib.error
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any, Final, TypeVar

from tts_search.errors import ServerError
from tts_search.search.protocol import Usage
from tts_search.verifiers.formats import PROBLEM, STEPS, VerifierFormat
from tts_search.verifiers.labels import Question, common_prefix, distinct_labels, too_long
from tts_search.verifiers.line import Line

__all__ = ["ServerLabels"]

T = TypeVar("T")
U = TypeVar("U")
_MARKS: Final = re.compile(f"({re.escape(PROBLEM)}|{re.escape(STEPS)})")
_PASSING: Final = frozenset({408, 409, 429})  # and 5xx: failures that may be over soon
_PART: Final = 64  # questions in one request
_NAP: Final = 0.1  # seconds after which one who waits for another try looks whether it is cancelled


class ServerLabels:
    """A chat model behind a server that has ``/v1/models``, ``/tokenize`` and ``/generative_scoring``.

    Questions are rendered by the server's chat template. A server gives the probability of the first label only. So
    there is one request for each label except one, with each label first in turn. With a prefix cache, the server reads
    the texts only for the first request.

    Requests of one call are sent at the same time. An engine judges each problem by a call of its own, so no problem
    waits for another, and a search that is cancelled closes its connections.

    Parameters
    ----------
    base_url : str
        Address such as ``"http://localhost:8000"``, with or without ``/v1``.
    model : str or None
        The model's name on the server; by default the first that it names.
    api_key_env : str
        Environment variable that holds the key, if there is one.
    concurrency : int
        The largest number of requests at the same time.
    timeout : float
        Seconds that a request may take.
    max_retries : int
        How often a request is sent again if it failed for a reason that may pass (no connection, a timeout, status 408,
        409, 429 or 5xx).

    Raises
    ------
    ValueError
        If `base_url` is no address, or a number is too small.
    ServerError
        If the server does not answer, or has no such routes.
    """

    def __init__(
        self,
        base_url: str,
        *,
        model: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 16,
        timeout: float = 600.0,
        max_retries: int = 4,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url: expected an address that begins with http:// or https://, got {base_url!r}")
        for name, value, least in (("concurrency", concurrency, 1), ("max_retries", max_retries, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected an int >= {least}, got {value!r}")
        self._root = base_url.rstrip("/").removesuffix("/v1")
        self._key = os.environ.get(api_key_env)
        self._concurrency, self._timeout, self._max_retries = concurrency, timeout, max_retries
        self._slots, self._line = threading.BoundedSemaphore(concurrency), Line()
        self.model: str = model or self._sent("/v1/models", None, lambda reply: str(reply["data"][0]["id"]))
        body = {"model": self.model, "prompt": "a"}
        self.max_length: int = self._sent("/tokenize", body, lambda reply: int(reply["max_model_len"]))
        self._label_ids: dict[tuple[str, ...], list[int]] = {}
        self._usage: dict[int, Usage] = {}

    def begin(self, problem: int) -> None:
        """Announce a problem."""
        self._usage[problem] = Usage()

    def usage(self, problem: int) -> Usage:
        """Return the number of tokens that the server has read for a problem so far."""
        return self._usage[problem]

    def end(self, problem: int) -> Usage:
        """Forget a problem; return the number of tokens that the server read for it."""
        return self._usage.pop(problem)

    def line(self) -> ServerLabels:
        """Return the same labels over connections of their own, which can be hung up."""
        labels = copy.copy(self)
        labels._line = Line()
        return labels

    def hang_up(self) -> None:
        """Break off the requests of other threads over these connections; they raise errors."""
        self._line.cut()

    def lengths(self, entry: VerifierFormat, questions: Sequence[Question]) -> list[int]:
        """Return the number of tokens of each question in a format.

        Raises
        ------
        ServerError
            If the server gives no answer.
        """
        return list(map(len, self._all(lambda question: self._tokens(entry, question), questions)))

    def ask(
        self, entry: VerifierFormat, labels: tuple[str, ...], questions: Sequence[Question]
    ) -> list[list[float] | Exception]:
        """Return for each question the probability of each label among the labels as the next token, or an error.

        Raises
        ------
        ValueError
            If a label is not a single token, different from the others.
        ServerError
            If the server gives no tokens.
        """
        ids = self._ids(labels)
        tokens = self._all(lambda question: self._tokens(entry, question), questions)
        answers: list[list[float] | Exception] = [too_long(len(own), self.max_length) for own in tokens]
        of_problem: dict[int, list[int]] = {}
        for number, (question, own) in enumerate(zip(questions, tokens, strict=True)):
            if len(own) < self.max_length:  # the next token needs room, too
                of_problem.setdefault(question.problem, []).append(number)
        parts = [
            (problem, own[start : start + _PART])
            for problem, own in of_problem.items()
            for start in range(0, len(own), _PART)
        ]
        columns: list[list[Any]] = [[] for _ in parts]
        for firsts in ([0], range(1, len(ids) - 1)):  # the second pass finds the texts in the server's cache
            turns = [(part, first) for part in range(len(parts)) for first in firsts]
            asked = [
                ([tokens[number] for number in parts[part][1]], [*ids[first:], *ids[:first]]) for part, first in turns
            ]
            for (part, _), (shares, usage) in zip(turns, self._all(lambda one: self._shares(*one), asked), strict=True):
                columns[part].append(shares)
                self._usage[parts[part][0]] += usage
        for (_, own), said in zip(parts, columns, strict=True):
            failed = [column for column in said if isinstance(column, ServerError)]
            for place, number in enumerate(own):
                answers[number] = failed[0] if failed else _complete([column[place] for column in said])
        return answers

    def _shares(self, tokens: Sequence[list[int]], ids: Sequence[int]) -> tuple[Any, Usage]:
        """The share of the first label as the next token of each of these texts, or the error; and the cost."""
        end = common_prefix(tokens)
        body = {
            "model": self.model,
            "query": tokens[0][:end],
            "items": [own[end:] for own in tokens],
            "label_token_ids": list(ids),
            "apply_softmax": True,
        }

        def read(reply: Any) -> tuple[list[float], Usage]:
            scores = {int(one["index"]): float(one["score"]) for one in reply["data"]}
            shares = [scores[place] for place in range(len(tokens))]
            if not all(0.0 <= share <= 1.0 for share in shares):
                raise ValueError(f"expected scores between 0 and 1, got {shares}")
            return shares, _usage(reply.get("usage") or {})

        try:
            return self._sent("/generative_scoring", body, read)
        except ServerError as error:
            return error, Usage()

    def _ids(self, labels: tuple[str, ...]) -> list[int]:
        if labels not in self._label_ids:
            ids: list[int] = []
            for label in labels:
                own = self._tokenized({"prompt": label, "add_special_tokens": False})
                if len(own) != 1:
                    raise ValueError(
                        f"labels: expected the text of one token, got {label!r}, which is {len(own)}: {own}"
                    )
                ids += own
            self._label_ids[labels] = distinct_labels(labels, ids)
        return self._label_ids[labels]

    def _tokens(self, entry: VerifierFormat, question: Question) -> list[int]:
        words = {PROBLEM: question.text, STEPS: question.solution}
        messages = [
            {"role": role, "content": "".join(words.get(part, part) for part in _MARKS.split(text))}
            for role, text in entry.chat
        ]
        return self._tokenized({"messages": messages, "add_generation_prompt": True})

    def _tokenized(self, body: dict[str, Any]) -> list[int]:
        return self._sent("/tokenize", {"model": self.model, **body}, lambda reply: list(map(int, reply["tokens"])))

    def _all(self, send: Callable[[T], U], each: Sequence[T]) -> list[U]:
        """The results of `send` for each item, all at the same time."""
        with ThreadPoolExecutor(self._concurrency, "tts_search.ServerLabels") as pool:
            return list(pool.map(send, each))

    def _sent(self, path: str, body: dict[str, Any] | None, read: Callable[[Any], T]) -> T:
        """Send a request, again if that may help, and return the content of its answer.

        Raises
        ------
        ServerError
            The error of the last try.
        """
        for attempt in range(self._max_retries + 1):
            if attempt:
                self._pause(min(0.5 * 2 ** (attempt - 1), 8.0))
            if self._line.is_cut:
                raise ServerError(f"{self._root}{path}: the request was cancelled")
            try:
                return read(self._answer(path, body))
            except urllib.error.HTTPError as error:
                fault = ServerError(f"{self._root}{path}: status {error.code}: {_message(error)}")
                if error.code not in _PASSING and error.code < 500:
                    break
            except (OSError, HTTPException) as error:
                fault = ServerError(f"{self._root}{path}: {type(error).__name__}: {error}")
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                fault = ServerError(
                    f"{self._root}{path}: expected vLLM's answer, got {type(error).__name__}: {error!s:.200}"
                )
        raise fault

    def _pause(self, seconds: float) -> None:
        """Wait before another try, unless nobody wants it any more."""
        for _ in range(round(seconds / _NAP)):
            if not self._line.is_cut:
                time.sleep(_NAP)

    def _answer(self, path: str, body: dict[str, Any] | None) -> Any:
        headers = {"content-type": "application/json"}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        with self._slots:
            return self._line.send(self._root + path, body, headers, self._timeout)


def _complete(shares: Sequence[float]) -> list[float]:
    """The shares of all labels, given those of all but the last."""
    return [*shares, max(0.0, 1.0 - math.fsum(shares))]


def _usage(reply: Mapping[str, Any]) -> Usage:
    cached = int((reply.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
    return Usage(tokens=int(reply.get("prompt_tokens") or 0) - cached, cached_tokens=cached)


def _message(error: urllib.error.HTTPError) -> str:
    """The message of a server about an error."""
    said = error.read(4096).decode(errors="replace")
    try:
        return str(json.loads(said)["error"]["message"])[:300]
    except (LookupError, TypeError, ValueError):
        return " ".join(said.split())[:300]

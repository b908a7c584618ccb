"""A verifier over a process reward model of transformers: it reads each token of a search once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

import tts_kernels as tk
from tts_search.branches import Branch, BranchPool, Meter, PoolTooSmallError
from tts_search.decoder import pool_for
from tts_search.errors import require
from tts_search.protocol import Score, Usage
from tts_search.verifiers.formats import PROBLEM, STEPS, VerifierFormat, format_of

if TYPE_CHECKING:
    from tts_search.decoder import Decoder, DecoderKind

__all__ = ["HFVerifier"]


class HFVerifier:
    """Scores steps with a discriminative process reward model, or any language model that is asked about them.

    Candidates share a :class:`tts_kernels.KVForest` of their own, forked by the same parents as the policy's: a
    candidate costs the tokens of its new step and its boundary, whatever came before. Hidden states are read where a
    step is scored and nowhere else, and no logits are made: the head is a :class:`tts_kernels.ScoreHead`.

    The score of a step is that of the text up to its boundary. Where a tokenizer does not cut the text at a boundary,
    the tokens that change when text follows are taken back and read again, so the result is that of encoding the whole
    text. Special tokens that stand as text in a problem or a step are broken up by a space: a solution cannot write the
    boundary that it is scored at.

    Parameters
    ----------
    path_or_id : str
        Folder or hub id of a checkpoint: config, safetensors weights, fast tokenizer.
    format : str or VerifierFormat or dict
        A name in ``FORMATS``, a :class:`~tts_search.verifiers.VerifierFormat`, or such an entry as a dict. By default
        what the checkpoint's config says: its ``"tts_verifier"``, or a format that knows the architecture.
    head : ScoreHead or None
        Use this head instead of the format's.
    dtype, device, kv_memory, decoder
        As in :class:`~tts_search.HFPolicy`.

    Raises
    ------
    MissingExtraError
        Without transformers.
    ValueError
        If nothing says the format, a label is not one token, or a tensor of the head is not in the checkpoint.

    Examples
    --------
    >>> from tts_search import HFVerifier  # doctest: +SKIP
    >>> verifier = HFVerifier("HuggingFaceTB/SmolLM2-135M-Instruct", format="yes_no")  # doctest: +SKIP
    """

    def __init__(
        self,
        path_or_id: str,
        *,
        format: str | VerifierFormat | Mapping[str, Any] = "auto",  # noqa: A002
        head: tk.ScoreHead | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        kv_memory: int | str | None = None,
        decoder: DecoderKind = "auto",
    ) -> None:
        require("transformers", "search")
        from tts_search.adapters import transformers as adapter
        from tts_search.decoders.loading import load_decoder

        self.format = format_of(format, adapter.load_config(path_or_id))
        self.tokenizer = adapter.load_tokenizer(path_or_id)
        needs_lm_head = head is None and self.format.head == "label_pair"
        self.decoder: Decoder = load_decoder(
            path_or_id, causal_lm=needs_lm_head, dtype=dtype, device=device, decoder=decoder
        )
        if head is None:
            head = adapter.score_head(path_or_id, self.format, self.decoder, self.tokenizer)
        self.head = head.to(self.decoder.device)
        self._reader = _Reader(self.tokenizer, self.format)
        self._pool = BranchPool(pool_for(self.decoder, kv_memory))
        self._problems: dict[int, dict[int, _Node]] = {}

    def begin(self, problem: int, text: str) -> None:
        """Announce a problem. It is read with the first step."""
        if problem in self._problems:
            raise ValueError(f"problem {problem} is in flight: an HFVerifier serves one search at a time")
        tokens, tail = self._reader.prompt(text)
        root = Branch(Meter(), tokens=tokens, given=len(tokens))
        self._problems[problem] = {0: _Node(root, tail, (), [])}

    def score(self, requests: Sequence[Score]) -> list[list[float] | Exception]:
        """Score the steps of each request that were not scored before.

        The answer to a request is an exception if its text does not fit the model's context or the KV pool.
        """
        jobs = [self._job(request) for request in requests]
        waiting = {branch: job for job in jobs if job.error is None for branch in job.asked}
        while waiting:
            waiting = self._wave(waiting)
            for meter in {id(branch.meter): branch.meter for branch in waiting}.values():
                meter.waves += 1
        return [self._finish(job) for job in jobs]

    def release(self, problem: int, branches: Sequence[int]) -> None:
        """Forget branches; children keep what they share with them."""
        nodes = self._problems[problem]
        self._pool.release(nodes[branch].branch for branch in branches if branch in nodes)
        for branch in branches:
            if branch:  # the root stays: any text can be read from there
                nodes.pop(branch, None)

    def end(self, problem: int) -> Usage:
        """Forget what is left of a problem; what it cost."""
        meter = self._problems.pop(problem)[0].branch.meter
        self._pool.close(meter)
        return meter.usage(self.decoder.shape)

    def _job(self, request: Score) -> _Job:
        """What a request adds to the tree: the tokens of the steps that were not scored before."""
        nodes = self._problems[request.problem]
        steps = (*request.steps, *request.lookahead)
        base = next(
            node
            for node in (nodes.get(request.branch), nodes.get(request.parent), nodes[0])
            if node is not None and node.steps == request.steps[: len(node.steps)]
        )
        job = _Job(request, base, _Node(base.branch, base.tail, base.steps, base.scores))
        for number in range(len(base.steps), len(steps)):
            self._add(job, steps[number], number)
            if number + 1 == len(request.steps):
                job.node = _Node(job.chain[-1], job.tail, request.steps, [])
        longest = max((branch.length for branch in job.asked), default=0)
        if longest > self.decoder.shape.max_length:
            job.error = ValueError(
                f"the verifier's text of {longest} tokens is longer than its context of "
                f"{self.decoder.shape.max_length} tokens"
            )
        return job

    def _add(self, job: _Job, step: str, number: int) -> None:
        """Put a step at the end of a job's text, and note the position that is scored for it.

        The tokens go to the branch that the job is building, unless some of that branch's would have to be taken back,
        or the step is the first one that does not belong to the request's branch.
        """
        start, tokens, job.tail = self._reader.step(job.tail, step, first=number == 0)
        last = job.chain[-1] if job.chain else job.base.branch
        if job.chain and start == last.length and number != len(job.request.steps):
            last.tokens += tokens
        else:
            last = _branch(last, start, tokens)
            job.chain.append(last)
        if self.format.score_at == "closing":
            start, tokens, _ = self._reader.closing(job.tail)
            last = _branch(last, start, tokens)
            job.questions.append(last)
        else:
            last.marks.append(last.length - 1)
        job.places.append((last, last.length - 1))

    def _wave(self, waiting: dict[Branch, _Job]) -> dict[Branch, _Job]:
        """Score branches; those that found no room are returned, to come in another wave."""
        later: dict[Branch, _Job] = {}
        while waiting:
            try:
                forwarded = self._pool.forward(list(waiting), self.decoder.hidden, head=False)
            except PoolTooSmallError as error:
                failed = waiting[error.branch]
                failed.error = error
                waiting = {branch: job for branch, job in waiting.items() if job is not failed}
                continue
            later = {branch: waiting.pop(branch) for branch in forwarded.postponed} | later
            if forwarded.rows:
                positions = torch.arange(len(forwarded.rows), device=forwarded.outputs.device)
                scores = tk.step_scores(forwarded.outputs, positions, self.head).tolist()
                for (branch, position), score in zip(forwarded.rows, scores, strict=True):
                    waiting[branch].found[branch, position] = score
            for branch in forwarded.done:
                if branch in waiting.pop(branch).questions:
                    self._pool.release([branch])
        return later

    def _finish(self, job: _Job) -> list[float] | Exception:
        """The answer to a request. Of what it added to the tree, the branch that it names stays."""
        nodes, number = self._problems[job.request.problem], job.request.branch
        old = nodes.get(number)
        replaced = [] if old is None or old.branch is job.node.branch else [old.branch]
        if job.error is not None:
            self._pool.release([*job.questions, *job.chain])
            return job.error
        self._pool.release([*replaced, *(branch for branch in job.chain if branch is not job.node.branch)])
        scores = job.base.scores + [job.found[place] for place in job.places]
        job.node.scores = scores[: len(job.request.steps)]
        nodes[number] = job.node
        return scores


class _Reader:
    """Turns problems and steps into tokens, as a format says.

    With ``encoding="text"`` the tokens are those of the whole text. Only its end is encoded again when a step is added:
    from the last special token on, where every tokenizer cuts.
    """

    def __init__(self, tokenizer: Any, entry: VerifierFormat) -> None:
        self.tokenizer = tokenizer
        self.format = entry
        bos, before, between, self._closing = _template(tokenizer, entry)
        self._before, self._between = bos + before, between
        added = tokenizer.added_tokens_decoder
        fixed = "".join((self._before, between, self._closing, entry.boundary, entry.separator))
        forgeable = {token.content for token in added.values() if token.special or token.content in fixed}
        longest_first = sorted(forgeable, key=len, reverse=True)
        self._forged = re.compile("|".join(map(re.escape, longest_first))) if forgeable else None
        self._cuts = frozenset(
            number for number, token in added.items() if token.special and not (token.lstrip or token.single_word)
        )

    def prompt(self, problem: str) -> tuple[list[int], _Tail]:
        """The tokens before the first step."""
        _, tokens, tail = self._extend(_Tail("", 0, []), [self._before, self._harmless(problem), self._between])
        return tokens, tail

    def step(self, tail: _Tail, step: str, first: bool) -> tuple[int, list[int], _Tail]:
        """How many tokens before a step stay, the tokens from there to the end of its boundary, and the new end."""
        text = self._harmless(step.strip() if self.format.strip else step)
        return self._extend(tail, ["" if first else self.format.separator, text, self.format.boundary])

    def closing(self, tail: _Tail) -> tuple[int, list[int], _Tail]:
        """The same for the text behind the steps."""
        return self._extend(tail, [self._closing])

    def _extend(self, tail: _Tail, parts: Sequence[str]) -> tuple[int, list[int], _Tail]:
        if self.format.encoding == "pieces":
            tokens = [token for part in parts if part for token in self._encode(part)["input_ids"]]
            return tail.token, tokens, _Tail("", tail.token + len(tokens), [])
        text = tail.text + "".join(parts)
        encoded = self._encode(text)
        tokens = encoded["input_ids"]
        same = _common(tail.tokens, tokens)
        cut = next((i for i in range(len(tokens) - 1, 0, -1) if tokens[i] in self._cuts), 0)
        begin = encoded["offset_mapping"][cut][0] if cut else 0
        return tail.token + same, tokens[same:], _Tail(text[begin:], tail.token + cut, tokens[cut:])

    def _encode(self, text: str) -> Any:
        return self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)

    def _harmless(self, text: str) -> str:
        return text if self._forged is None else self._forged.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)


def _template(tokenizer: Any, entry: VerifierFormat) -> tuple[str, str, str, str]:
    """Beginning-of-text token and the three pieces of a format's prompt: before problem, before steps, behind them."""
    if not entry.chat:
        lead = tokenizer("")["input_ids"]
        bos = tokenizer.bos_token if lead[:1] == [tokenizer.bos_token_id] and lead else ""
        text = entry.prompt
    elif tokenizer.chat_template is None:
        raise ValueError(f"format {entry.name!r} needs a chat template, which this tokenizer does not have")
    else:
        turns = [{"role": role, "content": content} for role, content in entry.chat]
        bos = ""
        text = tokenizer.apply_chat_template(
            turns, add_generation_prompt=turns[-1]["role"] != "assistant", tokenize=False
        )
    before, found_problem, rest = text.partition(PROBLEM)
    between, found_steps, closing = rest.partition(STEPS)
    if not (found_problem and found_steps):
        raise ValueError(f"format {entry.name!r}: the chat template leaves {PROBLEM} or {STEPS} out of {text!r}")
    if entry.score_at == "closing" and not closing:
        raise ValueError(f"format {entry.name!r}: expected text behind {STEPS} to score at, got {text!r}")
    return bos, before, between, closing


def _common(old: Sequence[int], new: Sequence[int]) -> int:
    """How many leading tokens are the same, leaving at least one new token to read."""
    limit = min(len(old), len(new) - 1)
    return next((i for i in range(limit) if old[i] != new[i]), max(limit, 0))


def _branch(parent: Branch, start: int, tokens: list[int]) -> Branch:
    """A branch of the first ``start`` tokens of the parent's path and ``tokens``."""
    while start < parent.start and parent.parent is not None:
        parent = parent.parent
    return Branch(parent.meter, parent, start, tokens)


@dataclass(frozen=True, slots=True)
class _Tail:
    """The end of a text, from a place on where its tokens do not depend on what comes before.

    ``token`` is the place of its first token in the whole text.
    """

    text: str
    token: int
    tokens: list[int]


@dataclass(slots=True)
class _Node:
    """The text up to a step and the scores of its steps."""

    branch: Branch
    tail: _Tail
    steps: tuple[str, ...]
    scores: list[float]


@dataclass(slots=True, eq=False)
class _Job:
    """One request on its way.

    Attributes
    ----------
    base, node : _Node
        What it builds on, and what stays in the tree for the request's branch.
    chain : list of Branch
        The branches that hold the new steps, each one's parent before it.
    questions : list of Branch
        Branches behind the steps whose last token is scored, if the steps' own is not.
    places, found
        Where each new step is scored, and what came out.
    tail : _Tail
        The end of the text so far.
    """

    request: Score
    base: _Node
    node: _Node
    chain: list[Branch] = field(default_factory=list)
    questions: list[Branch] = field(default_factory=list)
    places: list[tuple[Branch, int]] = field(default_factory=list)
    found: dict[tuple[Branch, int], float] = field(default_factory=dict)
    error: Exception | None = None
    tail: _Tail = field(init=False)

    def __post_init__(self) -> None:
        self.tail = self.base.tail

    @property
    def asked(self) -> list[Branch]:
        """The branches whose outputs are scored."""
        return self.questions or self.chain

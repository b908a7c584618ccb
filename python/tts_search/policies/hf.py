"""A policy over a causal language model of transformers: it grows the branches of a search over a KV forest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

import tts_kernels as tk
from tts_search.errors import require
from tts_search.models.decoder import pool_for
from tts_search.models.device import read_tokens, upload
from tts_search.models.graphs import decode_graphs
from tts_search.models.meter import Meter
from tts_search.models.pool import Branch, BranchPool, PoolTooSmallError
from tts_search.policies.prompt import continuation_ids, prompt_of, text_ids
from tts_search.search.protocol import Expand, Usage
from tts_search.search.types import Step

if TYPE_CHECKING:
    from tts_search.models.decoder import Decoder, DecoderKind

__all__ = ["HFPolicy"]

# Tokens before a step that are decoded with it: enough for any decoder that looks at the neighbours of a token.
_CONTEXT: Final = 8


class HFPolicy:
    r"""Samples steps from a causal language model of transformers.

    The prompt of a problem is read once; branches share it, and each other's steps, in a :class:`tts_kernels.KVForest`.
    All branches of all problems in flight decode in one packed batch, and a branch leaves it when its step ends.

    A step ends at the first token after which the step's text holds the delimiter; if that is white space, with
    something else before it. Its text is what was generated, all of the last token included: a token ``".\n\n"`` ends a
    step in ``".\n\n"``, a token ``"\n\n\n"`` in ``"\n\n\n"``, and ``"\n"``, ``"\n"`` end one together. Special tokens
    give no text. A step that is cut by its token limit ends at a whole character; one that is cut by the end of the
    context ends its branch.

    Parameters
    ----------
    path_or_id : str
        Folder or hub id of a checkpoint: config, safetensors weights, fast tokenizer; a chat template if it has one.
        Without one, the prompt is the system prompt and the problem, each followed by a blank line.
    system_prompt : str or None
        The system message before the problem; by default none.
    dtype : torch.dtype or str or None
        Of weights and KV cache, such as ``torch.bfloat16`` or ``"bfloat16"``; by default the checkpoint's.
    device : torch.device or str or None
        By default a GPU if there is one, else the CPU.
    kv_memory : int or str or None
        Size of the KV pool: bytes or text such as ``"2GiB"``. By default room for 64 sequences of full length, at most
        a quarter of the free memory. A search that needs more runs in waves: idle branches give their KV up and read
        their tokens again when it is their turn.
    decoder : {"auto", "lean", "transformers"}
        What runs the model: by default the lean decoder of the families that it knows, for all others the model's own
        modules in transformers with attention over the forest. The other two values insist on one.
    chat : bool
        False: a problem is a whole prompt, rendered by the caller, and is read as it is.
    self_test : bool
        Whether a few tokens go through the decoder and through the model's own eager attention while it loads; a model
        that comes out different is refused.

    Raises
    ------
    MissingExtraError
        Without transformers.
    ValueError
        If the model cannot be followed over a forest, ``kv_memory`` is no size, or ``"lean"`` is not possible.

    Examples
    --------
    >>> from tts_search import HFPolicy, search  # doctest: +SKIP
    >>> policy = HFPolicy("HuggingFaceTB/SmolLM2-135M-Instruct", dtype="bfloat16", kv_memory="1GiB")  # doctest: +SKIP
    """

    def __init__(
        self,
        path_or_id: str,
        *,
        system_prompt: str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        kv_memory: int | str | None = None,
        decoder: DecoderKind = "auto",
        chat: bool = True,
        self_test: bool = True,
    ) -> None:
        require("transformers", "search")
        from tts_search.models import transformers as adapter
        from tts_search.models.loading import load_decoder

        if system_prompt is not None and not chat:
            raise ValueError(
                f"system_prompt: expected None with chat=False, whose prompts are whole, got {system_prompt!r}"
            )
        self.tokenizer = adapter.load_tokenizer(path_or_id)
        self.system_prompt = system_prompt
        self.chat = chat
        self.decoder: Decoder = load_decoder(
            path_or_id, dtype=dtype, device=device, decoder=decoder, self_test=self_test
        )
        self._eos = adapter.eos_tokens(path_or_id, self.tokenizer)
        pool = pool_for(self.decoder, kv_memory)
        self._pool = BranchPool(pool, graphs=decode_graphs(self.decoder, pool))
        self._problems: dict[int, _Problem] = {}
        self._delimiters: dict[str | None, _Delimiter] = {}

    def begin(self, problem: int, text: str) -> None:
        """Announce a problem. Its prompt is read with the first step.

        Raises
        ------
        ValueError
            If the number belongs to a problem in flight.
        """
        if problem in self._problems:
            raise ValueError(f"problem {problem} is in flight: an HFPolicy serves one search at a time")
        tokens = self._encode(self._prompt(text))
        root = Branch(Meter(), tokens=tokens, given=len(tokens))
        self._problems[problem] = _Problem(root, {0: _Node(root, "")})

    def expand(self, requests: Sequence[Expand]) -> list[list[Step] | Exception]:
        """Sample a step for each child of each request.

        The answer to a request is an exception if its prompt or its branch does not fit the model's context or the KV
        pool, or if the model gives no finite logits for it.
        """
        jobs = [self._job(request) for request in requests]
        runs: list[_Source | _Child] = self._sources(jobs)
        while runs:
            runs = self._wave(runs)
            for meter in {id(run.branch.meter): run.branch.meter for run in runs}.values():
                meter.waves += 1
        return [self._finish(job) for job in jobs]

    def release(self, problem: int, branches: Sequence[int]) -> None:
        """Forget branches; children keep what they share with them."""
        nodes = self._problems[problem].nodes
        self._pool.release(node.branch for branch in branches if (node := nodes.pop(branch, None)) is not None)

    def end(self, problem: int) -> Usage:
        """Forget what is left of a problem; what it cost."""
        state = self._problems.pop(problem)
        self._pool.close(state.root.meter)
        return state.root.meter.usage(self.decoder.shape, state.sampled)

    def _prompt(self, text: str) -> str:
        return prompt_of(text, self.system_prompt, self.tokenizer) if self.chat else text

    def _encode(self, prompt: str) -> list[int]:
        """The tokens of a whole prompt: with special tokens in front, unless whoever rendered it wrote them."""
        return text_ids(prompt, self.tokenizer, special=self.chat and self.tokenizer.chat_template is None)

    def _plain(self, text: str) -> list[int]:
        return text_ids(text, self.tokenizer, special=False)

    def _job(self, request: Expand) -> _Job:
        """The children that a request asks for, or why it cannot have them."""
        state = self._problems[request.problem]
        parent = self._parent(state, request)
        job = _Job(request, state, parent)
        room = self.decoder.shape.max_length - parent.length
        if not parent.length:
            job.error = ValueError("the prompt has no tokens")
        elif room <= 0 and parent is state.root:
            job.error = ValueError(
                f"the prompt of {parent.length} tokens leaves no room in the model's context of "
                f"{self.decoder.shape.max_length} tokens"
            )
        limit = min(request.params.max_tokens, room)
        job.children = [_Child(job, seed, limit, Branch(parent.meter, parent, parent.length)) for seed in request.seeds]
        return job

    def _parent(self, state: _Problem, request: Expand) -> Branch:
        """The branch to continue: one that this policy made, or such a one with what the steps' text has beyond it."""
        text = "".join(request.steps)
        if not text:
            return state.root
        node = state.nodes.get(request.branch)
        if node is None or node.text != text:
            begun = (each for each in state.nodes.values() if _begins(each.text, text))
            base = max(begun, key=lambda each: len(each.text), default=_Node(state.root, ""))
            if base.text == text:
                return base.branch
            tokens = continuation_ids(base.branch.path(), text[len(base.text) :], self._plain, self._decode_all)
            node = _Node(Branch(state.root.meter, base.branch, base.branch.length, tokens, given=len(tokens)), text)
            state.nodes[request.branch] = node
        return node.branch

    def _sources(self, jobs: Sequence[_Job]) -> list[_Source | _Child]:
        """The branches to expand, each once, with the children that wait for its logits."""
        sources: dict[Branch, _Source] = {}
        for job in jobs:
            if job.error is None and job.children and job.children[0].limit > 0:
                sources.setdefault(job.parent, _Source(job.parent, [])).waiting += job.children
        for branch in sources:
            self._pool.rewind(branch)
        return list(sources.values())

    def _wave(self, runs: list[_Source | _Child]) -> list[_Source | _Child]:
        """Run branches until their steps end; those that found no room are returned, to come in another wave."""
        later: list[_Source | _Child] = []
        while runs:
            by_branch = {run.branch: run for run in runs}
            try:
                forwarded = self._pool.forward(list(by_branch), self.decoder.logits, head=True)
            except PoolTooSmallError as error:
                for child in by_branch[error.branch].waiting:
                    child.job.error = error
                runs = [run for run in runs if run.branch is not error.branch]
                continue
            later = [by_branch[branch] for branch in forwarded.postponed] + later
            follow = self._sample([by_branch[branch] for branch in forwarded.done], forwarded.outputs)
            follow |= {branch: [] for branch in forwarded.postponed}
            runs = [run for branch in by_branch for run in follow.get(branch, [by_branch[branch]])]
        return later

    def _sample(self, runs: Sequence[_Source | _Child], logits: Tensor) -> dict[Branch, list[_Source | _Child]]:
        """Draw a token for each child that got its logits; for each run, the children that go on."""
        if not runs:  # a chunk of a prompt
            return {}
        children = [child for run in runs for child in run.waiting]
        if len(children) != len(runs):
            rows = [row for row, run in enumerate(runs) for _ in run.waiting]
            logits = logits.index_select(0, upload(torch.tensor(rows), logits.device))
        tokens, logprobs = read_tokens(tk.sample(logits, **_sampling(children, logits.device)))
        for child, token, logprob in zip(children, tokens, logprobs, strict=True):
            self._push(child, token, logprob)
        self._pool.release(child.branch for child in children if child.step is not None and child.step.finished)
        return {run.branch: [child for child in run.waiting if child.goes_on] for run in runs}

    def _push(self, child: _Child, token: int, logprob: float) -> None:
        """Give a child its next token and see whether its step ends there."""
        if token < 0:
            child.job.error = FloatingPointError("the model gave no finite logits")
            return
        own, job = child.branch.tokens, child.job
        child.num_tokens += 1
        child.logprob += logprob
        job.state.sampled += 1
        if token in self._eos:
            child.end(self._text(job, own), "eos")
            return
        own.append(token)
        delimiter = self._delimiter(job.request.params.delimiter)
        if delimiter.may_close(token) and delimiter.closes(text := self._text(job, own)):
            child.end(text, "stop")
        elif child.num_tokens == child.limit:
            whole = self._whole_characters(job, own)
            self._pool.trim(child.branch, whole)
            child.end(self._text(job, own), "length")

    def _text(self, job: _Job, own: Sequence[int]) -> str:
        """The text of a step's tokens in the context of those before them."""
        if not job.context:
            job.context = job.parent.path()[-_CONTEXT:]
            job.context_text = self._decode(job.context)
        text = self._decode([*job.context, *own])
        return text[len(job.context_text) :] if text.startswith(job.context_text) else self._decode(own)

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.backend_tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _decode_all(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones too."""
        text: str = self.tokenizer.backend_tokenizer.decode(tokens, skip_special_tokens=False)
        return text

    def _whole_characters(self, job: _Job, own: Sequence[int]) -> int:
        """How many tokens of a step to keep so that its text does not end within a character (of 4 bytes at most)."""
        for count in range(len(own), max(0, len(own) - 4), -1):
            if not self._text(job, own[:count]).endswith("\ufffd"):
                return count
        return len(own)

    def _delimiter(self, text: str | None) -> _Delimiter:
        if text not in self._delimiters:
            self._delimiters[text] = _Delimiter(text, self._decode, self._plain("a"))
        return self._delimiters[text]

    def _finish(self, job: _Job) -> list[Step] | Exception:
        """The answer to a request; branches that go on become nodes of the tree."""
        if job.error is not None:
            self._pool.release(child.branch for child in job.children)
            return job.error
        steps: list[Step] = []
        for number, child in zip(job.request.children, job.children, strict=True):
            step = child.step or Step("", True, reason="length")  # no room in the context for a single token
            steps.append(step)
            if step.finished:
                self._pool.release([child.branch])
            else:
                self._pool.hold(child.branch)  # a step of one token was never forwarded
                job.state.nodes[number] = _Node(child.branch, "".join(job.request.steps) + step.text)
        return steps


def _begins(start: str, text: str) -> bool:
    """Whether a text begins with another one that ends where no word is cut."""
    if not text.startswith(start):
        return False
    return not start or len(start) == len(text) or start[-1].isspace() or text[len(start)].isspace()


class _Delimiter:
    """Finds the end of a step without decoding at every token."""

    def __init__(self, text: str | None, decode: Callable[[Sequence[int]], str], before: Sequence[int]) -> None:
        self.text = text
        self._decode = decode
        self._before = list(before)
        self._before_text = decode(before)
        self._closing: dict[int, bool] = {}

    def may_close(self, token: int) -> bool:
        """Whether a token can complete the delimiter: if it adds its last character, or a part of a character."""
        if not self.text:
            return False
        if token not in self._closing:
            piece = self._decode([*self._before, token])
            clean = piece.startswith(self._before_text) and "\ufffd" not in piece
            self._closing[token] = not clean or self.text[-1] in piece[len(self._before_text) :]
        return self._closing[token]

    def closes(self, text: str) -> bool:
        """Whether a step's text holds the delimiter: a blank one after something other than white space."""
        if self.text is None:
            return False
        blank = len(text) - len(text.lstrip())
        return text.find(self.text, 0 if self.text.strip() else blank + 1) >= 0


@dataclass(slots=True)
class _Problem:
    """A problem in flight: its prompt, the branches that may be asked for, the tokens sampled so far."""

    root: Branch
    nodes: dict[int, _Node]
    sampled: int = 0


@dataclass(frozen=True, slots=True)
class _Node:
    """A branch and the text of its steps."""

    branch: Branch
    text: str


@dataclass(slots=True, eq=False)
class _Job:
    """One request on its way; ``context`` are the last tokens before its steps."""

    request: Expand
    state: _Problem
    parent: Branch
    children: list[_Child] = field(default_factory=list)
    error: Exception | None = None
    context: list[int] = field(default_factory=list)
    context_text: str = ""


@dataclass(slots=True, eq=False)
class _Child:
    """A step on its way; ``step`` is there when it has ended."""

    job: _Job
    seed: int
    limit: int
    branch: Branch
    num_tokens: int = 0
    logprob: float = 0.0
    step: Step | None = None

    @property
    def waiting(self) -> list[_Child]:
        """Those that sample from this branch's logits."""
        return [self]

    @property
    def goes_on(self) -> bool:
        """Whether the next token is wanted."""
        return self.step is None and self.job.error is None

    def end(self, text: str, reason: str) -> None:
        """The step is complete. A branch ends with its answer, when its context is full, or if a step had no text."""
        full = self.limit < self.job.request.params.max_tokens and self.num_tokens == self.limit
        finished = reason == "eos" or (reason == "length" and (full or not text))
        self.step = Step(text, finished, self.num_tokens, self.logprob, reason)


@dataclass(slots=True, eq=False)
class _Source:
    """A branch to expand: the first tokens of its children are drawn from its logits."""

    branch: Branch
    waiting: list[_Child]


def _sampling(children: Sequence[_Child], device: torch.device) -> dict[str, Any]:
    """Options of `tts_kernels.sample` for the next token of each child: numbers where all agree, else a tensor."""
    params = [child.job.request.params for child in children]
    options: dict[str, Any] = {}
    for name, dtype in (("temperature", torch.float32), ("top_p", torch.float32), ("top_k", torch.int64)):
        values = [getattr(each, name) for each in params]
        same = values.count(values[0]) == len(values)
        options[name] = values[0] if same else upload(torch.tensor(values, dtype=dtype), device)
    options["seeds"] = upload(torch.tensor([child.seed for child in children], dtype=torch.int64), device)
    options["offsets"] = upload(torch.tensor([child.num_tokens for child in children], dtype=torch.int64), device)
    return options

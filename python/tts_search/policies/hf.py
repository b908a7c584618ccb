"""A policy over a causal language model of transformers: it grows the branches of a search over a KV forest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch

from tts_search.errors import require
from tts_search.models.branches import TokenBranch
from tts_search.models.decoder import KvDtype
from tts_search.models.endings import Endings
from tts_search.models.generation import DrawOptions, SampledStreams
from tts_search.models.graphs import decode_graphs
from tts_search.models.likelihood import PromptStream, PromptStreams
from tts_search.models.meter import Meter
from tts_search.models.pool import BranchPool
from tts_search.models.sizing import pool_for
from tts_search.models.streams import Lane
from tts_search.models.texts import Detokenizer, GrowingText, Stops, TextStream
from tts_search.policies.jobs import SampledProblem, SampleJob, SampleStream, StepStream, fault_of
from tts_search.policies.prompt import continuation_ids, prompt_of, text_ids
from tts_search.search.checks import unused
from tts_search.search.protocol import Expand, Generate, Load, Usage, answers_of
from tts_search.search.types import Messages, Step

if TYPE_CHECKING:
    from tts_search.models.decoder import Decoder, DecoderKind

__all__ = ["HFPolicy"]


class HFPolicy:
    r"""Samples steps from a causal language model of transformers.

    The prompt of a problem is read once. Its branches share the KV of the prompt and of common steps in a
    :class:`tts_kernels.KVForest`. All branches of all problems in flight decode in one packed batch. A branch joins the
    batch at any token, and leaves it when its step ends.

    A step ends at the first token after which the step's text contains the delimiter. (If the delimiter is white space,
    other text must come before it.) The step's text is the generated text, including the whole last token: a token
    ``".\n\n"`` ends a step in ``".\n\n"``, a token ``"\n\n\n"`` in ``"\n\n\n"``, and ``"\n"``, ``"\n"`` end one
    together. Special tokens give no text. A step that reaches its token limit is cut at a whole character. A step that
    reaches the end of the context ends its branch.

    Parameters
    ----------
    path_or_id : str
        Folder or hub id of a checkpoint: config, safetensors weights, fast tokenizer, and a chat template if it has
        one. Without a template, the prompt is the system prompt and the problem, each followed by a blank line. Or a
        GGUF file of a model of the Llama family, ``"model.gguf"``, which contains all of this. Or a LoRA adapter of
        peft for a model of the lean decoder's families, which is merged into that model's weights.
    system_prompt : str or None
        The system message before the problem; by default none.
    dtype : torch.dtype or str or None
        The dtype of weights and KV cache, such as ``torch.bfloat16`` or ``"bfloat16"``; by default the checkpoint's.
    device : torch.device or str or None
        By default a GPU if there is one, else the CPU.
    kv_memory : int or str or None
        Size of the KV pool: bytes or text such as ``"2GiB"``. By default room for 64 sequences of full length, at most
        a quarter of the free memory. If a search needs more, branches give up their KV, first idle ones, then the
        youngest. They read their tokens again when it is their turn.
    kv_dtype : str or None
        ``"int8"`` and ``"int4"`` store keys and values in 8 or 4 bits, with a scale for each head of a token. They take
        about a half and 0.28 of bfloat16's bytes, so the pool has room for more tokens. ``"int4-channel"``,
        ``"int3-channel"``, ``"int2-channel"`` store blocks of 128 tokens, with a scale for each channel of the keys.
        ``"xquant-8"``, ``-4``, ``-3``, ``-2`` and ``"xquant-cl-4"``, ``-3``, ``-2`` store the inputs of the layers in
        this many bits. The channel and xquant kinds make keys and values again in every forward (models of the lean
        decoder).
        ``"fp8"``, on a GPU, stores each element in a byte, without a scale. By default the dtype of the model.
    decoder : {"auto", "lean", "transformers"}
        The code that runs the model. By default the lean decoder for the model families that it knows, and for all
        others the model's own modules in transformers with attention over the forest. The other two values require one
        of these.
    quantize : {"int8", "int4"} or None
        Quantise the weights of a model of the lean decoder while it is loaded: to 8 bits with one scale for each row,
        or to 4 bits with one scale for 32 columns. Other models are refused. Weights that already have few bits in
        their file keep them.
    chat : bool
        False: a problem is a whole prompt, rendered by the caller, and is not changed.
    self_test : bool
        Whether, at loading, a few tokens are computed both by the decoder and by the model's own eager attention. If
        the results differ, the model is refused.

    Raises
    ------
    MissingExtraError
        Without transformers.
    ValueError
        If the model cannot run over a forest, ``kv_memory`` is no size, or ``"lean"``, ``quantize`` or ``kv_dtype`` is
        not possible.

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
        kv_dtype: KvDtype | None = None,
        decoder: DecoderKind = "auto",
        quantize: Literal["int8", "int4"] | None = None,
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
        self._eos = adapter.eos_tokens(path_or_id, self.tokenizer)
        model = load_decoder(
            path_or_id, dtype=dtype, device=device, decoder=decoder, self_test=self_test, quantize=quantize
        )
        pool = pool_for(model, kv_memory, kv_dtype=kv_dtype)
        self._lane = Lane(model, BranchPool(pool, graphs=decode_graphs(model, pool)))
        self._generation = SampledStreams(self._lane)
        self._problems: dict[int, SampledProblem] = {}
        self._ending = lru_cache(64)(self._new_ending)
        self._jobs: dict[SampleJob, None] = {}
        self._answered: list[SampleJob] = []
        self._news: dict[SampleStream, None] = {}  # samples with something new to report
        self._prompts = PromptStreams(self._lane)
        self._told: dict[PromptStream, SampleJob] = {}  # prompts whose tokens are reported on

    @property
    def max_rows(self) -> int:
        """The largest number of steps and texts that grow at a time; others wait for their turn."""
        return self._generation.most

    @max_rows.setter
    def max_rows(self, most: int) -> None:
        self._generation.most = most

    @property
    def load(self) -> Load:
        """How busy the model is."""
        pool, generation = self._pool, self._generation
        return Load(
            generation.num_drawn,
            generation.num_running,
            generation.most,
            pool.taken_tokens,
            pool.pool_tokens,
            generation.num_waiting,
            self._lane.waves,
        )

    @property
    def token_flops(self) -> float:
        """Floating-point operations for one token."""
        return self.decoder.shape.flops(1, 0, 1)

    @property
    def prefix_cache(self) -> bool:
        """Whether released KV is kept until its room is needed, for other texts that begin with the same tokens."""
        return self._pool.prefix_cache

    @prefix_cache.setter
    def prefix_cache(self, wanted: bool) -> None:
        self._pool.prefix_cache = wanted

    @property
    def decoder(self) -> Decoder:
        """The model that samples."""
        return self._lane.decoder

    @property
    def _pool(self) -> BranchPool:
        return self._lane.pool

    def begin(self, problem: int, text: str | Messages) -> None:
        """Announce a problem. Its prompt is read with the first step.

        Raises
        ------
        ValueError
            If the number belongs to a problem in flight.
        """
        unused(problem, self._problems, self)
        tokens = self.prompt_tokens(text)
        root = TokenBranch(Meter(), tokens=tokens, given=len(tokens))
        self._problems[problem] = SampledProblem(root)

    def expand(self, requests: Sequence[Expand]) -> list[list[Step] | Exception]:
        """Sample one step for each child of each request.

        The answer to a request is an exception if its prompt or its branch does not fit the model's context or the KV
        pool, or if the model gives no finite logits for it.
        """
        return answers_of(self, requests)

    def submit(self, requests: Sequence[Expand | Generate]) -> None:
        """Take requests in: their children join the branches that decode at the next token.

        A policy takes :class:`~tts_search.search.protocol.Expand`, which belongs to a problem that has begun, and
        :class:`~tts_search.search.protocol.Generate`, which belongs to no problem.
        """
        for request in requests:
            job = self._generate(request) if isinstance(request, Generate) else self._expand(request)
            self._jobs[job] = None
            if job.error is None and job.children and job.children[0].limit > 0:
                job.running = set(job.children)
                if isinstance(request, Generate) and request.params.prompt_logprobs is not None:
                    self._told[self._prompts.submit(job.parent, request.params.prompt_logprobs)] = job
                else:
                    self._generation.submit(job.parent, job.children)
            else:
                self._answered.append(job)

    def step(self) -> list[tuple[Expand | Generate, Any]]:
        """Decode one token of each branch in the batch; return the requests that have news.

        For an `Expand` the news are its steps, or an exception, as from `expand`. For a `Generate` they are parts of
        samples.
        """
        for prompt in self._prompts.step():
            self._go_on(self._told.pop(prompt), prompt)
        for child in self._generation.step():
            assert isinstance(child, (StepStream, SampleStream))
            self._end(child.job, child)
        told: list[tuple[Expand | Generate, Any]] = [(one.job.request, one.tell()) for one in self._news]
        self._news.clear()
        answered, self._answered = self._answered, []
        for job in answered:
            del self._jobs[job]
            answer = self._finish(job)
            if answer is not None:
                told.append((job.request, answer))
        return told

    def cancel(self, problem: int) -> None:
        """Forget the unanswered requests of a problem."""
        self.withdraw([job.request for job in self._jobs if job.request.problem == problem])

    def withdraw(self, requests: Sequence[Expand | Generate]) -> int:
        """Forget unanswered requests; return how many tokens were sampled for them."""
        gone = set(map(id, requests))
        jobs = [job for job in self._jobs if id(job.request) in gone]
        for job in jobs:
            self._stop(job)
            self._forget(job)
            del self._jobs[job]
        self._answered = [job for job in self._answered if job in self._jobs]
        for sample in [sample for sample in self._news if sample.job not in self._jobs]:
            del self._news[sample]
        return sum(child.num_tokens for job in jobs for child in job.children)

    def release(self, problem: int, branches: Sequence[int]) -> None:
        """Forget branches. Their children keep the KV that they share with them."""
        self._pool.release(self._problems[problem].known.drop(branches))

    def usage(self, problem: int) -> Usage:
        """Return the cost of a problem so far. Tokens of steps that have not ended are not included."""
        state = self._problems[problem]
        return self._pool.usage(state.root.meter, state.sampled)

    def end(self, problem: int) -> Usage:
        """Forget what is left of a problem, and return its cost."""
        self.cancel(problem)
        self._pool.close(self._problems[problem].root.meter)
        usage = self.usage(problem)
        del self._problems[problem]
        return usage

    def _prompt(self, text: str | Messages) -> str:
        if self.chat:
            return prompt_of(text, self.system_prompt, self.tokenizer)
        if not isinstance(text, str):
            raise TypeError("problem: an HFPolicy with chat=False takes a whole prompt, got messages")
        return text

    def prompt_tokens(self, text: str | Messages) -> list[int]:
        """Return the tokens of the prompt, after which answers to a problem are sampled.

        The tokenizer adds special tokens at the beginning, unless the prompt was rendered with them.

        Raises
        ------
        TypeError
            For messages, if the policy takes whole prompts.
        """
        prompt = self._prompt(text)
        return text_ids(prompt, self.tokenizer, special=self.chat and self.tokenizer.chat_template is None)

    def _plain(self, text: str) -> list[int]:
        return text_ids(text, self.tokenizer, special=False)

    def _expand(self, request: Expand) -> SampleJob:
        """The job of a request for children, or its error."""
        state, params = self._problems[request.problem], request.params
        job = SampleJob(request, state, self._parent(state, request))
        limit = self._limit(job, params.max_tokens)
        stops = Stops((params.delimiter,) if params.delimiter else (), self._eos, self._eos, "token")
        text = Detokenizer(self._decode, job.parent.path)
        sampling = DrawOptions(params.temperature, params.top_p, params.top_k)
        ending = self._ending(stops.texts, stops.tokens)
        job.children = [
            StepStream(job.branch(), seed, limit, sampling, ending, text, stops, job) for seed in request.seeds
        ]
        return job

    def _generate(self, request: Generate) -> SampleJob:
        """The job of a request for text after any tokens. These tokens become a problem of their own."""
        params, tokens = request.params, list(request.tokens)
        root = TokenBranch(Meter(), tokens=tokens, given=len(tokens))
        job = SampleJob(request, SampledProblem(root), root)
        limit = self._limit(job, params.max_tokens)
        if fault := fault_of(request, len(self.tokenizer)):
            job.error = ValueError(fault)
            return job
        eos = frozenset() if params.ignore_eos else self._eos
        stops = Stops(params.stop, eos.union(params.stop_ids), eos, "stop" if params.keep_stop else "nothing")
        sampling = DrawOptions(params.temperature, params.top_p, params.top_k, params.min_p)
        ending = self._ending(stops.texts, stops.tokens)
        for number, seed in enumerate(request.seeds):
            text = GrowingText(self._decode, root.path)
            sample = SampleStream(job.branch(), seed, limit, sampling, ending, text, stops, job, number, self._news)
            if params.stream or params.logprobs is not None or params.logprobs_of or params.min_tokens:
                sample.pace = 1
            sample.num_top, sample.wanted = params.logprobs or 0, params.logprobs_of
            if params.min_tokens:
                sample.free_after = params.min_tokens
                sample.barred = tuple(token for token in stops.tokens if token < len(self.tokenizer))
            job.children.append(sample)
        return job

    def _limit(self, job: SampleJob, wanted: int | None) -> int:
        """The largest number of tokens of a child; sets the job's error if the prompt leaves no room for any."""
        longest = self.decoder.shape.max_length
        room = longest - job.parent.length
        if not job.parent.length:
            job.error = ValueError("the prompt has no tokens")
        elif room <= 0 and job.parent is job.state.root:
            job.error = ValueError(
                f"the prompt of {job.parent.length} tokens leaves no room in the model's context of {longest} tokens"
            )
        return room if wanted is None else min(wanted, room)

    def _parent(self, state: SampledProblem, request: Expand) -> TokenBranch:
        """The branch to continue: one that this policy made, extended by the part of the steps' text that it lacks."""
        text = "".join(request.steps)
        start, base = state.known.longest(request.branch, text)
        if start == text:
            return base
        tokens = continuation_ids(base.path(), text[len(start) :], self._plain, self._decode_all)
        branch = TokenBranch(state.root.meter, base, base.length, tokens, given=len(tokens))
        state.known.put(request.branch, text, branch)
        return branch

    def _end(self, job: SampleJob, child: TextStream) -> None:
        """Handle a child that ended or failed. After the last child, or the first that failed, answer the request."""
        if child not in job.running:  # it failed together with another one
            return
        job.running.remove(child)
        job.state.sampled += child.num_tokens
        if child.error is not None and job.error is None:
            job.error = child.error
            self._stop(job)
        if not job.running:
            self._answered.append(job)

    def _go_on(self, job: SampleJob, prompt: PromptStream) -> None:
        """The prompt of a request was read, or failed: start sampling after it."""
        if prompt.error is None and not all(math.isfinite(value) for value, _ in prompt.told):
            prompt.error = FloatingPointError("the model gave no finite logits")
        if prompt.error is not None:
            job.error = prompt.error
            self._stop(job)
            self._answered.append(job)
            return
        first = job.children[0]
        assert isinstance(first, SampleStream)
        first.part = replace(first.part, prompt=tuple(prompt.told))
        self._generation.submit(job.parent, job.children)

    def _stop(self, job: SampleJob) -> None:
        """Stop sampling for a request."""
        gone = [prompt for prompt, other in self._told.items() if other is job]
        self._prompts.cancel(gone)
        for prompt in gone:
            del self._told[prompt]
        self._generation.cancel(job.running)
        job.state.sampled += sum(child.num_tokens for child in job.running)
        job.running = set()

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.backend_tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _decode_all(self, tokens: Sequence[int]) -> str:
        """The text of tokens, including special tokens."""
        text: str = self.tokenizer.backend_tokenizer.decode(tokens, skip_special_tokens=False)
        return text

    def _new_ending(self, texts: tuple[str, ...], tokens: frozenset[int]) -> Endings:
        return Endings(texts, tokens, self._decode, self._plain("a"))

    def _finish(self, job: SampleJob) -> list[Step] | Exception | None:
        """The answer to a request; its branches become known. None: everything has been reported."""
        if job.error is not None or isinstance(job.request, Generate):
            self._forget(job)
            return job.error
        steps: list[Step] = []
        for number, child in zip(job.request.children, job.children, strict=True):
            assert isinstance(child, StepStream)
            step = child.step
            steps.append(step)
            if child.kept is not None:
                self._pool.trim(child.branch, child.kept)
            if step.finished:
                self._pool.release([child.branch])
            else:
                self._pool.hold(child.branch)  # the token of a one-token step was never forwarded
                job.state.known.put(number, "".join(job.request.steps) + step.text, child.branch)
        return steps

    def _forget(self, job: SampleJob) -> None:
        """Remove all that is left of a request."""
        self._pool.release(child.branch for child in job.children)
        if isinstance(job.request, Generate):
            self._pool.close(job.state.root.meter)

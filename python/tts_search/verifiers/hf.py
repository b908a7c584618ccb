"""A verifier over a process reward model of transformers: it reads each token of a search once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Literal

import torch

import tts_kernels as tk
from tts_search.errors import require
from tts_search.models.branches import TokenBranch
from tts_search.models.decoder import KvDtype
from tts_search.models.meter import Meter
from tts_search.models.pool import MAX_FORWARD_TOKENS, BranchPool
from tts_search.models.streams import Stream
from tts_search.search.checks import unused
from tts_search.search.protocol import Score, ScoreAndPrune, Scored, Usage, answers_of
from tts_search.search.voting import aggregate
from tts_search.verifiers.formats import VerifierFormat, each_token, format_of
from tts_search.verifiers.heads import lm_head, load_head
from tts_search.verifiers.jobs import Contest, HeadScorer
from tts_search.verifiers.judge import JudgeScorer
from tts_search.verifiers.lanes import load_lane
from tts_search.verifiers.log_ratio import Likelihood, LogRatioScorer
from tts_search.verifiers.memory import ScoreMemory, keys_of
from tts_search.verifiers.reader import Reader, TokenReader
from tts_search.verifiers.writer import KnownTexts, ScoreJob, Writer, known_texts

if TYPE_CHECKING:
    from tts_search.models.checkpoint import Checkpoint
    from tts_search.models.decoder import Decoder, DecoderKind

__all__ = ["HFVerifier"]

_CONTINUED: Final = {"last", "min", "max"}  # aggregates that can be continued from a float without rounding


class HFVerifier:
    """Scores steps with a discriminative process reward model, or any language model that is asked about them.

    Candidates share a :class:`tts_kernels.KVForest`, which belongs to the verifier and has the same branches as the
    policy's. A candidate costs only the tokens of its new step and its boundary, regardless of the length before it.
    Hidden states are computed only where a step is scored, and there are no logits: the head is a
    :class:`tts_kernels.ScoreHead`.

    The score of a step is that of the text up to its boundary. If following text changes how the tokenizer encodes the
    text before a boundary, the changed tokens are removed and read again, so the result is that of encoding the whole
    text. If a problem or a step contains the text of special tokens or boundaries, a space breaks this text up. So a
    solution cannot write the boundary at which it is scored.

    Weights are read from safetensors. (A head may have a ``.pt`` file that contains only tensors.) No code that comes
    with a checkpoint is run.

    Parameters
    ----------
    path_or_id : str
        Folder or hub id of a checkpoint: config, safetensors weights, fast tokenizer. Or a GGUF file of a model of the
        Llama family.
    format : str or VerifierFormat or dict
        A name in ``FORMATS``, a :class:`~tts_search.verifiers.VerifierFormat`, or such an entry as a dict. By default
        it is found from the checkpoint: its config's ``"tts_verifier"``, or a format that knows its name, or its
        architecture and the tensors of its head.
    head : ScoreHead or None
        Use this head instead of the format's.
    dtype, device, kv_memory, kv_dtype, decoder, self_test, quantize
        As in :class:`~tts_search.HFPolicy`. (``kv_memory`` is for each of two models with a ``log_ratio`` format.)
    reference : str or None
        Folder or hub id of the reference model of a ``log_ratio`` format; by default the one that the format names.
    batch_tokens : int
        The largest number of tokens in one forward.
    every_token : bool
        Score each token of a text, not steps, by the format's head, as a server without a step format does
        (``tts-search serve --pooling tokens``). Such a verifier cannot be used in a search.

    Raises
    ------
    MissingExtraError
        Without transformers.
    ValueError
        If no format is found, a label is not one token, a tensor of the head is missing, or the model cannot run over a
        forest; if tokens are to be scored by a head that does not classify them.

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
        kv_dtype: KvDtype | None = None,
        decoder: DecoderKind = "auto",
        quantize: Literal["int8", "int4"] | None = None,
        reference: str | None = None,
        batch_tokens: int = MAX_FORWARD_TOKENS,
        every_token: bool = False,
        self_test: bool = True,
    ) -> None:
        require("transformers", "search")
        from tts_search.models import transformers as adapter
        from tts_search.models.formats.opening import open_checkpoint

        if not isinstance(batch_tokens, int) or batch_tokens < 1:
            raise ValueError(f"batch_tokens: expected an int of at least 1, got {batch_tokens!r}")
        config, checkpoint = adapter.load_config(path_or_id), open_checkpoint(path_or_id)
        entry = format_of(format, config, path_or_id, checkpoint.names)
        self.format = entry = each_token(entry) if every_token else entry
        self.tokenizer = adapter.load_tokenizer(path_or_id)
        self._reader = (TokenReader if entry.score_at == "token" else Reader)(self.tokenizer, entry)
        options: dict[str, Any] = {
            "dtype": dtype,
            "device": device,
            "kv_memory": kv_memory,
            "kv_dtype": kv_dtype,
            "decoder": decoder,
            "self_test": self_test,
            "quantize": quantize,
        }
        self._lane = load_lane(path_or_id, entry.judge is not None, batch_tokens, **options)
        self.head: tk.ScoreHead | None = None
        self._scorer: HeadScorer | LogRatioScorer
        if entry.head == "log_ratio" and head is None:
            self._scorer = self._log_ratio(checkpoint, config, reference, batch_tokens, options)
        else:
            head = load_head(entry, checkpoint, config, self.tokenizer) if head is None else head
            self.head = head.to(self.decoder.device)
            if entry.judge is None:
                self._scorer = HeadScorer(self._lane, self.head)
            else:
                eos = adapter.eos_tokens(path_or_id, self.tokenizer)
                self._scorer = JudgeScorer(self._lane, self.head, self._reader, entry.judge, eos)
        self._writer = Writer(self._reader, entry, self.decoder.shape.max_length)
        self._problems: dict[int, KnownTexts] = {}
        self._asked: dict[_Asked, None] = {}
        self._owners: dict[Stream, list[ScoreJob]] = {}  # the jobs that wait for a stream
        self._memory: ScoreMemory | None = None

    @property
    def prefix_cache(self) -> bool:
        """Whether released KV is kept until its room is needed, for other texts that begin with the same tokens.

        Scores are kept, too. A text that extends one that was read costs only its new steps.
        """
        return self._pool.prefix_cache

    @prefix_cache.setter
    def prefix_cache(self, wanted: bool) -> None:
        self._pool.prefix_cache = wanted
        if not self._pool.prefix_cache or not isinstance(self._scorer, HeadScorer):
            self._memory = None  # a ratio is a sum over all tokens, so its score needs the states of the whole text
        elif self._memory is None:
            self._memory = ScoreMemory()

    @property
    def decoder(self) -> Decoder:
        """The model that reads."""
        return self._lane.decoder

    @property
    def _pool(self) -> BranchPool:
        return self._lane.pool

    def parsed(self, text: str | Sequence[int]) -> tuple[str, tuple[str, ...]]:
        """The problem and the steps of a whole text, or of its tokens, in the verifier's format.

        A text is encoded with the special tokens that the tokenizer adds before it.

        Raises
        ------
        ValueError
            If the text is not in the format, or the format has no mark after each step.
        """
        tokens = self.tokenizer(text)["input_ids"] if isinstance(text, str) else text
        return self._reader.parsed(tokens)

    def begin(self, problem: int, text: str) -> None:
        """Announce a problem. It is read with the first step.

        Raises
        ------
        ValueError
            If the number belongs to a problem in flight.
        """
        unused(problem, self._problems, self)
        tokens, tail = self._reader.prompt(text)
        root = TokenBranch(Meter(), tokens=tokens, given=len(tokens))
        self._problems[problem] = known_texts(root, tail)
        self._scorer.begin(root)

    def score(self, requests: Sequence[Score]) -> list[list[float] | Exception]:
        """Score the steps of each request that were not scored before.

        The answer to a request is an exception if its text does not fit the model's context or the KV pool.
        """
        return answers_of(self, requests)

    def score_and_prune(self, requests: Sequence[ScoreAndPrune]) -> list[Scored | Exception]:
        """Score candidates as `score` does, and find the best of each group in the same call of the head.

        Scores with an aggregate that can be continued without rounding ("last", "min", "max") are pruned by
        :func:`tts_kernels.score_and_prune`. With other aggregates the caller finds the survivors.
        """
        return answers_of(self, requests)

    def submit(self, requests: Sequence[Score | ScoreAndPrune]) -> None:
        """Take requests in. Their texts are read from the next forward on."""
        for request in requests:
            candidates = request.candidates if isinstance(request, ScoreAndPrune) else (request,)
            jobs = {
                number: self._writer.write(each, self._problems[each.problem])
                for number, each in enumerate(candidates)
                if isinstance(each, Score)
            }
            self._asked[_Asked(request, jobs)] = None
            for job in jobs.values():
                if self._memory is not None and isinstance(request, Score):
                    self._recall(job, self._memory)
                if job.error is None:
                    job.stages = self._scorer.stages(job)
                    self._proceed(job)

    def step(self) -> list[tuple[Score | ScoreAndPrune, Any]]:
        """Run one forward. Return the requests with their answers, as from `score` and `score_and_prune`."""
        for stream in self._scorer.step():
            for job in self._owners.pop(stream):
                job.waiting.discard(stream)
                if stream.error is not None:
                    job.error = job.error or stream.error
                    self._stop(job)
                elif not job.waiting:
                    self._proceed(job)
        ripe = [asked for asked in self._asked if not any(job.waiting for job in asked.jobs.values())]
        for asked in ripe:
            del self._asked[asked]
        return self._answered(ripe)

    def cancel(self, problem: int) -> None:
        """Forget the unanswered requests of a problem."""
        for asked in [asked for asked in self._asked if asked.request.problem == problem]:
            for job in asked.jobs.values():
                self._stop(job)
                self._release([*job.questions, *job.chain])
            del self._asked[asked]

    def _proceed(self, job: ScoreJob) -> None:
        """Let a job continue until a stage for which it has to wait."""
        assert job.stages is not None
        for streams in job.stages:
            job.waiting = set(streams)
            for stream in streams:
                self._owners.setdefault(stream, []).append(job)
            if streams:
                return

    def _stop(self, job: ScoreJob) -> None:
        """Stop reading for a job."""
        gone = []
        for stream in job.waiting:
            self._owners[stream].remove(job)
            if not self._owners[stream]:
                del self._owners[stream]
                gone.append(stream)
        self._scorer.cancel(gone)
        job.waiting = set()
        if job.stages is not None:
            job.stages.close()

    def _answered(self, ripe: Sequence[_Asked]) -> list[tuple[Score | ScoreAndPrune, Any]]:
        """The answers to requests for which everything has been read."""
        contests: dict[str, list[_Asked]] = {}
        for asked in ripe:
            if isinstance(asked.request, ScoreAndPrune) and asked.request.how in _CONTINUED:
                contests.setdefault(asked.request.how, []).append(asked)
        survivors: dict[_Asked, list[list[int]]] = {}
        if type(self._scorer) is HeadScorer:
            for rounds in contests.values():
                survivors |= zip(rounds, self._prune(self._scorer, rounds), strict=True)
        rest = [job for asked in ripe if asked not in survivors for job in asked.jobs.values()]
        if rest:
            self._scorer.score(rest)
        answers = []
        for asked in ripe:
            found = [self._finish(job) for job in asked.jobs.values()]
            is_round = isinstance(asked.request, ScoreAndPrune)
            answers.append((asked.request, Scored(found, survivors.get(asked)) if is_round else found[0]))
        return answers

    @staticmethod
    def _prune(scorer: HeadScorer, rounds: Sequence[_Asked]) -> list[list[list[int]]]:
        """Score what was read for rounds; the survivors of each one's groups, as indices of its candidates."""
        contest = Contest(rounds[0].round.how)
        numbers: list[int] = []  # for each candidate in the contest: its index in its request
        for asked in rounds:
            request = asked.round
            rest = set(range(len(request.candidates))).difference(*request.groups)
            for group, keep in zip((*request.groups, sorted(rest)), (*request.keep, 0), strict=True):
                contest.sizes.append(len(group))
                contest.keep.append(keep)
                for number in group:
                    numbers.append(number)
                    candidate = request.candidates[number]
                    if isinstance(candidate, Score):
                        job = asked.jobs[number]
                        contest.places.append(job.places)
                        contest.prior.append(-math.inf if job.error else aggregate(job.base.scores, request.how))
                    else:
                        contest.places.append([])
                        contest.prior.append(candidate)
        best = iter(scorer.score_and_prune([job for asked in rounds for job in asked.jobs.values()], contest))
        groups = [list(islice(best, len(asked.round.groups) + 1))[:-1] for asked in rounds]
        return [[[numbers[entry] for entry in group] for group in own] for own in groups]

    def release(self, problem: int, branches: Sequence[int]) -> None:
        """Forget branches. Their children keep the KV that they share with them."""
        self._release([text.branch for text in self._problems[problem].drop(branches)])

    def usage(self, problem: int) -> Usage:
        """Return the cost of a problem so far."""
        root = self._problems[problem].root.branch
        return self._pool.usage(root.meter) + self._scorer.usage(root)

    def end(self, problem: int) -> Usage:
        """Forget what is left of a problem, and return its cost."""
        self.cancel(problem)
        root = self._problems.pop(problem).root.branch
        self._pool.close(root.meter)
        return self._pool.usage(root.meter) + self._scorer.end(root)

    def _release(self, branches: Sequence[TokenBranch]) -> None:
        self._pool.release(branches)
        self._scorer.release(branches)

    def _log_ratio(
        self, checkpoint: Checkpoint, config: Any, reference: str | None, batch_tokens: int, options: dict[str, Any]
    ) -> LogRatioScorer:
        """The scorer of two models, each with the whole weight of its LM head."""
        from tts_search.models import transformers as adapter
        from tts_search.models.formats.opening import open_checkpoint

        entry = self.format
        reference = reference or entry.reference
        if reference is None:
            raise ValueError(f"reference: format {entry.name!r} needs a reference model, and names none")
        other = Likelihood(
            load_lane(reference, False, batch_tokens, **options),
            lm_head(entry, open_checkpoint(reference), adapter.load_config(reference)),
        )
        return LogRatioScorer(Likelihood(self._lane, lm_head(entry, checkpoint, config)), other, entry.beta)

    def _recall(self, job: ScoreJob, memory: ScoreMemory) -> None:
        """Fill in the known scores of a job's first steps, so that nothing is read only for them."""
        if job.error is not None:
            return
        job.keys = keys_of(job.places)
        for place in job.places:
            score = memory.get(job.keys[place])
            if score is None:
                break
            job.found[place] = score
        wanted = {branch for branch, _ in job.places[len(job.found) :]}
        for branch, position in job.found:
            if branch not in wanted:
                job.settled.add(branch)
                self._pool.skip(branch)
            elif branch.marks:
                branch.marks.remove(position)

    def _finish(self, job: ScoreJob) -> list[float] | Exception:
        """The answer to a request. Of the branches that it added to the tree, only the one that it names stays."""
        if job.error is not None:
            self._release([*job.questions, *job.chain])
            return job.error
        if self._memory is not None:
            for place, key in job.keys.items():
                self._memory.put(key, job.found[place])
        scores = job.base.scores + [job.found[place] for place in job.places]
        job.text.scores = scores[: len(job.request.steps)]
        before = self._problems[job.request.problem].put(job.request.branch, job.request.steps, job.text)
        gone = job.chain if before is None else [before.branch, *job.chain]
        self._release([branch for branch in gone if branch is not job.text.branch])
        return scores


@dataclass(slots=True, eq=False)
class _Asked:
    """A request in progress, and the jobs of its candidates by their numbers."""

    request: Score | ScoreAndPrune
    jobs: dict[int, ScoreJob]

    @property
    def round(self) -> ScoreAndPrune:
        """The request, which must be one of a round."""
        assert isinstance(self.request, ScoreAndPrune)
        return self.request

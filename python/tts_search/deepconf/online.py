"""DeepConf online: traces that become unsure are stopped early, and the others vote by their confidence.

Fu et al., "Deep Think with Confidence" (arXiv 2508.15260), algorithm 2 and its public code. The rules are in
:mod:`tts_search.deepconf.confidence`; this module is their loop over the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tts_search.deepconf.confidence import WINDOW, Stopping, tally, token_confidence, trace_confidence
from tts_search.engine.engine import Engine, Generation, default_equality
from tts_search.search.answers import Equality, boxed
from tts_search.search.protocol import Generate, Generated, GenerateParams
from tts_search.search.seeds import Seeds
from tts_search.search.types import Messages, StepParams

if TYPE_CHECKING:
    from tts_search.policies.hf import HFPolicy

__all__ = ["DeepConfResult", "Trace", "deepconf"]


@dataclass(frozen=True, slots=True)
class Trace:
    """A whole text, or as much of it as was written.

    Attributes
    ----------
    text : str
    answer : str
        What ``extract_answer`` found; empty if nothing.
    confidences : tuple of float
        The confidence of each token.
    confidence : float
        The confidence of the least sure window.
    stopped : bool
        Whether the trace was stopped early.
    """

    text: str
    answer: str
    confidences: tuple[float, ...]
    confidence: float
    stopped: bool


@dataclass(frozen=True, slots=True)
class DeepConfResult:
    """The result of DeepConf.

    Attributes
    ----------
    answer : str
        The answer with the largest sum of confidences; empty if no trace that may vote has one.
    agreement : float
        Its share of the voters' confidence; 0 without voters.
    threshold : float
        A trace is stopped when a window's confidence is below this.
    warm_up, traces : tuple of Trace
        In the order of their seeds; without traces that were not needed any more because the voters agreed.
    """

    answer: str
    agreement: float
    threshold: float
    warm_up: tuple[Trace, ...]
    traces: tuple[Trace, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all these traces."""
        return sum(len(trace.confidences) for trace in (*self.warm_up, *self.traces))


def deepconf(
    problem: str | Messages,
    policy: HFPolicy,
    *,
    n: int = 64,
    warm_up: int = 16,
    keep: float = 0.1,
    consensus: float = 0.95,
    top: int = 20,
    window: int = WINDOW,
    params: StepParams = StepParams(temperature=0.6, top_p=0.95, max_tokens=32768, delimiter=None),  # noqa: B008
    seed: int = 0,
    extract_answer: Callable[[str], str | None] = boxed,
    equal: Equality | None = None,
) -> DeepConfResult:
    """Answer a problem by many traces, of which the unsure ones are stopped early.

    First `warm_up` whole traces are written. They set the threshold: see
    :class:`~tts_search.deepconf.confidence.Stopping`. Then the other traces are written at the same time, and each is
    stopped as soon as a window is below the threshold. All whole traces whose least sure window reaches the threshold
    vote, weighted by the confidence of that window. When the leading answer has the share `consensus` of the weight,
    the traces that still run are cancelled.

    Parameters
    ----------
    problem : str or list of dict
        Its text, or messages.
    policy : HFPolicy
        A local policy, since it reports the likeliest tokens at each place. Nothing else may use it meanwhile.
    n : int
        The number of traces, including the warm-up.
    warm_up : int
        Whole traces that set the threshold, at most `n`; the paper draws 16.
    keep : float
        The share of the warm-up traces that reach the threshold, in (0, 1]: 0.1 is DeepConf-low, 0.9 DeepConf-high.
    consensus : float
        In (0, 1]. With 1 the search ends early only if all voters agree.
    top : int
        How many likeliest tokens a token's confidence is the mean of, 1 to 128.
    window : int
        Tokens of a window; a trace is not stopped before it has this many.
    params : StepParams
        How a trace is sampled; its delimiter must be None.
    seed : int
        Fixes every draw. Timing may decide which traces a consensus cancels, but never their texts.
    extract_answer, equal : callable
        As :func:`tts_search.search` takes them.

    Raises
    ------
    SearchError
        If a trace cannot be generated: the first such error.
    TypeError
        For another policy.
    ValueError
        For an argument out of its range.

    Notes
    -----
    Each token takes O(V) more for the likeliest tokens, a few percent of a decode step on a CPU, and O(window) for the
    mean.
    """
    if not hasattr(policy, "prompt_tokens"):
        raise TypeError(f"policy: expected an HFPolicy, which tells the likeliest tokens, got {type(policy).__name__}")
    if not 1 <= warm_up <= n:
        raise ValueError(f"warm_up: expected 1 to n = {n}, got {warm_up!r}")
    if not 0 < consensus <= 1:
        raise ValueError(f"consensus: expected a share in (0, 1], got {consensus!r}")
    if not 1 <= top <= 128:
        raise ValueError(f"top: expected 1 to 128, got {top!r}")
    if params.delimiter is not None:
        raise ValueError(f"params: expected no delimiter, got {params.delimiter!r}")
    equal = equal or default_equality()
    tokens, seeds = tuple(policy.prompt_tokens(problem)), Seeds(seed, str(problem))
    how = GenerateParams(
        params.temperature, params.top_p, params.top_k, max_tokens=params.max_tokens, logprobs=top, stream=True
    )

    def follow(generation: Generation, stopping: Stopping | None) -> Trace:
        parts: list[Generated] = []
        sure: list[float] = []
        stopped = False
        for part in generation.events():
            parts.append(part)
            for place in part.top:
                sure.append(token_confidence(place))
                stopped = stopped or (stopping is not None and stopping.stops(sure))
            if stopped:
                generation.cancel()
                break
        if not stopped:
            generation.result()  # raises what went wrong
        text = Generated.joined(parts).text
        return Trace(text, extract_answer(text) or "", tuple(sure), trace_confidence(sure, "min", window), stopped)

    with Engine(policy) as engine, ThreadPoolExecutor(n) as pool:

        def write(numbers: range, stopping: Stopping | None) -> Generator[tuple[int, Trace], None, None]:
            """Yield traces as they end; what is left when nobody asks any more is cancelled."""
            running = [engine.generate(Generate(tokens, how, 1, (seeds.of((number,)),))) for number in numbers]
            ends = {pool.submit(follow, one, stopping): number for one, number in zip(running, numbers, strict=True)}
            try:
                for end in as_completed(ends):
                    yield ends[end], end.result()
            finally:
                for one in running:
                    one.cancel()

        first = dict(write(range(warm_up), None))
        stopping = Stopping([trace.confidences for _, trace in sorted(first.items())], keep, window)
        later: dict[int, Trace] = {}
        answer, agreement = _vote([*first.values()], stopping.threshold, equal)
        if agreement < consensus:
            for number, trace in (ends := write(range(warm_up, n), stopping)):
                later[number] = trace
                whole = [trace for _, trace in sorted((first | later).items())]
                answer, agreement = _vote(whole, stopping.threshold, equal)
                if agreement >= consensus:
                    ends.close()
                    break
    in_order = [tuple(trace for _, trace in sorted(some.items())) for some in (first, later)]
    return DeepConfResult(answer, agreement, stopping.threshold, *in_order)


def _vote(traces: Sequence[Trace], threshold: float, equal: Equality) -> tuple[str, float]:
    """The answer of the voters, and its share of their weight."""
    voters = [trace for trace in traces if not trace.stopped and trace.confidence >= threshold]
    weights = tally([trace.answer for trace in voters], [trace.confidence for trace in voters], equal)
    answer = max(weights, key=lambda one: weights[one], default="")
    return answer, weights[answer] / (sum(weights.values()) or 1.0) if answer else 0.0

"""Counters for Prometheus. They have vLLM's names where vLLM has one, so that its dashboards and schedulers work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from tts_search.engine.engine import Handle

__all__ = ["Metrics"]

Look = Callable[[], Mapping[str, tuple[str, float]]]

_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_BETWEEN: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_WAITING: Final = (0.0001, 0.001, *_SECONDS)
_COUNTS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The counters of a server.

    Parameters
    ----------
    name : str
        The name of the model.
    look, look_back : callable
        Return the current state of the server, and the engine's own counts: texts and values by the names of gauges
        and of counters.
    """

    def __init__(self, name: str, look: Look, look_back: Look) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_LookedUp(name, look, GaugeMetricFamily))
        self._registry.register(_LookedUp(name, look_back, CounterMetricFamily))
        self._labels = {"model_name": name}
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Tokens of prompts.")
        self.cached_tokens = self._counter("vllm:prefix_cache_hits", "Tokens of prompts that were found in the cache.")
        self.queried_tokens = self._counter("vllm:prefix_cache_queries", "Tokens of prompts that were looked up.")
        self.generation_tokens = self._counter("vllm:generation_tokens", "Tokens sampled.")
        self.verifier_tokens = self._counter("tts_search:verifier_tokens", "Tokens that the verifier read.")
        self.unique_kv_tokens = self._counter(
            "tts_search:search_unique_kv_tokens", "The most KV tokens that searches held at once, each token once."
        )
        self.logical_kv_tokens = self._counter(
            "tts_search:search_logical_kv_tokens", "What these would have been without sharing."
        )
        self.searches = self._counter("tts_search:searches", "Searches that came to a result.")
        self.succeeded = Counter(
            "vllm:request_success", "Answers, by what ended them.", ["model_name", "finished_reason"],
            registry=self._registry,
        )  # fmt: skip
        self.waiting = self._histogram("vllm:request_queue_time_seconds", "Until the engine begins with it.", _WAITING)
        self.first_token = self._histogram("vllm:time_to_first_token_seconds", "Until the first token.", _SECONDS)
        self.between_tokens = self._histogram("vllm:inter_token_latency_seconds", "Between two tokens.", _BETWEEN)
        self.whole = self._histogram("vllm:e2e_request_latency_seconds", "From a request to its end.", _SECONDS)
        self.width = self._histogram("vllm:request_params_n", "Answers asked for.", _COUNTS)

    def finished(self, reason: str) -> None:
        """Count an answer by the reason why it ended."""
        self.succeeded.labels(**self._labels, finished_reason=reason).inc()

    def waited(self, handles: Iterable[Handle[Any, Any]]) -> None:
        """Count how long the engine let these wait; those that it never began with do not count."""
        for handle in handles:
            if handle.waited_s is not None:
                self.waiting.observe(handle.waited_s)

    def exposition(self) -> bytes:
        """Return all counters and gauges in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str) -> Any:
        return Counter(name, text, ["model_name"], registry=self._registry).labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Any:
        metric = Histogram(name, text, ["model_name"], registry=self._registry, buckets=buckets)
        return metric.labels(**self._labels)


class _LookedUp:
    """Gauges or counters whose values are looked up when they are read."""

    def __init__(self, name: str, look: Look, kind: type[GaugeMetricFamily] | type[CounterMetricFamily]) -> None:
        self._name = name
        self._look = look
        self._kind = kind

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges, or the counters."""
        for name, (text, value) in self._look().items():
            metric = self._kind(name, text, labels=["model_name"])
            metric.add_metric([self._name], value)
            yield metric

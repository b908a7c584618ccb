"""State that all requests share: the engine, its models, and the counters."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Request

from tts_search.serve.errors import ApiError
from tts_search.serve.metrics import Metrics
from tts_search.serve.news import Post
from tts_search.serve.settings import Settings
from tts_search.serve.texts import Texts

if TYPE_CHECKING:
    from tts_search.engine.engine import Engine
    from tts_search.search.protocol import Policy, Verifier

__all__ = ["Served", "Service"]

_SIZE = 16  # the size in the names of searches in the list of models


class Service:
    """A policy, perhaps a verifier, and the engine that runs them.

    Parameters
    ----------
    engine : Engine
        The engine over these models.
    policy, verifier : Policy, Verifier or None
        The models.
    settings : Settings
        What the server allows.

    Attributes
    ----------
    num_requests : int
        Number of requests that run or wait.
    """

    def __init__(self, engine: Engine, policy: Policy, verifier: Verifier | None, settings: Settings) -> None:
        self.engine = engine
        self.policy = policy
        self.verifier = verifier
        self.settings = settings
        self.num_requests = 0
        self.metrics = Metrics(self.name, self._activity, self._history)
        self._posts: dict[asyncio.AbstractEventLoop, Post] = {}
        self._texts = {id(model): _texts_of(model) for model in (policy, verifier)}

    @property
    def name(self) -> str:
        """The policy's name in answers."""
        return self.settings.names[0]

    @property
    def model_names(self) -> list[str]:
        """The names of models in requests: the policy, searches with it, the verifier."""
        scored = self.verifier is not None
        methods = ("beam_search", "best_of_n", "dvts") if scored else ("best_of_n",)
        searches = [f"{self.name}@{method}-{_SIZE}" for method in methods]
        return [*self.settings.names, *searches, *(self.settings.verifier_names if scored else ())]

    @property
    def texts(self) -> Texts:
        """The policy's tokenizer.

        Raises
        ------
        ApiError
            If the policy is no local model.
        """
        return self.texts_of(None)

    @property
    def post(self) -> Post:
        """The object that carries news of the engine to the running event loop; all requests in the loop share it."""
        loop = asyncio.get_running_loop()
        self._posts = {other: post for other, post in self._posts.items() if not other.is_closed()}
        return self._posts.setdefault(loop, Post(loop))

    def texts_of(self, name: str | None) -> Texts:
        """The tokenizer of the model of this name, or the policy's for None. Raises the same error as `texts`."""
        model, kind = self._model(name)
        texts = self._texts[id(model)]
        if texts is None:
            raise ApiError(501, f"the {kind} of this server is no local model: it has no tokens")
        return texts

    def max_length(self, name: str) -> int | None:
        """The context of the model of this name, if it has one."""
        texts = self._texts[id(self._model(name)[0])]
        return None if texts is None else texts.max_length

    def _model(self, name: str | None) -> tuple[Any, str]:
        if name is None or name in self.settings.names:
            return self.policy, "policy"
        if self.verifier is not None and name in self.settings.verifier_names:
            return self.verifier, "verifier"
        raise ApiError(404, f"model: expected one of {', '.join(self.model_names)}, got {name:.80}", "model")

    def _activity(self) -> dict[str, tuple[str, float]]:
        waiting, load = self.engine.num_waiting, self.engine.load
        rows = 0.0 if load is None else load.rows / load.max_rows
        kv = 0.0 if load is None else load.kv_tokens / load.max_kv_tokens
        return {
            "vllm:kv_cache_usage_perc": ("Part of the policy's KV pool that is taken, 1 being all of it.", kv),
            "tts_search:slot_use": ("Part of the rows of a forward that are sampled for, 1 being all of them.", rows),
            "vllm:num_requests_running": ("Requests that run.", max(0, self.num_requests - waiting)),
            "vllm:num_requests_waiting": ("Requests that wait.", waiting),
            "tts_search:streams": ("Steps and texts that are sampled now.", self.engine.num_streams),
        }

    def _history(self) -> dict[str, tuple[str, float]]:
        load, (used, in_vain) = self.engine.load, self.engine.speculated
        waves = 0 if load is None else load.waves
        return {
            "vllm:num_preemptions": ("Times that a text gave up its KV pages because there were no more.", waves),
            "tts_search:speculated_tokens": ("Tokens of steps that were sampled ahead.", used + in_vain),
            "tts_search:speculated_tokens_in_vain": ("Those of them that no search asked for.", in_vain),
        }

    def check_model(self, name: str | None, names: tuple[str, ...] | None = None) -> None:
        """Raise an error if a model is not served. None means the model that is."""
        names = names or self.settings.names
        if name is not None and name not in names:
            raise ApiError(404, f"model: expected one of {', '.join(names)}, got {name:.80}", "model")


def _texts_of(model: Any) -> Texts | None:
    tokenizer = getattr(model, "tokenizer", None)
    return None if tokenizer is None else Texts(tokenizer, model.decoder.shape.max_length)


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Served = Annotated[Service, Depends(_service)]

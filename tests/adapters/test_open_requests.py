"""An engine over a server with OpenAI's API: each problem at its own pace, and nothing open that nobody waits for."""

from __future__ import annotations

import random
import select
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_openai_policy import Request, Server, completion, pieces, policy_of, serve  # noqa: F401
from tts_search import Engine, SearchConfig, SearchError, TextVerifier, search, search_iter
from tts_search.engine.drivers import Lifted
from tts_search.policies import background
from tts_search.policies.openai import OpenAIPolicy

Serve = Callable[..., Server]
CONFIG = SearchConfig(n=4, expand=2, max_steps=3, max_step_tokens=8)
VERIFIER = TextVerifier(lambda branches: [[random.Random(step).random() for step in steps] for _, steps in branches])


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    background._SHARED.close()  # of those who call a policy without an engine
    left = {thread for thread in threading.enumerate() if thread.name.startswith("tts_search")} - before
    assert not left


def answer(body: dict[str, Any], to: Request) -> None:
    """A step for each sample, by the prompt and the seed alone."""
    rng = random.Random(f"{body['prompt']}{body['seed']}")
    to.send(completion(*(f"{rng.random()}" for _ in range(body["n"])), stopped="\n\n" if body.get("stop") else None))


def is_closed(to: Request) -> bool:
    """Whether the client has hung up."""
    readable, _, _ = select.select([to.handler.connection], [], [], 0.01)
    return bool(readable) and not to.handler.connection.recv(1)


class Gate:
    """A handler that holds back what is asked about a problem called ``held``."""

    def __init__(self) -> None:
        self.came, self.opened, self.closed = threading.Event(), threading.Event(), threading.Event()

    def __call__(self, body: dict[str, Any], to: Request) -> None:
        if body["prompt"].startswith("held"):
            self.came.set()
            while not self.opened.is_set():
                if is_closed(to):
                    self.closed.set()
                    return
        answer(body, to)


def trees(outcomes: Any) -> dict[int, Any]:
    return {
        number: str(one) if isinstance(one, SearchError) else (one.tree.to_json(), one.completions, one.best)
        for number, one in outcomes
    }


def test_a_problem_that_the_server_holds_back_keeps_no_other_waiting(serve: Serve) -> None:  # noqa: F811
    gate = Gate()
    with Engine(policy_of(serve(gate)), VERIFIER) as engine:
        held, other = engine.submit("held", CONFIG), engine.submit("other", CONFIG)
        assert gate.came.wait(60)
        result = other.result()
        assert result.stats.rounds == 3
        assert not held.done()
        gate.opened.set()
        assert held.result().completions


def test_a_search_that_is_cancelled_closes_its_connection(serve: Serve) -> None:  # noqa: F811
    gate = Gate()
    with Engine(policy_of(serve(gate)), VERIFIER) as engine:
        held = engine.submit("held", CONFIG)
        assert gate.came.wait(60)
        held.cancel()
        assert gate.closed.wait(60)
        assert engine.submit("other", CONFIG).result().completions


def test_an_engine_that_is_closed_closes_its_connections(serve: Serve) -> None:  # noqa: F811
    gate = Gate()
    with Engine(policy_of(serve(gate)), VERIFIER) as engine:
        held = engine.submit("held", CONFIG)
        assert gate.came.wait(60)
    assert gate.closed.wait(60)
    with pytest.raises(SearchError, match="closed"):
        held.result()


def test_a_stream_that_is_cancelled_is_closed(serve: Serve) -> None:  # noqa: F811
    came, closed = threading.Event(), threading.Event()

    def drip(body: dict[str, Any], to: Request) -> None:
        if not body.get("stream"):
            to.send(completion("?"))  # it does not say where it stopped
            return
        came.set()
        while not is_closed(to):
            pass
        closed.set()

    with Engine(policy_of(serve(drip)), VERIFIER) as engine:
        held = engine.submit("held", CONFIG)
        assert came.wait(60)
        held.cancel()
        assert closed.wait(60)


@pytest.mark.parametrize("samples_per_request", [None, 1])
def test_no_more_requests_are_open_than_allowed(serve: Serve, samples_per_request: int | None) -> None:  # noqa: F811
    lock, most, now = threading.Lock(), [], []
    pair = threading.Barrier(2)

    def counted(body: dict[str, Any], to: Request) -> None:
        with lock:
            now.append(body)
            most.append(len(now))
        if len(most) <= 2:
            pair.wait(60)  # two are open
        with lock:
            now.pop()
        answer(body, to)

    policy = policy_of(serve(counted), concurrency=2, samples_per_request=samples_per_request)
    search([f"problem {i}" for i in range(6)], policy, VERIFIER, CONFIG, progress=False)
    assert max(most) == 2


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    concurrency=st.sampled_from([1, 3, 64]),
    in_flight=st.sampled_from([1, 2, 4]),
    config=st.sampled_from([CONFIG, SearchConfig("dvts", n=4, expand=2, max_steps=3), SearchConfig("best_of_n", n=3)]),
)
def test_the_order_of_answers_changes_nothing(
    serve: Serve,  # noqa: F811
    seed: int,
    concurrency: int,
    in_flight: int,
    config: SearchConfig,
) -> None:
    rng = random.Random(seed)

    def sometime(body: dict[str, Any], to: Request) -> None:
        time.sleep(rng.choice([0, 0, 0.001, 0.004]))
        answer(body, to)

    problems = ["a", "b", "c", "d"]
    options: dict[str, Any] = {"samples_per_request": 1} if seed % 2 else {}
    found = search_iter(
        problems,
        policy_of(serve(sometime), concurrency=concurrency, **options),
        VERIFIER,
        config,
        progress=False,
        max_in_flight=in_flight,
    )
    batches = Lifted(policy_of(serve(answer), **options))  # as any function of text
    expected = search_iter(problems, batches, VERIFIER, config, progress=False)  # type: ignore[arg-type]
    assert trees(found) == trees(expected)


def test_a_request_that_fails_fails_its_problem_alone(serve: Serve) -> None:  # noqa: F811
    def refusing(body: dict[str, Any], to: Request) -> None:
        if body["prompt"].startswith("bad"):
            to.send({"error": {"message": "no such thing"}}, 400)
        else:
            answer(body, to)

    found = trees(search_iter(["a", "bad", "b"], policy_of(serve(refusing)), VERIFIER, CONFIG, progress=False))
    assert found[1].startswith("problem 1, round 1: ServerError: ")
    assert "status 400: " in found[1]
    assert found[0][1]
    assert found[2][1]


def test_tokens_are_counted(serve: Serve) -> None:  # noqa: F811
    policy = policy_of(serve(answer))
    for _ in range(2):  # the second search does not inherit the first one's
        results = search(["a", "b"], policy, VERIFIER, CONFIG, progress=False)
        assert [result.stats.policy_tokens for result in results] == [2 * 4 * 3] * 2


def test_one_failure_of_a_branch_breaks_its_other_requests_off(serve: Serve) -> None:  # noqa: F811
    came, closed = threading.Event(), threading.Event()

    def half(_: dict[str, Any], to: Request) -> None:
        if not came.is_set():
            came.set()
            while not is_closed(to):
                pass
            closed.set()
        else:
            to.send({"error": {"message": "no such thing"}}, 400)

    policy = policy_of(serve(half), samples_per_request=1)
    with Engine(policy, VERIFIER) as engine, pytest.raises(SearchError, match="status 400"):
        engine.submit("a", SearchConfig(n=2, expand=2)).result()
    assert closed.wait(60)


def test_it_can_be_called_without_an_engine(serve: Serve) -> None:  # noqa: F811
    """By another framework, from any event loop; and used in an engine before and after."""
    policy: OpenAIPolicy = policy_of(serve(answer))
    first = search(["a"], policy, VERIFIER, CONFIG, progress=False)
    other = search(["a"], Lifted(policy), VERIFIER, CONFIG, progress=False)  # type: ignore[arg-type]
    again = search(["a"], policy, VERIFIER, CONFIG, progress=False)
    assert first[0].completions == other[0].completions == again[0].completions

"""Invalid requests are refused with status 4xx, never 5xx, and later requests are served as before."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import arithmetic_models
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tts_search import Engine
from tts_search.serve.app import create_app
from tts_search.serve.service import Service
from tts_search.serve.settings import Settings

TEXT = st.text(max_size=12) | st.sampled_from(
    ["\x1b[31m", "<script>", "</s>", "<|user|>", "\u202e", "{{ 7 * 7 }}", "\0"]
)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]) | JUNK, "content": TEXT | JUNK}
)
MESSAGES = st.lists(MESSAGE, max_size=3) | JUNK
SAMPLING = {
    "n": st.integers(0, 3) | TEXT,
    "max_tokens": st.integers(-1, 3) | TEXT,
    "temperature": st.sampled_from([0, 1, 2.5, -1, 1e300]) | JUNK,
    "top_p": st.sampled_from([0, 0.5, 1]) | JUNK,
    "top_k": st.integers(-2, 5) | JUNK,
    "min_p": st.sampled_from([0, 0.5]) | JUNK,
    "seed": JUNK,
    "stop": st.lists(TEXT, max_size=2) | JUNK,
    "stop_token_ids": JUNK,
    "logprobs": st.booleans() | JUNK,
    "stream": st.booleans(),
    "stream_options": JUNK,
    "return_token_ids": st.booleans() | JUNK,
    "include_stop_str_in_output": st.booleans() | JUNK,
    "model": st.sampled_from(["policy", "verifier", "policy@dvts-4"]) | JUNK,
    "logit_bias": JUNK,
    "min_tokens": st.integers(-1, 4) | JUNK,
    "prompt_logprobs": st.integers(-1, 21) | st.booleans() | JUNK,
    "logprob_token_ids": st.lists(st.integers(-1, 300), max_size=2) | JUNK,
}
SEARCH = {
    "n": st.integers(0, 8) | TEXT,
    "max_steps": st.integers(0, 4) | TEXT,
    "method": st.sampled_from(["best_of_n", "beam_search", "dvts", "puct", "budget_forcing"]) | JUNK,
    "expand": st.integers(0, 5) | TEXT,
    "keep": st.integers(0, 5) | TEXT,
    "lookahead": st.integers(0, 2) | TEXT,
    "max_tokens": st.integers(0, 9) | TEXT,
    "agree_margin": JUNK,
    "temperature": JUNK,
    "delimiter": JUNK,
    "thinking": JUNK,
    "aggregate": JUNK,
    "vote": JUNK,
    "seed": JUNK,
    "stream": st.booleans(),
    "tree": st.booleans() | JUNK,
}
BODIES = {
    "/v1/completions": ({"prompt": TEXT | JUNK, "max_tokens": SAMPLING["max_tokens"]}, {**SAMPLING, "echo": JUNK}),
    "/v1/chat/completions": (
        {"messages": MESSAGES, "max_tokens": SAMPLING["max_tokens"]},
        {**SAMPLING, "chat_template_kwargs": JUNK, "continue_final_message": st.booleans(), "tools": JUNK,
         "top_logprobs": JUNK, "add_generation_prompt": st.booleans(), "add_special_tokens": JUNK},
    ),
    "/pooling": ({"messages": MESSAGES | st.lists(MESSAGES, max_size=2)}, {"model": SAMPLING["model"], "task": JUNK}),
    "/v1/pooling": (
        {"input": TEXT | JUNK | st.lists(TEXT, max_size=2) | st.lists(st.integers(-1, 300), max_size=9)},
        {"model": SAMPLING["model"], "messages": MESSAGES},
    ),
    "/score": ({"queries": TEXT | JUNK, "documents": TEXT | JUNK}, {"aggregate": JUNK}),
    "/generative_scoring": (
        {"query": TEXT | JUNK, "items": st.lists(TEXT, max_size=2) | JUNK},
        {"label_token_ids": st.lists(st.integers(-1, 300), max_size=2) | JUNK, "apply_softmax": JUNK,
         "item_first": JUNK, "model": SAMPLING["model"]},
    ),
    "/tokenize": ({}, {"prompt": TEXT | JUNK, "messages": MESSAGES, "return_token_strs": JUNK}),
    "/detokenize": ({"tokens": st.lists(st.integers(-2, 300), max_size=4) | JUNK}, {}),
    "/worker_generate": ({"prompt": TEXT | JUNK, "max_new_tokens": SAMPLING["max_tokens"]}, SAMPLING),
    "/worker_reward_inference": ({"input_str": TEXT | JUNK | st.lists(TEXT | MESSAGES, max_size=2)}, {}),
    "/generate": (
        {"sampling_params": st.fixed_dictionaries({"max_new_tokens": SAMPLING["max_tokens"]}, optional=SAMPLING)},
        {"text": TEXT | JUNK, "input_ids": JUNK, "stream": JUNK},
    ),
}  # fmt: skip


def bodies(needed: dict[str, Any], optional: dict[str, Any]) -> st.SearchStrategy[Any]:
    others = {name: values for name, values in optional.items() if name not in needed}
    return st.fixed_dictionaries(needed, optional=others) | JUNK


def check(client: TestClient, route: str, body: Any, encode: Callable[[str], bytes] = str.encode) -> None:
    """Ask for something; ``encode`` may make bytes of its JSON that are none."""
    content = encode(json.dumps(body))
    reply = client.post(route, content=content, headers={"content-type": "application/json"}, timeout=60)
    assert reply.status_code < 500, (route, body, reply.text)
    if reply.status_code >= 400:
        assert reply.json()["error"]["message"]


def broken(cuts: tuple[int, int, bytes] | None) -> Callable[[str], bytes]:
    """Replaces a part of a body: (where, how much, by what)."""

    def encode(text: str) -> bytes:
        data = text.encode()
        if cuts is None:
            return data
        at, count, other = cuts
        at %= len(data)
        return data[:at] + other + data[at + count :]

    return encode


BROKEN = st.none().map(broken) | st.tuples(st.integers(0, 500), st.integers(0, 5), st.binary(max_size=4)).map(broken)
MANY = int(os.environ.get("TTS_HOSTILE_REQUESTS", "100000")) // (len(BODIES) + 1)
EXAMPLES = pytest.mark.parametrize(
    "examples", [40, pytest.param(MANY, marks=[pytest.mark.slow, pytest.mark.timeout(0)])]
)


@EXAMPLES
@pytest.mark.parametrize("route", BODIES)
def test_a_local_model(local, route, examples):
    needed, optional = BODIES[route]

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(bodies(needed, optional), BROKEN)
    def run(body: Any, encode: Callable[[str], bytes]) -> None:
        check(local, route, body, encode)

    run()
    assert local.post("/v1/completions", json={"prompt": "20 + 5 =", "max_tokens": 4}).status_code == 200


@EXAMPLES
def test_searches(examples):
    with Engine(arithmetic_models.policy(0.3), arithmetic_models.verifier(0.1)) as engine:
        models = Settings(names=("policy",), max_n=64)
        service = Service(engine, arithmetic_models.policy(0.3), arithmetic_models.verifier(0.1), models)
        client = TestClient(create_app(service), base_url="http://127.0.0.1")
        problem = st.just("Start with 20, add 5. What is the result modulo 100?")
        needed = {"problem": problem, "max_steps": SEARCH["max_steps"], "n": SEARCH["n"]}

        @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(bodies(needed, SEARCH))
        def run(given_: Any) -> None:
            check(client, "/v1/search", given_)

        run()
        assert engine.num_in_flight == 0

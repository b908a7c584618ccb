"""Invalid requests are refused with status 4xx, never 5xx, and later requests are served as before."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import arithmetic_models
import httpx2
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tts_search import Engine, HFPolicy
from tts_search.lab import MODELS_DIR
from tts_search.lab.checkpoints import load_models
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


LIMIT_S = 1.0
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
BODY = json.dumps({"prompt": "20 + 5 =", "max_tokens": 4, "seed": 1}).encode()


@pytest.fixture
def patient(live_over, models):
    """A server that waits a second for slow clients: its address and its engine."""
    return live_over(*models, client_timeout_s=LIMIT_S)


def connected(url: str, **options: int) -> socket.socket:
    made = socket.socket()
    for name, value in options.items():
        made.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    made.settimeout(30)  # whoever waits longer hangs
    made.connect(("127.0.0.1", int(url.rpartition(":")[2])))
    return made


def sent(client: socket.socket, data: bytes, *, at_once: int = 1, pause_s: float = 0.0) -> None:
    """Send a part at a time, as long as the server listens."""
    for start in range(0, len(data), at_once):
        try:
            client.sendall(data[start : start + at_once])
        except OSError:
            return
        time.sleep(pause_s)


def ended(client: socket.socket) -> bytes:
    """What the server says before it closes the connection."""
    said = b""
    try:
        while part := client.recv(1 << 16):
            said += part
    except ConnectionError:
        pass
    return said


def serves(url: str) -> bool:
    reply = httpx2.post(f"{url}/v1/completions", content=BODY, headers={"content-type": "application/json"}, timeout=30)
    return reply.status_code == 200 and len(reply.json()["choices"]) == 1


def refused(said: bytes) -> bool:
    """Whether a client was told that it is wrong, or nothing."""
    return not said or said.startswith(b"HTTP/1.1 4")


STALLING = {
    "a body one byte at a time, which stops": (HEAD + b"Content-Length: 60\r\n\r\n", b'{"prompt": "20', 0.02),
    "a body that is announced and never sent": (HEAD + b"Content-Length: 1000\r\n\r\n", b"", 0.0),
    "a body in pieces, which stops": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b'4\r\n{"pr', 0.0),
    "headers that never end": (HEAD, b"X-Slow: " + b"a" * 1000, 0.02),
    "not even a line": (b"POST", b"", 0.0),
    "nothing": (b"", b"", 0.0),
}


@pytest.mark.parametrize("name", STALLING)
def test_who_does_not_send_is_sent_away(patient, name):
    begin, rest, pause_s = STALLING[name]
    url, engine = patient
    with connected(url) as client:
        begun = time.monotonic()
        client.sendall(begin)
        sender = threading.Thread(target=sent, args=(client, rest), kwargs={"pause_s": pause_s})
        sender.start()
        assert serves(url)
        assert refused(ended(client))
        assert time.monotonic() - begun >= 0.9 * LIMIT_S
        sender.join()
    assert serves(url)
    assert engine.num_in_flight == 0


def test_a_second_request_on_a_connection_has_its_own_time(patient):
    url, _ = patient
    whole = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    with connected(url) as client:
        for _ in range(3):
            client.sendall(whole)
            said = b""
            while not said.endswith(b"}"):
                said += client.recv(1 << 16)
            assert said.startswith(b"HTTP/1.1 200")
            time.sleep(0.6 * LIMIT_S)
        client.sendall(whole[:-1])
        assert refused(ended(client))


HUGE = {
    "a header of 1 MiB": b"X-Large: " + b"a" * (1 << 20) + b"\r\n",
    "10,000 headers": b"".join(b"X-%d: a\r\n" % number for number in range(10_000)),
    "200 headers": b"".join(b"X-%d: a\r\n" % number for number in range(200)),
    "a path of 100 kB": b"",
}


@pytest.mark.parametrize("at_once", [1 << 21, 1000])
@pytest.mark.parametrize("name", HUGE)
def test_huge_headers_are_refused(patient, name, at_once):
    url, _ = patient
    path = b"/v1/completions" + b"x" * (0 if HUGE[name] else 100_000)
    head = HEAD.replace(b"/v1/completions", path) + HUGE[name] + b"Connection: close\r\n"
    with connected(url) as client:
        sender = threading.Thread(
            target=sent,
            args=(client, head + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY),
            kwargs={"at_once": at_once},
        )
        sender.start()
        assert serves(url)
        assert refused(ended(client))
        sender.join()
    assert serves(url)


STREAMED = {"prompt": "20 + 5 =", "n": 256, "max_tokens": 900, "stream": True, "ignore_eos": True, "seed": 1}


def asked_for_a_stream(url: str) -> socket.socket:
    """A client that has little room for what it has not read, and asks for much."""
    client = connected(url, SO_RCVBUF=4096)
    body = json.dumps({**STREAMED, "logprobs": 5}).encode()
    client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    assert client.recv(12) == b"HTTP/1.1 200"
    return client


def freed(engine: Engine, policy: HFPolicy) -> bool:
    """Whether everything that was on its way ends soon, long before its last token."""
    deadline = time.monotonic() + 30
    while engine.num_in_flight or engine.num_streams:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return policy.load.tokens < STREAMED["n"] * STREAMED["max_tokens"]


def test_a_client_that_reads_slowly_and_leaves_frees_its_branches(live_over):
    models = load_models()
    policy = HFPolicy(str(MODELS_DIR / "policy-0.6m"))
    url, engine = live_over(policy, models.verifiers["prm-weak"])
    with asked_for_a_stream(url) as client:
        for _ in range(20):
            assert client.recv(16)
            time.sleep(0.01)
        assert engine.num_streams == STREAMED["n"]
        assert serves(url)
    assert freed(engine, policy)
    assert serves(url)


def test_a_client_that_reads_nothing_is_cut_off(live_over):
    policy = HFPolicy(str(MODELS_DIR / "policy-0.6m"))
    url, engine = live_over(policy, client_timeout_s=LIMIT_S)
    with asked_for_a_stream(url) as client:
        while not engine.num_streams:
            time.sleep(0.01)
        assert serves(url)
        assert freed(engine, policy)
        assert b"[DONE]" not in ended(client)
    assert serves(url)

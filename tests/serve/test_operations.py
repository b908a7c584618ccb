"""Keys, limits, logs, disconnected clients, signals: everything around a request."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import arithmetic_models
import pytest
from fastapi.testclient import TestClient
from tiny import small_pool
from tts_search import Engine, HFPolicy, Step, TextPolicy
from tts_search.lab import MODELS_DIR
from tts_search.serve.app import create_app
from tts_search.serve.service import Service
from tts_search.serve.settings import Settings, default_name, read_keys

SETTINGS = Settings(names=("policy",))
PROBLEM = {"problem": "Start with 20, add 5. What is the result modulo 100?", "method": "best_of_n", "n": 2}


class Gate:
    """A policy that answers when it is let."""

    def __init__(self) -> None:
        self.begun, self.opened = threading.Semaphore(0), threading.Event()
        self.policy = TextPolicy(self._answer)

    def _answer(self, requests):
        self.begun.release()
        assert self.opened.wait(30)
        return [[Step("so \\boxed{2}", True)] * request.num_samples for request in requests]


@pytest.mark.parametrize(
    ("header", "status"),
    [(None, 401), ("Bearer wrong", 401), ("Bearer one", 200), ("Bearer two", 200), ("Basic one", 401), ("one", 401),
     ("Bearer onetwo", 401), ("Bearer \xe9", 401), ("bearer two", 200)],
)  # fmt: skip
def test_keys(serve, header, status):
    client = serve(arithmetic_models.policy(0.3), keys=("one", "two"))
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    assert client.get("/v1/models", headers=headers).status_code == status
    assert client.get("/metrics", headers=headers).status_code == status
    assert client.post("/v1/search", json=PROBLEM, headers=headers).status_code == status
    assert client.get("/health").status_code == 200
    assert client.get("/").status_code == 200


def test_a_file_of_keys(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# of the team\nfirst-key\n\n second \n")
    assert read_keys(file) == ("first-key", "second")
    for text in ("", "# none\n", "two words\n", "\u00e9\n"):
        file.write_text(text)
        with pytest.raises(ValueError, match="expected a file with a key on each line"):
            read_keys(file)


def test_names_of_checkpoints_show_no_folder(tmp_path):
    (tmp_path / "mine").mkdir()
    assert default_name(str(tmp_path / "mine")) == "mine"
    assert default_name("Qwen/Qwen2.5-Math-PRM-7B") == "Qwen/Qwen2.5-Math-PRM-7B"


def test_too_many_requests_are_sent_away(serve):
    gate = Gate()
    client = serve(gate.policy, max_queue=2)
    statuses = []
    threads = [
        threading.Thread(target=lambda: statuses.append(client.post("/v1/search", json=PROBLEM).status_code))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    gate.begun.acquire()
    while client.app.state.service.num_requests < 2:
        time.sleep(0.01)
    reply = client.post("/v1/search", json=PROBLEM)
    assert reply.status_code == 429
    assert int(reply.headers["retry-after"]) >= 1
    assert client.get("/health").status_code == 200
    gate.opened.set()
    for thread in threads:
        thread.join()
    assert statuses == [200, 200]
    assert client.post("/v1/search", json=PROBLEM).status_code == 200
    assert client.app.state.service.num_requests == 0


def test_bodies_have_a_limit(serve):
    client = serve(arithmetic_models.policy(0.3), max_body=1000)
    assert client.post("/v1/search", json={**PROBLEM, "problem": "x" * 1000}).status_code == 413
    parts = (b"x" * 500 for _ in range(3))  # without a length
    reply = client.post("/v1/search", content=parts, headers={"content-type": "application/json"})
    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == 413


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"1", b"\xff\xfe", b'{"problem": "\xff"}', b'{"problem": "\\ud800"}', b"[" * 100_000,
     b'{"a":' * 50_000, b'{"problem": "x", "n": NaN}', b'{"problem": "x", "n": 1e999}',
     b'{"problem": "x", "temperature": Infinity}', b'{"n": ' + b"9" * 6000 + b"}"],
)  # fmt: skip
def test_what_is_no_request_is_refused(texts, body):
    reply = texts.post("/v1/search", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_other_ways_in_are_closed(texts):
    form = texts.post("/v1/search", content=json.dumps(PROBLEM), headers={"content-type": "text/plain"})
    assert form.status_code == 400  # what a foreign page can send without asking
    assert texts.get("/v1/search").status_code == 405
    assert texts.get("/docs").status_code == texts.get("/openapi.json").status_code == 404
    assert texts.get("/v1/models", headers={"host": "evil.example"}).status_code == 400
    allowed = texts.get("/v1/models", headers={"origin": "https://evil.example"}).headers
    assert "access-control-allow-origin" not in allowed


def test_the_log_says_what_happened_and_nothing_that_was_said(texts, caplog):
    with caplog.at_level(logging.INFO, "tts_search.serve.access"):
        reply = texts.post("/v1/search?secret=1", json={**PROBLEM, "problem": "a secret"})
        missing = texts.get("/%0a%1b[31m")
    access = [json.loads(each.message) for each in caplog.records if each.name == "tts_search.serve.access"]
    lines = {line["id"]: line for line in access}  # other tests' servers may be writing too
    first, second = (lines[answer.headers["x-request-id"]] for answer in (reply, missing))
    assert (first["method"], first["path"], first["status"]) == ("POST", "/v1/search", reply.status_code)
    assert first["bytes"] == len(reply.content)
    assert first["seconds"] > 0
    assert not any("secret" in record.message or "\x1b" in record.message for record in caplog.records)
    assert second["status"] == 404


def test_metrics_have_the_names_of_vllm(texts):
    before = texts.post("/v1/search", json={**PROBLEM, "n": 3}).json()["usage"]
    lines = dict(line.rsplit(" ", 1) for line in texts.get("/metrics").text.splitlines() if not line.startswith("#"))
    label = '{model_name="policy"}'
    assert float(lines[f"vllm:generation_tokens_total{label}"]) == before["completion_tokens"]
    assert float(lines[f"tts_search:searches_total{label}"]) == 1
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
        assert float(lines[name + label]) == 0


def told(client: TestClient) -> dict[str, float]:
    """The metrics of a server by their names, all of which are about the policy."""
    lines = [line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name.replace('{model_name="policy"}', ""): float(value) for name, value in lines}


def test_metrics_count_what_is_sampled_ahead_and_who_waited(models):
    config = {**PROBLEM, "method": "beam_search", "n": 8, "expand": 2, "max_step_tokens": 24, "max_steps": 6}
    config |= {"temperature": 3.0, "seed": 1}  # so that steps are as they come, and the best ones change
    with Engine(*models, speculate=True) as engine:
        client = TestClient(create_app(Service(engine, models[0], models[1], SETTINGS)), base_url="http://127.0.0.1")
        stats = client.post("/v1/search", json=config).json()["stats"]
        client.post("/v1/completions", json={"prompt": ["1 + 2", "3 + 4"], "max_tokens": 4})
        now = told(client)
    assert now["tts_search:speculated_tokens_in_vain_total"] == stats["speculated_tokens"] > 0
    assert now["tts_search:speculated_tokens_total"] > stats["speculated_tokens"]
    assert now["vllm:request_queue_time_seconds_count"] == 3
    assert 0 < now["vllm:request_queue_time_seconds_sum"] < 60
    assert now["vllm:num_preemptions_total"] == 0


def test_metrics_count_how_long_a_request_waited_for_its_turn():
    gate = Gate()
    with Engine(gate.policy, max_in_flight=1) as engine:
        client = TestClient(create_app(Service(engine, gate.policy, None, SETTINGS)), base_url="http://127.0.0.1")
        threads = [threading.Thread(target=client.post, args=["/v1/search"], kwargs={"json": PROBLEM}) for _ in "ab"]
        threads[0].start()
        gate.begun.acquire()
        threads[1].start()
        while not engine._calls:
            time.sleep(0.01)
        time.sleep(0.1)
        gate.opened.set()
        for thread in threads:
            thread.join()
        now = told(client)
    assert now["vllm:request_queue_time_seconds_count"] == 2
    assert now["vllm:request_queue_time_seconds_sum"] > 0.1


def test_metrics_count_who_gave_up_its_pages():
    policy = HFPolicy(str(MODELS_DIR / "policy-0.1m"))
    policy._lane.pool = small_pool(policy.decoder, 30)
    with Engine(policy) as engine:
        client = TestClient(create_app(Service(engine, policy, None, SETTINGS)), base_url="http://127.0.0.1")
        body = {"prompt": "20 + 5 = ", "n": 8, "max_tokens": 48, "ignore_eos": True, "seed": 1}
        reply = client.post("/v1/completions", json=body)
        now = told(client)
    assert reply.json()["usage"]["completion_tokens"] == 8 * 48
    assert now["vllm:num_preemptions_total"] > 0
    assert now["vllm:request_queue_time_seconds_count"] == 1


def test_a_client_that_goes_away_frees_its_search(serve):
    gate = Gate()
    client = serve(gate.policy)
    app, service = client.app, client.app.state.service

    async def ask_and_leave(stream: bool) -> None:
        left = asyncio.Event()
        body = json.dumps({**PROBLEM, "stream": stream}).encode()
        sent = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict:
            if sent:
                return sent.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            pass

        headers = [(b"content-type", b"application/json"), (b"host", b"127.0.0.1")]
        scope = {
            "type": "http", "method": "POST", "path": "/v1/search", "raw_path": b"/v1/search", "query_string": b"",
            "headers": headers, "http_version": "1.1", "scheme": "http", "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80), "asgi": {"version": "3.0", "spec_version": "2.3"}, "root_path": "",
        }  # fmt: skip
        task = asyncio.ensure_future(app(scope, receive, send))
        while not service.engine.num_in_flight:
            await asyncio.sleep(0.01)
        left.set()
        await asyncio.wait_for(task, 20)
        assert service.num_requests == 0

    for stream in (False, True):
        gate.opened.clear()
        asyncio.run(ask_and_leave(stream))
        gate.opened.set()
        deadline = time.monotonic() + 20
        while service.engine.num_in_flight:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def process(tmp_path):
    """A server as a program, with a key."""
    keys = tmp_path / "keys"
    keys.write_text("k\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "tts_search.cli", "serve", "--policy", str(MODELS_DIR / "policy-0.1m"),
        "--verifier", str(MODELS_DIR / "prm-weak"), "--port", str(port), "--api-key-file", str(keys),
    ]  # fmt: skip
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except OSError:
            assert running.poll() is None, running.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
    yield running, port
    running.kill()
    running.communicate()


def test_a_signal_drains(process):
    running, port = process
    answers = []

    def ask() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        body = json.dumps({**PROBLEM, "n": 64, "method": "beam_search", "max_step_tokens": 64, "stream": True})
        headers = {"Authorization": "Bearer k", "Content-Type": "application/json"}
        connection.request("POST", "/v1/search", body, headers)
        reply = connection.getresponse()
        begun.set()
        answers.append((reply.status, reply.read().decode()))

    begun = threading.Event()
    thread = threading.Thread(target=ask)
    thread.start()
    assert begun.wait(30)
    running.send_signal(signal.SIGTERM)
    thread.join(60)
    output, errors = running.communicate(timeout=60)
    assert running.returncode == 0
    ((status, text),) = answers
    assert status == 200
    assert "event: result" in text
    assert json.loads(output.splitlines()[-1])["path"] == "/v1/search"
    assert str(Path(MODELS_DIR)) not in output + errors
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port))

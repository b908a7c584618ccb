"""OpenAIPolicy against a small HTTP server that fails in every way, and (slow) against vLLM's and llama.cpp's own."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from test_docs_kernels import code_of
from tts_search import SearchConfig, SearchError, TextVerifier, best_of_n, search, search_iter
from tts_search.lab import MODELS_DIR
from tts_search.policies.openai import OpenAIPolicy
from tts_search.search.protocol import Expand
from tts_search.search.types import Step, StepParams

pytest.importorskip("openai")
ROOT = Path(__file__).parents[2]
PEERS = Path(os.environ.get("TTS_PEERS_DIR", ROOT / "build" / "peers"))
Handler = Callable[[dict[str, Any], "Request"], None]


@dataclass
class Request:
    """What a handler answers with."""

    handler: BaseHTTPRequestHandler

    def send(self, body: Any, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.handler.send_response(status)
        self.handler.send_header("content-type", headers.pop("content_type", "application/json"))
        self.handler.send_header("content-length", str(len(data)))
        for name, value in headers.items():
            self.handler.send_header(name.replace("_", "-"), value)
        self.handler.end_headers()
        self.handler.wfile.write(data)

    def stream(self, chunks: list[dict[str, Any]], *, cut: bool = False) -> None:
        self.handler.send_response(200)
        self.handler.send_header("content-type", "text/event-stream")
        self.handler.send_header("transfer-encoding", "chunked")
        self.handler.end_headers()
        for chunk in [*chunks, None]:
            data = b"data: " + (b"[DONE]" if chunk is None else json.dumps(chunk).encode()) + b"\n\n"
            if chunk is None and cut:
                self.drop()
                return
            self.handler.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.handler.wfile.flush()
        self.handler.wfile.write(b"0\r\n\r\n")

    def drop(self) -> None:
        """Break the connection off."""
        self.handler.close_connection = True
        with contextlib.suppress(OSError):
            self.handler.connection.shutdown(socket.SHUT_RDWR)


@dataclass
class Server:
    """Bodies that came, in order, and the handler of each: the last one stays."""

    url: str
    handlers: list[Handler]
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    busy: int = 0
    most: int = 0


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    opened: list[ThreadingHTTPServer] = []

    def start(*handlers: Handler) -> Server:
        lock = threading.Lock()

        class Endpoint(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    server.bodies.append({**body, "path": self.path})
                    server.headers.append(dict(self.headers.items()))
                    handler = server.handlers[min(len(server.bodies), len(server.handlers)) - 1]
                    server.busy += 1
                    server.most = max(server.most, server.busy)
                try:
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        handler(body, Request(self))
                finally:
                    server.busy -= 1

            def log_message(self, *_: Any) -> None:
                pass

        http = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
        http.daemon_threads = True
        opened.append(http)
        server = Server(f"http://127.0.0.1:{http.server_port}/v1", list(handlers))
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        return server

    yield start
    for http in opened:
        http.shutdown()
        http.server_close()


def completion(*texts: str, finish: str = "stop", stopped: Any = "absent") -> dict[str, Any]:
    """An answer of the completions endpoint."""
    extra = {} if stopped == "absent" else {"stop_reason": stopped}
    choices = [
        {"index": i, "text": text, "finish_reason": finish, **extra,
         "logprobs": {"tokens": ["a", "b"], "token_logprobs": [-0.5, -0.25], "text_offset": [], "top_logprobs": None}}
        for i, text in enumerate(texts)
    ]  # fmt: skip
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    start = {"id": "1", "object": "text_completion", "created": 0, "model": "m"}
    return {**start, "choices": choices, "usage": usage}


def pieces(*texts: str, finish: str | None = "stop") -> list[dict[str, Any]]:
    """The same as a stream."""
    chunks = [completion(text, finish=finish) for text in texts]  # type: ignore[arg-type]
    for chunk in chunks[:-1]:
        chunk["choices"][0]["finish_reason"] = None
    return chunks


def policy_of(server: Server, **options: Any) -> OpenAIPolicy:
    return OpenAIPolicy("m", **{"base_url": server.url, "endpoint": "completions", "timeout": 5.0, **options})


def expand(policy: OpenAIPolicy, children: int = 2, steps: tuple[str, ...] = (), **params: Any) -> Any:
    """The answer to one request of a search."""
    policy.begin(0, "Why?")
    try:
        seeds = tuple(range(2**40, 2**40 + children))
        return policy.expand([Expand(0, 0, tuple(range(1, children + 1)), steps, seeds, StepParams(**params))])[0]
    finally:
        policy.end(0)


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between tries of a few milliseconds."""
    import openai._base_client as client

    monkeypatch.setattr(client, "INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr(client, "MAX_RETRY_DELAY", 0.002)


def test_children_are_the_samples_of_one_request(serve: Callable[..., Server]) -> None:
    server = serve(lambda _, to: to.send(completion("one", "two", stopped="\n\n")))
    policy = policy_of(server, template="Q: {problem} A: ", extra_body={"min_p": 0.1})
    steps = expand(policy, 2, ("first\n\n",), temperature=0.5, top_p=0.9, top_k=7, max_tokens=12)
    assert steps == [Step(text, False, 2, -0.75, "stop") for text in ("one\n\n", "two\n\n")]
    (body,) = server.bodies
    assert body.pop("seed") < 2**31
    assert body == {
        "path": "/v1/completions", "model": "m", "prompt": "Q: Why? A: first\n\n", "n": 2, "stop": ["\n\n"],
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "max_tokens": 12, "logprobs": 0, "min_p": 0.1,
    }  # fmt: skip


def test_chat_continues_the_assistant(serve: Callable[..., Server]) -> None:
    def answer(_: Any, to: Request) -> None:
        choice = {
            "index": 0, "finish_reason": "stop", "stop_reason": None, "message": {"role": "assistant", "content": "ok"},
            "logprobs": {"content": [{"token": "ok", "logprob": -1.5, "bytes": None, "top_logprobs": []}]},
        }  # fmt: skip
        to.send({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})

    server = serve(answer)
    policy = policy_of(server, endpoint="chat", system_prompt="Think.")
    assert expand(policy, 1) == expand(policy, 1, ("a\n\n", "b\n\n")) == [Step("ok", True, 1, -1.5, "eos")]
    first, second = server.bodies
    start = [{"role": "system", "content": "Think."}, {"role": "user", "content": "Why?"}]
    assert (first["path"], first["messages"], first["logprobs"]) == ("/v1/chat/completions", start, True)
    assert "continue_final_message" not in first
    assert second["messages"] == [*start, {"role": "assistant", "content": "a\n\nb\n\n"}]
    assert (second["continue_final_message"], second["add_generation_prompt"]) == (True, False)


SOLUTION = "Add the numbers.\n\nThe sum is 4.\n\nSo it is \\boxed{4}."
TEMPLATES = {
    "keeps": "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}",
    "trims": "{{ '<|' + m['role'] + '|>' + m['content'] | trim + '<|end|>' }}",
}


def assistant(template: str, *, tokenizes: bool, streams: bool) -> Handler:
    """A chat server that renders as transformers does, and goes on with `SOLUTION`."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = (
        f"{{% for m in messages %}}{template}{{% endfor %}}{{% if add_generation_prompt %}}<|assistant|>{{% endif %}}"
    )

    def answer(body: dict[str, Any], to: Request) -> None:
        (prompt,), _ = render_jinja_template(  # type: ignore[str-unpack]
            conversations=[body["messages"]],
            chat_template=template,
            continue_final_message=body.get("continue_final_message", False),
            add_generation_prompt=body.get("add_generation_prompt", True),
        )
        if to.handler.path.endswith("/tokenize"):
            to.send({"count": len(prompt), "tokens": [*prompt.encode()]} if tokenizes else {"detail": "not found"})
            return
        rest, reason = SOLUTION[len(prompt.rpartition("<|assistant|>")[2]) :], None
        stop = (body.get("stop") or [None])[0]
        if stop is not None and stop in rest:
            rest, reason = rest[: rest.index(stop)], stop
        start = {"id": "1", "created": 0, "model": "m"}
        if body.get("stream") and streams:
            parts = [rest[i : i + 5] for i in range(0, len(rest), 5)]
            to.stream([
                {**start, "object": "chat.completion.chunk", "choices": [{
                    "index": 0, "delta": {"content": part}, "logprobs": None,
                    "finish_reason": "stop" if part is parts[-1] else None}]}
                for part in parts
            ])  # fmt: skip
            return
        choices = [
            {"index": i, "finish_reason": "stop", "stop_reason": reason, "logprobs": None,
             "message": {"role": "assistant", "content": rest}}
            for i in range(body.get("n", 1))
        ]  # fmt: skip
        to.send({**start, "object": "chat.completion", "choices": choices})

    return answer


@pytest.mark.parametrize("method", ["beam_search", "dvts"])
@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("tokenizes", [True, False])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_delimiter_that_is_trimmed_is_not_written_twice(
    serve: Callable[..., Server], template: str, tokenizes: bool, streams: bool, method: Any
) -> None:
    server = serve(assistant(TEMPLATES[template], tokenizes=tokenizes, streams=streams))
    policy = policy_of(server, endpoint="chat", max_retries=0)
    verifier = TextVerifier(lambda branches: [[0.5] * len(steps) for _, steps in branches])
    (result,) = search(
        ["2+2?"], policy, verifier, SearchConfig(method=method, n=4, expand=2, max_steps=6), progress=False
    )
    assert result.best.steps == ("Add the numbers.\n\n", "The sum is 4.\n\n", "So it is \\boxed{4}.")
    assert {completion.text for completion in result.completions} == {SOLUTION}
    asked = [body for body in server.bodies if body["path"] == "/tokenize"]
    assert len(asked) == (0 if template == "keeps" else 2)


def test_a_server_that_keeps_delimiters_may_write_blank_lines(serve: Callable[..., Server]) -> None:
    """It says that it does not trim, so what the model wrote stays."""
    server = serve(
        lambda _, to: to.send(
            {"tokens": [len(json.dumps(_["messages"]))]}
            if to.handler.path == "/tokenize"
            else {
                "id": "1", "object": "chat.completion", "created": 0, "model": "m",
                "choices": [{"index": 0, "finish_reason": "stop", "stop_reason": "\n\n", "logprobs": None,
                             "message": {"role": "assistant", "content": ""}}],
            }
        )
    )  # fmt: skip
    policy = policy_of(server, endpoint="chat")
    for _ in range(2):
        assert [step.text for step in expand(policy, 1, ("a\n\n",))] == ["\n\n"]
    assert len([body for body in server.bodies if body["path"] == "/tokenize"]) == 2


@pytest.mark.parametrize(
    ("answer", "step"),
    [
        (completion("x", stopped="\n\n"), Step("x\n\n", False, 2, -0.75, "stop")),
        (completion("x", stopped=None), Step("x", True, 2, -0.75, "eos")),
        (completion("x", stopped=2), Step("x", True, 2, -0.75, "eos")),
        (completion("x", finish="length"), Step("x", False, 2, -0.75, "length")),
        (completion("", finish="length"), Step("", True, 2, -0.75, "length")),
    ],
)
def test_finish_reasons(serve: Callable[..., Server], answer: dict[str, Any], step: Step) -> None:
    assert expand(policy_of(serve(lambda _, to: to.send(answer))), 1) == [step]


def test_a_server_that_does_not_say_where_it_stopped_is_read(serve: Callable[..., Server]) -> None:
    def answer(body: dict[str, Any], to: Request) -> None:
        if not body.get("stream"):
            to.send(completion("?"))
        elif body["prompt"].endswith("a\n\n"):
            to.stream(pieces("the ", "end"))
        else:
            to.stream(pieces("\n\n", "a", "\n", "\nmore", "never read"))

    server = serve(answer)
    policy = policy_of(server)
    assert expand(policy, 2) == [Step("\n\na\n\n", False, 8, -3.0, "stop")] * 2
    assert expand(policy, 1, ("a\n\n",)) == [Step("the end", True, 4, -1.5, "eos")]
    assert [bool(body.get("stream")) for body in server.bodies] == [False, True, True, True]
    assert all("stop" not in body for body in server.bodies[1:])
    assert expand(policy, 1, delimiter=None) == [Step("?", True, 2, -0.75, "eos")]  # there is no doubt then


def test_a_server_that_ignores_n_is_asked_again(serve: Callable[..., Server]) -> None:
    server = serve(lambda _, to: to.send(completion("x", stopped=None)))
    assert len(expand(policy_of(server), 3)) == 3
    assert [body["n"] for body in server.bodies] == [3, 1, 1]
    assert len({body["seed"] for body in server.bodies}) == 3


def test_each_child_may_have_a_request_of_its_own(serve: Callable[..., Server]) -> None:
    server = serve(lambda body, to: to.send(completion(*"xyz"[: body["n"]], stopped=None)))
    assert len(expand(policy_of(server, samples_per_request=2), 5)) == 5
    assert sorted(body["n"] for body in server.bodies) == [1, 2, 2]


def test_no_more_requests_at_once_than_allowed(serve: Callable[..., Server]) -> None:
    def slow(_: Any, to: Request) -> None:
        time.sleep(0.02)
        to.send(completion("x", stopped=None))

    server = serve(slow)
    assert len(expand(policy_of(server, concurrency=3, samples_per_request=1), 12)) == 12
    assert 1 < server.most <= 3


def test_streams_count_among_the_requests_at_once(serve: Callable[..., Server]) -> None:
    def slow(body: dict[str, Any], to: Request) -> None:
        if not body.get("stream"):
            to.send(completion("?"))
            return
        time.sleep(0.02)
        to.stream(pieces("x", "\n\n"))

    server = serve(slow)
    policy = policy_of(server, concurrency=2)
    expand(policy, 1)
    server.most = 0
    assert len(expand(policy, 8)) == 8
    assert server.most == 2


FAILURES: dict[str, Handler] = {
    "429": lambda _, to: to.send({"error": {"message": "slow down"}}, 429, retry_after="0.001"),
    "500": lambda _, to: to.send({"error": {"message": "oh no"}}, 500),
    "503 without JSON": lambda _, to: to.send(b"<html>", 503, content_type="text/html"),
    "broken JSON": lambda _, to: to.send(b'{"choices": [{"text": "x'),
    "another JSON": lambda _, to: to.send({"hello": 1}),
    "no JSON": lambda _, to: to.send(b"<html>hello</html>", content_type="text/html"),
    "no choices": lambda _, to: to.send(completion()),
    "dropped connection": lambda _, to: to.drop(),
    "timeout": lambda _, to: time.sleep(0.6) or to.drop(),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_what_may_pass_is_tried_again(
    serve: Callable[..., Server], failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tts_search.policies.openai as adapter

    async def no_sleep(_: float) -> None:
        pass

    monkeypatch.setattr(adapter.asyncio, "sleep", no_sleep)
    fail = FAILURES[failure]
    server = serve(fail, fail, lambda _, to: to.send(completion("x", stopped=None)))
    policy = policy_of(server, max_retries=2, timeout=0.2 if failure == "timeout" else 5.0)
    assert expand(policy, 1) == [Step("x", True, 2, -0.75, "eos")]
    assert len(server.bodies) == 3

    server = serve(fail)
    policy = policy_of(server, max_retries=1, timeout=0.2 if failure == "timeout" else 5.0)
    error = expand(policy, 1)
    assert type(error).__name__ == "ServerError"
    assert str(error).startswith(server.url)
    assert len(server.bodies) == 2
    named = {"429": "status 429: .*slow down", "500": "status 500", "timeout": "timed out.*after 2 tries"}
    assert re.search(named.get(failure, "status 503|expected an answer|Connection error"), str(error))


@pytest.mark.parametrize("cut", [True, False])
def test_a_stream_that_breaks_off_is_read_again(serve: Callable[..., Server], cut: bool) -> None:
    server = serve(
        lambda _, to: to.send(completion("?")),
        lambda _, to: to.stream(pieces("half", finish=None), cut=cut),
        lambda _, to: to.stream(pieces("whole", "\n\n")),
    )
    assert expand(policy_of(server, max_retries=1), 1) == [Step("whole\n\n", False, 4, -1.5, "stop")]


def test_what_will_not_pass_is_not_tried_again(serve: Callable[..., Server]) -> None:
    message = {"error": {"message": "the prompt is longer than the context"}}
    server = serve(lambda _, to: to.send(message, 400))
    error = expand(policy_of(server), 1)
    assert "status 400" in str(error)
    assert "longer than the context" in str(error)
    assert len(server.bodies) == 1
    server = serve(lambda _, to: to.send(completion("x", finish="content_filter")))
    assert "finish_reason: expected" in str(expand(policy_of(server), 1))


def test_one_problem_fails_alone(serve: Callable[..., Server]) -> None:
    def answer(body: dict[str, Any], to: Request) -> None:
        if "bad" in body["prompt"]:
            to.send({"error": {"message": "no"}}, 400)
        else:
            to.send(completion(*["\\boxed{1}"] * body["n"], stopped=None))

    outcomes = dict(search_iter(["good", "bad"], policy_of(serve(answer)), None, SearchConfig("best_of_n", n=2)))
    assert outcomes[0].answer("majority") == "1"
    assert isinstance(outcomes[1], SearchError)
    assert "ServerError: http://127.0.0.1" in str(outcomes[1])


def test_the_key_comes_from_the_environment(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"api_key_env: .*OPENAI_API_KEY"):
        OpenAIPolicy("m")
    monkeypatch.setenv("MY_KEY", "abc")
    server = serve(lambda _, to: to.send(completion("x", stopped=None)))
    expand(policy_of(server, api_key_env="MY_KEY"), 1)
    assert {name.lower(): value for name, value in server.headers[0].items()}["authorization"] == "Bearer abc"


def test_bad_options_are_named(serve: Callable[..., Server]) -> None:
    server = serve(lambda _, to: to.drop())
    for name, value in (("concurrency", 0), ("max_retries", -1), ("samples_per_request", 0), ("endpoint", "edits")):
        with pytest.raises(ValueError, match=name):
            policy_of(server, **{name: value})


def test_the_code_of_the_docs(serve: Callable[..., Server]) -> None:
    def answer(body: dict[str, Any], to: Request) -> None:
        choices = [
            {
                "index": i,
                "finish_reason": "stop",
                "stop_reason": None,
                "message": {"role": "assistant", "content": "ok"},
            }
            for i in range(body["n"])
        ]
        to.send({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": choices})

    verifier = TextVerifier(lambda branches: [[0.5] * len(steps) for _, steps in branches])
    names: dict[str, Any] = {"problems": ["Why?"], "verifier": verifier}
    (code,) = code_of("adapters/servers.md", "test_openai_policy.py")
    exec(code.replace("http://localhost:8000/v1", serve(answer).url), names)
    assert [c.text for c in names["results"][0].completions] == ["ok"] * 16


# The real ones. Environments: benchmarks/peers/compare.py makes them; for llama.cpp also `uvicorn fastapi` and the rest
# of llama-cpp-python's extra [server].


def demo_prompt(problem: str) -> str:
    return f"<|bos|><|user|>{problem}<|assistant|>"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], port: int, log: Path, seconds: float, **environment: str) -> Iterator[str]:
    """A server's process, from when it lists its models until it has gone."""
    url = f"http://127.0.0.1:{port}/v1"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "PYTHONPATH": "", **environment})
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for waited in itertools.count():
            with contextlib.suppress(OSError):
                opener.open(f"{url}/models", timeout=5).read()
                break
            assert process.poll() is None, log.read_text()[-2000:]
            assert waited < seconds, f"no answer in {seconds} s: {log.read_text()[-2000:]}"
            time.sleep(1)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_searches_on_vllm_s_server(endpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = PEERS / "vllm_cpu" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no {python}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    port = free_port()
    command = [
        str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODELS_DIR / "policy-3m"),
        "--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024",
    ]  # fmt: skip
    threads = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0", "OMP_NUM_THREADS": "1"}
    with running(command, port, tmp_path / "log", 600, **threads) as url:
        check_searches(OpenAIPolicy("demo", base_url=url, endpoint=endpoint, template=demo_prompt))
        if endpoint == "chat":
            script = ROOT / "examples" / "adapters" / "openai_server.py"
            example = subprocess.run([sys.executable, script, "--base-url", url], capture_output=True, text=True)
            assert example.stdout.count("(score ") == 4, example.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_searches_on_llama_cpp_s_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python, model = PEERS / "llama_cpp" / "bin" / "python", PEERS / "model-bf16.gguf"
    if not python.exists() or not model.exists():
        pytest.skip(f"no {python} or no {model}")
    if subprocess.run([python, "-c", "import llama_cpp.server.app"], capture_output=True).returncode:
        pytest.skip("llama-cpp-python[server] is not installed")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    port = free_port()
    command = [str(python), "-m", "llama_cpp.server", "--model", str(model), "--port", str(port), "--n_ctx", "2048"]
    with running(command, port, tmp_path / "log", 300) as url:
        prompt = "<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n"
        options = {"template": prompt, "logprobs": False, "concurrency": 1}
        policy = OpenAIPolicy("model", base_url=url, endpoint="completions", **options)  # type: ignore[arg-type]
        config = SearchConfig("beam_search", n=4, expand=2, max_steps=2, max_step_tokens=24, delimiter=".", seed=1)
        verifier = TextVerifier(lambda branches: [[float(len(step)) for step in steps] for _, steps in branches])
        (result,) = search(["Name three colours."], policy, verifier, config)
    assert len(result.completions) >= 4
    several = [completion.steps for completion in result.completions if len(completion.steps) > 1]
    assert several
    assert all(steps[0].endswith(".") for steps in several)
    assert policy._says_where is False  # its answers do not say; the policy read them as they came


def check_searches(policy: OpenAIPolicy) -> None:
    """Best-of-N and beam search by a demo model with its verifier, as on our own engine."""
    from tts_search import HFVerifier
    from tts_search.lab.arithmetic import generate

    problems = generate("test", 2, 6, seed=5)
    texts = [problem.problem for problem in problems]
    verifier = HFVerifier(str(MODELS_DIR / "prm-strong"))
    config = SearchConfig("beam_search", n=8, expand=4, max_steps=12, max_step_tokens=48, seed=3)
    results = search(texts, policy, verifier, config)
    for result in results:
        assert all(c.finished for c in result.completions)
        assert all(step.endswith("\n\n") for c in result.completions for step in c.steps[:-1])
        assert all("\n\n" not in step[:-2] for c in result.completions for step in c.steps)
        assert result.stats.policy_tokens > 0
    assert sum(r.answer() == p.answer for r, p in zip(results, problems, strict=True)) >= 5
    assert policy._says_where
    again = search(texts[:2], policy, verifier, config)
    assert [r.best.text for r in again] == [r.best.text for r in results[:2]]  # greedy scores of seeded draws
    (sampled,) = best_of_n(texts[:1], policy, None, n=4, max_step_tokens=200)
    assert [c.finished for c in sampled.completions] == [True] * 4

"""A judge behind a server gives the same scores as the model in this process; errors of the server are named."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tiny import save_checkpoint, tiny_model
from tts_search import Engine, HFPolicy, OutcomeJudge, SearchConfig, SearchError, Step, TextPolicy, search
from tts_search.errors import ServerError
from tts_search.search.protocol import Score
from tts_search.verifiers import server
from tts_search.verifiers.labels import LocalLabels, Question
from tts_search.verifiers.outcome import CHOICE
from tts_search.verifiers.server import ServerLabels

SOLUTIONS = ["It is 5.", "It is 6, since\n\n2 * 3 = 6.", "No idea.", "{steps} {problem}", "7"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("judge") / "tiny"
    save_checkpoint(path, tiny_model(max_position_embeddings=2048))
    return path


def scores(judge: OutcomeJudge, problem: str = "What is {steps}?", solutions: list[str] = SOLUTIONS) -> list[Any]:
    judge.begin(0, problem)
    return judge.score([Score(0, number, (text,), 0) for number, text in enumerate(solutions, 1)])


@pytest.mark.parametrize("ask", ["choice", "outcome"])
def test_the_server_says_what_the_model_says_here(folder, live_over, ask):
    url, _ = live_over(HFPolicy(str(folder), kv_memory="8MiB"))
    here = OutcomeJudge(LocalLabels(str(folder), kv_memory="8MiB"), ask, most=4)
    there = OutcomeJudge(ServerLabels(f"{url}/v1"), ask, most=4)
    expected, found = scores(here), scores(there)
    for mine, theirs in zip(expected, found, strict=True):
        assert theirs == pytest.approx(mine, abs=1e-5)
    assert len({own[0] for own in expected}) > 1
    usage = there.end(0)
    assert usage.tokens > 100
    if ask == "choice":  # each label of a group reads the same texts
        assert usage.cached_tokens > usage.tokens // 2
    (found,) = scores(there, solutions=["a" * 3000])
    assert ask == "choice" or "context of 2048" in str(found)


def test_best_of_n_with_a_judge_behind_a_server(folder, live_over):
    url, _ = live_over(HFPolicy(str(folder), kv_memory="8MiB"))
    policy = TextPolicy(lambda requests: [[Step(f"{seed % 99}", True) for seed in r.seeds] for r in requests])
    judge = OutcomeJudge(ServerLabels(url), most=3)
    (result,) = search(["One?"], policy, judge, SearchConfig("best_of_n", n=8))
    assert result.best.score == max(one.score for one in result.completions)
    assert result.stats.verifier_tokens > 0


Reply = tuple[int, Any]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, Any]], tuple[str, list[tuple[str, Any]]]]]:
    """Starts a server with an answer for each path, an (int, body) or a function of the body; what it was asked."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(server.time, "sleep", lambda _: None)
    opened: list[ThreadingHTTPServer] = []

    def start(answers: dict[str, Any]) -> tuple[str, list[tuple[str, Any]]]:
        asked: list[tuple[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.do_POST()

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or "null")
                asked.append((self.path, self.headers.get("authorization") if body is None else body))
                answer = answers.get(self.path, (404, {"error": {"message": "no such route"}}))
                status, reply = answer(body) if callable(answer) else answer
                data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None: ...

        httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        opened.append(httpd)
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{httpd.server_port}", asked

    yield start
    for httpd in opened:
        httpd.shutdown()
        httpd.server_close()


def tokenized(body: dict[str, Any]) -> Reply:
    text = body["prompt"] if "prompt" in body else "".join(each["content"] for each in body["messages"])
    tokens = {"Yes": [1], "No": [2]}.get(text, list(text.encode()))
    return 200, {"count": len(tokens), "max_model_len": 4096, "tokens": tokens}


GOOD = {
    "/v1/models": (200, {"data": [{"id": "m"}]}),
    "/tokenize": tokenized,
    "/generative_scoring": lambda body: (
        200,
        {"data": [{"index": i, "score": 0.5 / (1 + i)} for i in range(len(body["items"]))], "usage": {}},
    ),
}


def test_what_is_sent(pretend, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    url, asked = pretend(GOOD)
    judge = OutcomeJudge(ServerLabels(url), "choice", rotate=False)
    judge.begin(0, "Why?")
    found = judge.score([Score(0, 1, ("a",), 0), Score(0, 2, ("b",), 0)])
    assert asked[0] == ("/v1/models", "Bearer secret")
    ((_, body),) = [one for one in asked if one[0] == "/generative_scoring"]
    assert body["model"] == "m"
    assert body["label_token_ids"] == [ord("A"), ord("B")]
    assert body["apply_softmax"] is True
    text = bytes([*body["query"], *body["items"][0]]).decode()
    assert text.startswith("Problem:\nWhy?\n\nSolution A:\n")
    assert found == [[0.5], [0.5]]


def test_each_label_stands_first_once_but_the_last(pretend):
    def scored(body: dict[str, Any]) -> Reply:
        score = (body["label_token_ids"][0] - 64) / 10
        return 200, {"data": [{"index": index, "score": score} for index in range(len(body["items"]))]}

    url, asked = pretend({**GOOD, "/generative_scoring": scored})
    labels = ServerLabels(url)
    labels.begin(0)
    (shares,) = labels.ask(CHOICE, ("A", "B", "C"), [Question(0, "Why?", "a")])
    assert shares == pytest.approx([0.1, 0.2, 0.7])
    sent = [body["label_token_ids"] for path, body in asked if path == "/generative_scoring"]
    assert sorted(sent) == [[65, 66, 67], [66, 67, 65]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"/generative_scoring": (404, {"error": {"message": "no chat"}})}, r"scoring: status 404: no chat"),
        ({"/generative_scoring": (503, b"<html>busy")}, "status 503: <html>busy"),
        ({"/generative_scoring": (200, {"data": []})}, "expected vLLM's answer, got KeyError"),
        ({"/generative_scoring": (200, {"data": [{"index": 0, "score": 1.5}] * 2})}, "got ValueError|got KeyError"),
        ({"/generative_scoring": (200, b"nothing")}, "expected vLLM's answer, got JSONDecodeError"),
    ],
)
def test_a_problem_fails_by_the_servers_error(pretend, changes, message):
    url, _ = pretend({**GOOD, **changes})
    policy = TextPolicy(lambda requests: [[Step(f"{seed % 99}", True) for seed in r.seeds] for r in requests])
    with pytest.raises(SearchError, match=message):
        search(["One?"], policy, OutcomeJudge(ServerLabels(url)), SearchConfig("best_of_n", n=2))


def test_what_may_pass_is_tried_again(pretend):
    failures = iter([(503, {}), (429, {}), (200, b"{")])

    def flaky(body: dict[str, Any]) -> Reply:
        return next(failures, GOOD["/generative_scoring"](body))

    url, asked = pretend({**GOOD, "/generative_scoring": flaky})
    assert len(scores(OutcomeJudge(ServerLabels(url), "outcome"), solutions=["a", "b"])) == 2
    assert sum(path == "/generative_scoring" for path, _ in asked) == 4
    url, asked = pretend({**GOOD, "/generative_scoring": (503, {})})
    (failed,) = scores(OutcomeJudge(ServerLabels(url, max_retries=2), "outcome"), solutions=["a"])
    assert "status 503" in str(failed)
    assert sum(path == "/generative_scoring" for path, _ in asked) == 3


class Held:
    """Holds back the scores of a problem called ``held``."""

    def __init__(self) -> None:
        self.came, self.opened = threading.Event(), threading.Event()

    def __call__(self, body: dict[str, Any]) -> Reply:
        if b"held" in bytes([*body["query"], *body["items"][0]]):
            self.came.set()
            self.opened.wait(120)
        return GOOD["/generative_scoring"](body)


def numbers(requests):
    return [[Step(f"{seed % 99}", True) for seed in request.seeds] for request in requests]


@pytest.mark.parametrize("ask", ["choice", "outcome"])
def test_a_problem_that_the_server_holds_back_keeps_no_other_waiting(pretend, ask):
    held, config = Held(), SearchConfig("best_of_n", n=3)
    url, _ = pretend({**GOOD, "/generative_scoring": held})
    with Engine(TextPolicy(numbers), OutcomeJudge(ServerLabels(url), ask)) as engine:
        slow, quick = engine.submit("held", config), engine.submit("other", config)
        assert held.came.wait(60)
        assert quick.result().completions
        assert not slow.done()
        held.opened.set()
        found = slow.result()
    (alone,) = search(["held"], TextPolicy(numbers), OutcomeJudge(ServerLabels(url), ask), config)
    assert found.tree.to_json() == alone.tree.to_json()


def test_what_is_cancelled_is_broken_off(pretend):
    """The engine, which waits for its threads, is closed before the server answers."""
    held, config = Held(), SearchConfig("best_of_n", n=3)
    url, _ = pretend({**GOOD, "/generative_scoring": held})
    before = set(threading.enumerate())
    with Engine(TextPolicy(numbers), OutcomeJudge(ServerLabels(url))) as engine:
        first, second = engine.submit("held", config), engine.submit("held, too", config)
        assert held.came.wait(60)
        first.cancel()
    with pytest.raises(SearchError, match="closed"):
        second.result()
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("tts_search")]
    held.opened.set()


def test_no_more_requests_of_all_problems_are_open_than_allowed(pretend):
    lock, now, most = threading.Lock(), [], []

    def counted(body: dict[str, Any]) -> Reply:
        with lock:
            now.append(body)
            most.append(len(now))
        threading.Event().wait(0.005)
        with lock:
            now.pop()
        return GOOD["/generative_scoring"](body)

    url, _ = pretend({**GOOD, "/generative_scoring": counted})
    judge = OutcomeJudge(ServerLabels(url, concurrency=2))
    search(["a", "b", "c", "d"], TextPolicy(numbers), judge, SearchConfig("best_of_n", n=4))
    assert max(most) <= 2


def test_servers_that_cannot_be_used(pretend):
    with pytest.raises(ValueError, match="base_url: expected an address"):
        ServerLabels("localhost:8000")
    with pytest.raises(ValueError, match="concurrency: expected an int >= 1"):
        ServerLabels("http://localhost", concurrency=0)
    with pytest.raises(ServerError, match="/v1/models: URLError"):
        ServerLabels("http://127.0.0.1:9", max_retries=0)
    url, _ = pretend({"/v1/models": (200, {"data": []})})
    with pytest.raises(ServerError, match="/v1/models: expected vLLM's answer"):
        ServerLabels(url)
    url, _ = pretend({**GOOD, "/tokenize": (200, {"max_model_len": 99, "tokens": [1, 2]})})
    with pytest.raises(ValueError, match="labels: expected the text of one token, got 'A', which is 2"):
        ServerLabels(url).ask(CHOICE, ("A", "B"), [])

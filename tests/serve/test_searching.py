"""Searches over HTTP equal those of the engine to the bit; events come as they happen; errors name the field."""

from __future__ import annotations

import json
import threading

import arithmetic_models
import pytest
from tts_search import SearchConfig, TextPolicy, search
from tts_search.lab.arithmetic import generate

PROBLEM = generate("test", 3, 1, 0)[0].problem
METHODS = ["best_of_n", "beam_search", "dvts", "rebase", "particle_filtering"]


def in_process(config: SearchConfig):
    return search([PROBLEM], arithmetic_models.policy(0.3), arithmetic_models.verifier(0.1), config)[0]


def events(text: str) -> list[tuple[str, dict]]:
    blocks = [dict(line.split(": ", 1) for line in block.splitlines()) for block in text.split("\n\n") if block]
    return [(block["event"], json.loads(block["data"])) for block in blocks]


@pytest.mark.parametrize("method", METHODS)
def test_a_search_is_the_one_in_process(texts, method):
    body = {"problem": PROBLEM, "method": method, "n": 8, "seed": 3, "max_step_tokens": 64, "tree": True}
    reply = texts.post("/v1/search", json=body)
    expected = in_process(SearchConfig(method, n=8, seed=3, max_step_tokens=64))
    assert reply.status_code == 200
    data = reply.json()
    assert data["tree"] == json.loads(expected.tree.to_json())
    assert [one["text"] for one in data["completions"]] == [one.text for one in expected.completions]
    assert [one["step_scores"] for one in data["completions"]] == [
        list(one.step_scores) for one in expected.completions
    ]
    assert (data["answer"], data["seed"]) == (expected.answer(), 3)
    path = expected.tree.path(data["best_node"])
    assert "".join(node.text for node in path) == expected.best.text
    assert data["usage"]["completion_tokens"] == expected.stats.policy_tokens


def test_events_tell_the_whole_tree(texts):
    body = {"problem": PROBLEM, "n": 8, "seed": 3, "stream": True}
    told = events(texts.post("/v1/search", json=body).text)
    nodes = {}
    for kind, data in told[:-1]:
        assert kind in ("round", "expanded", "scored", "pruned", "finished")
        nodes |= {node["id"]: node for node in data["nodes"]}
    kind, result = told[-1]
    assert kind == "result"
    expected = json.loads(in_process(SearchConfig(n=8, seed=3)).tree.to_json())["nodes"]
    assert result["tree"]["nodes"] == expected
    assert {number: node["text"] for number, node in nodes.items()} == {node["id"]: node["text"] for node in expected}
    assert {number: node["state"] for number, node in nodes.items()} == {node["id"]: node["state"] for node in expected}


def test_events_count_what_the_search_costs(local):
    body = {"problem": PROBLEM, "n": 8, "seed": 3, "max_step_tokens": 64, "stream": True}
    told = events(local.post("/v1/search", json=body).text)
    counts, (_, result) = [data["usage"] for _, data in told[:-1]], told[-1]
    assert all(0 <= one["unique_kv_tokens"] <= one["logical_kv_tokens"] for one in counts)
    assert any(0 < one["unique_kv_tokens"] < one["logical_kv_tokens"] for one in counts)
    sampled = [one["policy_tokens"] for one in counts]
    assert sampled == sorted(sampled)
    assert len(set(sampled)) > 2  # it grows round by round
    last, stats = counts[-1], result["stats"]
    assert last == {"unique_kv_tokens": 0, "logical_kv_tokens": 0} | {
        name: stats[name]
        for name in ("policy_tokens", "verifier_tokens", "peak_unique_kv_tokens", "peak_logical_kv_tokens")
    }
    assert result["usage"]["completion_tokens"] == last["policy_tokens"]
    assert result["usage"]["verifier_tokens"] == last["verifier_tokens"]


def test_a_seed_is_drawn_and_told(texts):
    one, other = (texts.post("/v1/search", json={"problem": PROBLEM, "n": 4}).json() for _ in range(2))
    assert one["seed"] != other["seed"]
    again = texts.post("/v1/search", json={"problem": PROBLEM, "n": 4, "seed": one["seed"]}).json()
    assert again["completions"] == one["completions"]


def test_a_search_by_the_name_of_a_model(texts):
    body = {"problem": PROBLEM, "seed": 1}
    by_name = texts.post("/v1/search", json={**body, "model": "policy@best_of_n-4"}).json()
    by_fields = texts.post("/v1/search", json={**body, "model": "policy", "method": "best_of_n", "n": 4}).json()
    assert by_name["completions"] == by_fields["completions"]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"problem": " "}, "problem"),
        ({"problem": None}, "problem"),
        ({"messages": [{"role": "user", "content": "x"}]}, "problem"),
        ({"method": "os:system"}, "method"),
        ({"method": "its_hub.beam_search"}, "method"),
        ({"method": 3}, "method"),
        ({"n": 0}, "n"),
        ({"n": 10**6}, "n"),
        ({"n": "many"}, "n"),
        ({"n": 6, "method": "dvts"}, "n"),
        ({"lookahead": 10**9}, "lookahead"),
        ({"temperature": -1}, "temperature"),
        ({"beams": 3}, "beams"),
        ({"vote": "loudest"}, "vote"),
        ({"model": "another"}, "model"),
        ({"model": "policy@magic-3"}, "model"),
        ({"seed": "x"}, "seed"),
        ({"thinking": {"end": ""}, "method": "budget_forcing"}, "thinking"),
    ],
)
def test_what_is_wrong_is_named(texts, changes, names):
    reply = texts.post("/v1/search", json={"problem": PROBLEM, "n": 4, **changes})
    assert reply.status_code in (400, 404)
    assert names in reply.json()["error"]["message"]


def test_methods_that_need_a_verifier_are_refused_without_one(serve):
    client = serve(arithmetic_models.policy(0.3))
    reply = client.post("/v1/search", json={"problem": PROBLEM, "n": 4})
    assert reply.status_code == 400
    assert "verifier" in reply.json()["error"]["message"]
    best = client.post("/v1/search", json={"problem": PROBLEM, "n": 4, "method": "best_of_n"}).json()
    assert best["vote"] == "majority"
    assert best["best"]["score"] is None


def test_a_failure_of_a_model_shows_nothing_of_the_machine(serve):
    def fail(_requests):
        raise RuntimeError("/home/somebody/secret")

    client = serve(TextPolicy(fail))
    body = {"problem": PROBLEM, "n": 4, "method": "best_of_n"}
    reply = client.post("/v1/search", json=body)
    assert reply.status_code == 500
    assert "somebody" not in reply.text
    kind, data = events(client.post("/v1/search", json={**body, "stream": True}).text)[-1]
    assert (kind, data["error"]["code"]) == ("error", 500)
    assert "somebody" not in json.dumps(data)


def test_a_search_that_takes_too_long_ends(serve):
    wait = threading.Event()
    client = serve(TextPolicy(lambda _: wait.wait(20) and []), timeout_s=0.2)
    body = {"problem": PROBLEM, "n": 4, "method": "best_of_n"}
    assert client.post("/v1/search", json=body).status_code == 504
    assert events(client.post("/v1/search", json={**body, "stream": True}).text)[-1][1]["error"]["code"] == 504
    wait.set()


def test_a_budget_bounds_what_is_sampled(local):
    body = {"problem": PROBLEM, "seed": 1, "n": 8, "max_step_tokens": 8}
    whole = local.post("/v1/search", json={**body, "method": "beam_search"}).json()
    part = local.post("/v1/search", json={**body, "method": "beam_search", "budget": {"tokens": 20}}).json()
    assert part["stats"]["rounds"] < whole["stats"]["rounds"]
    assert 20 <= part["stats"]["policy_tokens"] <= 20 + 8 * 8
    few = local.post("/v1/search", json={**body, "method": "best_of_n", "budget": {"tokens": 30}}).json()
    assert few["config"]["n"] == 3
    assert few["stats"]["policy_tokens"] <= 30
    limit = whole["stats"]["flops_policy"] / 3
    cheap = local.post("/v1/search", json={**body, "method": "beam_search", "budget": {"flops": limit}}).json()
    assert cheap["stats"]["rounds"] < whole["stats"]["rounds"]
    turns = [{"role": "user", "content": PROBLEM}]
    search = {"method": "best_of_n", "max_tokens": 8, "budget": {"tokens": 16}}
    chat = local.post("/v1/chat/completions", json={"messages": turns, "search": search}).json()
    assert len(chat["search"]["completions"]) == 2
    for wrong in ({}, {"tokens": 0}, {"tokens": 9, "flops": 9.0}, {"seconds": 1}, 7, {"tokens": 7}):
        reply = local.post("/v1/search", json={**body, "method": "best_of_n", "budget": wrong})
        assert reply.status_code == 400, wrong
        assert "budget" in reply.json()["error"]["message"]

"""A server's information about itself, and tokens of texts and conversations."""

from __future__ import annotations

import arithmetic_models
import pytest
from tts_search.policies.prompt import prompt_of, text_ids

TURNS = [{"role": "user", "content": "Start with 3, add 4."}]


def test_models(local):
    data = local.get("/v1/models").json()["data"]
    names = [entry["id"] for entry in data]
    assert names == ["policy", "alias", "policy@beam_search-16", "policy@best_of_n-16", "policy@dvts-16", "verifier"]
    assert {entry["max_model_len"] for entry in data} == {1024}
    assert local.get("/v1/models/policy@dvts-16").json()["parent"] == "policy"
    assert local.get("/v1/models/another").status_code == 404


def test_health_and_version(local):
    health = local.get("/health")
    assert (health.status_code, health.content) == (200, b"")
    assert set(local.get("/version").json()) == {"version"}


def test_an_engine_that_has_ended_is_not_well(serve):
    client = serve(arithmetic_models.policy(0.3))
    client.app.state.service.engine.close()
    assert client.get("/health").status_code == 503
    body = {"problem": "x", "method": "best_of_n", "n": 2}
    assert client.post("/v1/search", json=body).status_code == 503


def test_tokens_of_a_text_and_back(local, models):
    tokenizer = models[0].tokenizer
    for text in ("12 + 3 = 15\n\n", "\u00e9 \U0001f600 ", ""):
        reply = local.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
        assert reply["tokens"] == text_ids(text, tokenizer, special=True)
        assert reply["count"] == len(reply["tokens"]) == len(reply["token_strs"])
        assert reply["max_model_len"] == 1024
        plain = local.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
        assert local.post("/detokenize", json={"tokens": plain}).json() == {"prompt": text}


def test_tokens_of_a_conversation(local, models):
    tokenizer = models[0].tokenizer
    reply = local.post("/tokenize", json={"messages": TURNS}).json()["tokens"]
    assert reply == text_ids(prompt_of(TURNS[0]["content"], None, tokenizer), tokenizer, special=False)
    begun = [*TURNS, {"role": "assistant", "content": "3 + 4 = 7\n\n"}]
    for continued in (begun, [*TURNS, {"role": "assistant", "content": [{"type": "text", "text": "3 + 4 = 7\n\n"}]}]):
        body = {"messages": continued, "continue_final_message": True, "add_generation_prompt": False}
        tokens = local.post("/tokenize", json=body).json()["tokens"]
        assert tokens[: len(reply)] == reply
        assert local.post("/detokenize", json={"tokens": tokens[len(reply) :]}).json()["prompt"] == "3 + 4 = 7\n\n"


@pytest.mark.parametrize(
    ("route", "body", "named"),
    [
        ("tokenize", {}, "prompt"),
        ("tokenize", {"prompt": "a", "messages": TURNS}, "prompt"),
        ("tokenize", {"prompt": "a", "model": "x"}, "model"),
        ("tokenize", {"messages": []}, "messages"),
        ("tokenize", {"messages": [{"role": "wizard", "content": "a"}]}, "role"),
        ("tokenize", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text"),
        ("detokenize", {}, "tokens"),
        ("detokenize", {"tokens": [10**6]}, "tokens"),
        ("detokenize", {"tokens": [-1]}, "tokens"),
        ("detokenize", {"tokens": ["a"]}, "tokens"),
    ],
)
def test_what_is_wrong_is_named(local, route, body, named):
    reply = local.post(f"/{route}", json=body)
    assert reply.status_code in (400, 404)
    assert named in reply.json()["error"]["message"]


def test_functions_of_text_have_no_tokens(texts):
    assert texts.post("/tokenize", json={"prompt": "a"}).status_code == 501
    assert texts.get("/v1/models").json()["data"][0]["max_model_len"] is None

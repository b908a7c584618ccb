"""Completions and chats: the engine's output, cut as a request asks, in the form that OpenAI's clients expect."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from fastapi.testclient import TestClient
from tts_search import HFPolicy, SearchConfig, search
from tts_search.lab import MODELS_DIR
from tts_search.serve.app import create_app
from tts_search.serve.service import Service

PROBLEM = "Start with 20, add 5, multiply by 3, add 12. What is the result modulo 100?"
TURNS = [{"role": "user", "content": PROBLEM}]
CHAT = {"messages": TURNS, "max_tokens": 64, "seed": 5}


def chat(client, **changes):
    reply = client.post("/v1/chat/completions", json={**CHAT, **changes})
    assert reply.status_code == 200, reply.text
    return reply.json()


def complete(client, **changes):
    reply = client.post("/v1/completions", json={"prompt": "20 + 5 =", "max_tokens": 32, "seed": 5, **changes})
    assert reply.status_code == 200, reply.text
    return reply.json()


def contents(reply: dict) -> list[str]:
    return [choice["message"]["content"] for choice in reply["choices"]]


def chunks(client, route: str, body: dict) -> list[dict]:
    text = client.post(route, json={**body, "stream": True}).text
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_answers_are_those_of_best_of_n_in_process(local):
    config = SearchConfig("best_of_n", n=6, seed=5, temperature=0.8, max_step_tokens=64)
    reply = chat(local, n=6, temperature=0.8)
    alone = HFPolicy(str(MODELS_DIR / "policy-0.1m"))
    (result,) = search([PROBLEM], alone, None, config)
    assert contents(reply) == [one.text for one in result.completions]
    assert reply["usage"]["completion_tokens"] == result.stats.policy_tokens
    assert [choice["finish_reason"] for choice in reply["choices"]] == [
        "stop" if one.finished else "length" for one in result.completions
    ]


def test_a_chat_and_the_completion_of_its_prompt(local):
    tokens = local.post("/tokenize", json={"messages": TURNS}).json()["tokens"]
    one, other = chat(local, temperature=0), complete(local, prompt=tokens, max_tokens=64, temperature=0)
    assert contents(one) == [other["choices"][0]["text"]]
    assert one["usage"] == other["usage"]


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    "more", [{}, {"stop": ["\n\n", "= "]}, {"n": 3, "stop": "5"}, {"temperature": 0, "max_tokens": 3}]
)
def test_a_stream_tells_the_same(local, route, more):
    body = {**CHAT, "prompt": PROBLEM, **more}
    whole = local.post(route, json=body).json()
    told = chunks(local, route, {**body, "stream_options": {"include_usage": True}})
    told_usage = told.pop()["usage"]
    assert told_usage["prompt_tokens_details"]["cached_tokens"] == told_usage["prompt_tokens"] - 1
    assert {**told_usage, "prompt_tokens_details": None} == {**whole["usage"], "prompt_tokens_details": None}
    texts = [""] * len(whole["choices"])
    ends = [None] * len(whole["choices"])
    for chunk in told:
        for choice in chunk["choices"]:
            assert ends[choice["index"]] is None, "nothing comes after the end"
            texts[choice["index"]] += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
            if choice["finish_reason"]:
                ends[choice["index"]] = (choice["finish_reason"], choice["stop_reason"])
    assert texts == (
        contents(whole) if "messages" in route or "chat" in route else [c["text"] for c in whole["choices"]]
    )
    assert ends == [(choice["finish_reason"], choice["stop_reason"]) for choice in whole["choices"]]


def test_stops_cut_and_are_named(local):
    free = contents(chat(local, temperature=0))[0]
    at = free.index("\n\n")
    cut = chat(local, temperature=0, stop=["no such text", "\n\n"])["choices"][0]
    assert (cut["message"]["content"], cut["finish_reason"], cut["stop_reason"]) == (free[:at], "stop", "\n\n")
    kept = chat(local, temperature=0, stop="\n\n", include_stop_str_in_output=True)["choices"][0]
    assert kept["message"]["content"] == free[: at + 2]
    across = free[at - 1 : at + 4]  # begins and ends within tokens
    assert chat(local, temperature=0, stop=[across])["choices"][0]["message"]["content"] == free[: at - 1]
    token = chat(local, temperature=0, return_token_ids=True)["choices"][0]["token_ids"][3]
    ended = chat(local, temperature=0, stop_token_ids=[token], return_token_ids=True)["choices"][0]
    assert (ended["finish_reason"], ended["stop_reason"]) == ("stop", token)
    assert free.startswith(ended["message"]["content"])
    assert ended["token_ids"][-1] == token


def test_the_end_of_an_answer_has_no_stop_reason(local):
    choice = chat(local, temperature=0, max_tokens=400)["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
    choice = chat(local, temperature=0, max_tokens=2)["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)
    longer = chat(local, temperature=0, ignore_eos=True, max_tokens=100)
    assert longer["usage"]["completion_tokens"] == 100


def test_continuing_goes_on_where_it_was(local):
    free = contents(chat(local, temperature=0))[0]
    begun = free[: free.index("\n\n") + 2]
    more = chat(
        local,
        messages=[*TURNS, {"role": "assistant", "content": begun}],
        add_generation_prompt=False, continue_final_message=True, temperature=0,
    )  # fmt: skip
    assert begun + contents(more)[0] == free
    echoed = chat(
        local,
        messages=[*TURNS, {"role": "assistant", "content": begun}],
        add_generation_prompt=False, continue_final_message=True, temperature=0, echo=True,
    )  # fmt: skip
    assert contents(echoed)[0] == free
    marked = [*TURNS, {"role": "assistant", "content": begun, "prefix": True}]  # as other servers' clients say it
    assert begun + contents(chat(local, messages=marked, temperature=0))[0] == free


def test_log_probabilities(local):
    choice = chat(local, logprobs=True, top_logprobs=3, temperature=0, max_tokens=5, return_token_ids=True)["choices"][
        0
    ]
    told = choice["logprobs"]["content"]
    assert len(told) == len(choice["token_ids"]) == 5
    assert "".join(each["token"] for each in told) == choice["message"]["content"]
    for each in told:
        assert len(each["top_logprobs"]) == 3
        likeliest = each["top_logprobs"][0]
        assert (likeliest["token"], likeliest["logprob"]) == (each["token"], pytest.approx(each["logprob"], abs=1e-5))
        assert bytes(each["bytes"]).decode() == each["token"]
    plain = complete(local, logprobs=2, temperature=0, max_tokens=4)["choices"][0]["logprobs"]
    assert len(plain["tokens"]) == len(plain["token_logprobs"]) == len(plain["top_logprobs"]) == 4
    assert plain["text_offset"][0] == 0
    assert plain["text_offset"] == sorted(plain["text_offset"])


def test_a_seed_is_drawn_and_told(local):
    body = {"messages": TURNS, "max_tokens": 32, "n": 4}
    one, other = (local.post("/v1/chat/completions", json=body).json() for _ in range(2))
    assert one["seed"] != other["seed"]
    again = local.post("/v1/chat/completions", json={**body, "seed": one["seed"]}).json()
    assert contents(again) == contents(one)
    fewer = local.post("/v1/chat/completions", json={**body, "seed": one["seed"], "n": 2}).json()
    assert contents(fewer) == contents(one)[:2]


def test_several_prompts(local):
    reply = complete(local, prompt=["20 + 5 =", "3 * 3 ="], n=2, return_token_ids=True)
    alone = [complete(local, prompt=prompt, n=2)["choices"] for prompt in ("20 + 5 =", "3 * 3 =")]
    assert [choice["text"] for choice in reply["choices"]] == [choice["text"] for each in alone for choice in each]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert complete(local, prompt="20 +", echo=True, temperature=0)["choices"][0]["text"].startswith("20 +")


def test_a_search_by_extra_body_by_name_and_by_budget(local):
    fields = {"method": "beam_search", "n": 8, "max_step_tokens": 64}
    direct = local.post("/v1/search", json={"problem": PROBLEM, "seed": 5, **fields}).json()
    by_body = chat(local, max_tokens=None, search={**fields, "tree": True})
    assert contents(by_body) == [direct["best"]["text"]]
    assert by_body["search"]["answer"] == direct["answer"]
    assert by_body["search"]["stats"]["policy_tokens"] == direct["stats"]["policy_tokens"]
    assert len(by_body["search"]["tree"]["nodes"]) == 1 + direct["stats"]["branches"]
    assert by_body["choices"][0]["step_scores"] == direct["best"]["step_scores"]
    named = chat(local, max_tokens=None, model="policy@beam_search-8", search={"max_step_tokens": 64})
    assert contents(named) == contents(by_body)
    several = chat(local, max_tokens=None, search=fields, n=3)
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2]
    assert contents(several)[:1] == contents(by_body)
    told = chunks(local, "/v1/chat/completions", {**CHAT, "max_tokens": None, "search": fields})
    assert told[0]["choices"][0]["delta"]["content"] == direct["best"]["text"]
    budget = chat(local, budget=4, return_response_only=False)
    assert len(budget["metadata"]["all_responses"]) == 4
    chosen = budget["metadata"]["all_responses"][budget["metadata"]["selected_index"]]
    assert [chosen["content"]] == contents(budget)
    header = local.post("/v1/chat/completions", json=CHAT, headers={"X-ITS-Budget": "4"}).json()
    assert contents(header) == contents(budget)


@pytest.mark.parametrize(
    ("route", "changes", "named"),
    [
        ("chat", {"n": 0}, "n"),
        ("chat", {"n": 10**4}, "n"),
        ("chat", {"temperature": -0.1}, "temperature"),
        ("chat", {"top_p": 0}, "top_p"),
        ("chat", {"stop": [""]}, "stop"),
        ("chat", {"stop": ["x"] * 99}, "stop"),
        ("chat", {"max_tokens": 0}, "max_tokens"),
        ("chat", {"presence_penalty": 0.5}, "presence_penalty"),
        ("chat", {"response_format": {"type": "json_object"}}, "response_format"),
        ("chat", {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ("chat", {"logprobs": True, "logprob_token_ids": [10**6]}, "logprobs_of"),
        ("chat", {"min_tokens": -1}, "min_tokens"),
        ("chat", {"chat_template": "{{ messages }}"}, "chat_template"),
        ("chat", {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template"),
        ("chat", {"messages": []}, "messages"),
        ("chat", {"messages": [{"role": "user", "content": "a " * 3000}]}, "tokens"),
        ("chat", {"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
        ("chat", {"model": "gpt-5"}, "model"),
        ("chat", {"search": {"beams": 3}}, "beams"),
        ("chat", {"search": {"method": "best_of_n", "n": 2}, "stop": "x"}, "search"),
        ("chat", {"search": {"method": "best_of_n", "n": 2}, "n": 3}, "n"),
        ("chat", {"seed": 2**70}, "seed"),
        ("plain", {"prompt": ""}, "prompt"),
        ("plain", {"prompt": []}, "prompt"),
        ("plain", {"prompt": [10**6]}, "tokens"),
        ("plain", {"prompt": [[]]}, "prompt"),
        ("plain", {"prompt": ["a"] * 200, "n": 4}, "n"),
        ("plain", {"echo": True, "logprobs": 1, "stream": True}, "echo"),
        ("plain", {"suffix": "x"}, "suffix"),
        ("plain", {"max_tokens": 0}, "max_tokens"),
        ("plain", {"max_tokens": 0, "echo": True, "stream": True}, "max_tokens"),
    ],
)
def test_what_is_wrong_is_named(local, route, changes, named):
    base = {"chat": CHAT, "plain": {"prompt": "a", "max_tokens": 4}}[route]
    url = {"chat": "/v1/chat/completions", "plain": "/v1/completions"}[route]
    reply = local.post(url, json={**base, **changes})
    assert reply.status_code in (400, 404), reply.text
    assert named in reply.json()["error"]["message"]


def test_an_echo_tells_of_the_prompt_as_of_an_answer(local):
    """What a prompt's tokens are told is what they were told when they were drawn."""
    drawn = complete(local, prompt="20 +", logprobs=2, temperature=0, max_tokens=8, return_token_ids=True)["choices"][0]
    prompt = [*drawn["prompt_token_ids"], *drawn["token_ids"]]
    (choice,) = complete(local, prompt=prompt, echo=True, logprobs=2, temperature=0, max_tokens=1)["choices"]
    told, old = choice["logprobs"], drawn["logprobs"]
    assert (told["token_logprobs"][0], told["top_logprobs"][0]) == (None, None)
    assert len(told["tokens"]) == len(prompt) + 1 == len(told["text_offset"])
    assert told["token_logprobs"][-9:-1] == pytest.approx(old["token_logprobs"], abs=1e-5)
    assert [sorted(top) for top in told["top_logprobs"][-9:-1]] == [sorted(top) for top in old["top_logprobs"]]
    ends = [*told["text_offset"][1:], len(choice["text"])]
    pieces = [choice["text"][begin:end] for begin, end in zip(told["text_offset"], ends, strict=True)]
    assert "".join(pieces) == choice["text"]
    assert pieces[-9:-1] == old["tokens"]


@pytest.mark.parametrize("n", [1, 2])
def test_a_prompt_alone_is_scored(local, n):
    """No token is wanted: what is told is the prompt's, as with one token."""
    body = {"prompt": ["20 +", "7"], "echo": True, "logprobs": 2, "temperature": 0, "n": n, "return_token_ids": True}
    scored = complete(local, max_tokens=0, **body)
    longer = complete(local, max_tokens=1, **body)["choices"]
    assert scored["usage"]["completion_tokens"] == 0
    for one, other in zip(scored["choices"][::n], longer[::n], strict=True):
        count = len(one["prompt_token_ids"])
        assert other["text"].startswith(one["text"])
        assert (one["finish_reason"], one["token_ids"]) == ("length", [])
        assert one["logprobs"] == {name: values[:count] for name, values in other["logprobs"].items()}
    assert len(scored["choices"]) == 2 * n


def test_prompt_logprobs_as_vllm_tells_them(local):
    """reward_hub's DrSow asks for `true` and one token; every answer to a prompt is told of it."""
    reply = chat(local, prompt_logprobs=True, max_completion_tokens=1, n=2, return_token_ids=True)
    first, *others = reply["prompt_logprobs"]
    assert first is None
    assert len(others) == len(reply["prompt_token_ids"]) - 1
    for token, place in zip(reply["prompt_token_ids"][1:], others, strict=True):
        best = next(entry for entry in place.values() if entry["rank"] == 1)
        assert place[str(token)]["logprob"] <= best["logprob"] <= 0
        assert len(place) <= 2
    assert "stop_reason" in reply["choices"][0]
    several = complete(local, prompt=["20 +", "7"], n=2, prompt_logprobs=0, max_tokens=1)["choices"]
    assert several[0]["prompt_logprobs"] == several[1]["prompt_logprobs"] != several[2]["prompt_logprobs"]
    assert chat(local, max_tokens=1)["prompt_logprobs"] is None


def test_usage_tells_what_the_cache_held(local):
    turns = [{"role": "user", "content": "Nobody has asked this before."}]
    first, second = (chat(local, messages=turns, max_tokens=2)["usage"] for _ in range(2))
    assert second["prompt_tokens"] == first["prompt_tokens"]
    assert first["prompt_tokens_details"]["cached_tokens"] < second["prompt_tokens_details"]["cached_tokens"]
    assert second["prompt_tokens_details"]["cached_tokens"] == second["prompt_tokens"] - 1  # the last one is read


def test_an_answer_has_the_tokens_that_it_is_to_have(local):
    usual = chat(local, temperature=0, max_tokens=64)
    ended = usual["usage"]["completion_tokens"]
    assert usual["choices"][0]["finish_reason"] == "stop"
    longer = chat(local, temperature=0, max_tokens=64, min_tokens=ended + 3)
    assert longer["usage"]["completion_tokens"] >= ended + 3


def test_generative_scoring(local):
    """The first label's share is what the policy's own log-probabilities of both labels say."""
    texts = ["20 + 5 = 25", "1", "The answer"]
    labels = [*local.post("/tokenize", json={"prompt": "25", "add_special_tokens": False}).json()["tokens"][:1], 7]
    body = {"query": "Is it so? ", "items": texts, "label_token_ids": labels}
    share, alone = (
        [
            one["score"]
            for one in local.post("/generative_scoring", json={**body, "apply_softmax": softmax}).json()["data"]
        ]
        for softmax in (True, False)
    )
    for item, score, single in zip(texts, share, alone, strict=True):
        (choice,) = complete(
            local, prompt=f"Is it so? {item}", add_special_tokens=False, logprobs=0, logprob_token_ids=labels,
            temperature=0, max_tokens=1, return_token_ids=True,
        )["choices"]  # fmt: skip
        names = [local.post("/detokenize", json={"tokens": [label]}).json()["prompt"] for label in labels]
        first, second = (math.exp(choice["logprobs"]["top_logprobs"][0][name]) for name in names)
        assert single == pytest.approx(first, rel=1e-4)
        assert score == pytest.approx(first / (first + second), rel=1e-4)
    one = local.post("/v1/generative_scoring", json={**body, "items": texts[1], "item_first": True}).json()
    assert len(one["data"]) == 1
    for wrong in ({"label_token_ids": []}, {"items": []}, {"label_token_ids": [10**6]}):
        assert local.post("/generative_scoring", json={**body, **wrong}).status_code == 400


def test_a_template_of_a_request_only_if_it_is_allowed(service):
    settings = replace(service.settings, allow_chat_template=True)
    client = TestClient(
        create_app(Service(service.engine, service.policy, service.verifier, settings)), base_url="http://127.0.0.1"
    )
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    reply = chat(client, chat_template=template, return_token_ids=True)
    assert client.post("/detokenize", json={"tokens": reply["prompt_token_ids"]}).json()["prompt"] == PROBLEM
    refused = client.post("/v1/chat/completions", json={**CHAT, "chat_template": "{{ raise_exception('/etc') }}"})
    assert refused.status_code == 400
    escaping = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    assert client.post("/v1/chat/completions", json={**CHAT, "chat_template": escaping}).status_code == 400


def test_functions_of_text_answer_chats_by_searches_alone(texts):
    assert texts.post("/v1/chat/completions", json=CHAT).status_code == 501
    reply = texts.post("/v1/chat/completions", json={**CHAT, "search": {"method": "best_of_n", "n": 4}})
    assert reply.status_code == 200


def test_workers_of_other_frameworks(local):
    body = {"model": "/somewhere/policy", "prompt": "20 + 5 =", "n": 3, "temperature": 0.7, "top_p": 1.0, "top_k": -1,
            "max_new_tokens": 16, "stop": ["\n\n"], "stop_token_ids": [], "echo": False,
            "include_stop_str_in_output": True, "seed": 1}  # fmt: skip
    reply = local.post("/worker_generate", json=body).json()
    same = complete(local, prompt="20 + 5 =", n=3, temperature=0.7, max_tokens=16, stop=["\n\n"], seed=1,
                    include_stop_str_in_output=True, logprobs=0)  # fmt: skip
    assert reply["text"] == [choice["text"] for choice in same["choices"]]
    assert reply["cumulative_logprob"] == [sum(choice["logprobs"]["token_logprobs"]) for choice in same["choices"]]
    assert sum(reply["output_token_len"]) == same["usage"]["completion_tokens"]
    assert reply["usage"]["prompt_tokens"] == same["usage"]["prompt_tokens"]
    sampling = {"temperature": 0.7, "max_new_tokens": 16, "stop": "\n\n", "n": 3, "seed": 1}
    listed = local.post("/generate", json={"text": "20 + 5 =", "sampling_params": sampling}).json()
    assert [one["text"].rstrip() for one in listed] == [text.rstrip() for text in reply["text"]]
    alone = local.post("/generate", json={"text": "20 + 5 =", "sampling_params": {**sampling, "n": 1}}).json()
    assert alone["meta_info"]["finish_reason"]["type"] in ("stop", "length")
    assert local.post("/get_worker_address", json={"model": "x"}).json() == {"address": "http://127.0.0.1"}


def test_workers_that_score(local):
    answer = "20 + 5 = 25\n\n25 * 3 = 75"
    turns = [{"role": "user", "content": PROBLEM}, {"role": "assistant", "content": answer}]
    expected = local.post("/pooling", json={"messages": turns}).json()["data"][0]["data"]
    body = {"input_str": [[PROBLEM, answer], turns]}
    assert local.post("/worker_reward_inference", json=body).json()["reward"] == [[pair[-1] for pair in expected]] * 2
    tagged = {"input_str": f"{PROBLEM.replace(' ', '_')} 20 + 5 = 25<|step|>25 * 3 = 75<|step|>"}
    (reward,) = local.post("/worker_reward_inference", json=tagged).json()["reward"]
    assert len(reward) == 2
    for bad in ([["a", "b", "c"]], [[]], [], [1], [["a", " "]]):
        assert local.post("/worker_reward_inference", json={"input_str": bad}).status_code == 400

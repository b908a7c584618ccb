"""Clients as they come from PyPI, unmodified, against a server on a socket of this machine."""

from __future__ import annotations

import asyncio

import pytest

PROBLEM = "Start with 20, add 5, multiply by 3, add 12. What is the result modulo 100?"
TURNS = [{"role": "user", "content": PROBLEM}]
SEARCH = {"method": "beam_search", "n": 8, "max_step_tokens": 64}


@pytest.fixture(scope="module")
def openai():
    return pytest.importorskip("openai", reason="pip install openai")


@pytest.fixture
def client(openai, live):
    with openai.OpenAI(base_url=f"{live}/v1", api_key="none", max_retries=0) as one:
        yield one


def test_openai_answers(client):
    assert "policy" in {model.id for model in client.models.list()}
    reply = client.chat.completions.create(model="policy", messages=TURNS, n=4, max_tokens=64, seed=3)
    assert len(reply.choices) == 4
    assert {choice.finish_reason for choice in reply.choices} <= {"stop", "length"}
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    text = client.completions.create(model="policy", prompt="20 + 5 =", max_tokens=8, seed=3, logprobs=2)
    assert len(text.choices[0].logprobs.tokens) == text.usage.completion_tokens


def test_openai_streams(client):
    body = {"model": "policy", "messages": TURNS, "n": 2, "max_tokens": 64, "seed": 3}
    whole = client.chat.completions.create(**body)
    texts = ["", ""]
    usage = None
    for chunk in client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1  # the same prompt a second time


def test_openai_searches(client):
    reply = client.chat.completions.create(
        model="policy", messages=TURNS, seed=3, extra_body={"search": {**SEARCH, "tree": True}}
    )
    found = reply.model_extra["search"]
    assert found["answer"] in reply.choices[0].message.content
    assert len(found["tree"]["nodes"]) > 8
    named = client.chat.completions.create(model="policy@best_of_n-4", messages=TURNS, seed=3, max_tokens=64)
    assert len(named.model_extra["search"]["completions"]) == 4


def test_openai_many_at_once(openai, live):
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live}/v1", api_key="none", max_retries=0) as one:
            asked = [
                one.chat.completions.create(model="policy", messages=TURNS, max_tokens=48, seed=seed % 4)
                for seed in range(16)
            ]
            return [reply.choices[0].message.content for reply in await asyncio.gather(*asked)]

    texts = asyncio.run(ask())
    assert texts == texts[:4] * 4  # whatever runs beside it, a seed gives its answer


def test_openai_errors(openai, client):
    with pytest.raises(openai.NotFoundError, match="model"):
        client.chat.completions.create(model="another", messages=TURNS)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="policy", messages=TURNS, temperature=-1)
    assert caught.value.param == "temperature"


def test_our_policy_over_http_is_the_one_in_process(openai, live):  # noqa: ARG001
    from tts_search import HFPolicy, SearchConfig, search
    from tts_search.lab import MODELS_DIR
    from tts_search.policies.openai import OpenAIPolicy

    config = SearchConfig("best_of_n", n=4, temperature=0.0, max_step_tokens=64)
    remote = OpenAIPolicy("policy", base_url=f"{live}/v1", max_retries=0)
    (there,) = search([PROBLEM], remote, None, config, progress=False)
    (here,) = search([PROBLEM], HFPolicy(str(MODELS_DIR / "policy-0.1m")), None, config, progress=False)
    assert [one.text for one in there.completions] == [one.text for one in here.completions]


@pytest.fixture
def its_hub():
    pytest.importorskip("aiohttp", reason="pip install aiohttp backoff certifi")
    return pytest.importorskip("its_hub", reason="pip install --no-deps 'its-hub==1.2.*'")


class Rewards:
    """A process reward model of its_hub's that asks our server."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def ascore(self, prompt, texts):
        import httpx2

        several = [[{"role": "user", "content": prompt.to_prompt() if hasattr(prompt, "to_prompt") else prompt},
                    {"role": "assistant", "content": text}] for text in texts]  # fmt: skip
        async with httpx2.AsyncClient() as one:
            reply = await one.post(f"{self.url}/pooling", json={"messages": several})
        assert reply.status_code == 200, reply.text
        return [entry["data"][-1][-1] for entry in reply.json()["data"]]


def test_its_hub_searches_over_http(its_hub, live):  # noqa: ARG001
    from its_hub.core.algorithms.beam_search import BeamSearch
    from its_hub.core.algorithms.self_consistency import SelfConsistency
    from its_hub.core.lms.openai_lm import OpenAICompatibleLanguageModel
    from its_hub.core.lms.step_generation import StepGeneration

    async def run():
        model = OpenAICompatibleLanguageModel(f"{live}/v1", "none", "policy", max_completion_tokens=64, temperature=0.8)
        voted = await SelfConsistency(lambda text: text.split("boxed")[-1]).ainfer(model, PROBLEM, budget=4)
        steps = StepGeneration(8, "\n\n", include_stop_str_in_output=True)
        found = await BeamSearch(steps, Rewards(live), beam_width=2).ainfer(
            model, PROBLEM, budget=4, return_response_only=False
        )
        return voted, found

    voted, found = asyncio.run(run())
    assert voted["content"]
    assert len(found.responses) == 4
    assert "20 + 5" in found.the_one["content"]

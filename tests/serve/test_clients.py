"""Clients from PyPI, unmodified, against a server on a socket of this machine."""

from __future__ import annotations

import asyncio
import os

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


def test_its_hub_takes_the_best_of_n_over_http(its_hub, live):  # noqa: ARG001
    """The server is the policy, and scores whole solutions by `/score`, or as its_hub's own judge by a chat."""
    import httpx2
    from its_hub.api import AbstractOutcomeRewardModel
    from its_hub.core.algorithms.bon import BestOfN
    from its_hub.core.lms.openai_lm import OpenAICompatibleLanguageModel
    from its_hub.core.reward_models.llm_judge import LLMJudge

    class Verifier(AbstractOutcomeRewardModel):
        def score(self, messages, **_):
            solutions = [turns[-1].content for turns in messages]
            body = {"queries": messages[0][0].content, "documents": solutions, "aggregate": "min"}
            reply = httpx2.post(f"{live}/score", json=body)
            return [entry["score"] for entry in reply.raise_for_status().json()["data"]]

        async def ascore(self, messages, **_):
            return self.score(messages)

    async def run(rewards):
        model = OpenAICompatibleLanguageModel(f"{live}/v1", "none", "policy", max_completion_tokens=64, temperature=2.0)
        found = await BestOfN(rewards(model)).ainfer(model, PROBLEM, budget=8, return_response_only=False)
        await model.close()
        return found

    found = asyncio.run(run(lambda _: Verifier()))
    assert len(found.responses) == len(found.scores) == 8
    assert found.scores[found.selected_index] == max(found.scores)
    assert len({one["content"] for one in found.responses}) > 1
    judged = asyncio.run(run(lambda model: LLMJudge(model, response_format=None)))
    assert judged.scores == [5.0] * 8  # what it takes where the answer has no score: the demo's policy only counts


@pytest.mark.parametrize("needs_logprobs", [False, True])
def test_thinkbooster_calls(client, needs_logprobs):
    """What its model asks for (thinkbooster/models/blackboxmodel_with_streaming.py at 9ad8191), by the same client."""
    asked = {
        "model": "policy",
        "max_tokens": 48,
        "temperature": 0.7,
        "logprobs": needs_logprobs,
        "top_logprobs": 20 if needs_logprobs else None,
    }
    begun = [*TURNS, {"role": "assistant", "content": "20 + 5 = 25\n\n", "prefix": True}]
    for messages in (TURNS, begun):
        reply = client.chat.completions.create(**asked, messages=messages, n=4, stream=False, stop=["\n\n", "</think>"])
        assert len(reply.choices) == 4
        for choice in reply.choices:
            assert choice.finish_reason in ("stop", "length")
            assert "\n\n" not in choice.message.content
            tokens = choice.logprobs.content if needs_logprobs else []
            assert all(len(token.top_logprobs) == 20 for token in tokens)
            assert "".join(token.token for token in tokens).startswith(choice.message.content if needs_logprobs else "")
        text, count, reason = "", 0, None
        for chunk in client.chat.completions.create(**asked, messages=messages, stream=True, stop=None):
            (choice,) = chunk.choices
            text += choice.delta.content or ""
            count += len(choice.logprobs.content) if needs_logprobs and choice.logprobs else 0
            if (reason := choice.finish_reason) is not None:
                break
        assert text
        assert reason in ("stop", "length")
        assert (count > 0) == needs_logprobs
        stream = client.chat.completions.create(**asked, messages=messages, stream=True, stop=None)
        next(iter(stream))  # a step is over: it stops to read
        stream.close()


@pytest.fixture(scope="module")
def qwen_prm(tmp_path_factory):
    """A small checkpoint in the format of the one that reward_hub's client is written for."""
    import layouts

    folder = tmp_path_factory.mktemp("models") / "Qwen2.5-Math-PRM-7B"
    folder.mkdir()
    next(one for one in layouts.LAYOUTS if one.checkpoint == folder.name).write(folder)
    return folder


SOLUTIONS = ("20 + 5 = 25\n\n25 * 3 = 75\n\nThe answer is \\boxed{75}.", "20 + 5 = 26\n\nThe answer is \\boxed{78}.")


def test_reward_hub_scores_steps(live_over, models, qwen_prm, monkeypatch):
    """Its client finds the tokenizer here and not on the hub; all else is as it comes."""
    pytest.importorskip("requests", reason="pip install requests")
    rewards = pytest.importorskip("reward_hub.openai.reward", reason="pip install --no-deps 'reward-hub==0.1.10'")
    from transformers import AutoTokenizer
    from tts_search import HFVerifier
    from tts_search.search.protocol import Score

    name, load = "Qwen/Qwen2.5-Math-PRM-7B", AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda _: load(qwen_prm))
    url, _ = live_over(models[0], HFVerifier(str(qwen_prm)), verifier_names=(name,))
    client = rewards.OpenAIProcessRewardModel(name, int(url.rpartition(":")[2]))
    conversations = [[*TURNS, {"role": "assistant", "content": text}] for text in SOLUTIONS]
    found = [one.step_scores for one in client.score(conversations, return_full_prm_result=True)]
    alone = HFVerifier(str(qwen_prm))
    alone.begin(0, PROBLEM)
    expected = alone.score([Score(0, number, tuple(text.split("\n\n")), 0) for number, text in enumerate(SOLUTIONS, 1)])
    assert found == [list(scores) for scores in expected]
    assert client.score(conversations, aggregation_method="min") == [min(scores) for scores in found]


def test_treequest_searches_over_http(client, live):
    """A node is an answer; what TreeQuest calls to get one is a chat, and its score is the verifier's."""
    treequest = pytest.importorskip("treequest", reason="pip install 'treequest==0.3.3' (Python 3.11)")
    import httpx2

    seeds = iter(range(100))

    def answer(earlier: str | None) -> tuple[str, float]:
        said = [] if earlier is None else [{"role": "assistant", "content": earlier}, TURNS[0]]
        reply = client.chat.completions.create(
            model="policy", messages=[*TURNS, *said], max_tokens=48, seed=next(seeds)
        )
        text = reply.choices[0].message.content
        body = {"queries": PROBLEM, "documents": text, "aggregate": "min"}
        return text, httpx2.post(f"{live}/score", json=body).json()["data"][0]["score"]

    algorithm = treequest.StandardMCTS()
    tree = algorithm.init_tree()
    for _ in range(8):
        tree = algorithm.step(tree, {"answer": answer})
    ((best, score),) = treequest.top_k(tree, algorithm, k=1)
    assert best
    assert 0 < score < 1
    assert len(tree.tree.get_nodes()) == 9


@pytest.fixture(scope="module")
def chat_model():
    path = os.environ.get("TTS_CHAT_MODEL")
    if not path:
        pytest.skip("TTS_CHAT_MODEL names no checkpoint, such as HuggingFaceTB/SmolLM2-135M-Instruct")
    return path


@pytest.mark.slow
def test_a_chat_model_answers_judges_and_searches(openai, live_over, chat_model):
    """A real model, by its own chat template, is the policy, and as a judge of steps by yes and no the verifier."""
    from tts_search import HFPolicy, HFVerifier, SearchConfig, search

    turns = [{"role": "user", "content": "What is the capital of France?"}]
    fields = {"n": 4, "expand": 2, "max_step_tokens": 24, "max_steps": 2, "seed": 5}
    policy = HFPolicy(chat_model, kv_memory="512MiB")
    verifier = HFVerifier(chat_model, format="yes_no", kv_memory="512MiB")
    config = SearchConfig("beam_search", **fields)
    (alone,) = search([turns[0]["content"]], policy, verifier, config, progress=False)
    url, _ = live_over(policy, verifier)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as one:
        asked = {"model": "policy", "messages": turns, "max_tokens": 24}
        best = one.chat.completions.create(**asked, temperature=0.0).choices[0].message.content
        assert "Paris" in best
        stream = one.chat.completions.create(**asked, temperature=0.0, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == best
        begun = [*turns, {"role": "assistant", "content": best[:20], "prefix": True}]
        more = one.chat.completions.create(model="policy", messages=begun, max_tokens=24, temperature=0.0)
        assert more.choices[0].message.content
        several = one.chat.completions.create(**asked, n=16, seed=1, temperature=1.0)
        assert len({choice.message.content for choice in several.choices}) > 8
        assert several.usage.prompt_tokens_details.cached_tokens > 0
        found = one.chat.completions.create(
            model="policy", messages=turns, extra_body={"search": {"method": "beam_search", **fields}}
        )
    assert found.choices[0].message.content == alone.best.text
    assert found.choices[0].model_extra["score"] == alone.best.score

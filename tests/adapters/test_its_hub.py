"""its_hub with our models: calls of its interface without the package, and its own algorithms if it is installed."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

import pytest
from scripted import ScriptedPolicy, ScriptedVerifier
from tiny import save_checkpoint, talkative, tiny_model, tiny_tokenizer
from tts_search import HFPolicy, HFVerifier, SearchConfig, SearchError, Step, search
from tts_search.adapters.its_hub import LanguageModel, OutcomeRewardModel, ProcessRewardModel

PROBLEM, STEP, STOP = "What is the sum?", "\n\n", "STOP"


def step_of(_, __, ___, seed, params):
    """A step that follows from its branch's seed; names tell all branches apart. It never says that it is finished."""
    rng = random.Random(f"{seed}")
    name = f"{rng.randrange(10**9)}" + (STOP if rng.random() < 0.25 else "")
    return Step(name + (params.delimiter or ""), False, 2)


def scores_of(_, steps):
    texts = [STEP.join(map(str.strip, steps[: end + 1])) for end in range(len(steps))]
    return [random.Random(text).randrange(1, 5) / 5 for text in texts]


@dataclass
class Message:
    """A message as its_hub has them."""

    role: str
    content: str | list | None


def user(text, answer=None):
    return [Message("user", text), *([] if answer is None else [Message("assistant", answer)])]


def models():
    return LanguageModel(ScriptedPolicy(step_of)), ProcessRewardModel(ScriptedVerifier(scores_of))


@pytest.mark.parametrize("chunk", range(2))
def test_its_own_beam_search_decides_as_ours(chunk):
    its_hub = pytest.importorskip("its_hub.core.algorithms.beam_search", reason="pip install --no-deps its-hub")
    from its_hub.core.lms.step_generation import StepGeneration

    for seed in range(chunk, 100, 2):
        rng = random.Random(seed)
        beam_width, num_beams, max_steps = rng.randrange(1, 5), rng.randrange(1, 5), rng.randrange(6)
        budget = beam_width * num_beams
        problem = f"{PROBLEM} {seed}"
        lm, prm = models()
        generation = StepGeneration(max_steps, step_token=STEP, stop_token=STOP)
        method = its_hub.BeamSearch(generation, prm, beam_width)
        theirs = method.infer(lm, problem, budget, return_response_only=False)
        config = SearchConfig.its_hub(
            "beam_search", budget=budget, beam_width=beam_width, max_steps=max_steps, stop_token=STOP
        )
        policy, verifier = ScriptedPolicy(step_of), ScriptedVerifier(scores_of)
        ours = search([problem], policy, verifier, config, progress=False)[0]
        texts = [one.text.removesuffix(STEP) for one in ours.completions]
        assert [response["content"] for response in theirs.responses] == texts, seed
        assert theirs.scores == [one.score for one in ours.completions], seed
        assert ours.completions[theirs.selected_index] is ours.best, seed


def test_its_own_best_of_n_and_particles():
    pytest.importorskip("its_hub", reason="pip install --no-deps its-hub")
    from its_hub.core.algorithms.bon import BestOfN
    from its_hub.core.algorithms.particle_gibbs import ParticleFiltering
    from its_hub.core.lms.step_generation import StepGeneration

    lm, prm = models()
    best = BestOfN(OutcomeRewardModel(prm)).infer(lm, PROBLEM, 8, return_response_only=False)
    assert len({response["content"] for response in best.responses}) == 8
    assert best.scores == [scores_of("", [response["content"]])[0] for response in best.responses]
    assert len(lm.policy.calls) < 8  # they came one by one and went together
    assert best.usage.completion_tokens == 16
    particles = ParticleFiltering(StepGeneration(4, step_token=STEP, stop_token=STOP), prm)
    result = particles.infer(lm, "another", 6, return_response_only=False)
    assert len(result.responses) == 6


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    options = {"name": "tiny", "head": "two_class", "good": 1, "boundary": "\n\n", "encoding": "pieces"}
    options["chat"] = [{"role": "user", "content": "{problem}"}, {"role": "assistant", "content": "{steps}"}]
    verifier = save_checkpoint(tmp_path_factory.mktemp("verifier"), tiny_model(head="token"), verifier=options)
    return save_checkpoint(tmp_path_factory.mktemp("policy"), talkative(tiny_model())), verifier


def test_rounds_forward_what_is_new(checkpoints):
    lm = LanguageModel(HFPolicy(checkpoints[0], kv_memory="4MiB"), seed=4)
    prm = ProcessRewardModel(HFVerifier(checkpoints[1], kv_memory="4MiB"))
    paths = [[] for _ in range(6)]
    for _ in range(3):
        conversations = [user(PROBLEM, STEP.join(path) + STEP if path else None) for path in paths]
        replies = asyncio.run(lm.agenerate(conversations, stop=STEP, max_completion_tokens=24, temperature=0.8))
        for path, reply in zip(paths, replies, strict=True):
            path.append(reply["content"])
        scores = asyncio.run(prm.ascore(PROBLEM, [STEP.join(path) for path in paths]))
        assert len(scores) == 6
    assert all(0 <= score <= 1 for score in scores)
    tokenizer = lm.policy.tokenizer  # type: ignore[attr-defined]
    prompt = len(tokenizer(lm.policy._prompt(PROBLEM), add_special_tokens=False)["input_ids"])  # type: ignore[attr-defined]
    text = sum(len(tokenizer("".join(path), add_special_tokens=False)["input_ids"]) for path in paths)
    spent = lm.close()
    # Ends of answers are not told, so that steps behind them are asked for; these are read, and nothing else twice.
    assert spent.prefill_tokens + spent.recomputed_tokens < prompt + text
    fresh = ProcessRewardModel(HFVerifier(checkpoints[1], kv_memory="4MiB"))
    assert fresh.score(PROBLEM, [STEP.join(path) for path in paths]) == pytest.approx(scores, abs=1e-5)


def test_the_content_is_what_was_asked_for():
    lm, _ = models()
    with_stop = asyncio.run(lm.agenerate([user("a")], stop=STEP, include_stop_str_in_output=True))
    without = asyncio.run(lm.agenerate(user("b"), stop=STEP))
    assert with_stop[0]["content"].endswith(STEP)
    assert without["role"] == "assistant"
    assert STEP not in without["content"]
    assert asyncio.run(lm.agenerate([])) == []
    temperatures = [0.1, 0.7]
    asyncio.run(lm.agenerate([user("c"), user("d")], stop=STEP, temperature=temperatures, max_tokens=5))
    assert [(request.params.temperature, request.params.max_tokens) for request in lm.policy.calls[-1]] == [
        (0.1, 5),
        (0.7, 5),
    ]


def test_any_conversation_with_whole_prompts():
    policy = ScriptedPolicy(step_of)
    policy.chat, policy.tokenizer = False, tiny_tokenizer()  # type: ignore[attr-defined]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
    ]
    asyncio.run(LanguageModel(policy).agenerate(messages))
    assert [each.text for each in policy.problems.values()] == ["<|bos|><|system|>Be brief.\n<|user|>x\n<|assistant|>"]


def test_a_failure_reaches_every_request_of_its_batch():
    def fail(*_):
        raise RuntimeError("out of order")

    async def ask(lm):
        asked = [lm.agenerate_single(user(PROBLEM)) for _ in range(3)]
        return await asyncio.gather(*asked, return_exceptions=True)

    assert [str(error) for error in asyncio.run(ask(LanguageModel(ScriptedPolicy(fail))))] == ["out of order"] * 3


def test_prompts_of_every_kind():
    prm = ProcessRewardModel(ScriptedVerifier(lambda *_: [0.5]), aggregate="min")
    for prompt in ("a", [Message("user", "b")], [Message("system", "c"), {"role": "user", "content": "d"}]):
        assert prm.score(prompt, ["one"]) == [0.5]
    assert [each.text for each in prm.verifier.problems.values()] == ["a", "b", "system: c\nuser: d"]  # type: ignore[attr-defined]
    assert prm.score("a", "one") == 0.5
    assert prm.score("a", ["", "one"]) == [0.0, 0.5]
    orm = OutcomeRewardModel(prm)
    assert orm.score(user("a", "one")) == 0.5
    assert asyncio.run(orm.ascore([user("a", "one"), user("b", "one")], orchestrator=None)) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        (user("a"), {"tools": [{}]}, "tools: expected None"),
        (user("a"), {"response_format": {"type": "json"}}, "response_format"),
        (user("a"), {"stop": ["a", "b"]}, "stop: expected a text"),
        ([Message("assistant", "b")], {}, "expected a user's message, got none"),
        ([Message("system", "s"), *user("a")], {}, "got system, user; an HFPolicy"),
        ([user("a")], {"temperature": [0.1, 0.2]}, "temperature: expected 1"),
    ],
)
def test_bad_requests(messages, options, message):
    with pytest.raises(ValueError, match=message):
        asyncio.run(models()[0].agenerate(messages, **options))


def test_bad_arguments():
    with pytest.raises(ValueError, match="aggregate"):
        ProcessRewardModel(ScriptedVerifier(scores_of), aggregate="median")
    with pytest.raises(ValueError, match="max_tokens"):
        LanguageModel(ScriptedPolicy(step_of), max_tokens=0)
    with pytest.raises(ValueError, match="end with the assistant's"):
        OutcomeRewardModel(models()[1]).score(user("a"))
    with pytest.raises(SearchError, match="expected 2 finite"):
        ProcessRewardModel(ScriptedVerifier(lambda *_: [0.5])).score("a", ["b\n\nc"])

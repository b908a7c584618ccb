"""search-and-learn with our models: its interface without the package, and its own searches if its source is there.

For its own searches, set SEARCH_AND_LEARN to the folder `src` of a checkout (these tests are for commit 6f81cac).
"""

from __future__ import annotations

import os
import random
from types import SimpleNamespace

import pytest
from scripted import ScriptedPolicy, ScriptedVerifier
from source import add_source
from tiny import CHAT, save_checkpoint, talkative, tiny_model, tiny_tokenizer
from tts_search import HFPolicy, Step
from tts_search.adapters import search_and_learn as sal

SOURCE = os.environ.get("SEARCH_AND_LEARN")
QUESTIONS = ["How much is it?", "And how much is that?"]


class Unscripted(ScriptedPolicy):
    """A policy whose steps follow from the seed of their branch; names tell all branches apart, so texts do."""

    chat = False

    def __init__(self, seed: int, end: float) -> None:
        super().__init__(self.step)
        self.tokenizer = tiny_tokenizer()
        self._seed, self._end = seed, end

    def step(self, _, steps, __, seed, params):
        key = f"{''.join(steps)}" if params.temperature == 0 else f"{seed}"
        rng = random.Random(f"{self._seed}/{key}")
        name = f"{rng.randrange(10**9)}"
        kind = rng.random()
        if kind < self._end or params.delimiter is None:
            return Step(rng.choice([name, f"\\boxed{{{name}}}"]), True, 3, reason="eos")
        if kind < self._end + 0.05:
            return Step(name, False, 3, reason="length")
        return Step(f"{name}\n\n", False, 4)


def scores_of(seed):
    def score(problem, steps):
        return [
            random.Random(f"{seed}/{problem}/{'/'.join(map(str.strip, steps[: end + 1]))}").random()
            for end in range(len(steps))
        ]

    return score


def config_of(**options):
    defaults = {
        "n": 8, "beam_width": 2, "num_iterations": 6, "lookahead": 0, "agg_strategy": "last", "temperature": 0.8,
        "filter_duplicates": False, "sort_completed": False, "top_p": 1.0, "max_tokens": 64, "seed": 7,
        "system_prompt": "Be brief.", "custom_chat_template": None,
    }  # fmt: skip
    return SimpleNamespace(**{**defaults, **options})


def models_of(seed, end, config):
    llm = sal.LLM(Unscripted(seed, end), seed=config.seed)
    return llm, sal.PRM(ScriptedVerifier(scores_of(seed)))


@pytest.fixture(scope="module")
def theirs():
    if SOURCE is None:
        pytest.skip("compares with the source: set SEARCH_AND_LEARN to the folder src of a checkout")
    sal.stand_in_for_vllm()
    add_source(SOURCE, ["datasets", "pebble", "latex2sympy2", "word2number", "accelerate", "tqdm"])
    from sal import search

    return search


@pytest.mark.parametrize("approach", ["best_of_n", "beam_search", "dvts"])
def test_its_own_searches_decide_as_ours(theirs, approach):
    for seed in range(100):
        rng = random.Random(seed)
        beam_width = rng.choice([1, 2, 4])
        config = config_of(
            n=beam_width * rng.randrange(1, 5),
            beam_width=beam_width,
            num_iterations=rng.randrange(1, 7),
            lookahead=rng.choice([0, 0, 2]) if approach == "dvts" else 0,
            # By the minimum, siblings tie; which of them its unstable sort keeps is not determined.
            agg_strategy=rng.choice(["last", "prod"] if approach == "beam_search" else ["last", "prod", "min"]),
            sort_completed=rng.random() < 0.3,
            filter_duplicates=rng.random() < 0.3,
            seed=seed,
            max_tokens=2048,
        )
        config.n_beams = config.n // beam_width
        questions = QUESTIONS[:1] if approach == "beam_search" else QUESTIONS
        end = rng.choice([0.1, 0.3])
        expected = getattr(theirs, approach)({"problem": questions}, config, *models_of(seed, end, config))
        got = getattr(sal, approach)({"problem": questions}, config, *models_of(seed, end, config))
        assert got["completions"] == expected["completions"], seed
        assert got["pred"] == expected["pred"], seed
        assert got["scores"] == expected["scores"], seed
        if approach == "best_of_n":
            assert set(got) == set(expected)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("policy"), talkative(tiny_model()))


def test_generate_as_vllm_does(checkpoint):
    llm = sal.LLM(checkpoint, seed=3, kv_memory="4MiB", enable_prefix_caching=True, tensor_parallel_size=0)
    tokenizer = llm.get_tokenizer()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    params = sal.SamplingParams(n=16, max_tokens=32, stop=["\n\n"], include_stop_str_in_output=True)
    (request,) = llm.generate([prompt], params, use_tqdm=False)
    assert request.prompt == prompt
    assert len(request.outputs) == 16
    for output in request.outputs:
        ended = "\n\n" in output.text.lstrip()
        assert output.stop_reason == ("\n\n" if ended else None)
        assert output.finish_reason in ("stop", "length")
        assert output.token_ids[: len(output.text)] or not output.text
    assert {output.stop_reason for output in request.outputs} == {None, "\n\n"}
    again = sal.LLM(HFPolicy(checkpoint, chat=False, kv_memory="4MiB"), seed=3)
    cut = again.generate(prompt, sal.SamplingParams(n=16, max_tokens=32, stop="\n\n"))[0].outputs
    for with_stop, without in zip(request.outputs, cut, strict=True):
        assert with_stop.text.startswith(without.text)
        assert "\n\n" not in without.text.lstrip()


def test_the_next_round_forwards_what_is_new(checkpoint):
    llm = sal.LLM(checkpoint, seed=3, kv_memory="4MiB")
    prompt = "<|bos|><|user|>Hi\n<|assistant|>"
    params = sal.SamplingParams(max_tokens=32, stop=["\n\n"], include_stop_str_in_output=True)
    first = [request.outputs[0] for request in llm.generate([prompt] * 8, params)]
    going_on = [output.text for output in first if output.stop_reason is not None]
    assert going_on
    llm.generate([prompt + text for text in going_on], params)
    usage = llm.close()
    assert usage.prefill_tokens == len(llm.get_tokenizer()(prompt, add_special_tokens=False)["input_ids"])


def test_prm_scores_by_question_completion_and_step():
    prm = sal.PRM(ScriptedVerifier(lambda _, steps: [len(step) / 10 for step in steps]))
    assert prm.score(["a", "b"], [["x\n\nyy", "x\n\nyy\n\n"], ["", "zzz"]]) == [[[0.1, 0.2]] * 2, [[0.0], [0.3]]]
    with pytest.raises(ValueError, match="outputs: expected a list for each of 1"):
        prm.score(["a"], [])


def test_ours_take_and_return_its_columns():
    config = config_of(custom_chat_template=CHAT)
    for approach in ("best_of_n", "beam_search", "dvts"):
        columns = getattr(sal, approach)({"problem": QUESTIONS}, config, *models_of(1, 0.2, config))
        assert {"completions", "scores", "pred", "completion_tokens"} <= set(columns)
        assert [len(texts) for texts in columns["completions"]] == [8, 8]
        for texts, scores, pred in zip(columns["completions"], columns["scores"], columns["pred"], strict=True):
            assert pred == max(zip(texts, scores, strict=True), key=lambda pair: pair[1][-1])[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n: expected"),
        ({"stop": ["a", "b"]}, "stop: expected at most one"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logprobs": 1}, "logprobs"),
    ],
)
def test_bad_sampling_params(checkpoint, options, message):
    llm = sal.LLM(checkpoint, kv_memory="4MiB")
    params = SimpleNamespace(**{**vars(sal.SamplingParams()), **options})
    with pytest.raises(ValueError, match=message):
        llm.generate(["a"], params)


def test_bad_models(checkpoint):
    with pytest.raises(ValueError, match="chat=False"):
        sal.LLM(HFPolicy(checkpoint, kv_memory="4MiB"))
    with pytest.raises(TypeError, match="kv_memory"):
        sal.PRM(ScriptedVerifier(lambda *_: []), kv_memory="4MiB")

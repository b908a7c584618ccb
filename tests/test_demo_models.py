"""The demo models: the tokenizer, and the abilities of the shipped checkpoints."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tts_search.lab import MODELS_DIR
from tts_search.lab.arithmetic import DELIMITER, LEVELS, Problem, check_steps, generate

transformers = pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "demo_models"))
tokenizer_script = pytest.importorskip("tokenizer")
train_policy = pytest.importorskip("train_policy")
train_verifier = pytest.importorskip("train_verifier")

# Parameters, and what a sample of greedy answers must reach at each level: lowest and highest share of right ones.
POLICIES = {
    "policy-0.1m": (100_000, 130_000),
    "policy-0.6m": (500_000, 700_000),
    "policy-3m": (2_700_000, 3_300_000),
}
VERIFIERS = ("prm-strong", "prm-weak")
MODELS = (*POLICIES, *VERIFIERS)


@cache
def tokenizer_of(name: str) -> Any:
    return transformers.AutoTokenizer.from_pretrained(MODELS_DIR / name)


@cache
def policy(name: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(MODELS_DIR / name, dtype=torch.float32).eval()


@cache
def verifier(name: str) -> tuple[dict[str, Any], Any]:
    reading = json.loads((MODELS_DIR / name / "config.json").read_text())["tts_verifier"]
    two_class = reading["head"] == "two_class"
    kind = transformers.AutoModelForTokenClassification if two_class else transformers.AutoModelForCausalLM
    return reading, kind.from_pretrained(MODELS_DIR / name, dtype=torch.float32).eval()


def greedy_answers(name: str, problems: list[Problem]) -> list[str]:
    """Return the text that a policy completes each problem with."""
    tokenizer = tokenizer_of(name)
    chats = [[{"role": "user", "content": problem.problem}] for problem in problems]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
    out = policy(name).generate(**batch, do_sample=False, temperature=None, max_new_tokens=130)
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.inference_mode()
def step_scores(name: str, problem: str, steps: list[str]) -> list[float]:
    """Score steps as the checkpoint's ``tts_verifier`` describes it."""
    tokenizer, (reading, model) = tokenizer_of(name), verifier(name)
    ids = train_verifier.prompt_ids(tokenizer, problem, reading)
    positions = []
    for step in steps:
        ids = ids + tokenizer.encode(step.rstrip(), add_special_tokens=False)
        ids += tokenizer.encode(reading["boundary"], add_special_tokens=False)
        positions.append(len(ids) - 1)
    logits = model(torch.tensor([ids])).logits[0, positions]
    if reading["head"] == "two_class":
        return logits.softmax(-1)[:, reading["good"]].tolist()
    pair = tokenizer.convert_tokens_to_ids(reading["labels"])
    return logits[:, pair].softmax(-1)[:, 0].tolist()


def auc(scores: list[float], labels: list[bool]) -> float:
    """Return the probability that a right step scores above a wrong one."""
    good = torch.tensor([s for s, label in zip(scores, labels, strict=True) if label])
    bad = torch.tensor([s for s, label in zip(scores, labels, strict=True) if not label])
    return ((good[:, None] > bad).double() + 0.5 * (good[:, None] == bad).double()).mean().item()


@cache
def verifier_auc(name: str) -> float:
    rng, scores, labels = random.Random(0), [], []
    for level in LEVELS:
        for problem in generate("test", level, 24, 11):
            steps = train_verifier.plant_errors(problem, rng)
            scores += step_scores(name, problem.problem, steps)
            labels += check_steps(problem.problem, steps)
    return auc(scores, labels)


# Tokenizer


def test_the_shipped_tokenizer_is_the_one_that_the_script_builds() -> None:
    built = json.loads(tokenizer_script.build_tokenizer().backend_tokenizer.to_str())
    for name in MODELS:
        shipped = json.loads(tokenizer_of(name).backend_tokenizer.to_str())
        assert shipped["model"]["vocab"] == built["model"]["vocab"]
        assert shipped["pre_tokenizer"] == built["pre_tokenizer"]


@settings(deadline=None, max_examples=200)
@given(st.text() | st.text(alphabet=" \n\tadd0123456789+-*=.,\\boxed{}", max_size=60))
def test_any_text_comes_back_exactly(text: str) -> None:
    tokenizer = tokenizer_of("policy-0.1m")
    if not any(token in text for token in tokenizer_script.SPECIAL):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_digit_and_a_blank_line_are_one_token_each() -> None:
    tokenizer = tokenizer_of("policy-0.1m")
    assert len(tokenizer.encode("1234567890")) == 10
    assert len(tokenizer.encode("47 + 38 = 85\n\n")) == 9
    assert len(tokenizer.encode("\n\n")) == 1
    assert tokenizer.encode("") == []


@pytest.mark.parametrize("name", VERIFIERS)
def test_steps_can_be_encoded_one_by_one(name: str) -> None:
    """The tokens of prompt, steps and boundaries joined are the tokens of the joined text."""
    tokenizer, (reading, _) = tokenizer_of(name), verifier(name)
    for level in LEVELS:
        for problem in generate("test", level, 20, 2):
            ids = train_verifier.prompt_ids(tokenizer, problem.problem, reading)
            text = tokenizer.decode(ids)
            for step in problem.solution:
                ids = ids + tokenizer.encode(step.rstrip()) + tokenizer.encode(reading["boundary"])
                text += step.rstrip() + reading["boundary"]
            assert tokenizer.encode(text) == ids
            solution = "".join(problem.solution)
            assert tokenizer.encode(solution) == [i for step in problem.solution for i in tokenizer.encode(step)]


def test_the_chat_template_makes_the_prompt() -> None:
    tokenizer = tokenizer_of("policy-3m")
    chat = [{"role": "system", "content": "Work."}, {"role": "user", "content": "Start with 1, add 2."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert prompt == "<|bos|><|system|>Work.<|user|>Start with 1, add 2.<|assistant|>"
    chat.append({"role": "assistant", "content": "1 + 2 = 3"})
    assert tokenizer.apply_chat_template(chat, tokenize=False) == prompt + "1 + 2 = 3<|end|>"


# Training data


def test_planted_errors_are_labelled_and_varied() -> None:
    rng, shapes = random.Random(0), set()
    for problem in generate("train", 4, 300):
        steps = train_verifier.plant_errors(problem, rng)
        labels = check_steps(problem.problem, steps)
        shapes.add((len(steps) - len(problem.solution), sum(labels) - len(problem.solution)))
    assert {difference for difference, _ in shapes} == {-1, 0, 1}
    assert {right for _, right in shapes} >= set(range(-7, 1))


def test_examples_align_labels_with_tokens() -> None:
    tokenizer = tokenizer_script.build_tokenizer()
    problem = generate("train", 2, 1)[0]
    ids, labels = train_policy.policy_example(tokenizer, problem)
    told = [(i, label) for i, label in enumerate(labels) if label != -100]
    assert tokenizer.decode([label for _, label in told]) == "".join(problem.solution) + "<|end|>"
    assert all(ids[i + 1] == label for i, label in told[:-1])


@pytest.mark.parametrize("name", VERIFIERS)
def test_verdicts_fall_where_the_attempt_goes_wrong(name: str) -> None:
    tokenizer, rng, wrong = tokenizer_script.build_tokenizer(), random.Random(5), 0
    recipe = dataclasses.replace(train_verifier.RECIPES[name], wrong_labels=0.0)
    boundary = tokenizer.encode(recipe.reading["boundary"])
    for problem in generate("train", 2, 20):
        attempt = train_verifier.plant_errors(problem, rng)
        ids, verdicts, wanted = train_verifier.verifier_example(tokenizer, problem, attempt, recipe, rng)
        assert len(ids) == len(verdicts) == len(wanted)
        judged = [(token, verdict) for token, verdict in zip(ids, verdicts, strict=True) if verdict != -100]
        labels = [verdict for token, verdict in judged if [token] == boundary]
        assert labels == [int(label) for label in check_steps(problem.problem, attempt)]
        for token, verdict, name_of in zip(ids, verdicts, wanted, strict=True):
            if name_of != -100:
                assert verdict == (token == name_of)
        wrong += labels[-1] == 0
    assert 5 <= wrong < 20


def test_expected_steps_follow_the_attempt() -> None:
    problem = Problem(
        "Start with 47, add 8, multiply by 6. What is the result modulo 100?",
        ("47 + 8 = 55\n\n", "55 * 6 = 30\n\n", "The answer is \\boxed{30}."),
        "30",
        2,
    )
    attempt = ["47 + 8 = 56", "55 * 6 = 30", "30 * 2 = 60", "The answer is \\boxed{60}."]
    assert train_verifier.expected_steps(problem, attempt) == [
        "47 + 8 = 55",
        "56 * 6 = 36",
        "The answer is \\boxed{30}.",
        "The answer is \\boxed{60}.",
    ]


# Checkpoints


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_is_complete_and_small(name: str) -> None:
    files = {path.name for path in (MODELS_DIR / name).iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    config = transformers.AutoConfig.from_pretrained(MODELS_DIR / name)
    assert config.model_type == "llama"
    assert config.dtype == torch.bfloat16
    assert config.head_dim >= 16
    assert config.vocab_size == len(tokenizer_of(name))
    if name in POLICIES:
        low, high = POLICIES[name]
        assert low <= policy(name).num_parameters() <= high
        assert "generation_config.json" in files
    else:
        assert 900_000 <= verifier(name)[1].num_parameters() <= 1_300_000


def test_all_checkpoints_together_are_small() -> None:
    assert sum(path.stat().st_size for path in MODELS_DIR.rglob("*") if path.is_file()) <= 16 * 2**20


@pytest.mark.parametrize("name", POLICIES)
def test_policies_are_right_on_easy_problems_and_imperfect_on_hard_ones(name: str) -> None:
    shares = {}
    for level in (1, 5):
        problems = generate("test", level, 40, 5)
        texts = greedy_answers(name, problems)
        labels = [check_steps(p.problem, text.split(DELIMITER)) for p, text in zip(problems, texts, strict=True)]
        right = [all(label) and len(label) == len(p.solution) for p, label in zip(problems, labels, strict=True)]
        shares[level] = sum(right) / len(right)
    assert shares[1] >= 0.75
    assert shares[5] <= 0.9
    assert shares[5] < shares[1]


def test_both_verifiers_know_right_from_wrong_and_one_knows_better() -> None:
    strong, weak = verifier_auc("prm-strong"), verifier_auc("prm-weak")
    assert strong > 0.93
    assert 0.7 < weak < strong - 0.02


@pytest.mark.parametrize("name", VERIFIERS)
def test_a_score_does_not_depend_on_later_steps(name: str) -> None:
    problem = generate("test", 3, 1, 1)[0]
    scores = step_scores(name, problem.problem, list(problem.solution))
    first = step_scores(name, problem.problem, list(problem.solution[:2]))
    assert len(scores) == len(problem.solution)
    torch.testing.assert_close(torch.tensor(scores[:2]), torch.tensor(first), rtol=1e-4, atol=1e-5)

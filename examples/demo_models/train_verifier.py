"""Train a verifier of the demo to tell right steps from wrong ones: ``train_verifier.py NAME FOLDER``.

Both verifiers read a problem and the steps so far, and judge a step at the boundary after it:

* ``prm-strong`` has a head of two classes at a blank line, as TRL's ``PRMTrainer`` trains them;
* ``prm-weak`` predicts one of two label tokens after a step tag, as Math-Shepherd does; some of the labels that it
  learned from were wrong.

Like published process reward models they start from a policy, here policy-0.6m with three more layers: a model that
can compute the next result can check it. They learn from reference solutions in which errors were planted, then from
what the policy itself makes of training problems: its own slips are the ones that it finds hard to see.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from tokenizer import BOS, STEP, build_tokenizer
from torch import Tensor
from torch.nn import functional as F
from train_policy import learn_solutions
from training import IGNORE, SHAPES, Example, command_line, llama_config, train
from transformers import LlamaForCausalLM, LlamaForTokenClassification, PreTrainedModel, PreTrainedTokenizerFast
from tts_search.lab import MODELS_DIR
from tts_search.lab.arithmetic import DELIMITER, LEVELS, MODULUS, Problem, check_steps, endless

GOOD, BAD = "+", "-"
BASE_LAYERS = int(SHAPES["0.6m"]["num_hidden_layers"])


@dataclass(frozen=True)
class Recipe:
    """How a verifier is trained, and the description of its format that goes into its ``config.json``."""

    reading: dict[str, Any]
    base_tokens: int  # of solutions, from which the base policy goes on learning before it becomes a verifier
    planted_tokens: tuple[int, ...]  # of planted errors; each number is a run of the learning rate down to zero
    sampled_tokens: int  # of errors that a policy made, with as many planted ones
    wrong_labels: float = 0.0  # share of step labels that are flipped
    lr: float = 7e-3
    per_level: tuple[int, ...] = (6, 5, 4, 3, 2)  # problems a step: short ones hold more errors a token


RECIPES = {
    "prm-strong": Recipe(
        reading={
            "name": "prm-strong",
            "head": "two_class",
            "chat": [{"role": "user", "content": "{problem}"}, {"role": "assistant", "content": "{steps}"}],
            "boundary": DELIMITER,
            "encoding": "pieces",
            "good": 1,
        },
        base_tokens=1_200_000,
        planted_tokens=(800_000,),
        sampled_tokens=800_000,
    ),
    "prm-weak": Recipe(
        reading={
            "name": "prm-weak",
            "head": "label_pair",
            "prompt": f"{BOS}{{problem}}\n{{steps}}",
            "boundary": STEP,
            "encoding": "pieces",
            "labels": [GOOD, BAD],
        },
        base_tokens=0,
        planted_tokens=(700_000, 600_000),
        sampled_tokens=250_000,
        wrong_labels=0.1,
    ),
}


def prompt_ids(tokenizer: PreTrainedTokenizerFast, problem: str, reading: dict[str, Any]) -> list[int]:
    """Return the tokens that a verifier reads before the first step."""
    if "chat" in reading:
        chat = [{"role": "user", "content": problem}]
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    return tokenizer.encode(reading["prompt"].removesuffix("{steps}").format(problem=problem))


def near(number: int, rng: random.Random) -> int:
    """Return another number modulo 100, most often one that a slip would give: a digit off by one or two."""
    return (number + rng.choice((-10, -2, -1, 1, 2, 10, -20, 20, rng.randrange(1, MODULUS)))) % MODULUS


def plant_errors(problem: Problem, rng: random.Random, again: float = 0.1) -> list[str]:
    """Return an attempt that first goes wrong at a random step, or nowhere, and goes on from its own value after it.

    `again` is the probability of another wrong result at each later step.
    """
    lines = [step.split() for step in problem.solution[:-1]]  # left symbol operand = result
    value = int(lines[0][0])
    plan = [(symbol, int(operand)) for _, symbol, operand, _, _ in lines]
    first = rng.randrange(len(plan) + len(plan) // 3 + 2)
    slips = {first: rng.choices(("result", "left", "plan"), (7, 1, 2))[0]}
    if slips[first] == "plan" and first < len(plan):
        plan = _change_plan(plan, first, rng)
    slips |= {i: "result" for i in range(first + 1, len(plan)) if rng.random() < again}
    steps = []
    for index, (symbol, operand) in enumerate(plan):
        left = near(value, rng) if slips.get(index) == "left" else value
        value = apply(left, symbol, operand)
        if slips.get(index) == "result":
            value = near(value, rng)
        steps.append(f"{left} {symbol} {operand} = {value}")
    if first == len(plan):
        value = near(value, rng)
    return [*steps, f"The answer is \\boxed{{{value}}}."]


@torch.inference_mode()
def sample_attempts(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int, seed: int
) -> list[tuple[Problem, list[str]]]:
    """Return attempts that a policy makes at a high temperature: its slips are harder to see than planted ones."""
    problems: list[Problem] = []
    for level in LEVELS:
        problems += islice(endless("train", level, seed + 2), count * level // 15)
    attempts: list[list[str]] = []
    for first in range(0, len(problems), 250):
        batch = problems[first : first + 250]
        chats = [[{"role": "user", "content": problem.problem}] for problem in batch]
        prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        out = policy.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            temperature=1.2,
            top_k=0,
            max_new_tokens=110,
        )
        texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        attempts += [[step.rstrip() for step in text.split(DELIMITER) if step.strip()] for text in texts]
    return [(problem, attempt) for problem, attempt in zip(problems, attempts, strict=True) if attempt]


def apply(left: int, symbol: str, right: int) -> int:
    """Return the result of one operation."""
    return {"+": left + right, "-": left - right, "*": left * right}[symbol] % MODULUS


def expected_steps(problem: Problem, attempt: list[str]) -> list[str]:
    """Return for each step of an attempt the right one in its place, given the value that the attempt had reached."""
    lines = [step.split() for step in problem.solution[:-1]]
    numbers = [re.findall(r"\d+", step) or ["0"] for step in attempt[:-1]]
    values = [int(lines[0][0])] + [int(found[-1]) for found in numbers]
    steps = []
    for value, (_, symbol, operand, _, _) in zip(values, lines, strict=False):
        steps.append(f"{value} {symbol} {operand} = {apply(value, symbol, int(operand))}")
    steps = steps[: len(attempt)]
    return steps + [f"The answer is \\boxed{{{value}}}." for value in values[len(steps) :]]


def _change_plan(plan: list[tuple[str, int]], index: int, rng: random.Random) -> list[tuple[str, int]]:
    """Return the operations with one of them misread, skipped or done twice."""
    symbol, operand = plan[index]
    other = rng.choice([s for s in "+-*" if s != symbol])
    change = rng.choice(([(symbol, near(operand, rng))], [(other, operand)], [], [plan[index]] * 2))
    return plan[:index] + change + plan[index + 1 :]


def verifier_example(
    tokenizer: PreTrainedTokenizerFast, problem: Problem, attempt: list[str], recipe: Recipe, rng: random.Random
) -> Example:
    """Return the tokens of an attempt, the verdicts (1 good, 0 bad) read at them, and the tokens expected there.

    At a boundary the verdict is the label of the step, all that a search reads. At a token of a step it is whether the
    token is the expected one, given the steps before. From labels at the boundaries alone, a model of this size had
    learned next to nothing after half a million tokens.
    """
    boundary = tokenizer.encode(recipe.reading["boundary"])
    ids = prompt_ids(tokenizer, problem.problem, recipe.reading)
    verdicts, wanted = [IGNORE] * len(ids), [IGNORE] * len(ids)
    labels = check_steps(problem.problem, attempt)
    for step, expected, label in zip(attempt, expected_steps(problem, attempt), labels, strict=True):
        step_ids, expected_ids = tokenizer.encode(step), tokenizer.encode(expected)
        same = [step_ids[: i + 1] == expected_ids[: i + 1] for i in range(len(step_ids))]
        flipped = rng.random() < recipe.wrong_labels
        ids += step_ids + boundary
        verdicts += [int(verdict != flipped) for verdict in same + [label] * len(boundary)]
        told = expected_ids[: sum(same) + 1][: len(step_ids)]  # up to the first wrong token
        wanted += told + [IGNORE] * (len(step_ids) - len(told) + len(boundary))
    return ids, verdicts, wanted


def verdict_logits(model: PreTrainedModel, hidden: Tensor, pair: list[int]) -> Tensor:
    """Return the logits [N, 2] of wrong and right: the classes of the head, or the two label tokens."""
    if isinstance(model, LlamaForTokenClassification):
        return model.score(hidden)
    return F.linear(hidden, model.get_input_embeddings().weight[pair])


def verifier_loss(model: PreTrainedModel, ids: Tensor, verdicts: Tensor, wanted: Tensor, pair: list[int]) -> Tensor:
    """Return the summed cross-entropies, the layers from the base's last on each told what to find.

    The base goes on predicting the next token; one layer up stand, in different channels, the token that was expected
    and the one that came; the next layer tells whether they are equal, and the last judges the steps.
    """
    states = model.model(input_ids=ids, use_cache=False, output_hidden_states=True)
    base, pairs, compared = (model.model.norm(states.hidden_states[BASE_LAYERS + i]) for i in range(3))
    named, judged = wanted != IGNORE, verdicts != IGNORE
    half = pairs.shape[-1] // 2
    readings = [
        (base[:, :-1][named[:, 1:]], wanted[named]),
        (pairs[named], wanted[named]),
        (pairs.roll(half, dims=-1)[named], ids[named]),
    ]
    embedding = model.get_input_embeddings().weight
    losses = [F.cross_entropy(F.linear(rows, embedding).float(), names, reduction="sum") for rows, names in readings]
    for hidden in (compared, states.last_hidden_state):
        logits = verdict_logits(model, hidden[judged], pair).float()
        losses.append(F.cross_entropy(logits, verdicts[judged], reduction="sum"))
    return torch.stack(losses).sum()


def grow(policy: LlamaForCausalLM, verifier: PreTrainedModel) -> None:
    """Copy a policy into a verifier of more layers."""
    verifier.model.load_state_dict(verifier.model.state_dict() | policy.model.state_dict())


def train_verifier(name: str, base: str, fraction: float = 1.0, seed: int = 0) -> PreTrainedModel:
    """Return a verifier that starts from the policy in the folder `base`, trained by its recipe or a fraction of it."""
    torch.manual_seed(seed)
    recipe, tokenizer, rng = RECIPES[name], build_tokenizer(), random.Random(seed)
    policy = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    learn_solutions(policy, tokenizer, int(recipe.base_tokens * fraction), 6e-3, seed + 1)
    config = llama_config("1m", tokenizer, tts_verifier=recipe.reading)
    if recipe.reading["head"] == "two_class":
        config.id2label, config.label2id = {0: "bad", 1: "good"}, {"bad": 0, "good": 1}
        model: PreTrainedModel = LlamaForTokenClassification(config)
    else:
        model = LlamaForCausalLM(config)
    grow(policy, model)
    supplies = [endless("train", level, seed + 1) for level in LEVELS]
    sampled: list[tuple[Problem, list[str]]] = []

    def draw() -> list[Example]:
        counted = zip(supplies, recipe.per_level, strict=True)
        problems = [next(problems) for problems, count in counted for _ in range(count)]
        attempts = [(problem, plant_errors(problem, rng, again=0.6)) for problem in problems]
        if sampled:
            attempts = rng.sample(attempts, len(attempts) // 3) + rng.choices(sampled, k=len(attempts) // 2)
        return [verifier_example(tokenizer, *attempt, recipe, rng) for attempt in attempts]

    loss = partial(verifier_loss, pair=tokenizer.convert_tokens_to_ids([BAD, GOOD]))
    learn = partial(train, model, draw, loss, pad=tokenizer.pad_token_id, lr=recipe.lr)
    for tokens in recipe.planted_tokens:
        learn(tokens=int(tokens * fraction))
    if recipe.sampled_tokens:
        policy = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
        sampled += sample_attempts(policy, tokenizer, int(6000 * fraction) + 1, seed)
        learn(tokens=int(recipe.sampled_tokens * fraction))
    return model


if __name__ == "__main__":
    command_line(__doc__ or "", RECIPES, train_verifier, base=str(MODELS_DIR / "policy-0.6m"))

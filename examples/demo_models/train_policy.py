"""Train a policy of the demo on solutions of the arithmetic task: ``train_policy.py NAME FOLDER``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizer import build_tokenizer
from training import IGNORE, Example, command_line, llama_config, token_loss, train
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from tts_search.lab.arithmetic import LEVELS, Problem, endless


@dataclass(frozen=True)
class Recipe:
    """How a policy is trained."""

    size: str
    cycles: tuple[int, ...]  # tokens of each run of the learning rate from its peak down to zero
    lr: float = 1e-2


RECIPES = {
    "policy-0.1m": Recipe("0.1m", cycles=(1_800_000,), lr=1.2e-2),
    "policy-0.6m": Recipe("0.6m", cycles=(1_400_000,)),
    "policy-3m": Recipe("3m", cycles=(1_250_000, 800_000, 1_000_000), lr=8e-3),
}


def policy_example(tokenizer: PreTrainedTokenizerFast, problem: Problem) -> Example:
    """Return the chat of a problem and its solution; the labels are the next tokens of the solution and the end."""
    chat = [{"role": "user", "content": problem.problem}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    solution = tokenizer.encode("".join(problem.solution))
    labels = [IGNORE] * (len(prompt) - 1) + solution + [tokenizer.eos_token_id]
    return prompt + solution, labels


def learn_solutions(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tokens: int, lr: float, seed: int
) -> None:
    """Train a policy on the solutions of training problems, four of each level a step."""
    supplies = [endless("train", level, seed) for level in LEVELS]

    def draw() -> list[Example]:
        return [policy_example(tokenizer, next(problems)) for problems in supplies for _ in range(4)]

    train(model, draw, token_loss, pad=tokenizer.pad_token_id, tokens=tokens, lr=lr)


def train_policy(name: str, fraction: float = 1.0, seed: int = 0) -> LlamaForCausalLM:
    """Return a policy trained by its recipe, or by a fraction of it."""
    torch.manual_seed(seed)
    recipe, tokenizer = RECIPES[name], build_tokenizer()
    model = LlamaForCausalLM(llama_config(recipe.size, tokenizer))
    for cycle, tokens in enumerate(recipe.cycles):
        learn_solutions(model, tokenizer, int(tokens * fraction), recipe.lr, seed + cycle)
    return model


if __name__ == "__main__":
    command_line(__doc__ or "", RECIPES, train_policy)

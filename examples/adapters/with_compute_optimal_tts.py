"""The beam search of compute-optimal-tts, and of OpenR, which it is a fork of, on our policy and verifier.

    git clone https://github.com/RyanLiu112/compute-optimal-tts
    python examples/adapters/with_compute_optimal_tts.py compute-optimal-tts/src
    git clone https://github.com/openreasoner/openr
    python examples/adapters/with_compute_optimal_tts.py openr --openr

Both call a language model and a reward model through one class each. The language model gets a conversation (OpenR: one
text) with all steps so far, and the reward model pairs of a question and an answer whose steps end in a tag.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from source import add_source
from tts_search import HFPolicy, HFVerifier
from tts_search.adapters.stateless import Continuation, StepSampler, StepScorer
from tts_search.lab import MODELS_DIR
from tts_search.lab.arithmetic import generate
from tts_search.search.types import StepParams

MISSING = (
    "antlr4",
    "jsonlines",
    "latex2sympy2",
    "loguru",
    "peft",
    "regex",
    "requests",
    "sympy",
    "timeout_decorator",
    "word2number",
)
TAG = " ки\n"  # what both put behind a step that the reward model reads


class LanguageModel:
    """A `LanguageModelCallingFunction`: `n` steps or answers behind a conversation, or behind a whole prompt."""

    def __init__(self, sampler: StepSampler, result: type, *, step_tag: str | None = None) -> None:
        self.model_name = "tts_search"
        self.llm_step_tag = self.lm_step_tag = step_tag
        self._sampler = sampler
        self._result = result  # their ConcatedLMGenResult

    def __call__(self, messages: Any = None, config: Any = None, *, input_str: str | None = None) -> Any:
        if input_str is not None:
            problem, text = self._sampler.split(input_str)
        else:
            problem, text = messages[-2]["content"], messages[-1]["content"]
        stop = config.stop_str[0] if isinstance(config.stop_str, list) else config.stop_str
        params = StepParams(config.temperature, config.top_p, max(0, config.top_k), config.max_new_tokens, stop)
        (steps,) = self._sampler.sample([Continuation(problem, text, params, config.n)])
        logprobs = [step.logprob or 0.0 for step in steps]
        return self._result(
            text=[step.text for step in steps],
            prompt_tokens=[0] * len(steps),
            num_tokens=[step.num_tokens for step in steps],
            cumulative_logprob=logprobs,
            logp_avg_by_len=[sum_ / max(1, step.num_tokens) for sum_, step in zip(logprobs, steps, strict=True)],
            finish_reason=["length" if step.reason == "length" else "stop" for step in steps],
        )


class RewardModel:
    """A `RewardModelCallingFunction`: the scores of the steps of each answer."""

    def __init__(self, scorer: StepScorer, *, step_tag: str = TAG) -> None:
        self.prm_step_tag = self.step_tag = step_tag
        self._scorer = scorer

    def __call__(self, question_answer_pairs: Any, model_names: Any = None, **_: Any) -> list[list[float]]:  # noqa: ARG002
        pairs = question_answer_pairs
        steps = [[step for step in answer.split(self.step_tag) if step.strip()] for _, answer in pairs]
        return self._scorer.score([(question, each) for (question, _), each in zip(pairs, steps, strict=True)])


def search_compute_optimal_tts(source: str, problems: list[str], sampler: StepSampler, scorer: StepScorer) -> list[Any]:
    """Beam search of 16 candidates of which 4 survive."""
    add_source(source, MISSING)
    from envs.MATH.env import Env
    from reason.guided_search.tree import SearchTree
    from reason.inference.text_generation import ConcatedLMGenResult

    found = []
    config = {
        "max_actions": 16, "max_length": 16, "beam_size": 4, "stop_str": ["\\boxed"], "sep": ["\n\n"], "direct_io": 0,
        "double_line_break": 1, "model_names": ["tts_search"], "is_few_shot": False, "add_step_prompt": False,
        "generation_config": {"max_new_tokens": 400, "temperature": 0.8, "top_p": 1.0, "top_k": -1},
    }  # fmt: skip
    lm, rm = LanguageModel(sampler, ConcatedLMGenResult), RewardModel(scorer)
    rm_call = lambda pairs, **_: rm(pairs, config["model_names"])  # noqa: E731
    for problem in problems:
        env = Env(config, [{"question": problem, "answer": ""}], [lm], rm_call, update_legal_action=False, reset=False)
        env._task_desc_str, env.sep = None, ["\n\n"]
        tree = SearchTree({"model_names": config["model_names"], "direct_io": 0, "max_actions": 16})
        found.append(tree.beam_search(env, 4, 16, rm_call))
    return found


def search_openr(source: str, problems: list[str], sampler: StepSampler, scorer: StepScorer) -> list[Any]:
    """Beam search: each node has 4 children, and 4 of all survive. Its separator is set to the models' own."""
    add_source(source, MISSING)
    from envs.MATH.env import Env
    from reason.guided_search.tree import SearchTree
    from reason.inference.text_generation import ConcatedLMGenResult

    found = []
    config = {
        "max_actions": 4, "max_length": 16, "is_few_shot": False,
        "generation_config": {"max_new_tokens": 400, "temperature": 0.8, "top_p": 1.0, "top_k": -1},
    }  # fmt: skip
    Env.sep = "\n\n"
    lm = LanguageModel(sampler, ConcatedLMGenResult, step_tag="\n\n")
    rm = RewardModel(scorer, step_tag="\n\n")
    for problem in problems:
        prompt = "<|bos|><|user|>{question}<|assistant|>"
        env = Env(config, [{"question": problem, "answer": ""}], lm, None, None, prompt, reset=False)
        found.append(SearchTree({}).beam_search(env, 4, 16, rm))
    return found


def main() -> None:
    """Run one of the two and count what it solves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="the folder src of compute-optimal-tts, or a checkout of OpenR")
    parser.add_argument("--openr", action="store_true")
    parser.add_argument("--problems", type=int, default=4)
    args = parser.parse_args()
    policy = HFPolicy(str(MODELS_DIR / "policy-3m"), chat=not args.openr, kv_memory="256MiB")
    sampler = StepSampler(policy)
    scorer = StepScorer(HFVerifier(str(MODELS_DIR / "prm-strong"), kv_memory="256MiB"))
    tasks = generate("test", 5, args.problems, 0)
    search = search_openr if args.openr else search_compute_optimal_tts
    found = search(args.source, [task.problem for task in tasks], sampler, scorer)
    best = [max(paths, key=lambda path: path["value"]) for paths in found]
    solved = sum(f"\\boxed{{{task.answer}}}" in path["text"] for task, path in zip(tasks, best, strict=True))
    spent, read = sampler.close(), scorer.close()
    print(f"{solved} of {len(tasks)} solved; {spent.tokens} tokens sampled, {spent.prefill_tokens} of prompts read")
    print(f"{read.tokens} tokens of steps verified", file=sys.stdout)


if __name__ == "__main__":
    main()

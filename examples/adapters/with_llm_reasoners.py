"""llm-reasoners' beam search on our policy and verifier.

    git clone https://github.com/maitrix-org/llm-reasoners
    python examples/adapters/with_llm_reasoners.py llm-reasoners

Its search asks a `SearchConfig` for the actions of one state, and for the reward of one action at a time; both are
whole paths to us. The actions of a state are scored together when they are made, so that the rewards are at hand.
"""

from __future__ import annotations

import argparse
from typing import Any

from source import add_source
from tts_search import HFPolicy, HFVerifier
from tts_search.adapters.stateless import Continuation, StepSampler, StepScorer
from tts_search.lab import MODELS_DIR
from tts_search.lab.arithmetic import generate
from tts_search.search.types import StepParams

MISSING = (
    "accelerate", "anthropic", "auto_gptq", "bitsandbytes", "datasets", "exllama", "fairscale", "fire", "google",
    "groq", "ninja", "openai", "optimum", "pddl", "peft", "requests", "sglang", "tarski", "tqdm",
)  # fmt: skip


def main() -> None:
    """Run its beam search and count what it solves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a checkout of llm-reasoners")
    parser.add_argument("--problems", type=int, default=4)
    args = parser.parse_args()
    add_source(args.source, MISSING)
    from reasoners import Reasoner, SearchConfig, WorldModel
    from reasoners.algorithm.beam_search import BeamSearch

    sampler = StepSampler(HFPolicy(str(MODELS_DIR / "policy-3m"), kv_memory="256MiB"))
    scorer = StepScorer(HFVerifier(str(MODELS_DIR / "prm-strong"), kv_memory="256MiB"))
    params = StepParams(temperature=0.8, max_tokens=64)

    class World(WorldModel):  # type: ignore[misc]
        """A state is the tuple of its steps."""

        def init_state(self) -> tuple[str, ...]:
            return ()

        def step(self, state: tuple[str, ...], action: str) -> tuple[tuple[str, ...], dict[str, Any]]:
            return (*state, action), {}

        def is_terminal(self, state: tuple[str, ...]) -> bool:
            return bool(state) and "\\boxed" in state[-1]

    class Config(SearchConfig):  # type: ignore[misc]
        """Four samples of a step; the reward is the verifier's score of it."""

        def get_actions(self, state: tuple[str, ...]) -> list[str]:
            (steps,) = sampler.sample([Continuation(self.example, "".join(state), params, 4)])
            actions = [step.text for step in steps]
            scorer.score([(self.example, [*state, action]) for action in actions])
            return actions

        def reward(self, state: tuple[str, ...], action: str, **_: Any) -> tuple[float, dict[str, Any]]:
            return scorer.score([(self.example, [*state, action])])[0][-1], {}

    reasoner = Reasoner(World(), Config(), BeamSearch(beam_size=4, max_depth=16))
    tasks = generate("test", 5, args.problems, 0)
    states = [reasoner(task.problem).terminal_state or () for task in tasks]
    solved = sum(f"\\boxed{{{task.answer}}}" in "".join(state) for task, state in zip(tasks, states, strict=True))
    spent, read = sampler.close(), scorer.close()
    print(f"{solved} of {len(tasks)} solved; {spent.tokens} tokens sampled, {spent.prefill_tokens} of prompts read")
    print(f"{read.tokens} tokens of steps verified")


if __name__ == "__main__":
    main()

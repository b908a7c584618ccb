"""thinkbooster's beam search on our policy and verifier.

    git clone https://github.com/IINemo/thinkbooster
    python examples/adapters/with_thinkbooster.py thinkbooster

Its strategies call a step generator for all beams of all problems at once, and a scorer of whole trajectories.
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
    "anthropic", "datasets", "dotenv", "langchain_core", "latex2sympy2", "lm_polygraph", "loguru", "openai", "pandas",
    "parse", "pydantic", "regex", "requests", "scipy", "sklearn", "sympy", "tenacity", "tiktoken", "tqdm",
    "word2number",
)  # fmt: skip


def generator_of(sampler: StepSampler, params: StepParams) -> Any:
    """Return a step generator of theirs."""
    from llm_tts.generators.base import StepCandidate, StepCandidateGeneratorBase

    class Generator(StepCandidateGeneratorBase):  # type: ignore[misc]
        context_budget, step_token_limit = 1024, params.max_tokens

        def generate_step_candidates_batch(
            self, requests: Any, trajectories: Any, candidates_per_step: int = 1, sample_ids: Any = None, **_: Any
        ) -> list[list[Any]]:
            asked = [
                Continuation(request[-1]["content"], "".join(step.text for step in path), params, candidates_per_step)
                for request, path in zip(requests, trajectories, strict=True)
            ]
            answers = [
                [StepCandidate(step.text, [0] * step.num_tokens, True, step.finished, other_data={}) for step in steps]
                for steps in sampler.sample(asked)
            ]
            for sample, steps in zip(sample_ids or (), answers, strict=False):
                self.record_sample_tokens(sample, steps)
            return answers

        def generate_answer_candidates_batch(self, requests: Any, trajectories: Any, *args: Any, **_: Any) -> Any:
            return self.generate_step_candidates_batch(requests, trajectories, *args)

    return Generator(generation_batch_size=1 << 20)


def scorer_of(scorer: StepScorer) -> Any:
    """Return a step scorer of theirs."""
    from llm_tts.scorers.step_scorer_base import CandidateScore, StepScorerBase

    class Scorer(StepScorerBase):  # type: ignore[misc]
        prm_model = scorer  # its strategies take whoever has this for a process reward model

        def score_trajectories_batch(self, chats: Any, trajectories: Any, **_: Any) -> list[list[float]]:
            items = [
                (chat[-1]["content"], [step.text for step in path])
                for chat, path in zip(chats, trajectories, strict=True)
            ]
            return scorer.score(items)

        def score_trajectory(self, chat: Any, trajectory: Any, **_: Any) -> list[float]:
            return self.score_trajectories_batch([chat], [trajectory])[0]

        def score_candidates_detailed(self, chat: Any, candidates: Any, trajectory: Any = (), **_: Any) -> list[Any]:
            paths = [[*trajectory, candidate] for candidate in candidates]
            scores = self.score_trajectories_batch([chat] * len(paths), paths)
            return [CandidateScore(path[-1].text, one[-1:], {}) for path, one in zip(paths, scores, strict=True)]

    return Scorer("tts_search")


def main() -> None:
    """Run its beam search over all problems together and count what it solves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a checkout of thinkbooster")
    parser.add_argument("--problems", type=int, default=4)
    args = parser.parse_args()
    add_source(args.source, MISSING)
    from llm_tts.strategies.strategy_beam_search import StrategyBeamSearch

    sampler = StepSampler(HFPolicy(str(MODELS_DIR / "policy-3m"), kv_memory="256MiB"))
    scorer = StepScorer(HFVerifier(str(MODELS_DIR / "prm-strong"), kv_memory="256MiB"))
    generator = generator_of(sampler, StepParams(temperature=0.8, max_tokens=64))
    strategy = StrategyBeamSearch(
        generator, scorer_of(scorer), beam_size=4, candidates_per_beam=4, max_steps=16, aggregation="last"
    )
    tasks = generate("test", 5, args.problems, 0)
    requests = [[{"role": "user", "content": task.problem}] for task in tasks]
    results = strategy.generate_trajectories_batch(requests)
    solved = sum(f"\\boxed{{{task.answer}}}" in one["trajectory"] for task, one in zip(tasks, results, strict=True))
    spent, read = sampler.close(), scorer.close()
    print(f"{solved} of {len(tasks)} solved; {spent.tokens} tokens sampled, {spent.prefill_tokens} of prompts read")
    print(f"{read.tokens} tokens of steps verified")


if __name__ == "__main__":
    main()

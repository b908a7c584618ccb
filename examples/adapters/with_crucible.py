"""crucible-ttc's beam search, tree search and best-of-N on our policy and verifier.

pip install 'tts-kernels[crucible]'
python examples/adapters/with_crucible.py
"""

from __future__ import annotations

import argparse

from crucible.config import PolicyConfig, RunConfig
from crucible.domain.types import Problem
from crucible.search.beam import BeamStrategy
from crucible.search.best_of_n import BestOfNStrategy
from crucible.search.mcts import MCTSStrategy
from crucible.verify import MathOutcomeVerifier
from tts_search import HFPolicy, HFVerifier
from tts_search.adapters.crucible import PolicyModel, ProcessVerifier
from tts_search.lab import MODELS_DIR
from tts_search.lab.arithmetic import generate

STRATEGIES = {"beam_search": BeamStrategy, "mcts": MCTSStrategy, "best_of_n": BestOfNStrategy}


def run(method: str, policy: PolicyModel, verifier: ProcessVerifier, problems: list[str], n: int) -> list[str]:
    """Return the text of the trace that crucible chooses for each problem."""
    config = RunConfig(n=n, selection="prm", prm_aggregate="last", max_steps=16, beam_width=n // 4, beam_expansions=4)
    config.policy = PolicyConfig(temperature=0.8, max_tokens=400)
    config.budget_tokens = 2000  # of its tree search
    strategy = STRATEGIES[method]()
    outcome = MathOutcomeVerifier()
    return [
        strategy.search(Problem(str(number), text), policy, outcome, verifier, config).text
        for number, text in enumerate(problems)
    ]


def main() -> None:
    """Run its strategies and count what they solve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=6)
    parser.add_argument("--n", type=int, default=16)
    args = parser.parse_args()
    policy = PolicyModel(HFPolicy(str(MODELS_DIR / "policy-3m"), kv_memory="256MiB"))
    verifier = ProcessVerifier(HFVerifier(str(MODELS_DIR / "prm-strong"), kv_memory="256MiB"))
    tasks = generate("test", 5, args.problems, 0)
    for method in STRATEGIES:
        texts = run(method, policy, verifier, [task.problem for task in tasks], args.n)
        solved = sum(f"\\boxed{{{task.answer}}}" in text for task, text in zip(tasks, texts, strict=True))
        spent, read = policy.close(), verifier.close()
        print(f"{method}: {solved} of {len(tasks)} solved; {spent.tokens} tokens sampled, {read.tokens} verified")


if __name__ == "__main__":
    main()

"""its_hub's beam search, particle filtering and best-of-N on our policy and verifier.

pip install 'tts-kernels[its_hub]'
python examples/adapters/with_its_hub.py
"""

from __future__ import annotations

import argparse

from its_hub.core.algorithms.beam_search import BeamSearch
from its_hub.core.algorithms.bon import BestOfN
from its_hub.core.algorithms.particle_gibbs import ParticleFiltering
from its_hub.core.lms.step_generation import StepGeneration
from tts_search import HFPolicy, HFVerifier
from tts_search.adapters.its_hub import LanguageModel, OutcomeRewardModel, ProcessRewardModel
from tts_search.lab import MODELS_DIR
from tts_search.lab.arithmetic import generate

METHODS = ("beam_search", "particle_filtering", "best_of_n")


def run(method: str, lm: LanguageModel, prm: ProcessRewardModel, problems: list[str], n: int) -> list[str]:
    """Return the text that its_hub chooses for each problem."""
    # It is not told where an answer ends, so a stop token says so: all demo answers end in "\\boxed{...}."
    steps = StepGeneration(16, step_token="\n\n", stop_token="\\boxed", temperature=0.8)
    algorithm = {
        "beam_search": lambda: BeamSearch(steps, prm, beam_width=4),
        "particle_filtering": lambda: ParticleFiltering(steps, prm),
        "best_of_n": lambda: BestOfN(OutcomeRewardModel(prm)),
    }[method]()
    return [algorithm.infer(lm, problem, n)["content"] for problem in problems]


def main() -> None:
    """Run its algorithms and count what they solve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=6)
    parser.add_argument("--n", type=int, default=16)
    args = parser.parse_args()
    lm = LanguageModel(HFPolicy(str(MODELS_DIR / "policy-3m"), kv_memory="256MiB"), max_tokens=400)
    prm = ProcessRewardModel(HFVerifier(str(MODELS_DIR / "prm-strong"), kv_memory="256MiB"))
    tasks = generate("test", 5, args.problems, 0)
    for method in METHODS:
        texts = run(method, lm, prm, [task.problem for task in tasks], args.n)
        solved = sum(f"\\boxed{{{task.answer}}}" in text for task, text in zip(tasks, texts, strict=True))
        spent, read = lm.close(), prm.close()
        print(f"{method}: {solved} of {len(tasks)} solved; {spent.tokens} tokens sampled, {read.tokens} verified")


if __name__ == "__main__":
    main()

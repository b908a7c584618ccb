"""A search whose policy is a server with OpenAI's API and whose verifier runs here::

    vllm serve MODEL --port 8000   # or any other
    python examples/adapters/openai_server.py --base-url http://localhost:8000/v1 --model MODEL --verifier PRM

Without options it expects the demo policy: ``vllm serve PATH/policy-3m --served-model-name demo``, where PATH is
``python -c "import tts_search.lab as d; print(d.MODELS_DIR)"``.
"""

from __future__ import annotations

import argparse

from tts_search import HFVerifier, SearchConfig, SearchError, search_iter
from tts_search.lab import MODELS_DIR
from tts_search.lab.arithmetic import generate
from tts_search.policies.openai import OpenAIPolicy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://localhost:8000/v1")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--verifier", default=str(MODELS_DIR / "prm-strong"))
    parser.add_argument("--endpoint", choices=["chat", "completions"], default="chat")
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("problems", nargs="*", help="problems to solve; by default four of arithmetic")
    args = parser.parse_args()

    problems = args.problems or [problem.problem for problem in generate("test", 2, 4, seed=5)]
    policy = OpenAIPolicy(args.model, base_url=args.base_url, endpoint=args.endpoint, concurrency=32, timeout=120)
    config = SearchConfig("beam_search", n=args.n, expand=4, max_steps=12, max_step_tokens=48, seed=3)
    for index, result in search_iter(problems, policy, HFVerifier(args.verifier), config):
        if isinstance(result, SearchError):
            print(f"{problems[index]}\n  failed: {result}")
        else:
            print(f"{problems[index]}\n  {result.answer()} (score {result.best.score:.2f})")


if __name__ == "__main__":
    main()

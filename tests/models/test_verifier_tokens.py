"""What a verifier forwards in whole searches: the problem once, and each step and boundary of the tree once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from test_hf_verifier import harmless
from test_local_search import CONFIGS, PROBLEMS, READING
from tiny import save_checkpoint, talkative, tiny_model
from tts_search import HFPolicy, HFVerifier, search
from tts_search.protocol import Score, ScoreAndPrune, Scored


class Recorder(HFVerifier):
    """Keeps what it is asked."""

    def __init__(self, path: str) -> None:
        super().__init__(path, kv_memory="4MiB")
        self.asked: list[Score] = []

    def score(self, requests: Sequence[Score]) -> list[list[float] | Exception]:
        self.asked += requests
        return super().score(requests)

    def score_and_prune(self, requests: Sequence[ScoreAndPrune]) -> list[Scored | Exception]:
        self.asked += [each for request in requests for each in request.candidates if isinstance(each, Score)]
        return super().score_and_prune(requests)

    def tokens_of(self, text: str) -> int:
        return len(self.tokenizer(text)["input_ids"])


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_the_unique_ones_and_the_boundaries(name: str, tmp_path: Path) -> None:
    policy = HFPolicy(save_checkpoint(tmp_path / "policy", talkative(tiny_model())), kv_memory="4MiB")
    verifier = Recorder(save_checkpoint(tmp_path / "verifier", tiny_model("qwen2", seed=3), verifier=READING))
    results = search(PROBLEMS, policy, verifier, CONFIGS[name], progress=False)
    for number, result in enumerate(results):
        wanted = prompt = verifier.tokens_of(f"<|user|>{PROBLEMS[number]}<|assistant|>")
        again = 0  # if each request were encoded as a whole
        depth_of = {0: 0}
        for request in verifier.asked:
            if request.problem == number:
                steps = (*request.steps, *request.lookahead)
                depth_of[request.branch] = len(request.steps)
                cost = [verifier.tokens_of(harmless(step.strip())) + 1 for step in steps]  # 1: the boundary
                wanted += sum(cost[depth_of[request.parent] :])
                again += prompt + sum(cost)
        assert result.stats.verifier_tokens == wanted
        assert result.stats.recomputed_tokens == 0
        assert wanted < again

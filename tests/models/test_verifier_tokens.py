"""The tokens that a verifier forwards in whole searches: the problem once, each text and boundary of the tree once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from test_hf_verifier import harmless
from test_local_search import CONFIGS, PROBLEMS, READING
from tiny import save_checkpoint, talkative, tiny_model
from tts_search import HFPolicy, HFVerifier, SearchTree, search
from tts_search.engine import sharing
from tts_search.search.protocol import Score, ScoreAndPrune


class Recorder(HFVerifier):
    """Keeps what it is asked."""

    def __init__(self, path: str) -> None:
        super().__init__(path, kv_memory="4MiB")
        self.asked: list[Score] = []

    def submit(self, requests: Sequence[Score | ScoreAndPrune]) -> None:
        for request in requests:
            candidates = request.candidates if isinstance(request, ScoreAndPrune) else (request,)
            self.asked += [each for each in candidates if isinstance(each, Score)]
        super().submit(requests)

    def tokens_of(self, text: str) -> int:
        return len(self.tokenizer(text)["input_ids"])


# Low temperatures: most samples repeat another.
ALIKE = {
    f"{name}, alike": replace(CONFIGS[name], temperature=0.02, dedupe=False)
    for name in ("best_of_n", "beam_search", "compete", "dvts")
}
ALIKE["mean, alike"] = replace(ALIKE["beam_search, alike"], aggregate="mean")


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> tuple[HFPolicy, Recorder]:
    folder = tmp_path_factory.mktemp("models")
    return (
        HFPolicy(save_checkpoint(folder / "policy", talkative(tiny_model())), kv_memory="4MiB"),
        Recorder(save_checkpoint(folder / "verifier", tiny_model("qwen2", seed=3), verifier=READING)),
    )


def cost(verifier: Recorder, asked: Sequence[Score]) -> tuple[int, int]:
    """Tokens of a problem's requests if each costs its new steps and their boundaries, and if each is read anew."""
    prompt = verifier.tokens_of(f"<|user|>{PROBLEMS[asked[0].problem]}<|assistant|>")
    once, again = prompt, 0
    depth_of = {0: 0}
    for request in asked:
        depth_of[request.branch] = len(request.steps)
        steps = [*request.steps, *request.lookahead]
        tokens = [verifier.tokens_of(harmless(step.strip())) + 1 for step in steps]  # 1: the boundary
        once += sum(tokens[depth_of[request.parent] :])
        again += prompt + sum(tokens)
    return once, again


@pytest.mark.parametrize("name", [*CONFIGS, *ALIKE])
def test_tokens_are_the_unique_ones_and_the_boundaries(drivers: tuple[HFPolicy, Recorder], name: str) -> None:
    """Each text of the tree is read once, however many branches have it; without that, each branch is."""
    policy, verifier = drivers
    config = {**CONFIGS, **ALIKE}[name]
    verifier.asked = []
    results = search(PROBLEMS, policy, verifier, config, progress=False, prefix_cache=False)
    asked, verifier.asked = verifier.asked, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "_text", lambda request: request.branch)
        apart = search(PROBLEMS, policy, verifier, config, progress=False, prefix_cache=False)
    for number, (result, other) in enumerate(zip(results, apart, strict=True)):
        own = [request for request in asked if request.problem == number]
        all_of_them = [request for request in verifier.asked if request.problem == number]
        texts = [(request.steps, request.lookahead) for request in own]
        assert len(set(texts)) == len(texts)
        assert set(texts) == {(request.steps, request.lookahead) for request in all_of_them}
        each, again = cost(verifier, all_of_them)
        assert result.stats.verifier_tokens == cost(verifier, own)[0] <= each <= again
        assert each < again or name in ALIKE
        assert other.stats.verifier_tokens == each
        assert result.stats.recomputed_tokens == 0
        assert_same_tree(result.tree, other.tree)
    assert len(asked) < 0.7 * len(verifier.asked) or name not in ALIKE
    assert verifier._pool.pool.forest.stats().branches == 0


def assert_same_tree(tree: SearchTree, other: SearchTree) -> None:
    """Equal texts and decisions; scores equal up to rounding."""
    for mine, theirs in zip(tree.nodes, other.nodes, strict=True):
        assert (mine.parent, mine.text, mine.state, mine.why) == (theirs.parent, theirs.text, theirs.state, theirs.why)
        assert mine.scores == pytest.approx(theirs.scores, abs=1e-5)

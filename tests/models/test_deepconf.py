"""DeepConf online, over the engine and a local policy: which traces end, where, and who votes."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import save_checkpoint, talkative, tiny_model
from tts_search import Engine, HFPolicy, SearchError, StepParams, TextPolicy
from tts_search.deepconf import DeepConfResult, deepconf
from tts_search.deepconf.confidence import Stopping, confidence_vote, token_confidence
from tts_search.search.protocol import Generate, Generated, GenerateParams
from tts_search.search.seeds import seed_of

PROBLEM = "What is the sum?"
WINDOW = 6
PARAMS = StepParams(temperature=1.0, max_tokens=40, delimiter=None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_checkpoint(tmp_path_factory.mktemp("policy"), talkative(tiny_model()))


@pytest.fixture(scope="module")
def policy(checkpoint: str) -> HFPolicy:
    return HFPolicy(checkpoint, kv_memory="4MiB")


def first_letter(text: str) -> str:
    return text.strip()[:1]


def run(policy: HFPolicy, **options: Any) -> DeepConfResult:
    own = {"n": 12, "warm_up": 4, "keep": 0.5, "consensus": 1.0, "window": WINDOW, "top": 5, "params": PARAMS}
    return deepconf(PROBLEM, policy, extract_answer=first_letter, equal=lambda a, b: a == b, **(own | options))


@pytest.fixture(scope="module")
def whole(policy: HFPolicy) -> list[Generated]:
    """The same traces, none of them given up."""
    how = GenerateParams(temperature=1.0, max_tokens=40, logprobs=5)
    tokens, seeds = tuple(policy.prompt_tokens(PROBLEM)), tuple(seed_of(0, PROBLEM, (i,)) for i in range(12))
    with Engine(policy) as engine:
        return engine.generate(Generate(tokens, how, 12, seeds)).result()


def test_a_trace_ends_where_it_is_less_sure_than_the_warm_up(policy: HFPolicy, whole: list[Generated]) -> None:
    result = run(policy)
    sure = [[token_confidence(place) for place in trace.top] for trace in whole]
    stopping = Stopping(sure[:4], 0.5, WINDOW)
    assert result.threshold == pytest.approx(stopping.threshold)
    assert [trace.text for trace in result.warm_up] == [trace.text for trace in whole[:4]]
    assert len(result.traces) == 8
    for trace, full, confidences in zip(result.traces, whole[4:], sure[4:], strict=True):
        ends = [count for count in range(1, len(confidences) + 1) if stopping.stops(confidences[:count])]
        assert trace.stopped == bool(ends)
        assert trace.confidences == pytest.approx(confidences[: ends[0]] if ends else confidences)
        assert full.text.startswith(trace.text)
    assert 0 < sum(trace.stopped for trace in result.traces) < 8, "both kinds are there to be told apart"
    assert result.num_tokens < sum(map(len, sure))


def test_who_votes(policy: HFPolicy) -> None:
    result = run(policy)
    voters = [
        trace
        for trace in (*result.warm_up, *result.traces)
        if not trace.stopped and trace.confidence >= result.threshold
    ]
    answers, weights = [trace.answer for trace in voters], [trace.confidence for trace in voters]
    assert result.answer == confidence_vote(answers, weights) != ""
    own = sum(weight for answer, weight in zip(answers, weights, strict=True) if answer == result.answer)
    assert result.agreement == pytest.approx(own / sum(weights))


def test_agreement_ends_it(policy: HFPolicy) -> None:
    result = run(policy, keep=1.0, consensus=0.01)
    assert len(result.warm_up) == 4
    assert not result.traces
    assert result.agreement > 0.01


def test_the_same_draws_in_any_order(policy: HFPolicy) -> None:
    assert run(policy, seed=3) == run(policy, seed=3)


def test_errors(policy: HFPolicy) -> None:
    for bad in ({"warm_up": 13}, {"warm_up": 0}, {"consensus": 0.0}, {"top": 0}, {"top": 129}, {"keep": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            run(policy, **bad)
    with pytest.raises(TypeError, match="policy: expected an HFPolicy"):
        deepconf(PROBLEM, TextPolicy(lambda _: []))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="params: expected no delimiter"):
        run(policy, params=StepParams(delimiter="\n"))
    with pytest.raises(SearchError, match="leaves no room"):
        deepconf("why " * 3000, policy, n=2, warm_up=1)

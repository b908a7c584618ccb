"""crucible-ttc with our models: its ports, and its own strategies if the package is installed."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import pytest
from scripted import ScriptedPolicy, ScriptedVerifier
from tiny import save_checkpoint, talkative, tiny_model
from tts_search import HFPolicy, HFVerifier, MissingExtraError, Step, TextPolicy
from tts_search.adapters.crucible import PolicyModel, ProcessVerifier

DELIMITER = "\n\n"


@dataclass(frozen=True)
class _Step:
    text: str
    token_count: int


@dataclass(frozen=True)
class _Compute:
    policy_gen_tokens: int = 0
    policy_forward_calls: int = 0
    wall_seconds: float = 0.0


@dataclass
class _Trace:
    steps: list = field(default_factory=list)
    final_answer: str | None = None
    compute: _Compute = field(default_factory=_Compute)


@pytest.fixture
def types(monkeypatch):
    """The types that crucible has, as far as they are used."""
    module = ModuleType("crucible.domain.types")
    module.__dict__.update(Step=_Step, Compute=_Compute, Trace=_Trace)
    for name in ("crucible", "crucible.domain"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "crucible.domain.types", module)


def problem_of(prompt):
    return SimpleNamespace(id="1", prompt=prompt, answer="4")


def step_of(_, steps, __, seed, params):
    rng = random.Random(seed)
    if params.delimiter is None:
        return Step("a\n\n\n\nb \\boxed{4}", True, 9, reason="eos")
    if len(steps) == 3 or rng.random() < 0.2:
        return Step(f"\\boxed{{{seed % 10}}}", True, 4, reason="eos")
    return Step(f"{seed}{DELIMITER}", False, 3)


@pytest.mark.usefixtures("types")
def test_steps_are_sampled_behind_their_prefix():
    policy = PolicyModel(ScriptedPolicy(step_of), max_step_tokens=7)
    first = policy.sample_step(problem_of("p"), [], n=3, temperature=0.5, max_tokens=100)
    going_on = [step for step in first if "boxed" not in step.text]
    assert going_on
    second = policy.sample_step(problem_of("p"), going_on[:1], n=2, temperature=0.5, max_tokens=100)
    assert len(second) == 2
    assert all(DELIMITER not in step.text for step in (*first, *second))
    assert {step.token_count for step in first} <= {3, 4}
    request = policy.policy.calls[-1][0]  # type: ignore[attr-defined]
    assert request.steps == (going_on[0].text + DELIMITER,)
    assert (request.params.temperature, request.params.max_tokens) == (0.5, 7)


@pytest.mark.usefixtures("types")
def test_whole_traces():
    policy = PolicyModel(ScriptedPolicy(step_of), prompt=lambda problem: f"Solve: {problem.prompt}")
    traces = policy.sample_full(problem_of("p"), n=2, temperature=0.7, max_tokens=50)
    assert [[step.text for step in trace.steps] for trace in traces] == [["a", "b \\boxed{4}"]] * 2
    assert [trace.compute.policy_gen_tokens for trace in traces] == [9, 9]
    assert sum(step.token_count for step in traces[0].steps) == 9
    assert [each.text for each in policy.policy.problems.values()] == ["Solve: p"]  # type: ignore[attr-defined]


def test_scores_are_one_a_step():
    verifier = ProcessVerifier(ScriptedVerifier(lambda _, steps: [len(step) / 10 for step in steps]))
    steps = [_Step("a", 1), _Step("", 0), _Step("bcd", 1)]
    assert verifier.score_steps(problem_of("p"), steps) == [0.1, 0.1, 0.3]
    assert verifier.score_steps(problem_of("p"), []) == []


@pytest.mark.usefixtures("types")
def test_nothing_is_forwarded_twice(tmp_path):
    options = {"name": "tiny", "head": "two_class", "good": 1, "boundary": "\n\n", "encoding": "pieces"}
    options["chat"] = [{"role": "user", "content": "{problem}"}, {"role": "assistant", "content": "{steps}"}]
    policy = PolicyModel(HFPolicy(save_checkpoint(tmp_path / "a", talkative(tiny_model())), kv_memory="4MiB"))
    path = save_checkpoint(tmp_path / "b", tiny_model(head="token"), verifier=options)
    verifier = ProcessVerifier(HFVerifier(path, kv_memory="4MiB"))
    problem, prefix = problem_of("What is the sum?"), []
    for _ in range(3):
        steps = policy.sample_step(problem, prefix, n=4, temperature=0.8, max_tokens=24)
        scores = [verifier.score_steps(problem, [*prefix, step]) for step in steps]
        assert all(len(each) == len(prefix) + 1 for each in scores)
        prefix = [*prefix, steps[0]]
    kept = verifier.close()
    fresh = verifier.score_steps(problem, [*prefix[:-1], steps[-1]])
    assert fresh == pytest.approx(scores[-1], abs=1e-5)
    assert kept.recomputed_tokens == 0
    assert kept.prefill_tokens == verifier.close().prefill_tokens  # the problem, once


def test_its_own_strategies():
    config_module = pytest.importorskip("crucible.config", reason="pip install --no-deps crucible-ttc")
    from crucible.domain.ports import PolicyModel as PolicyPort
    from crucible.domain.ports import ProcessVerifier as VerifierPort
    from crucible.domain.types import Problem
    from crucible.search.beam import BeamStrategy
    from crucible.search.best_of_n import BestOfNStrategy
    from crucible.search.mcts import MCTSStrategy
    from crucible.verify import MathOutcomeVerifier

    def scores(_, steps):
        return [random.Random(step).random() for step in steps]

    config = config_module.RunConfig(n=4, selection="prm", beam_width=2, beam_expansions=3, max_steps=6)
    config.budget_tokens = 60
    for strategy in (BeamStrategy(), MCTSStrategy(), BestOfNStrategy()):
        policy, verifier = PolicyModel(ScriptedPolicy(step_of)), ProcessVerifier(ScriptedVerifier(scores))
        assert isinstance(policy, PolicyPort)
        assert isinstance(verifier, VerifierPort)
        trace = strategy.search(Problem("1", "p", "4"), policy, MathOutcomeVerifier(), verifier, config)
        assert "boxed" in trace.text
        assert trace.compute.policy_gen_tokens > 0
        sampled = sum(len(request.children) for call in policy.policy.calls for request in call)
        assert trace.compute.policy_forward_calls == sampled


@pytest.mark.usefixtures("types")
def test_bad_arguments():
    with pytest.raises(ValueError, match="max_step_tokens"):
        PolicyModel(TextPolicy(lambda _: []), max_step_tokens=0)


def test_the_missing_package_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "crucible"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "adapters" not in path])
    with pytest.raises(MissingExtraError, match=r"tts-kernels\[crucible\]"):
        PolicyModel(TextPolicy(lambda _: []))

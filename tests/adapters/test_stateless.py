"""StepSampler and StepScorer: texts find their branches, and known tokens are not forwarded again."""

from __future__ import annotations

import pytest
from scripted import RandomTree, ScriptedPolicy, ScriptedVerifier
from tiny import save_checkpoint, talkative, tiny_model
from tts_search import HFPolicy, HFVerifier, SearchConfig, SearchError, Step, StepParams, TextPolicy, search
from tts_search.adapters.stateless import Continuation, StepSampler, StepScorer, before_delimiter
from tts_search.search.seeds import seed_of

PARAMS = StepParams(max_tokens=24)
PROBLEM = "What is the sum?"


@pytest.fixture(scope="module")
def policy_path(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("policy"), talkative(tiny_model()))


@pytest.fixture(scope="module")
def verifier_path(tmp_path_factory):
    options = {"name": "tiny", "head": "two_class", "good": 1, "boundary": "\n\n", "encoding": "pieces"}
    options["chat"] = [{"role": "user", "content": "{problem}"}, {"role": "assistant", "content": "{steps}"}]
    return save_checkpoint(tmp_path_factory.mktemp("verifier"), tiny_model(head="token"), verifier=options)


def sampler_of(calls, **options):
    """A sampler over a policy that answers with the number of its seed and notes what it was asked."""

    def answer(requests):
        calls.extend(requests)
        return [[Step(f"s{seed % 1000003}\n\n", False, 2) for seed in request.seeds] for request in requests]

    return StepSampler(TextPolicy(answer), **options)


def test_samples_draw_as_the_children_of_a_search_do():
    calls = []
    sampler = sampler_of(calls, seed=3)
    (first,) = sampler.sample([Continuation(PROBLEM, "", PARAMS, 2)])
    ((second,),) = sampler.sample([Continuation(PROBLEM, first[1].text, PARAMS)])
    ((third,),) = sampler.sample([Continuation(PROBLEM, first[1].text, PARAMS)])
    assert [request.seeds for request in calls] == [
        (seed_of(3, PROBLEM, (0,)), seed_of(3, PROBLEM, (1,))),
        (seed_of(3, PROBLEM, (1, 0)),),
        (seed_of(3, PROBLEM, (1, 1)),),
    ]
    assert calls[1].steps == (first[1].text,)
    assert second.text != third.text


def test_equal_continuations_are_one_request():
    calls = []
    one, two, three = sampler_of(calls).sample(
        [Continuation(PROBLEM, "", PARAMS), Continuation("other", "", PARAMS), Continuation(PROBLEM, "", PARAMS, 2)]
    )
    assert [(request.problem, request.num_samples) for request in calls] == [(PROBLEM, 3), ("other", 1)]
    assert [len(one), len(two), len(three)] == [1, 1, 2]
    assert len({step.text for step in (*one, *three)}) == 3


def test_a_prompt_begins_with_the_problem_that_it_continues():
    sampler = sampler_of([])
    assert sampler.split("<user>a<assistant>") == ("<user>a<assistant>", "")
    sampler.sample([Continuation("<user>a<assistant>", "", PARAMS), Continuation("<user>", "", PARAMS)])
    assert sampler.split("<user>a<assistant>1 + 1\n\n") == ("<user>a<assistant>", "1 + 1\n\n")


def test_too_many_problems_are_forgotten_but_none_in_use():
    policy = ScriptedPolicy(lambda *_: Step("x\n\n", False, 1))
    sampler = StepSampler(policy, max_problems=2)
    sampler.sample([Continuation(name, "", PARAMS) for name in "abc"])
    assert len(policy.problems) == 3
    sampler.sample([Continuation("c", "", PARAMS)])
    assert [each.text for each in policy.problems.values()] == ["b", "c"]
    sampler.close()
    assert not policy.problems


def test_a_step_without_its_delimiter():
    assert before_delimiter("\n\na b\n\n\n", "\n\n") == "\n\na b"
    assert before_delimiter("a b", "\n\n") == "a b"
    assert before_delimiter("a\n\nb", None) == "a\n\nb"


def test_known_text_is_not_forwarded_again(policy_path):
    policy = HFPolicy(policy_path, kv_memory="4MiB")
    sampler = StepSampler(policy, seed=1)
    prompt = len(policy.tokenizer(policy._prompt(PROBLEM), add_special_tokens=False)["input_ids"])
    texts, sampled = [""], 0
    for _ in range(4):
        answers = sampler.sample([Continuation(PROBLEM, text, PARAMS, 3) for text in texts])
        sampled += sum(step.num_tokens for steps in answers for step in steps)
        texts = [
            text + step.text for text, steps in zip(texts, answers, strict=True) for step in steps if not step.finished
        ][:4]
        assert texts
    usage = sampler.close()
    assert usage.prefill_tokens == prompt
    assert usage.tokens == sampled
    # A branch that is continued gives its last token's logits once more: one token each, not its text.
    assert usage.recomputed_tokens <= 4 * len(texts)


def test_an_edited_text_is_read_from_where_it_is_known(policy_path):
    policy = HFPolicy(policy_path, kv_memory="4MiB")
    sampler = StepSampler(policy, seed=1)
    steps = sampler.sample([Continuation(PROBLEM, "", PARAMS, 8)])[0]
    step = next(step for step in steps if not step.finished and step.reason == "stop")
    (problem,) = policy._problems.values()
    before = problem.root.meter.prompt
    sampler.sample([Continuation(PROBLEM, f"{step.text}So ", PARAMS)])
    assert problem.root.meter.prompt - before == 3
    usage = sampler.close()
    assert usage.prefill_tokens == before + 3


def test_a_search_and_a_sampler_share_a_policy(policy_path):
    policy = HFPolicy(policy_path, kv_memory="4MiB")
    config = SearchConfig(method="best_of_n", n=3, max_step_tokens=24, seed=5)
    alone = search([PROBLEM], policy, None, config, progress=False)[0]
    sampler = StepSampler(policy, seed=5)
    steps = sampler.sample([Continuation(PROBLEM, "", StepParams(max_tokens=24, delimiter=None), 3)])[0]
    beside = search([PROBLEM], policy, None, config, progress=False)[0]
    texts = [one.text for one in alone.completions]
    assert sorted(step.text for step in steps) == sorted(texts)
    assert [one.text for one in beside.completions] == texts


def test_samplers_and_scorers_share_drivers(verifier_path):
    verifier = HFVerifier(verifier_path, kv_memory="4MiB")
    one, other = StepScorer(verifier), StepScorer(verifier)
    assert one.score([(PROBLEM, "1 + 1")]) == other.score([(PROBLEM, "1 + 1")])
    assert one.close().tokens == other.close().tokens > 0


def test_scores_of_known_steps_are_kept(verifier_path):
    verifier = HFVerifier(verifier_path, kv_memory="4MiB")
    scorer = StepScorer(verifier)
    whole = "1 + 1 = 2\n\n2 + 3 = 5\n\nThe answer is 5."
    parts = [scorer.score([(PROBLEM, text)])[0] for text in ("1 + 1 = 2", "1 + 1 = 2\n\n2 + 3 = 5\n\n", whole)]
    assert [len(scores) for scores in parts] == [1, 2, 3]
    assert parts[2][:2] == parts[1]
    assert scorer.score([(PROBLEM, whole), (PROBLEM, ["1 + 1 = 2"])]) == [parts[2], parts[0]]
    stepwise = scorer.close()
    fresh = scorer.score([(PROBLEM, whole)])[0]
    at_once = scorer.close()
    assert fresh == pytest.approx(parts[2], abs=1e-5)
    assert stepwise.prefill_tokens == at_once.prefill_tokens
    assert stepwise.tokens == at_once.tokens


def test_scores_follow_the_protocol():
    tree = RandomTree(seed=2)
    scorer = StepScorer(ScriptedVerifier(tree.scores))  # which checks that a parent was scored before
    texts = ["a\n\nb\n\n", "a\n\nb\n\nc", "a", "a\n\nb\n\nd\n\n\n\ne", "", "a\n\nb"]
    together = scorer.score([(PROBLEM, text) for text in texts])
    assert [len(scores) for scores in together] == [2, 3, 1, 4, 0, 2]
    assert scorer.score([(PROBLEM, "a\n\nb\n\nc\n\nf")])[0][:3] == together[1]
    assert scorer.score([(PROBLEM, ["", "a", " ", "b"])]) == [[0.0, together[2][0], together[2][0], together[0][1]]]


@pytest.mark.parametrize("scores", [[0.5], [0.5, float("nan")]])
def test_bad_scores(scores):
    scorer = StepScorer(ScriptedVerifier(lambda *_: scores))
    with pytest.raises(SearchError, match="expected 2 finite scores"):
        scorer.score([(PROBLEM, "a\n\nb")])


def test_a_failed_step_leaves_nothing_behind():
    answers = iter([[float("nan")], [0.25, 0.75]])
    scorer = StepScorer(ScriptedVerifier(lambda *_: next(answers)))
    with pytest.raises(SearchError, match="finite"):
        scorer.score([(PROBLEM, "a")])
    assert scorer.score([(PROBLEM, "a\n\nb")]) == [[0.25, 0.75]]


def test_bad_arguments(policy_path):
    with pytest.raises(ValueError, match="max_problems"):
        sampler_of([], max_problems=0)
    with pytest.raises(ValueError, match="delimiter"):
        StepScorer(ScriptedVerifier(lambda *_: []), delimiter="")
    with pytest.raises(SearchError, match="num_samples"):
        sampler_of([]).sample([Continuation(PROBLEM, "", PARAMS, 0)])
    with pytest.raises(SearchError, match="expected a problem"):
        sampler_of([]).sample([Continuation(" ", "", PARAMS)])
    with pytest.raises(ValueError, match="system_prompt"):
        HFPolicy(policy_path, chat=False, system_prompt="x")
    policy = HFPolicy(policy_path, kv_memory="4MiB")
    with pytest.raises(SearchError, match="context"):
        StepSampler(policy).sample([Continuation("word " * 600, "", PARAMS)])

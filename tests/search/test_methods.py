"""REBASE, KV-aware pruning, particle filtering, PUCT, budget forcing, early exit: properties over random trees."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import RandomTree, ScriptedPolicy, ScriptedVerifier, by_name, names, score_names
from tts_search import ConfigError, SearchConfig, SearchError, Step, TextPolicy, Thinking, search, search_iter
from tts_search.search.algorithms.frontier import proportional, worth_their_kv
from tts_search.search.config import METHODS

TREE_METHODS = ("rebase", "ets", "particle_filtering", "puct")
SCORES = st.lists(st.sampled_from([-math.inf, 0.0, 0.1, 0.5, 0.5000001, 0.9, 1.0]), min_size=1, max_size=12)
FEW = settings(max_examples=150, deadline=None)


@st.composite
def trees(draw, empty=(0.0, 0.2), **options):
    """Without empty steps a policy cannot return nothing, which is the one thing that can fail here."""
    return RandomTree(
        draw(st.integers(0, 10**6)),
        end=draw(st.sampled_from([0.0, 0.2, 0.6])),
        length=draw(st.sampled_from([0.0, 0.1])),
        empty=draw(st.sampled_from(empty)),
        blank=draw(st.sampled_from([0.0, 0.1])),
        words=draw(st.sampled_from([2, 100])),
        answers=("1", "2"),
        **options,
    )


def run(tree, config, problems=("p",)):
    policy = ScriptedPolicy(tree.step)
    results = search(list(problems), policy, ScriptedVerifier(tree.scores), config, progress=False)
    return results, policy


def outcomes(tree, config, problems):
    """What became of each problem; of an error, its message."""
    found = search_iter(problems, ScriptedPolicy(tree.step), ScriptedVerifier(tree.scores), config, progress=False)
    return {problems[index]: one.message if isinstance(one, SearchError) else one for index, one in found}


@FEW
@given(trees(), st.sampled_from(TREE_METHODS), st.integers(1, 9), st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_every_method(tree, method, n, expand, max_steps, dedupe):
    """What holds for all: the budget, the order, the best; and nothing depends on what else is in flight."""
    options = {"expand": expand} if method == "puct" else {"dedupe": dedupe} if method in ("rebase", "ets") else {}
    config = SearchConfig(method=method, n=n, max_steps=max_steps, **options)
    alone, together = outcomes(tree, config, ["p"])["p"], outcomes(tree, config, ["another", "p", "third"])["p"]
    if isinstance(alone, str):
        assert alone == together == "policy: it returned nothing, an empty text for each sample"
        return
    (result,), policy = run(tree, config)
    width = max(n, expand)  # PUCT gives a leaf all of its children
    assert all(sum(len(request.children) for request in call) <= width for call in policy.calls)
    assert result.stats.rounds <= max_steps
    finished = [one for one in result.completions if one.finished]
    assert result.completions[: len(finished)] == finished
    assert result.best is max(finished or result.completions, key=lambda one: one.score)
    for one in result.completions:
        assert "".join(one.steps) == one.text
        assert len(one.step_scores) == len([step for step in one.steps if step.strip()])
    assert alone.completions == together.completions == result.completions
    assert alone.tree.to_json() == together.tree.to_json() == result.tree.to_json()


@given(SCORES, st.integers(1, 300), st.sampled_from([0.01, 0.2, 1.0, 10.0]))
def test_proportional(scores, width, temperature):
    counts = proportional(scores, width, temperature)
    assert sum(counts) == width
    assert min(counts) >= 0
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    dealt = [counts[index] for index in order]
    assert dealt[0] == max(dealt) > 0
    top = max(scores)
    weights = [1.0 if one == top else math.exp((one - top) / temperature) for one in scores]
    for count, weight in zip(counts, weights, strict=True):  # nobody is far from an exact share
        assert count <= math.ceil(width * weight / sum(weights) + 1e-6) + len(scores)


@FEW
@given(trees(empty=[0.0]), st.integers(1, 16), st.integers(1, 4))
def test_rebase_deals_what_is_left(tree, n, max_steps):
    (result,), policy = run(tree, SearchConfig(method="rebase", n=n, max_steps=max_steps))
    ended = Counter(node.round for node in result.tree.nodes if node.state == "finished")
    left = n
    for number, call in enumerate(policy.calls, start=1):
        assert sum(len(request.children) for request in call) == left
        left -= ended[number]


@dataclass(eq=False)
class Node:
    id: int
    parent: Node | None
    num_tokens: int


def greedy_choice(branches, shares, weight):
    """The same choice, by sets and from scratch each time."""

    def path(branch):
        return {branch} | path(branch.parent) if branch.parent is not None else set()

    def size(nodes):
        return sum(max(1, node.num_tokens) for node in nodes)

    total = size(set().union(*map(path, branches)))
    chosen, covered = [], set()
    while len(chosen) < len(branches):
        gains = [
            (shares[i] / max(1, sum(shares)) - weight * size(path(branch) - covered) / total, -i)
            for i, branch in enumerate(branches)
            if i not in chosen
        ]
        gain, negative = max(gains)
        if chosen and gain <= 1e-12:
            break
        chosen.append(-negative)
        covered |= path(branches[-negative])
    return sorted(chosen)


@FEW
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 1.0, 1.5, 100.0]))
def test_worth_their_kv(seed, weight):
    rng = random.Random(seed)
    nodes = [Node(0, None, 0)]
    for number in range(1, rng.randrange(2, 30)):
        nodes.append(Node(number, rng.choice(nodes[-6:]), rng.choice([0, 1, 4, 16])))
    parents = {node.parent for node in nodes}
    leaves = [node for node in nodes[1:] if node not in parents]
    shares = [rng.randrange(5) for _ in leaves]
    chosen = worth_their_kv(leaves, shares, weight)
    if weight == 0:
        assert chosen == ([i for i, share in enumerate(shares) if share] or [0])
    assert chosen == greedy_choice(leaves, shares, weight)


def test_ets_drops_a_branch_that_shares_nothing():
    """Two leaves of one trunk are cheaper to keep than one of another, of nearly the same score."""
    trunk, other = Node(1, Node(0, None, 0), 100), Node(2, Node(0, None, 0), 100)
    leaves = [Node(3, trunk, 10), Node(4, trunk, 10), Node(5, other, 10)]
    assert worth_their_kv(leaves, [3, 3, 2], 1.0) == [0, 1]
    assert worth_their_kv(leaves, [3, 3, 2], 0.1) == [0, 1, 2]


def test_particles_are_drawn_by_odds():
    policy = ScriptedPolicy(by_name())
    scores = {"0": 0.9, "1": 0.5, "2": 0.1}
    counts = Counter()
    for seed in range(400):
        config = SearchConfig(method="particle_filtering", n=3, max_steps=2, seed=seed)
        policy.calls.clear()
        search(["p"], policy, ScriptedVerifier(score_names(scores, 0.5)), config, progress=False)
        for request in policy.calls[1]:
            counts[names(request.steps)[-1]] += len(request.children)
    shares = [counts[name] / 1200 for name in "012"]
    odds = [9, 1, 1 / 9]
    assert shares == pytest.approx([one / sum(odds) for one in odds], abs=0.03)


def test_particles_need_probabilities():
    config = SearchConfig(method="particle_filtering", n=2)
    with pytest.raises(SearchError, match=r"needs scores within \[0, 1\], got 1.5"):
        search(["p"], ScriptedPolicy(by_name()), ScriptedVerifier(score_names({}, 1.5)), config, progress=False)


def test_puct_comes_back_to_a_branch_that_it_left():
    """All below the best first step is bad: beam search is stuck there, PUCT is not."""
    scores = {"0": 0.6, "1": 0.5, "1.0": 0.9, "1.0.0": 0.9}
    options = {"n": 2, "expand": 2, "keep": 1, "max_steps": 6}
    step = by_name(finished=["1.0.0", "1.0.1"])

    def best(method):
        config = SearchConfig(method=method, **options)
        return search(["p"], ScriptedPolicy(step), ScriptedVerifier(score_names(scores)), config, progress=False)[
            0
        ].best

    assert best("puct").text.endswith("end 1.0.0")
    assert best("beam_search").text.startswith("0\n\n")


@FEW
@given(trees(empty=[0.0]), st.integers(1, 8), st.integers(1, 4), st.sampled_from([0.0, 1.25, 100.0]))
def test_puct_expands_a_leaf_once(tree, n, expand, exploration):
    config = SearchConfig(method="puct", n=n, expand=expand, exploration=exploration, max_steps=6)
    (result,), policy = run(tree, config)
    expanded = [request.branch for call in policy.calls for request in call]
    assert len(set(expanded)) == len(expanded)
    if len(result.completions) < n and result.stats.rounds < 6:  # it stopped early, so nothing could grow
        assert not any(
            node.state == "open" and node.num_tokens for node in result.tree.nodes if node.parent is not None
        )


def test_puct_without_exploration_is_best_first():
    """With values that never fall along a path, it goes on from the best leaf of all."""
    scores = {"0": 0.3, "1": 0.4, "1.0": 0.45, "1.1": 0.5, "1.1.0": 0.6, "1.1.1": 0.6}
    policy = ScriptedPolicy(by_name())
    config = SearchConfig(method="puct", n=2, expand=2, keep=1, exploration=0, max_steps=4)
    search(["p"], policy, ScriptedVerifier(score_names(scores)), config, progress=False)
    assert [names(call[0].steps) for call in policy.calls] == [[], ["1"], ["1", "1.1"], ["1", "1.1", "1.1.0"]]


# Budget forcing


@dataclass
class Thinker:
    """Thinks for as many tokens as `lengths` say, call by call of a branch, then answers; it minds its token limit."""

    lengths: tuple[int, ...]
    requests: list = field(default_factory=list)

    def __call__(self, requests):
        self.requests += requests
        return [[self.step(request) for _ in range(request.num_samples)] for request in requests]

    def step(self, request):
        if request.params.delimiter is None:
            return Step(" it is \\boxed{7}", True, 4, reason="eos")
        wanted = self.lengths[len(request.steps) % len(self.lengths)]
        if wanted > request.params.max_tokens:
            return Step("hm " * request.params.max_tokens, False, request.params.max_tokens, reason="length")
        return Step("hm " * (wanted - 1) + "</think>", False, wanted)


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.integers(0, 20),
    st.integers(0, 20),
    st.integers(0, 3),
    st.integers(1, 3),
)
def test_budget_forcing(lengths, at_least, more, extensions, n):
    thinking = Thinking(min_tokens=at_least, max_tokens=max(1, at_least + more), max_extensions=extensions)
    thinker = Thinker(tuple(lengths))
    config = SearchConfig(method="budget_forcing", n=n, thinking=thinking)
    (result,) = search(["p"], TextPolicy(thinker), None, config, progress=False)
    assert len(result.completions) == n
    for one in result.completions:
        thought, end, answer = one.text.partition("</think>")
        assert (end, answer, one.answer, one.finished) == ("</think>", " it is \\boxed{7}", "7", True)
        assert "</think>" not in answer
        extended = thought.count("\nWait")
        tokens = one.num_tokens - 4
        assert extended <= extensions
        assert tokens <= thinking.max_tokens
        if tokens < thinking.min_tokens:
            assert extended == extensions
        assert thought.count("hm ") >= tokens - extended - 1


def test_budget_forcing_of_an_answer_without_thinking():
    policy = TextPolicy(
        lambda requests: [[Step("\\boxed{1}", True, 3, reason="eos")] * r.num_samples for r in requests]
    )
    (result,) = search(["p"], policy, None, SearchConfig(method="budget_forcing", n=2), progress=False)
    assert [one.text for one in result.completions] == ["\\boxed{1}"] * 2


def test_budget_forcing_minds_max_tokens():
    thinker = Thinker((100,))
    config = SearchConfig(method="budget_forcing", n=1, max_tokens=10, thinking=Thinking(max_tokens=50))
    (result,) = search(["p"], TextPolicy(thinker), None, config, progress=False)
    assert [request.params.max_tokens for request in thinker.requests] == [10]
    assert not result.completions[0].finished


def test_budget_forcing_is_scored():
    config = SearchConfig(method="budget_forcing", n=1, thinking=Thinking(min_tokens=10, max_extensions=1))
    verifier = ScriptedVerifier(lambda _, steps: [0.5] * len(steps))
    (result,) = search(["p"], TextPolicy(Thinker((3,))), verifier, config, progress=False)
    assert result.best.score == 0.5
    assert [node.state for node in result.tree.nodes] == ["expanded", "expanded", "expanded", "finished"]


# Early exit


@FEW
@given(trees(empty=[0.0]), st.integers(1, 12), st.integers(1, 4))
def test_best_of_n_stops_when_answers_agree(tree, n, margin):
    def lead(completions):
        counts = Counter(one.answer for one in completions if one.finished and one.answer)
        first, second = [*sorted(counts.values(), reverse=True), 0, 0][:2]
        return first - second

    (full,), _ = run(tree, SearchConfig(method="best_of_n", n=n))
    (result,), policy = run(tree, SearchConfig(method="best_of_n", n=n, agree_margin=margin))
    count = len(result.completions)
    assert result.completions == full.completions[:count]
    assert count == n or lead(result.completions) >= margin
    sizes = [len(call[0].children) for call in policy.calls]
    assert sizes[0] == min(n, margin)
    for number in range(1, len(sizes)):  # it went on for a reason, and doubled
        assert lead(full.completions[: sum(sizes[:number])]) < margin
        assert sizes[number] == min(sum(sizes[:number]), n - sum(sizes[:number]))


@pytest.mark.parametrize("method", ["beam_search", "dvts", "rebase", "ets", "particle_filtering", "puct"])
def test_every_method_stops_when_answers_agree(method):
    def step(_, steps, number, seed, __):
        return Step("so \\boxed{4}", True, 1) if len(steps) == 1 and number < 2 else Step(f"{seed}\n\n", False, 1)

    verifier = ScriptedVerifier(lambda _, steps: [0.5] * len(steps))
    config = SearchConfig(method=method, n=16, max_steps=9, agree_margin=2)
    (result,) = search(["p"], ScriptedPolicy(step), verifier, config, progress=False)
    assert result.stats.rounds == 2
    assert result.answer("majority") == "4"


@pytest.mark.parametrize("method", ["beam_search", "dvts", "rebase", "ets", "particle_filtering", "puct"])
@pytest.mark.parametrize("budget", [1, 100, 10**6])
def test_no_round_begins_when_the_budget_is_spent(method, budget):
    policy = ScriptedPolicy(lambda _, __, ___, seed, ____: Step(f"{seed}\n\n", False, 5))
    verifier = ScriptedVerifier(lambda _, steps: [0.5] * len(steps))
    config = SearchConfig(method=method, n=8, max_steps=7, budget_tokens=budget)
    (result,) = search(["p"], policy, verifier, config, progress=False)
    spent = [0] * (result.stats.rounds + 1)
    for node in result.tree.nodes:
        spent[node.round] += node.num_tokens
    assert sum(spent[:-1]) < budget
    assert sum(spent) >= budget or result.stats.rounds == 7
    assert result.completions


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"agree_margin": 0}, "agree_margin"),
        ({"reward_temperature": 0}, "reward_temperature"),
        ({"kv_weight": -1}, "kv_weight"),
        ({"exploration": math.inf}, "exploration"),
        ({"thinking": 3}, "thinking"),
    ],
)
def test_bad_options(options, name):
    with pytest.raises(ConfigError, match=rf"^{name}: expected .*got"):
        SearchConfig(**options)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"end": ""}, "end"),
        ({"extend": None}, "extend"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_extensions": 1.5}, "max_extensions"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ],
)
def test_bad_thinking(options, name):
    with pytest.raises(ConfigError, match=rf"^thinking\.{name}: expected .*got"):
        Thinking(**options)


def test_thinking_from_json():
    config = SearchConfig(method="budget_forcing", thinking={"max_tokens": 9})
    assert config.thinking == Thinking(max_tokens=9)


@pytest.mark.parametrize("ends_by_itself", [True, False])
def test_thinking_is_cut_into_steps_however_it_ends(ends_by_itself):
    def sample(request):
        if request.params.delimiter is None:
            return Step("7", True, 1, reason="eos")
        return Step("a\n\nb" + "</think>" * ends_by_itself, False, 3, reason="stop" if ends_by_itself else "length")

    policy = TextPolicy(lambda requests: [[sample(one)] * one.num_samples for one in requests])
    verifier = ScriptedVerifier(lambda _, steps: [0.5] * len(steps))
    config = SearchConfig(method="budget_forcing", n=1, thinking=Thinking(max_tokens=3))
    (result,) = search(["p"], policy, verifier, config, progress=False)
    assert result.best.steps == ("a\n\n", "b</think>", "7")


def test_thinking_that_fills_the_context_is_no_answer():
    policy = TextPolicy(lambda requests: [[Step("hm", True, 3, reason="length")] * one.num_samples for one in requests])
    (result,) = search(["p"], policy, None, SearchConfig(method="budget_forcing", n=2), progress=False)
    assert [(one.text, one.finished) for one in result.completions] == [("hm", False)] * 2


@pytest.mark.parametrize("method", METHODS)
def test_a_branch_at_the_end_of_the_context_stops_without_finishing(method):
    policy = ScriptedPolicy(lambda *_: Step("cut", True, 1, reason="length"))
    config = SearchConfig(n=2, expand=2, max_steps=3).with_method(method)
    (result,) = search(["p"], policy, ScriptedVerifier(lambda _, steps: [0.5] * len(steps)), config, progress=False)
    assert [(one.text, one.finished) for one in result.completions] == [("cut", False)] * 2
    assert len(policy.calls) == 1
    assert {node.state for node in result.tree.nodes[1:]} == {"open"}


@pytest.mark.parametrize(
    ("delimiter", "text", "closes"),
    [
        ("</think>", "</think>", True),
        ("</think>", "\n\n</think>", True),
        ("</think>", "\n\n", False),
        ("\n\n", "\n\n", False),
        ("\n\n", "\n\na\n\n", True),
        (None, "a\n\n", False),
    ],
)
def test_where_a_local_step_ends(delimiter, text, closes):
    from tts_search.models import endings

    assert endings.closes(text, delimiter) is closes

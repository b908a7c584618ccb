"""The presets decide as the peers do: random trees against independent re-tellings of their loops."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import World, compute_optimal, its_hub_beam, search_and_learn_beam, search_and_learn_dvts
from scripted import RandomTree, ScriptedPolicy, ScriptedVerifier
from tts_search import ConfigError, SearchConfig, search

EXAMPLES = 300
SEEDS = st.integers(0, 10**9)
ENDS = st.sampled_from([0.0, 0.1, 0.3, 0.6, 1.0])
AGGREGATES = st.sampled_from(["last", "min", "prod"])


def ours(tree: RandomTree, config: SearchConfig):
    result = search(["p"], ScriptedPolicy(tree.step), ScriptedVerifier(tree.scores), config, progress=False)[0]
    best = next(i for i, completion in enumerate(result.completions) if completion is result.best)
    return [one.text for one in result.completions], [one.score for one in result.completions], best


@settings(max_examples=EXAMPLES, deadline=None)
@given(SEEDS, ENDS, st.integers(1, 9), st.integers(1, 5), st.integers(1, 5), AGGREGATES, st.booleans(), st.booleans())
def test_search_and_learn_beam_search(seed, end, n, beam_width, iterations, how, duplicates, sort):
    tree = RandomTree(seed, end=end, length=0.1, empty=0.3)
    options = {"agg_strategy": how, "filter_duplicates": duplicates, "sort_completed": sort}
    config = SearchConfig.search_and_learn(
        "beam_search", n=n, beam_width=beam_width, num_iterations=iterations, lookahead=2, **options
    )
    oracle = search_and_learn_beam(
        World(tree, "p", 42), n=n, beam_width=beam_width, num_iterations=iterations, **options
    )
    assert ours(tree, config) == oracle


@settings(max_examples=EXAMPLES, deadline=None)
@given(SEEDS, ENDS, st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2), AGGREGATES)
def test_search_and_learn_dvts(seed, end, subtrees, beam_width, iterations, lookahead, how):
    tree = RandomTree(seed, end=end, length=0.1, empty=0.3, marker=" boxed{")
    n = subtrees * beam_width
    options = {"beam_width": beam_width, "num_iterations": iterations, "lookahead": lookahead, "agg_strategy": how}
    config = SearchConfig.search_and_learn("dvts", n=n, **options)
    assert ours(tree, config) == search_and_learn_dvts(World(tree, "p", 42), n=n, **options)


def test_search_and_learn_best_of_n():
    tree = RandomTree(3)
    texts, scores, best = ours(tree, SearchConfig.search_and_learn("best_of_n", n=16, sort_completed=True))
    world = World(tree, "p", 42)
    samples = [world.sample([], (j,), delimiter=None).text for j in range(16)]
    assert texts == samples
    assert scores == [world.score([text], last=True)[-1] if text else float("-inf") for text in samples]
    assert best == scores.index(max(scores))


@settings(max_examples=EXAMPLES, deadline=None)
@given(SEEDS, ENDS, st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5))
def test_compute_optimal_tts(seed, end, expand, num_sequence, num_q, depth):
    tree = RandomTree(seed, end=end, length=0.15, marker=" \\boxed{")
    options = {
        "tree_max_width": expand * num_sequence,
        "num_sequence": num_sequence,
        "num_q": num_q,
        "tree_max_depth": depth,
    }
    method = "beam_search" if seed % 2 else "dvts"
    config = SearchConfig.compute_optimal_tts(method, **options)
    assert ours(tree, config) == compute_optimal(World(tree, "p", 0), **options)


@settings(max_examples=EXAMPLES, deadline=None)
@given(SEEDS, ENDS, st.integers(1, 4), st.integers(1, 4), st.integers(0, 5))
def test_its_hub(seed, end, num_beams, beam_width, max_steps):
    tree = RandomTree(seed, end=end / 2, marker="STOP")
    options = {
        "budget": num_beams * beam_width,
        "beam_width": beam_width,
        "max_steps": max_steps,
        "stop_token": "STOP",
    }
    config = SearchConfig.its_hub("beam_search", **options)
    assert ours(tree, config) == its_hub_beam(World(tree, "p", 0), **options)


def test_parameters_are_the_peers_own():
    config = SearchConfig.search_and_learn("beam_search", n=16, beam_width=8, temperature=0.5, max_tokens=99, seed=7)
    assert (config.n, config.keep, config.expand, config.max_step_tokens) == (16, 2, 8, 99)
    assert (config.temperature, config.seed, config.max_steps, config.aggregate) == (0.5, 7, 40, "last")
    config = SearchConfig.search_and_learn("dvts", max_tokens=99)
    assert config.seed == 42
    limits = [config.step_params(last=last, tokens_left=None).max_tokens for last in (False, True)]
    assert limits == [99, 2048]  # its last round does not read the option
    config = SearchConfig.compute_optimal_tts("beam_search", tree_max_width=16, num_sequence=4)
    assert (config.n, config.keep, config.expand, config.completed) == (16, 4, 4, "occupy")
    assert (config.temperature, config.max_step_tokens, config.max_steps) == (0.7, 2048, 40)
    config = SearchConfig.compute_optimal_tts("dvts", tree_max_width=4, num_q=4)
    assert (config.n, config.groups, config.width, config.places) == (16, 4, 4, 1)
    assert SearchConfig.compute_optimal_tts("best_of_n", tree_max_width=1, num_q=64).n == 64
    config = SearchConfig.its_hub("beam_search", budget=16, beam_width=2, max_steps=8, step_token="##")
    assert (config.keep, config.expand, config.completed, config.delimiter) == (2, 8, "compete", "##")


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: SearchConfig.search_and_learn("mcts"), "approach"),
        (lambda: SearchConfig.search_and_learn("dvts", n=6, beam_width=4), "n"),
        (lambda: SearchConfig.search_and_learn("beam_search", agg_strategy="median"), "aggregate"),
        (lambda: SearchConfig.compute_optimal_tts("cot", tree_max_width=4), "method"),
        (lambda: SearchConfig.compute_optimal_tts("beam_search", tree_max_width=6, num_sequence=4), "tree_max_width"),
        (lambda: SearchConfig.its_hub("beam_search", budget=16, max_steps=8), "beam_width"),
        (lambda: SearchConfig.its_hub("beam_search", budget=16, beam_width=3, max_steps=8), "budget"),
        (lambda: SearchConfig.its_hub("dvts", budget=16, max_steps=8), "method"),
    ],
)
def test_bad_parameters(call, name):
    with pytest.raises(ConfigError, match=rf"^{name}: expected"):
        call()

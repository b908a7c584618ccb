"""The presets decide like the peers: thousands of random trees against independent versions of their loops."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from peers import (
    World,
    best_of_n,
    compute_optimal,
    compute_optimal_votes,
    its_hub_beam,
    its_hub_particles,
    search_and_learn_beam,
    search_and_learn_dvts,
    search_and_learn_votes,
)
from scripted import RandomTree, ScriptedPolicy, ScriptedVerifier
from tts_search import ConfigError, SearchConfig, Step, search

PROBLEMS = [f"p{i}" for i in range(25)]
SETTINGS = range(80)  # so 2000 random trees a search of a peer
ANSWERS = ("1", "1.0", "2", "03", "3")  # two spellings of two of them


def random_tree(rng: random.Random, **options) -> RandomTree:
    """A tree in which texts and scores repeat, answers end early, steps are cut, blank or empty, more or less."""
    return RandomTree(
        rng.randrange(10**9),
        end=rng.choice([0.0, 0.1, 0.3, 0.6, 1.0]),
        length=rng.choice([0.0, 0.15]),
        empty=rng.choice([0.0, 0.3]),
        blank=rng.choice([0.0, 0.1]),
        words=rng.choice([1, 3, 1000]),
        levels=rng.choice([1, 2, 4, 10**6]),
        answers=ANSWERS,
        **options,
    )


def check(tree: RandomTree, config: SearchConfig, peer, options, votes=None) -> None:
    """Search all problems at once, and each by the peer's loop: same completions in the same order, scores, choices."""
    policy, verifier = ScriptedPolicy(tree.step), ScriptedVerifier(tree.scores)
    for result in search(PROBLEMS, policy, verifier, config, progress=False):
        entries, best = peer(World(tree, result.problem, config.seed), **options)
        assert [(one.text, list(one.step_scores)) for one in result.completions] == entries
        assert next(i for i, one in enumerate(result.completions) if one is result.best) == best
        if votes is not None:
            expected = votes(entries)
            assert {name: result.answer(name) for name in expected} == expected


def some(rng: random.Random, **choices):
    return {name: rng.choice(list(values)) for name, values in choices.items()}


@pytest.mark.parametrize("chunk", range(4))
def test_search_and_learn_beam_search(chunk):
    for number in SETTINGS[chunk::4]:
        rng = random.Random(number)
        options = some(
            rng,
            n=range(1, 10),
            beam_width=range(1, 6),
            num_iterations=range(1, 6),
            agg_strategy=["last", "min", "prod"],
            filter_duplicates=[False, True],
            sort_completed=[False, True],
        )
        config = SearchConfig.search_and_learn("beam_search", lookahead=2, **options)
        check(random_tree(rng), config, search_and_learn_beam, options, search_and_learn_votes)


@pytest.mark.parametrize("chunk", range(4))
def test_search_and_learn_dvts(chunk):
    for number in SETTINGS[chunk::4]:
        rng = random.Random(number)
        options = some(
            rng,
            beam_width=range(1, 5),
            num_iterations=range(1, 6),
            lookahead=range(3),
            agg_strategy=["last", "min", "prod"],
        )
        options["n"] = options["beam_width"] * rng.randrange(1, 5)
        config = SearchConfig.search_and_learn("dvts", **options)
        tree = random_tree(rng, marker=" \\boxed{2}")
        if options["lookahead"]:
            tree = replace(tree, blank=0.0)  # we look ahead from steps only
        check(tree, config, search_and_learn_dvts, options, search_and_learn_votes)


@pytest.mark.parametrize("chunk", range(4))
def test_compute_optimal_tts(chunk):
    for number in SETTINGS[chunk::4]:
        rng = random.Random(number)
        options = some(rng, num_sequence=range(1, 5), num_q=range(1, 4), tree_max_depth=range(1, 6))
        options["tree_max_width"] = options["num_sequence"] * rng.randrange(1, 5)
        config = SearchConfig.compute_optimal_tts(rng.choice(["beam_search", "dvts"]), **options)
        tree = random_tree(rng, marker=" \\boxed{2}")
        check(tree, config, compute_optimal, options, compute_optimal_votes)


@pytest.mark.parametrize("chunk", range(4))
def test_its_hub_beam_search(chunk):
    for number in SETTINGS[chunk::4]:
        rng = random.Random(number)
        options = some(rng, beam_width=range(1, 5), max_steps=range(6))
        options |= {"budget": options["beam_width"] * rng.randrange(1, 5), "stop_token": "STOP"}
        config = SearchConfig.its_hub("beam_search", **options)
        check(random_tree(rng, marker="STOP"), config, its_hub_beam, options)


@pytest.mark.parametrize("chunk", range(4))
def test_its_hub_particle_filtering(chunk):
    for number in SETTINGS[chunk::4]:
        rng = random.Random(number)
        options = {**some(rng, budget=range(1, 10), max_steps=range(6)), "stop_token": "STOP"}
        config = SearchConfig.its_hub("particle_filtering", **options)
        check(random_tree(rng, marker="STOP"), config, its_hub_particles, options)


def test_best_of_n():
    for number in SETTINGS:
        rng = random.Random(number)
        n, how = rng.randrange(1, 17), rng.choice(["last", "min", "prod"])
        tree = replace(random_tree(rng), empty=0.0)  # nothing but empty samples is an error
        config = SearchConfig.search_and_learn("best_of_n", n=n, agg_strategy=how, sort_completed=True)
        check(tree, config, best_of_n, {"n": n, "how": how}, search_and_learn_votes)
        config = SearchConfig.compute_optimal_tts("best_of_n", tree_max_width=1, num_q=n)
        check(tree, config, best_of_n, {"n": n}, compute_optimal_votes)
        check(tree, SearchConfig.its_hub("best_of_n", budget=n, max_steps=9), best_of_n, {"n": n})


def test_parameters_are_the_peers_own():
    config = SearchConfig.search_and_learn("beam_search", n=16, beam_width=8, temperature=0.5, max_tokens=99, seed=7)
    assert (config.n, config.keep, config.expand, config.max_step_tokens) == (16, 2, 8, 99)
    assert (config.temperature, config.seed, config.max_steps, config.aggregate) == (0.5, 7, 40, "last")
    config = SearchConfig.search_and_learn("dvts", max_tokens=99)
    assert config.seed == 42
    policy = ScriptedPolicy(lambda *_: Step("a\n\n", False, 1))
    search(["p"], policy, ScriptedVerifier(lambda _, steps: [0.5] * len(steps)), replace(config, max_steps=2))
    assert [call[0].params.max_tokens for call in policy.calls] == [99, 2048]  # the last round does not read the option
    config = SearchConfig.compute_optimal_tts("beam_search", tree_max_width=16, num_sequence=4)
    assert (config.n, config.keep, config.expand) == (16, 4, 4)
    assert (config.temperature, config.max_step_tokens, config.max_steps) == (0.7, 2048, 40)
    config = SearchConfig.compute_optimal_tts("dvts", tree_max_width=4, num_q=4)
    assert (config.n, config.keep, config.expand) == (16, 1, 4)
    assert SearchConfig.compute_optimal_tts("best_of_n", tree_max_width=1, num_q=64).n == 64
    config = SearchConfig.its_hub("beam_search", budget=16, beam_width=2, max_steps=8, step_token="##")
    assert (config.keep, config.expand, config.delimiter) == (2, 8, "##")


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

"""A user's own algorithm, and options that a method does not use."""

from __future__ import annotations

import dataclasses
import json

import pytest
from scripted import RandomTree, ScriptedPolicy, ScriptedVerifier
from tts_search import ConfigError, SearchConfig, SearchError, Step, search
from tts_search.search.algorithms import ALGORITHMS
from tts_search.search.algorithms.branches import best
from tts_search.search.algorithms.peers import search_and_learn
from tts_search.search.config import METHODS, options_of
from tts_search.search.moves import Moves, expand, release, score
from tts_search.search.run import Branch, Run

HERE = __name__
TREE = RandomTree(3, end=0.2)


def greedy(run: Run) -> Moves[list[Branch]]:
    """Goes on from the best of n children; reports the last of them."""
    branch = run.root
    for last in run.rounds():
        children = yield from expand(run, [branch] * run.config.n, last=last)
        yield from score(run, children, last=last)
        (branch,) = best(children, 1)
        if branch.ended:
            break
        yield from release(run, [branch])
    return [branch]


def no_generator(run: Run) -> list[Branch]:
    return [run.root]


class Greedy:
    """An algorithm with parameters of its own."""

    def __call__(self, run: Run) -> Moves[list[Branch]]:
        return greedy(run)


def by(config: SearchConfig):
    return search(["p"], ScriptedPolicy(TREE.step), ScriptedVerifier(TREE.scores), config, progress=False)[0]


@pytest.mark.parametrize("method", [greedy, Greedy(), f"{HERE}:greedy"])
def test_a_function_is_a_method(method):
    result = by(SearchConfig(method, n=4, max_steps=5))
    expected = by(SearchConfig("dvts", n=4, expand=4, max_steps=5))  # one subtree, of which one survives
    assert result.best.text in {one.text for one in expected.completions}
    assert result.stats.rounds == expected.stats.rounds
    assert len(result.completions) == 1


@pytest.mark.parametrize(("method", "name"), [(greedy, "greedy"), (Greedy(), "Greedy")])
def test_a_method_has_a_name_that_json_can_hold(method, name):
    config = SearchConfig(method, n=4)
    assert config.method_name == f"{HERE}:{name}"
    assert SearchConfig(**json.loads(json.dumps(config.as_dict()))).method == f"{HERE}:{name}"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (f"{HERE}:nothing", r"^method: expected a function at '.*:nothing', got AttributeError"),
        ("no.such.module:f", r"^method: expected a function at 'no.such.module:f', got ModuleNotFoundError"),
        (f"{HERE}:HERE", r"^method: expected a function at '.*:HERE', got '"),
        (no_generator, r"method: expected a generator function of a Run, got .*no_generator.* returned a list"),
    ],
)
def test_what_is_no_algorithm_is_refused(method, message):
    with pytest.raises(SearchError, match=message):
        by(SearchConfig(method, n=2))


@pytest.mark.parametrize("method", [name for name in ALGORITHMS if name != "budget_forcing"])
def test_options_that_a_method_does_not_use_are_refused(method):
    changes = {
        "keep": 1,
        "expand": 2,
        "max_steps": 3,
        "completed": "occupy",
        "dedupe": True,
        "lookahead": 1,
        "sort_completed": True,
        "stop_when_full": True,
        "agree_margin": 1,
        "budget_tokens": 9,
        "reward_temperature": 1.0,
        "kv_weight": 2.0,
        "exploration": 0.5,
        "thinking": {"max_tokens": 5},
    }
    SearchConfig(method=method, n=4)  # nothing is refused with defaults
    for name, value in changes.items():
        if name not in options_of(method):
            with pytest.raises(ConfigError, match=rf"^{name}: expected .*, as {method} does not use it, got"):
                SearchConfig(method=method, n=4, **{name: value})


def test_every_option_is_some_methods():
    fields = {one.name for one in dataclasses.fields(SearchConfig)}
    assert set().union(*map(options_of, ALGORITHMS)) == fields == options_of(greedy)
    assert set(METHODS) <= set(ALGORITHMS)


def test_with_method_keeps_what_the_method_uses():
    base = SearchConfig(n=8, expand=2, max_steps=3, dedupe=True, temperature=0.1)
    assert base.with_method("best_of_n") == SearchConfig("best_of_n", n=8, temperature=0.1)
    assert base.with_method("puct", n=4) == SearchConfig("puct", n=4, expand=2, max_steps=3, temperature=0.1)
    assert base.with_method(greedy).dedupe
    with pytest.raises(ConfigError, match=r"^kv_weight: expected 1.0, as rebase does not use it, got 2"):
        base.with_method("rebase", kv_weight=2)


@pytest.mark.parametrize("method", ["best_of_n", "beam_search", "dvts", "rebase", "puct", "particle_filtering"])
def test_a_step_that_holds_the_stop_text_finishes_its_branch(method):
    def step(_, __, number, ___, params):
        return Step("so it STOPS\n\n" if number == 1 or params.delimiter is None else f"{number}\n\n", False, 1)

    verifier = ScriptedVerifier(lambda _, steps: [0.5] * len(steps))
    config = SearchConfig(n=4, max_steps=3).with_method(method, stop_text="STOP")
    (result,) = search(["p"], ScriptedPolicy(step), verifier, config, progress=False)
    assert any(one.finished for one in result.completions)
    assert all(("STOP" in one.text) == one.finished for one in result.completions)


def test_a_peers_loop_is_a_method_like_others():
    config = SearchConfig.search_and_learn("dvts", n=4, num_iterations=3)
    by_name, by_function = by(config), by(config.with_method(search_and_learn.dvts))
    assert by_name.completions == by_function.completions
    assert by_name.config.method == "search_and_learn.dvts"

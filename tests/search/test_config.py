from __future__ import annotations

import dataclasses
import math
import pickle
import subprocess
import sys

import pytest
import tts_search
from tts_search import ConfigError, SearchConfig, SearchError
from tts_search.api import BeamOptions, BestOfNOptions, EngineOptions
from tts_search.search.config import options_of


def test_defaults():
    config = SearchConfig()
    assert config.as_dict() == {
        "method": "beam_search",
        "n": 16,
        "expand": 4,
        "keep": None,
        "max_steps": 40,
        "max_step_tokens": 2048,
        "max_tokens": None,
        "temperature": 0.8,
        "top_p": 1.0,
        "top_k": 0,
        "delimiter": "\n\n",
        "aggregate": "last",
        "completed": "leave",
        "dedupe": False,
        "lookahead": 0,
        "sort_completed": False,
        "stop_when_full": False,
        "agree_margin": None,
        "budget_tokens": None,
        "reward_temperature": 0.2,
        "kv_weight": 1.0,
        "exploration": 1.25,
        "thinking": None,
        "stop_text": None,
        "seed": 0,
    }
    assert SearchConfig(**config.as_dict()) == config


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"method": "mcts"}, "method"),
        ({"n": 0}, "n"),
        ({"n": 2.0}, "n"),
        ({"n": True}, "n"),
        ({"expand": 0}, "expand"),
        ({"keep": 0}, "keep"),
        ({"keep": 17}, "keep"),
        ({"max_steps": 0}, "max_steps"),
        ({"max_step_tokens": 0}, "max_step_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"budget_tokens": 0}, "budget_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"delimiter": ""}, "delimiter"),
        ({"delimiter": None}, "delimiter"),
        ({"aggregate": "median"}, "aggregate"),
        ({"completed": "stay"}, "completed"),
        ({"dedupe": 1}, "dedupe"),
        ({"lookahead": -1}, "lookahead"),
        ({"seed": 1.5}, "seed"),
        ({"n": 10, "expand": 4}, r"keep \* expand"),  # keep is 2, and 2 * 4 < 10
        ({"n": 16, "expand": 2, "keep": 4}, r"keep \* expand"),
        ({"method": "dvts", "n": 10}, "n"),
        ({"method": "dvts", "n": 16, "keep": 2}, "keep"),
    ],
)
def test_bad_options(options, name):
    with pytest.raises(ConfigError, match=rf"^{name}: expected .*got") as caught:
        SearchConfig(**options)
    assert isinstance(caught.value, SearchError)
    assert isinstance(caught.value, ValueError)


def test_options_that_are_fine():
    assert SearchConfig(n=10, expand=4, keep=3).places == 3
    assert SearchConfig(n=1, expand=4).places == 1
    assert SearchConfig(method="best_of_n", n=10, expand=4).n == 10
    assert SearchConfig(method="dvts", n=16, keep=1).groups == 4
    assert SearchConfig(aggregate="avg").aggregate == "mean"


def test_config_is_frozen_and_survives_pickling():
    config = SearchConfig.compute_optimal_tts("dvts", tree_max_width=4, num_q=4)
    assert pickle.loads(pickle.dumps(config)) == config
    assert SearchConfig(**config.as_dict()) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n = 3  # type: ignore[misc]


def test_errors_say_where():
    assert str(SearchError("no", 3, 2)) == "problem 3, round 2: no"
    assert str(SearchError("no", 3)) == "problem 3: no"
    assert str(SearchError("no")) == "no"
    error = pickle.loads(pickle.dumps(SearchError("no", 3, 2)))
    assert (error.message, error.problem, error.round) == ("no", 3, 2)


def test_public_names_are_there():
    assert set(tts_search.__all__) <= set(dir(tts_search))
    for name in set(tts_search.__all__) - {"HFPolicy", "HFVerifier", "VOTES"}:
        assert getattr(tts_search, name).__name__ == name
    with pytest.raises(AttributeError, match=r"has no attribute 'Nothing'"):
        tts_search.Nothing  # noqa: B018


def test_imports_the_engine_and_the_search_alone():
    code = "import sys, tts_search; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    modules = done.stdout.split()
    own = {name.split(".")[1] for name in modules if name.startswith("tts_search.")}
    assert own == {"api", "engine", "errors", "search", "terminal"}
    assert not {"torch", "tts_kernels", "typing_extensions"} & set(modules)


@pytest.mark.parametrize(
    ("options", "methods"),
    [(BestOfNOptions, ["best_of_n"]), (BeamOptions, ["beam_search", "dvts"])],
)
def test_shorthands_have_the_options_of_their_methods(options, methods):
    for method in methods:
        of_the_run = set(EngineOptions.__annotations__)
        assert set(options.__annotations__) - of_the_run == set(options_of(method)) - {"method"}


def test_imports_nothing_that_an_extra_installs():
    code = (
        "import sys, tts_search, tts_search.cli.main, tts_search.evaluation.evaluate, tts_search.lab.demo;"
        "heavy = {'torch', 'numpy', 'transformers', 'rich', 'typer', 'math_verify', 'sympy'} & set(sys.modules);"
        "print(sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_thinking_from_json():
    config = SearchConfig("budget_forcing", thinking={"max_tokens": 5})
    assert config.thinking.max_tokens == 5
    assert SearchConfig(**config.as_dict()) == config
    with pytest.raises(ConfigError, match=r"^thinking: expected fields among .*max_tokens.*, got 'max_token'"):
        SearchConfig(thinking={"max_token": 5})

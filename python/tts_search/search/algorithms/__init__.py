"""Search algorithms: generators for one problem that do no I/O.

They yield lists of requests (:mod:`tts_search.search.protocol`), and are sent the answers. They return the completions,
in order. There is one file for each algorithm, written with shared moves (:mod:`tts_search.search.moves`).
"""

from __future__ import annotations

from importlib import import_module
from typing import cast

from tts_search.errors import ConfigError
from tts_search.search.algorithms.beam_search import beam_search
from tts_search.search.algorithms.best_of_n import best_of_n
from tts_search.search.algorithms.budget_forcing import budget_forcing
from tts_search.search.algorithms.dvts import dvts
from tts_search.search.algorithms.frontier import ets, rebase
from tts_search.search.algorithms.particle_filtering import particle_filtering
from tts_search.search.algorithms.peers import compute_optimal_tts, its_hub, search_and_learn
from tts_search.search.algorithms.puct import puct
from tts_search.search.config import SearchConfig
from tts_search.search.moves import Algorithm

__all__ = ["ALGORITHMS", "algorithm_of"]

ALGORITHMS: dict[str, Algorithm] = {
    "best_of_n": best_of_n,
    "beam_search": beam_search,
    "dvts": dvts,
    "rebase": rebase,
    "ets": ets,
    "particle_filtering": particle_filtering,
    "puct": puct,
    "budget_forcing": budget_forcing,
    "search_and_learn.best_of_n": search_and_learn.best_of_n,
    "search_and_learn.beam_search": search_and_learn.beam_search,
    "search_and_learn.dvts": search_and_learn.dvts,
    "compute_optimal_tts.best_of_n": compute_optimal_tts.best_of_n,
    "compute_optimal_tts.beam_search": compute_optimal_tts.beam_search,
    "compute_optimal_tts.dvts": compute_optimal_tts.beam_search,  # with other numbers
    "its_hub.best_of_n": its_hub.best_of_n,
    "its_hub.beam_search": its_hub.beam_search,
    "its_hub.particle_filtering": its_hub.particle_filtering,
}
"""The algorithm of each ``SearchConfig.method`` that is a name."""


def algorithm_of(config: SearchConfig) -> Algorithm:
    """Return the algorithm of a config: a function of a :class:`~tts_search.search.run.Run`.

    Raises
    ------
    ConfigError
        If the method says where to import one from, and there is none.
    """
    method = config.method
    if not isinstance(method, str):
        return method
    if method in ALGORITHMS:
        return ALGORITHMS[method]
    module, _, name = method.partition(":")
    try:
        algorithm = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"method: expected a function at {method!r}, got {type(error).__name__}: {error}") from error
    if not callable(algorithm):
        raise ConfigError(f"method: expected a function at {method!r}, got {algorithm!r:.200}")
    return cast(Algorithm, algorithm)

"""Presets: configs that search as other frameworks do, by their own parameters and defaults.

The documentation (*semantics*) has the rules of each framework, and :mod:`tts_search.search.algorithms.peers` the code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from tts_search.errors import ConfigError
from tts_search.search.checks import integer, one_of

__all__ = ["Presets"]

Config = TypeVar("Config")

_THREE = ("best_of_n", "beam_search", "dvts")


class Presets:
    """The presets of :class:`~tts_search.SearchConfig`."""

    @classmethod
    def search_and_learn(
        cls: type[Config],
        approach: str,
        *,
        n: int = 4,
        beam_width: int = 4,
        num_iterations: int = 40,
        lookahead: int = 0,
        agg_strategy: str = "last",
        filter_duplicates: bool = False,
        sort_completed: bool = False,
        temperature: float = 0.8,
        top_p: float = 1.0,
        max_tokens: int = 2048,
        seed: int = 42,
    ) -> Config:
        """Search as huggingface/search-and-learn does.

        Its `beam_width` is our `expand`: n // beam_width beams survive a round. Where it is not well defined (which of
        several equal scores an unstable sort keeps), the earlier candidate wins.

        Parameters
        ----------
        approach : str
            ``"best_of_n"``, ``"beam_search"`` or ``"dvts"``.

        Raises
        ------
        ConfigError
            If a parameter has no value that the peer takes, or n is no multiple of `beam_width` in DVTS.
        """
        one_of("approach", approach, _THREE)
        for name, value in (("n", n), ("beam_width", beam_width)):
            integer(name, value, at_least=1)
        options: dict[str, object] = {
            "n": n,
            "max_step_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "aggregate": agg_strategy,
            "seed": seed,
        }
        if approach == "beam_search":
            # Its beam search scores the beam without the lookahead, which therefore decides nothing.
            keep = n // beam_width or n  # scores[-0:] keeps all
            options |= {"max_steps": num_iterations, "keep": keep, "expand": -(-n // keep)}
            options |= {"dedupe": filter_duplicates, "sort_completed": sort_completed}
        if approach == "dvts":
            if n % beam_width:
                raise ConfigError(f"n: expected a multiple of beam_width ({beam_width}) in dvts, got {n}")
            options |= {"max_steps": num_iterations, "expand": beam_width, "lookahead": lookahead}
            options |= {"stop_text": "boxed{"}
        return cast(Callable[..., Config], cls)(method=f"search_and_learn.{approach}", **options)

    @classmethod
    def compute_optimal_tts(
        cls: type[Config],
        method: str,
        *,
        tree_max_width: int,
        num_sequence: int = 1,
        num_q: int = 1,
        tree_max_depth: int = 40,
        temperature: float = 0.7,
        max_new_tokens: int = 2048,
    ) -> Config:
        """Search as RyanLiu112/compute-optimal-tts does.

        `num_q` independent searches, each of `tree_max_width` candidates of which `num_sequence` survive; a finished
        trajectory keeps its place. Its DVTS is ``tree_max_width=4, num_sequence=1, num_q=N // 4``, its best-of-N
        ``tree_max_width=1, num_q=N``. Where it is not well defined (the order of a heap's equal entries), the earlier
        candidate wins.

        Parameters
        ----------
        method : str
            ``"best_of_n"``, ``"beam_search"`` or ``"dvts"``.

        Raises
        ------
        ConfigError
            If a parameter has no value that the peer takes, or `tree_max_width` is no multiple of `num_sequence`.
        """
        one_of("method", method, _THREE)
        for name, value in (("tree_max_width", tree_max_width), ("num_sequence", num_sequence), ("num_q", num_q)):
            integer(name, value, at_least=1)
        if tree_max_width % num_sequence:
            raise ConfigError(
                f"tree_max_width: expected a multiple of num_sequence ({num_sequence}), got {tree_max_width}"
            )
        options: dict[str, object] = {
            "n": tree_max_width * num_q,
            "max_step_tokens": max_new_tokens,
            "temperature": temperature,
        }
        if method != "best_of_n":
            options |= {"max_steps": tree_max_depth, "keep": num_sequence, "expand": tree_max_width // num_sequence}
            options |= {"stop_text": "\\boxed"}
        return cast(Callable[..., Config], cls)(method=f"compute_optimal_tts.{method}", **options)

    @classmethod
    def its_hub(
        cls: type[Config],
        method: str,
        *,
        budget: int,
        beam_width: int | None = None,
        max_steps: int,
        step_token: str = "\n\n",
        stop_token: str | None = None,
        temperature: float = 0.8,
    ) -> Config:
        """Search as its_hub does.

        Its `beam_width` is our `keep`. It starts with ``budget // beam_width`` paths, a stopped path competes in as
        many copies as it would have had children, and a path may grow to ``max_steps + 1`` steps. (It cannot see that
        a model ended its answer, only `stop_token`; here both end a path.)

        Parameters
        ----------
        method : str
            ``"best_of_n"``, ``"beam_search"`` or ``"particle_filtering"`` (which has no `beam_width`).

        Raises
        ------
        ConfigError
            If a parameter has no value that the peer takes; in beam search, if there is no `beam_width` or `budget` is
            no multiple of it.
        """
        one_of("method", method, ("best_of_n", "beam_search", "particle_filtering"))
        integer("budget", budget, at_least=1)
        integer("max_steps", max_steps, at_least=0)
        options: dict[str, object] = {"n": budget, "delimiter": step_token, "temperature": temperature}
        if method != "best_of_n":
            options |= {"max_steps": max_steps + 1, "stop_text": stop_token}
        if method == "beam_search":
            if beam_width is None:
                raise ConfigError("beam_width: expected a number in beam_search, got None")
            integer("beam_width", beam_width, at_least=1)
            if budget % beam_width:
                raise ConfigError(f"budget: expected a multiple of beam_width ({beam_width}), got {budget}")
            options |= {"keep": beam_width, "expand": budget // beam_width}
        return cast(Callable[..., Config], cls)(method=f"its_hub.{method}", **options)

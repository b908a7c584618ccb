"""The configuration of a search."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any, Literal, get_args

from tts_search.errors import ConfigError
from tts_search.search.checks import integer, is_finite, is_int, is_text, one_of
from tts_search.search.presets import Presets
from tts_search.search.types import StepParams
from tts_search.search.voting import AGGREGATES

__all__ = ["METHODS", "SearchConfig", "Thinking", "options_of"]

Method = Literal["best_of_n", "beam_search", "dvts", "rebase", "ets", "particle_filtering", "puct", "budget_forcing"]
Completed = Literal["leave", "occupy", "compete"]

METHODS: tuple[Method, ...] = get_args(Method)
COMPLETED: tuple[Completed, ...] = get_args(Completed)

_SAMPLING = frozenset({"temperature", "top_p", "top_k", "max_step_tokens", "max_tokens", "delimiter", "stop_text"})
_EVERY_METHOD = _SAMPLING | {"method", "n", "aggregate", "seed"}
_ROUNDS = frozenset({"max_steps", "lookahead", "sort_completed", "stop_when_full", "agree_margin", "budget_tokens"})
_BEAM = _ROUNDS | {"expand", "keep", "completed", "dedupe"}
_USES: Mapping[str, frozenset[str]] = {
    "best_of_n": frozenset({"sort_completed", "agree_margin"}),
    "beam_search": _BEAM,
    "dvts": _BEAM,
    "rebase": _ROUNDS | {"dedupe", "reward_temperature"},
    "ets": _ROUNDS | {"dedupe", "reward_temperature", "kv_weight"},
    "particle_filtering": _ROUNDS,
    "puct": _ROUNDS | {"expand", "keep", "exploration"},
    "budget_forcing": frozenset({"thinking"}),
    "search_and_learn.best_of_n": frozenset(),
    "search_and_learn.beam_search": frozenset({"expand", "keep", "max_steps", "dedupe", "sort_completed"}),
    "search_and_learn.dvts": frozenset({"expand", "max_steps", "lookahead"}),
    "compute_optimal_tts.best_of_n": frozenset(),
    "compute_optimal_tts.beam_search": frozenset({"expand", "keep", "max_steps"}),
    "compute_optimal_tts.dvts": frozenset({"expand", "keep", "max_steps"}),
    "its_hub.best_of_n": frozenset(),
    "its_hub.beam_search": frozenset({"expand", "keep", "max_steps"}),
    "its_hub.particle_filtering": frozenset({"max_steps"}),
}
"""The options that a method uses, besides those that every method does."""
_ANY_OPTION = _EVERY_METHOD.union(*_USES.values())
_BEST_OF_N = frozenset(name for name in _USES if name.endswith("best_of_n"))
_WHOLE = _BEST_OF_N | {"budget_forcing"}  # they sample a completion at once

_VALUES: tuple[tuple[str, tuple[str, ...], Callable[[Any], bool]], ...] = (
    ("an int >= 1", ("n", "expand", "max_steps", "max_step_tokens"), is_int),
    ("an int >= 1", ("keep", "max_tokens", "agree_margin", "budget_tokens"), lambda v: v is None or is_int(v)),
    ("an int >= 0", ("lookahead", "top_k"), partial(is_int, at_least=0)),
    ("an int", ("seed",), partial(is_int, at_least=None)),
    ("a bool", ("dedupe", "sort_completed", "stop_when_full"), lambda v: isinstance(v, bool)),
    ("a finite number >= 0", ("temperature", "kv_weight", "exploration"), lambda v: is_finite(v) and v >= 0),
    ("a finite number > 0", ("reward_temperature",), lambda v: is_finite(v) and v > 0),
    ("a number in (0, 1]", ("top_p",), lambda v: is_finite(v) and 0 < v <= 1),
    ("a text that is not empty", ("delimiter",), is_text),
    ("a text that is not empty, or None", ("stop_text",), lambda v: v is None or is_text(v)),
)
"""What the value of an option has to be: in words, for which options, and as a check."""


@dataclass(frozen=True, slots=True)
class Thinking:
    """The budget of a model's thinking for ``budget_forcing`` (Muennighoff et al., s1, arXiv 2501.19393).

    Attributes
    ----------
    end : str
        The text that the model writes between its thinking and its answer.
    min_tokens : int
        If thinking ends with fewer tokens, `end` is replaced by `extend`, and the model thinks on.
    max_tokens : int
        If thinking has this many tokens, it is cut, and `end` is written for the model.
    extend : str
        The text that makes the model think on.
    max_extensions : int
        How many times this is done at most.

    Raises
    ------
    ConfigError
        If a text is empty, a number is negative, or `min_tokens` is more than `max_tokens`.
    """

    end: str = "</think>"
    min_tokens: int = 0
    max_tokens: int = 8192
    extend: str = "\nWait"
    max_extensions: int = 2

    def __post_init__(self) -> None:
        for name in ("end", "extend"):
            if not is_text(getattr(self, name)):
                raise ConfigError(f"thinking.{name}: expected a text that is not empty, got {getattr(self, name)!r}")
        integer("thinking.min_tokens", self.min_tokens, at_least=0)
        integer("thinking.max_tokens", self.max_tokens, at_least=1)
        integer("thinking.max_extensions", self.max_extensions, at_least=0)
        if self.min_tokens > self.max_tokens:
            raise ConfigError(
                f"thinking.min_tokens: expected at most max_tokens ({self.max_tokens}), got {self.min_tokens}"
            )


@dataclass(frozen=True)
class SearchConfig(Presets):
    r"""How to search.

    Parameters
    ----------
    method : str or callable
        ``"best_of_n"``: n completions, sampled in one go and scored. ``"beam_search"``: rounds of n candidates, of
        which `keep` survive. ``"dvts"`` (diverse verifier tree search): n / expand independent subtrees of `expand`
        candidates, one of which survives in each. ``"rebase"``: the n children of a round are dealt in proportion to
        exp(score / reward_temperature). ``"ets"``: the same, after pruning branches that cost more KV cache than they
        are worth. ``"particle_filtering"``: n particles, resampled in each round in proportion to the odds of their
        scores. ``"puct"``: tree search that may come back to any leaf. ``"budget_forcing"``: n completions of a model
        that writes its thoughts before its answer, with a budget for these. An algorithm of your own: a generator
        function of a :class:`~tts_search.search.run.Run`, or its address, as ``"package.module:function"``.
    n : int
        Candidates of a round; completions of best-of-N.
    expand : int
        Children of each survivor.
    keep : int or None
        Survivors of a round in each group. A group is the problem, or in DVTS a subtree, of which 1 survives. By
        default ``n // expand``.
    max_steps : int
        The largest number of rounds. The last one runs to the end of the answer, without a delimiter.
    max_step_tokens : int
        The largest number of tokens of a step.
    max_tokens : int or None
        The largest number of tokens of a branch; for best-of-N, of a completion (by default `max_step_tokens`).
    temperature, top_p, top_k
        Sampling. Temperature 0 takes the most likely token; top_p 1.0 and top_k 0 switch these options off.
    delimiter : str
        The text that ends a step.
    aggregate : str
        How the scores of a branch's steps become one score: ``"last"``, ``"min"``, ``"prod"``, ``"mean"`` (or
        ``"avg"``), ``"max"``, ``"sum"``.
    completed : str
        What happens to a finished branch. ``"leave"``: it leaves, and the beam is refilled to n from the survivors.
        ``"occupy"``: if it is among the best, it keeps one of the `keep` places for good, and no candidates are made
        for this place. ``"compete"``: it keeps its score and competes for a place in each round. No candidates are
        made for a place that it holds. When it loses its place, it is gone.
    dedupe : bool
        Drop later candidates of equal text before pruning. Without this option, a text that was drawn several times
        holds as many places. In our measurements this was no worse at equal tokens, and mostly better.
    lookahead : int
        Greedy steps beyond each candidate that only the verifier reads.
    sort_completed : bool
        Order completions by score, best first, instead of by time.
    stop_when_full : bool
        Stop when n branches have finished.
    agree_margin : int or None
        Stop as soon as one answer is ahead of every other by this many finished branches. Best-of-N then samples
        this many completions first, and doubles their number each time.
    budget_tokens : int or None
        No further round begins when all branches together have sampled this many tokens. Branches that are open then
        are reported as unfinished. The last round may exceed the budget.
    reward_temperature : float
        For ``"rebase"`` and ``"ets"``: a lower value gives more children to the best branches.
    kv_weight : float
        For ``"ets"``: the weight of all of a round's KV cache, compared with all of its children.
    exploration : float
        For ``"puct"``: the weight of the term that favours branches with few visits.
    thinking : Thinking or None
        For ``"budget_forcing"``: the budget, by default `Thinking` with its defaults.
    stop_text : str or None
        A step that contains this text, such as ``"\\boxed"``, finishes its branch.
    seed : int
        Fixes every draw.

    Raises
    ------
    ConfigError
        A :class:`~tts_search.SearchError` and a ``ValueError``, if an option has a value that it cannot have, or is not
        at its default though the method does not use it.
    """

    method: str | Callable[[Any], Generator[Any, Any, Any]] = "beam_search"
    n: int = 16
    expand: int = 4
    keep: int | None = None
    max_steps: int = 40
    max_step_tokens: int = 2048
    max_tokens: int | None = None
    temperature: float = 0.8
    top_p: float = 1.0
    top_k: int = 0
    delimiter: str = "\n\n"
    aggregate: str = "last"
    completed: Completed = "leave"
    dedupe: bool = False
    lookahead: int = 0
    sort_completed: bool = False
    stop_when_full: bool = False
    agree_margin: int | None = None
    budget_tokens: int | None = None
    reward_temperature: float = 0.2
    kv_weight: float = 1.0
    exploration: float = 1.25
    thinking: Thinking | None = None
    stop_text: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not callable(self.method) and ":" not in str(self.method):
            one_of("method", self.method, tuple(_USES))
        one_of("completed", self.completed, COMPLETED)
        if self.aggregate == "avg":
            object.__setattr__(self, "aggregate", "mean")
        one_of("aggregate", self.aggregate, tuple(AGGREGATES))
        for expected, names, holds in _VALUES:
            for name in names:
                if not holds(value := getattr(self, name)):
                    raise ConfigError(f"{name}: expected {expected}, got {value!r}")
        if isinstance(self.thinking, dict):  # from JSON
            unknown = set(self.thinking) - set(Thinking.__dataclass_fields__)
            if unknown:
                names = ", ".join(Thinking.__dataclass_fields__)
                raise ConfigError(f"thinking: expected fields among {names}, got {', '.join(map(repr, unknown))}")
            object.__setattr__(self, "thinking", Thinking(**self.thinking))
        if self.thinking is not None and not isinstance(self.thinking, Thinking):
            raise ConfigError(f"thinking: expected a Thinking, got {self.thinking!r}")
        used = options_of(self.method)
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name not in used and value != one.default:
                raise ConfigError(
                    f"{one.name}: expected {one.default!r}, as {self.method} does not use it, got {value!r}"
                )
        if self.method in ("beam_search", "dvts"):
            self._check_beam()

    def _check_beam(self) -> None:
        if self.method == "dvts":
            if self.n % self.expand:
                raise ConfigError(f"n: expected a multiple of expand ({self.expand}) in dvts, got {self.n}")
            if self.keep not in (None, 1):
                raise ConfigError(f"keep: expected 1 in dvts (one survivor in each subtree), got {self.keep}")
        if self.places > self.width:
            raise ConfigError(f"keep: expected at most the number of candidates ({self.width}), got {self.places}")
        if self.places * self.expand < self.width:
            raise ConfigError(
                f"keep * expand: expected at least the number of candidates ({self.width}), got {self.places} * "
                f"{self.expand} = {self.places * self.expand}"
            )

    @property
    def method_name(self) -> str:
        """Name of the method; of a user's algorithm, where it is: ``"package.module:function"``."""
        if isinstance(self.method, str):
            return self.method
        where = self.method if hasattr(self.method, "__qualname__") else type(self.method)
        return f"{where.__module__}:{where.__qualname__}"

    @property
    def needs_verifier(self) -> bool:
        """Whether the method decides by scores (a user's algorithm has to see to that itself)."""
        return self.method_name in _USES and self.method_name not in _WHOLE

    @property
    def is_best_of_n(self) -> bool:
        """Whether completions are independent samples, so that fewer of them are those of a smaller n."""
        return self.method_name in _BEST_OF_N

    def with_method(self, method: str | Callable[[Any], Generator[Any, Any, Any]], **changes: Any) -> SearchConfig:
        """Return these settings for another method, changed; what it does not use is at its default.

        Raises
        ------
        ConfigError
            As for a new config; also for a change of an option that the method does not use.
        """
        used = options_of(method)
        unused = {one.name: one.default for one in fields(self) if one.name not in used}
        return replace(self, **{**unused, "method": method, **changes})

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them; ``SearchConfig(**values)`` makes the config again."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        thinking = None if self.thinking is None else asdict(self.thinking)
        return {**values, "method": self.method_name, "thinking": thinking}

    @property
    def groups(self) -> int:
        """Groups: sets of candidates that compete with each other, apart from the others."""
        return self.n // self.expand if self.method == "dvts" else 1

    @property
    def width(self) -> int:
        """Candidates of a group in a round."""
        return self.n // self.groups

    @property
    def places(self) -> int:
        """Survivors of a group in a round: `keep`, or its default."""
        return self.keep if self.keep is not None else max(1, self.width // self.expand)

    def step_params(self, *, last: bool, tokens_left: int | None) -> StepParams:
        """Return how to sample a step of a branch that may grow by `tokens_left` tokens (None: no limit)."""
        limit = self.max_step_tokens
        if tokens_left is not None:
            limit = tokens_left if self.method_name in _WHOLE else min(limit, tokens_left)
        return StepParams(self.temperature, self.top_p, self.top_k, limit, None if last else self.delimiter)


def options_of(method: object) -> frozenset[str]:
    """Return the names of the options that a method uses; an algorithm of a user's may use any."""
    return _EVERY_METHOD | _USES[method] if isinstance(method, str) and method in _USES else _ANY_OPTION

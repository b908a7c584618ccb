"""The configuration of a search, and presets that search as other frameworks do."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal, cast, get_args

from tts_search.errors import ConfigError
from tts_search.search.types import StepParams
from tts_search.search.voting import AGGREGATES

__all__ = ["METHODS", "WITHOUT_VERIFIER", "Rules", "SearchConfig", "Thinking"]

Method = Literal["best_of_n", "beam_search", "dvts", "rebase", "ets", "particle_filtering", "puct", "budget_forcing"]
Completed = Literal["leave", "occupy", "compete"]

METHODS: tuple[Method, ...] = get_args(Method)
WITHOUT_VERIFIER = ("best_of_n", "budget_forcing")
"""Methods whose decisions need no scores."""
COMPLETED = ("leave", "occupy", "compete")


@dataclass(frozen=True, slots=True)
class Rules:
    """Where a peer's search differs from ours; the presets of :class:`SearchConfig` set them, nothing else does.

    Attributes
    ----------
    groups : int or None
        Independent searches that share the n candidates; by default 1, and n / expand in DVTS.
    first : int or None
        Candidates of a group in the first round; by default as many as in every round.
    order : str
        Order of the survivors: ``"candidate"``, or ``"score"`` (best first).
    deal : str
        Children go to the survivors ``"cyclic"`` (A, B, A, B) or in a ``"block"`` each (A, A, B, B).
    copies : bool
        With ``completed="compete"``: a finished survivor that is dealt several children competes as so many copies.
    filter_siblings : bool
        Drop a child that is empty, repeats an earlier sibling or was cut by its length, unless that leaves none.
    length_ends : bool
        A step that was cut by its length ends the branch.
    empty_ends : bool
        An empty step ends the branch, though the policy did not say that it finished.
    empty_stays : bool
        An empty step is a step like others: the branch goes on, or loses, by the score that it had.
    marker : str or None
        A step that contains this text ends the branch.
    free_last_round : bool
        The last round runs without a delimiter.
    last_max_tokens : int or None
        Token limit of a step of the last round, if it is another one.
    late_places : bool
        With ``completed="occupy"``: a finished survivor that ranks below all unfinished ones gives its place up one
        round late.
    report : str
        Which branches are reported, in which order: ``"finished_first"`` (in order of finishing, then the unfinished),
        ``"ended"`` (in order of ending, only those that did), ``"groups"`` (those in frozen places, group by group),
        ``"siblings"`` (all candidates of each group's last round) or ``"beam"`` (the candidates that would be next).
    pad : bool
        Report exactly n, cut or repeated cyclically.
    best_of_all : bool
        The best is sought, and votes are counted, among all completions, not only the finished ones.
    vote_aggregate : str or None
        The aggregate of ``prm_vote``, if it is not the config's.
    exact_votes : bool
        Answers count as one only if their texts are equal.
    """

    groups: int | None = None
    first: int | None = None
    order: Literal["candidate", "score"] = "candidate"
    deal: Literal["cyclic", "block"] = "cyclic"
    copies: bool = False
    filter_siblings: bool = False
    length_ends: bool = False
    empty_ends: bool = False
    empty_stays: bool = False
    marker: str | None = None
    free_last_round: bool = True
    last_max_tokens: int | None = None
    late_places: bool = False
    report: Literal["finished_first", "ended", "groups", "siblings", "beam"] = "finished_first"
    pad: bool = False
    best_of_all: bool = False
    vote_aggregate: str | None = None
    exact_votes: bool = False


@dataclass(frozen=True, slots=True)
class Thinking:
    """How ``budget_forcing`` holds a model's thinking to a budget (Muennighoff et al., s1, arXiv 2501.19393).

    Attributes
    ----------
    end : str
        What the model writes where its thinking ends and the answer begins.
    min_tokens : int
        Thinking that ends with fewer tokens is made to go on: `end` is replaced by `extend`.
    max_tokens : int
        Thinking that has come to so many tokens is cut: `end` is written for the model.
    extend : str
        What makes it go on.
    max_extensions : int
        It is made to go on so many times at most.

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
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ConfigError(f"thinking.{name}: expected a text that is not empty, got {getattr(self, name)!r}")
        _integer("thinking.min_tokens", self.min_tokens, at_least=0)
        _integer("thinking.max_tokens", self.max_tokens, at_least=1)
        _integer("thinking.max_extensions", self.max_extensions, at_least=0)
        if self.min_tokens > self.max_tokens:
            raise ConfigError(
                f"thinking.min_tokens: expected at most max_tokens ({self.max_tokens}), got {self.min_tokens}"
            )


@dataclass(frozen=True)
class SearchConfig:
    r"""How to search.

    Parameters
    ----------
    method : str
        ``"best_of_n"``: n completions, sampled in one go and scored. ``"beam_search"``: rounds of n candidates, of
        which `keep` survive. ``"dvts"`` (diverse verifier tree search): n / expand independent subtrees of `expand`
        candidates, one of which survives in each. ``"rebase"``: the n children of a round are dealt in proportion to
        exp(score / reward_temperature). ``"ets"``: the same, after pruning what costs more KV cache than it is worth.
        ``"particle_filtering"``: n particles, resampled each round in proportion to the odds of their scores.
        ``"puct"``: tree search that may come back to any leaf. ``"budget_forcing"``: n completions of a model that
        thinks by itself, its thinking held to a budget.
    n : int
        Candidates of a round; completions of best-of-N.
    expand : int
        Children of each survivor.
    keep : int or None
        Survivors of a round in each group (the problem; a subtree in DVTS, where it is 1); ``n // expand`` unless
        given.
    max_steps : int
        Rounds at most; the last one runs to the end of the answer, without a delimiter.
    max_step_tokens : int
        Tokens of a step at most.
    max_tokens : int or None
        Tokens of a branch at most; for best-of-N, of a completion (`max_step_tokens` unless given).
    temperature, top_p, top_k
        Sampling; 0 takes the most likely token, 1.0 and 0 switch top_p and top_k off.
    delimiter : str
        What ends a step.
    aggregate : str
        How a branch's step scores become one: ``"last"``, ``"min"``, ``"prod"``, ``"mean"`` (or ``"avg"``), ``"max"``,
        ``"sum"``.
    completed : str
        What a finished branch does. ``"leave"``: it leaves, and the beam is refilled to n from the survivors.
        ``"occupy"``: if it is among the best, it keeps one of the `keep` places for good and the candidates that this
        place would have had are not made. ``"compete"``: it keeps its score and competes for a place in each round;
        while it holds one, that place makes no candidates; when it loses it, it is gone.
    dedupe : bool
        Drop later candidates of equal text before pruning.
    lookahead : int
        Greedy steps beyond each candidate that only the verifier reads.
    sort_completed : bool
        Order completions by score, best first, instead of by time.
    stop_when_full : bool
        Stop when n branches have finished.
    agree_margin : int or None
        Stop as soon as one answer is ahead of every other by so many finished branches. Best-of-N then samples in
        waves: so many first, and then each time as many as there are.
    reward_temperature : float
        Of ``"rebase"`` and ``"ets"``: lower ones put more children under the best.
    kv_weight : float
        Of ``"ets"``: what all of a round's KV cache weighs against all of its children.
    exploration : float
        Of ``"puct"``: weight of the term that favours what was visited little.
    thinking : Thinking or None
        Of ``"budget_forcing"``: the budget; its defaults unless given.
    seed : int
        Fixes every draw.

    Raises
    ------
    ConfigError
        A :class:`~tts_search.SearchError` and a ``ValueError``, if an option has a value that it cannot have.
    """

    method: Method = "beam_search"
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
    reward_temperature: float = 0.2
    kv_weight: float = 1.0
    exploration: float = 1.25
    thinking: Thinking | None = None
    seed: int = 0
    _rules: Rules = field(default=Rules(), repr=False)

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        _one_of("completed", self.completed, COMPLETED)
        if self.aggregate == "avg":
            object.__setattr__(self, "aggregate", "mean")
        _one_of("aggregate", self.aggregate, tuple(AGGREGATES))
        for name in ("n", "expand", "max_steps", "max_step_tokens"):
            _integer(name, getattr(self, name), at_least=1)
        for name in ("keep", "max_tokens", "agree_margin"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), at_least=1)
        for name in ("lookahead", "top_k"):
            _integer(name, getattr(self, name), at_least=0)
        _integer("seed", self.seed, at_least=None)
        for name in ("dedupe", "sort_completed", "stop_when_full"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: expected a bool, got {getattr(self, name)!r}")
        if not _is_finite(self.temperature) or self.temperature < 0:
            raise ConfigError(f"temperature: expected a finite number >= 0, got {self.temperature!r}")
        if not _is_finite(self.top_p) or not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: expected a number in (0, 1], got {self.top_p!r}")
        if not isinstance(self.delimiter, str) or not self.delimiter:
            raise ConfigError(f"delimiter: expected a text that is not empty, got {self.delimiter!r}")
        if not _is_finite(self.reward_temperature) or self.reward_temperature <= 0:
            raise ConfigError(f"reward_temperature: expected a finite number > 0, got {self.reward_temperature!r}")
        for name in ("kv_weight", "exploration"):
            if not _is_finite(getattr(self, name)) or getattr(self, name) < 0:
                raise ConfigError(f"{name}: expected a finite number >= 0, got {getattr(self, name)!r}")
        if isinstance(self.thinking, dict):  # from JSON
            unknown = set(self.thinking) - set(Thinking.__dataclass_fields__)
            if unknown:
                names = ", ".join(Thinking.__dataclass_fields__)
                raise ConfigError(f"thinking: expected fields among {names}, got {', '.join(map(repr, unknown))}")
            object.__setattr__(self, "thinking", Thinking(**self.thinking))
        if self.thinking is not None and not isinstance(self.thinking, Thinking):
            raise ConfigError(f"thinking: expected a Thinking, got {self.thinking!r}")
        if self.method in ("beam_search", "dvts"):
            self._check_beam()

    def _check_beam(self) -> None:
        if self.method == "dvts" and self._rules.groups is None:
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
    def groups(self) -> int:
        """Groups: sets of candidates that compete with each other, apart from the others."""
        if self._rules.groups is not None:
            return self._rules.groups
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
        rules = self._rules
        limit = rules.last_max_tokens if last and rules.last_max_tokens is not None else self.max_step_tokens
        if tokens_left is not None:
            limit = tokens_left if self.method in WITHOUT_VERIFIER else min(limit, tokens_left)
        delimiter = None if last and rules.free_last_round else self.delimiter
        return StepParams(self.temperature, self.top_p, self.top_k, limit, delimiter)

    @classmethod
    def search_and_learn(
        cls,
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
    ) -> SearchConfig:
        """Search as huggingface/search-and-learn does, by its own parameters and defaults.

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
        _one_of("approach", approach, METHODS[:3])
        for name, value in (("n", n), ("beam_width", beam_width)):
            _integer(name, value, at_least=1)
        common = cls(
            method="best_of_n",
            n=n,
            max_step_tokens=max_tokens,
            max_steps=num_iterations,
            temperature=temperature,
            top_p=top_p,
            aggregate=agg_strategy,
            seed=seed,
            _rules=Rules(best_of_all=True, vote_aggregate="last"),
        )
        if approach == "best_of_n":
            return common
        if approach == "beam_search":
            # Its beam search scores the beam without the lookahead, which therefore decides nothing.
            keep = n // beam_width or n  # scores[-0:] keeps all
            rules = replace(common._rules, length_ends=True, empty_ends=True, report="ended", pad=True)
            return replace(
                common,
                method="beam_search",
                keep=keep,
                expand=-(-n // keep),
                dedupe=filter_duplicates,
                sort_completed=sort_completed,
                _rules=rules,
            )
        if n % beam_width:
            raise ConfigError(f"n: expected a multiple of beam_width ({beam_width}) in dvts, got {n}")
        rules = replace(
            common._rules,
            length_ends=True,
            empty_ends=True,
            marker="boxed{",
            last_max_tokens=2048,
            report="siblings",
        )
        return replace(common, method="dvts", expand=beam_width, completed="compete", lookahead=lookahead, _rules=rules)

    @classmethod
    def compute_optimal_tts(
        cls,
        method: str,
        *,
        tree_max_width: int,
        num_sequence: int = 1,
        num_q: int = 1,
        tree_max_depth: int = 40,
        temperature: float = 0.7,
        max_new_tokens: int = 2048,
    ) -> SearchConfig:
        """Search as RyanLiu112/compute-optimal-tts does, by its own parameters and defaults.

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
        _one_of("method", method, METHODS[:3])
        for name, value in (("tree_max_width", tree_max_width), ("num_sequence", num_sequence), ("num_q", num_q)):
            _integer(name, value, at_least=1)
        if tree_max_width % num_sequence:
            raise ConfigError(
                f"tree_max_width: expected a multiple of num_sequence ({num_sequence}), got {tree_max_width}"
            )
        common = cls(
            method="best_of_n",
            n=tree_max_width * num_q,
            max_steps=tree_max_depth,
            max_step_tokens=max_new_tokens,
            temperature=temperature,
            _rules=Rules(best_of_all=True, exact_votes=True),
        )
        if method == "best_of_n":
            return common
        rules = replace(
            common._rules,
            groups=num_q,
            order="score",
            deal="block",
            filter_siblings=True,
            length_ends=True,
            empty_ends=True,
            marker="\\boxed",
            free_last_round=False,
            late_places=True,
            report="groups",
        )
        return replace(
            common,
            method=cast(Method, method),
            keep=num_sequence,
            expand=tree_max_width // num_sequence,
            completed="occupy",
            _rules=rules,
        )

    @classmethod
    def its_hub(
        cls,
        method: str,
        *,
        budget: int,
        beam_width: int | None = None,
        max_steps: int,
        step_token: str = "\n\n",
        stop_token: str | None = None,
        temperature: float = 0.8,
    ) -> SearchConfig:
        """Search as its_hub does, by its own parameters and defaults.

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
        _one_of("method", method, ("best_of_n", "beam_search", "particle_filtering"))
        _integer("budget", budget, at_least=1)
        _integer("max_steps", max_steps, at_least=0)
        common = cls(
            method="best_of_n",
            n=budget,
            max_steps=max_steps + 1,
            delimiter=step_token,
            temperature=temperature,
            _rules=Rules(best_of_all=True),
        )
        if method == "best_of_n":
            return common
        if method == "particle_filtering":
            rules = replace(common._rules, empty_stays=True, marker=stop_token, free_last_round=False, report="beam")
            return replace(common, method="particle_filtering", _rules=rules)
        if beam_width is None:
            raise ConfigError("beam_width: expected a number in beam_search, got None")
        _integer("beam_width", beam_width, at_least=1)
        if budget % beam_width:
            raise ConfigError(f"budget: expected a multiple of beam_width ({beam_width}), got {budget}")
        rules = replace(
            common._rules,
            first=budget // beam_width,
            order="score",
            copies=True,
            empty_stays=True,
            marker=stop_token,
            free_last_round=False,
            report="beam",
        )
        return replace(
            common,
            method="beam_search",
            keep=beam_width,
            expand=budget // beam_width,
            completed="compete",
            _rules=rules,
        )


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def _integer(name: str, value: object, *, at_least: int | None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or (at_least is not None and value < at_least):
        bound = "" if at_least is None else f" >= {at_least}"
        raise ConfigError(f"{name}: expected an int{bound}, got {value!r}")


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

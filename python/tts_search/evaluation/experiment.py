"""An experiment: one search configuration that is run over all tasks, and the settings that identify it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tts_search.search.config import SearchConfig
from tts_search.search.protocol import Policy, Verifier

__all__ = ["Experiment", "config_of", "instruction_set"]


@dataclass(frozen=True)
class Experiment:
    """One way to search that is run over all tasks.

    Attributes
    ----------
    label : str
        Its name in tables.
    config : SearchConfig
        How to search.
    policy, verifier
        The models. An experiment without a policy can only run elsewhere, where both models are loaded
        (:mod:`tts_search.evaluation.ray`).
    names : tuple of str
        Names that identify the models, such as their paths. Records of other models or of another config do not count
        as records of this experiment.
    keep_trees : bool
        Whether records hold the search tree.
    nested : tuple of int
        For best-of-N: record these smaller budgets, too, from the same samples. ``{n}`` in the label is the budget.
    timed : bool
        Whether its time is meaningful. It is not if the samples come from another experiment, which spent the time.

    Examples
    --------
    >>> from tts_search import SearchConfig
    >>> one = Experiment("best of {n}", SearchConfig("best_of_n", n=4), None, None, nested=(1, 2))
    >>> [variant.label for variant in one.variants]
    ['best of 1', 'best of 2', 'best of 4']
    """

    label: str
    config: SearchConfig
    policy: Policy | None
    verifier: Verifier | None
    names: tuple[str, ...] = ()
    keep_trees: bool = False
    nested: tuple[int, ...] = ()
    timed: bool = True

    @property
    def variants(self) -> list[Experiment]:
        """The experiment for each budget, the nested ones first."""
        sizes = [size for size in sorted({*self.nested, self.config.n}) if size <= self.config.n]
        return [
            replace(
                self,
                label=self.label.replace("{n}", str(size)),
                config=replace(self.config, n=size),
                keep_trees=self.keep_trees and size == self.config.n,
                nested=(),
                timed=self.timed and size == self.config.n,
            )
            for size in sizes
        ]

    @property
    def key(self) -> str:
        """The label, and a hash of everything that can change the outcome."""
        facts = json.dumps([self.config.as_dict(), self.names], sort_keys=True)
        return f"{self.label} #{hashlib.blake2b(facts.encode(), digest_size=4).hexdigest()}"


def config_of(settings: Mapping[str, Any]) -> SearchConfig:
    """Return the config of the fields that ``SearchConfig.as_dict`` gave.

    Raises
    ------
    ValueError
        If a field is unknown, as one of a newer version is, or has a value that it cannot have.
    """
    unknown = [name for name in settings if name not in SearchConfig.__dataclass_fields__]
    if unknown:
        raise ValueError(f"config: unknown fields {', '.join(map(repr, unknown))}: a newer version wrote them")
    try:
        return SearchConfig(**settings)
    except TypeError as error:
        raise ValueError(f"config: {error}") from error


def instruction_set() -> str:
    """Return the instruction-set level of the CPU's kernels: results of two levels differ by rounding."""
    import tts_kernels as tk

    return tk.backend_info().cpu_isa

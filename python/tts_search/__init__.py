"""Search over reasoning steps with a policy and a process verifier: best-of-N, beam search, DVTS.

>>> import tts_search as ts
>>> results = ts.search(problems, policy, verifier, ts.SearchConfig(method="beam_search", n=16))  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tts_search.api import asearch_iter, beam_search, best_of_n, dvts, search, search_iter, vote
from tts_search.engine.engine import Engine, Search
from tts_search.engine.events import SearchEvent
from tts_search.errors import ConfigError, MissingExtraError, SearchError
from tts_search.search.answers import boxed
from tts_search.search.config import SearchConfig, Thinking
from tts_search.search.protocol import Policy, Usage, Verifier
from tts_search.search.result import SearchResult
from tts_search.search.stats import SearchStats
from tts_search.search.tree import SearchTree, TreeNode
from tts_search.search.types import Completion, Step, StepParams, StepRequest
from tts_search.search.voting import VOTES

if TYPE_CHECKING:
    from tts_search.domains.mathematics import equivalent
    from tts_search.policies.hf import HFPolicy
    from tts_search.policies.text import TextPolicy, TextVerifier
    from tts_search.strategy import FittedStrategy, RuleStrategy, Strategy
    from tts_search.verifiers.hf import HFVerifier
    from tts_search.verifiers.mixed import MixedVerifier
    from tts_search.verifiers.outcome import OutcomeJudge

__all__ = [
    "VOTES",
    "Completion",
    "ConfigError",
    "Engine",
    "FittedStrategy",
    "HFPolicy",
    "HFVerifier",
    "MissingExtraError",
    "MixedVerifier",
    "OutcomeJudge",
    "Policy",
    "RuleStrategy",
    "Search",
    "SearchConfig",
    "SearchError",
    "SearchEvent",
    "SearchResult",
    "SearchStats",
    "SearchTree",
    "Step",
    "StepParams",
    "StepRequest",
    "Strategy",
    "TextPolicy",
    "TextVerifier",
    "Thinking",
    "TreeNode",
    "Usage",
    "Verifier",
    "asearch_iter",
    "beam_search",
    "best_of_n",
    "boxed",
    "dvts",
    "equivalent",
    "search",
    "search_iter",
    "vote",
]

_ON_USE = {  # what needs more than the engine and the search: where it is
    "FittedStrategy": "strategy",
    "HFPolicy": "policies.hf",
    "HFVerifier": "verifiers.hf",
    "MixedVerifier": "verifiers.mixed",
    "OutcomeJudge": "verifiers.outcome",
    "RuleStrategy": "strategy",
    "Strategy": "strategy",
    "TextPolicy": "policies.text",
    "TextVerifier": "policies.text",
    "equivalent": "domains.mathematics",
}


def __getattr__(name: str) -> Any:
    if name not in _ON_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_ON_USE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""The demo checkpoints that ship with the package."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tts_search.errors import SearchError
from tts_search.lab import MODELS_DIR
from tts_search.search.protocol import Policy, Verifier

__all__ = ["POLICIES", "VERIFIERS", "Models", "load_models"]

POLICIES = ("policy-0.1m", "policy-0.6m", "policy-3m")  # smallest first
VERIFIERS = ("prm-strong", "prm-weak")  # strongest first

Model = TypeVar("Model")


@dataclass(frozen=True)
class Models:
    """Policies by name, smallest first, and verifiers by name, strongest first."""

    policies: Mapping[str, Policy]
    verifiers: Mapping[str, Verifier]


class _OnUse(Mapping[str, Model]):
    """Models by name. Each is loaded when it is first needed, and then kept."""

    def __init__(self, names: tuple[str, ...], load: Callable[[str], Model]) -> None:
        self._names = names
        self._load = load
        self._loaded: dict[str, Model] = {}

    def __getitem__(self, name: str) -> Model:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load_models(folder: Path = MODELS_DIR) -> Models:
    """Return the demo checkpoints; each is loaded when it is first used.

    Raises
    ------
    SearchError
        If one is missing.
    """
    missing = [name for name in (*POLICIES, *VERIFIERS) if not (folder / name / "config.json").exists()]
    if missing:
        raise SearchError(f"demo models: {', '.join(missing)} not found in {folder}; see examples/demo_models")
    from tts_search.policies.hf import HFPolicy
    from tts_search.verifiers.hf import HFVerifier

    return Models(
        _OnUse(POLICIES, lambda name: HFPolicy(str(folder / name))),
        _OnUse(VERIFIERS, lambda name: HFVerifier(str(folder / name))),
    )

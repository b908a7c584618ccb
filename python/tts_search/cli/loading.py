"""Loads the models that the options name."""

# One option is named --format.
# ruff: noqa: A002

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tts_search.cli.options import naming
from tts_search.errors import MissingExtraError, SearchError
from tts_search.evaluation.tasks import Task
from tts_search.lab import MODELS_DIR
from tts_search.lab.checkpoints import POLICIES, VERIFIERS
from tts_search.search.protocol import Policy, Verifier

__all__ = ["EXECUTION", "JUDGE", "checkpoint_of", "execution_verifier", "load_checkpoints"]

EXECUTION: Final = "execution"  # the verifier that runs public tests
JUDGE: Final = "judge:"  # prefix of the checkpoint or the server of a judge of whole solutions
_BUNDLED: Final = (*POLICIES, *VERIFIERS)


def load_checkpoints(
    policy: str,
    verifier: str | None,
    system_prompt: str | None,
    format: str,
    dtype: str | None,
    device: str | None,
    kv_memory: str | None,
    kv_dtype: str | None,
    quantize: str | None,
    self_test: bool,
    *,
    tasks: Sequence[Task] = (),
    every_token: bool = False,
) -> tuple[Policy, Verifier | None]:
    """Return the models of the options; the verifier ``execution`` knows the tests of the tasks.

    With `every_token`, a verifier scores tokens instead of steps.

    Raises
    ------
    SearchError
        If one cannot be loaded; the message names the option.
    """
    from tts_search.policies.hf import HFPolicy
    from tts_search.verifiers.hf import HFVerifier

    own: dict[str, Any] = {
        "dtype": dtype,
        "device": device,
        "kv_memory": kv_memory,
        "kv_dtype": kv_dtype,
        "quantize": quantize,
        "self_test": self_test,
    }
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # our error says what the hub's messages about retries say
    with checkpoint_of("--policy", policy) as where:
        loaded = HFPolicy(where, system_prompt=system_prompt, **own)
    if verifier is None:
        return loaded, None
    with checkpoint_of("--verifier", verifier) as where:
        if verifier == EXECUTION:
            return loaded, execution_verifier(tasks)
        if verifier.startswith(JUDGE):
            return loaded, _judge(where, format, own)
        return loaded, HFVerifier(where, format=format, every_token=every_token, **own)


@contextmanager
def checkpoint_of(option: str, name: str) -> Iterator[str]:
    """Find the checkpoint that an option names, while it is loaded.

    The name is that of a folder, of a model that comes with the package, or on the hub; the first that exists is taken.
    Errors name the option; if there is no such model, they list those of the package.
    """
    where = name.removeprefix(JUDGE)
    is_bundled = where in _BUNDLED and not Path(where).exists()
    try:
        with naming(f"{option}: {name}"):
            yield str(MODELS_DIR / where) if is_bundled else where
    except MissingExtraError:
        raise
    except SearchError as error:
        if is_bundled or where == EXECUTION or "/" in where or Path(where).exists():
            raise
        raise SearchError(f"{error.message} The package has these models: {', '.join(_BUNDLED)}.") from error


def _judge(where: str, format: str, options: dict[str, Any]) -> Verifier:
    from tts_search.verifiers.labels import LocalLabels
    from tts_search.verifiers.outcome import OutcomeJudge
    from tts_search.verifiers.server import ServerLabels

    if format not in ("auto", "outcome"):
        raise SearchError(f"--format: expected outcome, or none, with a judge, got {format}")
    labels = ServerLabels(where) if where.startswith(("http://", "https://")) else LocalLabels(where, **options)
    return OutcomeJudge(labels, "outcome" if format == "outcome" else "choice")


def execution_verifier(tasks: Sequence[Task]) -> Verifier:
    """The verifier that runs the public tests of tasks.

    Raises
    ------
    SearchError
        If some tasks are not tasks of programming.
    """
    from tts_search.domains.code.tasks import PROGRAMS
    from tts_search.verifiers.execution import ExecutionVerifier

    code = [PROGRAMS.read(task.details, task.id) for task in tasks if task.grader == "code"]
    if not code or len(code) < len(tasks):
        raise SearchError("expected tasks of programming, which have public tests")
    return ExecutionVerifier(code)

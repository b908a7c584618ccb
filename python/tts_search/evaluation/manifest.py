"""The manifest beside a results file: the settings and versions of an evaluation. Several processes may write it."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from tts_search.evaluation.experiment import Experiment, config_of, instruction_set
from tts_search.evaluation.records import lock
from tts_search.search.config import SearchConfig

__all__ = ["read_configs", "write_manifest"]

_FORMAT: Final = 1
_MEND: Final = "move it away and run the command again: the results do not need it, and eval writes it anew"
_PACKAGES: Final = ("tts-kernels", "torch", "transformers", "math-verify")


def write_manifest(path: str | Path, experiments: Sequence[Experiment], data: str | Path, **facts: object) -> None:
    """Record the versions, data, models and configs of an evaluation. Entries of an earlier manifest are kept.

    If the process is killed or the disk is full, the file is either the old manifest or the new one. Processes that
    write at the same time wait for each other: they lock a hidden file beside the manifest.

    Parameters
    ----------
    path : str or Path
        The file, such as ``manifest.json`` beside the results.
    experiments : sequence of Experiment
        Added to those in the file, by key.
    data : str or Path
        Where the tasks come from.
    **facts
        Anything else that JSON can hold.

    Raises
    ------
    ValueError
        If there is a manifest that is broken, or that a newer version wrote.
    OSError
        If it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    locked = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with lock(locked):
            known = _read(path) if path.exists() else {"runs": [], "experiments": {}}
            _replace(path, _extended(known, experiments, {"data": str(data), **facts}))
    finally:
        os.close(locked)


def _extended(known: dict[str, Any], experiments: Sequence[Experiment], facts: dict[str, object]) -> dict[str, Any]:
    run = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": sys.version.split()[0],
        "versions": {name: _version(name) for name in _PACKAGES},
        "instruction_set": instruction_set(),
        **facts,
    }
    variants = [variant for one in experiments for variant in one.variants]
    entries = {one.key: {"models": one.names, "config": one.config.as_dict()} for one in variants}
    return {
        **known,
        "format": _FORMAT,
        "runs": [*known["runs"], run],
        "experiments": {**known["experiments"], **entries},
    }


def _replace(path: Path, manifest: dict[str, Any]) -> None:
    """Replace a file as a whole or not at all. The caller holds the lock, so one temporary name is enough."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _read(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the manifest is broken ({error}); {_MEND}") from None
    if not isinstance(manifest, dict):
        raise ValueError(f"{path}: the manifest is broken (it is no object); {_MEND}")
    for name, kind in (("runs", list), ("experiments", dict)):
        if not isinstance(manifest.get(name), kind):
            raise ValueError(f"{path}: the manifest is broken ({name!r} is no {kind.__name__}); {_MEND}")
    found = manifest.get("format", _FORMAT)
    if found != _FORMAT:
        raise ValueError(f"{path}: expected format {_FORMAT}, got {found!r}: a newer version wrote it; {_MEND}")
    return manifest


def read_configs(path: str | Path) -> dict[str, SearchConfig]:
    """Read the configs of a manifest by the key of their experiment.

    Raises
    ------
    ValueError
        If it is broken, or a newer version wrote it; the message names the file and says how to mend it.
    """
    path = Path(path)
    configs = {}
    for key, entry in _read(path)["experiments"].items():
        try:
            configs[key] = config_of(entry["config"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {key}: {error}; {_MEND}") from None
    return configs

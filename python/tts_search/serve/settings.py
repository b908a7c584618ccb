"""The settings of a server."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Settings", "default_name", "read_keys"]


@dataclass(frozen=True)
class Settings:
    """How a server presents itself and what it accepts.

    Attributes
    ----------
    names : tuple of str
        What requests call the policy; the first one is how answers call it.
    verifier_names : tuple of str
        What requests call the verifier.
    keys : tuple of str
        Whoever has one of these may use the models; none: everybody may.
    hosts : tuple of str
        The names by which browsers may reach the server; ``"*"``: any.
    max_queue : int
        Requests that run or wait at a time; more are sent away with status 429.
    max_body : int
        Bytes of a request's body.
    max_n : int
        Answers of one request, and candidates of a search.
    timeout_s : float
        Seconds that a request may take.
    allow_chat_template : bool
        Whether a request may bring a chat template of its own, which is a program in a sandbox.
    """

    names: tuple[str, ...] = ("policy",)
    verifier_names: tuple[str, ...] = ("verifier",)
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]", "0.0.0.0")
    max_queue: int = 256
    max_body: int = 8 << 20
    max_n: int = 256
    timeout_s: float = 600.0
    allow_chat_template: bool = False


def default_name(path_or_id: str) -> str:
    """A checkpoint's name for the world: a hub id as it is, of a folder or a file its own name alone."""
    return Path(path_or_id).resolve().name if Path(path_or_id).exists() else path_or_id


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file, one per line; empty lines and those that begin with ``#`` say nothing.

    Raises
    ------
    ValueError
        If there is none, or one has characters that cannot stand in a header.
    OSError
        If the file cannot be read.
    """
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys or not all(re.fullmatch(r"[!-~]+", key) for key in keys):
        raise ValueError("expected a file with a key on each line, of ASCII characters without spaces")
    return keys

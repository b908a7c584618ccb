"""The settings of a server."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Settings", "default_name", "read_keys"]


@dataclass(frozen=True)
class Settings:
    """The names of a server's models, and the limits of its requests.

    Attributes
    ----------
    names : tuple of str
        Names of the policy in requests. The first one is used in answers.
    verifier_names : tuple of str
        Names of the verifier in requests.
    keys : tuple of str
        Keys for access. If there are none, everyone has access.
    hosts : tuple of str
        The host names under which browsers may use the server; ``"*"``: any.
    max_queue : int
        The largest number of requests that run or wait. More requests get status 429.
    max_body : int
        The largest size of a request's body in bytes.
    max_headers, max_header_bytes : int
        The largest number of a request's headers, and the largest size of all of them together. More get status 431,
        or 400 if even a part of them is larger.
    client_timeout_s : float
        Seconds within which a request has to arrive with its body, and within which a client has to read what was sent
        to it. After this time the connection is closed.
    max_n : int
        The largest number of answers of a request, and of candidates of a search.
    timeout_s : float
        Seconds that a request may take.
    allow_chat_template : bool
        Whether a request may include its own chat template, which is run as a program in a sandbox.
    """

    names: tuple[str, ...] = ("policy",)
    verifier_names: tuple[str, ...] = ("verifier",)
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]", "0.0.0.0")
    max_queue: int = 256
    max_body: int = 8 << 20
    max_headers: int = 128
    max_header_bytes: int = 64 << 10
    client_timeout_s: float = 60.0
    max_n: int = 256
    timeout_s: float = 600.0
    allow_chat_template: bool = False


def default_name(path_or_id: str) -> str:
    """A checkpoint's public name: a hub id unchanged; for a folder or file only its own name."""
    return Path(path_or_id).resolve().name if Path(path_or_id).exists() else path_or_id


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys in a file, one in each line. Empty lines and lines that begin with ``#`` are ignored.

    Raises
    ------
    ValueError
        If there is no key, or a key has characters that a header cannot contain.
    OSError
        If the file cannot be read.
    """
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys or not all(re.fullmatch(r"[!-~]+", key) for key in keys):
        raise ValueError("expected a file with a key on each line, of ASCII characters without spaces")
    return keys

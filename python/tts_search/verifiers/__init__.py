"""Verifiers that run a model in this process, and the formats that they read."""

from __future__ import annotations

from tts_search.verifiers import published  # noqa: F401  (registers the formats)
from tts_search.verifiers.formats import FORMATS, Judge, VerifierFormat, register_format

__all__ = ["FORMATS", "Judge", "VerifierFormat", "register_format"]

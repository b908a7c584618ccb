"""Verifiers that run a model in this process, and the formats that they read."""

from __future__ import annotations

from tts_search.verifiers.formats import FORMATS, VerifierFormat, register_format

__all__ = ["FORMATS", "VerifierFormat", "register_format"]

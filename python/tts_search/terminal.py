"""Printing what a model wrote: its text is untrusted."""

from __future__ import annotations

import re

__all__ = ["sanitize"]

_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"  # CSI: colours, cursor, erase
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"  # OSC, DCS: titles, links, clipboard
    r"|\x1b[ -/]*[0-~]?"  # other escape sequences
)
# Control characters but tab and newline, those that change the direction of text, line separators, lone surrogates
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u061c\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def sanitize(text: str) -> str:
    """Return a text that is safe to print: no control sequences, no control or direction-changing characters.

    Newlines and tabs stay. What is left of a text cannot move the cursor, colour, retitle, or reorder what is on
    screen.
    """
    return _CONTROL.sub("", _SEQUENCE.sub("", text))

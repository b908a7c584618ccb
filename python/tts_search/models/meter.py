"""What a problem costs a model."""

from __future__ import annotations

from dataclasses import dataclass

from tts_search.models.decoder import DecoderShape
from tts_search.search.protocol import Usage

__all__ = ["Meter"]


@dataclass(slots=True)
class Meter:
    """What one problem has cost so far.

    Attributes
    ----------
    prompt, read, recomputed : int
        Tokens forwarded: of the prompt, others, and both kinds again. Their sum is all that was forwarded.
    keys, logit_rows : int
        Pairs of a token forwarded and a key that it sees; rows that got logits.
    waves : int
        As in :class:`~tts_search.Usage`.
    unique, logical, peak_unique, peak_logical : int
        KV tokens that it holds, and the most that it held: each token once, and the sum of its branches' lengths.
    """

    prompt: int = 0
    read: int = 0
    recomputed: int = 0
    keys: int = 0
    logit_rows: int = 0
    waves: int = 0
    unique: int = 0
    logical: int = 0
    peak_unique: int = 0
    peak_logical: int = 0

    def usage(self, shape: DecoderShape, tokens: int | None = None) -> Usage:
        """The public form, for a decoder; ``tokens`` are those read unless given."""
        forwarded = self.prompt + self.read + self.recomputed
        return Usage(
            tokens=self.read if tokens is None else tokens,
            prefill_tokens=self.prompt,
            flops=shape.flops(forwarded, self.keys, self.logit_rows),
            peak_unique_kv_tokens=self.peak_unique,
            peak_logical_kv_tokens=self.peak_logical,
            recomputed_tokens=self.recomputed,
            waves=self.waves,
        )

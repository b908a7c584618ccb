"""Counts the tokens and operations that a problem costs a model."""

from __future__ import annotations

from dataclasses import dataclass

from tts_search.models.decoder import KVPool
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
    cached : int
        Tokens that were found in the prefix cache, and not forwarded for this problem.
    waves : int
        As in :class:`~tts_search.Usage`.
    running, running_cached : int
        Branches that grow by a token in each forward, and the tokens that these have in the KV cache together.
    ticks : int
        Forwards of running branches up to which everything here is entered.
    unique, logical, peak_unique, peak_logical : int
        KV tokens that it holds, and the most that it held: each token once, and the sum of its branches' lengths.
    """

    prompt: int = 0
    read: int = 0
    recomputed: int = 0
    keys: int = 0
    logit_rows: int = 0
    cached: int = 0
    waves: int = 0
    running: int = 0
    running_cached: int = 0
    ticks: int = 0
    unique: int = 0
    logical: int = 0
    peak_unique: int = 0
    peak_logical: int = 0

    def settle(self, ticks: int) -> None:
        """Enter what running branches did since the last time.

        While who runs stays the same, that is a sum in closed form: so a token that ends nothing costs no bookkeeping.
        """
        steps, self.ticks = ticks - self.ticks, ticks
        grown = steps * self.running
        if not grown:
            return
        self.read += grown
        self.logit_rows += grown
        self.keys += steps * self.running_cached + self.running * steps * (steps + 1) // 2
        self.running_cached += grown
        self.unique += grown
        self.logical += grown
        self.note_peaks()

    def note_peaks(self) -> None:
        """See whether more KV is held than ever before."""
        self.peak_unique = max(self.peak_unique, self.unique)
        self.peak_logical = max(self.peak_logical, self.logical)

    def usage(self, pool: KVPool, tokens: int | None = None) -> Usage:
        """The public form, for a decoder's pool; ``tokens`` are those read unless given."""
        forwarded = self.prompt + self.read + self.recomputed
        return Usage(
            tokens=self.read if tokens is None else tokens,
            prefill_tokens=self.prompt,
            flops=pool.shape.flops(forwarded, self.keys, self.logit_rows),
            peak_unique_kv_tokens=self.peak_unique,
            peak_logical_kv_tokens=self.peak_logical,
            peak_kv_bytes=self.peak_unique * pool.token_bytes,
            recomputed_tokens=self.recomputed,
            waves=self.waves,
            cached_tokens=self.cached,
        )

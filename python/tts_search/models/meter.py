"""Counts the tokens and operations that a problem costs a model."""

from __future__ import annotations

from dataclasses import dataclass

from tts_search.models.decoder import KVPool
from tts_search.search.protocol import Usage

__all__ = ["Meter"]


@dataclass(slots=True, eq=False)
class Meter:
    """The cost of one problem so far.

    Attributes
    ----------
    prompt, read, recomputed : int
        Tokens forwarded: of the prompt, of other texts, and again of both kinds. Their sum is the number of all
        forwarded tokens.
    keys, logit_rows : int
        Pairs of a forwarded token and a key that it sees; rows that got logits.
    cached : int
        Tokens that were found in the prefix cache, so that they were not forwarded for this problem.
    waves : int
        As in :class:`~tts_search.Usage`.
    running, running_cached : int
        Number of branches that grow by a token in each forward, and the sum of their tokens in the KV cache.
    ticks : int
        The number of forwards of running branches that are included in these counts.
    unique, logical, peak_unique, peak_logical : int
        KV tokens now, and their largest numbers so far: each token counted once, and the sum of the branches' lengths.
    peak_bytes : int
        The largest number of bytes in a block cache so far, which is not proportional to the number of tokens; 0 for
        other pools.
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
    peak_bytes: int = 0

    def settle(self, ticks: int) -> None:
        """Add what running branches did since the last call.

        While the same branches run, this is a sum in closed form. So a token that ends no branch needs no bookkeeping.
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
        """Update the peaks, if more KV is held than ever before."""
        self.peak_unique = max(self.peak_unique, self.unique)
        self.peak_logical = max(self.peak_logical, self.logical)

    def usage(self, pool: KVPool, tokens: int | None = None) -> Usage:
        """The public form, for a decoder's pool. ``tokens``, if given, replaces the number of tokens read."""
        forwarded = self.prompt + self.read + self.recomputed
        return Usage(
            tokens=self.read if tokens is None else tokens,
            prefill_tokens=self.prompt,
            flops=pool.shape.flops(forwarded, self.keys, self.logit_rows),
            peak_unique_kv_tokens=self.peak_unique,
            peak_logical_kv_tokens=self.peak_logical,
            peak_kv_bytes=self.peak_bytes or self.peak_unique * pool.token_bytes,
            recomputed_tokens=self.recomputed,
            waves=self.waves,
            cached_tokens=self.cached,
            unique_kv_tokens=self.unique,
            logical_kv_tokens=self.logical,
        )

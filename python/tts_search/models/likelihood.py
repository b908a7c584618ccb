"""Streams that are read for the log-probabilities of their own tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from tts_search.models.branches import TokenBranch
from tts_search.models.device import upload
from tts_search.models.streams import Stream, Streams

__all__ = ["PromptStream", "PromptStreams", "TokenLogprob"]

_MOST: Final = 256  # tokens in a forward: each has a row of logits

TokenLogprob = tuple[float, tuple[tuple[int, float], ...]]
"""A token's log-probability, and the likeliest tokens at its place with theirs."""


@dataclass(slots=True, eq=False)
class PromptStream(Stream):
    """A root branch whose tokens are reported on, from the second on.

    Attributes
    ----------
    num_top : int
        How many of the likeliest tokens to report at the place of each.
    told : list
        The reports, token by token.
    """

    num_top: int
    told: list[TokenLogprob] = field(init=False, default_factory=list)

    def give_up(self) -> None:
        """Free the branch's KV and wait until there is room to read it from its start."""
        self.told = []
        Stream.give_up(self)


class PromptStreams(Streams[PromptStream]):
    """Reads prompts a few tokens at a time, so that their logits take little room."""

    def submit(self, branch: TokenBranch, num_top: int) -> PromptStream:
        """Start reading a branch without KV."""
        branch.marks = list(range(branch.length - 1))
        stream = PromptStream(branch, num_top)
        self._join(stream)
        return stream

    def step(self) -> list[PromptStream]:
        """Run one forward; return the prompts that are done, or failed, since the last step."""
        forwarded = self._forward(self.lane.decoder.logits, head=True, most=_MOST)
        if forwarded is not None:
            reading = {stream.branch: stream for stream in self._reading}
            rows = [row for row, (branch, at) in enumerate(forwarded.places) if at < branch.length - 1]
            places = [forwarded.places[row] for row in rows]
            device = forwarded.outputs.device
            logprobs = forwarded.outputs[upload(torch.tensor(rows, dtype=torch.int64), device)].float().log_softmax(-1)
            targets = upload(torch.tensor([[branch.tokens[at + 1]] for branch, at in places]).view(-1, 1), device)
            own = logprobs.gather(1, targets).flatten().tolist()
            best = _likeliest(logprobs, max((reading[branch].num_top for branch, _ in places), default=0))
            for (branch, _), value, top in zip(places, own, best, strict=True):
                stream = reading[branch]
                stream.told.append((value, tuple(top[: stream.num_top])))
            for branch in forwarded.done:
                stream = reading[branch]
                del self._reading[stream]
                branch.marks = []
                self.lane.pool.leave(stream)
                self._ended.append(stream)
        ended, self._ended = self._ended, []
        return ended


def _likeliest(logprobs: Tensor, most: int) -> list[list[tuple[int, float]]]:
    """For each row [V]: the likeliest tokens with their log-probabilities, best first."""
    values, ids = logprobs.topk(min(most, logprobs.shape[1]))
    return [list(zip(*line, strict=True)) for line in zip(ids.tolist(), values.tolist(), strict=True)]

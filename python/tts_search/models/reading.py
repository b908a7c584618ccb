"""Streams that read a branch and return the model's hidden states at certain places."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from tts_search.models.branches import TokenBranch
from tts_search.models.streams import Stream, Streams

__all__ = ["ReadStream", "ReadStreams"]

Place = tuple[TokenBranch, int]


@dataclass(slots=True, eq=False)
class ReadStream(Stream):
    """A branch to be read.

    Attributes
    ----------
    places : list of (TokenBranch, int)
        The branch with each marked position of its path and with its last position, as far as they were read.
    outputs : list of Tensor
        [..., H]: the hidden states at these places, part by part.
    """

    places: list[Place] = field(init=False, default_factory=list)
    outputs: list[Tensor] = field(init=False, default_factory=list)

    def give_up(self) -> None:
        """Free the branch's KV and wait until there is room to read it from its start."""
        self.places, self.outputs = [], []
        Stream.give_up(self)


class ReadStreams(Streams[ReadStream]):
    """Reads the pending tokens of branches, in as many forwards as these need."""

    def submit(self, branch: TokenBranch) -> ReadStream:
        """Start reading a branch. It must have pending tokens, and no other stream may read it at the same time."""
        stream = ReadStream(branch)
        self._join(stream)
        return stream

    def step(self) -> list[ReadStream]:
        """Run one forward; return the streams that are done, or failed, since the last step."""
        forwarded = self._forward(self.lane.decoder.hidden, head=False)
        if forwarded is not None:
            reading = {stream.branch: stream for stream in self._reading}
            begin = 0
            while begin < len(forwarded.places):  # one pass for each branch
                branch = forwarded.places[begin][0]
                stream, end = reading[branch], begin
                while end < len(forwarded.places) and forwarded.places[end][0] is branch:
                    end += 1
                stream.places += forwarded.places[begin:end]
                stream.outputs.append(forwarded.outputs[begin:end])
                begin = end
            for branch in forwarded.done:
                stream = reading[branch]
                del self._reading[stream]
                self.lane.pool.leave(stream)
                self._ended.append(stream)
        ended, self._ended = self._ended, []
        return ended

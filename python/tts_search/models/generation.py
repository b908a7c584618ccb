"""Streams that sample: each grows by one token in every forward, until its step ends.

The state of all streams is stored in arrays, so a token that ends nothing costs no Python. A table says for each token
whether a step may end there. Python looks at a single stream only after such a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from dataclasses import asdict, astuple, dataclass, field, fields
from typing import Any, Final, Generic, Protocol, TypeVar

import torch
from torch import Tensor

import tts_kernels as tk
from tts_search.models.branches import Forwarded, Rows, TokenBranch
from tts_search.models.device import read_tokens, upload
from tts_search.models.streams import Lane, Stream, Streams

__all__ = ["DrawOptions", "Ending", "SampledStream", "SampledStreams"]

MAX_ROWS: Final = 1024

# The counters of each stream. `_TOKEN` is its newest token, which stands at `_POSITION` of its branch. `_OFFSET` is the
# number of drawn tokens. `_FILL` of these are in line `_SLOT` of the buffer and not yet in the branch. After `_LEFT`
# more tokens the stream is checked in any case.
_POSITION, _OFFSET, _FILL, _LEFT, _TOKEN, _KV, _SEED, _ENDING, _SAMPLING, _SLOT = range(10)
_COUNTERS: Final = torch.tensor([[1], [1], [1], [-1]])  # the change of the first four by a token
_BUFFER: Final = 64
_NO_KV: Final = -1  # of a stream that has just drawn its first token here
_PLAIN, _LOOK = 1, 2  # what is known of a token: no step ends at it, or one may; 0: nothing


class Ending(Hashable, Protocol):
    """Says at which tokens steps may end; what it says is remembered by it."""

    def may_end(self, token: int) -> bool:
        """Whether a stream has to be checked when this token comes. Computed once for each token."""
        ...


@dataclass(frozen=True, slots=True)
class DrawOptions:
    """How tokens are drawn; see `tts_kernels.sample`."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


@dataclass(slots=True, eq=False)
class SampledStream(Stream, ABC):
    """A branch that grows by sampled tokens.

    Attributes
    ----------
    seed : int
        Seed of its random stream.
    limit : int
        The largest number of tokens.
    sampling : DrawOptions
        How tokens are drawn.
    ending : Ending
        At which tokens it may end, besides the limit.
    pace : int
        It is checked after this many tokens, if nothing asks for a check before.
    num_top : int
        How many of the likeliest tokens to report at the place of each drawn token.
    wanted : tuple of int
        Tokens whose log-probabilities are reported there, too.
    barred, free_after : tuple of int, int
        Tokens that are not drawn before this many others were.
    num_tokens, logprob : int, float
        The number of drawn tokens, including the one that ended the stream, and the sum of their log-probabilities.
        They are up to date when the stream is checked, and when it has ended.
    last_logprob, top : float, list of (int, float)
        For the newest token, when it is checked: its log-probability, and the likeliest tokens at its place with
        theirs, then the tokens in `wanted`.
    """

    seed: int
    limit: int
    sampling: DrawOptions
    ending: Ending
    pace: int = field(init=False, default=_BUFFER)
    num_top: int = field(init=False, default=0)
    wanted: tuple[int, ...] = field(init=False, default=())
    barred: tuple[int, ...] = field(init=False, default=())
    free_after: int = field(init=False, default=0)
    last_logprob: float = field(init=False, default=0.0)
    top: list[tuple[int, float]] = field(init=False, default_factory=list)
    num_tokens: int = field(init=False, default=0)
    logprob: float = field(init=False, default=0.0)

    @property
    def children(self) -> list[SampledStream]:
        """The streams whose next token is drawn from this branch's logits."""
        return [self]

    @property
    def tells(self) -> bool:
        """Whether it reports other tokens than the drawn one."""
        return bool(self.num_top or self.wanted)

    @abstractmethod
    def ends(self) -> bool:
        """Whether it ends with the newest token of its branch. This token may then be removed."""


@dataclass(slots=True, eq=False)
class _Source(Stream):
    """A branch whose logits give the first tokens of other branches."""

    children: list[SampledStream]

    @property
    def num_rows(self) -> int:
        return len(self.children)

    def without(self, gone: Collection[Stream]) -> bool:
        self.children = [child for child in self.children if child not in gone]
        return bool(self.children)


class SampledStreams(Streams[Any]):
    """Samples many streams.

    Parameters
    ----------
    lane : Lane
        A model with its LM head.
    max_rows : int or None
        The largest number of streams that run at a time; others wait.

    Attributes
    ----------
    num_drawn : int
        Number of tokens drawn so far.
    """

    def __init__(self, lane: Lane, max_rows: int | None = None) -> None:
        super().__init__(lane, max_rows or MAX_ROWS)
        self.num_drawn = 0
        self._streams: list[SampledStream] = []  # by row
        self._columns = torch.empty(10, 0, dtype=torch.int64)
        self._logprobs = torch.empty(0, dtype=torch.float64)
        self._new_tokens = torch.empty(0, _BUFFER, dtype=torch.int32)  # by slot
        self._free_slots: list[int] = []
        self._sources: dict[TokenBranch, _Source] = {}  # those that were not read yet
        self._endings: _Table[Ending] = _Table(torch.uint8)
        self._samplings: _Table[DrawOptions] = _Table(torch.float64)
        self._num_special = 0  # streams that report other tokens, or may not draw some
        self._options: dict[str, Any] = {}  # for `tts_kernels.sample`, while the rows stay the same

    def submit(self, source: TokenBranch, children: Sequence[SampledStream]) -> None:
        """Grow children of a branch. Its last token is read again, for the logits that give their first tokens."""
        if source in self._sources:
            self._sources[source].children += children
        else:
            self.lane.pool.rewind(source)
            self._sources[source] = stream = _Source(source, list(children))
            self._join(stream)
        for child in children:
            child.streams, child.age = self, next(self.lane.ages)

    def step(self) -> list[SampledStream]:
        """Run one forward and draw; return the streams that ended, or failed, since the last step."""
        self._read_again()
        forwarded = self._forward(self.lane.decoder.logits, head=True)
        if forwarded is not None:
            self._draw(forwarded)
        ended, self._ended = self._ended, []
        return ended

    def _read_again(self) -> None:
        """Restart those streams whose texts become longer than the decoder's switch with their next token."""
        switch = self.lane.decoder.shape.switch
        if switch is None:
            return
        rows = torch.nonzero(self._columns[_POSITION] == switch).flatten().tolist()
        streams = [stream for row in rows if not (stream := self._streams[row]).branch.far]
        self._take_out([self._streams.index(stream) for stream in streams])
        for stream in streams:
            self.lane.pool.leave(stream, keep=False)
            self.lane.pool.workers[stream] = None
            self._begin(stream)

    def give_up(self, stream: Any) -> None:
        """Free a stream's KV, and let the stream wait."""
        if stream in self._reading:
            super().give_up(stream)
        else:
            self._take_out([self._streams.index(stream)])
            self._put_off(stream)

    def fail(self, stream: Any) -> None:
        """End a stream with an error, and those that wait for its logits."""
        if stream in self._reading:
            del self._reading[stream]
        else:
            self._take_out([self._streams.index(stream)])
        self.lane.pool.leave(stream)
        self._sources.pop(stream.branch, None)
        for child in stream.children:
            child.error = stream.error
        self._ended += stream.children

    def cancel(self, gone: Collection[Any]) -> None:
        """Drop streams, whether they wait or run. The caller frees the KV of their branches."""
        super().cancel(gone)
        self._sources = {branch: source for branch, source in self._sources.items() if source.children}
        rows = [row for row, stream in enumerate(self._streams) if stream in gone]
        streams = [self._streams[row] for row in rows]
        self._take_out(rows)
        for stream in streams:
            self.lane.pool.leave(stream)

    @property
    def num_running(self) -> int:
        """Number of running streams, including those whose branch is being read."""
        reading: int = sum(stream.num_rows for stream in self._reading)
        return reading + len(self._streams)

    @property
    def num_waiting(self) -> int:
        """Number of streams that wait for room."""
        return sum(stream.num_rows for _, stream in self._waiting)

    def _begin(self, stream: Any) -> None:
        if isinstance(stream, SampledStream) and self.lane.pool.is_ready(stream.branch):
            self._put_in([stream])
            self._run([len(self._streams) - 1])
        else:
            self._reading[stream] = None

    def _rows(self) -> Rows:
        return Rows(self._columns[_KV], self._columns[_TOKEN], self._columns[_POSITION])

    def _draw(self, forwarded: Forwarded) -> None:
        """Draw a token for each row, and for each child of a branch that was read; check the streams that may end."""
        pool, old = self.lane.pool, len(self._streams)
        row_of = {branch: old + row for row, (branch, _) in enumerate(forwarded.places)}
        read = [stream for stream in self._reading if stream.branch in row_of]
        rows = [row_of[stream.branch] for stream in read for _ in stream.children]
        for stream in read:
            del self._reading[stream]
            self._sources.pop(stream.branch, None)
            pool.leave(stream)
        logits = forwarded.outputs
        self._endings.widen(logits.shape[1] + 1)
        if rows:
            self._put_in([child for stream in read for child in stream.children])
            wanted = [*range(old), *rows]
            if wanted != list(range(len(logits))):
                logits = logits.index_select(0, upload(torch.tensor(wanted), logits.device))
        if self._streams:
            told = [row for row, stream in enumerate(self._streams) if stream.tells] if self._num_special else []
            if self._num_special:
                logits = self._barred(logits)
            most = max((self._streams[row].num_top for row in told), default=0)
            drawn = tk.sample(logits, **self._sample_options(logits.device), top_logprobs=min(most, logits.shape[1]))
            if told:
                self._rank(told, logits, drawn)
            ended = self._push(*read_tokens(drawn))
            self._settle(old, ended)

    def _rank(self, rows: Sequence[int], logits: Tensor, drawn: tk.Sampled | tk.SampledTop) -> None:
        """Store in the streams of these rows the likeliest tokens, and the log-probabilities of the wanted ones."""
        if isinstance(drawn, tk.SampledTop):
            for row, ids, values in zip(rows, *(each[rows].tolist() for each in drawn[2:]), strict=True):
                stream = self._streams[row]
                stream.top = list(zip(ids, values, strict=True))[: stream.num_top]
        for row in rows:
            stream = self._streams[row]
            if stream.wanted:
                wanted = upload(torch.tensor([*stream.wanted, 0]), logits.device)
                wanted[-1] = drawn.tokens[row].clamp(min=0)
                values = logits[row, wanted].double()  # differences of logits are those of log-probabilities
                others = (values[:-1] - values[-1] + drawn.logprobs[row]).tolist()
                stream.top = [*(stream.top if stream.num_top else ()), *zip(stream.wanted, others, strict=True)]

    def _barred(self, logits: Tensor) -> Tensor:
        """Logits with -inf for the tokens that a stream may not draw yet."""
        counts = self._columns[_OFFSET].tolist()
        early = [row for row, stream in enumerate(self._streams) if counts[row] < stream.free_after]
        places = [(row, token) for row in early for token in self._streams[row].barred]
        if not places:
            return logits
        rows, tokens = (upload(torch.tensor(column), logits.device) for column in zip(*places, strict=True))
        return logits.index_put((rows, tokens), logits.new_tensor(-torch.inf))

    def _push(self, tokens: Tensor, logprobs: Tensor) -> list[int]:
        """Give each stream its next token; return the rows of the streams that end with it."""
        columns = self._columns
        self.num_drawn += len(tokens)
        self._new_tokens[columns[_SLOT], columns[_FILL]] = tokens.to(torch.int32)
        columns[: len(_COUNTERS)] += _COUNTERS
        columns[_TOKEN] = tokens
        self._logprobs += logprobs
        marks = self._endings.values[columns[_ENDING], tokens + 1]
        looked = torch.nonzero((marks != _PLAIN) | (columns[_LEFT] == 0) | (columns[_KV] == _NO_KV)).flatten()
        rows = looked.tolist()
        self._sync(rows)
        facts = zip(rows, *(column[looked].tolist() for column in (tokens, logprobs, marks)), strict=True)
        return [row for row, *fact in facts if self._ends(row, *fact)]

    def _settle(self, old: int, ended: Sequence[int]) -> None:
        """Start streams that drew their first token here, if there are rows for them; remove ended ones."""
        gone = set(ended)
        fresh = [row for row in range(old, len(self._streams)) if row not in gone]
        room = max(0, self.most - len(self._reading) - (old - sum(row < old for row in ended)))
        self._run(fresh[:room])
        over = [self._streams[row] for row in ended]
        later = [self._streams[row] for row in fresh[room:]]
        self._take_out([*ended, *fresh[room:]])
        for stream in over:
            if stream in self.lane.pool.workers:
                self.lane.pool.leave(stream)
        for stream in later:
            self._wait(stream)
        self._ended += over

    def _ends(self, row: int, token: int, logprob: float, mark: int) -> bool:
        """Check a stream, with the data of its newest token: whether it ends."""
        stream = self._streams[row]
        if token < 0:
            stream.branch.tokens.pop()
            stream.error = FloatingPointError("the model gave no finite logits")
            return True
        stream.last_logprob = logprob
        if not mark:
            line = self._columns[_ENDING, row]
            self._endings.values[line, token + 1] = _LOOK if stream.ending.may_end(token) else _PLAIN
        return stream.ends()

    def _sync(self, rows: Sequence[int]) -> None:
        """Add the tokens in the buffer to the branches of streams."""
        index = torch.tensor(rows, dtype=torch.int64)
        if not self._columns[_FILL, index].any():
            return
        lines = self._columns[:, index]
        offsets, fills = lines[_OFFSET].tolist(), lines[_FILL].tolist()
        drawn, logprobs = self._new_tokens[lines[_SLOT]].tolist(), self._logprobs[index].tolist()
        left = []
        for row, offset, fill, tokens, logprob in zip(rows, offsets, fills, drawn, logprobs, strict=True):
            stream = self._streams[row]
            stream.branch.tokens += tokens[:fill]
            stream.num_tokens, stream.logprob = offset, logprob
            left.append(min(stream.limit - offset, stream.pace))
        self._columns[_FILL, index] = 0
        self._columns[_LEFT, index] = torch.tensor(left)

    def _put_in(self, streams: Sequence[SampledStream]) -> None:
        """Give streams rows after the others. Their branches are read except for the last token."""
        if len(self._free_slots) < len(streams):
            more = max(len(streams), len(self._new_tokens))
            self._free_slots += range(len(self._new_tokens), len(self._new_tokens) + more)
            self._new_tokens = torch.cat([self._new_tokens, self._new_tokens.new_zeros(more, _BUFFER)])
        lines = [
            (
                stream.branch.length - 1,
                stream.num_tokens,
                0,
                min(stream.limit - stream.num_tokens, stream.pace),
                stream.branch.tokens[-1] if stream.branch.tokens else 0,
                _NO_KV,
                stream.seed,
                self._endings.hold(stream.ending),
                self._samplings.hold(stream.sampling, astuple(stream.sampling)),
                self._free_slots.pop(),
            )
            for stream in streams
        ]
        self._columns = torch.cat([self._columns, torch.tensor(lines).T], dim=1)
        self._logprobs = torch.cat([self._logprobs, self._logprobs.new_tensor([each.logprob for each in streams])])
        self._streams += streams
        self._num_special += sum(_is_special(stream) for stream in streams)
        self._options = {}

    def _run(self, rows: Sequence[int]) -> None:
        """Let the pool grow the branches of these rows from now on."""
        streams = [self._streams[row] for row in rows]
        kv = self.lane.pool.run([stream.branch for stream in streams])
        self._columns[_KV, rows] = torch.tensor(kv, dtype=torch.int64)
        self.lane.pool.workers |= dict.fromkeys(streams)

    def _take_out(self, rows: Sequence[int]) -> None:
        """Remove streams; the streams behind them move up."""
        if not rows:
            return
        self._sync(rows)
        for row, (position, *_, kv, _, _, _, slot) in zip(rows, self._columns[:, rows].T.tolist(), strict=True):
            stream = self._streams[row]
            if kv != _NO_KV:
                self.lane.pool.rest(stream.branch, position)
            self._free_slots.append(slot)
            self._endings.drop(stream.ending)
            self._samplings.drop(stream.sampling)
            self._num_special -= _is_special(stream)
        gone = set(rows)
        stay = [row for row in range(len(self._streams)) if row not in gone]
        index = torch.tensor(stay, dtype=torch.int64)
        self._columns, self._logprobs = self._columns[:, index], self._logprobs[index]
        self._streams = [self._streams[row] for row in stay]
        self._options = {}

    def _sample_options(self, device: torch.device) -> dict[str, Any]:
        """Options of `tts_kernels.sample` for the next token of each row: a number if all rows agree, else a tensor."""
        if not self._options:
            self._options["seeds"] = upload(self._columns[_SEED].clone(), device)
            if len(self._samplings.held) == 1:
                (only,) = self._samplings.held
                self._options |= asdict(only)
            else:
                values = self._samplings.values[self._columns[_SAMPLING]].T
                for field_, value in zip(fields(DrawOptions), values, strict=True):
                    dtype = torch.int64 if field_.name == "top_k" else torch.float32
                    self._options[field_.name] = upload(value.to(dtype).contiguous(), device)
        return {**self._options, "offsets": upload(self._columns[_OFFSET], device)}


def _is_special(stream: SampledStream) -> bool:
    return stream.tells or stream.free_after > 0


Key = TypeVar("Key", bound=Hashable)
_KEYS: Final = 64


class _Table(Generic[Key]):
    """A table with a line of values for each key.

    If there are many keys, a new key takes over a line that no stream holds.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.values = torch.zeros(0, 0, dtype=dtype)
        self.held: Counter[Key] = Counter()
        self._lines: dict[Key, int] = {}

    def widen(self, width: int) -> None:
        """Set the number of values in a line. If it changes, all values become 0."""
        if self.values.shape[1] != width:
            self.values = self.values.new_zeros(len(self.values), width)

    def hold(self, key: Key, values: Sequence[float] = ()) -> int:
        """The line of a key. It is filled if it is new, and held until `drop` was called as often."""
        if key not in self._lines:
            if values:
                self.widen(len(values))
            self._lines[key] = self._free_line()
            self.values[self._lines[key]] = torch.tensor(values or 0.0)
        self.held[key] += 1
        return self._lines[key]

    def drop(self, key: Key) -> None:
        """Give up one hold of a key."""
        self.held[key] -= 1
        if not self.held[key]:
            del self.held[key]

    def _free_line(self) -> int:
        idle = next((key for key in self._lines if key not in self.held), None) if len(self._lines) >= _KEYS else None
        if idle is not None:
            return self._lines.pop(idle)
        if len(self._lines) == len(self.values):
            more = self.values.new_zeros(max(1, len(self.values)), self.values.shape[1])
            self.values = torch.cat([self.values, more])
        return len(self._lines)

"""The block cache: a KV pool that stores blocks of tokens in few bits, and makes keys and values from them.

It is for forms whose scales belong to several tokens, and for those that store a layer's input (see `block_layers`).
The tokens of a branch are stored in blocks of 128. While a block grows, its keys and values are stored unquantised, in
pages of their own (windows). When it is full, its quantised form is written to a block of the pool. A query reads its
own block unquantised and all earlier blocks quantised, whichever forward they came in. So a text gives the same bits
whether it is read at once (in parts that end with blocks) or token by token. The windows of a block are freed when the
last branch has gone on to the next block. A branch that goes back into a full block reads the block again from its
start.

Before the attention of a layer, keys and values are made of each block that some branch of the forward reads: once for
all branches, in memory that all layers share. This memory and the windows are pages of one tensor, so attention needs
no code for the block cache. Layers differ in the page numbers of their windows.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

import tts_kernels as tk
from tts_search.models.block_layers import BLOCK, Blocks, Channels, Format, KeptLayer, Latents, formats_of
from tts_search.models.decoder import PAGE_SIZE, Batch, DecoderShape, KVPool
from tts_search.models.device import upload

__all__ = ["BlockCache", "BlockForest", "BlockPool", "Kept", "block_token_bytes", "turned_back", "window_token_bytes"]

_PAGES: Final = BLOCK // PAGE_SIZE  # the largest number of pages in a window


@dataclass(frozen=True, slots=True)
class Kept:
    """The work of a forward on blocks.

    Attributes
    ----------
    blocks : Tensor
        [n]: the blocks that are read.
    positions, slots : Tensor
        [n BLOCK]: the positions of their tokens in their branches, and the slots for their keys and values.
    own : Tensor
        For each page of the plan: 1 if it is a window's.
    full : Tensor
        [m]: the blocks that become full in this forward.
    full_slots, full_positions : Tensor
        [m BLOCK]: the slots of their windows, and the positions of their tokens.
    """

    blocks: Tensor
    positions: Tensor
    slots: Tensor
    own: Tensor
    full: Tensor
    full_slots: Tensor
    full_positions: Tensor


class BlockForest:
    """Two forests in step. For each branch, one holds the full blocks, the other the window of its newest block.

    It has the methods of a `tts_kernels.KVForest`, under the same names. A window of 128 tokens belongs to a block that
    is full. It stays until the branch grows, so that its last tokens can be removed again.
    """

    page_size = PAGE_SIZE

    def __init__(self, num_blocks: int, num_windows: int) -> None:
        self.blocks = tk.KVForest(num_blocks, BLOCK)
        self.windows = tk.KVForest(num_windows, PAGE_SIZE)

    def add_root(self) -> int:
        """A branch without tokens."""
        return self._same([self.blocks.add_root()], [self.windows.add_root()])[0]

    def fork(self, parents: Sequence[int] | Tensor) -> list[int]:
        """Add a child of each of these branches."""
        return self._same(self.blocks.fork(parents), self.windows.fork(parents))

    def free(self, branches: Sequence[int] | Tensor) -> None:
        """Free branches that are no longer needed."""
        self.blocks.free(branches)
        self.windows.free(branches)

    def length(self, branch: int) -> int:
        """Number of tokens of a branch."""
        return self.blocks.length(branch) + self.windows.length(branch) % BLOCK

    def append(self, branches: Sequence[int] | Tensor, counts: Sequence[int] | Tensor) -> tk.Append:
        """Reserve room for new tokens in windows, and for the blocks that become full with them.

        Raises
        ------
        ValueError
            If the tokens belong to more than one block.
        tts_kernels.OutOfPages
            If there is no room; no length has changed then.
        """
        full = []
        for branch, count in zip(_ints(branches), _ints(counts), strict=True):
            held = self.windows.length(branch)
            if held % BLOCK + count > BLOCK:
                raise ValueError(f"counts: expected tokens of one block of {BLOCK}, got {count} behind {held % BLOCK}")
            if held == BLOCK and count:
                self.windows.truncate(branch, 0)
            if held % BLOCK + count == BLOCK:
                full.append(branch)
        self.blocks.append(full, [BLOCK] * len(full))
        try:
            return self.windows.append(branches, counts)
        except BaseException:
            for branch in full:
                self.blocks.truncate(branch, self.blocks.length(branch) - BLOCK)
            raise

    def kept(self, branch: int, length: int) -> int:
        """How many of its first ``length`` tokens a branch would keep after `truncate`."""
        window, held = self._window(branch)
        return length if length % BLOCK == 0 or (held and window <= length) else length - length % BLOCK

    def truncate(self, branch: int, length: int) -> None:
        """Remove the tokens after a length. If this cuts into a full block, the whole block is removed."""
        if length >= self.length(branch):
            return
        kept, (window, _) = self.kept(branch, length), self._window(branch)
        self.blocks.truncate(branch, kept - kept % BLOCK)
        self.windows.truncate(branch, max(0, kept - window) if kept >= window else 0)

    def stats(self) -> tk.ForestStats:
        """Stats of whichever forest has less room left, in pages of windows."""
        blocks, windows = self.blocks.stats(), self.windows.stats()
        total = _PAGES * blocks.pages_total
        free = min(blocks.pages_free / blocks.pages_total, windows.pages_free / windows.pages_total)
        tokens = zip(blocks[3:], windows[3:], strict=True)
        return tk.ForestStats(blocks.branches, total, int(total * free), *(sum(pair) for pair in tokens))

    def read_by(self, branches: Sequence[int]) -> tuple[int, int]:
        """How many blocks, and how many slots of windows, some of these branches read."""
        blocks, _ = self.blocks.page_table(branches)
        pages, held = self.windows.page_table(branches)
        used = (held[:, None] - PAGE_SIZE * torch.arange(pages.shape[1])).clamp(max=PAGE_SIZE)
        unique, which = torch.unique(pages[pages >= 0], return_inverse=True)
        most = torch.zeros(len(unique), dtype=used.dtype).scatter_reduce_(0, which, used[pages >= 0], "amax")
        return len(torch.unique(blocks[blocks >= 0])), int(most.sum())

    def _window(self, branch: int) -> tuple[int, int]:
        """The position where a branch's window begins, and the number of its tokens."""
        held = self.windows.length(branch)
        return self.blocks.length(branch) - (BLOCK if held == BLOCK else 0), held

    @staticmethod
    def _same(branches: list[int], others: list[int]) -> list[int]:
        assert branches == others, "the two forests are out of step"
        return branches


class BlockCache(tk.KVCache):
    """The memory of a `BlockPool`: windows with keys and values, blocks in few bits, and room to restore blocks.

    Parameters
    ----------
    layers : sequence of KeptLayer
        Of the decoder.
    shape : DecoderShape
    num_blocks, num_windows : int
        Blocks, and pages of windows.
    dtype : torch.dtype
        Of keys and values.
    name : str
        Name of the kind of storage.
    device : torch.device or str
        The device of the layers.
    """

    def __init__(
        self,
        layers: Sequence[KeptLayer],
        shape: DecoderShape,
        num_blocks: int,
        num_windows: int,
        dtype: torch.dtype,
        name: str,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layers, self.num_windows = layers, num_windows
        self.page_size, self.dtype = PAGE_SIZE, name
        self.first = len(layers) * num_windows  # the first of the pages that all layers share
        pages = self.first + num_blocks * _PAGES
        heads = (pages, PAGE_SIZE, shape.num_kv_heads, shape.head_dim)
        self.pages = [torch.empty(heads, dtype=dtype, device=device) for _ in range(2)]
        self.k, self.v = (tuple(torch.split(each[: self.first], num_windows)) for each in self.pages)
        self.k_scale = self.v_scale = self.k_zero = self.v_zero = ()

        def room(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.uint8, device=device)

        forms = [layer.format for layer in layers]
        self.window_rows = [room(num_windows * PAGE_SIZE, form.window_bytes) for form in forms]
        self.block_rows = [room(num_blocks, BLOCK, form.row.nbytes) for form in forms]
        self.block_keys = [room(num_blocks, form.columns, form.key.nbytes if form.key else 0) for form in forms]

    @property
    def nbytes(self) -> int:
        """Number of bytes of all tensors."""
        return sum(t.nbytes for t in (*self.pages, *self.window_rows, *self.block_rows, *self.block_keys))

    @property
    def slot_bytes(self) -> int:
        """Number of bytes for a token of a window."""
        return sum(tensor[0, 0].nbytes for tensor in self.tensors())

    @property
    def block_bytes(self) -> int:
        """Number of bytes for a full block."""
        return sum(tensor[0].nbytes for tensor in (*self.block_rows, *self.block_keys))

    def tensors(self) -> list[Tensor]:
        """The tensors of a window's pages."""
        rows = [rows.view(self.num_windows, PAGE_SIZE, 1, -1) for rows in self.window_rows if rows.numel()]
        return [*self.k, *self.v, *rows]

    def run(self, x: Tensor, batch: Batch, cos_sin: Tensor, eps: float, rows: Tensor | None) -> Tensor:
        """Run `tts_kernels.decoder_layers_`, one layer after another, over keys and values restored from the blocks."""
        kept = batch.kept
        assert isinstance(kept, Kept), "a batch of another pool"
        restored: Tensor | None = None  # x as decoded from its stored form, for tokens of blocks and new ones
        taken: Tensor | None = None
        slots = batch.slots.long()
        for number, keeps in enumerate(self.layers):
            own = number * self.num_windows
            new, taken = keeps.encode(x, eps, taken)
            if keeps.format.window_bytes:
                self.window_rows[number][slots] = new
            if len(kept.blocks):
                restored = self.restore(number, keeps, kept, cos_sin, eps, restored)
            x = tk.decoder_layers_(
                x,
                keeps.one,
                self.pages[:1],
                self.pages[1:],
                replace(batch.plan, pages=batch.plan.pages + kept.own * own),
                batch.positions,
                cos_sin,
                slots + own * PAGE_SIZE,
                eps=eps,
                rows=rows if number + 1 == len(self.layers) else None,
            )
            if len(kept.full):
                self._keep(number, keeps, kept, cos_sin)
        return x

    def restore(
        self, number: int, keeps: KeptLayer, kept: Kept, cos_sin: Tensor, eps: float, before: Tensor | None
    ) -> Tensor | None:
        """Restore keys and values of the blocks that are read, in the pages that all layers share."""
        rows, keys, (k, v) = self.block_rows[number], self.block_keys[number], self.pages
        blocks = Blocks(rows, keys, kept.blocks, k, v, kept.positions, kept.slots, cos_sin, eps)
        return keeps.restore(blocks, before)

    def _keep(self, number: int, keeps: KeptLayer, kept: Kept, cos_sin: Tensor) -> None:
        """Store the blocks that are full now."""
        rows = self.window_rows[number][kept.full_slots].view(len(kept.full), BLOCK, keeps.format.window_bytes)
        if isinstance(keeps, (Channels, Latents)):
            k, v = (pages[number].flatten(0, 1)[kept.full_slots] for pages in (self.k, self.v))
            k = turned_back(k.float(), cos_sin[kept.full_positions])
            rows, keys = keeps.encode_blocks(rows, *(part.flatten(1).unflatten(0, (-1, BLOCK)) for part in (k, v)))  # type: ignore[no-untyped-call]
            self.block_keys[number][kept.full] = keys
        self.block_rows[number][kept.full] = rows


class BlockPool(KVPool):
    """A pool that stores full blocks of tokens as in `block_layers`.

    Parameters
    ----------
    layers : sequence of KeptLayer
        Of the decoder.
    shape : DecoderShape
        Sizes of the decoder.
    num_blocks, num_windows : int
        Blocks of 128 tokens, and pages of 16 for tokens of blocks that are not full.
    dtype : torch.dtype
        Of keys and values.
    name : str
        Name of the kind of storage.
    device : torch.device or str
        The device of the layers. Branches, blocks and plans are on the host.
    """

    forest: BlockForest  # type: ignore[assignment]
    kv: BlockCache
    block = BLOCK
    records = False  # the number of blocks that are read differs from step to step

    def __init__(
        self,
        layers: Sequence[KeptLayer],
        shape: DecoderShape,
        num_blocks: int,
        num_windows: int,
        dtype: torch.dtype,
        name: str,
        device: torch.device | str = "cpu",
    ) -> None:
        forest = BlockForest(num_blocks, num_windows)
        cache = BlockCache(layers, shape, num_blocks, num_windows, dtype, name, device)
        self._take(shape, forest, cache)  # type: ignore[arg-type]  # it has all of a forest that is asked for
        self._bytes = cache.block_bytes, cache.slot_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes for a token of a full block, without the room in which its keys and values are restored."""
        return round(sum(layer.format.token_bytes for layer in self.kv.layers))

    def held_bytes(self, branches: Sequence[int]) -> int:
        """Bytes of the blocks and of the slots of windows that some of these branches read, each counted once."""
        return sum(map(operator.mul, self.forest.read_by(branches), self._bytes))

    @property
    def num_tokens(self) -> int:
        """How many tokens the blocks have room for."""
        return self.forest.blocks.stats().pages_total * BLOCK

    def kept(self, branch: int, length: int) -> int:
        """How many of its first ``length`` tokens a branch would keep if it is cut there."""
        return self.forest.kept(branch, length)

    def batch(
        self,
        branches: Sequence[int] | Tensor,
        counts: Sequence[int] | Tensor | None,
        tokens: Sequence[int] | Tensor,
        positions: Sequence[int] | Tensor,
        slots: Tensor,
        out: Batch | None = None,
        far: Tensor | None = None,
    ) -> Batch:
        """As for a `KVPool`, with the work on blocks in addition."""
        assert out is None
        assert far is None
        blocks, ends = (each.long() for each in self.forest.blocks.page_table(branches))
        windows, held = (each.long() for each in self.forest.windows.page_table(branches))
        is_full = held == BLOCK
        reads = ends // BLOCK - is_full.long()
        column = torch.arange(blocks.shape[1])
        read = column < reads[:, None]
        unique, which = torch.unique(blocks[read], return_inverse=True)
        place = torch.zeros_like(unique)
        place[which] = column.expand_as(blocks)[read]  # a block is at the same place in all branches that have it

        most = int(reads.max()) if len(reads) else 0
        ranks = torch.full_like(blocks, -1)
        ranks[read] = which
        made = self.kv.first + _PAGES * ranks[:, :most, None] + torch.arange(_PAGES)
        table = torch.cat([made.flatten(1), torch.full((len(reads), windows.shape[1]), -1)], 1)
        table.scatter_(1, _PAGES * reads[:, None] + torch.arange(windows.shape[1]), windows)
        plan = tk.plan_attention(
            table,
            reads * BLOCK + held,
            counts,
            page_size=PAGE_SIZE,
            num_q_heads=self.shape.num_q_heads,
            num_kv_heads=self.shape.num_kv_heads,
            head_dim=self.shape.head_dim,
            device=self.device,
        )
        inside = torch.arange(BLOCK)
        full_rows = torch.nonzero(is_full).flatten()
        places = (
            unique,
            (place[:, None] * BLOCK + inside).flatten(),
            self.kv.first * PAGE_SIZE + torch.arange(len(unique) * BLOCK),
            blocks[full_rows].gather(1, reads[full_rows, None]).flatten(),
            (windows[full_rows][..., None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten(),
            (reads[full_rows, None] * BLOCK + inside).flatten(),
        )
        ids, at = torch.as_tensor(tokens, dtype=torch.int64), torch.as_tensor(positions, dtype=torch.int64)
        read_blocks, *where, ids, at, slots = (upload(part, self.device) for part in (*places, ids, at, slots))
        kept = Kept(read_blocks, where[0], where[1], (plan.pages < self.kv.first).int(), *where[2:])
        return Batch(ids, at, slots, plan, kept=kept)


def block_token_bytes(kind: str, shape: DecoderShape, hidden: int, dtype: torch.dtype) -> float:
    """Bytes for a token of a block: its stored form, and the room for a layer's restored keys and values."""
    made = shape.kv_bytes(dtype) / shape.num_layers
    carried = hidden * dtype.itemsize if kind.startswith("xquant-cl-") else 0
    return sum(form.token_bytes for form in _formats(kind, shape, hidden)) + made + carried


def window_token_bytes(kind: str, shape: DecoderShape, hidden: int, dtype: torch.dtype) -> int:
    """Bytes for a token of a window: its keys and values, and what will be stored of it."""
    return shape.kv_bytes(dtype) + sum(form.window_bytes for form in _formats(kind, shape, hidden))


def _formats(kind: str, shape: DecoderShape, hidden: int) -> list[Format]:
    return formats_of(kind, shape.num_layers, hidden, shape.num_kv_heads, shape.head_dim)


def turned_back(k: Tensor, cos_sin: Tensor) -> Tensor:
    """Keys [N, Hkv, D] before their rotation by ``cos_sin`` [N, D]."""
    cos, sin = cos_sin[:, None].chunk(2, -1)
    a, b = k.chunk(2, -1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], -1) / (cos * cos + sin * sin).repeat(1, 1, 2)


def _ints(values: Sequence[int] | Tensor) -> list[int]:
    return values.tolist() if isinstance(values, Tensor) else list(values)

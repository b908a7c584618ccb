"""The interface between a local model and a policy or verifier: a decoder that runs packed rows over a paged KV pool.

``models/transformers.py`` implements :class:`Decoder` for every model whose attention can be replaced, and
``models/llama.py`` for the Llama family. ``models/loading.py`` chooses between them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import torch
from torch import Tensor

import tts_kernels as tk
from tts_search.models.device import refill, upload

PAGE_SIZE: Final = 16
DecoderKind = Literal["auto", "lean", "transformers"]
KvDtype = Literal[
    "fp8", "int8", "int4", "int4-channel", "int3-channel", "int2-channel",
    "xquant-8", "xquant-4", "xquant-3", "xquant-2", "xquant-cl-4", "xquant-cl-3", "xquant-cl-2",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """The sizes of a decoder. Its KV pool, its plans and its cost follow from them.

    Attributes
    ----------
    num_layers, num_q_heads, num_kv_heads, head_dim : int
        Sizes of the attention, the same in every layer.
    max_length : int
        The longest sequence in tokens.
    body_parameters, head_parameters : int
        Number of weights that a token passes from its embedding to its last hidden state, and from there to logits.
    switch : int or None
        If set: a text with more tokens than this uses other rotary factors at all positions. Then keys and values of
        shorter texts cannot be used for it.
    """

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int
    body_parameters: int
    head_parameters: int
    switch: int | None = None

    def kv_bytes(self, dtype: torch.dtype | str) -> int:
        """Bytes of keys and values of one token in all layers, including scales and zeros."""
        if isinstance(dtype, torch.dtype):
            head = self.head_dim * dtype.itemsize
        else:
            head = {"fp8": self.head_dim, "int8": self.head_dim + 2, "int4": self.head_dim // 2 + 4}[dtype]
        return 2 * self.num_layers * self.num_kv_heads * head

    def flops(self, tokens: int, keys: int, logit_rows: int) -> float:
        """Operations of a forward: 2 per weight and token, and q.k and p.v of each query head for each of ``keys``.

        ``keys`` is the number of (token, key that it sees) pairs. Sliding windows are ignored.
        """
        attention = 4.0 * self.num_layers * self.num_q_heads * self.head_dim * keys
        return 2.0 * (self.body_parameters * tokens + self.head_parameters * logit_rows) + attention


@dataclass(frozen=True, slots=True)
class Batch:
    """One packed forward: the new tokens of many branches, branch after branch, T in total.

    Attributes
    ----------
    tokens, positions : Tensor
        [T] int64: token ids, and their positions in their branch.
    slots : Tensor
        [T] int32: the slots in the pool for the tokens' keys and values.
    plan : AttentionPlan
        The attention of these rows, the same for every layer.
    far : Tensor or None
        [T] bool: rows of texts longer than the decoder's switch, if it has one.
    kept : object or None
        Additional work of the forward for pools of another kind (`models/block_cache.py`).
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    plan: tk.AttentionPlan
    far: Tensor | None = None
    kept: object | None = None


class Decoder(Protocol):
    """A causal language model whose keys and values live in a paged pool.

    ``records`` says whether its forward on a GPU can be recorded, because it reads no value from the GPU.
    """

    records: bool

    @property
    def shape(self) -> DecoderShape:
        """Its sizes."""

    @property
    def device(self) -> torch.device:
        """The device of its weights."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its hidden states."""

    def hidden(self, batch: Batch, kv: tk.KVCache, rows: Tensor | None = None) -> Tensor:
        """Run a batch; return final hidden states [R, H] of the batch's ``rows`` [R] int64 (of all rows if None)."""
        ...

    def logits(self, batch: Batch, kv: tk.KVCache, rows: Tensor | None = None) -> Tensor:
        """Run a batch; return logits [R, V] only for the batch's ``rows`` [R] int64 (for all rows if None)."""
        ...


class KVPool:
    """A KV forest and the tensors with its pages.

    Parameters
    ----------
    shape : DecoderShape
        Sizes of the decoder.
    num_pages, page_size : int
        Size of the pool, which holds ``num_pages * page_size`` tokens.
    dtype, device
        Of keys and values; "fp8", "int8" and "int4" as in :class:`tts_kernels.KVCache`.

    Attributes
    ----------
    block : int or None
        If set, the new tokens of a branch in one forward must lie within one block of this many tokens.
    records : bool
        Whether a forward over the pool can be recorded.
    """

    block: int | None = None
    records: bool = True

    def __init__(
        self,
        shape: DecoderShape,
        num_pages: int,
        page_size: int = PAGE_SIZE,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        kv = tk.KVCache(
            shape.num_layers, num_pages, shape.num_kv_heads, shape.head_dim, page_size, dtype=dtype, device=device
        )
        self._take(shape, tk.KVForest(num_pages, page_size), kv)
        # If the decoder has a switch: for each slot that `pack` filled, its token, and whether its text was longer than
        # that.
        self._tokens = torch.zeros(0 if shape.switch is None else num_pages, page_size, dtype=torch.int64)
        self._far = torch.zeros(self._tokens.shape, dtype=torch.bool)

    def _take(self, shape: DecoderShape, forest: tk.KVForest, kv: tk.KVCache) -> None:
        self.shape, self.forest, self.kv = shape, forest, kv
        self.device = kv.k[0].device
        self._tensors = kv.tensors()

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        return self.shape.kv_bytes(self.kv.dtype)

    @property
    def num_tokens(self) -> int:
        """How many tokens the pool has room for."""
        return self.forest.stats().pages_total * self.forest.page_size

    def kept(self, branch: int, length: int) -> int:  # noqa: ARG002
        """How many of its first ``length`` tokens a branch keeps if it is truncated to them."""
        return length

    def pack(self, branches: Sequence[int], tokens: Sequence[Sequence[int]]) -> Batch:
        """Append new tokens to forest branches (each named once, at least one token) and plan their forward.

        If a branch becomes longer than its decoder's switch, the batch contains all of its tokens, the new ones last.

        Raises
        ------
        tts_kernels.OutOfPages
            If the pool has too few free pages. Nothing has changed then.
        """
        tokens = self.renewed(branches, tokens)
        counts = [len(new) for new in tokens]
        slots = self.append(branches, counts)
        ends = [self.forest.length(branch) for branch in branches]
        positions = itertools.chain.from_iterable(
            range(end - count, end) for end, count in zip(ends, counts, strict=True)
        )
        ids = list(itertools.chain.from_iterable(tokens))
        far = None
        if self.shape.switch is not None:
            far = (torch.tensor(ends) > self.shape.switch).repeat_interleave(torch.tensor(counts))
            self._tokens.view(-1)[slots] = torch.tensor(ids)
            self._far.view(-1)[slots] = far
        return self.batch(branches, counts, ids, list(positions), slots, far=far)

    def renewed(self, branches: Sequence[int], tokens: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        """Return the tokens that `pack` has to append to branches for these new tokens.

        These are all tokens of a branch if its keys are of one side of the switch and the longer text is on the other.
        The old keys are freed. Only branches that `pack` filled are known.

        Raises
        ------
        tts_kernels.OutOfPages
            If that could take more pages than are free. Nothing has changed then.
        """
        switch, forest = self.shape.switch, self.forest
        if switch is None or not branches:
            return tokens
        table, lengths = forest.page_table(branches)
        texts = list(tokens)
        turned = []
        for row, (branch, length) in enumerate(zip(branches, lengths.tolist(), strict=True)):
            pages = table[row, : -(-length // forest.page_size)].long()
            if length and bool(self._far[pages].flatten()[length - 1]) != (length + len(tokens[row]) > switch):
                texts[row] = [*self._tokens[pages].flatten()[:length].tolist(), *tokens[row]]
                turned.append(branch)
        if not turned:
            return tokens
        most, free = sum(-(-len(text) // forest.page_size) + 1 for text in texts), forest.stats().pages_free
        if most > free:
            raise tk.OutOfPages(f"reading texts of {len(turned)} branches again can take {most} pages, {free} are free")
        for branch in turned:
            forest.truncate(branch, 0)
        return texts

    def append(self, branches: Sequence[int] | Tensor, counts: Sequence[int] | Tensor) -> Tensor:
        """Reserve slots [sum(counts)] for new tokens, and copy shared pages that these tokens would write to."""
        new = self.forest.append(branches, counts)
        if new.copy_src.numel():
            tk.copy_pages_(self._tensors, upload(new.copy_src, self.device), upload(new.copy_dst, self.device))
            if self.shape.switch is not None:
                for notes in (self._tokens, self._far):
                    notes[new.copy_dst.long()] = notes[new.copy_src.long()]
        return new.slots

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
        """The packed forward of the last ``counts`` tokens of each branch (1 each if None).

        With ``out``, an earlier batch with the same number of tokens, the tensors of that batch are filled again. If
        the plan does not fit in them, this raises ValueError and writes nothing.
        """
        plan = self.forest.plan(
            branches,
            counts,
            num_q_heads=self.shape.num_q_heads,
            num_kv_heads=self.shape.num_kv_heads,
            head_dim=self.shape.head_dim,
            device=self.device,
            out=None if out is None else out.plan,
        )
        ids, places = torch.as_tensor(tokens, dtype=torch.int64), torch.as_tensor(positions, dtype=torch.int64)
        if out is None:
            ids, places, slots = (upload(part, self.device) for part in (ids, places, slots))
            return Batch(ids, places, slots, plan, None if far is None else upload(far, self.device))
        refill(out.tokens, ids)
        refill(out.positions, places)
        refill(out.slots, slots)
        return out

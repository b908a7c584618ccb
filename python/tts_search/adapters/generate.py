"""Plain ``model.generate()`` of transformers over a KV forest.

:class:`GenerationCache` is a cache of transformers in which equal rows are one branch. `generate` repeats a prompt for
each of its ``num_return_sequences`` or ``num_beams``, and pads the prompts of a batch. The cache undoes both before the
model runs: it processes each distinct (branch, new tokens) once, packed and without padding, and gives every row its
logits. Rows fork when they begin to differ. ``reorder_cache`` renames rows and frees the branches that have no row any
more, so beam search copies no prefix.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor

import tts_kernels as tk
from tts_search.models.decoder import Batch, KVPool
from tts_search.models.rotary import rotary_bound
from tts_search.models.selftest import check_decoder, eager_outputs
from tts_search.models.sizing import pool_for
from tts_search.models.transformers import (
    ATTENTION,
    NOT_PLUGGABLE,
    ForestCache,
    TransformersDecoder,
    following,
    register,
)

from transformers.generation.utils import GENERATION_MODES_MAPPING  # isort: skip  (after what says how to install it)

__all__ = ["GenerationCache", "generate_over_forest"]

_HOOKED: Final = "_tts_kernels_hooks"
_TESTED: Final = "_tts_kernels_tested"
# Arguments that a packed forward does not support.
_UNSUPPORTED: Final = ("inputs_embeds", "token_type_ids", "labels", "output_attentions", "output_hidden_states")


class GenerationCache(ForestCache):
    """A ``past_key_values`` for ``model.generate()`` whose rows share the KV of equal beginnings.

    Greedy and sampling, ``num_return_sequences``, beam search, batches of padded prompts, assisted decoding, chunked
    prefill and several turns on one cache work as with transformers' own caches. The model gets a pair of forward hooks
    that pack and unpack a forward. With other caches the hooks do nothing.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A decoder loaded with ``attn_implementation="tts_kernels"``, after :func:`~.transformers.register`.
    kv_memory : int or str or None
        Size of the pool: bytes or text such as ``"2GiB"``. By default at most a quarter of the free memory. Pages take
        memory only when a token is written to them.
    page_size : int
        Number of token slots in a page.
    self_test : bool
        Whether a few tokens are computed over a forest and with the model's own eager attention, once for each model
        that is not in training. If the results differ, the model is refused.

    Attributes
    ----------
    pool : tts_search.models.decoder.KVPool
        The forest and its pages.
    peak_bytes : int
        The largest memory of pages with tokens since the cache was made or reset.
    forwarded_tokens : int
        Number of tokens that the model has processed.

    Raises
    ------
    ValueError
        If the model has attention that cannot run over a forest, or another attention implementation.

    Examples
    --------
    >>> register()
    >>> model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="tts_kernels")  # doctest: +SKIP
    >>> cache = GenerationCache(model, kv_memory="1GiB")  # doctest: +SKIP
    >>> out = model.generate(**inputs, past_key_values=cache, num_return_sequences=16)  # doctest: +SKIP
    """

    def __init__(
        self, model: Any, *, kv_memory: int | str | None = None, page_size: int = 16, self_test: bool = True
    ) -> None:
        _check_attention(model)
        with following(model.config):
            decoder = TransformersDecoder(model)
            if self_test and not model.training and not hasattr(model, _TESTED):
                check_decoder(decoder, eager_outputs(model, decoder.shape.max_length))
                setattr(model, _TESTED, True)
        self.pool: KVPool = pool_for(decoder, kv_memory, page_size)
        self._bound = rotary_bound(model)
        super().__init__(self.pool.kv)
        self._rows: list[int] = []  # the branch of each row of the batch
        self._columns = 0  # number of columns of input_ids so far, padding included
        self._wanted: tuple[Tensor, Tensor] | None = None  # how to unpack the current forward
        self.peak_bytes = self.forwarded_tokens = 0
        if not hasattr(model, _HOOKED):
            model.register_forward_pre_hook(_pack, with_kwargs=True)
            model.register_forward_hook(_unpack, with_kwargs=True)
            setattr(model, _HOOKED, True)

    @property
    def rows(self) -> tuple[int, ...]:
        """The forest branch of each row of the batch. Rows that are equal so far have the same branch."""
        return tuple(self._rows)

    @property
    def batch_size(self) -> int:
        """Number of rows of the batch; -1 before the first forward, as in transformers."""
        return len(self._rows) or -1

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Number of columns of ``input_ids`` in the cache, including padding."""
        return self._columns

    def get_max_length(self, layer_idx: int | None = None) -> int:  # noqa: ARG002
        """-1: a row may have as many tokens as the pool can hold."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was. O(rows), and no token is copied."""
        self._keep([self._rows[index] for index in beam_idx.tolist()])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows."""
        self._keep([self._rows[index] for index in torch.arange(len(self._rows))[indices.cpu()].tolist()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._keep([branch for branch in self._rows for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens of every row.

        Raises
        ------
        ValueError
            If the number is positive.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: expected a number <= 0, got {tokens_to_remove}")
        for branch in set(self._rows):
            self.pool.forest.truncate(branch, self.pool.forest.length(branch) + tokens_to_remove)
        self._columns += tokens_to_remove

    def reset(self) -> None:
        """Forget all rows; the pool stays."""
        self._keep([])
        self._columns = 0
        self._wanted = None
        self.peak_bytes = self.forwarded_tokens = 0

    def _keep(self, rows: list[int]) -> None:
        self.pool.forest.free(sorted(set(self._rows) - set(rows)))
        self._rows = rows

    def pack(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | None = None,
    ) -> dict[str, Any]:
        """Turn a forward's arguments into those of a packed one: each (branch, new tokens) once, without padding.

        Parameters
        ----------
        input_ids
            [B, L]: new tokens of each row.
        attention_mask
            [B, columns so far]: 0 for padding, which stands on the left.
        position_ids
            [B, L] or [1, L]: checked, not used.
        logits_to_keep
            How many of the last columns need logits; 0 or None: all.

        Returns
        -------
        dict
            Keyword arguments of the model's forward.

        Raises
        ------
        ValueError
            If the number of rows differs from before, for right padding, or for positions that do not follow from the
            mask.
        RuntimeError
            If the pool is full, or the last forward failed.
        """
        if self._wanted is not None:
            raise RuntimeError("past_key_values: the last forward on this cache failed; call its reset()")
        count, width = input_ids.shape
        if self._rows and len(self._rows) != count:
            raise ValueError(
                f"input_ids: expected {len(self._rows)} rows, as in past_key_values, got {count}; "
                "batch_repeat_interleave() repeats the cache's rows"
            )
        real = torch.ones(count, width, dtype=torch.bool) if attention_mask is None else _real(attention_mask, width)
        place = real.cumsum(1) - 1  # [B, L]: the index of a token among its row's new tokens
        self._check_columns(real, place, position_ids)
        tokens = [tuple(row[keep].tolist()) for row, keep in zip(input_ids.cpu(), real, strict=True)]
        batch, offsets = self._append(tokens)
        self._columns += width
        kept = slice(-logits_to_keep if logits_to_keep else None, None)
        rows, inverse = torch.unique((offsets[:, None] + place)[:, kept][real[:, kept]], return_inverse=True)
        rows, inverse = rows.to(input_ids.device), inverse.to(input_ids.device)
        self._wanted = (rows[inverse] if logits_to_keep is None else inverse, real[:, kept])
        return {**self.inputs(batch), **({} if logits_to_keep is None else {"logits_to_keep": rows})}

    def unpack(self, logits: Tensor) -> Tensor:
        """Logits [B, K, V] of every row from the packed logits [1, R, V]; zeros for padding."""
        assert self._wanted is not None
        (index, real), self._wanted = self._wanted, None
        own = logits[0].index_select(0, index)
        if bool(real.all()):
            return own.view(*real.shape, -1)
        out = logits.new_zeros(*real.shape, logits.shape[-1])
        out[real.to(out.device)] = own
        return out

    def _check_columns(self, real: Tensor, place: Tensor, position_ids: Tensor | None) -> None:
        lengths = torch.tensor([self.pool.forest.length(branch) for branch in self._rows] or [0])[:, None]
        if ((~real[:, -1:]) & (real.any(1, keepdim=True) | (lengths > 0))).any():
            raise ValueError("attention_mask: expected padding on the left, got a row that ends in padding")
        if position_ids is not None and ((position_ids.cpu() != lengths + place) & real).any():
            raise ValueError("position_ids: expected each row to count from 0 over its unmasked tokens, got others")

    def _append(self, tokens: Sequence[tuple[int, ...]]) -> tuple[Batch, Tensor]:
        """Append new tokens to rows. Return the forward, and the packed row [B] of each row's first new token."""
        forest = self.pool.forest
        if self._bound is not None:
            lengths = map(forest.length, self._rows) if self._rows else itertools.repeat(0)
            longest = max(length + len(new) for length, new in zip(lengths, tokens, strict=False))
            _check_bound(longest, self._bound)
        old = self._rows or [forest.add_root()] * len(tokens)
        groups: dict[tuple[int, tuple[int, ...]], int] = {}
        which = [groups.setdefault(pair, len(groups)) for pair in zip(old, tokens, strict=True)]
        branches = self._diverge([branch for branch, _ in groups])
        grown = {branch: new for branch, (_, new) in zip(branches, groups, strict=True) if new}
        try:
            whole = self.pool.renewed(list(grown), list(grown.values()))
            batch = self.pool.pack(list(grown), whole)
        except tk.OutOfPages as error:
            forest.free(sorted(set(branches) - set(self._rows)))
            raise RuntimeError(
                f"kv_memory: the pool of {forest.num_pages} pages of {forest.page_size} tokens is too small: {error}"
            ) from error
        self._rows = [branches[index] for index in which]
        self._count(batch.tokens.numel())
        ends = zip(grown, itertools.accumulate(map(len, whole)), strict=True)
        offsets = {branch: end - len(grown[branch]) for branch, end in ends}
        return batch, torch.tensor([offsets.get(branch, 0) for branch in self._rows])

    def _diverge(self, parents: Sequence[int]) -> list[int]:
        """A branch for each group of rows: the last group of a parent keeps the parent, the others get forks of it."""
        last = {parent: index for index, parent in enumerate(parents)}
        branches = list(parents)
        forked = [index for index, parent in enumerate(parents) if last[parent] != index]
        for index, child in zip(forked, self.pool.forest.fork([parents[index] for index in forked]), strict=True):
            branches[index] = child
        return branches

    def _count(self, num_tokens: int) -> None:
        stats = self.pool.forest.stats()
        page_bytes = self.pool.forest.page_size * self.pool.shape.kv_bytes(self.kv.dtype)
        self.peak_bytes = max(self.peak_bytes, (stats.pages_total - stats.pages_free) * page_bytes)
        self.forwarded_tokens += num_tokens


def generate_over_forest(
    model: Any,
    input_ids: Tensor,
    *,
    generation_config: Any,
    kv_memory: int | str | None = None,
    self_test: bool = True,
    **kwargs: Any,
) -> Any:
    """The decoding loop of ``generate``, over a forest: a ``custom_generate``.

    The model may have any attention implementation, which is restored at the end.

    Parameters
    ----------
    model, input_ids, generation_config, **kwargs
        The arguments that ``generate`` passes to a custom decoding loop. If there is a :class:`GenerationCache`, it is
        continued.
    kv_memory, self_test
        As in :class:`GenerationCache`; given as keywords of ``generate``.

    Returns
    -------
    Tensor or ModelOutput
        What ``generate`` returns.

    Raises
    ------
    ValueError
        If the model cannot run over a forest, or another kind of cache with tokens in it is to be continued.

    Examples
    --------
    >>> model.generate(**inputs, num_beams=16, custom_generate=generate_over_forest)  # doctest: +SKIP
    """
    given = kwargs.pop("past_key_values", None)
    if not isinstance(given, GenerationCache) and given is not None and given.get_seq_length():
        raise ValueError(f"past_key_values: expected a GenerationCache or an empty cache, got {type(given).__name__}")
    mode = generation_config.get_generation_mode(kwargs.get("assistant_model"))
    loop = getattr(type(model), GENERATION_MODES_MAPPING[mode])
    with _attention_over_forest(model):
        cache = given if isinstance(given, GenerationCache) else None
        if cache is None:
            cache = GenerationCache(model, kv_memory=kv_memory, self_test=self_test)
        return loop(model, input_ids, generation_config=generation_config, past_key_values=cache, **kwargs)


@contextmanager
def _attention_over_forest(model: Any) -> Iterator[None]:
    register()
    before = model.config._attn_implementation
    with following(model.config):
        model.set_attn_implementation(ATTENTION)
        if model.config._attn_implementation != ATTENTION:
            raise ValueError(NOT_PLUGGABLE)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _pack(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before the model's forward."""
    cache = kwargs.get("past_key_values")
    options = {**dict(zip(("input_ids", "attention_mask", "position_ids"), args, strict=False)), **kwargs}
    if not isinstance(cache, GenerationCache):
        if model.config._attn_implementation == ATTENTION and (bound := rotary_bound(model)) is not None:
            _check_bound(options["input_ids"].shape[1], bound)  # some models drop their cache beyond it
        return None
    _check_attention(model)
    if unsupported := [name for name in _UNSUPPORTED if options.get(name) is not None and options[name] is not False]:
        raise ValueError(f"{', '.join(unsupported)}: not supported with a GenerationCache")
    names = ("input_ids", "attention_mask", "position_ids", "logits_to_keep")
    packed = cache.pack(**{name: options.pop(name, None) for name in names})
    return (), {**options, **packed}


def _unpack(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:  # noqa: ARG001
    """After the model's forward."""
    cache = kwargs.get("past_key_values")
    if isinstance(cache, GenerationCache):
        cache.check_layers(type(model).__name__)
        output.logits = cache.unpack(output.logits)
    return output


def _real(attention_mask: Tensor, width: int) -> Tensor:
    """Which of the last ``width`` columns are not padding: bool [B, width] on the CPU."""
    if attention_mask.dim() != 2:
        raise ValueError(f"attention_mask: expected two dimensions, got {list(attention_mask.shape)}")
    return attention_mask[:, -width:].cpu().bool()


def _check_bound(length: int, bound: int) -> None:
    if length > bound:
        raise ValueError(
            f"expected texts of at most {bound} tokens, beyond which this model's rotary embedding turns all tokens of "
            f"a text by its length; got one of {length}"
        )


def _check_attention(model: Any) -> None:
    found = model.config._attn_implementation
    if found != ATTENTION:
        raise ValueError(
            f'attn_implementation: expected "{ATTENTION}", got "{found}": call '
            f'tts_search.models.transformers.register() and model.set_attn_implementation("{ATTENTION}")'
        )

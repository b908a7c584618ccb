"""Runs the decoder models of transformers over a KV forest, through the interfaces that transformers has for this.

:func:`register` adds ``attn_implementation="tts_kernels"``. Its forward is packed and ragged: ``input_ids`` [1, T]
holds the new tokens of many branches, branch after branch, with ``position_ids`` from the forest. A
:class:`ForestCache` takes the place of the KV cache and writes keys and values to the forest's pages. The attention
plan travels as a keyword argument from the model's forward to the attention of every layer. Nothing is padded, no mask
is built, and prefill and decode share a forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

import tts_kernels as tk
from tts_search.models.checkpoint import Checkpoint
from tts_search.models.decoder import Batch, DecoderShape
from tts_search.models.formats.gguf import gguf_config, is_gguf
from tts_search.models.formats.gguf_header import read_header
from tts_search.models.formats.gguf_tokenizer import end_tokens, gguf_tokenizer
from tts_search.models.formats.lora import adapter_config, base_of
from tts_search.models.rotary import context_of, follow_rotary, marked, rotary_bound, rotary_switch

try:
    import transformers
    from transformers.cache_utils import Cache
    from transformers.masking_utils import AttentionMaskInterface, causal_mask_function
    from transformers.modeling_utils import AttentionInterface, PreTrainedModel
except ImportError as error:
    raise ImportError(
        "Models of transformers need the package transformers: pip install 'tts-kernels[search]'"
    ) from error

ATTENTION: Final = "tts_kernels"
_EXPERTS: Final = ("num_experts", "num_local_experts", "n_routed_experts")  # as configurations name their number
NOT_PLUGGABLE: Final = "its attention does not go through transformers' AttentionInterface"
# TRL's wrapper of a model with a value head may have been saved with its own name in front of the model's.
_RENAMED: Final = {r"^pretrained_model\.": ""}
# Keyword arguments of an attention function that change its result in a way that tree_attention cannot follow.
_UNSUPPORTED: Final = ("sinks", "position_bias", "indices", "block_indices")


def register() -> None:
    """Add ``attn_implementation="tts_kernels"`` to transformers. Calling it again changes nothing.

    Examples
    --------
    >>> from transformers import AutoModelForCausalLM
    >>> register()
    >>> model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="tts_kernels")  # doctest: +SKIP
    """
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, _mask)


class ForestCache(Cache):  # type: ignore[misc]
    """The KV cache of transformers over a pool of pages.

    Parameters
    ----------
    kv : tts_kernels.KVCache
        Keys and values of every layer.

    Examples
    --------
    >>> pool = KVPool(model_shape(model), num_pages=256)  # doctest: +SKIP
    >>> root = pool.forest.add_root()  # doctest: +SKIP
    >>> cache = ForestCache(pool.kv)  # doctest: +SKIP
    >>> logits = model(**cache.inputs(pool.pack([root], [token_ids]))).logits  # [1, T, V]  # doctest: +SKIP
    """

    def __init__(self, kv: tk.KVCache) -> None:
        super().__init__(layers=[])
        self.kv = kv
        self._slots: Tensor | None = None
        self.beside = kv.beside(0)
        self.appended = 0
        self.attended = 0
        self.pretended = 0

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Keyword arguments of a model's forward that run ``batch``."""
        self._slots = batch.slots
        self.appended = self.attended = 0
        positions = batch.positions if batch.far is None else marked(batch.positions, batch.far)
        return {
            "input_ids": batch.tokens[None],
            "position_ids": positions[None],
            "past_key_values": self,
            "use_cache": True,
            "plan": batch.plan,
            "forest_cache": self,
        }

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """Write the new keys and values [1, Hkv, T, D] of a layer; return its pages [P, page_size, Hkv, D].

        Raises
        ------
        RuntimeError
            In a forward that was not given this cache's inputs.
        """
        if self._slots is None:
            raise RuntimeError(
                "ForestCache: a plain forward has no slots to write to; call model(**cache.inputs(batch))"
            )
        k_pages, v_pages = self.kv.k[layer_idx], self.kv.v[layer_idx]
        self.beside = self.kv.beside(layer_idx)
        k, v = key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)
        tk.append_kv_(k_pages, v_pages, k, v, self._slots, **self.beside)
        self.appended += 1
        return k_pages, v_pages

    def check_layers(self, model_name: str) -> None:
        """Raise an error if some layer did not use this cache or its attention in the last forward.

        Raises
        ------
        RuntimeError
            With the model's name and the counts.
        """
        expected = len(self.kv.k)
        if (self.appended, self.attended) != (expected, expected):
            raise RuntimeError(
                f"{model_name} wrote {self.appended} and attended {self.attended} of {expected} layers through "
                f'attn_implementation="{ATTENTION}": its attention is not pluggable in every layer'
            )

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """0 or another number that the model must not use: branches differ in length, so position_ids are given."""
        return self.pretended

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:  # noqa: ARG002
        """Sizes of a mask that is never built."""
        return query_length, 0


@dataclass(frozen=True, slots=True)
class _Mask:
    """A description of the mask that the model asked for: causal, with a window of ``window`` keys, or another mask."""

    window: int | None = None
    known: bool = True


def _mask(
    *,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **_: Any,
) -> _Mask:
    """Build no mask, but record which mask the model asks for. It is given as a function of indices.

    A sliding window is recognised by its edges. Any other mask (chunks, a bidirectional prefix) is an error when it is
    used.
    """
    if attention_mask is not None:
        raise ValueError(f'attn_implementation="{ATTENTION}" takes no attention_mask: there is no padding in a forest')
    if mask_function is causal_mask_function:
        return _Mask()
    if local_size is not None and local_size > 0:
        query = 2 * local_size + 1
        keys = torch.tensor([0, query - local_size, query - local_size + 1, query, query + 1])
        zero = torch.tensor(0)
        seen = mask_function(zero, zero, torch.tensor(query), keys)
        if seen.tolist() == [False, False, True, True, False]:
            return _Mask(local_size)
    return _Mask(known=False)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: _Mask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    plan: tk.AttentionPlan | None = None,
    forest_cache: ForestCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """tree_attention of query [1, Hq, T, D] over the pages that `ForestCache.update` returned -> [1, T, Hq, D].

    ``s_aux`` [Hq] are attention sinks, as in GPT-OSS.
    """
    if plan is None or forest_cache is None:
        raise RuntimeError(
            f'attn_implementation="{ATTENTION}" runs as model(**cache.inputs(batch)) with a ForestCache; '
            f"{type(module).__name__} was called without a plan (or its model drops keyword arguments)"
        )
    if dropout or isinstance(attention_mask, Tensor):
        raise ValueError(f'attn_implementation="{ATTENTION}" takes no attention_mask and no dropout')
    # Some models pass a window but do not mask it, or the other way round. As in their eager attention, the mask
    # decides.
    mask = _Mask(sliding_window) if attention_mask is None else attention_mask
    if not mask.known:
        raise ValueError(f"{type(module).__name__}: expected a causal mask or a sliding window, got another one")
    if unsupported := [name for name in _UNSUPPORTED if kwargs.get(name) is not None]:
        raise ValueError(f"{type(module).__name__}: attention with {', '.join(unsupported)} is not supported")
    forest_cache.attended += 1
    out = tk.tree_attention(
        query[0].transpose(0, 1),
        key,
        value,
        plan,
        scale=scaling,
        softcap=softcap or 0.0,
        window=mask.window,
        sinks=None if s_aux is None else s_aux.float().contiguous(),
        **forest_cache.beside,
    )
    return out[None], None


class TransformersDecoder:
    """A model of transformers as a :class:`tts_search.models.decoder.Decoder`.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model, or a bare decoder (then without logits), loaded with
        ``attn_implementation="tts_kernels"``.

    Attributes
    ----------
    The cache's answer when the model asks for its length. No output may depend on it.
        What the cache says when the model asks for its length, which nothing may depend on.

    Raises
    ------
    ValueError
        If the model has an attention that cannot be replaced by this one; the message names it.
    """

    records = False  # some models read values back to the host

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.pretended = 0
        follow_rotary(model, ATTENTION)
        self.shape = model_shape(model)
        self.device = torch.device(model.device)
        self.dtype: torch.dtype = model.dtype
        self._cache: ForestCache | None = None

    @torch.inference_mode()
    def hidden(self, batch: Batch, kv: tk.KVCache, rows: Tensor | None = None) -> Tensor:
        """Final hidden states [R, H] of the batch's rows, after the last norm."""
        cache = self._cache_of(kv)
        states: Tensor = body_of(self.model)(**cache.inputs(batch)).last_hidden_state[0]
        cache.check_layers(type(self.model).__name__)
        return states if rows is None else states.index_select(0, rows)

    @torch.inference_mode()
    def logits(self, batch: Batch, kv: tk.KVCache, rows: Tensor | None = None) -> Tensor:
        """Logits [R, V] of the batch's rows."""
        cache = self._cache_of(kv)
        logits: Tensor = self.model(**cache.inputs(batch), logits_to_keep=0 if rows is None else rows).logits[0]
        cache.check_layers(type(self.model).__name__)
        return logits

    def _cache_of(self, kv: tk.KVCache) -> ForestCache:
        if self._cache is None or self._cache.kv is not kv:
            self._cache = ForestCache(kv)
        self._cache.pretended = self.pretended
        return self._cache


def load_transformers(
    path_or_id: str,
    *,
    causal_lm: bool = True,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> TransformersDecoder:
    """Load a checkpoint (folder or hub id) with attention over the forest; ``causal_lm=False`` leaves its head out.

    By default the checkpoint's dtype, on a GPU if there is one.

    Raises
    ------
    ValueError
        If the model cannot run over a forest, or the checkpoint lacks weights; the message says which.
    """
    register()
    config = load_config(path_or_id)
    auto = transformers.AutoModelForCausalLM if causal_lm else transformers.AutoModel
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()  # a search has its own progress bar
    if not causal_lm:
        transformers.logging.set_verbosity_error()  # it would warn that the head is missing, which is loaded separately
    try:
        with following(config):
            model, loading = auto.from_pretrained(
                path_or_id,
                dtype=dtype or "auto",
                attn_implementation=ATTENTION,
                output_loading_info=True,
                key_mapping=_RENAMED,
            )
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"{path_or_id}: found no {', '.join(missing)} in the checkpoint")
    model.requires_grad_(False)
    with following(config):
        return TransformersDecoder(model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")))


@contextmanager
def following(config: Any) -> Iterator[None]:
    """Turn errors in this context into an error that the model cannot run over a forest, and why.

    Raises
    ------
    ValueError
        With the model's path if it has one, its type and the reason. File errors, lack of memory and Ctrl-C are not
        changed.
    """
    try:
        yield
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, KeyError) and error.args == (ATTENTION,):
            reason = NOT_PLUGGABLE
        elif isinstance(error, (ValueError, RuntimeError)):
            reason = str(error).partition(". ")[0]
        where = f"{config.name_or_path}: " if config.name_or_path else ""
        raise ValueError(f"{where}models of type {config.model_type!r} do not run over a forest: {reason}") from error


def body_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that gives hidden states. Causal language models name it differently."""
    base = model.base_model
    if base is not model or model.get_output_embeddings() is None:
        return base
    return next((part for part in model.children() if isinstance(part, PreTrainedModel)), model)


def model_shape(model: PreTrainedModel) -> DecoderShape:
    """Sizes of a model of transformers; ValueError if it cannot run over a forest."""
    config = model.config.get_text_config(decoder=True)
    _check_supported(model, config)
    num_heads = config.num_attention_heads
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    shared = head is not None and head.weight is embedding.weight
    total = _active_parameters(model, config)
    bound, switch = rotary_bound(model), rotary_switch(model)
    max_length = context_of(config) if bound is None else bound
    head_parameters = 0 if head is None else head.weight.numel()
    return DecoderShape(
        num_layers=config.num_hidden_layers,
        num_q_heads=num_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        max_length=max_length,
        body_parameters=total - embedding.weight.numel() - (0 if shared else head_parameters),
        head_parameters=head_parameters,
        switch=switch if switch is not None and switch < max_length else None,
    )


def _active_parameters(model: PreTrainedModel, config: Any) -> int:
    """Number of weights used for a token; in a mixture of experts, only those of the chosen experts."""
    chosen = getattr(config, "num_experts_per_tok", None)
    experts = next((n for name in _EXPERTS if (n := getattr(config, name, None))), None)
    share = chosen / experts if chosen and experts else 1.0
    sizes = ((".experts." in name, parameter.numel()) for name, parameter in model.named_parameters())
    total: float = sum(share * size if expert else size for expert, size in sizes)
    return round(total)


def _check_supported(model: PreTrainedModel, config: Any) -> None:
    name = type(model).__name__
    if not model._supports_attention_backend:
        raise ValueError(f"{name}: {NOT_PLUGGABLE}")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name}: expected a decoder-only model, got an encoder-decoder")
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if others:
        raise ValueError(f"{name}: expected layers of full or sliding attention, got {', '.join(sorted(others))}")
    head_dim, v_head_dim = getattr(config, "head_dim", None), getattr(config, "v_head_dim", None)
    if v_head_dim is not None and v_head_dim != head_dim:
        raise ValueError(f"{name}: expected keys and values of one head size, got v_head_dim {v_head_dim}")


def load_tokenizer(path_or_id: str) -> Any:
    """The fast tokenizer of a checkpoint.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    ValueError
        If there is only a slow one: offsets of tokens in the text are needed.
    """
    _check_exists(path_or_id)
    if is_gguf(path_or_id):
        return gguf_tokenizer(read_header(path_or_id))
    own = Checkpoint(path_or_id).file("tokenizer.json") is not None
    tokenizer = transformers.AutoTokenizer.from_pretrained(path_or_id if own else base_of(path_or_id))
    if not tokenizer.is_fast:
        raise ValueError(f"{path_or_id}: expected a fast tokenizer (tokenizer.json), got {type(tokenizer).__name__}")
    return tokenizer


def load_config(path_or_id: str) -> Any:
    """The configuration of a checkpoint; FileNotFoundError if there is no such folder."""
    _check_exists(path_or_id)
    if is_gguf(path_or_id):
        return gguf_config(read_header(path_or_id))
    config = transformers.AutoConfig.from_pretrained(base_of(path_or_id))
    adapter = adapter_config(Checkpoint(path_or_id))
    if adapter is not None and adapter.get("task_type") == "TOKEN_CLS":  # what the adapter made of the model
        names = config.architectures or ()
        config.architectures = [name.replace("ForCausalLM", "ForTokenClassification") for name in names]
    return config


def _check_exists(path_or_id: str) -> None:
    """Raise an error for a path that does not exist, so that it is not looked up on the hub."""
    if is_gguf(path_or_id):
        if not Path(path_or_id).is_file():
            raise FileNotFoundError(f"path_or_id: expected a GGUF file, got {path_or_id!r}")
    elif path_or_id.startswith((".", "/", "~")) and not Path(path_or_id).is_dir():
        raise FileNotFoundError(f"path_or_id: expected the folder of a checkpoint or a hub id, got {path_or_id!r}")


def eos_tokens(path_or_id: str, tokenizer: Any) -> frozenset[int]:
    """The ids that end an answer, from the generation config (or else the model's config) and the tokenizer."""
    if is_gguf(path_or_id):
        return frozenset(end_tokens(read_header(path_or_id)))
    try:
        generation = transformers.GenerationConfig.from_pretrained(base_of(path_or_id))
    except OSError:
        generation = transformers.GenerationConfig.from_model_config(load_config(path_or_id))
    ids: set[int] = set()
    for value in (generation.eos_token_id, tokenizer.eos_token_id):
        ids.update(value if isinstance(value, Sequence) else () if value is None else (value,))
    return frozenset(ids)

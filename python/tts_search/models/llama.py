"""A lean decoder for the Llama family (Llama, Mistral, Qwen2, Qwen3) over packed weights and a KV forest.

It computes ::

    x = embed[tokens]
    x = x + o(attend(rope(qkv(norm(x)))))            in each layer
    x = x + down(swiglu(gate_up(norm(x))))
    hidden = norm(x), logits = lm_head(hidden)       for the rows that are asked for

Weights are packed when the model is loaded, projections that read the same rows are one, a plan serves all layers, and
all layers are one call (`tts_kernels.decoder_layers_`). Nothing mixes rows, except that attention reads the keys and
values of a row's own branch; see `LlamaDecoder` for what follows from that.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields, replace
from typing import Final, Literal

import torch
from torch import Tensor

import tts_kernels as tk
from tts_search.models.arena import Arena
from tts_search.models.block_cache import BlockCache
from tts_search.models.decoder import Batch, DecoderShape
from tts_search.models.quantised import Loader, Quantised, Weight, join, pack

__all__ = ["INT4_GROUP", "LlamaConfig", "LlamaDecoder", "Quantize"]

Quantize = Literal["int8", "int4"]
INT4_GROUP: Final = 32  # columns that share a scale in 4 bits


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """The parameters of a model that are not in its weights.

    Attributes
    ----------
    num_q_heads, num_kv_heads : int
        The same in every layer.
    eps : float
        The epsilon of every RMSNorm.
    windows : tuple of (int or None)
        Sliding window of each layer's attention; None: there is none.
    cos_sin : Tensor
        [max_length, D] float32: cosines of the rotary angles of a position, then sines, with the rope's scaling in it.
    """

    num_q_heads: int
    num_kv_heads: int
    eps: float
    windows: tuple[int | None, ...]
    cos_sin: Tensor


class LlamaDecoder:
    """A model of the Llama family as a :class:`tts_search.models.decoder.Decoder`.

    On a CPU the linear layers, norms and rotations of a row do not depend on the other rows of a batch, to the bit.
    Attention may differ by rounding, if the plan splits a row's keys at other places because of the other rows. A
    forward on a GPU reads nothing back to the host, so it can be recorded.

    Parameters
    ----------
    config : LlamaConfig
        Heads, windows, rope.
    state : dict
        The weights, or functions that load them, by their names in transformers, without the prefix ``"model."``. They
        are removed one by one as they are packed, so that memory holds the model once. Logits need an
        ``"lm_head.weight"``.
    quantize : {"int8", "int4"} or None
        Quantise the projections and the head: to 8 bits with one scale for each row, or to 4 bits with one for 32
        columns. Norms and the embedding are not changed, nor are weights that already have few bits.
    dtype : torch.dtype or None
        The dtype of everything that is not quantised; None: unchanged.

    Raises
    ------
    KeyError
        If a weight is missing.
    ValueError
        If a tensor is left over: then the model has a part that this decoder does not know.
    """

    records = True

    def __init__(
        self,
        config: LlamaConfig,
        state: dict[str, Tensor | Loader],
        quantize: Quantize | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.config = config
        weights = _Weights(state, quantize, dtype)
        tied = weights.same("lm_head.weight", "embed_tokens.weight")
        self._head = weights.packed("lm_head") if "lm_head.weight" in state else None
        # An embedding that is tied to the head is gathered from the head, so memory holds it once. This is not done if
        # the head has few bits, because the embedding is not quantised.
        if tied and self._head is not None and self._head.scale is None:
            del state["embed_tokens.weight"]
        self._embedding = weights.find("embed_tokens.weight")
        self.layers = tk.DecoderLayers([weights.layer(i, window) for i, window in enumerate(config.windows)])
        self._norm = weights.take("norm.weight")
        if state:
            raise ValueError(f"state: expected the weights of a Llama, got {', '.join(sorted(state))} besides")
        self.device, self.dtype = self._norm.device, self._norm.dtype
        max_length, head_dim = config.cos_sin.shape
        self.shape = DecoderShape(
            num_layers=len(self.layers),
            num_q_heads=config.num_q_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=head_dim,
            max_length=max_length,
            body_parameters=sum(_size(layer) for layer in self.layers.layers) + self._norm.numel(),
            head_parameters=0 if self._head is None else self._head.in_features * self._head.out_features,
        )

    @property
    def hidden_size(self) -> int:
        """Number of elements of a hidden state."""
        return self._norm.numel()

    @torch.inference_mode()
    def hidden(self, batch: Batch, kv: tk.KVCache, rows: Tensor | None = None) -> Tensor:
        """Final hidden states [R, H] of the batch's rows, after the last norm."""
        eps, x = self.config.eps, self.embed(batch.tokens)
        if isinstance(kv, BlockCache):
            return tk.rms_norm(kv.run(x, batch, self.config.cos_sin, eps, rows), self._norm, eps)[0]
        x = tk.decoder_layers_(
            x,
            self.layers,
            kv.k,
            kv.v,
            batch.plan,
            batch.positions,
            self.config.cos_sin,
            batch.slots,
            eps=eps,
            rows=rows,
            k_scales=kv.k_scale,
            v_scales=kv.v_scale,
            k_zeros=kv.k_zero,
            v_zeros=kv.v_zero,
        )
        return tk.rms_norm(x, self._norm, eps)[0]

    @torch.inference_mode()
    def logits(self, batch: Batch, kv: tk.KVCache, rows: Tensor | None = None) -> Tensor:
        """Logits [R, V] of the batch's rows.

        Raises
        ------
        ValueError
            If the model was loaded without its head.
        """
        if self._head is None:
            raise ValueError("logits: this decoder was loaded without its LM head")
        return tk.linear(self.hidden(batch, kv, rows), self._head)

    def first_layers(self, count: int) -> LlamaDecoder:
        """A decoder with only the first layers of this one. It shares their weights."""
        shorter = copy.copy(self)
        shorter.layers = tk.DecoderLayers(self.layers.layers[:count])
        shorter.shape = replace(self.shape, num_layers=len(shorter.layers))
        return shorter

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings [T, H] of tokens [T]."""
        if self._embedding is not None:
            return self._embedding.index_select(0, tokens)
        assert self._head is not None
        return _rows(self._head, tokens)


def _rows(packed: tk.PackedLinear, rows: Tensor) -> Tensor:
    """Rows [R, K] of a packed weight."""
    if packed.weight.dim() == 2:
        return packed.weight.index_select(0, rows)
    # [panels, steps, lanes, numbers of a step]: the numbers of a lane in a step are one word. `gather` of a vector runs
    # on this thread. An op on torch's own threads would leave them spinning on the cores that the kernels' threads
    # need.
    _, steps, lanes, width = packed.weight.shape
    words = packed.weight if width == 1 else packed.weight.view(torch.int32)
    first = rows // lanes * (steps * lanes) + rows % lanes
    each = first[:, None] + torch.arange(0, steps * lanes, lanes)
    found = words.flatten().gather(0, each.flatten()).view(packed.weight.dtype)
    return found.view(len(rows), -1)[:, : packed.in_features]


class _Weights:
    """Takes tensors out of a state dict. On a CPU they are copied, because they may be views of a mapped file."""

    def __init__(self, state: dict[str, Tensor | Loader], quantize: Quantize | None, dtype: torch.dtype | None) -> None:
        self.state = state
        self.quantize = quantize
        self.dtype = dtype
        self.arena = Arena()

    def same(self, *names: str) -> bool:
        """Whether these names are names of one and the same weight."""
        found = [self.state.get(name) for name in names]
        return None not in found and len({each.data_ptr() if isinstance(each, Tensor) else each for each in found}) == 1

    def take(self, name: str) -> Tensor:
        return self._kept(self._whole(self._loaded(name)))

    def find(self, name: str) -> Tensor | None:
        return self.take(name) if name in self.state else None

    def packed(self, *names: str) -> tk.PackedLinear:
        """The projections of these names as one. They have the same input rows."""
        weight = join([self._loaded(f"{name}.weight") for name in names], self.dtype)
        if self.quantize is None:
            weight = weight if isinstance(weight, Quantised) else self._whole(weight)
        packed = pack(weight, self.quantize, INT4_GROUP if self.quantize == "int4" else None)
        scale, zero = (None if part is None else self._kept(part) for part in (packed.scale, packed.zero))
        return replace(packed, weight=self._kept(packed.weight), scale=scale, zero=zero)

    def bias(self, *names: str) -> Tensor | None:
        """Their biases. Either all of them have one, or none."""
        if f"{names[0]}.bias" not in self.state:
            return None
        return self._kept(torch.cat([self._whole(self._loaded(f"{name}.bias")) for name in names]))

    def _loaded(self, name: str) -> Weight:
        found = self.state.pop(name)
        return found.detach() if isinstance(found, Tensor) else found()

    def _whole(self, weight: Weight) -> Tensor:
        if isinstance(weight, Quantised):
            return weight.dequantised(self.dtype or torch.float32)
        return weight if self.dtype is None else weight.to(self.dtype)

    def _kept(self, tensor: Tensor) -> Tensor:
        return self.arena.keep(tensor) if tensor.device.type == "cpu" else tensor.contiguous()

    def layer(self, number: int, window: int | None) -> tk.DecoderLayer:
        layer = f"layers.{number}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        qkv, gate_up = [f"{attention}.{name}_proj" for name in "qkv"], [f"{mlp}.gate_proj", f"{mlp}.up_proj"]
        return tk.DecoderLayer(
            input_norm=self.take(f"{layer}.input_layernorm.weight"),
            qkv=self.packed(*qkv),
            qkv_bias=self.bias(*qkv),
            q_norm=self.find(f"{attention}.q_norm.weight"),
            k_norm=self.find(f"{attention}.k_norm.weight"),
            o=self.packed(f"{attention}.o_proj"),
            o_bias=self.bias(f"{attention}.o_proj"),
            post_norm=self.take(f"{layer}.post_attention_layernorm.weight"),
            gate_up=self.packed(*gate_up),
            gate_up_bias=self.bias(*gate_up),
            down=self.packed(f"{mlp}.down_proj"),
            down_bias=self.bias(f"{mlp}.down_proj"),
            window=window,
        )


def _size(layer: tk.DecoderLayer) -> int:
    """Number of weights of a layer, without the padding of its panels."""
    parts = [getattr(layer, item.name) for item in fields(layer)]
    packed = sum(part.in_features * part.out_features for part in parts if isinstance(part, tk.PackedLinear))
    return packed + sum(part.numel() for part in parts if isinstance(part, Tensor))

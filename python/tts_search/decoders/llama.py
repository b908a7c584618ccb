"""A lean decoder for the Llama family (Llama, Mistral, Qwen2, Qwen3) over packed weights and a KV forest::

    x = embed[tokens]
    x = x + o(attend(rope(qkv(norm(x)))))            in each layer
    x = x + down(swiglu(gate_up(norm(x))))
    hidden = norm(x), logits = lm_head(hidden)       for the rows that are asked for

Nine kernels a layer and nothing between them: weights are packed when the model is loaded, projections that read the
same rows are one, and a plan serves all layers. No kernel mixes rows, except that attention reads the keys and values
of a row's own branch; see `LlamaDecoder` for what follows from that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import tts_kernels as tk
from tts_search.decoder import Batch, DecoderShape
from tts_search.decoders.arena import Arena

__all__ = ["LlamaConfig", "LlamaDecoder"]


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """What the weights of a model do not say.

    Attributes
    ----------
    num_q_heads, num_kv_heads : int
        Of every layer.
    eps : float
        Of every RMSNorm.
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


@dataclass(frozen=True, slots=True)
class _Linear:
    """A packed projection, of one or more weights that read the same rows."""

    weight: tk.PackedLinear
    bias: Tensor | None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return tk.linear(x, self.weight, self.bias, residual)

    @property
    def size(self) -> int:
        biases = 0 if self.bias is None else self.bias.numel()
        return self.weight.in_features * self.weight.out_features + biases


@dataclass(frozen=True, slots=True)
class _Layer:
    """The weights of a layer."""

    window: int | None
    input_norm: Tensor
    qkv: _Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: _Linear
    post_norm: Tensor
    gate_up: _Linear
    down: _Linear

    @property
    def size(self) -> int:
        norms = (self.input_norm, self.q_norm, self.k_norm, self.post_norm)
        linears = (self.qkv, self.o, self.gate_up, self.down)
        return sum(norm.numel() for norm in norms if norm is not None) + sum(linear.size for linear in linears)


class LlamaDecoder:
    """A model of the Llama family as a :class:`tts_search.decoder.Decoder`.

    The linear layers, norms and rotations of a row do not depend on the other rows of a batch, to the bit; attention
    does as far as the plan cuts a row's keys elsewhere in other company.

    Parameters
    ----------
    config : LlamaConfig
        Heads, windows, rope.
    state : dict
        The weights by their names in transformers, without the prefix ``"model."``. Taken out one by one as they are
        packed, so that memory holds the model once. With an ``"lm_head.weight"`` there are logits.

    Raises
    ------
    KeyError
        If a weight is missing.
    ValueError
        If a tensor is left over: the model has a part that this decoder does not know.
    """

    def __init__(self, config: LlamaConfig, state: dict[str, Tensor]) -> None:
        self.config = config
        weights = _Weights(state)
        # An embedding that is tied to the head is gathered from there: memory holds it once.
        if "lm_head.weight" in state and state["lm_head.weight"].data_ptr() == state["embed_tokens.weight"].data_ptr():
            del state["embed_tokens.weight"]
        self._embedding = weights.find("embed_tokens.weight")
        self._head = weights.linear("lm_head") if "lm_head.weight" in state else None
        self._layers = [weights.layer(i, window) for i, window in enumerate(config.windows)]
        self._norm = weights.take("norm.weight")
        if state:
            raise ValueError(f"state: expected the weights of a Llama, got {', '.join(sorted(state))} besides")
        self.device, self.dtype = self._norm.device, self._norm.dtype
        max_length, head_dim = config.cos_sin.shape
        self.shape = DecoderShape(
            num_layers=len(self._layers),
            num_q_heads=config.num_q_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=head_dim,
            max_length=max_length,
            body_parameters=sum(layer.size for layer in self._layers) + self._norm.numel(),
            head_parameters=0 if self._head is None else self._head.size,
        )

    @torch.inference_mode()
    def hidden(self, batch: Batch, kv: tk.KVCache, rows: Tensor | None = None) -> Tensor:
        """Final hidden states [R, H] of the batch's rows, behind the last norm."""
        config, last = self.config, self._layers[-1]
        x = self._embed(batch.tokens)
        for layer, k, v in zip(self._layers, kv.k, kv.v, strict=True):
            q = tk.rope_append_(
                layer.qkv(tk.rms_norm(x, layer.input_norm, config.eps)[0]),
                k,
                v,
                batch.positions,
                config.cos_sin,
                batch.slots,
                num_q_heads=config.num_q_heads,
                num_kv_heads=config.num_kv_heads,
                q_norm=layer.q_norm,
                k_norm=layer.k_norm,
                eps=config.eps,
            )
            attended = tk.tree_attention(q, k, v, batch.plan, window=layer.window).flatten(1)
            if layer is last and rows is not None:  # nobody reads the others any more
                attended, x = attended.index_select(0, rows), x.index_select(0, rows)
            x = layer.o(attended, residual=x)
            x = layer.down(tk.swiglu(layer.gate_up(tk.rms_norm(x, layer.post_norm, config.eps)[0])), residual=x)
        return tk.rms_norm(x, self._norm, config.eps)[0]

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
        return self._head(self.hidden(batch, kv, rows))

    def head_rows(self, tokens: Sequence[int]) -> tuple[Tensor, None]:
        """Rows [len(tokens), H] of the LM head, which has no bias; ValueError if it was not loaded."""
        if self._head is None:
            raise ValueError("head_rows: this decoder was loaded without its LM head")
        return _rows(self._head.weight, torch.tensor(tokens)), None

    def _embed(self, tokens: Tensor) -> Tensor:
        """Embeddings [T, H] of tokens [T]."""
        if self._embedding is not None:
            return self._embedding.index_select(0, tokens)
        assert self._head is not None
        return _rows(self._head.weight, tokens)


def _rows(packed: tk.PackedLinear, rows: Tensor) -> Tensor:
    """Rows [R, K] of a packed weight."""
    return packed.weight[rows // 16, :, rows % 16].flatten(1)[:, : packed.in_features]


class _Weights:
    """Takes tensors out of a state dict and into memory of our own: they may be views of a mapped file."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state
        self.arena = Arena()

    def take(self, name: str) -> Tensor:
        return self.arena.keep(self.state.pop(name).detach())

    def find(self, name: str) -> Tensor | None:
        return self.take(name) if name in self.state else None

    def linear(self, *names: str) -> _Linear:
        """The projections of these names as one; all of them have a bias, or none."""
        packed = tk.pack_linear(self._joined([f"{name}.weight" for name in names]))
        biased = f"{names[0]}.bias" in self.state
        bias = self.arena.keep(self._joined([f"{name}.bias" for name in names])) if biased else None
        return _Linear(replace(packed, weight=self.arena.keep(packed.weight)), bias)

    def _joined(self, names: Sequence[str]) -> Tensor:
        return torch.cat([self.state.pop(name).detach() for name in names])

    def layer(self, number: int, window: int | None) -> _Layer:
        layer = f"layers.{number}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        return _Layer(
            window=window,
            input_norm=self.take(f"{layer}.input_layernorm.weight"),
            qkv=self.linear(*(f"{attention}.{name}_proj" for name in "qkv")),
            q_norm=self.find(f"{attention}.q_norm.weight"),
            k_norm=self.find(f"{attention}.k_norm.weight"),
            o=self.linear(f"{attention}.o_proj"),
            post_norm=self.take(f"{layer}.post_attention_layernorm.weight"),
            gate_up=self.linear(f"{mlp}.gate_proj", f"{mlp}.up_proj"),
            down=self.linear(f"{mlp}.down_proj"),
        )

"""What a block cache stores of a token in a layer instead of its keys and values.

Keys and values of few bits, with a scale of its own for each channel of the keys (KVQuant, arXiv 2401.18079; KIVI,
arXiv 2402.02750):

* ``"channels"``: a few channels of the keys are large for all tokens. They would set the scale of a whole head. So the
  keys, before their rotation, have a scale and a zero for each channel over a block of tokens; a rotation would mix
  the large channels with others. The values have a scale and a zero for each head of a token, or for equal parts of
  it, if heads have more than 128 channels.

The X cache (XQuant, arXiv 2508.10395): keys and values are linear in x, the layer's input after its norm. So they can
be made again from few bits of x. There are three ways to store x:

* ``"whole"``: x itself, if it is no wider than the keys.
* ``"latents"``: if there are fewer KV heads than query heads, x is wider than keys and values together. With the
  singular value decompositions ``W_k = U_k S_k B_k^T`` and ``W_v = U_v S_v B_v^T``, all information is in ``x U_k`` and
  ``x U_v``, which are as wide as keys and values. Values are quantised token by token. For the keys, each column has a
  scale of its own over a block of tokens, because the large numbers of all tokens are in the same columns. A factor and
  an offset of a column then change nothing. So ``k B_k``, of the keys before their rotation and with bias and norm of
  the heads, is as good as ``x U_k``.
* ``"change"``: x changes little from layer to layer. So the difference from the sum that the layers before have stored
  is stored; if ``[W_k | W_v] = U S B^T`` makes ``x U`` narrower than x, the difference of ``x U``. The first layers are
  stored in one of the two ways above, in 4 bits. The last of these is stored as ``"whole"``, because the first
  difference is one from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Protocol

import torch
from torch import Tensor

import tts_kernels as tk

__all__ = [
    "BLOCK",
    "KINDS",
    "Blocks",
    "Channels",
    "Format",
    "KeptLayer",
    "Latents",
    "Quantiser",
    "formats_of",
    "kept_layers",
]

BLOCK: Final = 128  # tokens
KINDS: Final = (
    "int4-channel", "int3-channel", "int2-channel",
    "xquant-8", "xquant-4", "xquant-3", "xquant-2", "xquant-cl-4", "xquant-cl-3", "xquant-cl-2",
)  # fmt: skip
_BASE: Final = 2  # the first change is relative to this layer; it and those before it have 4 bits


@dataclass(frozen=True, slots=True)
class Quantiser:
    """Stores rows of ``width`` numbers, in ``parts`` that share no scale, as bytes: `tts_kernels.quantize_rows`."""

    width: int
    bits: int
    parts: int = 1

    @property
    def group(self) -> int:
        """Number of columns that share a scale: the largest divisor of a part's width, up to 128."""
        return max(size for size in range(1, 129) if self.width // self.parts % size == 0)

    @property
    def nbytes(self) -> int:
        """Number of bytes of a row."""
        return tk.row_bytes(self.width, self.bits, self.group)

    def encode(self, x: Tensor) -> Tensor:
        """Bytes [N, nbytes] of rows [N, width]."""
        return tk.quantize_rows(x, self.bits, self.group)

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows [N, width] of bytes."""
        return tk.dequantize_rows(rows, self.width, self.bits, self.group, dtype)


@dataclass(frozen=True, slots=True)
class Format:
    """The stored form of a layer.

    Attributes
    ----------
    kind : {"channels", "whole", "latents", "change"}
    row : Quantiser
        How each token is stored; of ``"channels"`` and ``"latents"`` its values only.
    key : Quantiser or None
        How each column of a block's keys is stored.
    columns : int
        The number of these columns.
    """

    kind: str
    row: Quantiser
    key: Quantiser | None = None
    columns: int = 0

    @property
    def token_bytes(self) -> float:
        """Bytes for a token, including its share of the block's."""
        return self.row.nbytes + (self.columns * self.key.nbytes / BLOCK if self.key else 0)

    @property
    def window_bytes(self) -> int:
        """Bytes stored for a token before its block is full, beside its keys and values."""
        return 0 if self.kind == "channels" else self.row.nbytes


def formats_of(kind: str, num_layers: int, hidden: int, num_kv_heads: int, head_dim: int) -> list[Format]:
    """The format of each layer, for a name of `KINDS`.

    ``hidden``, ``num_kv_heads`` and ``head_dim`` are the number of elements of a hidden state, of KV heads, and of
    elements of a head.
    """
    kv_width = num_kv_heads * head_dim
    if kind.endswith("-channel"):
        bits = int(kind[len("int")])
        values, keys = Quantiser(kv_width, bits, num_kv_heads), Quantiser(BLOCK, bits)
        return [Format("channels", values, keys, kv_width)] * num_layers
    bits = int(kind.rpartition("-")[2])

    def plain(bits: int) -> Format:
        if hidden <= kv_width:
            return Format("whole", Quantiser(hidden, bits))
        return Format("latents", Quantiser(kv_width, bits), Quantiser(BLOCK, bits), kv_width)

    if not kind.startswith("xquant-cl-"):
        return [plain(bits)] * num_layers
    first = [plain(4)] * _BASE + [Format("whole", Quantiser(hidden, 4))]
    change = Format("change", Quantiser(min(hidden, 2 * kv_width), bits))
    return (first + [change] * (num_layers - len(first)))[:num_layers]


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of a layer that are to be restored.

    Attributes
    ----------
    rows, keys : Tensor
        [B, BLOCK, n], [B, columns, m]: all that is stored, by tokens and by columns of keys.
    chosen : Tensor
        [n]: these of the B blocks.
    k, v : Tensor
        Pages for keys and values.
    positions, slots : Tensor
        [n BLOCK]: the positions of their tokens in their branches, and the slots for their keys and values.
    cos_sin, eps
        As for `tts_kernels.rope_append_`.
    """

    rows: Tensor
    keys: Tensor
    chosen: Tensor
    k: Tensor
    v: Tensor
    positions: Tensor
    slots: Tensor
    cos_sin: Tensor
    eps: float

    def chosen_rows(self) -> Tensor:
        """[n BLOCK, bytes]."""
        return self.rows.index_select(0, self.chosen).flatten(0, 1)

    def append(self, heads: Tensor, k_norm: Tensor | None = None) -> None:
        """Write keys and values of ``heads`` [n BLOCK, (1 + 2 Hkv) D], behind a query head that nobody reads."""
        tk.rope_append_(
            heads, self.k, self.v, self.positions, self.cos_sin, self.slots, num_q_heads=1,
            num_kv_heads=self.k.shape[2], k_norm=k_norm, eps=self.eps,
        )  # fmt: skip


class KeptLayer(Protocol):
    """Encodes tokens in a layer, and restores their keys and values. ``one`` has only this layer."""

    format: Format
    one: tk.DecoderLayers

    def encode(self, hidden: Tensor, eps: float, before: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Bytes [T, window_bytes] of new tokens, and x as decoded from them.

        ``hidden`` [T, H] is the input of the layer, before its norm. ``before`` is the decoded x of the layer before.
        """
        ...

    def restore(self, blocks: Blocks, before: Tensor | None) -> Tensor | None:
        """Write the keys and values of blocks to their slots. Returns x as decoded; ``before`` as for `encode`."""
        ...


def kept_layers(
    kind: str, layers: tk.DecoderLayers, num_kv_heads: int, head_dim: int, quantiser: type[Quantiser] = Quantiser
) -> list[KeptLayer]:
    """The stored form of each layer of a decoder. ``quantiser`` makes the objects that encode rows.

    Raises
    ------
    ValueError
        If sizes do not fit together.
    """
    hidden, width = layers.layers[0].qkv.in_features, num_kv_heads * head_dim
    sizes = {"keys": width}
    if not kind.endswith("-channel"):
        sizes = {"hidden states": hidden, **sizes, "heads": head_dim}
    for name, size in sizes.items():
        if size % 16:
            raise ValueError(f"kv_dtype: expected no {kind} for {name} of {size} elements, not a multiple of 16")
    made: list[KeptLayer] = []
    for layer, form in zip(layers.layers, formats_of(kind, len(layers), hidden, num_kv_heads, head_dim), strict=True):
        key = form.key and quantiser(form.key.width, form.key.bits)
        form = replace(form, row=quantiser(form.row.width, form.row.bits, form.row.parts), key=key)
        made.append(_KEPT[form.kind](form, layer, width, head_dim))
    return made


class Channels:
    """Stores keys and values themselves, when a block is full."""

    def __init__(self, form: Format, layer: tk.DecoderLayer, width: int, head_dim: int) -> None:  # noqa: ARG002
        self.format, self.one = form, tk.DecoderLayers([layer])

    def encode(self, hidden: Tensor, eps: float, before: Tensor | None) -> tuple[Tensor, Tensor | None]:  # noqa: ARG002
        """No bytes: a token's values wait in the window, as its keys do."""
        return hidden.new_empty(len(hidden), 0, dtype=torch.uint8), before

    def encode_blocks(self, rows: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Bytes of full blocks, by tokens [m, BLOCK, bytes] and by columns of their keys [m, columns, bytes].

        They are made of those from `encode`, and of keys before their rotation and values, both [m, BLOCK, Hkv D].
        """
        assert self.format.key is not None
        return self.format.row.encode(v.flatten(0, 1)).view(*v.shape[:2], -1), _by_columns(self.format.key, k)

    def restore(self, blocks: Blocks, before: Tensor | None) -> Tensor | None:
        """By the numbers that are stored."""
        form = self.format.row
        tk.restore_kv_(
            blocks.keys, blocks.rows, blocks.chosen, blocks.k, blocks.v, blocks.positions, blocks.cos_sin, blocks.slots,
            bits=form.bits, group_size=form.group,
        )  # fmt: skip
        return before


class Latents:
    """Stores keys and values in the bases of their singular vectors."""

    def __init__(self, form: Format, layer: tk.DecoderLayer, width: int, head_dim: int) -> None:
        self.format, self.one = form, tk.DecoderLayers([layer])
        self._norm, self._head_dim, self._dtype = layer.input_norm, head_dim, layer.input_norm.dtype
        _, _, key_basis = _svd(_rows(layer.qkv, -2 * width, -width))
        u, s, value_basis = _svd(_rows(layer.qkv, -width))
        self._to_keys = tk.pack_linear(key_basis.float().contiguous())
        self._of_keys = tk.pack_linear(key_basis.T.to(self._dtype).contiguous())
        self._to_values = tk.pack_linear(u.T.to(self._dtype).contiguous())
        self._of_values = tk.pack_linear((s[:, None] * value_basis).T.to(self._dtype).contiguous())
        self._bias = None if layer.qkv_bias is None else layer.qkv_bias[-width:]

    def encode(self, hidden: Tensor, eps: float, before: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Bytes of the values, token by token."""
        x = tk.rms_norm(hidden, self._norm, eps)[0]
        return self.format.row.encode(tk.linear(x, self._to_values)), before

    def encode_blocks(self, rows: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """As in `Channels`: bytes of the values as they are, and of the keys in their basis."""
        assert self.format.key is not None
        return rows, _by_columns(self.format.key, tk.linear(k.flatten(0, 1), self._to_keys).view(k.shape))

    def restore(self, blocks: Blocks, before: Tensor | None) -> Tensor | None:
        """By products with the bases. The stored keys are already normalised."""
        assert self.format.key is not None
        rows = blocks.keys.index_select(0, blocks.chosen).flatten(0, 1)
        columns = self.format.key.decode(rows, self._dtype).view(-1, self.format.columns, BLOCK)
        k = tk.linear(columns.transpose(1, 2).reshape(-1, self.format.columns), self._of_keys)
        v = tk.linear(self.format.row.decode(blocks.chosen_rows(), self._dtype), self._of_values, self._bias)
        blocks.append(torch.cat([k[:, : self._head_dim], k, v], 1))
        return before


class _Whole:
    """Stores x itself."""

    def __init__(self, form: Format, layer: tk.DecoderLayer, width: int, head_dim: int) -> None:
        self.format, self._k_norm = form, layer.k_norm
        self._norm, self._dtype = layer.input_norm, layer.input_norm.dtype
        self.one = tk.DecoderLayers([layer])
        # The rows of keys and values, and those of a query head before them, because `rope_append_` needs at least one.
        heads = head_dim + 2 * width
        first = layer.qkv.out_features - heads
        if layer.qkv.weight.dim() > 2:  # panels of 16 rows
            first //= 16
        scale, zero = (None if part is None else part[first:] for part in (layer.qkv.scale, layer.qkv.zero))
        self._heads = replace(layer.qkv, weight=layer.qkv.weight[first:], out_features=heads, scale=scale, zero=zero)
        self._bias = None if layer.qkv_bias is None else layer.qkv_bias[-heads:]

    def encode(self, hidden: Tensor, eps: float, before: Tensor | None) -> tuple[Tensor, Tensor | None]:
        rows = self.format.row.encode(tk.rms_norm(hidden, self._norm, eps)[0])
        return rows, self.decode(rows, before)

    def restore(self, blocks: Blocks, before: Tensor | None) -> Tensor | None:
        x = self.decode(blocks.chosen_rows(), before)
        blocks.append(tk.linear(x, self._heads, self._bias), self._k_norm)
        return x

    def decode(self, rows: Tensor, before: Tensor | None) -> Tensor:  # noqa: ARG002
        """Tokens x [N, H] of bytes."""
        return self.format.row.decode(rows, self._dtype)


class _Change(_Whole):
    """Stores the difference of x from the decoded x of the layer before."""

    def __init__(self, form: Format, layer: tk.DecoderLayer, width: int, head_dim: int) -> None:
        super().__init__(form, layer, width, head_dim)
        self._down = self._up = None
        if form.row.width < layer.qkv.in_features:
            u = _svd(_rows(layer.qkv, -2 * width))[0]
            self._down, self._up = (tk.pack_linear(part.to(self._dtype).contiguous()) for part in (u.T, u))

    def encode(self, hidden: Tensor, eps: float, before: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert before is not None
        change = tk.rms_norm(hidden, self._norm, eps)[0] - before
        rows = self.format.row.encode(change if self._down is None else tk.linear(change, self._down))
        return rows, self.decode(rows, before)

    def decode(self, rows: Tensor, before: Tensor | None) -> Tensor:
        assert before is not None
        change = self.format.row.decode(rows, self._dtype)
        return before + change if self._up is None else tk.linear(change, self._up, residual=before)


_KEPT: Final[dict[str, Callable[[Format, tk.DecoderLayer, int, int], KeptLayer]]] = {
    "channels": Channels,
    "whole": _Whole,
    "latents": Latents,
    "change": _Change,
}


def _by_columns(quantiser: Quantiser, k: Tensor) -> Tensor:
    """Bytes [m, columns, n] of blocks of keys [m, BLOCK, columns]."""
    return quantiser.encode(k.transpose(1, 2).flatten(0, 1)).view(len(k), k.shape[2], -1)


def _rows(packed: tk.PackedLinear, begin: int, end: int | None = None) -> Tensor:
    """Rows of a weight in float64."""
    return packed.unpack()[begin:end].double()


def _svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [K, r], S [r], B^T [r, N] of the transpose of a weight [N, K].

    On one thread: LAPACK's last bits depend on the number of threads, and the result of a search must not.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found: tuple[Tensor, Tensor, Tensor] = torch.linalg.svd(weight.T, full_matrices=False)
    finally:
        torch.set_num_threads(threads)
    return found

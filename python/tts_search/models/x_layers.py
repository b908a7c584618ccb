"""What the X cache stores of a token in a layer instead of its keys and values (XQuant, arXiv 2508.10395).

The keys and values of a token are linear in x, the layer's input after its norm. So they can be made again from few
bits of x. There are three ways to store x:

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

__all__ = ["BLOCK", "KINDS", "Format", "KeptLayer", "Latents", "Quantiser", "formats_of", "kept_layers"]

BLOCK: Final = 128  # tokens
KINDS: Final = ("xquant-8", "xquant-4", "xquant-3", "xquant-2", "xquant-cl-4", "xquant-cl-3", "xquant-cl-2")
_BASE: Final = 2  # the first change is relative to this layer; it and those before it have 4 bits


@dataclass(frozen=True, slots=True)
class Quantiser:
    """Stores rows of ``width`` numbers as bytes: `tts_kernels.quantize_rows`."""

    width: int
    bits: int

    @property
    def group(self) -> int:
        """Number of columns that share a scale: the largest divisor of the width, up to 128."""
        return max(size for size in range(1, 129) if self.width % size == 0)

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
    kind : {"whole", "latents", "change"}
    row : Quantiser
        How each token is stored.
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


def formats_of(kind: str, num_layers: int, hidden: int, kv_width: int) -> list[Format]:
    """The format of each layer, for a name of `KINDS`, and numbers of elements of hidden states and keys."""
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


class KeptLayer(Protocol):
    """Encodes the input of a layer, and restores its keys and values. ``one`` has only this layer."""

    format: Format
    one: tk.DecoderLayers

    def encode(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Bytes of tokens x [T, H], and x as decoded from them; ``before`` is the decoded x of the layer before."""
        ...

    def restore(self, rows: Tensor, keys: Tensor | None, before: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Decode tokens and their blocks: rows [N, (1 + 2 Hkv) D] for `tts_kernels.rope_append_`, and x."""
        ...

    @property
    def k_norm(self) -> Tensor | None:
        """The norm of the keys from `restore`, before their rotation."""
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
    for name, size in (("hidden states", hidden), ("keys", width), ("heads", head_dim)):
        if size % 16:
            raise ValueError(f"kv_dtype: expected no {kind} for {name} of {size} elements, not a multiple of 16")
    made: list[KeptLayer] = []
    for layer, form in zip(layers.layers, formats_of(kind, len(layers), hidden, width), strict=True):
        key = form.key and quantiser(form.key.width, form.key.bits)
        form = replace(form, row=quantiser(form.row.width, form.row.bits), key=key)
        made.append(_KEPT[form.kind](form, layer, width, head_dim))
    return made


class _Whole:
    """Stores x itself."""

    def __init__(self, form: Format, layer: tk.DecoderLayer, width: int, head_dim: int) -> None:
        self.format, self.k_norm, self.dtype = form, layer.k_norm, layer.input_norm.dtype
        self.one = tk.DecoderLayers([layer])
        # The rows of keys and values, and those of a query head before them, because `rope_append_` needs at least one.
        heads = head_dim + 2 * width
        first = layer.qkv.out_features - heads
        if layer.qkv.weight.dim() > 2:  # panels of 16 rows
            first //= 16
        scale, zero = (None if part is None else part[first:] for part in (layer.qkv.scale, layer.qkv.zero))
        self._heads = replace(layer.qkv, weight=layer.qkv.weight[first:], out_features=heads, scale=scale, zero=zero)
        self._bias = None if layer.qkv_bias is None else layer.qkv_bias[-heads:]

    def encode(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor | None]:  # noqa: ARG002
        rows = self.format.row.encode(x)
        return rows, self.format.row.decode(rows, self.dtype)

    def restore(self, rows: Tensor, keys: Tensor | None, before: Tensor | None) -> tuple[Tensor, Tensor | None]:  # noqa: ARG002
        return self.heads_of(self.format.row.decode(rows, self.dtype))

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """A query head, keys and values of x; and x."""
        return tk.linear(x, self._heads, self._bias), x


class _Change(_Whole):
    """Stores the difference of x from the decoded x of the layer before."""

    def __init__(self, form: Format, layer: tk.DecoderLayer, width: int, head_dim: int) -> None:
        super().__init__(form, layer, width, head_dim)
        self._down = self._up = None
        if form.row.width < layer.qkv.in_features:
            u = _svd(_rows(layer.qkv, -2 * width))[0]
            self._down, self._up = (tk.pack_linear(part.to(self.dtype).contiguous()) for part in (u.T, u))

    def encode(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert before is not None
        change = x - before
        rows = self.format.row.encode(change if self._down is None else tk.linear(change, self._down))
        return rows, self._after(rows, before)

    def restore(self, rows: Tensor, keys: Tensor | None, before: Tensor | None) -> tuple[Tensor, Tensor | None]:  # noqa: ARG002
        assert before is not None
        return self.heads_of(self._after(rows, before))

    def _after(self, rows: Tensor, before: Tensor) -> Tensor:
        change = self.format.row.decode(rows, self.dtype)
        return before + change if self._up is None else tk.linear(change, self._up, residual=before)


class Latents:
    """Stores keys and values in the bases of their singular vectors."""

    k_norm = None  # the stored keys are already normalised

    def __init__(self, form: Format, layer: tk.DecoderLayer, width: int, head_dim: int) -> None:
        self.format, self._head_dim, self.dtype = form, head_dim, layer.input_norm.dtype
        self.one = tk.DecoderLayers([layer])
        _, _, key_basis = _svd(_rows(layer.qkv, -2 * width, -width))
        u, s, value_basis = _svd(_rows(layer.qkv, -width))
        self._to_keys = tk.pack_linear(key_basis.float().contiguous())
        self._of_keys = tk.pack_linear(key_basis.T.to(self.dtype).contiguous())
        self._to_values = tk.pack_linear(u.T.to(self.dtype).contiguous())
        self._of_values = tk.pack_linear((s[:, None] * value_basis).T.to(self.dtype).contiguous())
        self._bias = None if layer.qkv_bias is None else layer.qkv_bias[-width:]

    def encode(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Bytes of the values, token by token."""
        return self.format.row.encode(tk.linear(x, self._to_values)), before

    def encode_keys(self, k: Tensor) -> Tensor:
        """Bytes [columns, n] of a block's keys [BLOCK, Hkv D] before their rotation."""
        assert self.format.key is not None
        return self.format.key.encode(tk.linear(k, self._to_keys).T.contiguous())

    def restore(self, rows: Tensor, keys: Tensor | None, before: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """A query head that is not used, keys, values."""
        assert self.format.key is not None
        assert keys is not None
        columns = self.format.key.decode(keys, self.dtype).view(-1, self.format.columns, BLOCK)
        k = tk.linear(columns.transpose(1, 2).reshape(-1, self.format.columns), self._of_keys)
        v = tk.linear(self.format.row.decode(rows, self.dtype), self._of_values, self._bias)
        return torch.cat([k[:, : self._head_dim], k, v], 1), before


_KEPT: Final[dict[str, Callable[[Format, tk.DecoderLayer, int, int], KeptLayer]]] = {
    "whole": _Whole,
    "latents": Latents,
    "change": _Change,
}


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

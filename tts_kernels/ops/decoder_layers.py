"""A stack of decoder layers in one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor

from .. import checks, reference
from ..op import Op
from ..plan import AttentionPlan
from ..reference import LAYER_PARTS
from .linear import PackedLinear, check_weight, linear_op
from .rms_norm import rms_norm_op
from .rope_append import rope_append_op
from .swiglu import swiglu_op
from .tree_attention import check_window, tree_attention_op


@dataclass(frozen=True, eq=False)
class DecoderLayer:
    """The weights of one layer of the Llama family. All have one dtype, except for quantised projections.

    Attributes
    ----------
    input_norm, post_norm
        [H]: RMSNorms before the attention and before the MLP.
    qkv, o
        Packed [(Hq + 2 Hkv) D, H] and [H, Hq D]: the projections before and after the attention.
    gate_up, down
        Packed [2 I, H] and [H, I]: the MLP; the gate's rows come first.
    qkv_bias, o_bias, gate_up_bias, down_bias
        [rows of the projection], or None.
    q_norm, k_norm
        [D], or None: RMSNorm of each head before its rotation.
    window
        Sliding window of the attention in tokens, or None.
    """

    input_norm: Tensor
    qkv: PackedLinear
    o: PackedLinear
    post_norm: Tensor
    gate_up: PackedLinear
    down: PackedLinear
    qkv_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    o_bias: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    window: int | None = None


class DecoderLayers:
    """The layers for `decoder_layers_`. Made once, when a model is loaded.

    Parameters
    ----------
    layers
        In order, at least one; all of the same sizes.

    Raises
    ------
    TypeError
        If a layer is no `DecoderLayer` of `PackedLinear` projections.
    ValueError
        For projections that do not fit each other or those of the first layer, or a window below 1.
    """

    def __init__(self, layers: Sequence[DecoderLayer]) -> None:
        if not layers:
            raise ValueError("layers: expected at least one layer, got none")
        for i, layer in enumerate(layers):
            _check_projections(f"layers[{i}]", layer, layers[0])
        self.layers = tuple(layers)
        self.intermediate = layers[0].down.in_features
        self.windows = [layer.window or 0 for layer in layers]
        nothing = layers[0].input_norm.new_empty(0)
        self.weights = [nothing if part is None else part for layer in layers for part in _parts(layer)]

    def __len__(self) -> int:
        return len(self.layers)


def _parts(layer: DecoderLayer) -> Iterator[Tensor | None]:
    """A layer's tensors in the order of `LAYER_PARTS`."""
    for name in LAYER_PARTS:
        projection, _, part = name.rpartition("_")
        if part in ("scale", "zero"):
            yield getattr(getattr(layer, projection), part)
        else:
            value = getattr(layer, name)
            yield value.weight if isinstance(value, PackedLinear) else value


def _check_projections(name: str, layer: DecoderLayer, first: DecoderLayer) -> None:
    """Features of a layer's projections. An operator cannot see them: a packed weight is padded."""
    if not isinstance(layer, DecoderLayer):
        raise TypeError(f"{name}: expected a DecoderLayer, got {checks.describe(layer)}")
    for part in ("qkv", "o", "gate_up", "down"):
        if not isinstance(getattr(layer, part), PackedLinear):
            raise TypeError(f"{name}.{part}: expected a PackedLinear, got {checks.describe(getattr(layer, part))}")
    checks.tensor(f"{name}.input_norm", layer.input_norm, shape=["H"])
    hidden, intermediate = first.input_norm.shape[0], first.down.in_features
    for part, features in (
        ("qkv", (hidden, first.qkv.out_features)),
        ("o", (first.o.in_features, hidden)),
        ("gate_up", (hidden, 2 * intermediate)),
        ("down", (intermediate, hidden)),
    ):
        packed = getattr(layer, part)
        if (packed.in_features, packed.out_features) != features:
            got = [packed.out_features, packed.in_features]
            raise ValueError(f"{name}.{part}: expected a packed weight {list(features[::-1])}, got one of {got}")
    if layer.window is not None:
        checks.integer(f"{name}.window", layer.window, 1)


def decoder_layers_(
    x: Tensor,
    layers: DecoderLayers,
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    plan: AttentionPlan,
    positions: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    *,
    eps: float = 1e-6,
    rows: Tensor | None = None,
    k_scales: Sequence[Tensor] = (),
    v_scales: Sequence[Tensor] = (),
    k_zeros: Sequence[Tensor] = (),
    v_zeros: Sequence[Tensor] = (),
) -> Tensor:
    """Run hidden states through decoder layers over a paged KV cache, and write their keys and values to the cache.

    In each layer, ``x = x + o(attend(rope(qkv(norm(x)))))``, then ``x = x + down(swiglu(gate_up(norm(x))))``. Each part
    is computed by the operator of its name, with the same bits: `rms_norm`, `linear`, `rope_append_`, `tree_attention`,
    `swiglu`.

    Parameters
    ----------
    x
        [T, H] float: the embeddings, or the output of an earlier stack.
    layers
        Their weights, of x's dtype.
    k_caches, v_caches
        [P, page_size, Hkv, D] of x's dtype, or quantised as in `append_kv_`; one for each layer. Written in place.
    plan
        The attention of these rows, the same for every layer; Hq, Hkv and D are the plan's.
    positions, cos_sin, slots
        As in `rope_append_`, the same for every layer.
    eps
        Of every norm.
    rows
        [R] int, or None: the rows of the result, by default all. For other rows, the last layer skips the work after
        its attention.
    k_scales, v_scales, k_zeros, v_zeros
        The scales and zeros of quantised caches, as in `append_kv_`, one for each layer; else empty.

    Returns
    -------
    Tensor
        [T, H], or [R, H] with ``rows``, of x's dtype; not normed.

    Raises
    ------
    TypeError
        For a wrong dtype.
    ValueError
        For a wrong shape, device or number of caches.
    IndexError
        For a position, slot, row or page that does not exist.

    Notes
    -----
    It saves the interpreter's time between operators. While weights stream through the caches, a call from Python takes
    10 us and more, which was a fifth of a decode step of 16 branches of SmolLM2-135M. After an error, the slots of some
    layers may have been written.

    Examples
    --------
    A layer whose projections are zero passes its input on:

    >>> import torch, tts_kernels as tk
    >>> zero = lambda rows, columns: tk.pack_linear(torch.zeros(rows, columns))
    >>> layer = tk.DecoderLayer(torch.ones(4), zero(6, 4), zero(4, 2), torch.ones(4), zero(10, 4), zero(4, 5))
    >>> forest, cache = tk.KVForest(1, page_size=4), torch.zeros(1, 4, 1, 2)
    >>> root = forest.add_root()
    >>> slots = forest.append([root], [1]).slots
    >>> plan = forest.plan([root], num_q_heads=1, num_kv_heads=1, head_dim=2)
    >>> tk.decoder_layers_(torch.ones(1, 4), tk.DecoderLayers([layer]), [cache], [cache.clone()], plan,
    ...                    torch.tensor([0]), torch.tensor([[1.0, 0.0]]), slots)
    tensor([[1., 1., 1., 1.]])
    """
    qkv, o = layers.layers[0].qkv.out_features, layers.layers[0].o.in_features
    if o != plan.num_q_heads * plan.head_dim or qkv != o + 2 * plan.num_kv_heads * plan.head_dim:
        raise ValueError(
            f"plan: expected Hq D = {o} and Hkv D = {(qkv - o) / 2:g} as in layers, got one for Hq = "
            f"{plan.num_q_heads}, Hkv = {plan.num_kv_heads}, D = {plan.head_dim}"
        )
    for window in layers.windows:
        check_window(plan, "layers' window", window)
    out: Tensor = _op(
        x,
        layers.weights,
        k_caches,
        v_caches,
        positions,
        cos_sin,
        slots,
        rows,
        [getattr(plan, name) for name in PLAN],
        plan.page_size,
        plan.num_q_heads,
        plan.num_kv_heads,
        plan.max_slots,
        layers.intermediate,
        layers.windows,
        eps,
        k_scales,
        v_scales,
        k_zeros,
        v_zeros,
    )
    return out


PLAN: Final = ("rows", "positions", "pages", "segments", "tasks", "merge_indptr", "merge_slots", "sizes")


def _check(
    x: Tensor,
    weights: Sequence[Tensor],
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    positions: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    rows: Tensor | None,
    plan: Sequence[Tensor],
    page_size: int,
    num_q_heads: int,
    num_kv_heads: int,
    max_slots: int,  # noqa: ARG001
    intermediate: int,
    windows: Sequence[int],
    eps: float,
    k_scales: Sequence[Tensor] = (),
    v_scales: Sequence[Tensor] = (),
    k_zeros: Sequence[Tensor] = (),
    v_zeros: Sequence[Tensor] = (),
) -> None:
    checks.tensor("x", x, shape=["T", "H"])
    tokens, hidden = x.shape
    checks.tensor("cos_sin", cos_sin, (torch.float32,), ["max_position", "D"], x.device)
    head_dim, depth = cos_sin.shape[1], len(windows)
    checks.number("eps", eps, low=0.0)
    for i in range(depth):
        parts = dict(zip(LAYER_PARTS, weights[i * len(LAYER_PARTS) : (i + 1) * len(LAYER_PARTS)], strict=True))
        _check_layer(f"layers[{i}]", parts, x, num_q_heads * head_dim, num_kv_heads * head_dim, head_dim, intermediate)
    for name, caches in (("k_caches", k_caches), ("v_caches", v_caches)):
        if len(caches) != depth:
            raise ValueError(f"{name}: expected {depth} caches, one for each layer, got {len(caches)}")
    scales = {"k_scales": k_scales, "v_scales": v_scales, "k_zeros": k_zeros, "v_zeros": v_zeros}
    for name, some in scales.items():
        if len(some) not in (0, depth):
            raise ValueError(f"{name}: expected {depth} tensors, one for each layer, or none, got {len(some)}")
    for i in range(depth):
        beside = {f"{name}[{i}]": some[i] if some else None for name, some in scales.items()}
        shape: list[int | str] = ["P", page_size, num_kv_heads, head_dim]
        names = (f"k_caches[{i}]", k_caches[i], f"v_caches[{i}]", v_caches[i])
        checks.caches(*names, x.dtype, shape, x.device, beside, written=True)
    checks.tensor("plan.rows", plan[0], (torch.int32,), [tokens], x.device)
    checks.tensor("positions", positions, checks.INDEX, [tokens], x.device)
    checks.tensor("slots", slots, checks.INDEX, [tokens], x.device)
    checks.index_range("positions", positions, 0, cos_sin.shape[0])
    checks.distinct("slots", slots)
    for cache in k_caches:
        checks.index_range("slots", slots, 0, cache.shape[0] * page_size)
        if checks.readable(*plan):
            checks.index_range("plan.pages", plan[2][: int(plan[7][3])], 0, cache.shape[0])
    if rows is not None:
        checks.tensor("rows", rows, checks.INDEX, ["R"], x.device)
        checks.index_range("rows", rows, 0, tokens)
    if hidden < 1:
        raise ValueError(f"x: expected at least one column, got {checks.describe(x)}")


def _check_layer(
    layer: str, parts: dict[str, Tensor], x: Tensor, q_width: int, kv_width: int, head_dim: int, intermediate: int
) -> None:
    """Check the shapes of a layer's weights. TypeError, ValueError that name the layer and its part."""
    hidden = x.shape[1]
    sizes = {
        "qkv": (q_width + 2 * kv_width, hidden),
        "o": (hidden, q_width),
        "gate_up": (2 * intermediate, hidden),
        "down": (hidden, intermediate),
    }
    norms = {"input_norm": hidden, "post_norm": hidden, "q_norm": head_dim, "k_norm": head_dim}
    for name, part in parts.items():
        if name in sizes:
            scale, zero = (t if t.numel() else None for t in (parts[f"{name}_scale"], parts[f"{name}_zero"]))
            check_weight(f"{layer}.{name}.", x, part, *sizes[name][::-1], scale, zero)
        elif name.endswith(("_scale", "_zero")):
            pass  # with its weight
        elif part.numel() or name in ("input_norm", "post_norm"):
            size = norms[name] if name in norms else sizes[name.removesuffix("_bias")][0]
            checks.tensor(f"{layer}.{name}", part, (x.dtype,), [size], x.device)


def _fake(x: Tensor, *rest: Any) -> Tensor:
    rows = rest[6]
    return x.new_empty(x.shape[0] if rows is None else rows.shape[0], x.shape[1])


_OPERATORS = SimpleNamespace(
    linear=linear_op,
    rms_norm=rms_norm_op,
    rope_append_=rope_append_op,
    tree_attention=tree_attention_op,
    swiglu=swiglu_op,
)

_op = Op(
    "decoder_layers_",
    reference=reference.decoder_layers_,
    check=_check,
    fake=_fake,
    composed=partial(reference.decoder_layers_, ops=_OPERATORS),
    no_cpp_for=lambda *args: checks.no_cpp_for(*args[2], *args[3]),
)

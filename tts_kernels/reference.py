"""The definition of every op, in plain torch.

The code is slow and obvious on purpose. Each function takes the arguments of the operator with its name, and works in
any floating dtype. Tests call it in float64, and compare the kernels with it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def _wide(*tensors: Tensor | None) -> torch.dtype:
    """The dtype to compute in: float64 if any input is float64, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def step_scores(
    hidden: Tensor,
    positions: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    sigmoid: bool,
) -> Tensor:
    """``act(w . mlp(norm(hidden[positions])) + b)``; [S] float32 (float64 for float64 inputs)."""
    wide = _wide(hidden, weight)
    x = hidden[positions.long()].to(wide)
    if norm_weight is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm_weight.to(wide)
    if w1 is not None:
        x = torch.relu(x @ w1.to(wide).T + (0 if b1 is None else b1.to(wide)))
    z = x @ weight.to(wide) + (0 if bias is None else bias.to(wide))
    return torch.sigmoid(z) if sigmoid else z


def aggregate_steps(scores: Tensor, indptr: Tensor, how: str) -> Tensor:
    """One reduction for each segment, in float64; [C]."""
    return _aggregate([scores[a:b].double() for a, b in _segments(indptr)], how, scores.device).to(_wide(scores))


def linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """``log softmax(hidden @ weight.T / temperature)[targets]`` from full logits; [N]."""
    wide = _wide(hidden, weight)
    logits = hidden.to(wide) @ weight.to(wide).T / temperature
    return logits.log_softmax(-1).gather(-1, targets.long()[:, None])[:, 0]


def linear_logprob_quantized(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    in_features: int,
    vocabulary: int,
    scale: Tensor,
    zero: Tensor | None,
) -> Tensor:
    """`linear_logprob` of the logits that `linear` gives on quantised weights, unrounded; [N]."""
    x = hidden.to(_wide(hidden))
    logits = _linear_quantized(x, weight, in_features, vocabulary, scale, zero) / temperature
    return logits.log_softmax(-1).gather(-1, targets.long()[:, None])[:, 0]


def prune(scores: Tensor, indptr: Tensor, width: int, k: Tensor | None, keep_order: bool) -> tuple[Tensor, Tensor]:
    """The first k of each group in this order: higher score, lower index, NaN last; [G, K] and [G]."""
    segments = _segments(indptr)
    indices = torch.full((len(segments), width), -1, dtype=torch.int64, device=scores.device)
    counts = torch.zeros(len(segments), dtype=torch.int32, device=scores.device)
    for g, (a, b) in enumerate(segments):
        group = scores[a:b]
        order = torch.where(group.isnan(), -torch.inf, group).argsort(stable=True, descending=True)
        order = order[group.isnan()[order].byte().argsort(stable=True)]
        kept = order[: width if k is None else int(k[g])]
        kept = kept.sort().values if keep_order else kept
        indices[g, : kept.numel()] = a + kept
        counts[g] = kept.numel()
    return indices, counts


def score_and_prune(
    hidden: Tensor,
    positions: Tensor,
    step_indptr: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    sigmoid: bool,
    group_indptr: Tensor,
    width: int,
    k: Tensor | None,
    how: str,
    prior: Tensor | None,
    prior_counts: Tensor | None,
    keep_order: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`step_scores`, then the aggregate of each chain continued from its prior, then `prune`; [G, K], [G], [C], [S]."""
    scores = step_scores(hidden, positions, weight, bias, w1, b1, norm_weight, eps, sigmoid)
    chains = [scores[a:b].double() for a, b in _segments(step_indptr)]
    if prior is not None and prior_counts is not None:
        counts = prior_counts.tolist()
        # In a mean, an aggregate over n steps has the weight of n values; in the others, that of one value.
        chains = [
            torch.cat([prior[c : c + 1].double().expand(n if how == "mean" else min(n, 1)), chain])
            for c, (n, chain) in enumerate(zip(counts, chains, strict=True))
        ]
    candidates = _aggregate(chains, how, scores.device).to(_wide(scores))
    return (*prune(candidates, group_indptr, width, k, keep_order), candidates, scores)


def _segments(indptr: Tensor) -> list[tuple[int, int]]:
    offsets = indptr.tolist()
    return list(pairwise(offsets))


def _aggregate(chains: list[Tensor], how: str, device: torch.device) -> Tensor:
    """One float64 number for each chain of float64 scores; -inf for an empty chain."""
    reductions: dict[str, Callable[[Tensor], Tensor]] = {
        "last": lambda chain: chain[-1],
        "min": torch.amin,
        "prod": torch.prod,
        "mean": torch.mean,
        "max": torch.amax,
        "sum": torch.sum,
    }
    out = torch.full((len(chains),), -torch.inf, dtype=torch.float64, device=device)
    for c, chain in enumerate(chains):
        if chain.numel():
            out[c] = reductions[how](chain)
    return out


# ---- sampling ---------------------------------------------------------------------------------------------------

_ONE = 1 << 39  # the weight of the likeliest token


def sample(
    logits: Tensor,
    seeds: Tensor,
    offsets: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    temperatures: Tensor | None,
    top_ks: Tensor | None,
    top_ps: Tensor | None,
    min_ps: Tensor | None,
    top_logprobs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One token for each row and its log-probability, [B] int64 and [B]; for the likeliest tokens [B, k] of both.

    Weights of float32 (and narrower) inputs are computed by `_fixed_exp`, which every backend repeats bit for bit.
    Those of float64 inputs are computed by ``torch.exp``.
    """
    wide = _wide(logits)
    tokens = torch.full((logits.shape[0],), -1, dtype=torch.int64, device=logits.device)
    logprobs = torch.full((logits.shape[0],), torch.nan, dtype=wide, device=logits.device)
    ids = tokens[:, None].repeat(1, top_logprobs)
    likeliest = logprobs[:, None].repeat(1, top_logprobs)
    for row, x in enumerate(logits.to(wide)):
        if x.isnan().any() or not x.isfinite().any():
            continue
        order = x.sort(descending=True, stable=True).indices
        numbers = (temperature, top_k, top_p, min_p)
        tensors = (temperatures, top_ks, top_ps, min_ps)
        t, k, p, m = (n if o is None else o[row].item() for n, o in zip(numbers, tensors, strict=True))
        if (x == torch.inf).any():  # the token is certain; if there are several, they share the probability
            x = torch.where(x == torch.inf, 0.0, -torch.inf)
        t = _float32(t)
        w = _ONE * (x == x.max()).double() if t == 0 else _weights(x, t)
        keep = _kept(x, w, int(k), _float32(p), _float32(m))
        running = torch.where(keep, w.round().long(), 0).cumsum(0)
        draw = _philox(int(seeds[row]), int(offsets[row])) if t > 0 else 0
        tokens[row] = (running > (draw * int(running[-1]) >> 64)).nonzero()[0, 0]
        own = torch.log_softmax(x, 0)
        logprobs[row] = own[tokens[row]]
        ids[row] = order[:top_logprobs]
        likeliest[row] = own[ids[row]]
    return tokens, logprobs, ids, likeliest


def _kept(x: Tensor, w: Tensor, k: int, p: float, min_p: float) -> Tensor:
    """The tokens that are left after top-k, then top-p, then min-p."""
    keep = torch.ones_like(x, dtype=torch.bool)
    if 0 < k < len(x):
        keep = x >= x.topk(k).values[-1]
    if p < 1:
        order = x.sort(descending=True, stable=True).indices
        mass = torch.where(keep, w.round().long(), 0)[order].cumsum(0)
        target = -(-math.ceil(p * 2**32) * int(mass[-1]) >> 32)  # ceil(p * total)
        keep[order[int((mass < target).sum()) + 1 :]] = False
    return keep & (w >= min_p * _ONE)


def _weights(x: Tensor, temperature: float) -> Tensor:
    """``2**39 exp((x - max) / temperature)`` in float64, not yet rounded to whole numbers."""
    d = x - x.max()
    if x.dtype == torch.float64:
        return _ONE * torch.exp(d / temperature)
    return _fixed_exp(d, temperature)


def _fixed_exp(d: Tensor, temperature: float) -> Tensor:
    """The arithmetic of csrc/include/fixed_exp.h, step by step."""
    scale = _float32(min(max(1.4426950408889634 / temperature, 2.0**-100), 2.0**100))
    d = d.clamp(min=_float32(-42.0 / scale))
    magic = torch.full_like(d, 1.5 * 2**23)
    n = _fma(d, scale, magic) - magic
    f = _fma(d, scale, -n)
    p = torch.full_like(d, float.fromhex("0x1.5bba14p-10"))
    for c in ("0x1.3cea88p-7", "0x1.c6b752p-5", "0x1.ebf9bcp-3", "0x1.62e42ap-1", "0x1p0"):
        p = _fma(p, f, torch.full_like(d, float.fromhex(c)))
    return p.double() * torch.exp2(n.double() + 39)


def _fma(a: Tensor, b: Tensor | float, c: Tensor) -> Tensor:
    """``a * b + c`` rounded once to float32: in float64 the product is exact and the sum is rounded to odd."""
    product, c = a.double() * b, c.double()
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    bits = total.view(torch.int64)
    step = torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where((error != 0) & (bits % 2 == 0), bits + step, bits).view(torch.float64).float()


def _float32(x: float) -> float:
    return torch.tensor(x, dtype=torch.float64).float().item()


def _philox(seed: int, offset: int) -> int:
    """64 random bits: words 1 and 0 of Philox4x32-10 with that key and counter."""
    low = (1 << 32) - 1
    x = [offset & low, offset >> 32 & low, 0, 0]
    key = [seed & low, seed >> 32 & low]
    for _ in range(10):
        a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [b >> 32 ^ x[1] ^ key[0], b & low, a >> 32 ^ x[3] ^ key[1], a & low]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return x[1] << 32 | x[0]


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Tensor,
    positions: Tensor,
    pages: Tensor,
    segments: Tensor,
    tasks: Tensor,  # noqa: ARG001  (how the work is cut changes nothing)
    merge_indptr: Tensor,  # noqa: ARG001
    merge_slots: Tensor,  # noqa: ARG001
    sizes: Tensor,
    page_size: int,
    num_kv_heads: int,
    max_slots: int,  # noqa: ARG001
    scale: float,
    softcap: float,
    window: int,
    sinks: Tensor | None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_zero: Tensor | None = None,
    v_zero: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A softmax over the keys of each row's segments, and the head's sink; (out [T, Hq, D], lse [T, Hq])."""
    wide = _wide(q)
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf, dtype=wide)
    if sinks is not None:
        lse[:] = sinks
    tables = segments[: int(sizes[0])].tolist()
    for r, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
        slots = [
            int(pages[begin + (start % page_size + i) // page_size]) * page_size + (start + i) % page_size
            for begin, start, length, first, last, *_ in tables
            if first <= r < last
            for i in range(length)
            if start + i <= position and (window <= 0 or start + i > position - window)
        ]
        if slots:
            seen = torch.tensor(slots, device=q.device)
            keys = dequantize_kv(*(_at(t, seen) for t in (k_cache, k_scale, k_zero)), dtype=wide)  # [n, Hkv, D]
            values = dequantize_kv(*(_at(t, seen) for t in (v_cache, v_scale, v_zero)), dtype=wide)
            out[row], lse[row] = _attend(q[row].to(wide), keys, values, num_kv_heads, scale, softcap, sinks)
    return out, lse


def _at(paged: Tensor | None, slots: Tensor) -> Any:
    return None if paged is None else paged.flatten(0, 1)[slots]


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, num_kv_heads: int, scale: float, softcap: float, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One row [Hq, D] over keys and values [n, Hkv, D] and sinks [Hq]."""
    grouped = q.reshape(num_kv_heads, -1, q.shape[-1])
    scores = torch.einsum("hgd,nhd->hgn", grouped, keys) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if sinks is not None:  # like a key whose value is 0
        scores = torch.cat([scores, sinks.to(scores).view(num_kv_heads, -1, 1)], -1)
        values = torch.cat([values, torch.zeros_like(values[:1])])
    out = torch.einsum("hgn,nhd->hgd", scores.softmax(-1), values)
    return out.flatten(0, 1), scores.logsumexp(-1).flatten()


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The mean weighted by the exponentials of the log-sum-exps; (out [T, H, D], lse [T, H])."""
    wide = _wide(out_a)
    lse = torch.logaddexp(lse_a.to(wide), lse_b.to(wide))
    weighted = out_a.to(wide) * (lse_a - lse).exp()[..., None] + out_b.to(wide) * (lse_b - lse).exp()[..., None]
    no_a, no_b = (x.isneginf()[..., None] for x in (lse_a, lse_b))
    return torch.where(no_a, out_b, torch.where(no_b, out_a, weighted.to(out_a.dtype))), lse


def append_kv_(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_zero: Tensor | None = None,
    v_zero: Tensor | None = None,
) -> None:
    """Write one row for each token, quantised by `quantize_kv` if the caches are; fp8 is limited to 448."""
    page, offset = slots.long() // k_cache.shape[1], slots.long() % k_cache.shape[1]
    for tokens, cache, scale, zero in ((k, k_cache, k_scale, k_zero), (v, v_cache, v_scale, v_zero)):
        if scale is None:
            narrow = cache.dtype == torch.float8_e4m3fn
            cache[page, offset] = tokens.float().clamp(-448, 448).to(cache.dtype) if narrow else tokens
            continue
        cache[page, offset], scale[page, offset], zeros = quantize_kv(tokens, 8 if zero is None else 4)
        if zero is not None:
            zero[page, offset] = zeros


def quantize_kv(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zeros [..., Hkv] float16 of heads [..., Hkv, D]. Each head is quantised separately.

    8 bits: codes int8 [..., D], scale ``max |x| / 127``, no zero. 4 bits: codes uint8 [..., D / 2], scale ``(max x -
    min x) / 15``, zero ``min x``; the high half of a byte has the code of the element D / 2 further on. Codes are ``(x
    - zero) / scale`` with the rounded scale and zero, rounded to the nearest even number. The scale is NaN if an
    element, the scale or the zero is not finite.
    """
    x = x.float()
    if bits == 4:
        codes, scale, zero = _affine(x, 15)
        first, second = codes.to(torch.uint8).chunk(2, -1)
        return first | second << 4, scale, zero
    top = x.abs().amax(-1)
    scale = top.div(torch.full_like(top, 127)).half()
    scale = torch.where(x.isfinite().all(-1) & scale.isfinite(), scale, torch.nan)
    codes = torch.where((scale > 0)[..., None], x / scale.float()[..., None], 0).clamp(-127, 127).round()
    return codes.to(torch.int8), scale, torch.zeros_like(scale)


def dequantize_kv(codes: Tensor, scale: Tensor | None, zero: Tensor | None, *, dtype: torch.dtype) -> Tensor:
    """Heads [..., D] from codes of `quantize_kv`: ``code * scale + zero``. Plain heads stay unchanged."""
    if scale is None:
        return codes.to(dtype)
    if zero is None:
        return codes.to(dtype) * scale.to(dtype)[..., None]
    whole = torch.cat([codes & 15, codes >> 4], -1)
    return whole.to(dtype) * scale.to(dtype)[..., None] + zero.to(dtype)[..., None]


def quantize_rows(x: Tensor, bits: int, group_size: int) -> Tensor:
    """Codes in planes, scales, zeros: uint8 [N, bytes] of rows [N, W]."""
    groups = x.float().reshape(len(x), x.shape[1] // group_size, group_size)
    codes, scale, zero = _affine(groups, 2**bits - 1)
    whole = codes.to(torch.uint8).flatten(1)
    planes = [_plane(whole & 3, 2), _plane(whole >> 2, 1)] if bits == 3 else [_plane(whole, bits)]
    return torch.cat([*planes, scale.view(torch.uint8), zero.view(torch.uint8)], 1)


def dequantize_rows(rows: Tensor, width: int, bits: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """``code * scale + zero``, [N, W]."""
    sizes, groups = {3: (2, 1)}.get(bits, (bits,)), width // group_size
    *planes, numbers = torch.split(rows, [*(width * size // 8 for size in sizes), 4 * groups], 1)
    parts = [_unplane(plane, size) << shift for plane, size, shift in zip(planes, sizes, (0, 2), strict=False)]
    codes = torch.stack(parts).sum(0).view(len(rows), groups, group_size)
    scale, zero = numbers.contiguous().view(torch.float16).float().chunk(2, 1)
    x: Tensor = (codes.float() * scale[..., None] + zero[..., None]).flatten(1)
    return x.to(dtype)


def _affine(x: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes from 0 to ``most`` between the smallest and largest element of the last dimension, scales, zeros."""
    low, high = x.amin(-1), x.amax(-1)
    zero, scale = low.half() + 0.0, (high - low).div(torch.full_like(low, most)).half()
    finite = x.isfinite().all(-1)
    scale = torch.where(finite & scale.isfinite() & zero.isfinite(), scale, torch.nan)
    zero = torch.where(finite, zero, torch.nan)
    codes = (x - zero.float()[..., None]) / scale.float()[..., None]
    return torch.where((scale > 0)[..., None], codes, 0).clamp(0, most).round(), scale, zero


def _plane(codes: Tensor, bits: int) -> Tensor:
    """Codes [N, W] of ``bits`` bits: byte i has columns i, i + w, i + 2 w, ... with w = W bits / 8."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    parts = codes.view(len(codes), 8 // bits, codes.shape[1] * bits // 8) << shifts[:, None]
    return parts.sum(1, dtype=torch.uint8)


def _unplane(plane: Tensor, bits: int) -> Tensor:
    """The codes of a plane."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=plane.device)
    codes: Tensor = plane[:, None] >> shifts[:, None] & (2**bits - 1)
    return codes.flatten(1)


def copy_pages_(caches: Sequence[Tensor], src: Tensor, dst: Tensor) -> None:
    """Whole pages of each cache."""
    for cache in caches:
        cache[dst.long()] = cache[src.long()]


def pack_linear(weight: Tensor) -> Tensor:
    """Panels of 16 rows [ceil(N / 16), ceil(K / s), 16, s], zero-padded; s = 2 in bfloat16, else 1. On a GPU [N, K]."""
    if weight.device.type not in ("cpu", "meta"):
        return weight.contiguous()
    step = 2 if weight.dtype == torch.bfloat16 else 1
    rows, depth = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -depth % step, 0, -rows % 16))
    panels = padded.reshape(padded.shape[0] // 16, 16, padded.shape[1] // step, step)
    return panels.transpose(1, 2).contiguous()


def unpack_linear(weight: Tensor, in_features: int, out_features: int) -> Tensor:
    """The inverse of `pack_linear`; [N, K]."""
    if weight.dim() == 2:
        return weight
    panels, steps, rows, step = weight.shape
    return weight.transpose(1, 2).reshape(panels * rows, steps * step)[:out_features, :in_features].contiguous()


def linear(
    x: Tensor,
    weight: Tensor,
    in_features: int,
    out_features: int,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
) -> Tensor:
    """``x @ unpacked.T + bias + residual`` in the dtype of x; with a scale, the weight is of whole numbers."""
    wide = _wide(x, weight)
    if scale is None:
        y = x.to(wide) @ unpack_linear(weight, in_features, out_features).to(wide).T
    else:
        y = _linear_quantized(x.to(wide), weight, in_features, out_features, scale, zero)
    for added in (bias, residual):
        y = y if added is None else y + added.to(wide)
    return y.to(x.dtype)


# ---- quantised weights ------------------------------------------------------------------------------------------

INT_BLOCK = 64  # the depth of quantised weights is padded to multiples of it
_SMALLEST = 2.0**-100


def quantize_linear(weight: Tensor, bits: int, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Whole numbers [N, K] uint8, stored with 2**(bits - 1) added, and the scales [N, groups] float32.

    8 bits: a scale is the largest magnitude of its group over 127. 4 bits: it is the value with this magnitude over -8,
    so that the value is exact and all 16 numbers are used. A group with NaN or an infinity is NaN.
    """
    groups = _grouped(weight.float(), group_size)  # [N, groups, group]
    if bits == 8:
        scale = groups.abs().amax(-1) / 127
    else:
        scale = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0] / -8
    scale = torch.where(groups.isfinite().all(-1), scale, torch.nan)
    half = 1 << (bits - 1)
    whole = (groups / scale[..., None]).nan_to_num(0, 0, 0).round().clamp(-half, half - 1) + half
    return whole.flatten(1)[:, : weight.shape[1]].to(torch.uint8), scale


def _grouped(x: Tensor, group_size: int | None) -> Tensor:
    """[..., groups, group], padded with zeros; at least one group."""
    size = group_size or max(x.shape[-1], 1)
    groups = max(-(-x.shape[-1] // size), 1)
    return torch.nn.functional.pad(x, (0, groups * size - x.shape[-1])).reshape(*x.shape[:-1], groups, size)


def pack_whole(whole: Tensor, bits: int) -> Tensor:
    """Panels of 16 rows of [N, K] uint8, padded to 64 columns: [ceil(N / 16), K / 4, 16, 4], in 4 bits K / 8.

    In 4 bits, the high half of a byte has the number four columns further on.
    """
    rows, depth = whole.shape
    padded = torch.nn.functional.pad(whole, (0, -depth % INT_BLOCK, 0, -rows % 16), value=1 << (bits - 1))
    panels = padded.reshape(padded.shape[0] // 16, 16, padded.shape[1] // 4, 4).transpose(1, 2)
    return (panels if bits == 8 else panels[:, 0::2] | panels[:, 1::2] << 4).contiguous()


def unpack_whole(weight: Tensor, in_features: int, out_features: int) -> Tensor:
    """The inverse of `pack_whole`, without the number that was added; [N, K] int16."""
    bits = quantized_bits(weight, in_features)
    if bits == 4:
        weight = torch.stack([weight & 15, weight >> 4], 2).flatten(1, 2)
    whole = weight.transpose(1, 2).reshape(weight.shape[0] * 16, weight.shape[1] * 4)
    return whole[:out_features, :in_features].short() - (1 << (bits - 1))


def quantized_bits(weight: Tensor, in_features: int) -> int:
    """8 or 4, from the shape of a packed weight."""
    return 8 if weight.shape[1] * 4 == -(-in_features // INT_BLOCK) * INT_BLOCK else 4


def quantized_group(scale: Tensor, in_features: int) -> int | None:
    """The columns that share a scale, from the number of groups: 32, 64 or 128, or None for all."""
    groups, depth = scale.shape[-2], -(-in_features // INT_BLOCK) * INT_BLOCK
    return None if groups == 1 else next(size for size in (32, 64, 128) if groups == -(-depth // size))


def pack_groups(values: Tensor, in_features: int, group_size: int | None) -> Tensor:
    """Scales or zeros [N, groups] as panels of 16 rows [ceil(N / 16), padded groups, 16]."""
    depth = -(-in_features // INT_BLOCK) * INT_BLOCK
    groups = -(-depth // group_size) if group_size else 1
    padded = torch.nn.functional.pad(values.float(), (0, groups - values.shape[1], 0, -values.shape[0] % 16))
    return padded.reshape(padded.shape[0] // 16, 16, groups).transpose(1, 2).contiguous()


def unpack_groups(panels: Tensor, out_features: int) -> Tensor:
    """[N, padded groups]."""
    return panels.transpose(1, 2).flatten(0, 1)[:out_features]


def dequantize_linear(
    weight: Tensor, in_features: int, out_features: int, scale: Tensor, zero: Tensor | None
) -> Tensor:
    """``(whole - zero) * scale``; [N, K] float32."""
    size = quantized_group(scale, in_features)
    whole = _grouped(unpack_whole(weight, in_features, out_features).to(scale.dtype), size)
    scales, zeros = (None if t is None else unpack_groups(t, out_features)[:, : whole.shape[1]] for t in (scale, zero))
    assert scales is not None
    whole = whole if zeros is None else whole - zeros[..., None]
    return (whole * scales[..., None]).flatten(1)[:, :in_features]


def quantize_inputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers [T, K] and their scales [T].

    The bound of a row is 8 times its mean magnitude, or its largest magnitude if that is smaller; it becomes 127. No
    number is above 127 * 128. A row with NaN or an infinity has the scale NaN.
    """
    finite = x.isfinite().all(-1)
    x = torch.where(finite[:, None], x, 0)
    top = x.abs().amax(-1) if x.shape[1] else x.new_zeros(x.shape[0])
    bound = _usual(x).clamp(top / 128, top).clamp(min=_SMALLEST)
    inverse = torch.full_like(bound, 127).div(bound)  # `127 / bound` would be 127 times a rounded reciprocal
    return torch.round(x * inverse[:, None]), torch.where(finite, bound / 127, torch.nan)


def _usual(x: Tensor) -> Tensor:
    """8 times the mean magnitude of each row, summed in 16 lanes."""
    lanes = x.new_zeros(x.shape[0], 16)
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % 16)).abs() * 2.0**-17
    for k in range(0, padded.shape[1], 16):
        lanes = lanes + padded[:, k : k + 16]
    for half in (8, 4, 2, 1):
        lanes = lanes[:, :half] + lanes[:, half:]
    depth = torch.tensor(max(x.shape[1], 1), dtype=x.dtype, device=x.device)
    return lanes[:, 0] * (2.0**20 / depth)


def _linear_quantized(
    x: Tensor, weight: Tensor, in_features: int, out_features: int, scale: Tensor, zero: Tensor | None
) -> Tensor:
    """Exact sums of whole numbers in each group. Groups are added in ascending order; products and sums are rounded."""
    rows, row_scale = quantize_inputs(x)
    size = quantized_group(scale, in_features)
    rows, whole = (_grouped(t.double(), size) for t in (rows, unpack_whole(weight, in_features, out_features)))
    scales = unpack_groups(scale, out_features).to(x.dtype)
    zeros = None if zero is None else unpack_groups(zero, out_features).to(x.dtype)
    total = x.new_zeros(x.shape[0], out_features)
    for g in range(rows.shape[1]):
        sums = (rows[:, g] @ whole[:, g].T).to(x.dtype)
        if zeros is not None:
            sums = sums - zeros[:, g] * rows[:, g].sum(-1, keepdim=True).to(x.dtype)
        total = total + sums * scales[:, g]
    return total * row_scale[:, None]


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """``h / sqrt(mean(h**2) + eps) * weight`` and h = x + residual; h is empty without a residual."""
    wide = _wide(x)
    h = x if residual is None else x + residual
    normed = h.to(wide) * torch.rsqrt(h.to(wide).square().mean(-1, keepdim=True) + eps) * weight.to(wide)
    return normed.to(x.dtype), x.new_empty(0, x.shape[1]) if residual is None else h


def rope_append_(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_zero: Tensor | None = None,
    v_zero: Tensor | None = None,
) -> Tensor:
    """Norm and rotate the heads of q and k, write k and v at ``slots`` (`append_kv_`); q [T, Hq, D]."""
    wide, head_dim = _wide(qkv), cos_sin.shape[1]
    heads = qkv.reshape(qkv.shape[0], num_q_heads + 2 * num_kv_heads, head_dim)
    q, k, v = torch.split(heads, [num_q_heads, num_kv_heads, num_kv_heads], dim=1)
    cos, sin = cos_sin[positions.long()].to(wide)[:, None].chunk(2, dim=-1)

    def rotated(x: Tensor, norm: Tensor | None) -> Tensor:
        x = x.to(wide)
        if norm is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm.to(wide)
        low, high = x.chunk(2, dim=-1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(qkv.dtype)

    append_kv_(k_cache, v_cache, rotated(k, k_norm), v, slots, k_scale, v_scale, k_zero, v_zero)
    return rotated(q, q_norm)


def restore_kv_(
    keys: Tensor,
    values: Tensor,
    blocks: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    bits: int,
    group_size: int,
    ops: Any = None,
) -> None:
    """Decode n of B blocks, rotate their keys and write them at ``slots``.

    ``ops`` provides the operators; by default they are those of this module.
    """
    ops = ops or sys.modules[__name__]
    tokens, (num_kv_heads, head_dim), dtype = values.shape[1], k_cache.shape[2:], k_cache.dtype
    keys, values = (stored.index_select(0, blocks).flatten(0, 1) for stored in (keys, values))
    v = ops.dequantize_rows(values, num_kv_heads * head_dim, bits, group_size, dtype)
    columns = ops.dequantize_rows(keys, tokens, bits, tokens, dtype).view(len(blocks), v.shape[1], tokens)
    k = columns.transpose(1, 2).reshape(v.shape)
    heads = torch.cat([k[:, :head_dim], k, v], 1)  # the first as a query that nobody reads
    ops.rope_append_(heads, k_cache, v_cache, positions, cos_sin, slots, 1, num_kv_heads, None, None, 0.0)


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``; [T, I]."""
    gate, up = gate_up.to(_wide(gate_up)).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


# The order of a layer's tensors in `decoder_layers_`. An empty tensor means None.
LAYER_PARTS = (
    "input_norm", "qkv", "qkv_scale", "qkv_zero", "qkv_bias", "q_norm", "k_norm", "o", "o_scale", "o_zero", "o_bias",
    "post_norm", "gate_up", "gate_up_scale", "gate_up_zero", "gate_up_bias", "down", "down_scale", "down_zero",
    "down_bias",
)  # fmt: skip


def decoder_layers_(
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
    max_slots: int,
    intermediate: int,
    windows: Sequence[int],
    eps: float,
    k_scales: Sequence[Tensor] = (),
    v_scales: Sequence[Tensor] = (),
    k_zeros: Sequence[Tensor] = (),
    v_zeros: Sequence[Tensor] = (),
    ops: Any = None,
) -> Tensor:
    """The operators of each layer, one after another. The weights are `LAYER_PARTS`; a missing one is empty.

    ``ops`` provides the operators; by default they are those of this module.
    """
    ops = ops or sys.modules[__name__]
    hidden, head_dim = x.shape[1], cos_sin.shape[1]
    inner, scale = num_q_heads * head_dim, float(head_dim) ** -0.5
    qkv_width = inner + 2 * num_kv_heads * head_dim
    for i, window in enumerate(windows):
        given = weights[len(LAYER_PARTS) * i : len(LAYER_PARTS) * (i + 1)]
        layer = {part: t if t.numel() else None for part, t in zip(LAYER_PARTS, given, strict=True)}

        def project(part: str, x: Tensor, outputs: int, residual: Tensor | None, layer: Any = layer) -> Any:
            scales = (layer[f"{part}_scale"], layer[f"{part}_zero"])
            return ops.linear(x, layer[part], x.shape[1], outputs, layer[f"{part}_bias"], residual, *scales)

        projected = project("qkv", ops.rms_norm(x, layer["input_norm"], eps, None)[0], qkv_width, None)
        heads = (num_q_heads, num_kv_heads, layer["q_norm"], layer["k_norm"], eps)
        beside = [all_of_them[i] if all_of_them else None for all_of_them in (k_scales, v_scales, k_zeros, v_zeros)]
        q = ops.rope_append_(projected, k_caches[i], v_caches[i], positions, cos_sin, slots, *heads, *beside)
        tables = (plan[0], plan[1], plan[2], plan[3], plan[4], plan[5], plan[6], plan[7])
        sizes = (page_size, num_kv_heads, max_slots, scale, 0.0, window)
        attended = ops.tree_attention(q, k_caches[i], v_caches[i], *tables, *sizes, None, *beside)[0].flatten(1)
        if rows is not None and i == len(windows) - 1:
            attended, x = attended[rows.long()], x[rows.long()]
        x = project("o", attended, hidden, x)
        units = project("gate_up", ops.rms_norm(x, layer["post_norm"], eps, None)[0], 2 * intermediate, None)
        x = project("down", ops.swiglu(units), hidden, x)
    return x

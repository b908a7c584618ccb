"""Checks of arguments. Each error names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .choices import state

FLOAT = (torch.float32, torch.bfloat16, torch.float16)
INDEX = (torch.int32, torch.int64)
FP8 = torch.float8_e4m3fn
CACHE = (*FLOAT, FP8, torch.int8, torch.uint8)
_LARGEST = torch.finfo(torch.float32).max
_SMALLEST = torch.finfo(torch.float32).tiny


def describe(value: Any) -> str:
    """A short description of a value, for error messages."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype} on {value.device}"
    return f"{value!r} of type {type(value).__name__}"


def _fail(kind: type[Exception], name: str, expected: str, got: Any) -> NoReturn:
    raise kind(f"{name}: expected {expected}, got {got if isinstance(got, str) else describe(got)}")


def tensor(
    name: str,
    value: Any,
    dtypes: Sequence[torch.dtype] = FLOAT,
    shape: Sequence[int | str] | None = None,
    device: torch.device | None = None,
) -> None:
    """A tensor of one of `dtypes`. In `shape` a string stands for any size. TypeError, ValueError."""
    if not isinstance(value, Tensor):
        _fail(TypeError, name, "a tensor", value)
    if value.dtype not in dtypes:
        _fail(TypeError, name, " or ".join(str(d) for d in dtypes), value)
    if shape is not None:
        fits = value.dim() == len(shape) and all(
            isinstance(s, str) or s == n for s, n in zip(shape, value.shape, strict=True)
        )
        if not fits:
            _fail(ValueError, name, f"shape [{', '.join(str(s) for s in shape)}]", value)
    if device is not None and value.device != device:
        _fail(ValueError, name, f"a tensor on {device}", value)


def cache(
    name: str,
    value: Any,
    dtypes: Sequence[torch.dtype] = FLOAT,
    shape: Sequence[int | str] = ("P", "page_size", "Hkv", "D"),
    device: torch.device | None = None,
    *,
    written: bool = False,
) -> None:
    """One layer's pages: [P, page_size, Hkv, D], last dimension contiguous. If `written`, slots must not overlap.

    TypeError, ValueError.
    """
    tensor(name, value, dtypes, shape, device)
    if value.stride(3) != 1 and value.shape[3] > 1:
        _fail(ValueError, name, "a contiguous last dimension", f"strides {value.stride()}")
    if written and any(step == 0 and size > 1 for step, size in zip(value.stride(), value.shape, strict=True)):
        _fail(ValueError, name, "slots of their own to write to", f"an expanded tensor of strides {value.stride()}")


def caches(
    k_name: str,
    k_cache: Any,
    v_name: str,
    v_cache: Any,
    tokens: torch.dtype | None = None,
    shape: Sequence[int | str] = ("P", "page_size", "Hkv", "D"),
    device: torch.device | None = None,
    beside: Mapping[str, Any] | None = None,
    *,
    written: bool = False,
) -> list[int | str]:
    """The caches of a layer for heads of `shape`: of the tokens' dtype, fp8, or quantised with the tensors `beside`.

    `beside` has k_scale, v_scale, k_zero and v_zero by name. Returns [Hkv, D] of the tokens. TypeError, ValueError.
    """
    quantized = {torch.int8: 1, torch.uint8: 2}  # elements in a byte
    tensor(k_name, k_cache, CACHE if tokens is None else (tokens, FP8, *quantized))
    dtype, each = k_cache.dtype, quantized.get(k_cache.dtype, 1)
    pages, page_size, heads, head_dim = shape
    if not isinstance(head_dim, str):
        if head_dim % each:
            _fail(ValueError, k_name, f"heads of a multiple of {each} elements", f"heads of {head_dim}")
        head_dim = head_dim // each
    cache(k_name, k_cache, (dtype,), [pages, page_size, heads, head_dim], device, written=written)
    cache(v_name, v_cache, (dtype,), k_cache.shape, k_cache.device, written=written)
    if dtype in quantized and k_cache.shape[3] < 1:
        _fail(ValueError, k_name, "heads of at least one element", k_cache)
    for name, value in (beside or {}).items():
        wanted = dtype == torch.uint8 if "zero" in name else dtype in quantized
        _check_beside(name, value, k_cache, wanted)
    return [k_cache.shape[2], k_cache.shape[3] * each]


def no_cpp_for(*caches: Any) -> str:
    """Why the C++ backend has no kernels for a layer's caches; empty if it has them."""
    if all(getattr(each, "dtype", None) != FP8 or each.device.type != "cpu" for each in caches):
        return ""
    return f"k_cache: expected no {FP8} on a CPU: kernels of GPUs and the reference read it (use_backend)"


def _check_beside(name: str, value: Any, k_cache: Tensor, wanted: bool) -> None:
    """Scales or zeros of quantised caches, or None if they must be missing. TypeError, ValueError."""
    if (value is not None) != wanted:
        _fail(TypeError, name, f"{'a tensor' if wanted else 'None'} beside caches of {k_cache.dtype}", value)
    if value is None:
        return
    tensor(name, value, (torch.float16,), k_cache.shape[:3], k_cache.device)
    if not value.is_contiguous():
        _fail(ValueError, name, "a contiguous tensor", f"strides {value.stride()}")


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, open_low: bool = False) -> None:
    """A finite float32 in [low, high], or (low, high] with `open_low`. TypeError, ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _fail(TypeError, name, "a number", value)
    low, high = max(low, -_LARGEST), min(high, _LARGEST)
    if not low <= value <= high or (open_low and value < low + _SMALLEST):
        bounds = f"{'(' if open_low else '['}{low}, {high}]"
        _fail(ValueError, name, f"a finite float32 in {bounds}", value)


def integer(name: str, value: Any, low: int, end: int = 2**63) -> None:
    """An int of at least `low`, below `end`. TypeError, ValueError."""
    if isinstance(value, bool) or not isinstance(value, int):
        _fail(TypeError, name, "an int", value)
    if value < low:
        _fail(ValueError, name, f"at least {low}", value)
    if value >= end:
        _fail(ValueError, name, f"below {end}", value)


def choice(name: str, value: Any, options: Sequence[str]) -> None:
    """One of `options`. ValueError."""
    if value not in options:
        _fail(ValueError, name, f"one of {', '.join(options)}", value)


def readable(*tensors: Tensor | None) -> bool:
    """Whether values may be read: not while tracing; on a GPU only under `debug_checks` and outside graph capture."""
    if torch.compiler.is_compiling():
        return False
    real = [t for t in tensors if t is not None]
    if any(isinstance(t, FakeTensor) or t.device.type == "meta" for t in real):
        return False
    return all(t.device.type == "cpu" for t in real) or (state.debug_checks and not _capturing())


def _capturing() -> bool:
    """Whether a CUDA graph is being captured. Reading a value would break the capture."""
    built: bool = torch.backends.cuda.is_built()  # type: ignore[no-untyped-call]
    return built and torch.cuda.is_current_stream_capturing()


def index_range(name: str, values: Tensor, low: int, high: int) -> None:
    """Every value must be in [low, high), if values can be read. IndexError."""
    if not readable(values) or values.numel() == 0:
        return
    bad = ((values < low) | (values >= high)).nonzero()
    if bad.numel():
        where = int(bad[0, 0])
        _fail(IndexError, name, f"values in [{low}, {high})", f"{int(values[where])} at index {where}")


def distinct(name: str, values: Tensor) -> None:
    """No value may occur twice; checked only under `debug_checks`. ValueError."""
    if not state.debug_checks or not readable(values):
        return
    ordered = values.sort().values
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if repeated.numel():
        twice = int(repeated[0])
        first, second, *_ = (values == twice).nonzero()[:, 0].tolist()
        _fail(ValueError, name, "all different", f"{twice} at index {first} and at {second}")


def indptr(name: str, value: Any, total: int, device: torch.device | None = None) -> None:
    """Offsets [n + 1] that rise from 0 to `total`. TypeError, ValueError."""
    tensor(name, value, INDEX, ["n + 1"], device)
    if value.numel() < 1:
        _fail(ValueError, name, "at least one offset", value)
    if not readable(value):
        return
    offsets = value.tolist()
    if offsets[0] != 0 or offsets[-1] != total:
        _fail(ValueError, name, f"offsets from 0 to {total}", f"{offsets[0]} to {offsets[-1]}")
    for i, (a, b) in enumerate(pairwise(offsets)):
        if b < a:
            _fail(ValueError, name, "offsets that do not fall", f"{b} after {a} at index {i + 1}")

"""The common part of every op's tests: the tolerance rule, and the errors that must name their argument."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import tts_kernels as tk
from tts_kernels.op import OPS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = ("generic", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx")
FEW_DRAWS = 200  # instead of test_sample.DRAWS


def assert_rule(out: Tensor, exact: Tensor, plain: Tensor, slack: float = 1e-6) -> None:
    """The tolerance rule: at most twice as far from the float64 result as plain torch in the same dtype.

    `slack` (relative to the largest value) covers results where plain torch happens to be exact.
    """
    assert out.shape == exact.shape
    finite = exact.isfinite()
    assert torch.equal(out[~finite].double(), exact[~finite]) or _same_nonfinite(out[~finite], exact[~finite])
    if not finite.any():
        return
    error = (out.double() - exact)[finite].abs().max().item()
    allowed = 2 * (plain.double() - exact)[finite].abs().max().item() + slack * exact[finite].abs().max().item()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def _same_nonfinite(out: Tensor, exact: Tensor) -> bool:
    return torch.equal(out.isnan(), exact.isnan()) and torch.equal(out[~out.isnan()].double(), exact[~exact.isnan()])


def assert_names(kind: type[Exception], name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """The call raises an error of just that kind whose message starts with the argument's name."""
    with pytest.raises(kind, match=rf"^{name}") as caught:
        call(*args, **kwargs)
    assert type(caught.value) is kind


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of torch's, and then as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_same_by_threads(call: Callable[..., Tensor | Sequence[Tensor]], *args: Any, **kwargs: Any) -> None:
    """1, 2 and 3 threads, and 1 again, give the same result, or the same results."""
    results = []
    for count in (1, 2, 3, 1):
        with threads(count):
            result = call(*args, **kwargs)
        results.append([result] if isinstance(result, Tensor) else list(result))
    assert all(torch.equal(a, b) for one in results[1:] for a, b in zip(results[0], one, strict=True))


def compilations(function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> int:
    """How often torch.compile compiles for these calls."""
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for args in calls:
        compiled(*args)
    return int(counter.frame_count)


def reading_fp8(op: str) -> AbstractContextManager[object]:
    """A backend whose op reads fp8 caches: the one in use, or the definition on a CPU, where C++ has no kernel."""
    cache = torch.empty(0, dtype=torch.float8_e4m3fn)
    by_definition = tk.backend_info().in_use != "triton" and OPS[op].no_cpp_for(*[cache] * 3)
    return tk.use_backend("reference") if by_definition else nullcontext()


def assert_refuses_fp8(op: Callable[..., Any], *args: Any, **options: Any) -> None:
    """A CPU has no kernel for it, and says who reads it."""
    with tk.use_backend("cpp"):
        assert_names(
            TypeError, "k_cache: expected no torch.float8_e4m3fn on a CPU: kernels of GPUs", op, *args, **options
        )


def draw_less(items: Iterable[pytest.Item]) -> None:
    """Where kernels are emulated or interpreted each draw takes milliseconds."""
    for item in items:
        module = getattr(item, "module", None)
        if hasattr(module, "DRAWS"):
            module.DRAWS = FEW_DRAWS  # type: ignore[union-attr]

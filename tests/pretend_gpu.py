"""A simulated GPU: tensors report that they are on "cuda", while their values are on the CPU.

Within `PretendGpu` a whole search runs on ``device="cuda"``. An error on a real GPU is an error here: an operator on
tensors of two devices. So is work that makes the host wait for a real GPU, which would not be noticed there: a copy to
the device from memory that is not pinned, and a read of the device's values outside of the functions for this purpose.

The operators' CPU kernels, or those of Triton in its interpreter, run in place of the GPU's. What they do inside is not
checked.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from tts_search.models import device as traffic

from tts_kernels.op import Op

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
READERS = (traffic.read_tokens, traffic.read_scores)

aten = torch.ops.aten
MOVES = (aten.to, aten._to_copy)
# Some of what asks for a guard of the device, in tests of single operators.
UNGUARDED = (Tensor.double, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.long, Tensor.int, Tensor.bool,
             Tensor.byte, Tensor.__invert__, Tensor.contiguous, Tensor.nonzero, torch.equal, torch.nonzero)  # fmt: skip
# Operators whose result's shape hangs on values: the host has to know them.
SHAPED_BY_VALUES = (aten.nonzero, aten.masked_select, aten._unique2, aten.unique_consecutive, aten.repeat_interleave,
                    aten.bincount, aten.equal, aten.is_nonzero)  # fmt: skip


class HostWaitError(AssertionError):
    """The host would wait for the device where it must not."""


class GpuTensor(Tensor):
    """A tensor on the device; `values` are on the host."""

    values_: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> GpuTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls, values.shape, values.stride(), values.storage_offset(), dtype=values.dtype, device=CUDA
        )

    def __init__(self, values: Tensor) -> None:
        self.values_ = values

    def __repr__(self, *_: Any) -> str:
        return f"GpuTensor({list(self.shape)}, {self.dtype})"

    def data_ptr(self) -> int:
        return self.values_.data_ptr()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mode = _get_current_dispatch_mode()  # these would ask for a guard of the device first
        if func is Tensor.copy_:
            return mode._copied(*args, **(kwargs or {}))
        if func in (Tensor.__getitem__, Tensor.__setitem__) or (func in UNGUARDED and not mode.watches):
            mode._check(aten.index.Tensor, args, None)
            return mode._run(func, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: a tensor of the pretended GPU was used outside of it")


def _reader(name: str) -> Callable[..., Any]:
    def read(tensor: GpuTensor, *args: Any) -> Any:
        if _get_current_dispatch_mode().watches:
            raise HostWaitError(f"Tensor.{name} of a tensor on the device")
        return getattr(tensor.values_, name)(*args)

    return read


# torch answers these for a tensor that is on no real device before anybody is asked.
for _name in ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__", "__array__"):
    setattr(GpuTensor, _name, _reader(_name))


class PretendGpu(TorchDispatchMode):
    """The device, and its traffic with the host.

    Attributes
    ----------
    watches : bool
        Whether the traffic is looked at: not while models are loaded.
    triton : bool
        Whether Triton's kernels run, where there are such; with TRITON_INTERPRET=1.
    waits : Counter
        How often the host waited in each of `READERS`, by name.
    uploads : int
        Copies to the device, while the host goes on.
    """

    def __init__(self, watches: bool = True, triton: bool = False) -> None:
        super().__init__()
        self.watches = watches
        self.triton = triton
        self.waits: Counter[str] = Counter()
        self.uploads = 0
        self._pinned: dict[int, Tensor] = {}
        self._patches = ExitStack()

    def __enter__(self) -> PretendGpu:
        call = Op.__call__

        def on_device(op: Op, *args: Any) -> Any:
            if not _gpu_tensors(args):
                return call(op, *args)
            run = (op.triton if self.triton else None) or op.composed
            if run is None:
                return op._cpp(args)
            op.check(*args)
            return run(*args)

        fakes = mock.patch("torch.cuda._lazy_init"), mock.patch.object(Op, "__call__", on_device)
        for patch in (*fakes, torch.inference_mode()):  # there an operator arrives whole, not as parts with guards
            self._patches.enter_context(patch)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) is a tensor first, then moved
        self._patches.callback(torch._C._set_only_lift_cpu_tensors, False)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(zip(_argument_names(func), args, strict=False)) | (kwargs or {})
        packet = func.overloadpacket
        if packet is aten.pin_memory:
            self._pinned[id(pinned)] = (pinned := args[0].clone())  # type: ignore[has-type]
            return pinned
        if packet in MOVES:
            return self._moved(given)
        if packet is aten._has_compatible_shallow_copy_type:  # a module asks when it is moved
            return False
        if _gpu_tensors((args, kwargs)):
            self._check(func, args, kwargs)
        elif given.get("device") is None or torch.device(given["device"]).type != "cuda":
            return func(*args, **(kwargs or {}))
        return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """On the host's values; results are on the device, and a tensor that was written is itself."""
        mine = {id(each.values_): each for each in _gpu_tensors((args, kwargs))}
        kwargs = {name: CPU if name == "device" and value is not None else value for name, value in kwargs.items()}
        out = func(*_values(args), **_values(kwargs))
        return _mapped(lambda each: mine[id(each)] if id(each) in mine else GpuTensor(each), out)

    def _check(self, func: Any, args: Any, kwargs: Any) -> None:
        """What a GPU refuses, and what it waits for."""
        tensors = list(_tensors((args, kwargs)))
        if any(not isinstance(each, GpuTensor) and (each.dim() or func.namespace != "aten") for each in tensors):
            raise RuntimeError(f"{func}: tensors on two devices: {[(list(t.shape), str(t.device)) for t in tensors]}")
        packet = func.overloadpacket
        masks = packet in (aten.index, aten.index_put_, aten.index_put) and any(
            each.dtype in (torch.bool, torch.uint8) for each in tensors[1:]
        )
        if self.watches and (packet in SHAPED_BY_VALUES or masks):
            raise HostWaitError(f"{func}: its result's shape hangs on values of the device")

    def _moved(self, given: dict[str, Any]) -> Tensor:
        """`Tensor.to` in all its forms."""
        source, other = given["self"], given.get("other")
        device = torch.device(given.get("device") or (source if other is None else other).device)
        dtype = given.get("dtype") or (source if other is None else other).dtype
        away = device.type != source.device.type
        if not (away or given.get("copy") or dtype != source.dtype):
            return source
        if away:
            self._transfer(source, bool(given.get("non_blocking")))
        moved = _values(source).to(dtype, copy=True)
        return GpuTensor(moved) if device.type == "cuda" else moved

    def _copied(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if isinstance(target, GpuTensor) != isinstance(source, GpuTensor):
            self._transfer(source, non_blocking)
        _values(target).copy_(_values(source))
        return target

    def _transfer(self, source: Tensor, non_blocking: bool) -> None:
        """Count a copy from one side to the other; an error if the host waits in the wrong place."""
        if not self.watches:
            return
        if isinstance(source, GpuTensor):
            reader = _reader_on_stack()
            if reader is None:
                raise HostWaitError("a copy to the host outside of the functions for that")
            self.waits[reader] += not non_blocking
        elif source.dim() and (id(source) not in self._pinned or not non_blocking):
            raise HostWaitError("a copy to the device from memory that is not pinned, or one that the host waits for")
        else:
            self.uploads += 1


def _tensors(tree: Any) -> Iterator[Tensor]:
    """All tensors in lists, tuples and dicts."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for each in tree:
            yield from _tensors(each)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


def _gpu_tensors(tree: Any) -> list[GpuTensor]:
    return [each for each in _tensors(tree) if isinstance(each, GpuTensor)]


def _mapped(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The same lists, tuples and dicts with other tensors."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, list | tuple):
        return type(tree)([_mapped(change, each) for each in tree])
    return {name: _mapped(change, each) for name, each in tree.items()} if isinstance(tree, dict) else tree


def _values(tree: Any) -> Any:
    return _mapped(lambda each: each.values_ if isinstance(each, GpuTensor) else each, tree)


@cache
def _argument_names(func: Any) -> list[str]:
    return [argument.name for argument in func._schema.arguments]


def _reader_on_stack() -> str | None:
    frame = sys._getframe()
    codes = {reader.__code__: reader.__name__ for reader in READERS}
    while frame is not None and frame.f_code not in codes:
        frame = frame.f_back
    return None if frame is None else codes[frame.f_code]

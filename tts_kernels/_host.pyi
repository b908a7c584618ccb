# csrc/host/bindings.cpp. "Ints" are a sequence of int or a one-dimensional buffer of them.
from typing import Any, TypeAlias

_Ints: TypeAlias = Any

SEGMENT_INTS: int
TASK_INTS: int

class OutOfPages(RuntimeError):  # noqa: N818
    needed: int
    free: int

class IntBuffer:
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class PlanBuffer:
    @property
    def lengths(self) -> list[int]: ...
    @property
    def max_slots(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Forest:
    def __init__(self, num_pages: int, page_size: int) -> None: ...
    def add_root(self) -> int: ...
    def append(self, branches: _Ints, counts: _Ints) -> tuple[IntBuffer, IntBuffer, IntBuffer]: ...
    def fork(self, parents: _Ints) -> list[int]: ...
    def free(self, branches: _Ints) -> None: ...
    def truncate(self, branch: int, length: int) -> None: ...
    def length(self, branch: int) -> int: ...
    def page_table(self, branches: _Ints) -> tuple[IntBuffer, IntBuffer, int]: ...
    def plan(
        self,
        branches: _Ints,
        q_lens: _Ints | None,
        num_q_heads: int,
        num_kv_heads: int,
        window: int,
        gpu: bool,
        out: PlanBuffer | None,
    ) -> PlanBuffer: ...
    def stats(self) -> tuple[int, int, int, int, int]: ...

def plan_table(
    address: int,
    item_size: int,
    shape: tuple[int, int],
    strides: tuple[int, int],
    kv_lens: _Ints,
    q_lens: _Ints | None,
    page_size: int,
    num_q_heads: int,
    num_kv_heads: int,
    window: int,
    gpu: bool,
    out: PlanBuffer | None,
) -> PlanBuffer: ...

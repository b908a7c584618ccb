"""Arguments: structs, tables of pointers, views, and messages about invalid ones."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from gpu_emulator import Kernel, KernelFault, Pointers, Struct, clang, load

# y[block * n + thread] = scale * table[block][thread], by struct { float** table; float* y; int n; float scale; }
SCALE = """.version 8.5
.target sm_80
.address_size 64
.global .align 4 .u32 launches = 3;
.visible .entry scale(.param .align 8 .b8 p0[24]) {
.reg .b64 %rd<8>; .reg .b32 %r<8>; .reg .f32 %f<4>;
ld.param.u64 %rd1, [p0];
ld.param.u64 %rd2, [p0+8];
ld.param.u32 %r1, [p0+16];
ld.param.f32 %f1, [p0+20];
mov.u32 %r2, %ctaid.x;
mov.u32 %r3, %tid.x;
mul.wide.u32 %rd3, %r2, 8;
add.s64 %rd3, %rd1, %rd3;
ld.global.u64 %rd4, [%rd3];
mul.wide.u32 %rd5, %r3, 4;
add.s64 %rd4, %rd4, %rd5;
ld.global.f32 %f2, [%rd4];
mul.f32 %f2, %f2, %f1;
mad.lo.s32 %r4, %r2, %r1, %r3;
mul.wide.u32 %rd6, %r4, 4;
add.s64 %rd6, %rd2, %rd6;
st.global.f32 [%rd6], %f2;
atom.global.add.u32 %r5, [launches], 1;
ret;
}
"""
modes = pytest.mark.parametrize(
    "sanitize",
    [
        None,
        *(pytest.param(s, marks=pytest.mark.skipif(clang() is None, reason="no clang")) for s in ("address", "thread")),
    ],
)


def scale(sanitize: str | None = None) -> Kernel:
    return load(SCALE, sanitize=sanitize)


@modes
def test_struct_with_a_table_of_pointers(sanitize: str | None) -> None:
    pool = torch.randn(4, 8)
    y = torch.zeros(2, 8)
    scale(sanitize).launch(2, 8, [Struct(Pointers([pool[3], pool[1]]), y, 8, 0.5)])
    assert torch.equal(y, pool[[3, 1]] / 2)


@modes
def test_a_view_reaches_no_further_than_its_last_element(sanitize: str | None) -> None:
    pool, y = torch.randn(4, 8), torch.zeros(1, 8)
    with pytest.raises(KernelFault) as caught:
        scale(sanitize).launch(1, 8, [Struct(Pointers([pool[3, :7]]), y, 8, 0.5)])
    assert caught.value.kind == ("address" if sanitize == "address" else "out-of-bounds")
    assert caught.value.thread == (7, 0, 0)


def test_variables_of_the_module() -> None:
    kernel = scale()
    word = kernel.module.variable("launches").view(torch.int32)
    word.fill_(0)
    kernel.launch(3, 1, [Struct(Pointers([torch.zeros(1)] * 3), torch.zeros(3), 1, 1.0)])
    assert word.item() == 3
    with pytest.raises(ValueError, match="no_such"):
        kernel.module.variable("no_such")


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"args": []}, ValueError, "args must be 1 values"),
        ({"args": [ctypes.c_int32(3)]}, ValueError, r"args\[0\] must be 24 bytes"),
        ({"args": ["x"]}, TypeError, r"args\[0\] must be a tensor"),
        ({"args": [torch.zeros(1, device="meta")]}, ValueError, "CPU tensor"),
        ({"block": 1025}, ValueError, "block must be"),
        ({"block": (32, 33)}, ValueError, "at most 1024 threads"),
        ({"grid": 0}, ValueError, "grid must be"),
        ({"grid": (1, 65536)}, ValueError, "grid must be"),
        ({"block": (1, 1, 65)}, ValueError, "block must be"),
        ({"dynamic_smem": 10**6}, ValueError, "dynamic_smem must be"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], error: type[Exception], text: str) -> None:
    good = {"grid": 1, "block": 1, "args": [Struct(None, None, 1, 1.0)]}
    with pytest.raises(error, match=text):
        scale().launch(**(good | change))


def test_launch_bounds_are_kept() -> None:
    kernel = load(SCALE.replace("p0[24]) {", "p0[24]) .maxntid 32, 2, 1 {"))
    x, y = torch.ones(64), torch.zeros(1, 64)
    kernel.launch(1, 64, [Struct(Pointers([x]), y, 64, 2.0)])
    assert y.eq(2.0).all()
    with pytest.raises(ValueError, match="at most 64 threads"):
        kernel.launch(1, 65, [Struct(Pointers([x]), y, 64, 2.0)])


def test_a_kernel_alone_leaves_out_what_the_others_need() -> None:
    text = SCALE + ".visible .entry other() { nanosleep.u32 1; ret; }\n"
    y = torch.zeros(1, 2)
    load(text, "scale", alone=True).launch(1, 2, [Struct(Pointers([torch.ones(2)]), y, 2, 3.0)])
    assert y.tolist() == [[3.0, 3.0]]


def test_a_kernel_must_be_named_if_there_are_several() -> None:
    with pytest.raises(ValueError, match="name must pick one kernel"):
        load(SCALE + ".visible .entry other() { ret; }\n")
    with pytest.raises(ValueError, match="sanitize must be"):
        load(SCALE, sanitize="memory")

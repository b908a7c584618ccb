"""Runs CUDA kernels without a GPU: PTX is translated to C++, threads are fibers, and accesses and barriers are checked.

>>> kernel = load("softmax.cu", "softmax")                                        # doctest: +SKIP
>>> kernel.launch(grid=4, block=128, args=[x, y, 1000], dynamic_smem=4000)        # doctest: +SKIP

README.md in this folder describes what is supported and how faults are judged.
"""

from __future__ import annotations

from .build import ToolMissing, clang, compile_cuda, nvcc
from .errors import KernelFault, UnsupportedPTX
from .kernel import Kernel, Module, Pointers, Struct, load

__all__ = [
    "Kernel",
    "KernelFault",
    "Module",
    "Pointers",
    "Struct",
    "ToolMissing",
    "UnsupportedPTX",
    "clang",
    "compile_cuda",
    "load",
    "nvcc",
]

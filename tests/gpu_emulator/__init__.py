"""Runs CUDA kernels without a GPU: PTX translated to C++, threads as fibers, every access and every barrier checked.

>>> kernel = load("softmax.cu", "softmax")                                        # doctest: +SKIP
>>> kernel.launch(grid=4, block=128, args=[x, y, 1000], dynamic_smem=4000)        # doctest: +SKIP

See README.md in this folder for what is covered and how it judges.
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

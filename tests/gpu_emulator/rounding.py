"""Finds products and sums whose rounding a kernel leaves to the compiler.

When PTX is compiled for a GPU, a ``mul`` without a rounding modifier and an ``add`` or ``sub`` of its result without
one may become one ``fma``, which rounds once (PTX ISA, "mul"); usually they do. The emulator runs PTX as it is written,
so for such code its results do not tell what a GPU computes. Source code that fixes the rounding, by ``fmaf`` or
``__fmul_rn``, has no such places.
"""

from __future__ import annotations

import re

from . import ptx
from .ptx import Function, Instruction, Label, Scope

_PLAIN = re.compile(r"(mul|add|sub)(?:\.ftz)?(?:\.sat)?\.(?:f32|f64)")  # no .rn


def fusible(text: str) -> list[str]:
    """Where a module adds a product that may be fused with the sum: "kernel file:line", those in straight code."""
    module = ptx.parse(text)
    return [
        f"{function.name} {module.files.get(i.location[0], '?')}:{i.location[1]}"
        for function in module.functions.values()
        for i in _sums_of_products(function)
    ]


def _sums_of_products(function: Function) -> list[Instruction]:
    found: list[Instruction] = []
    products: dict[str, set[str]] = {}  # register -> its factors, as long as none of them is written again
    for statement in function.body or []:
        if isinstance(statement, Label | Scope):
            products.clear()
        if not isinstance(statement, Instruction) or not statement.operands:
            continue
        plain = _PLAIN.fullmatch(statement.opcode)
        target, *operands = statement.operands
        if plain and plain[1] != "mul" and any(operand in products for operand in operands):
            found.append(statement)
        written = set(re.findall(r"%[\w.]+", target))
        products = {name: factors for name, factors in products.items() if not written & {name, *factors}}
        if plain and plain[1] == "mul" and target not in operands:
            products[target] = set(operands)
    return found

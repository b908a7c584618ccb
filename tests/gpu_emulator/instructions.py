"""One C++ statement for each PTX instruction.

The rule of an instruction must use every modifier; unused ones raise `UnsupportedPTX`. So nothing is ignored that could
change a result. Modifiers that are only hints (caches, prefetches) are listed in `HINTS`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable
from typing import Protocol

from .errors import UnsupportedPTX
from .ptx import Instruction, type_size

INTEGERS = {"u8", "u16", "u32", "u64", "s8", "s16", "s32", "s64"}
BITS = {"b8", "b16", "b32", "b64"}
PACKED = {"f16x2": "f16", "bf16x2": "bf16"}
NARROW = {"f16", "bf16", "e4m3", "e5m2"}
TYPES = INTEGERS | BITS | set(PACKED) | NARROW | {"f32", "f64", "tf32", "pred"}
ROUNDINGS = {"rn": "kNearest", "rz": "kZero", "rm": "kDown", "rp": "kUp", "rna": "kAway"}
HINTS = {"ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "L1__evict_normal", "L1__evict_unchanged", "L1__evict_first",
         "L1__evict_last", "L1__no_allocate", "L2__64B", "L2__128B", "L2__256B", "L2__evict_first", "L2__evict_last",
         "L2__evict_normal"}  # fmt: skip


class Names(Protocol):
    """What an instruction may ask of the function that it stands in."""

    def value(self, operand: str, ptx_type: str) -> str: ...
    def target(self, operand: str) -> str: ...
    def is_predicate(self, operand: str) -> bool: ...
    def address(self, operand: str) -> str: ...
    def parameter(self, operand: str) -> str | None: ...
    def site(self, line: int) -> str: ...
    def jump(self, label: str, line: int) -> str: ...
    def jump_table(self, index: str, table: str, line: int) -> str: ...
    def call(self, operands: tuple[str, ...], line: int) -> str: ...
    @property
    def leave(self) -> str: ...


class Op:
    """An instruction whose modifiers are taken one after another."""

    def __init__(self, instruction: Instruction, names: Names) -> None:
        self.instruction = instruction
        self.names = names
        self.left = list(instruction.modifiers)
        self.args = instruction.operands
        self.line = instruction.line

    def flag(self, *modifiers: str) -> bool:
        """Take a modifier if it is there."""
        for modifier in modifiers:
            if modifier in self.left:
                self.left.remove(modifier)
                return True
        return False

    def one_of(self, choices: Iterable[str], default: str | None = None) -> str:
        """Take the first modifier that is one of `choices`."""
        for modifier in self.left:
            if modifier in choices:
                self.left.remove(modifier)
                return modifier
        if default is None:
            raise self.unsupported("expected one of ." + " .".join(sorted(choices)))
        return default

    def type(self, choices: Iterable[str] = TYPES) -> str:
        """The next type, which must be one of `choices`."""
        for modifier in self.left:
            if modifier in TYPES:
                if modifier not in choices:
                    raise self.unsupported(f"type .{modifier}")
                self.left.remove(modifier)
                return modifier
        raise self.unsupported("no type")

    def rounding(self, default: str = "rn", choices: Iterable[str] = ("rn", "rz", "rm", "rp")) -> str:
        return f"Round::{ROUNDINGS[self.one_of(choices, default)]}"

    def hints(self) -> None:
        """Take cache hints; an operand with a policy goes with `.L2::cache_hint`."""
        self.left = [m for m in self.left if m not in HINTS]
        if self.flag("L2__cache_hint"):
            self.args = self.args[:-1]

    def done(self) -> None:
        """All modifiers must have been taken."""
        if self.left:
            raise self.unsupported("modifier ." + " .".join(self.left))

    def unsupported(self, what: str) -> UnsupportedPTX:
        return UnsupportedPTX(f"PTX line {self.line}: {self.instruction.opcode}: {what}")

    def value(self, index: int, ptx_type: str) -> str:
        return self.names.value(self.args[index], ptx_type)

    def values(self, ptx_type: str, start: int = 1) -> str:
        """The operands from `start` on, as arguments."""
        return ", ".join(self.value(i, ptx_type) for i in range(start, len(self.args)))

    def set(self, expression: str, index: int = 0) -> str:
        """Assign to the destination."""
        self.done()
        target = self.names.target(self.args[index])
        return f"{target} = {expression};" if target else f"(void)({expression});"

    @property
    def site(self) -> str:
        return self.names.site(self.line)


Rule = Callable[[Op], str]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def translate(instruction: Instruction, names: Names) -> str:
    """The C++ statement of an instruction, without its guard.

    Raises
    ------
    UnsupportedPTX
        The instruction, a modifier or an operand is not implemented.
    """
    op = Op(instruction, names)
    if instruction.name not in RULES:
        raise UnsupportedPTX(f"PTX line {instruction.line}: instruction {instruction.opcode}")
    return RULES[instruction.name](op)


def word(ptx_type: str) -> str:
    """The C++ word that a register of this type is."""
    return "bool" if ptx_type == "pred" else f"u{8 * type_size(ptx_type)}"


def cpp_type(ptx_type: str) -> str:
    """u32 for b32; integers and float tags as they are."""
    return "u" + ptx_type[1:] if ptx_type in BITS else ptx_type


def cpp(flag: bool) -> str:
    return "true" if flag else "false"


def literal(text: str, ptx_type: str) -> str | None:
    """A number as a C++ constant of the type's word, None if `text` is no number."""
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        return f"0x{match[1]}u"
    if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
        return f"0x{match[1]}ull"
    if re.fullmatch(r"-?\d*\.\d*(?:[eE][-+]?\d+)?", text) and text not in ("", ".", "-"):
        if ptx_type == "f64":
            return f"0x{struct.pack('>d', float(text)).hex()}ull"
        return f"0x{struct.pack('>f', float(text)).hex()}u"
    if re.fullmatch(r"-?(?:0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", text):
        digits = text.rstrip("U")
        number = int(digits, 8) if re.fullmatch(r"-?0[0-7]+", digits) else int(digits, 0)
        if ptx_type == "pred":
            return cpp(bool(number))
        bits = 8 * type_size(ptx_type)
        return f"static_cast<u{bits}>(0x{number % 2**bits:x}{'ull' if bits == 64 else 'u'})"
    return None


# ---- arithmetic ----
def _float_op(op: Op, kind: str, name: str) -> str:
    """add, sub, mul of a floating type; `name` is the function without its suffix."""
    if kind == "f64":
        return op.set(f"{name}_f64<{op.rounding()}>({op.values('f64')})")
    if kind == "f32":
        flags = f"{op.rounding()}, {cpp(op.flag('ftz'))}, {cpp(op.flag('sat'))}"
        narrow = op.one_of({"f16", "bf16"}, "") if name != "mul" else ""  # add.f32.bf16: the first operand is narrow
        args = f"widen32<{narrow}>({op.value(1, narrow)}), {op.value(2, 'f32')}" if narrow else op.values("f32")
        return op.set(f"{name}_f32<{flags}>({args})")
    op.flag("rn")
    base = PACKED.get(kind, kind)
    flags = f"{base}, {cpp(op.flag('ftz'))}, {cpp(op.flag('sat'))}"
    return op.set(_halves(op, kind, f"{name}_16<{flags}>"))


def _halves(op: Op, kind: str, function: str, start: int = 1) -> str:
    """Apply a 16-bit function to one value or to both of a pair."""
    if kind not in PACKED:
        return f"{function}({op.values('b16', start)})"
    count = len(op.args) - start
    params, args = (", ".join(f"{p}{i}" for i in range(count)) for p in ("u16 x", "x"))
    return f"packed([]({params}) {{ return {function}({args}); }}, {op.values('b32', start)})"


FLOATS = {"f16", "bf16", "f16x2", "bf16x2", "f32", "f64"}


@rule("add", "sub")
def _add(op: Op) -> str:
    name = op.instruction.name
    kind = op.type(INTEGERS | FLOATS)
    if kind in FLOATS:
        return _float_op(op, kind, name)
    a, b = op.value(1, kind), op.value(2, kind)
    sign = "+" if name == "add" else "-"
    if op.flag("cc"):
        function = "add_carry" if name == "add" else "sub_borrow"
        return op.set(f"{function}<{word(kind)}>({a}, {b}, false, carry)")
    if op.flag("sat"):
        if kind != "s32":
            raise op.unsupported("modifier .sat")
        return op.set(f"saturate<s32>(s64(s32({a})) {sign} s64(s32({b})))")
    return op.set(f"static_cast<{word(kind)}>({a} {sign} {b})")


@rule("addc", "subc")
def _add_carry(op: Op) -> str:
    kind = op.type({"u32", "s32", "u64", "s64", "b32", "b64"})
    function = "add_carry" if op.instruction.name == "addc" else "sub_borrow"
    out = "carry" if op.flag("cc") else "no_carry"
    return op.set(f"{function}<{word(kind)}>({op.value(1, kind)}, {op.value(2, kind)}, carry, {out})")


@rule("mul")
def _mul(op: Op) -> str:
    kind = op.type(INTEGERS | FLOATS)
    if kind in FLOATS:
        return _float_op(op, kind, "mul")
    return op.set(_product(op, kind))


def _product(op: Op, kind: str) -> str:
    part = op.one_of({"lo", "hi", "wide"})
    a, b = op.value(1, kind), op.value(2, kind)
    if part == "lo":  # unsigned and wide, since u16 * u16 would overflow int
        return f"static_cast<{word(kind)}>(u64({a}) * u64({b}))"
    return f"mul_{'high' if part == 'hi' else 'wide'}<{cpp_type(kind)}>({a}, {b})"


@rule("mad", "fma")
def _fma(op: Op) -> str:
    kind = op.type(INTEGERS | FLOATS)
    if kind == "f64":
        return op.set(f"fma_f64<{op.rounding()}>({op.values('f64')})")
    if kind == "f32":
        flags = f"{op.rounding()}, {cpp(op.flag('ftz'))}, {cpp(op.flag('sat'))}"
        narrow = op.one_of({"f16", "bf16"}, "")
        factors = [f"widen32<{narrow}>({op.value(i, narrow)})" if narrow else op.value(i, "f32") for i in (1, 2)]
        return op.set(f"fma_f32<{flags}>({', '.join(factors)}, {op.value(3, 'f32')})")
    if kind in FLOATS:
        op.flag("rn")
        flags = f"{PACKED.get(kind, kind)}, {cpp(op.flag('ftz'))}, {cpp(op.flag('sat'))}, {cpp(op.flag('relu'))}"
        return op.set(_halves(op, kind, f"fma_16<{flags}>"))
    wide = "wide" in op.left
    wider = {2: "u32", 4: "u64"}[type_size(kind)] if wide else word(kind)
    product = _product(op, kind)
    c = op.value(3, {"u32": "b32", "u64": "b64", "u16": "b16"}[wider])
    if op.flag("cc"):
        return op.set(f"add_carry<{wider}>({product}, {c}, false, carry)")
    return op.set(f"static_cast<{wider}>({product} + {c})")


@rule("madc")
def _madc(op: Op) -> str:
    kind = op.type({"u32", "s32", "u64", "s64"})
    product = _product(op, kind)
    out = "carry" if op.flag("cc") else "no_carry"
    return op.set(f"add_carry<{word(kind)}>({product}, {op.value(3, kind)}, carry, {out})")


@rule("mul24", "mad24")
def _mul24(op: Op) -> str:
    kind = op.type({"u32", "s32"})
    op.one_of({"lo"})
    shift = f"({cpp_type(kind)}({{}} << 8) >> 8)"
    product = f"u32({shift.format(op.value(1, kind))} * {shift.format(op.value(2, kind))})"
    return op.set(product if op.instruction.name == "mul24" else f"{product} + {op.value(3, kind)}")


@rule("div")
def _div(op: Op) -> str:
    kind = op.type(INTEGERS | {"f32", "f64"})
    if kind == "f64":
        return op.set(f"div_f64<{op.rounding()}>({op.values(kind)})")
    if kind == "f32":
        op.flag("approx", "full")  # computed exactly
        return op.set(f"div_f32<{op.rounding()}, {cpp(op.flag('ftz'))}>({op.values(kind)})")
    return op.set(f"divide<{cpp_type(kind)}>({op.values(kind)})")


@rule("rem")
def _rem(op: Op) -> str:
    kind = op.type(INTEGERS)
    return op.set(f"remainder<{cpp_type(kind)}>({op.values(kind)})")


@rule("abs", "neg")
def _abs(op: Op) -> str:
    name = op.instruction.name
    kind = op.type({"s16", "s32", "s64"} | FLOATS)
    if kind == "f64":
        return op.set(f"{name}_f64({op.values(kind)})")
    if kind == "f32":
        return op.set(f"{name}_f32<{cpp(op.flag('ftz'))}>({op.values(kind)})")
    if kind in FLOATS:
        return op.set(_halves(op, kind, f"{name}_16<{PACKED.get(kind, kind)}, {cpp(op.flag('ftz'))}>"))
    a = op.value(1, kind)
    negative = f"static_cast<{word(kind)}>(-{a})"
    return op.set(negative if name == "neg" else f"({kind}({a}) < 0 ? {negative} : {a})")


@rule("min", "max")
def _minmax(op: Op) -> str:
    largest = cpp(op.instruction.name == "max")
    kind = op.type(INTEGERS | FLOATS | {"u16x2", "s16x2"})
    if kind in INTEGERS:
        if op.flag("relu"):
            if kind != "s32":
                raise op.unsupported("modifier .relu")
            return op.set(f"minmax_int<s32>(minmax_int<s32>({op.values(kind)}, {largest}), 0, true)")
        return op.set(f"minmax_int<{cpp_type(kind)}>({op.values(kind)}, {largest})")
    ftz, nan, xorsign = op.flag("ftz"), op.flag("NaN"), op.flag("xorsign")
    if xorsign and not op.flag("abs"):
        raise op.unsupported("modifier .xorsign without .abs")
    base = PACKED.get(kind, kind)
    function = f"minmax_float<{base}, {largest}, {cpp(ftz)}, {cpp(nan)}, {cpp(xorsign)}>"
    if base in NARROW:
        return op.set(_halves(op, kind, function))
    if len(op.args) == 4:
        return op.set(f"{function}({function}({op.value(1, kind)}, {op.value(2, kind)}), {op.value(3, kind)})")
    return op.set(f"{function}({op.values(kind)})")


@rule("sad")
def _sad(op: Op) -> str:
    kind = op.type({"u16", "s16", "u32", "s32", "u64", "s64"})
    a, b, c = (f"{cpp_type(kind)}({op.value(i, kind)})" for i in (1, 2, 3))
    return op.set(f"static_cast<{word(kind)}>(({a} < {b} ? {word(kind)}({b}) - {a} : {word(kind)}({a}) - {b}) + {c})")


@rule("rcp", "rsqrt", "sqrt")
def _roots(op: Op) -> str:
    name, kind = op.instruction.name, op.type({"f32", "f64"})
    approximate, ftz = op.flag("approx"), op.flag("ftz")
    if kind == "f64":
        if approximate and name != "sqrt":
            return op.set(f"{name}_ftz_f64({op.values(kind)})")
        if name == "sqrt":
            return op.set(f"sqrt_f64<{op.rounding()}>({op.values(kind)})")
        if name == "rcp":
            return op.set(f"div_f64<{op.rounding()}>(0x3ff0000000000000ull, {op.values(kind)})")
        raise op.unsupported("type .f64")
    if approximate and name != "sqrt":
        return op.set(f"{name}_approx<{cpp(ftz)}>({op.values(kind)})")
    if name == "sqrt":
        return op.set(f"sqrt_f32<{op.rounding()}, {cpp(ftz)}>({op.values(kind)})")
    if name == "rcp":
        return op.set(f"div_f32<{op.rounding()}, {cpp(ftz)}>(0x3f800000u, {op.values(kind)})")
    raise op.unsupported("without .approx")


@rule("sin", "cos", "lg2", "ex2", "tanh")
def _transcendental(op: Op) -> str:
    name = op.instruction.name
    op.one_of({"approx"})
    kind = op.type({"f32"} | ({"f16", "bf16", "f16x2", "bf16x2"} if name in ("ex2", "tanh") else set()))
    ftz = op.flag("ftz")
    if kind != "f32":
        return op.set(_halves(op, kind, f"{name}_16<{PACKED.get(kind, kind)}>"))
    function = {"sin": "sin_approx", "cos": "cos_approx"}.get(name, name)
    if name == "tanh":
        return op.set(f"tanh_approx({op.values(kind)})")
    return op.set(f"{function}<{cpp(ftz)}>({op.values(kind)})")


@rule("copysign")
def _copysign(op: Op) -> str:
    kind = op.type({"f32", "f64"})
    sign = "0x80000000u" if kind == "f32" else "(1ull << 63)"
    return op.set(f"({op.value(2, kind)} & ~{sign}) | ({op.value(1, kind)} & {sign})")


@rule("testp")
def _testp(op: Op) -> str:
    properties = ["finite", "infinite", "number", "notanumber", "normal", "subnormal"]
    found = op.one_of(properties)
    kind = op.type({"f32", "f64"})
    return op.set(f"test_property<{kind}>({op.value(1, kind)}, {properties.index(found)})")


# ---- bits ----
@rule("and", "or", "xor")
def _logic(op: Op) -> str:
    sign = {"and": "&", "or": "|", "xor": "^"}[op.instruction.name]
    kind = op.type({"b16", "b32", "b64", "pred"})
    return op.set(f"static_cast<{word(kind)}>({op.value(1, kind)} {sign} {op.value(2, kind)})")


@rule("not")
def _not(op: Op) -> str:
    kind = op.type({"b16", "b32", "b64", "pred"})
    a = op.value(1, kind)
    return op.set(f"!({a})" if kind == "pred" else f"static_cast<{word(kind)}>(~{a})")


@rule("cnot")
def _cnot(op: Op) -> str:
    kind = op.type({"b16", "b32", "b64"})
    return op.set(f"{op.value(1, kind)} == 0")


@rule("shl", "shr")
def _shift(op: Op) -> str:
    function = "shift_left" if op.instruction.name == "shl" else "shift_right"
    kind = op.type(INTEGERS | BITS)
    return op.set(f"{function}<{cpp_type(kind)}>({op.value(1, kind)}, {op.value(2, 'u32')})")


@rule("shf")
def _funnel(op: Op) -> str:
    direction = {"l": "left", "r": "right"}[op.one_of({"l", "r"})]
    clamp = op.one_of({"clamp", "wrap"}) == "clamp"
    op.type({"b32"})
    return op.set(f"funnel_{direction}({op.values('b32')}, {cpp(clamp)})")


@rule("bfe")
def _bfe(op: Op) -> str:
    kind = op.type({"u32", "s32", "u64", "s64"})
    return op.set(f"extract_bits<{kind}>({op.value(1, kind)}, {op.value(2, 'u32')}, {op.value(3, 'u32')})")


@rule("bfi")
def _bfi(op: Op) -> str:
    kind = op.type({"b32", "b64"})
    args = f"{op.value(1, kind)}, {op.value(2, kind)}, {op.value(3, 'u32')}, {op.value(4, 'u32')}"
    return op.set(f"insert_bits<{cpp_type(kind)}>({args})")


@rule("bmsk")
def _bmsk(op: Op) -> str:
    clamp = op.one_of({"clamp", "wrap"}) == "clamp"
    op.type({"b32"})
    return op.set(f"bit_mask({op.values('b32')}, {cpp(clamp)})")


@rule("szext")
def _szext(op: Op) -> str:
    clamp = op.one_of({"clamp", "wrap"}) == "clamp"
    kind = op.type({"u32", "s32"})
    return op.set(f"extend_sign<{kind}>({op.values('b32')}, {cpp(clamp)})")


@rule("popc")
def _popc(op: Op) -> str:
    kind = op.type({"b32", "b64"})
    return op.set(f"static_cast<u32>(std::popcount({op.value(1, kind)}))")


@rule("clz")
def _clz(op: Op) -> str:
    kind = op.type({"b32", "b64"})
    return op.set(f"static_cast<u32>(std::countl_zero({op.value(1, kind)}))")


@rule("brev")
def _brev(op: Op) -> str:
    kind = op.type({"b32", "b64"})
    return op.set(f"reverse_bits<{cpp_type(kind)}>({op.value(1, kind)})")


@rule("bfind")
def _bfind(op: Op) -> str:
    shift = op.flag("shiftamt")
    kind = op.type({"u32", "s32", "u64", "s64"})
    return op.set(f"find_leading<{kind}>({op.value(1, kind)}, {cpp(shift)})")


@rule("fns")
def _fns(op: Op) -> str:
    op.type({"b32"})
    return op.set(f"find_nth({op.values('b32')})")


@rule("lop3")
def _lop3(op: Op) -> str:
    op.type({"b32"})
    if op.flag("and", "or"):
        raise op.unsupported("a predicate of lop3")
    table = int(op.args[4], 0)
    return op.set(f"logic3<{table}>({op.value(1, 'b32')}, {op.value(2, 'b32')}, {op.value(3, 'b32')})")


@rule("prmt")
def _prmt(op: Op) -> str:
    op.type({"b32"})
    modes = {"f4e": "kForward4", "b4e": "kBackward4", "rc8": "kReplicate8", "ecl": "kClampLeft", "ecr": "kClampRight",
             "rc16": "kReplicate16"}  # fmt: skip
    mode = op.one_of(modes, "")
    if mode:
        return op.set(f"permute_pattern<Permute::{modes[mode]}>({op.values('b32')})")
    return op.set(f"permute_bytes({op.values('b32')})")


@rule("dp4a", "dp2a")
def _dot(op: Op) -> str:
    name = op.instruction.name
    high = op.one_of({"lo", "hi"}) == "hi" if name == "dp2a" else False
    a, b = op.type({"u32", "s32"})[0], op.type({"u32", "s32"})[0]
    if name == "dp4a":
        return op.set(f"dot4<{a}8, {b}8>({op.values('b32')})")
    return op.set(f"dot2<{a}16, {b}8>({op.values('b32')}, {cpp(high)})")


# ---- comparison and selection ----
_COMPARE = {
    c: "k" + c.capitalize()
    for c in ("eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")
} | {"lo": "kLt", "ls": "kLe", "hi": "kGt", "hs": "kGe"}


@rule("setp", "set")
def _setp(op: Op) -> str:
    name = op.instruction.name
    comparison = op.one_of(_COMPARE)
    combine = op.one_of({"and", "or", "xor"}, "")
    ftz = op.flag("ftz")
    result = op.type({"u32", "s32", "f32", "u16", "s16"}) if name == "set" else "pred"
    kind = op.type(INTEGERS | BITS | {"f16", "bf16", "f32", "f64"} | set(PACKED))
    if kind in PACKED:
        return _setp_packed(op, comparison, combine, kind)
    a, b = op.value(1, kind), op.value(2, kind)
    function = f"compare<Compare::{_COMPARE[comparison]}, {cpp_type(kind)}, {cpp(ftz)}, {word(kind)}>"
    op.done()
    test = f"{function}({a}, {b})"
    sign = {"and": "&", "or": "|", "xor": "^", "": ""}[combine]
    c = op.value(3, "pred") if combine else ""
    joined = (lambda t: f"bool({t} {sign} {c})") if combine else (lambda t: t)
    if name == "set":
        yes = {"f32": "0x3f800000u"}.get(result, "~0u")
        return op.set(f"static_cast<{word(result)}>({joined(test)} ? {yes} : 0u)")
    first, _, second = op.args[0].partition("|")
    if not second:
        return f"{op.names.target(first)} = {joined(test)};" if op.names.target(first) else ";"
    p, q = op.names.target(first), op.names.target(second)
    assign = [f"{p} = {joined('test')};" if p else "", f"{q} = {joined('!test')};" if q else ""]
    # the third operand may be a destination as well: read it first
    return (
        f"{{ const bool test = {test}; {' '.join(assign)} }}"
        if not combine
        else (
            f"{{ const bool test = {test}, third = {c}; "
            + (f"{p} = test {sign} third; " if p else "")
            + (f"{q} = !test {sign} third; " if q else "")
            + "}"
        )
    )


def _setp_packed(op: Op, comparison: str, combine: str, kind: str) -> str:
    if combine:
        raise op.unsupported(f"modifier .{combine} of packed operands")
    op.done()
    a, b = op.value(1, kind), op.value(2, kind)
    test = f"compare<Compare::{_COMPARE[comparison]}, {PACKED[kind]}, false, u16>"
    p, _, q = op.args[0].partition("|")
    parts = [(p, 0), (q, 16)] if q else [(p, 0)]
    lines = [f"{op.names.target(r)} = {test}(u16(a >> {s}), u16(b >> {s}));" for r, s in parts if op.names.target(r)]
    return f"{{ const u32 a = {a}, b = {b}; {' '.join(lines)} }}"


@rule("selp")
def _selp(op: Op) -> str:
    kind = op.type()
    return op.set(f"{op.value(3, 'pred')} ? {op.value(1, kind)} : {op.value(2, kind)}")


@rule("slct")
def _slct(op: Op) -> str:
    ftz = op.flag("ftz")
    kind, by = op.type(), op.type({"s32", "f32"})
    c = op.value(3, by)
    test = f"s32({c}) >= 0" if by == "s32" else f"operand<{cpp(ftz)}>({c}) >= 0.0f"
    return op.set(f"{test} ? {op.value(1, kind)} : {op.value(2, kind)}")


# ---- moves and conversions ----
@rule("mov")
def _mov(op: Op) -> str:
    kind = op.type()
    destination, source = op.args
    if destination.startswith("{"):
        parts = vector(destination)
        bits = 8 * type_size(kind) // len(parts)
        op.done()
        lines = [
            f"{t} = static_cast<u{bits}>(whole >> {bits * i});"
            for i, p in enumerate(parts)
            if (t := op.names.target(p))
        ]
        return f"{{ const {word(kind)} whole = {op.names.value(source, kind)}; {' '.join(lines)} }}"
    if source.startswith("{"):
        parts = vector(source)
        bits = 8 * type_size(kind) // len(parts)
        fields = (f"{word(kind)}({op.names.value(p, f'b{bits}')}) << {bits * i}" for i, p in enumerate(parts))
        return op.set(" | ".join(fields))
    return op.set(op.names.value(source, kind))


def vector(operand: str) -> list[str]:
    """The elements of ``{a, b, c}``."""
    return [part.strip() for part in operand.strip("{}").split(",")]


@rule("cvta")
def _cvta(op: Op) -> str:
    to = op.flag("to")
    space = op.one_of({"global", "shared", "local", "const", "param", "shared__cta"})
    kind = op.type({"u64", "u32"})
    a = op.names.value(op.args[1], kind)
    if space.startswith("shared"):
        return op.set(f"static_cast<{word(kind)}>({'generic_to_shared' if to else 'shared_to_generic'}({a}))")
    return op.set(a)  # the other spaces are addressed by the host's addresses


@rule("isspacep")
def _isspacep(op: Op) -> str:
    space = op.one_of({"global", "shared", "local", "const", "shared__cta"})
    a = op.value(1, "u64")
    test = {"shared": f"is_shared({a})", "shared__cta": f"is_shared({a})", "local": f"is_local({a})"}
    if space == "const":
        raise op.unsupported("isspacep.const")
    return op.set(test.get(space, f"!is_shared({a}) && !is_local({a})"))


@rule("cvt")
def _cvt(op: Op) -> str:
    if op.flag("pack"):
        raise op.unsupported("cvt.pack")
    rounding = op.one_of([*ROUNDINGS, *(r + "i" for r in ("rn", "rz", "rm", "rp"))], "")
    ftz, sat, relu, finite = op.flag("ftz"), op.flag("sat"), op.flag("relu"), op.flag("satfinite")
    floats = FLOATS | {"tf32"}
    fp8 = {"e4m3x2": "e4m3", "e5m2x2": "e5m2"}
    for name, base in fp8.items():
        if name in op.left:
            return _cvt_fp8(op, name, base, relu)
    to = op.type(INTEGERS | floats)
    source = op.type(INTEGERS | FLOATS)
    mode = f"Round::{ROUNDINGS[rounding[:2]]}" if rounding and rounding != "rna" else "Round::kNearest"
    if rounding == "rna":
        mode = "Round::kAway"
    a = op.value(1, source)
    if to in PACKED:  # two f32 values: the first becomes the high half
        function = f"float_to_float<{PACKED[to]}, f32, {mode}, {cpp(ftz)}, {cpp(sat)}, {cpp(relu)}, {cpp(finite)}>"
        return op.set(f"u32({function}({op.value(1, 'f32')})) << 16 | {function}({op.value(2, 'f32')})")
    if to in INTEGERS and source in INTEGERS:
        value = f"{source}({a})"
        return op.set(f"{to}(saturate<{to}>({value}))" if sat else f"{to}({value})")
    if to in INTEGERS:
        return op.set(f"{to}(float_to_int<{to}, {source}, {mode}, {cpp(ftz)}>({a}))")
    if source in INTEGERS:
        return op.set(f"int_to_float<{to}, {source}, {mode}, {cpp(sat)}>({source}({a}))")
    if to == source and not relu and (rounding.endswith("i") or not rounding):
        if rounding:
            return op.set(f"round_float<{to}, {mode}, {cpp(ftz)}, {cpp(sat)}>({a})")
        if not ftz and not sat:
            return op.set(a)
    flags = f"{cpp(ftz)}, {cpp(sat)}, {cpp(relu)}, {cpp(finite)}"
    return op.set(f"float_to_float<{to}, {source}, {mode}, {flags}>({a})")


def _cvt_fp8(op: Op, name: str, base: str, relu: bool) -> str:
    """cvt.rn.satfinite.e4m3x2.f32 d, a, b and cvt.rn.f16x2.e4m3x2 d, a."""
    index = op.left.index(name)
    op.left.remove(name)
    if index == 0:
        source = op.type({"f32", "f16x2"})
        one = "f16" if source == "f16x2" else "f32"
        function = f"float_to_float<{base}, {one}, Round::kNearest, false, false, {cpp(relu)}, true>"
        if source == "f32":
            return op.set(f"u16({function}({op.value(1, 'f32')}) << 8 | {function}({op.value(2, 'f32')}))")
        a = op.value(1, "b32")
        return op.set(f"u16({function}(u16({a} >> 16)) << 8 | {function}(u16({a})))")
    op.type({"f16x2"})
    function = f"float_to_float<f16, {base}, Round::kNearest, false, false, {cpp(relu)}, false>"
    a = op.value(1, "b16")
    return op.set(f"u32({function}(u8({a} >> 8))) << 16 | {function}(u8({a}))")


# ---- memory ----
_SPACES = {"global": "kGlobal", "const": "kGlobal", "shared": "kShared", "shared__cta": "kShared", "local": "kLocal",
           "param": "kParam"}  # fmt: skip
_ORDERS = {"relaxed": "kRelaxed", "acquire": "kAcquire", "release": "kRelease", "acq_rel": "kAcqRel"}
_SCOPES = {"cta": "kBlock", "cluster": "kGrid", "gpu": "kGrid", "sys": "kGrid"}


def _space(op: Op) -> str:
    return f"Space::{_SPACES.get(op.one_of(_SPACES, ''), 'kGeneric')}"


def _order(op: Op, allowed: Iterable[str], default: str = "kWeak") -> str:
    """Order and scope, as template arguments. A volatile access counts as relaxed."""
    if op.flag("volatile"):
        return "Order::kRelaxed, Scope::kGrid"
    op.flag("weak")
    order = op.one_of(allowed, "")
    scope = op.one_of(_SCOPES, "gpu")
    return f"Order::{_ORDERS.get(order, default)}, Scope::{_SCOPES[scope]}"


@rule("ld", "ldu")
def _ld(op: Op) -> str:
    op.hints()
    count = int(op.one_of({"v2", "v4", "v8"}, "v1")[1:])
    space = _space(op)
    order = _order(op, {"relaxed", "acquire"})
    kind = op.type()
    targets = [op.names.target(t) for t in vector(op.args[0])]
    op.done()
    parameter = op.names.parameter(op.args[1]) if space == "Space::kParam" else None
    as_type = cpp_type(kind) if kind in INTEGERS else word(kind)
    if parameter:
        loads = (
            f"{t} = load_param<{as_type}>({parameter} + {i * type_size(kind)});" for i, t in enumerate(targets) if t
        )
        return "{ " + " ".join(loads) + " }" if count > 1 else next(loads, ";")
    call = f"{space}, {order}>({op.site}, {op.names.address(op.args[1])})"
    if count == 1:
        return f"{targets[0]} = load<{as_type}, {call};" if targets[0] else f"(void)load<{as_type}, {call};"
    lines = (f"{t} = loaded.x[{i}];" for i, t in enumerate(targets) if t)
    return f"{{ const auto loaded = load_vector<{as_type}, {count}, {call}; {' '.join(lines)} }}"


@rule("st")
def _st(op: Op) -> str:
    op.hints()
    count = int(op.one_of({"v2", "v4", "v8"}, "v1")[1:])
    space = _space(op)
    order = _order(op, {"relaxed", "release"})
    kind = op.type()
    values = [f"static_cast<{word(kind)}>({op.names.value(v, kind)})" for v in vector(op.args[1])]
    op.done()
    parameter = op.names.parameter(op.args[0]) if space == "Space::kParam" else None
    if parameter:
        stores = (f"store_param<{word(kind)}>({parameter} + {i * type_size(kind)}, {v});" for i, v in enumerate(values))
        return "{ " + " ".join(stores) + " }" if count > 1 else next(stores)
    address = op.names.address(op.args[0])
    if count == 1:
        return f"store<{word(kind)}, {space}, {order}>({op.site}, {address}, {values[0]});"
    packed = f"Vec<{word(kind)}, {count}>{{{{{', '.join(values)}}}}}"
    return f"store_vector<{word(kind)}, {count}, {space}, {order}>({op.site}, {address}, {packed});"


@rule("atom", "red")
def _atom(op: Op) -> str:
    op.hints()
    space = _space(op)
    order = _order(op, _ORDERS, "kRelaxed")
    operation = op.one_of(["add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"])
    op.flag("noftz")
    kind = op.type(INTEGERS | BITS | FLOATS)
    op.done()
    returns = op.instruction.name == "atom"
    start = 1 if returns else 0
    a = f"const {word(kind)} a = {op.value(start + 1, kind)};"
    if operation == "cas":
        a += f" const {word(kind)} b = {op.value(start + 2, kind)};"
    call = (
        f"atomic<{word(kind)}, {space}, {order}>({op.site}, {op.names.address(op.args[start])}, "
        f"[=]({word(kind)} old) -> {word(kind)} {{ return {_update(op, operation, kind)}; }})"
    )
    target = op.names.target(op.args[0]) if returns else ""
    return f"{{ {a} {target + ' = ' if target else ''}{call}; }}"


def _update(op: Op, operation: str, kind: str) -> str:
    """The new value of an atomic, from `old`, `a` and `b`."""
    simple = {
        "exch": "a",
        "cas": "old == a ? b : old",
        "and": "old & a",
        "or": "old | a",
        "xor": "old ^ a",
        "inc": "old >= a ? 0 : old + 1",
        "dec": "old == 0 || old > a ? a : old - 1",
    }
    if operation in simple:
        return simple[operation]
    if kind in INTEGERS or kind in BITS:
        integer = f"minmax_int<{cpp_type(kind)}>(old, a, {cpp(operation == 'max')})"
        return f"static_cast<{word(kind)}>(old + a)" if operation == "add" else integer
    if operation == "add" and kind in ("f32", "f64"):
        return {"f32": "add_f32<Round::kNearest, false, false>", "f64": "add_f64<Round::kNearest>"}[kind] + "(old, a)"
    base = PACKED.get(kind, kind)
    function = {
        "add": f"add_16<{base}, false, false>",
        "min": f"minmax_float<{base}, false, false, false, false>",
        "max": f"minmax_float<{base}, true, false, false, false>",
    }[operation]
    if kind in PACKED:
        return f"packed([](u16 x, u16 y) {{ return {function}(x, y); }}, old, a)"
    if base not in NARROW:
        raise op.unsupported(f"{operation} of .{kind}")
    return f"{function}(old, a)"


@rule("membar", "fence")
def _fence(op: Op) -> str:
    op.flag("sc", "acq_rel", "acquire", "release")
    scope = op.one_of({"cta", "gl", "gpu", "sys", "cluster"})
    op.done()
    return f"fence({op.line}, Scope::{'kBlock' if scope == 'cta' else 'kGrid'});"


@rule("prefetch", "prefetchu", "discard", "applypriority")
def _prefetch(op: Op) -> str:
    if op.instruction.name == "discard":
        raise op.unsupported("it destroys data")
    return ";"  # a hint


@rule("createpolicy")
def _createpolicy(op: Op) -> str:
    op.left = []  # whatever it says: the policy is only a hint of the instructions that take it
    return op.set("0")


# ---- control flow ----
@rule("bra")
def _bra(op: Op) -> str:
    op.flag("uni")
    op.done()
    return op.names.jump(op.args[0], op.line)


@rule("brx")
def _brx(op: Op) -> str:
    op.one_of({"idx"})
    op.flag("uni")
    op.done()
    return op.names.jump_table(op.value(0, "u32"), op.args[1], op.line)


@rule("call")
def _call(op: Op) -> str:
    op.flag("uni")
    op.done()
    return op.names.call(op.args, op.line)


@rule("ret")
def _ret(op: Op) -> str:
    op.flag("uni")
    op.done()
    return op.names.leave


@rule("exit")
def _exit(op: Op) -> str:
    op.done()
    return "exit_thread();"


@rule("trap", "brkpt")
def _trap(op: Op) -> str:
    op.done()
    return f'fault("trap", {op.line}, "the kernel executed {op.instruction.name}");'


# ---- barriers and the warp ----
@rule("bar", "barrier")
def _bar(op: Op) -> str:
    short = op.instruction.name == "bar"
    if op.flag("warp"):
        op.one_of({"sync"})
        op.done()
        return f"sync_warp({op.line}, {op.value(0, 'b32')});"
    op.flag("cta")
    action = op.one_of({"sync", "arrive", "red"})
    aligned = op.flag("aligned") or short
    if action == "red":
        return _bar_red(op, aligned)
    op.done()
    count = op.value(1, "u32") if len(op.args) > 1 else "0"
    flags = f"{cpp(aligned)}, {cpp(action == 'sync')}, false"
    return f"barrier({op.line}, {op.value(0, 'u32')}, {count}, {flags});"


def _bar_red(op: Op, aligned: bool) -> str:
    how = op.one_of({"popc", "and", "or"})
    op.type({"u32", "pred"})
    predicate = op.names.value(op.args[-1], "pred")
    count = op.value(2, "u32") if len(op.args) == 4 else "0"
    call = f"barrier({op.line}, {op.value(1, 'u32')}, {count}, {cpp(aligned)}, true, {predicate})"
    op.done()
    result = {"popc": "votes.count", "and": "votes.count == votes.total", "or": "votes.count != 0"}[how]
    return f"{{ const BarrierResult votes = {call}; {op.names.target(op.args[0])} = {result}; }}"


@rule("activemask")
def _activemask(op: Op) -> str:
    op.type({"b32"})
    return op.set(f"active_mask({op.line})")


@rule("shfl")
def _shfl(op: Op) -> str:
    op.one_of({"sync"})
    mode = {"up": "kUp", "down": "kDown", "bfly": "kButterfly", "idx": "kIndex"}[
        op.one_of({"up", "down", "bfly", "idx"})
    ]
    op.type({"b32"})
    op.done()
    d, _, p = op.args[0].partition("|")
    targets = [(op.names.target(d), "value"), (op.names.target(p) if p else "", "valid")]
    lines = " ".join(f"{t} = shuffled.{m};" for t, m in targets if t)
    return f"{{ const Shuffled shuffled = shuffle<ShuffleMode::{mode}>({op.line}, {op.values('b32')}); {lines} }}"


@rule("vote")
def _vote(op: Op) -> str:
    op.one_of({"sync"})
    how = op.one_of({"all", "any", "uni", "ballot"})
    op.type({"pred", "b32"})
    p, mask = op.value(1, "pred"), op.value(2, "b32")
    if how == "ballot":
        return op.set(f'ballot({op.line}, "vote.sync.ballot", {p}, {mask})')
    return op.set(f"vote_{'uniform' if how == 'uni' else how}({op.line}, {p}, {mask})")


@rule("match")
def _match(op: Op) -> str:
    how = op.one_of({"any", "all"})
    op.one_of({"sync"})
    kind = op.type({"b32", "b64"})
    op.done()
    d, _, p = op.args[0].partition("|")
    target, predicate = op.names.target(d), op.names.target(p) if p else ""
    value = "matched.mask" if how == "any" else "matched.all ? matched.mask : 0u"
    lines = (f"{target} = {value};" if target else "") + (f" {predicate} = matched.all;" if predicate else "")
    call = f"match({op.line}, {op.value(1, kind)}, {op.value(2, 'b32')})"
    return f"{{ const Matched matched = {call}; {lines} }}"


@rule("redux")
def _redux(op: Op) -> str:
    op.one_of({"sync"})
    how = op.one_of({"add", "min", "max", "and", "or", "xor"})
    absolute, nan = op.flag("abs"), op.flag("NaN")
    kind = op.type({"u32", "s32", "b32", "f32"} if how in ("min", "max") else {"u32", "s32", "b32"})
    sign = {"add": "+", "and": "&", "or": "|", "xor": "^"}.get(how)
    body = f"x {sign} y" if sign else f"minmax_int<{cpp_type(kind)}>(x, y, {cpp(how == 'max')})"
    a, mask = op.value(1, "b32"), op.value(2, "b32")
    if kind == "f32":
        body = f"minmax_float<f32, {cpp(how == 'max')}, false, {cpp(nan)}, false>(x, y)"
        a = f"abs_f32<false>({a})" if absolute else a
    elif absolute or nan:
        raise op.unsupported("modifier .abs or .NaN of integers")
    return op.set(f"reduce({op.line}, {a}, {mask}, [](u32 x, u32 y) -> u32 {{ return {body}; }})")


@rule("elect")
def _elect(op: Op) -> str:
    op.one_of({"sync"})
    op.done()
    d, _, p = op.args[0].partition("|")
    leader = f'static_cast<u32>(std::countr_zero(present({op.line}, "elect.sync", {op.value(1, "b32")})))'
    target = op.names.target(d)
    return (
        f"{{ const u32 leader = {leader}; {target + ' = leader;' if target else ''} "
        f"{op.names.target(p)} = leader == self->lane; }}"
    )


# ---- cp.async ----
@rule("cp")
def _cp(op: Op) -> str:
    op.one_of({"async"})
    if op.flag("commit_group"):
        op.done()
        return "cp_async_commit();"
    if op.flag("wait_all"):
        op.done()
        return "cp_async_wait(kAll);"
    if op.flag("wait_group"):
        op.done()
        return f"cp_async_wait({op.value(0, 'u32')});"
    op.hints()
    op.one_of({"shared", "shared__cta"})
    op.one_of({"global"})
    op.done()
    size = int(op.args[2], 0)
    read = f"{size}u"
    if len(op.args) == 4:
        ignore = op.args[3]
        predicate = op.names.is_predicate(ignore)
        read = f"({op.value(3, 'pred')} ? 0u : {size}u)" if predicate else op.value(3, "u32")
    shared, source = op.names.address(op.args[0]), op.names.address(op.args[1])
    return f"cp_async<{size}>({op.names.site(op.line)}, {op.names.site(op.line)}, u32({shared}), {source}, {read});"


# ---- matrices ----
@rule("ldmatrix")
def _ldmatrix(op: Op) -> str:
    count, transposed = _matrix_shape(op)
    targets = [op.names.target(t) for t in vector(op.args[0])]
    space = _space(op)
    op.done()
    lines = " ".join(f"{t} = result({i});" for i, t in enumerate(targets) if t)
    address = op.names.address(op.args[1])
    return f"{{ load_matrix<{count}, {cpp(transposed)}, {space}>({op.site}, {address}); {lines} }}"


@rule("stmatrix")
def _stmatrix(op: Op) -> str:
    count, transposed = _matrix_shape(op)
    words = [op.names.value(v, "b32") for v in vector(op.args[1])]
    space = _space(op)
    op.done()
    values = ", ".join(words + ["0u"] * (4 - len(words)))
    return f"store_matrix<{count}, {cpp(transposed)}, {space}>({op.site}, {op.names.address(op.args[0])}, {values});"


def _matrix_shape(op: Op) -> tuple[int, bool]:
    op.one_of({"sync"})
    op.flag("aligned")
    op.one_of({"m8n8"})
    count = int(op.one_of({"x1", "x2", "x4"})[1:])
    transposed = op.flag("trans")
    op.type({"b16"})
    return count, transposed


@rule("movmatrix")
def _movmatrix(op: Op) -> str:
    op.one_of({"sync"})
    op.flag("aligned")
    op.one_of({"m8n8"})
    op.one_of({"trans"})
    op.type({"b16"})
    return op.set(f"transpose_matrix({op.line}, {op.value(1, 'b32')})")


# shape and type of A -> (K, elements of A in a register)
_MMA = {
    ("m16n8k16", "f16"): (16, 2), ("m16n8k16", "bf16"): (16, 2), ("m16n8k8", "f16"): (8, 2),
    ("m16n8k8", "bf16"): (8, 2), ("m16n8k8", "tf32"): (8, 1), ("m16n8k4", "tf32"): (4, 1),
    ("m16n8k16", "s8"): (16, 4), ("m16n8k16", "u8"): (16, 4), ("m16n8k32", "s8"): (32, 4), ("m16n8k32", "u8"): (32, 4),
    ("m16n8k32", "e4m3"): (32, 4), ("m16n8k32", "e5m2"): (32, 4),
}  # fmt: skip


@rule("mma")
def _mma(op: Op) -> str:
    op.one_of({"sync"})
    op.flag("aligned")
    shape = op.one_of({s for s, _ in _MMA})
    op.one_of({"row"})
    op.one_of({"col"})
    d, a, b, c = (op.type({"f16", "bf16", "tf32", "f32", "s8", "u8", "s32", "e4m3", "e5m2"}) for _ in range(4))
    op.done()
    if (shape, a) not in _MMA:
        raise op.unsupported(f"{shape} of .{a}")
    k, per = _MMA[shape, a]

    def packed(operand: str, size: int) -> str:
        words = [op.names.value(v, "b32") for v in vector(operand)]
        return f"Vec<u32, {size}>{{{{{', '.join(words + ['0u'] * (size - len(words)))}}}}}"

    targets = [op.names.target(t) for t in vector(op.args[0])]
    call = (
        f"mma<{a}, {b}, {c}, {d}, {k}, {per}>({op.line}, {packed(op.args[1], 4)}, {packed(op.args[2], 2)}, "
        f"{packed(op.args[3], 4)})"
    )
    lines = " ".join(f"{t} = static_cast<u32>(result({i}));" for i, t in enumerate(targets) if t)
    return f"{{ {call}; {lines} }}"

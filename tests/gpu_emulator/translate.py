"""Writes a PTX module as C++: a function for each function, a statement for each instruction, registers as locals."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from . import instructions
from .errors import UnsupportedPTX
from .instructions import literal, word
from .ptx import Function, Instruction, Label, Module, Registers, Scope, Targets, Variable, split_operands, type_size

SHARED_START = 1024  # kSharedStart of emulator.h
GUARD = 32  # bytes between two variables in shared memory, which belong to nobody

_SPECIAL = {
    **{f"%{r}.{axis}": f"self->{r}.{axis}" for r in ("tid", "ctaid", "ntid", "nctaid") for axis in "xyz"},
    "%laneid": "self->lane",
    "%lanemask_eq": "(1u << self->lane)",
    "%lanemask_lt": "((1u << self->lane) - 1)",
    "%lanemask_le": "((2u << self->lane) - 1)",
    "%lanemask_gt": "~((2u << self->lane) - 1)",
    "%lanemask_ge": "~((1u << self->lane) - 1)",
    "%warpid": "self->warp",
    "%nwarpid": "((self->ntid.x * self->ntid.y * self->ntid.z + 31) / 32)",
    "%smid": "0u",
    "%nsmid": "1u",
    "%dynamic_smem_size": "self->dynamic_smem",
    "%total_smem_size": "self->total_smem",
    "%envreg1": "static_cast<u32>(self->grid_workspace >> 32)",  # where cooperative groups find their grid's barrier
    "%envreg2": "static_cast<u32>(self->grid_workspace)",
    "WARP_SZ": "32u",
}


def identifier(name: str) -> str:
    """A PTX name as part of a C++ one."""
    return re.sub(r"\W", "_", name.replace("%", "").replace("$", "_S"))


@dataclass
class SharedLayout:
    """Where the shared variables of a kernel lie, from the start of the window."""

    offsets: dict[str, int] = field(default_factory=dict)
    variables: list[tuple[str, int, int]] = field(default_factory=list)  # name, offset, bytes
    end: int = 0

    def add(self, variable: Variable) -> None:
        size = variable_size(variable)
        offset = -(-self.end // max(variable.align, 16)) * max(variable.align, 16)
        self.offsets[variable.name] = offset
        self.variables.append((variable.name, offset, size))
        self.end = offset + size + GUARD

    def copy(self) -> SharedLayout:
        return SharedLayout(dict(self.offsets), list(self.variables), self.end)


def variable_size(variable: Variable) -> int:
    return type_size(variable.type) * variable.vector * (1 if variable.count is None else variable.count)


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel: its PTX type, offset and bytes."""

    name: str
    type: str
    offset: int
    size: int


@dataclass
class Translation:
    """C++ of a module and what a launch needs to know of it."""

    source: str
    kernels: dict[str, list[Parameter]]
    static_shared: dict[str, int]  # bytes that a kernel declares
    most_threads: dict[str, int]  # of a block, by its launch bounds
    blocks_meet: bool  # by atomics, fences or ordered accesses of global memory, in some kernel
    locations: dict[int, str]  # PTX line -> "file:line"


def translate(module: Module) -> Translation:
    """Translate a module.

    Raises
    ------
    UnsupportedPTX
        Names the first instruction, modifier or directive that is not known, with its line.
    """
    return _ModuleWriter(module).write()


def _is_seen_by_other_blocks(instruction: Instruction) -> bool:
    """Whether blocks may meet by it: then they order their accesses, or should."""
    name, modifiers = instruction.name, instruction.modifiers
    if name in ("membar", "fence"):
        return "cta" not in modifiers
    ordered = name in ("atom", "red") or not {"acquire", "release", "relaxed", "volatile"}.isdisjoint(modifiers)
    return ordered and not any(m.startswith("shared") for m in modifiers)


class _ModuleWriter:
    def __init__(self, module: Module) -> None:
        self.module = module
        self.sites: list[int] = []
        self.globals = {v.name: v for v in module.variables if v.space in ("global", "const")}
        self.dynamic = {v.name for v in module.variables if v.space == "shared" and (v.extern or v.count == 0)}
        self.common = SharedLayout()
        for variable in module.variables:
            if variable.space == "shared" and variable.name not in self.dynamic:
                self.common.add(variable)
        for function in module.functions.values():
            if not function.entry:
                self._add_shared(self.common, function)

    @staticmethod
    def _add_shared(layout: SharedLayout, function: Function) -> None:
        for statement in function.body or []:
            if isinstance(statement, Variable) and statement.space == "shared":
                layout.add(statement)

    def write(self) -> Translation:
        bodies, kernels, tables, static = [], {}, [], {}
        for function in self.module.functions.values():
            if function.body is None:
                continue
            layout = self.common.copy()
            if function.entry:
                self._add_shared(layout, function)
                kernels[function.name] = parameters(function)
                static[function.name] = sum(size for _, _, size in layout.variables)
                tables.append((function, layout))
            bodies.append(_FunctionWriter(self, function, layout).write())
        parts = [
            '#include "runtime/warp.h"\n\nnamespace emu {\nnamespace {\n',
            self._sites(),
            *self._variables(),
            *(_signature(f) + ";" for f in self.module.functions.values() if f.body is not None),
            *bodies,
            self._tables(tables),
        ]
        locations = {
            s.line: f"{self.module.files.get(s.location[0], '?')}:{s.location[1]}"
            for f in self.module.functions.values()
            for s in f.body or []
            if isinstance(s, Instruction) and s.location[0]
        }
        threads = {f.name: f.most_threads for f in self.module.functions.values() if f.entry}
        meet = any(
            _is_seen_by_other_blocks(s)
            for f in self.module.functions.values()
            for s in f.body or []
            if isinstance(s, Instruction)
        )
        return Translation("\n".join(parts), kernels, static, threads, meet, locations)

    def _sites(self) -> str:
        return "extern Site sites[];"

    # -- variables in global and constant memory --
    def _variables(self) -> list[str]:
        lines = []
        for v in self.globals.values():
            size = max(variable_size(v), 1)
            if v.extern:
                raise UnsupportedPTX(f"PTX line {v.line}: variable {v.name} is defined in another module")
            lines.append(f"alignas({max(v.align, 16)}) u8 g_{identifier(v.name)}[{size}]{self._initial(v)};")
        return lines

    def _initial(self, v: Variable) -> str:
        """Initial bytes; addresses of other variables are filled in by `initialize`."""
        data = bytearray()
        for item in _initializer_items(v):
            number = literal(item, v.type)
            size = type_size(v.type)
            value = int(re.findall(r"0x[0-9a-f]+", number)[-1], 16) if number else 0
            data += value.to_bytes(size, "little")
        return " = {" + ", ".join(map(str, data)) + "}" if data else " = {}"

    def _pointers(self) -> list[str]:
        lines = []
        for v in self.globals.values():
            for i, item in enumerate(_initializer_items(v)):
                if literal(item, v.type) is not None:
                    continue
                match = re.fullmatch(r"(?:generic\(\s*)?([\w$]+)\s*\)?\s*(?:\+\s*(\d+))?", item)
                if not match or match[1] not in self.globals or type_size(v.type) != 8:
                    raise UnsupportedPTX(f"PTX line {v.line}: initializer {item!r} of {v.name}")
                address = f"reinterpret_cast<u64>(g_{identifier(match[1])}) + {match[2] or 0}"
                lines.append(
                    f"    write_private<u64>(reinterpret_cast<u64>(g_{identifier(v.name)}) + {8 * i}, {address});"
                )
        return lines

    # -- tables --
    def _tables(self, kernels: list[tuple[Function, SharedLayout]]) -> str:
        sites = ", ".join(f"{{0, 0, {line}}}" for line in self.sites) or "{0, 0, 0}"
        variables = [
            f'    {{"{v.name}", reinterpret_cast<u64>(g_{identifier(v.name)}), {variable_size(v)}}},'
            for v in self.globals.values()
        ]
        lines = [f"Site sites[] = {{{sites}}};", "const Variable variables[] = {", *variables, "    {nullptr, 0, 0}};"]
        for function, layout in kernels:
            rows = [f'    {{"{name}", {offset}, {size}}},' for name, offset, size in layout.variables]
            lines += [f"const Variable shared_{identifier(function.name)}[] = {{", *rows, "    {nullptr, 0, 0}};"]
        lines.append("const Kernel kernels[] = {")
        for function, layout in kernels:
            name, offset = identifier(function.name), dynamic_offset(layout)
            size = sum_size(parameters(function))
            lines.append(
                f'    {{"{function.name}", f_{name}, {size}, shared_{name}, {len(layout.variables)}, {offset}}},'
            )
        lines += [
            "    {nullptr, nullptr, 0, nullptr, 0, 0}};",
            "void initialize() {",
            *self._pointers(),
            "}",
            "",
            "}  // namespace",
        ]
        lines.append(
            f"const Module module{{kernels, {len(kernels)}, sites, {len(self.sites)}, variables, {len(self.globals)}, "
            "initialize};\n\n}  // namespace emu\n"
        )
        return "\n".join(lines)


def _initializer_items(v: Variable) -> list[str]:
    if not v.initializer:
        return []
    return [item.strip() for item in v.initializer.replace("{", "").replace("}", "").split(",") if item.strip()]


def dynamic_offset(layout: SharedLayout) -> int:
    """Dynamic shared memory begins after the static variables, at a multiple of 128 bytes."""
    return -(-layout.end // 128) * 128


def parameters(function: Function) -> list[Parameter]:
    """A kernel's parameters as the ABI lays them out: each at a multiple of its alignment."""
    found, offset = [], 0
    for p in function.params:
        size = variable_size(p)
        offset = -(-offset // p.align) * p.align
        found.append(Parameter(p.name, p.type if p.count is None else "b8", offset, size))
        offset += size
    return found


def sum_size(params: list[Parameter]) -> int:
    return params[-1].offset + params[-1].size if params else 0


def _signature(function: Function) -> str:
    if function.entry:
        return f"void f_{identifier(function.name)}(const u8* params)"
    names = [f"u8* p_{identifier(p.name)}" for p in (*function.results, *function.params)]
    return f"void f_{identifier(function.name)}({', '.join(names)})"


class _FunctionWriter:
    """Writes one function; it is the `Names` that instructions ask."""

    def __init__(self, module: _ModuleWriter, function: Function, layout: SharedLayout) -> None:
        self.module, self.function, self.layout = module, function, layout
        self.scopes: list[dict[str, str]] = [{}]  # PTX name -> C++ name, innermost last
        self.widths: dict[str, str] = {}  # C++ register -> its word
        self.local: dict[str, str] = {}
        self.param_bytes: dict[str, str] = {}  # C++ name -> where its bytes are
        self.declarations: list[str] = []
        self.labels: dict[str, int] = {}  # label -> index of its statement
        self.targets: dict[str, tuple[str, ...]] = {}
        self.index = 0
        self.unique = 0

    @property
    def leave(self) -> str:
        return "return;"

    # -- the function --
    def write(self) -> str:
        body = self.function.body or []
        self.labels = {s.name: i for i, s in enumerate(body) if isinstance(s, Label)}
        self.targets = {s.name: s.labels for s in body if isinstance(s, Targets)}
        if self.function.entry:
            for p in parameters(self.function):
                self.param_bytes[p.name] = f"const_cast<u8*>(params + {p.offset})"
        else:
            for v in (*self.function.results, *self.function.params):
                self.param_bytes[v.name] = f"p_{identifier(v.name)}"
        lines = [line for i, s in enumerate(body) for line in self._statement(i, s)]
        head = [
            _signature(self.function) + " {",
            "    bool carry = false, no_carry = false;",
            "    (void)carry, (void)no_carry;",
        ]
        return "\n".join([*head, *(f"    {d}" for d in self.declarations), *lines, "}", ""])

    def _statement(self, index: int, statement: object) -> list[str]:
        self.index = index
        match statement:
            case Registers():
                self._declare_registers(statement)
            case Variable():
                self._declare_variable(statement)
            case Label():
                return [f"l_{identifier(statement.name)}:;"]
            case Scope(opens=True):
                self.scopes.append({})
            case Scope():
                self.scopes.pop()
            case Instruction():
                return [self._instruction(statement)]
        return []

    def _instruction(self, i: Instruction) -> str:
        code = instructions.translate(i, self)
        if i.guard:
            code = f"if ({'!' if i.negated else ''}{self.register(i.guard, i.line)}) {{ {code} }}"
        text = f"{i.opcode} {', '.join(i.operands)}".replace("\\", " ")
        return f"    {code}  // {i.line}: {text}"

    def _declare_registers(self, r: Registers) -> None:
        kind = word(r.type)
        for name, count in r.names:
            names = [name] if count is None else [f"{name}{i}" for i in range(count)]
            self.unique += 1
            suffix = f"_{self.unique}" if len(self.scopes) > 1 else ""
            fresh = {n: f"v_{identifier(n)}{suffix}" for n in names}
            self.scopes[-1].update(fresh)
            self.widths.update(dict.fromkeys(fresh.values(), kind))
            for start in range(0, len(names), 16):
                chunk = ", ".join(f"{fresh[n]} = 0" for n in names[start : start + 16])
                self.declarations.append(f"{kind} {chunk};")

    def _declare_variable(self, v: Variable) -> None:
        if v.space == "shared":
            return  # laid out by the module
        if v.space not in ("local", "param"):
            raise UnsupportedPTX(f"PTX line {v.line}: .{v.space} variable within a function")
        self.unique += 1
        name = f"{'d' if v.space == 'local' else 'a'}_{identifier(v.name)}_{self.unique}"
        size = variable_size(v)
        self.declarations.append(f"alignas({max(v.align, 8)}) u8 {name}[{max(size, 1)}];")
        if v.space == "local":
            self.declarations.append(f"Frame frame_{name}({name}, {size});")
            self.local[v.name] = name
        else:
            self.param_bytes[v.name] = name

    # -- operands --
    def register(self, name: str, line: int = 0) -> str:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        raise UnsupportedPTX(f"PTX line {line}: register {name}")

    def _is_register(self, name: str) -> bool:
        return any(name in scope for scope in self.scopes)

    def value(self, operand: str, ptx_type: str) -> str:
        if operand.startswith("!"):
            return f"!{self.value(operand[1:], ptx_type)}"
        if self._is_register(operand):
            name = self.register(operand)
            return name if ptx_type == "pred" or self.widths[name] == word(ptx_type) else f"{word(ptx_type)}({name})"
        if operand in _SPECIAL:
            return f"{word(ptx_type)}({_SPECIAL[operand]})"
        number = literal(operand, ptx_type)
        if number is not None:
            return number
        if operand.startswith("-") and self._is_register(operand[1:]):
            return f"static_cast<{word(ptx_type)}>(-{self.value(operand[1:], ptx_type)})"
        return f"static_cast<{word(ptx_type)}>({self.address(operand)})"

    def target(self, operand: str) -> str:
        return "" if operand.strip() == "_" else self.register(operand.strip())

    def is_predicate(self, operand: str) -> bool:
        name = operand.lstrip("!")
        return self._is_register(name) and self.widths[self.register(name)] == "bool"

    def address(self, operand: str) -> str:
        """``[%rd1+8]``, ``[name]`` or ``name+4`` as a 64-bit address in the space that the name lies in."""
        text = operand.strip("[]").replace(" ", "")
        match = re.fullmatch(r"([\w$%.]+)(?:\+(-?(?:0x[0-9a-fA-F]+|\d+)))?", text.replace("+-", "-").replace("-", "+-"))
        base, offset = (match[1], match[2] or "0") if match else (text, "0")
        if self._is_register(base):
            start = f"u64({self.register(base)})"
        elif re.fullmatch(r"\d+|0x[0-9a-fA-F]+", base):
            start = f"u64({base})"
        else:
            start = self._symbol(base)
        number = int(offset, 0)
        return start if number == 0 else f"({start} + static_cast<u64>({number}ll))"

    def _symbol(self, name: str) -> str:
        if name in self.local:
            return f"reinterpret_cast<u64>({self.local[name]})"
        if name in self.param_bytes:
            return f"reinterpret_cast<u64>({self.param_bytes[name]})"
        if name in self.module.globals:
            return f"reinterpret_cast<u64>(g_{identifier(name)})"
        if name in self.module.dynamic:
            return "u64(self->dynamic_shared)"
        if name in self.layout.offsets:
            return f"u64({SHARED_START + self.layout.offsets[name]})"
        raise UnsupportedPTX(f"name {name} (the address of a function, or a special register that is not emulated)")

    def parameter(self, operand: str) -> str | None:
        """The bytes of ``[name+4]`` if the name is a parameter; None for an address in a register."""
        match = re.fullmatch(r"\[([\w$%.]+?)(?:\+(\d+))?\]", operand.replace(" ", ""))
        if match and not self._is_register(match[1]) and match[1] in self.param_bytes:
            return f"{self.param_bytes[match[1]]} + {match[2] or 0}"
        return None

    def site(self, line: int) -> str:
        self.module.sites.append(line)
        return f"sites[{len(self.module.sites) - 1}]"

    # -- control flow --
    def jump(self, label: str, line: int) -> str:
        if label not in self.labels:
            raise UnsupportedPTX(f"PTX line {line}: label {label}")
        backward = self.labels[label] <= self.index
        go = f"goto l_{identifier(label)};"
        return f"{{ loop_tick({line}); {go} }}" if backward else go

    def jump_table(self, index: str, table: str, line: int) -> str:
        cases = " ".join(f"case {i}: {self.jump(label, line)}" for i, label in enumerate(self.targets[table]))
        return f'switch ({index}) {{ {cases} default: fault("trap", {line}, "brx.idx past its table"); }}'

    def call(self, operands: tuple[str, ...], line: int) -> str:
        results = split_operands(operands[0].strip("()")) if operands[0].startswith("(") else ()
        rest = operands[1:] if operands[0].startswith("(") else operands
        name, args = rest[0], split_operands(rest[1].strip("()")) if len(rest) > 1 else ()
        where = [self.param_bytes.get(a.strip(), "") for a in (*results, *args)]
        if "" in where:
            raise UnsupportedPTX(f"PTX line {line}: an argument of call {name} that is no .param")
        if name == "vprintf":
            pair = ", ".join(f"load_param<u64>({w})" for w in where[-2:])
            return f"store_param<u32>({where[0]}, print({line}, {pair}));"
        if name == "__assertfail":
            message, file, number, function = where[:4]
            strings = (f"reinterpret_cast<const char*>(load_param<u64>({w}))" for w in (file, function, message))
            first, second, third = strings
            return (
                f'fault("assert", {line}, "%s:%u: %s: assertion `%s` failed", {first}, '
                f"load_param<u32>({number}), {second}, {third});"
            )
        callee = self.module.module.functions.get(name)
        if callee is None or callee.body is None:
            raise UnsupportedPTX(f"PTX line {line}: call of {name}, which this module does not define")
        return f"f_{identifier(name)}({', '.join(where)});"

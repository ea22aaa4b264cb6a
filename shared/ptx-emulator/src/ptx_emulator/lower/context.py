"""What the lowering of one kernel keeps, and what the lowering of one instruction calls."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from ptx_emulator.errors import UnsupportedInstruction
from ptx_emulator.lower.availability import missing_register
from ptx_emulator.ptx.module import (
    Address,
    Function,
    Immediate,
    Instruction,
    Operand,
    Register,
    Symbol,
    Vector,
)

# Special registers that are read when the instruction executes, with their width.
CLOCKS = {"clock": 32, "clock_hi": 32, "clock64": 64}
CLOCKS |= {"globaltimer": 64, "globaltimer_lo": 32, "globaltimer_hi": 32}
_AXES = "tid ntid ctaid nctaid cluster_ctaid cluster_nctaid clusterid nclusterid"
_SINGLE = """laneid warpid nwarpid cluster_ctarank cluster_nctarank is_explicit_cluster gridid smid nsmid
lanemask_eq lanemask_lt lanemask_le lanemask_gt lanemask_ge dynamic_smem_size total_smem_size aggr_smem_size
reserved_smem_offset_begin reserved_smem_offset_end reserved_smem_offset_cap"""
# As the runtime knows them (cluster.cpp).
SPECIAL_REGISTERS = {*(f"{name}.{axis}" for name in _AXES.split() for axis in "xyz"), *_SINGLE.split()}
SPECIAL_BITS = {"gridid": 64}


class FormError(ValueError):
    """A type or a literal that does not exist: the instruction has a form that nobody knows."""


@cache
def bits_of(type_name: str) -> int:
    """Width of a PTX type in bits; a predicate has width 1."""
    if type_name == "pred":
        return 1
    if type_name.endswith("x2") and type_name[0] in "bfe":
        pairs = {"f16x2": 32, "bf16x2": 32, "f32x2": 64, "e4m3x2": 16, "e5m2x2": 16}
        if type_name not in pairs:
            raise FormError(f"type {type_name!r} is not known here")
        return pairs[type_name]
    match = re.fullmatch(r"(?:[bsuf]|bf|tf)(\d+)", type_name)
    if not match:
        raise FormError(f"type {type_name!r} has no width")
    return int(match[1])


class Value(NamedTuple):
    """A virtual register of the program: from the PTX, a temporary, a constant or a special register."""

    name: str
    bits: int  # 1 for a predicate


class Use(NamedTuple):
    """A value as an argument of an operation. A lane that does not execute keeps what it had."""

    value: Value
    reads: bool
    writes: bool


@dataclass(frozen=True)
class Target:
    """A label as an argument of an operation: becomes the index of its instruction."""

    label: str


@dataclass
class Op:
    """One operation of the runtime."""

    name: str
    args: list[int | Use | Target]
    guard: Use | None
    guard_negated: bool
    aligned: bool
    op_class: str
    line: int

    def uses(self) -> list[Use]:
        """The values among the arguments, and the guard."""
        uses = [arg for arg in self.args if isinstance(arg, Use)]
        return [*uses, self.guard] if self.guard is not None else uses


@dataclass
class Lowering:
    """The lowering of one kernel.

    `constants` and `specials` are values that the warp finds in its registers when it starts: a constant by
    its bits, a special register by the name the runtime knows (`tid.x`, or `shared:<offset>` for the address
    of a shared variable in the CTA's own window).
    """

    function: Function
    target: str  # `.target` of the module, such as sm_100a
    symbols: dict[str, int]  # addresses of global and const variables
    shared: dict[str, int]  # addresses of shared variables, in the window of a CTA
    local: dict[str, int]  # offsets of local variables
    ops: list[Op] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    constants: dict[Value, int] = field(default_factory=dict)
    specials: dict[Value, str] = field(default_factory=dict)
    arguments: dict[str, Value] = field(default_factory=dict)  # of calls, as stored last
    _declared: dict[str, Value] = field(default_factory=dict)  # registers that were used so far
    _current: Instruction | None = None
    _op_class: str = ""
    _temporaries: int = 0

    # ------------------------------------------------------------------ operands

    def dst(self, operand: Operand, type_name: str) -> Use:
        """A register that is written. The sink `_` becomes a temporary."""
        return Use(self._register(operand, bits_of(type_name)), reads=False, writes=True)

    def src(self, operand: Operand, type_name: str) -> Use:
        """A register, literal, special register or address that is read; a literal fills all lanes."""
        bits = bits_of(type_name)
        if isinstance(operand, Register):
            if bits == 1:
                return self._predicate(operand)
            known = self._declared.get(operand.name)
            if known is not None:
                return Use(known, reads=True, writes=False)
        elif isinstance(operand, Immediate):
            return self.constant(immediate_bits(operand, type_name), bits)
        elif isinstance(operand, Symbol):
            return self._symbol(operand, bits)
        clock = self.clock_of(operand)
        if clock is not None:
            value = self.temporary(CLOCKS[clock])
            self.emit(f"read.{clock}", self.written(value), aligned=False)
            return self.read(value)
        return Use(self._register(operand, bits), reads=True, writes=False)

    def inout(self, operand: Operand, type_name: str) -> Use:
        """A register that is read and written by the same operation."""
        return Use(self._register(operand, bits_of(type_name)), reads=True, writes=True)

    def dsts(self, operand: Operand, type_name: str) -> list[Use]:
        """The registers of `{…}`, or of a single register."""
        elements = operand.elements if isinstance(operand, Vector) else (operand,)
        return [self.dst(element, type_name) for element in elements]

    def srcs(self, operand: Operand, type_name: str) -> list[Use]:
        """The values of `{…}`, or a single one."""
        elements = operand.elements if isinstance(operand, Vector) else (operand,)
        return [self.src(element, type_name) for element in elements]

    def address(self, operand: Operand) -> list[int | Use]:
        """`[base+offset]` as four arguments: slot, bits of the slot, offset low word, offset high word."""
        if not isinstance(operand, Address):
            raise self.unsupported("an address in brackets was expected")
        offset = operand.offset & (2**64 - 1)
        if isinstance(operand.base, Symbol):
            base = self._symbol(operand.base, 64)
        elif isinstance(operand.base, Immediate):
            base = self.constant(immediate_bits(operand.base, "b64"), 64)
        else:
            base = Use(self._register(operand.base, None), reads=True, writes=False)
        return [base, base.value.bits, offset & 0xFFFFFFFF, offset >> 32]

    def constant(self, bits_value: int, bits: int) -> Use:
        """A value that is the same in all lanes, known before the launch."""
        value = Value(f"#{bits}:{bits_value:x}", bits)
        self.constants[value] = bits_value & ((1 << max(bits, 32 if bits == 1 else bits)) - 1)
        return Use(value, reads=True, writes=False)

    def temporary(self, bits: int) -> Value:
        """A value of the lowering's own. Write it with `written(t)`, read it with `read(t)`."""
        self._temporaries += 1
        return Value(f"${self._temporaries}", bits)

    def clock_of(self, operand: Operand) -> str | None:
        """The name of a special register that changes while the kernel runs, None for other operands."""
        if not isinstance(operand, Register) or operand.name in self.function.registers:
            return None
        name = operand.name.removeprefix("%")
        return name if name in CLOCKS else None

    @staticmethod
    def read(value: Value) -> Use:
        return Use(value, reads=True, writes=False)

    @staticmethod
    def written(value: Value) -> Use:
        return Use(value, reads=False, writes=True)

    # ------------------------------------------------------------------ operations

    def emit(self, name: str, *args: int | Use | Target, aligned: bool | None = None) -> None:
        """Appends an operation of the runtime under the guard of the current instruction."""
        instruction = self.current
        guard = None
        if instruction.guard is not None:
            guard = Use(self._register(instruction.guard, 1), reads=True, writes=False)
        self.ops.append(
            Op(
                name=name,
                args=list(args),
                guard=guard,
                guard_negated=instruction.guard is not None and instruction.guard.negated,
                aligned=instruction.has("aligned") if aligned is None else aligned,
                op_class=self._op_class,
                line=instruction.line,
            )
        )

    @property
    def current(self) -> Instruction:
        """The instruction that is being lowered."""
        assert self._current is not None
        return self._current

    def unsupported(self, why: str) -> UnsupportedInstruction:
        """An error that names the current instruction: `raise ctx.unsupported("...")`."""
        return UnsupportedInstruction(self.current.name, self.current.line, self.function.name, why)

    # ------------------------------------------------------------------ inside

    def begin(self, instruction: Instruction, op_class: str) -> None:
        self._current, self._op_class = instruction, op_class

    def _register(self, operand: Operand, bits: int | None) -> Value:
        if not isinstance(operand, Register):
            raise self.unsupported(f"a register was expected, not {operand}")
        if operand.name == "_":
            if bits is None:
                raise self.unsupported("an address is not the sink _")
            return self.temporary(bits)
        known = self._declared.get(operand.name)
        if known is not None:
            return known
        declared = self.function.registers.get(operand.name)
        if declared is not None:
            value = self._declared[operand.name] = Value(operand.name, bits_of(declared))
            return value
        name = operand.name.removeprefix("%")
        if not operand.name.startswith("%"):
            raise self.unsupported(f"register {operand.name} was not declared")
        if name not in SPECIAL_REGISTERS:
            raise self.unsupported(
                f"register %{name} was not declared, and is no special register that is known"
            )
        needs = missing_register(name, self.target)
        if needs is not None:
            raise self.unsupported(f".target {self.target} does not have %{name}, it needs {needs}")
        value = Value(operand.name, SPECIAL_BITS.get(name, 1 if name.startswith("is_") else 32))
        self.specials[value] = name
        return value

    def _predicate(self, operand: Register) -> Use:
        use = Use(self._register(operand, 1), reads=True, writes=False)
        if not operand.negated:
            return use
        inverse = self.temporary(1)
        self.emit("pred.not", self.written(inverse), use, aligned=False)
        return self.read(inverse)

    def _symbol(self, symbol: Symbol, bits: int) -> Use:
        if symbol.name in self.shared:
            value = Value(f"&{symbol.name}+{symbol.offset}:{bits}", bits)
            self.specials[value] = f"shared:{self.shared[symbol.name] + symbol.offset}"
            return self.read(value)
        if symbol.name in self.local:
            return self.constant(self.local[symbol.name] + symbol.offset, bits)
        if symbol.name in self.symbols:
            return self.constant(self.symbols[symbol.name] + symbol.offset, bits)
        for parameter in self.function.parameters:
            if parameter.name == symbol.name:
                value = Value(f"&{symbol.name}+{symbol.offset}:{bits}", bits)
                self.specials[value] = f"param:{parameter.offset + symbol.offset}"
                return self.read(value)
        raise self.unsupported(f"{symbol.name} is not a variable or a parameter")


def immediate_bits(immediate: Immediate, type_name: str) -> int:
    """The bits of a literal as an operand of a type."""
    bits = bits_of(type_name)
    if bits == 1:
        return 0xFFFFFFFF if immediate.value else 0  # a bit for each lane
    if immediate.bits is not None:
        if type_name in ("f32", "b32", "u32", "s32") and immediate.bits_width == 64:
            number = struct.unpack("<d", struct.pack("<Q", immediate.bits))[0]
            return _bits_of_float("<f", number)
        return immediate.bits
    if isinstance(immediate.value, float):
        if bits == 64:
            return _bits_of_float("<d", immediate.value)
        if bits == 32:
            return _bits_of_float("<f", immediate.value)
        raise FormError(f"the literal {immediate.value} cannot be a {type_name}")
    if type_name in ("f32", "f64"):
        return _bits_of_float("<f" if bits == 32 else "<d", float(immediate.value))
    return immediate.value & ((1 << bits) - 1)


def _bits_of_float(form: str, value: float) -> int:
    return int.from_bytes(struct.pack(form, value), "little")

"""The syntax tree of a PTX module: what the parser makes and the lowering reads."""

from __future__ import annotations

import builtins
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Register:
    """A virtual register (`%r12`) or a special one (`%tid.x`); `_` is the sink of a result nobody wants."""

    name: str
    negated: bool = False  # `!%p1` where a predicate is read

    def __str__(self) -> str:
        return "!" * self.negated + self.name


@dataclass(frozen=True)
class Immediate:
    """A literal: an integer, or a float. `bits` is set for `0f…` and `0d…`, which give the bits."""

    value: int | float
    bits: int | None = None
    bits_width: int = 0

    def __str__(self) -> str:
        if self.bits is None:
            return str(self.value)
        return f"0f{self.bits:08X}" if self.bits_width == 32 else f"0d{self.bits:016X}"


@dataclass(frozen=True)
class Symbol:
    """The address of a variable or parameter, plus bytes; or a label."""

    name: str
    offset: int = 0

    def __str__(self) -> str:
        return f"{self.name}+{self.offset}" if self.offset else self.name


@dataclass(frozen=True)
class Vector:
    """`{a, b, …}`."""

    elements: tuple[Operand, ...]

    def __str__(self) -> str:
        return "{" + ", ".join(map(str, self.elements)) + "}"


@dataclass(frozen=True)
class Address:
    """`[base + offset]`, or with coordinates `[base, {c0, c1, …}]`."""

    base: Register | Symbol | Immediate
    offset: int = 0
    coordinates: tuple[Operand, ...] = ()

    def __str__(self) -> str:
        base = f"{self.base}+{self.offset}" if self.offset else str(self.base)
        coordinates = f", {Vector(self.coordinates)}" if self.coordinates else ""
        return f"[{base}{coordinates}]"


@dataclass(frozen=True)
class Pair:
    """Two results joined by a bar: `%p1|%p2`, `%r1|%p1`."""

    first: Register
    second: Register

    def __str__(self) -> str:
        return f"{self.first}|{self.second}"


Operand = Register | Immediate | Symbol | Vector | Address | Pair


@dataclass(frozen=True)
class Location:
    """A place in the source that the PTX was made from (`.loc`).

    In code that was inlined, `function` is the function that holds the place, where the PTX names it, and
    `inlined_at` the place of its call, which may be in inlined code again.
    """

    file: str
    line: int
    function: str = ""
    inlined_at: Location | None = None

    def __str__(self) -> str:
        """`helpers.h:12 (scale), inlined at kernel.cu:40`."""
        text = f"{self.file}:{self.line}" + (f" ({self.function})" if self.function else "")
        return f"{text}, inlined at {self.inlined_at}" if self.inlined_at else text


@dataclass(frozen=True)
class Instruction:
    """`@!%p1 ld.global.v4.b32 {…}, [%rd1+16];`

    `opcode` is the first word (`ld`), `modifiers` the rest (`("global", "v4", "b32")`).
    """

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    line: int
    guard: Register | None = None
    location: Location | None = None

    @property
    def name(self) -> str:
        return ".".join((self.opcode, *self.modifiers))

    def __str__(self) -> str:
        guard = "" if self.guard is None else f"@{self.guard} "
        return f"{guard}{self.name} {', '.join(map(str, self.operands))}".rstrip() + ";"

    def has(self, modifier: str) -> bool:
        return modifier in self.modifiers


@dataclass(frozen=True)
class Label:
    """A branch target; unique in its function (labels of inner scopes are renamed)."""

    name: str
    line: int


@dataclass(frozen=True)
class Parameter:
    """A kernel parameter; `bytes` long at `offset` of the parameter block. `type` is `u64`, or `b8`."""

    name: str
    offset: int
    bytes: int
    align: int
    type: str


@dataclass(frozen=True)
class Variable:
    """A variable of `space` (`shared`, `global`, `const`, `local`); `bytes` is 0 for an `.extern` array."""

    name: str
    space: str
    bytes: int
    align: int
    extern: bool = False
    data: builtins.bytes | None = None


@dataclass
class Function:
    """A kernel. `registers` gives the type each virtual register was declared with: `b32`, `pred`, …"""

    name: str
    parameters: list[Parameter] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    body: list[Instruction | Label] = field(default_factory=list)
    branch_targets: dict[str, tuple[str, ...]] = field(default_factory=dict)  # tables of brx.idx
    directives: dict[str, tuple[int, ...]] = field(default_factory=dict)  # reqntid, maxntid, …
    line: int = 0


@dataclass
class Module:
    """One PTX file."""

    version: str
    target: str
    functions: dict[str, Function] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)

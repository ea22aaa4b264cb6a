"""The modifiers of an instruction, taken one by one so that none is left unread."""

from __future__ import annotations

from collections.abc import Sequence

from ptx_emulator.lower.context import Lowering, bits_of
from ptx_emulator.ptx.module import Instruction, Operand

ROUNDINGS = {"rn": 0, "rz": 1, "rm": 2, "rp": 3}  # as Rounding in numeric.h


class Modifiers:
    """What is left to understand of an instruction's modifiers."""

    def __init__(self, ctx: Lowering, instruction: Instruction) -> None:
        self._ctx = ctx
        self._left = list(instruction.modifiers)

    def take(self, *names: str) -> str | None:
        """Removes the first modifier that is one of the names and returns it."""
        for modifier in self._left:
            if modifier in names:
                self._left.remove(modifier)
                return modifier
        return None

    def has(self, name: str) -> bool:
        """Whether a modifier was given; removes it."""
        return self.take(name) is not None

    def require(self, *names: str) -> None:
        """Removes modifiers that must be there."""
        for name in names:
            if not self.has(name):
                raise self._ctx.unsupported(f"modifier .{name} is missing")

    def type(self) -> str:
        """Removes and returns the last modifier, the type."""
        if not self._left:
            raise self._ctx.unsupported("a type is missing")
        return self._left.pop()

    def rounding(self) -> int | None:
        """The number of a rounding mode of arithmetic, None without one."""
        name = self.take(*ROUNDINGS)
        return None if name is None else ROUNDINGS[name]

    def done(self) -> None:
        """Refuses what nobody has taken."""
        if self._left:
            raise self._ctx.unsupported(f"modifier .{self._left[0]} is not known here")


def operands(ctx: Lowering, instruction: Instruction, *counts: int) -> tuple[Operand, ...]:
    """The operands, of which there must be one of the given numbers."""
    if len(instruction.operands) not in counts:
        expected = " or ".join(str(count) for count in counts)
        raise ctx.unsupported(f"{expected} operands were expected, not {len(instruction.operands)}")
    return instruction.operands


def emit_lanewise(
    ctx: Lowering,
    name: str,
    destination: tuple[Operand, str],
    sources: Sequence[tuple[Operand, str]],
    *numbers: int,
) -> None:
    """Emits an operation on lane vectors of exactly the given types: destination, sources, plain numbers."""
    uses = [ctx.dst(*destination), *(ctx.src(*source) for source in sources)]
    for use, (_, type_name) in zip(uses, [destination, *sources], strict=True):
        if use.value.bits != bits_of(type_name):
            raise ctx.unsupported(
                f"{use.value.name} has {use.value.bits} bits, .{type_name} needs {bits_of(type_name)}"
            )
    ctx.emit(name, *uses, *numbers)

"""Which function lowers which opcode."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from ptx_emulator.ptx.module import Instruction

if TYPE_CHECKING:
    from ptx_emulator.lower.context import Lowering

LowerFunction = Callable[["Lowering", Instruction], None]
_FLOAT = re.compile(r"b?f\d+(x2)?")

GROUPS = (
    "arithmetic",
    "integer",
    "half",
    "compare",
    "convert",
    "move",
    "memory",
    "atomic",
    "async_copy",
    "matrix_fragments",
    "warp",
    "barrier",
    "mbarrier",
    "fence",
    "grid",
    "bulk",
    "tensor_copy",
    "mma",
    "wgmma",
    "tcgen05",
    "control",
)


@dataclass(frozen=True)
class Lowered:
    """How an opcode is lowered, and the class its executions are counted under.

    Where that depends on the type, `float_class` is the class for floating-point types. A `refused` opcode is
    known, but no form of it is lowered: the function says why.
    """

    lower: LowerFunction
    op_class: str
    float_class: str | None = None
    refused: bool = False

    def class_of(self, instruction: Instruction) -> str:
        """The class of one instruction."""
        if self.float_class is None or not instruction.modifiers:
            return self.op_class
        return self.float_class if _FLOAT.fullmatch(instruction.modifiers[-1]) else self.op_class


_TABLE: dict[str, Lowered] = {}


def lowers(
    *opcodes: str, op_class: str, float_class: str | None = None, refused: bool = False
) -> Callable[[LowerFunction], LowerFunction]:
    """Registers a function for opcodes; see `Lowered`.

    An opcode may be the first words of a name (`cp.async.bulk.tensor`): the longest that matches is taken.
    """

    def register(function: LowerFunction) -> LowerFunction:
        for opcode in opcodes:
            assert opcode not in _TABLE, f"{opcode} is lowered twice"
            _TABLE[opcode] = Lowered(function, op_class, float_class, refused)
        return function

    return register


def find(instruction: Instruction) -> Lowered | None:
    """What lowers an instruction, or None if its opcode is unknown."""
    load_groups()
    return _find(instruction.opcode, instruction.modifiers)


@cache
def _find(opcode: str, modifiers: tuple[str, ...]) -> Lowered | None:
    words = (opcode, *modifiers)
    for length in range(len(words), 0, -1):
        found = _TABLE.get(".".join(words[:length]))
        if found is not None:
            return found
    return None


def opcodes() -> dict[str, list[str]]:
    """All opcodes that are lowered, with their classes."""
    load_groups()
    return {
        opcode: [name for name in (lowered.op_class, lowered.float_class) if name is not None]
        for opcode, lowered in sorted(_TABLE.items())
        if not lowered.refused
    }


@cache
def load_groups() -> None:
    """Imports the files of all instruction groups, once."""
    for group in GROUPS:
        import_module(f"ptx_emulator.lower.{group}")

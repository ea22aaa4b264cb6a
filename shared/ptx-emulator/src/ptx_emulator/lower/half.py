"""Lowering of arithmetic on f16 and bf16, single and in pairs; arithmetic.py hands such types over."""

from __future__ import annotations

from ptx_emulator.lower.context import Lowering
from ptx_emulator.lower.modifiers import Modifiers, emit_lanewise, operands
from ptx_emulator.ptx.module import Instruction

HALF_TYPES = ("f16", "f16x2", "bf16", "bf16x2")


def _storage(type_name: str) -> str:
    return "b32" if type_name.endswith("x2") else "b16"


def _emit(ctx: Lowering, instruction: Instruction, name: str, type_name: str, num_sources: int) -> None:
    d, *sources = operands(ctx, instruction, 1 + num_sources)
    storage = _storage(type_name)
    emit_lanewise(ctx, f"{name}.{type_name}", (d, storage), [(source, storage) for source in sources])


def _flush(ctx: Lowering, modifiers: Modifiers, type_name: str) -> str:
    if not modifiers.has("ftz"):
        return ""
    if type_name.startswith("bf16"):
        raise ctx.unsupported("bf16 has no .ftz here")
    return ".ftz"


def lower_half_sum(ctx: Lowering, instruction: Instruction, modifiers: Modifiers, type_name: str) -> None:
    """`add`, `sub`, `mul`, `fma`."""
    rounding = modifiers.rounding()
    if rounding not in (None, 0):
        raise ctx.unsupported("f16 and bf16 are rounded to nearest even only")
    suffix = _flush(ctx, modifiers, type_name)
    if modifiers.has("sat"):
        if type_name.startswith("bf16"):
            raise ctx.unsupported("bf16 has no .sat here")
        suffix += ".sat"
    elif instruction.opcode == "fma" and modifiers.has("relu"):
        suffix += ".relu"
    modifiers.done()
    _emit(ctx, instruction, instruction.opcode + suffix, type_name, 3 if instruction.opcode == "fma" else 2)


def lower_half_extreme(ctx: Lowering, instruction: Instruction, modifiers: Modifiers, type_name: str) -> None:
    """`min`, `max`."""
    suffix = _flush(ctx, modifiers, type_name) + extreme_suffix(ctx, modifiers)
    modifiers.done()
    _emit(ctx, instruction, instruction.opcode + suffix, type_name, 2)


def lower_half_sign(ctx: Lowering, instruction: Instruction, modifiers: Modifiers, type_name: str) -> None:
    """`neg`, `abs`."""
    suffix = _flush(ctx, modifiers, type_name)
    modifiers.done()
    _emit(ctx, instruction, instruction.opcode + suffix, type_name, 1)


def lower_half_function(
    ctx: Lowering, instruction: Instruction, modifiers: Modifiers, type_name: str
) -> None:
    """`ex2.approx`, `tanh.approx`. The bf16 form of ex2 always flushes, and is spelled with .ftz."""
    if not modifiers.has("approx"):
        raise ctx.unsupported(".approx is missing")
    flushes = instruction.opcode == "ex2" and type_name.startswith("bf16")
    if modifiers.has("ftz") != flushes:
        raise ctx.unsupported(".ftz belongs to ex2 of bf16, and to no other")
    modifiers.done()
    _emit(ctx, instruction, instruction.opcode, type_name, 1)


def extreme_suffix(ctx: Lowering, modifiers: Modifiers) -> str:
    """`.NaN` and `.xorsign.abs` as the runtime's names have them."""
    suffix = ".NaN" if modifiers.has("NaN") else ""
    if modifiers.has("xorsign"):
        if not modifiers.has("abs"):
            raise ctx.unsupported(".xorsign needs .abs")
        suffix += ".xorsign.abs"
    return suffix

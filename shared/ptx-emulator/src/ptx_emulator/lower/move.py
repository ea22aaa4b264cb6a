"""Lowering of mov: between registers, of special registers and addresses, packing and unpacking."""

from __future__ import annotations

from ptx_emulator.lower.context import CLOCKS, Lowering, bits_of
from ptx_emulator.lower.modifiers import Modifiers, emit_lanewise, operands
from ptx_emulator.lower.registry import lowers
from ptx_emulator.ptx.module import Instruction, Operand, Register, Symbol, Vector

_PARTS = {(16, 2): 8, (32, 2): 16, (32, 4): 8, (64, 2): 32, (64, 4): 16, (128, 2): 64, (128, 4): 32}


@lowers("mov", op_class="move")
def lower_mov(ctx: Lowering, instruction: Instruction) -> None:
    """A value, the address of a variable, or parts of a value from or into `{…}`."""
    modifiers = Modifiers(ctx, instruction)
    type_name = modifiers.type()
    modifiers.done()
    d, a = operands(ctx, instruction, 2)
    if type_name == "pred":
        ctx.emit("pred.mov", ctx.dst(d, "pred"), ctx.src(a, "pred"))
    elif isinstance(a, Vector):
        _lower_packing(ctx, d, a, type_name)
    elif isinstance(d, Vector):
        _lower_unpacking(ctx, d, a, type_name)
    elif (clock := ctx.clock_of(a)) is not None and bits_of(type_name) == CLOCKS[clock]:
        emit_lanewise(ctx, f"read.{clock}", (d, type_name), [])
    else:
        _lower_plain(ctx, d, a, type_name)


def _lower_plain(ctx: Lowering, d: Operand, a: Operand, type_name: str) -> None:
    destination = ctx.dst(d, type_name)
    bits = destination.value.bits
    if bits != bits_of(type_name):
        raise ctx.unsupported(f"{destination.value.name} has {bits} bits, not those of .{type_name}")
    source = ctx.src(a, type_name)
    special = isinstance(a, Register) and a.name not in ctx.function.registers
    if source.value.bits == bits:
        ctx.emit(f"mov.{bits}", destination, source)
    elif special and (source.value.bits, bits) == (32, 16):
        ctx.emit("cvt.b16.u32", destination, source)
    elif special and source.value.bits == 1:
        ones, zero = ctx.constant(1, bits), ctx.constant(0, bits)
        ctx.emit(f"selp.{bits}", destination, ones, zero, source)
    else:
        raise ctx.unsupported(f"{source.value.name} has {source.value.bits} bits, not {bits}")


def _part_bits(ctx: Lowering, type_name: str, vector: Vector) -> int:
    part = _PARTS.get((bits_of(type_name), len(vector.elements)))
    if part is None:
        raise ctx.unsupported(f"{len(vector.elements)} parts of .{type_name}")
    return part


def _lower_packing(ctx: Lowering, d: Operand, parts: Vector, type_name: str) -> None:
    part = _part_bits(ctx, type_name, parts)
    whole = bits_of(type_name)
    uses = [ctx.dst(d, type_name), *ctx.srcs(parts, f"b{part}")]
    if uses[0].value.bits != whole or any(use.value.bits != part for use in uses[1:]):
        raise ctx.unsupported(f"the parts must have {part} bits, the whole {whole}")
    ctx.emit(f"pack.{whole}.{part}", *uses)


def _lower_unpacking(ctx: Lowering, parts: Vector, a: Operand, type_name: str) -> None:
    part = _part_bits(ctx, type_name, parts)
    whole = bits_of(type_name)
    if isinstance(a, Symbol):
        raise ctx.unsupported("an address is not taken apart")
    uses = [ctx.src(a, type_name), *ctx.dsts(parts, f"b{part}")]
    if uses[0].value.bits != whole or any(use.value.bits != part for use in uses[1:]):
        raise ctx.unsupported(f"the parts must have {part} bits, the whole {whole}")
    ctx.emit(f"unpack.{whole}.{part}", *uses)

"""Matrix fragments between shared memory and registers: `ldmatrix`, `stmatrix`, `movmatrix`."""

from __future__ import annotations

from ptx_emulator.lower.context import Lowering
from ptx_emulator.lower.memory import take_space
from ptx_emulator.lower.modifiers import Modifiers, operands
from ptx_emulator.lower.registry import lowers
from ptx_emulator.ptx.module import Instruction, Operand, Vector

_ROWS, _COLUMNS16, _COLUMNS8, _COLUMN_PAIRS8 = range(4)  # as Fragment in matrix_fragments.cpp
_PACKING = {None: 0, "b6x16_p32": 1, "b4x16_p64": 2}  # as Packing


def _common(ctx: Lowering, modifiers: Modifiers) -> tuple[str | None, int, bool, int]:
    """Shape, number of matrices, whether they are transposed, and the space."""
    if not (modifiers.has("sync") and modifiers.has("aligned")):
        raise ctx.unsupported(".sync.aligned is mandatory")
    shape = modifiers.take("m8n8", "m16n16", "m8n16", "m16n8")
    count = modifiers.take("x1", "x2", "x4")
    if count is None:
        raise ctx.unsupported("the number of matrices is missing")
    transposed = modifiers.has("trans")
    space, number = take_space(modifiers)
    if space not in (None, "shared", "shared::cta"):
        raise ctx.unsupported(f"matrices are in shared memory, not .{space}")
    return shape, int(count[1:]), transposed, number


def _registers(ctx: Lowering, operand: Operand, count: int) -> tuple[Operand, ...]:
    elements = operand.elements if isinstance(operand, Vector) else (operand,)
    if len(elements) != count:
        raise ctx.unsupported(f"{count} registers were expected, not {len(elements)}")
    return elements


@lowers("ldmatrix", op_class="matrix load")
def lower_ldmatrix(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    shape, count, transposed, space = _common(ctx, modifiers)
    packing = modifiers.take("b6x16_p32", "b4x16_p64")
    type_name = modifiers.type()
    modifiers.done()
    form = (shape, type_name, transposed, packing is not None)
    if form in (("m8n8", "b16", False, False), ("m8n8", "b16", True, False)):
        fragment, rows, num_registers = (_COLUMNS16 if transposed else _ROWS), 8, 1
    elif form == ("m8n16", "b8x16", False, True):
        fragment, rows, num_registers = _ROWS, 8, 1
    elif count <= 2 and form in (("m16n16", "b8", True, False), ("m16n16", "b8x16", True, True)):
        fragment, rows, num_registers = _COLUMNS8, 16, 2
    else:
        raise ctx.unsupported("there is no such combination of shape, number, transposition and type")
    register, address = operands(ctx, instruction, 2)
    ctx.emit(
        "ldmatrix",
        *ctx.address(address),
        space,
        fragment,
        _PACKING[packing],
        rows * count,
        num_registers * count,
        *(ctx.dst(element, "b32") for element in _registers(ctx, register, num_registers * count)),
    )


@lowers("stmatrix", op_class="matrix store")
def lower_stmatrix(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    shape, count, transposed, space = _common(ctx, modifiers)
    type_name = modifiers.type()
    modifiers.done()
    if (shape, type_name) == ("m8n8", "b16"):
        fragment = _COLUMNS16 if transposed else _ROWS
    elif (shape, type_name, transposed) == ("m16n8", "b8", True):
        fragment = _COLUMN_PAIRS8
    else:
        raise ctx.unsupported("there is no such combination of shape, transposition and type")
    address, register = operands(ctx, instruction, 2)
    ctx.emit(
        "stmatrix",
        *ctx.address(address),
        space,
        fragment,
        0,
        8 * count,
        count,
        *(ctx.src(element, "b32") for element in _registers(ctx, register, count)),
    )


@lowers("movmatrix", op_class="matrix move")
def lower_movmatrix(ctx: Lowering, instruction: Instruction) -> None:
    if instruction.modifiers != ("sync", "aligned", "m8n8", "trans", "b16"):
        raise ctx.unsupported("movmatrix.sync.aligned.m8n8.trans.b16 was expected")
    destination, source = operands(ctx, instruction, 2)
    ctx.emit("movmatrix", ctx.dst(destination, "b32"), ctx.src(source, "b32"))

"""Branches, exit, trap, calls."""

from __future__ import annotations

from ptx_emulator.lower.context import Lowering, Target
from ptx_emulator.lower.modifiers import operands
from ptx_emulator.lower.registry import lowers
from ptx_emulator.ptx.module import Instruction, Symbol, Vector

MEETS = -1  # stands for the place where the lanes of a branch meet again, which flow.py fills in
_ASSERT_FAILS = "__assertfail"


@lowers("bra", op_class="control")
def bra(ctx: Lowering, i: Instruction) -> None:
    (label,) = operands(ctx, i, 1)
    if not isinstance(label, Symbol):
        raise ctx.unsupported("a label was expected")
    ctx.emit("branch", Target(label.name), MEETS)


@lowers("brx.idx", op_class="control")
def brx(ctx: Lowering, i: Instruction) -> None:
    index, table = operands(ctx, i, 2)
    targets = ctx.function.branch_targets.get(table.name) if isinstance(table, Symbol) else None
    if targets is None:
        raise ctx.unsupported(f"{table} is not a table of branch targets")
    ctx.emit("branch.indexed", ctx.src(index, "u32"), MEETS, *(Target(name) for name in targets))


@lowers("ret", "exit", op_class="control")
def leave(ctx: Lowering, i: Instruction) -> None:
    ctx.emit("exit")


@lowers("trap", "brkpt", op_class="control")
def trap(ctx: Lowering, i: Instruction) -> None:
    ctx.emit("trap")


@lowers("call", op_class="control")
def call(ctx: Lowering, i: Instruction) -> None:
    names = [operand.name for operand in i.operands if isinstance(operand, Symbol)]
    if _ASSERT_FAILS not in names:
        called = ", ".join(names) or "a pointer"
        raise ctx.unsupported(f"{called} is called; only {_ASSERT_FAILS} is known, compile with inlining")
    given = i.operands[-1].elements if isinstance(i.operands[-1], Vector) else ()
    values = [ctx.arguments.get(str(parameter)) for parameter in given]
    if [value.bits if value else 0 for value in values] != [64, 64, 32, 64, 64]:
        raise ctx.unsupported("message, file, line, function and size of a character were expected")
    ctx.emit("assertfail", *(ctx.read(value) for value in values[:4] if value))

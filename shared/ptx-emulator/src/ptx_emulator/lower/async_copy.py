"""Asynchronous copies of single threads: `cp.async` and what waits for it."""

from __future__ import annotations

from ptx_emulator.lower.context import Lowering, Use
from ptx_emulator.lower.memory import CACHE_HINT, PREFETCH_SIZES, take_space, without_policy
from ptx_emulator.lower.modifiers import Modifiers, operands
from ptx_emulator.lower.registry import lowers
from ptx_emulator.ptx.module import Immediate, Instruction, Operand, Register

_NO_FILL, _SOURCE_SIZE, _IGNORE_SOURCE = range(3)  # as Fill in async_copy.cpp


@lowers("cp.async.ca", "cp.async.cg", op_class="async copy")
def lower_cp_async(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    modifiers.has("async")
    caching = modifiers.take("ca", "cg")
    _, space = take_space(modifiers)
    if instruction.modifiers[2] not in ("shared", "shared::cta") or not modifiers.has("global"):
        raise ctx.unsupported("a copy from .global to .shared was expected")
    modifiers.take(*PREFETCH_SIZES)
    hinted = modifiers.has(CACHE_HINT)
    modifiers.done()
    found = without_policy(ctx, operands(ctx, instruction, 3 + hinted, 4 + hinted), hinted)
    size = found[2]
    if not isinstance(size, Immediate) or size.value not in ((16,) if caching == "cg" else (4, 8, 16)):
        raise ctx.unsupported("the size has to be 4, 8 or 16, with .cg 16")
    fill, use = _fill(ctx, found[3]) if len(found) == 4 else (_NO_FILL, ctx.constant(0, 32))
    ctx.emit("cp.async", *ctx.address(found[0]), space, *ctx.address(found[1]), int(size.value), fill, use)


def _fill(ctx: Lowering, operand: Operand) -> tuple[int, Use]:
    """How many bytes come from the source: a number, or all but where a predicate is true."""
    if isinstance(operand, Register) and ctx.function.registers.get(operand.name) == "pred":
        return _IGNORE_SOURCE, ctx.src(operand, "pred")
    return _SOURCE_SIZE, ctx.src(operand, "u32")


@lowers("cp.async.commit_group", op_class="barrier")
def lower_commit_group(ctx: Lowering, instruction: Instruction) -> None:
    if instruction.modifiers != ("async", "commit_group"):
        raise ctx.unsupported("it has no modifiers")
    operands(ctx, instruction, 0)
    ctx.emit("cp.async.commit_group")


@lowers("cp.async.wait_group", "cp.async.wait_all", op_class="barrier")
def lower_wait_group(ctx: Lowering, instruction: Instruction) -> None:
    if instruction.modifiers == ("async", "wait_all"):
        operands(ctx, instruction, 0)
        ctx.emit("cp.async.wait_all")
        return
    (allowed,) = operands(ctx, instruction, 1)
    if instruction.modifiers != ("async", "wait_group") or not isinstance(allowed, Immediate):
        raise ctx.unsupported("a number of groups was expected")
    ctx.emit("cp.async.wait_group", int(allowed.value))


@lowers("cp.async.mbarrier.arrive", op_class="async copy")
def lower_mbarrier_arrive(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    modifiers.require("async", "mbarrier", "arrive")
    without_increment = modifiers.has("noinc")
    space, _ = take_space(modifiers)
    if modifiers.type() != "b64" or space not in (None, "shared", "shared::cta"):
        raise ctx.unsupported("an mbarrier of type .b64 in .shared was expected")
    modifiers.done()
    (address,) = operands(ctx, instruction, 1)
    ctx.emit("cp.async.mbarrier.arrive", *ctx.address(address), int(without_increment))

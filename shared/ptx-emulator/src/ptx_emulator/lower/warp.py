"""Operations across the lanes of a warp: shfl, vote, match, redux, elect, activemask, bar.warp.sync."""

from __future__ import annotations

from ptx_emulator.lower.context import Lowering
from ptx_emulator.lower.modifiers import Modifiers, operands
from ptx_emulator.lower.registry import lowers
from ptx_emulator.ptx.module import Instruction, Operand, Pair, Register

SHUFFLES = {"up": 0, "down": 1, "bfly": 2, "idx": 3}  # as Shuffle in warp.cpp
VOTES = {"all": 0, "any": 1, "uni": 2, "ballot": 3}  # as Vote
REDUCTIONS = {"add": 0, "min": 1, "max": 2, "and": 3, "or": 4, "xor": 5}  # as Reduction
SINK = Register("_")


def take_sync(ctx: Lowering, modifiers: Modifiers) -> None:
    if not modifiers.has("sync"):
        raise ctx.unsupported("the form without .sync is not known from sm_70 on")


def split_pair(operand: Operand) -> tuple[Operand, Operand]:
    """`d|p`, of which p may be left out."""
    return (operand.first, operand.second) if isinstance(operand, Pair) else (operand, SINK)


@lowers("shfl", op_class="shuffle")
def lower_shfl(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    take_sync(ctx, modifiers)
    mode = modifiers.take(*SHUFFLES)
    if mode is None or modifiers.type() not in ("b32", "u32", "s32", "f32"):
        raise ctx.unsupported("a mode and a type of 32 bits were expected")
    modifiers.done()
    result, source, b, c, members = operands(ctx, instruction, 5)
    value, predicate = split_pair(result)
    ctx.emit(
        "shfl",
        ctx.dst(value, "b32"),
        ctx.dst(predicate, "pred"),
        ctx.src(source, "b32"),
        ctx.src(b, "b32"),
        ctx.src(c, "b32"),
        ctx.src(members, "b32"),
        SHUFFLES[mode],
    )


@lowers("vote", op_class="vote")
def lower_vote(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    take_sync(ctx, modifiers)
    mode = modifiers.take(*VOTES)
    type_name = "b32" if mode == "ballot" else "pred"
    if mode is None or not modifiers.has(type_name):
        raise ctx.unsupported("a mode and its type were expected")
    modifiers.done()
    result, source, members = operands(ctx, instruction, 3)
    negated = isinstance(source, Register) and source.negated
    if isinstance(source, Register):
        source = Register(source.name)
    predicate = ctx.src(source, "pred")
    ctx.emit(
        "vote", ctx.dst(result, type_name), predicate, int(negated), ctx.src(members, "b32"), VOTES[mode]
    )


@lowers("match", op_class="vote")
def lower_match(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    take_sync(ctx, modifiers)
    mode = modifiers.take("any", "all")
    type_name = modifiers.type()
    if mode is None or type_name not in ("b32", "b64", "u32", "u64", "s32", "s64"):
        raise ctx.unsupported(".any or .all, and a type of 32 or 64 bits, were expected")
    modifiers.done()
    result, source, members = operands(ctx, instruction, 3)
    value, predicate = split_pair(result)
    ctx.emit(
        "match",
        ctx.dst(value, "b32"),
        ctx.dst(predicate, "pred"),
        ctx.src(source, type_name),
        64 if type_name.endswith("64") else 32,
        ctx.src(members, "b32"),
        int(mode == "all"),
    )


@lowers("redux", op_class="shuffle")
def lower_redux(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    take_sync(ctx, modifiers)
    how = modifiers.take(*REDUCTIONS)
    absolute, keep_nan = modifiers.has("abs"), modifiers.has("NaN")
    type_name = modifiers.type()
    modifiers.done()
    result, source, members = operands(ctx, instruction, 3)
    mask = ctx.src(members, "b32")
    if type_name == "f32" and how in ("min", "max"):
        flags = (int(how == "max"), int(absolute), int(keep_nan))
        ctx.emit("redux.f32", ctx.dst(result, "f32"), ctx.src(source, "f32"), mask, *flags)
        return
    allowed = ("b32",) if how in ("and", "or", "xor") else ("u32", "s32")
    if how is None or absolute or keep_nan or type_name not in allowed:
        raise ctx.unsupported("this combination of reduction and type does not exist")
    signed = int(type_name == "s32")
    ctx.emit("redux", ctx.dst(result, "b32"), ctx.src(source, "b32"), mask, REDUCTIONS[how], signed)


@lowers("elect", op_class="vote")
def lower_elect(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    take_sync(ctx, modifiers)
    modifiers.done()
    result, members = operands(ctx, instruction, 2)
    if not isinstance(result, Pair):
        raise ctx.unsupported("the result must be a register and a predicate")
    ctx.emit("elect", ctx.dst(result.first, "b32"), ctx.dst(result.second, "pred"), ctx.src(members, "b32"))


@lowers("activemask", op_class="vote")
def lower_activemask(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    if modifiers.type() not in ("b32", "u32"):
        raise ctx.unsupported("the type must be .b32")
    modifiers.done()
    (result,) = operands(ctx, instruction, 1)
    ctx.emit("activemask", ctx.dst(result, "b32"))


@lowers("bar.warp", op_class="barrier")
def lower_warp_barrier(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    modifiers.has("warp")
    take_sync(ctx, modifiers)
    modifiers.done()
    (members,) = operands(ctx, instruction, 1)
    ctx.emit("bar.warp.sync", ctx.src(members, "b32"))

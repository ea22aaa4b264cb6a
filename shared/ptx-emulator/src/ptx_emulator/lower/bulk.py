"""Bulk asynchronous copies and their groups, st.async, red.async."""

from __future__ import annotations

from ptx_emulator.lower.context import Lowering, Use
from ptx_emulator.lower.modifiers import Modifiers, operands
from ptx_emulator.lower.registry import lowers
from ptx_emulator.lower.spaces import SHARED, SHARED_CLUSTER
from ptx_emulator.ptx.module import Immediate, Instruction, Operand

REDUCTIONS = {
    "add": 0,
    "min": 1,
    "max": 2,
    "inc": 3,
    "dec": 4,
    "and": 5,
    "or": 6,
    "xor": 7,
}  # ReduceOp in bulk.h
NO_REDUCTION = 8
# As ElementType in bulk.h. Reductions of .b32 and .b64 are bitwise.
TYPES = {"b32": 2, "u32": 2, "s32": 3, "b64": 4, "u64": 4, "s64": 5, "f16": 6, "f32": 7, "f64": 9, "bf16": 10}
INTEGERS = ("u32", "s32", "u64", "s64")
HALVES = ("f16", "bf16")
# Which types a reduction of bulk copies into global memory has.
REDUCTION_TYPES = {
    "add": ("u32", "s32", "u64", *HALVES, "f32", "f64"),
    "min": (*INTEGERS, *HALVES),
    "max": (*INTEGERS, *HALVES),
    "inc": ("u32",),
    "dec": ("u32",),
    "and": ("b32", "b64"),
    "or": ("b32", "b64"),
    "xor": ("b32", "b64"),
}
RED_ASYNC_TYPES = {
    "add": ("u32", "s32", "u64"),
    "min": ("u32", "s32"),
    "max": ("u32", "s32"),
    "inc": ("u32",),
    "dec": ("u32",),
    "and": ("b32",),
    "or": ("b32",),
    "xor": ("b32",),
}
COMPLETE_TX = "mbarrier::complete_tx::bytes"
CACHE_HINT = "L2::cache_hint"


class Operands:
    """The operands of a copy, taken from the left; a cache policy is dropped, for it changes no result."""

    def __init__(self, ctx: Lowering, instruction: Instruction) -> None:
        self._ctx = ctx
        self._left = list(instruction.operands)

    def next(self) -> Operand:
        if not self._left:
            raise self._ctx.unsupported("an operand is missing")
        return self._left.pop(0)

    def done(self) -> None:
        if self._left:
            raise self._ctx.unsupported(f"{len(self._left)} more operands than this form has")


def mask_arguments(ctx: Lowering, operand: Operand | None) -> tuple[Use, int]:
    """A mask of 16 bits as slot and bits of the slot, which are 0 without a mask."""
    if operand is None:
        return ctx.constant(0, 32), 0
    use = ctx.src(operand, "b16")
    if use.value.bits not in (16, 32):
        raise ctx.unsupported("the mask must be in a register of 16 or 32 bits")
    return use, use.value.bits


@lowers("cp.async.bulk", op_class="bulk copy")
def lower_bulk_copy(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    modifiers.require("async", "bulk")
    spaces = take_direction(ctx, modifiers)
    given = Operands(ctx, instruction)
    if spaces == ("global", "shared::cta"):
        lower_store(ctx, modifiers, given)
    elif spaces == ("shared::cluster", "shared::cta"):
        lower_send(ctx, modifiers, given, NO_REDUCTION, 0)
    elif spaces[1] == "global":
        lower_load(ctx, modifiers, given, spaces[0])
    else:
        raise ctx.unsupported(f"there is no copy from .{spaces[1]} to .{spaces[0]}")


def take_direction(ctx: Lowering, modifiers: Modifiers) -> tuple[str, str]:
    """Destination and source, the first two state spaces."""
    names = ("global", "shared::cta", "shared::cluster")
    destination, source = modifiers.take(*names), modifiers.take(*names)
    if destination is None or source is None:
        raise ctx.unsupported("destination and source spaces were expected")
    return destination, source


def take_policy(modifiers: Modifiers, given: Operands) -> None:
    if modifiers.has(CACHE_HINT):
        given.next()


def lower_load(ctx: Lowering, modifiers: Modifiers, given: Operands, destination_space: str) -> None:
    modifiers.require(COMPLETE_TX)
    multicast = modifiers.has("multicast::cluster")
    if multicast and destination_space != "shared::cluster":
        raise ctx.unsupported(".multicast::cluster needs .shared::cluster")
    destination, source, size, mbarrier = given.next(), given.next(), given.next(), given.next()
    mask = mask_arguments(ctx, given.next() if multicast else None)
    take_policy(modifiers, given)
    modifiers.done()
    given.done()
    ctx.emit(
        "bulk.load",
        *ctx.address(destination),
        SHARED if destination_space == "shared::cta" else SHARED_CLUSTER,
        *ctx.address(source),
        ctx.src(size, "u32"),
        *ctx.address(mbarrier),
        *mask,
    )


def lower_send(
    ctx: Lowering, modifiers: Modifiers, given: Operands, reduction: int, type_number: int
) -> None:
    modifiers.require(COMPLETE_TX)
    destination, source, size, mbarrier = given.next(), given.next(), given.next(), given.next()
    modifiers.done()
    given.done()
    ctx.emit(
        "bulk.send",
        *ctx.address(destination),
        *ctx.address(source),
        ctx.src(size, "u32"),
        *ctx.address(mbarrier),
        reduction,
        type_number,
    )


def lower_store(
    ctx: Lowering, modifiers: Modifiers, given: Operands, reduction: int = NO_REDUCTION, type_number: int = 0
) -> None:
    modifiers.require("bulk_group")
    destination, source, size = given.next(), given.next(), given.next()
    take_policy(modifiers, given)
    masked = reduction == NO_REDUCTION and modifiers.has("cp_mask")
    mask = mask_arguments(ctx, given.next() if masked else None)
    modifiers.done()
    given.done()
    ctx.emit(
        "bulk.store",
        *ctx.address(destination),
        *ctx.address(source),
        ctx.src(size, "u32"),
        *mask,
        reduction,
        type_number,
    )


@lowers("cp.reduce.async.bulk", op_class="bulk copy")
def lower_bulk_reduction(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    modifiers.require("reduce", "async", "bulk")
    spaces = take_direction(ctx, modifiers)
    type_name = modifiers.type()
    how = modifiers.take(*REDUCTIONS)
    if how is None or type_name not in REDUCTION_TYPES[how]:
        raise ctx.unsupported(f"there is no reduction .{how} of .{type_name}")
    if modifiers.has("noftz") != (how == "add" and type_name in HALVES):
        raise ctx.unsupported(".noftz goes with .add of .f16 and .bf16")
    given = Operands(ctx, instruction)
    if spaces == ("global", "shared::cta"):
        lower_store(ctx, modifiers, given, REDUCTIONS[how], TYPES[type_name])
        return
    if spaces != ("shared::cluster", "shared::cta"):
        raise ctx.unsupported(f"there is no reduction from .{spaces[1]} to .{spaces[0]}")
    if type_name not in RED_ASYNC_TYPES[how]:
        raise ctx.unsupported(f"there is no reduction of .{type_name} in shared memory")
    lower_send(ctx, modifiers, given, REDUCTIONS[how], TYPES[type_name])


@lowers("cp.async.bulk.prefetch", op_class="bulk copy")
def lower_prefetch(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    modifiers.require("async", "bulk", "prefetch", "L2", "global")
    given = Operands(ctx, instruction)
    source, size = given.next(), given.next()
    take_policy(modifiers, given)
    modifiers.done()
    given.done()
    ctx.emit("bulk.prefetch", *ctx.address(source), ctx.src(size, "u32"))


@lowers("cp.async.bulk.commit_group", op_class="barrier")
def lower_commit_group(ctx: Lowering, instruction: Instruction) -> None:
    operands(ctx, instruction, 0)
    if len(instruction.modifiers) != 3:
        raise ctx.unsupported("it has no modifiers")
    ctx.emit("bulk.commit_group")


@lowers("cp.async.bulk.wait_group", op_class="barrier")
def lower_wait_group(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    modifiers.require("async", "bulk", "wait_group")
    read_only = modifiers.has("read")
    modifiers.done()
    (allowed,) = operands(ctx, instruction, 1)
    if not isinstance(allowed, Immediate) or not isinstance(allowed.value, int) or allowed.value < 0:
        raise ctx.unsupported("the number of groups must be a literal")
    ctx.emit("bulk.wait_group", allowed.value, int(read_only))


@lowers("st.async", op_class="bulk copy")
def lower_st_async(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    modifiers.has("async")
    modifiers.take("weak", "cluster")  # the store is ordered by its mbarrier in both forms
    modifiers.has("shared::cluster")
    modifiers.require(COMPLETE_TX)
    vector = modifiers.take("v2", "v4")
    type_name = modifiers.type()
    if type_name not in ("b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64"):
        raise ctx.unsupported(f"there is no form of type .{type_name}")
    modifiers.done()
    emit_async(ctx, instruction, type_name, int(vector[1:]) if vector else 1, NO_REDUCTION, 0)


@lowers("red.async", op_class="bulk copy")
def lower_red_async(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    modifiers.require("async", "relaxed", "cluster")
    modifiers.has("shared::cluster")
    modifiers.require(COMPLETE_TX)
    type_name = modifiers.type()
    how = modifiers.take(*REDUCTIONS)
    if how is None or type_name not in RED_ASYNC_TYPES[how]:
        raise ctx.unsupported(f"there is no reduction .{how} of .{type_name}")
    modifiers.done()
    emit_async(ctx, instruction, type_name, 1, REDUCTIONS[how], TYPES[type_name])


def emit_async(
    ctx: Lowering, instruction: Instruction, type_name: str, count: int, reduction: int, type_number: int
) -> None:
    destination, source, mbarrier = operands(ctx, instruction, 3)
    sources = ctx.srcs(source, type_name)
    if len(sources) != count:
        raise ctx.unsupported(f"{count} values were expected")
    element_bytes = int(type_name[1:]) // 8
    pairs = [argument for use in sources for argument in (use, use.value.bits)]
    ctx.emit(
        "st.async",
        *ctx.address(destination),
        *ctx.address(mbarrier),
        element_bytes,
        count,
        reduction,
        type_number,
        *pairs,
    )

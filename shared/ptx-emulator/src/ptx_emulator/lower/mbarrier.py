"""mbarrier objects."""

from __future__ import annotations

from ptx_emulator.lower.context import Lowering, Use
from ptx_emulator.lower.modifiers import Modifiers, operands
from ptx_emulator.lower.registry import lowers
from ptx_emulator.lower.spaces import GENERIC, SHARED_CLUSTER, SHARED_SPACES
from ptx_emulator.ptx.module import Instruction, Operand, Register

RELAXED, NO_COMPLETE, DROP, EXPECT_TX = 1, 2, 4, 8  # as ArriveFlags in mbarrier.cpp
PARITY, WAIT_RELAXED = 1, 2  # as WaitFlags in mbarrier.cpp


def take_semantics(ctx: Lowering, modifiers: Modifiers, *allowed: str) -> str | None:
    """The memory semantics of `.sem.scope`, which come together. The scope decides nothing here: the clocks
    of a cluster cover all of it."""
    semantics = modifiers.take(*allowed)
    scope = modifiers.take("cta", "cluster")
    if (semantics is None) != (scope is None):
        raise ctx.unsupported("semantics and scope must be given together")
    return semantics


def take_space(modifiers: Modifiers) -> int:
    """The space of the mbarrier, generic without a modifier."""
    name = modifiers.take(*SHARED_SPACES)
    return GENERIC if name is None else SHARED_SPACES[name]


def finish_b64(ctx: Lowering, modifiers: Modifiers) -> None:
    if not modifiers.has("b64"):
        raise ctx.unsupported("the type must be .b64")
    modifiers.done()


@lowers("mbarrier.init", "mbarrier.inval", op_class="barrier")
def lower_init(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    what = modifiers.take("init", "inval")
    space = take_space(modifiers)
    finish_b64(ctx, modifiers)
    if space == SHARED_CLUSTER:
        raise ctx.unsupported("the mbarrier must be in the CTA's own shared memory")
    if what == "init":
        address, count = operands(ctx, instruction, 2)
        ctx.emit("mbarrier.init", *ctx.address(address), space, ctx.src(count, "u32"))
    else:
        (address,) = operands(ctx, instruction, 1)
        ctx.emit("mbarrier.inval", *ctx.address(address), space)


@lowers("mbarrier.arrive", "mbarrier.arrive_drop", op_class="barrier")
def lower_arrive(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    flags = DROP if modifiers.take("arrive", "arrive_drop") == "arrive_drop" else 0
    flags |= EXPECT_TX if modifiers.has("expect_tx") else 0
    flags |= NO_COMPLETE if modifiers.has("noComplete") else 0
    flags |= RELAXED if take_semantics(ctx, modifiers, "release", "relaxed") == "relaxed" else 0
    space = take_space(modifiers)
    finish_b64(ctx, modifiers)
    if flags & NO_COMPLETE and flags & EXPECT_TX:
        raise ctx.unsupported(".noComplete cannot be combined with .expect_tx")
    needs_third = bool(flags & (EXPECT_TX | NO_COMPLETE))
    given = operands(ctx, instruction, *((3,) if needs_third else (2, 3)))
    if space == SHARED_CLUSTER and not is_sink(given[0]):
        raise ctx.unsupported("an arrival in .shared::cluster cannot return a state; the result must be _")
    third = ctx.src(given[2], "u32") if len(given) == 3 else ctx.constant(1, 32)
    one, none = ctx.constant(1, 32), ctx.constant(0, 32)
    count, tx = (one, third) if flags & EXPECT_TX else (third, none)
    ctx.emit("mbarrier.arrive", *ctx.address(given[1]), space, ctx.dst(given[0], "b64"), count, tx, flags)


def is_sink(operand: Operand) -> bool:
    return isinstance(operand, Register) and operand.name == "_"


@lowers("mbarrier.expect_tx", "mbarrier.complete_tx", op_class="barrier")
def lower_tx(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    completed = modifiers.take("expect_tx", "complete_tx") == "complete_tx"
    take_semantics(ctx, modifiers, "relaxed")
    space = take_space(modifiers)
    finish_b64(ctx, modifiers)
    address, count = operands(ctx, instruction, 2)
    ctx.emit("mbarrier.tx", *ctx.address(address), space, ctx.src(count, "u32"), int(completed))


@lowers("mbarrier.test_wait", "mbarrier.try_wait", op_class="barrier")
def lower_wait(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    what = modifiers.take("test_wait", "try_wait")
    flags = PARITY if modifiers.has("parity") else 0
    flags |= WAIT_RELAXED if take_semantics(ctx, modifiers, "acquire", "relaxed") == "relaxed" else 0
    space = take_space(modifiers)
    finish_b64(ctx, modifiers)
    if space == SHARED_CLUSTER:
        raise ctx.unsupported("only an mbarrier of the CTA's own shared memory can be waited for")
    # The fourth operand of try_wait is a time limit that may be used; here a wait ends when the phase does.
    given = operands(ctx, instruction, *((3,) if what == "test_wait" else (3, 4)))
    wanted: Use = ctx.src(given[2], "u32" if flags & PARITY else "b64")
    ctx.emit(f"mbarrier.{what}", *ctx.address(given[1]), space, ctx.dst(given[0], "pred"), wanted, flags)


@lowers("mbarrier.pending_count", op_class="barrier")
def lower_pending_count(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    modifiers.has("pending_count")
    finish_b64(ctx, modifiers)
    count, state = operands(ctx, instruction, 2)
    ctx.emit("mbarrier.pending_count", ctx.dst(count, "u32"), ctx.src(state, "b64"))

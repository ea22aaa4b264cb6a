"""Named barriers of the CTA and the barrier of the cluster."""

from __future__ import annotations

from ptx_emulator.lower.context import Lowering
from ptx_emulator.lower.modifiers import Modifiers, operands
from ptx_emulator.lower.registry import lowers
from ptx_emulator.ptx.module import Instruction, Register

SYNC, ARRIVE = 0, 1  # as Kind in barrier.cpp
REDUCTIONS = {"popc": 2, "and": 3, "or": 4}


@lowers("bar", "barrier", op_class="barrier")
def lower_barrier(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    modifiers.has("cta")
    what = modifiers.take("sync", "arrive", "red")
    aligned = modifiers.has("aligned") or instruction.opcode == "bar"
    if what == "red":
        lower_reduction(ctx, instruction, modifiers, aligned)
        return
    if what is None:
        raise ctx.unsupported("one of .sync, .arrive and .red was expected")
    modifiers.done()
    given = operands(ctx, instruction, *((1, 2) if what == "sync" else (2,)))
    threads = ctx.src(given[1], "u32") if len(given) == 2 else ctx.constant(0, 32)
    kind = SYNC if what == "sync" else ARRIVE
    ctx.emit("barrier", ctx.src(given[0], "u32"), threads, kind, aligned=aligned)


def lower_reduction(ctx: Lowering, instruction: Instruction, modifiers: Modifiers, aligned: bool) -> None:
    what = modifiers.take(*REDUCTIONS)
    if what is None:
        raise ctx.unsupported("one of .popc, .and and .or was expected")
    type_name = "u32" if what == "popc" else "pred"
    if not modifiers.has(type_name):
        raise ctx.unsupported(f"the type of .{what} is .{type_name}")
    modifiers.done()
    given = operands(ctx, instruction, 3, 4)
    threads = ctx.src(given[2], "u32") if len(given) == 4 else ctx.constant(0, 32)
    predicate = given[-1]
    negated = isinstance(predicate, Register) and predicate.negated
    if isinstance(predicate, Register):
        predicate = Register(predicate.name)
    ctx.emit(
        "barrier",
        ctx.src(given[1], "u32"),
        threads,
        REDUCTIONS[what],
        ctx.dst(given[0], type_name),
        ctx.src(predicate, "pred"),
        int(negated),
        aligned=aligned,
    )


@lowers("barrier.cluster", op_class="barrier")
def lower_cluster_barrier(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    modifiers.has("cluster")
    what = modifiers.take("arrive", "wait")
    semantics = modifiers.take(*(("release", "relaxed") if what == "arrive" else ("acquire",)))
    modifiers.has("aligned")
    modifiers.done()
    operands(ctx, instruction, 0)
    if what == "arrive":
        ctx.emit("barrier.cluster.arrive", int(semantics == "relaxed"))
    elif what == "wait":
        ctx.emit("barrier.cluster.wait")
    else:
        raise ctx.unsupported("one of .arrive and .wait was expected")

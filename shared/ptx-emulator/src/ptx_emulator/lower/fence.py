"""Fences."""

from __future__ import annotations

from ptx_emulator.lower.context import Lowering
from ptx_emulator.lower.modifiers import Modifiers, operands
from ptx_emulator.lower.registry import lowers
from ptx_emulator.ptx.module import Immediate, Instruction

ACQUIRE, RELEASE = 1, 2  # as FenceSides in fence.cpp
SIDES = {
    None: ACQUIRE | RELEASE,
    "sc": ACQUIRE | RELEASE,
    "acq_rel": ACQUIRE | RELEASE,
    "acquire": ACQUIRE,
    "release": RELEASE,
}
SCOPES = ("cta", "cluster", "gpu", "sys")  # as Scope in checker.h
TENSOR_MAP_BYTES = 128


@lowers("fence", op_class="fence")
def lower_fence(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    if modifiers.has("mbarrier_init"):  # fence.mbarrier_init.release.cluster
        if not (modifiers.has("release") and modifiers.has("cluster")):
            raise ctx.unsupported("only .mbarrier_init.release.cluster is known")
        modifiers.done()
        operands(ctx, instruction, 0)
        ctx.emit("fence.mbarrier_init")
        return
    semantics = modifiers.take("sc", "acq_rel", "acquire", "release")
    # Taken as a fence of all shared and global memory, which is more order than the restricted form gives.
    restriction = modifiers.take("sync_restrict::shared::cta", "sync_restrict::shared::cluster")
    scope = modifiers.take(*SCOPES)
    if scope is None:
        raise ctx.unsupported("a scope is missing")
    check_restriction(ctx, restriction, semantics, scope)
    modifiers.done()
    operands(ctx, instruction, 0)
    ctx.emit("fence", SIDES[semantics], SCOPES.index(scope))


def check_restriction(
    ctx: Lowering, restriction: str | None, semantics: str | None, scope: str | None
) -> None:
    if restriction is None:
        return
    wanted = "release" if restriction.endswith("::cta") else "acquire"
    if semantics != wanted or scope != "cluster":
        raise ctx.unsupported(f".{restriction} needs .{wanted} and .cluster")


@lowers("membar", op_class="fence")
def lower_membar(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    level = modifiers.take("cta", "gl", "sys")
    if level is None:
        raise ctx.unsupported("the level must be .cta, .gl or .sys")
    modifiers.done()
    operands(ctx, instruction, 0)
    ctx.emit("fence", ACQUIRE | RELEASE, SCOPES.index("gpu" if level == "gl" else level))


@lowers("fence.proxy", "membar.proxy", op_class="fence")
def lower_proxy_fence(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    modifiers.has("proxy")
    if modifiers.has("tensormap::generic"):
        lower_tensormap_fence(ctx, instruction, modifiers)
        return
    if modifiers.has("async::generic"):
        semantics = modifiers.take("acquire", "release")
        restriction = modifiers.take("sync_restrict::shared::cta", "sync_restrict::shared::cluster")
        scope = modifiers.take(*SCOPES)
        check_restriction(ctx, restriction, semantics, scope)
        if restriction is None or scope is None:
            raise ctx.unsupported(".sync_restrict is missing")
        modifiers.done()
        operands(ctx, instruction, 0)
        if semantics == "acquire":
            ctx.emit("fence", ACQUIRE, SCOPES.index(scope))
        ctx.emit("fence.proxy.async")
        if semantics == "release":
            ctx.emit("fence", RELEASE, SCOPES.index(scope))
        return
    operands(ctx, instruction, 0)
    if modifiers.has("async"):
        modifiers.take(
            "global", "shared::cta", "shared::cluster"
        )  # all spaces are ordered whichever is named
        modifiers.done()
        ctx.emit("fence.proxy.async")
    elif modifiers.has("alias"):
        modifiers.done()
        ctx.emit("fence.nothing")
    else:
        raise ctx.unsupported("the proxy is not known")


def lower_tensormap_fence(ctx: Lowering, instruction: Instruction, modifiers: Modifiers) -> None:
    """`fence.proxy.tensormap::generic.release.scope` or `….acquire.scope [addr], 128`."""
    semantics = modifiers.take("acquire", "release")
    scope = modifiers.take(*SCOPES)
    if semantics is None or scope is None:
        raise ctx.unsupported(".acquire or .release, and a scope, are needed")
    modifiers.done()
    if semantics == "release":
        operands(ctx, instruction, 0)
        ctx.emit("fence.proxy.tensormap", RELEASE, SCOPES.index(scope))
        return
    address, size = operands(ctx, instruction, 2)
    if not isinstance(size, Immediate) or size.value != TENSOR_MAP_BYTES:
        raise ctx.unsupported(f"the size must be {TENSOR_MAP_BYTES}")
    ctx.emit("fence.proxy.tensormap", ACQUIRE, SCOPES.index(scope), *ctx.address(address))

"""Matrix instructions of a warpgroup (sm_90a): wgmma."""

from __future__ import annotations

import re

from ptx_emulator.lower.context import Lowering, Use
from ptx_emulator.lower.modifiers import Modifiers, operands
from ptx_emulator.lower.registry import lowers
from ptx_emulator.ptx.module import Immediate, Instruction, Operand, Vector

# As Element in matrix_types.h, with the bytes of an element.
ELEMENTS = {
    "f16": (0, 2),
    "bf16": (1, 2),
    "tf32": (2, 4),
    "e4m3": (3, 1),
    "e5m2": (4, 1),
    "u8": (8, 1),
    "s8": (9, 1),
}
RESULTS = {"f16": 0, "f32": 1, "s32": 2}  # as Result in wgmma.cpp
A_IN_REGISTERS, TRANS_A, TRANS_B, NEGATE, SATURATE = 1, 2, 4, 8, 16  # as Flags in wgmma.cpp
POSSIBLE = {
    ("f16", "f16", "f16"),
    ("f32", "f16", "f16"),
    ("f32", "bf16", "bf16"),
    ("f32", "tf32", "tf32"),
    *((d, a, b) for d in ("f16", "f32") for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2")),
    *(("s32", a, b) for a in ("u8", "s8") for b in ("u8", "s8")),
}
K_BYTES = 32
MAX_N = 256


def begin(ctx: Lowering, instruction: Instruction, what: str) -> Modifiers:
    modifiers = Modifiers(ctx, instruction)
    modifiers.require(what, "sync", "aligned")
    return modifiers


def take_shape(ctx: Lowering, modifiers: Modifiers, instruction: Instruction) -> tuple[int, int]:
    """N and K."""
    for modifier in instruction.modifiers:
        match = re.fullmatch(r"m64n(\d+)k(\d+)", modifier)
        if match:
            modifiers.take(modifier)
            return int(match[1]), int(match[2])
    raise ctx.unsupported("a shape m64nNkK is missing")


def literal(ctx: Lowering, operand: Operand, allowed: tuple[int, ...]) -> int:
    if not isinstance(operand, Immediate) or operand.value not in allowed:
        raise ctx.unsupported(f"a literal of {allowed} was expected, not {operand}")
    return int(operand.value)


def take_flags(ctx: Lowering, a_type: str, in_registers: bool, rest: list[Operand]) -> int:
    """Flags of imm-scale-a, imm-scale-b, imm-trans-a and imm-trans-b, as far as the types have them."""
    flags = A_IN_REGISTERS if in_registers else 0
    if a_type in ("u8", "s8"):
        return flags
    if len(rest) < 2:
        raise ctx.unsupported("imm-scale-a and imm-scale-b are missing")
    scales = [literal(ctx, rest.pop(0), (-1, 1)) for _ in range(2)]
    flags |= NEGATE if scales[0] * scales[1] < 0 else 0
    if a_type in ("f16", "bf16"):
        if len(rest) != (1 if in_registers else 2):
            raise ctx.unsupported("imm-trans-a (A in shared memory only) and imm-trans-b are missing")
        if not in_registers:
            flags |= TRANS_A if literal(ctx, rest.pop(0), (0, 1)) else 0
        flags |= TRANS_B if literal(ctx, rest.pop(0), (0, 1)) else 0
    return flags


@lowers("wgmma.mma_async", op_class="mma")
def lower_mma_async(ctx: Lowering, instruction: Instruction) -> None:
    if instruction.has("sp"):
        raise ctx.unsupported("sparse MMA is not emulated")
    modifiers = begin(ctx, instruction, "mma_async")
    n, k = take_shape(ctx, modifiers, instruction)
    saturate = modifiers.has("satfinite")
    b_type, a_type, d_type = (modifiers.type() for _ in range(3))
    modifiers.done()
    if (d_type, a_type, b_type) not in POSSIBLE:
        raise ctx.unsupported(f"types .{d_type}.{a_type}.{b_type} are not possible or not emulated")
    if k * ELEMENTS[a_type][1] != K_BYTES or n % 8 or not 8 <= n <= MAX_N:
        raise ctx.unsupported(f"shape m64n{n}k{k} does not exist for .{a_type}")
    if saturate and d_type != "s32":
        raise ctx.unsupported(".satfinite is for integers")
    if len(instruction.operands) < 4:
        raise ctx.unsupported("D, A, B and scale-d were expected")
    d, a, b, scale_d, *rest = instruction.operands
    in_registers = isinstance(a, Vector)
    flags = take_flags(ctx, a_type, in_registers, rest) | (SATURATE if saturate else 0)
    if rest:
        raise ctx.unsupported("too many operands")
    a_args: list[int | Use] = list(ctx.srcs(a, "b32")) if in_registers else [ctx.src(a, "b64"), 0, 0, 0]
    elements = d.elements if isinstance(d, Vector) else (d,)
    accumulators = [ctx.inout(element, "b32") for element in elements]
    if len(a_args) != 4 or len(accumulators) != (n // 4 if d_type == "f16" else n // 2):
        raise ctx.unsupported(
            f"{len(a_args)} registers of A or {len(accumulators)} of D are not what it needs"
        )
    for use in accumulators:
        if use.value.bits != 32:
            raise ctx.unsupported(f"{use.value.name} must have 32 bits")
    ctx.emit(
        "wgmma.mma_async",
        flags,
        n,
        ELEMENTS[a_type][0],
        ELEMENTS[b_type][0],
        RESULTS[d_type],
        ctx.src(scale_d, "pred"),
        ctx.src(b, "b64"),
        *a_args,
        *accumulators,
    )


@lowers("wgmma.fence", "wgmma.commit_group", op_class="barrier")
def lower_fence(ctx: Lowering, instruction: Instruction) -> None:
    what = instruction.modifiers[0]
    begin(ctx, instruction, what).done()
    operands(ctx, instruction, 0)
    ctx.emit("wgmma.fence" if what == "fence" else "wgmma.commit_group")


@lowers("wgmma.wait_group", op_class="barrier")
def lower_wait_group(ctx: Lowering, instruction: Instruction) -> None:
    begin(ctx, instruction, "wait_group").done()
    (count,) = operands(ctx, instruction, 1)
    ctx.emit("wgmma.wait_group", literal(ctx, count, tuple(range(8))))

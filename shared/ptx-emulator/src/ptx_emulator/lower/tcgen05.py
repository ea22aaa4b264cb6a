"""Tensor memory and the matrix instructions of sm_100: tcgen05."""

from __future__ import annotations

from ptx_emulator.lower.context import Lowering, Use
from ptx_emulator.lower.modifiers import Modifiers, operands
from ptx_emulator.lower.registry import lowers
from ptx_emulator.lower.spaces import GENERIC, SHARED
from ptx_emulator.ptx.module import Address, Immediate, Instruction, Operand, Vector

CTA_GROUPS = {"cta_group::1": 1, "cta_group::2": 2}
KINDS = {"kind::f16": 0, "kind::tf32": 1, "kind::f8f6f4": 2, "kind::i8": 3}  # as MmaKind in tcgen05_mma.h
BLOCK_SCALED = ("kind::mxf8f6f4", "kind::mxf4", "kind::mxf4nvf4")
# Whether A stays in the collector changes speed, not results.
COLLECTOR = tuple(f"collector::a::{use}" for use in ("fill", "use", "lastuse", "discard"))
MAX_SCALE_INPUT_D = 15
LANE_WORDS = {1: 4, 2: 8}  # 32-bit words of disable-output-lane, by CTA group

# As Shape in tcgen05_ldst.cpp, with the registers of .x1 and the most of any .xN.
SHAPES = {
    "32x32b": (0, 1, 128),
    "16x64b": (1, 1, 128),
    "16x128b": (2, 2, 128),
    "16x256b": (3, 4, 128),
    "16x32bx2": (4, 1, 128),
}
NUMBERS = tuple(f"x{1 << n}" for n in range(8))
MIN, MAX = 1, 2  # as Reduction in tcgen05_ldst.cpp
ABS, NAN, SIGNED, UNSIGNED = 1, 2, 4, 8  # as ReductionFlags in tcgen05_ldst.cpp

# (shape, multicast): as CopyShape in tcgen05_copy.cpp
COPIES = {
    ("128x256b", None): 0,
    ("4x256b", None): 1,
    ("128x128b", None): 2,
    ("64x128b", "warpx2::02_13"): 3,
    ("64x128b", "warpx2::01_23"): 4,
    ("32x128b", "warpx4"): 5,
}


def begin(ctx: Lowering, instruction: Instruction) -> Modifiers:
    return Modifiers(ctx, instruction)


def take_group(ctx: Lowering, modifiers: Modifiers) -> int:
    name = modifiers.take(*CTA_GROUPS)
    if name is None:
        raise ctx.unsupported("a .cta_group is missing")
    return CTA_GROUPS[name]


def tmem_address(ctx: Lowering, operand: Operand) -> list[int | Use]:
    if isinstance(operand, Address) and operand.coordinates:
        raise ctx.unsupported("a tensor memory address has no coordinates")
    return ctx.address(operand)


@lowers("tcgen05.alloc", op_class="tmem")
def lower_alloc(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = begin(ctx, instruction)
    modifiers.require("alloc", "sync", "aligned", "b32")
    group = take_group(ctx, modifiers)
    space = SHARED if modifiers.has("shared::cta") else GENERIC
    modifiers.done()
    address, columns = operands(ctx, instruction, 2)
    ctx.emit("tcgen05.alloc", group, space, *ctx.address(address), ctx.src(columns, "b32"))


@lowers("tcgen05.dealloc", op_class="tmem")
def lower_dealloc(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = begin(ctx, instruction)
    modifiers.require("dealloc", "sync", "aligned", "b32")
    group = take_group(ctx, modifiers)
    modifiers.done()
    address, columns = operands(ctx, instruction, 2)
    ctx.emit("tcgen05.dealloc", group, ctx.src(address, "b32"), ctx.src(columns, "b32"))


@lowers("tcgen05.relinquish_alloc_permit", op_class="tmem")
def lower_relinquish(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = begin(ctx, instruction)
    modifiers.require("relinquish_alloc_permit", "sync", "aligned")
    group = take_group(ctx, modifiers)
    modifiers.done()
    operands(ctx, instruction, 0)
    ctx.emit("tcgen05.relinquish_alloc_permit", group)


def take_transfer(ctx: Lowering, modifiers: Modifiers, packing: str) -> tuple[str, int, bool]:
    """Shape, number of registers, packed."""
    shape = modifiers.take(*SHAPES)
    number = modifiers.take(*NUMBERS)
    if shape is None or number is None:
        raise ctx.unsupported("a shape or a number is missing")
    _, registers_of_x1, most = SHAPES[shape]
    registers = registers_of_x1 * int(number[1:])
    if registers > most:
        raise ctx.unsupported(f".{number} is too many for .{shape}")
    return shape, registers, modifiers.has(packing)


def split_offset(ctx: Lowering, shape: str, rest: tuple[Operand, ...]) -> int:
    """Columns between the halves of 16x32bx2."""
    if shape != "16x32bx2":
        if rest:
            raise ctx.unsupported(f".{shape} has no split offset")
        return 0
    if len(rest) != 1 or not isinstance(rest[0], Immediate) or not isinstance(rest[0].value, int):
        raise ctx.unsupported("the split offset of .16x32bx2 must be an integer literal")
    return rest[0].value


def check_registers(ctx: Lowering, uses: list[Use], registers: int) -> None:
    if len(uses) != registers:
        raise ctx.unsupported(f"{registers} registers were expected, not {len(uses)}")
    for use in uses:
        if use.value.bits != 32:
            raise ctx.unsupported(f"{use.value.name} must have 32 bits")


@lowers("tcgen05.ld", op_class="tmem")
def lower_ld(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = begin(ctx, instruction)
    modifiers.require("ld", "sync", "aligned")
    reduces = modifiers.has("red")
    shape, registers, packed = take_transfer(ctx, modifiers, "pack::16b")
    destinations, *rest = operands(ctx, instruction, 2, 3, 4)
    reduction: list[int | Use] = [0]
    if reduces:
        if shape not in ("32x32b", "16x32bx2") or packed or registers < 2 or len(rest) < 2:
            raise ctx.unsupported("this form of tcgen05.ld.red does not exist")
        operation = MIN if modifiers.has("min") else MAX
        if operation == MAX:
            modifiers.require("max")
        flags = (ABS if modifiers.has("abs") else 0) | (NAN if modifiers.has("NaN") else 0)
        type_name = modifiers.type()
        if type_name not in ("f32", "s32", "u32") or (flags and type_name != "f32"):
            raise ctx.unsupported(f"type .{type_name} is not possible here")
        flags |= {"f32": 0, "s32": SIGNED, "u32": UNSIGNED}[type_name]
        result = ctx.dst(rest.pop(0), "b32")
        check_registers(ctx, [result], 1)
        reduction = [operation, flags, result]
    else:
        modifiers.require("b32")
    modifiers.done()
    if not rest:
        raise ctx.unsupported("an address is missing")
    uses = ctx.dsts(destinations, "b32")
    check_registers(ctx, uses, registers)
    split = split_offset(ctx, shape, tuple(rest[1:]))
    address = tmem_address(ctx, rest[0])
    ctx.emit("tcgen05.ld", SHAPES[shape][0], int(packed), split, registers, *address, *uses, *reduction)


@lowers("tcgen05.st", op_class="tmem")
def lower_st(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = begin(ctx, instruction)
    modifiers.require("st", "sync", "aligned", "b32")
    shape, registers, packed = take_transfer(ctx, modifiers, "unpack::16b")
    modifiers.done()
    address, *rest = operands(ctx, instruction, 2, 3)
    uses = ctx.srcs(rest.pop(), "b32")
    check_registers(ctx, uses, registers)
    split = split_offset(ctx, shape, tuple(rest))
    ctx.emit(
        "tcgen05.st", SHAPES[shape][0], int(packed), split, registers, *tmem_address(ctx, address), *uses
    )


@lowers("tcgen05.wait::ld", "tcgen05.wait::st", op_class="tmem")
def lower_wait(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = begin(ctx, instruction)
    what = modifiers.take("wait::ld", "wait::st")
    modifiers.require("sync", "aligned")
    modifiers.done()
    operands(ctx, instruction, 0)
    ctx.emit("tcgen05.wait.ld" if what == "wait::ld" else "tcgen05.wait.st")


@lowers("tcgen05.fence::before_thread_sync", "tcgen05.fence::after_thread_sync", op_class="fence")
def lower_fence(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = begin(ctx, instruction)
    what = modifiers.take("fence::before_thread_sync", "fence::after_thread_sync")
    modifiers.done()
    operands(ctx, instruction, 0)
    ctx.emit("tcgen05.fence.before" if what == "fence::before_thread_sync" else "tcgen05.fence.after")


def disabled_lanes(ctx: Lowering, group: int, rest: list[Operand]) -> list[Use]:
    """The registers of disable-output-lane, which is first in `rest` if it is there."""
    if not rest or not isinstance(rest[0], Vector):
        return []
    uses = ctx.srcs(rest.pop(0), "b32")
    check_registers(ctx, uses, LANE_WORDS[group])
    return uses


def scale_input_d(ctx: Lowering, kind: str, rest: list[Operand]) -> int:
    if not rest:
        return 0
    scale = rest.pop(0)
    if kind not in ("kind::f16", "kind::tf32"):
        raise ctx.unsupported(f"scale-input-d is not possible with .{kind}")
    if not isinstance(scale, Immediate) or not isinstance(scale.value, int):
        raise ctx.unsupported("scale-input-d must be an integer literal")
    if not 0 <= scale.value <= MAX_SCALE_INPUT_D:
        raise ctx.unsupported(f"scale-input-d must be 0 to {MAX_SCALE_INPUT_D}, not {scale.value}")
    return scale.value


@lowers("tcgen05.mma", op_class="mma")
def lower_mma(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = begin(ctx, instruction)
    modifiers.require("mma")
    for unknown, what in (("ws", "weight-stationary MMA"), ("sp", "sparse MMA"), ("ashift", "a shifted A")):
        if modifiers.has(unknown):
            raise ctx.unsupported(f"{what} is not emulated")
    for kind in BLOCK_SCALED:
        if modifiers.has(kind):
            raise ctx.unsupported("block-scaled MMA is not emulated")
    group = take_group(ctx, modifiers)
    kind_name = modifiers.take(*KINDS)
    if kind_name is None:
        raise ctx.unsupported("a .kind is missing or unknown")
    modifiers.take(*COLLECTOR)
    modifiers.done()
    if len(instruction.operands) < 5:
        raise ctx.unsupported("D, A, B, an instruction descriptor and a predicate were expected")
    d, a, b, descriptor, *rest = instruction.operands
    lanes = disabled_lanes(ctx, group, rest)
    if not rest:
        raise ctx.unsupported("enable-input-d is missing")
    enable = ctx.src(rest.pop(0), "pred")
    scale = scale_input_d(ctx, kind_name, rest)
    if rest:
        raise ctx.unsupported("too many operands")
    in_tmem = isinstance(a, Address)
    a_args: list[int | Use] = tmem_address(ctx, a) if in_tmem else [ctx.src(a, "b64"), 64, 0, 0]
    ctx.emit(
        "tcgen05.mma",
        KINDS[kind_name],
        group,
        int(in_tmem),
        *tmem_address(ctx, d),
        *a_args,
        ctx.src(b, "b64"),
        ctx.src(descriptor, "b32"),
        enable,
        scale,
        len(lanes),
        *lanes,
    )


@lowers("tcgen05.cp", op_class="tmem")
def lower_cp(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = begin(ctx, instruction)
    modifiers.require("cp")
    group = take_group(ctx, modifiers)
    shape = modifiers.take(*(shape for shape, _ in COPIES))
    multicast = modifiers.take("warpx2::02_13", "warpx2::01_23", "warpx4")
    if modifiers.take("b8x16", "b4x16_p64", "b6x16_p32") is not None:
        raise ctx.unsupported("decompression is not emulated")
    modifiers.done()
    form = COPIES.get((shape or "", multicast))
    if form is None:
        raise ctx.unsupported("this shape and multicast do not go together")
    address, descriptor = operands(ctx, instruction, 2)
    ctx.emit("tcgen05.cp", form, group, *tmem_address(ctx, address), ctx.src(descriptor, "b64"))


@lowers("tcgen05.shift", op_class="tmem", refused=True)
def lower_shift(ctx: Lowering, instruction: Instruction) -> None:
    # The manual says "downwards across all the rows, except the last", which can be read as either direction,
    # and as one matrix or four; no kernel was found that settles it.
    raise ctx.unsupported("the direction and extent of the shift are not certain")


@lowers("tcgen05.commit", op_class="barrier")
def lower_commit(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = begin(ctx, instruction)
    modifiers.require("commit", "mbarrier::arrive::one", "b64")
    group = take_group(ctx, modifiers)
    modifiers.take("shared::cluster")  # without it the address is generic: its low 32 bits are the same
    multicast = modifiers.has("multicast::cluster")
    modifiers.done()
    address, *mask = operands(ctx, instruction, 2 if multicast else 1)
    mask_args: list[int | Use] = [0, 32]
    if multicast:
        use = ctx.src(mask[0], "b16")
        mask_args = [use, use.value.bits]
    ctx.emit("tcgen05.commit", group, *ctx.address(address), int(multicast), *mask_args)

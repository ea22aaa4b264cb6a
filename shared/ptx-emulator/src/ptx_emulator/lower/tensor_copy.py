"""Tensor copies (TMA) and tensor maps."""

from __future__ import annotations

from ptx_emulator.lower.bulk import (
    COMPLETE_TX,
    NO_REDUCTION,
    REDUCTIONS,
    Operands,
    mask_arguments,
    take_direction,
    take_policy,
)
from ptx_emulator.lower.context import Lowering, Use
from ptx_emulator.lower.fence import SCOPES
from ptx_emulator.lower.modifiers import Modifiers, operands
from ptx_emulator.lower.registry import lowers
from ptx_emulator.lower.spaces import GENERIC, GLOBAL, SHARED, SHARED_CLUSTER
from ptx_emulator.ptx.module import Address, Immediate, Instruction, Operand

TILE, ROWS = 0, 1  # as Mode in tensor_copy.cpp
RANKS = {f"{rank}d": rank for rank in range(1, 6)}
GATHER_COORDINATES = 5
TENSOR_MAP_BYTES = 128
# As TensorMapField in tensor_map.h.
FIELDS = {
    "global_address": 0,
    "rank": 1,
    "box_dim": 2,
    "global_dim": 3,
    "global_stride": 4,
    "element_stride": 5,
    "elemtype": 6,
    "interleave_layout": 7,
    "swizzle_mode": 8,
    "swizzle_atomicity": 9,
    "fill_mode": 10,
}
INDEXED_FIELDS = ("box_dim", "global_dim", "global_stride", "element_stride")


def take_rank(ctx: Lowering, modifiers: Modifiers) -> int:
    name = modifiers.take(*RANKS)
    if name is None:
        raise ctx.unsupported("the rank is missing")
    return RANKS[name]


def take_mode(ctx: Lowering, modifiers: Modifiers, rank: int, row_mode: str) -> int:
    """Whole boxes or four rows. Anything else, such as im2col, is left to be refused."""
    if modifiers.has(row_mode):
        if rank != 2:
            raise ctx.unsupported(f".{row_mode} needs .2d")
        return ROWS
    modifiers.has("tile")
    return TILE


def tensor_operand(
    ctx: Lowering, operand: Operand, rank: int, mode: int
) -> tuple[list[int | Use], list[Use]]:
    """`[map, {coordinates}]` as address and coordinates."""
    count = GATHER_COORDINATES if mode == ROWS else rank
    if not isinstance(operand, Address) or len(operand.coordinates) != count:
        raise ctx.unsupported(f"a tensor map and {count} coordinates were expected")
    address = ctx.address(Address(operand.base, operand.offset))
    return address, [ctx.src(coordinate, "s32") for coordinate in operand.coordinates]


@lowers("cp.async.bulk.tensor", op_class="tensor copy")
def lower_tensor_copy(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    modifiers.require("async", "bulk", "tensor")
    rank = take_rank(ctx, modifiers)
    destination, source = take_direction(ctx, modifiers)
    given = Operands(ctx, instruction)
    if (destination, source) == ("global", "shared::cta"):
        mode = take_mode(ctx, modifiers, rank, "tile::scatter4")
        lower_store(ctx, modifiers, given, rank, mode, NO_REDUCTION)
    elif source == "global" and destination != "global":
        lower_load(ctx, modifiers, given, rank, destination)
    else:
        raise ctx.unsupported(f"there is no copy from .{source} to .{destination}")


def lower_load(ctx: Lowering, modifiers: Modifiers, given: Operands, rank: int, space: str) -> None:
    mode = take_mode(ctx, modifiers, rank, "tile::gather4")
    modifiers.require(COMPLETE_TX)
    multicast = modifiers.has("multicast::cluster")
    group = modifiers.take("cta_group::1", "cta_group::2")
    if multicast and space != "shared::cluster":
        raise ctx.unsupported(".multicast::cluster needs .shared::cluster")
    destination, tensor, mbarrier = given.next(), given.next(), given.next()
    mask = mask_arguments(ctx, given.next() if multicast else None)
    take_policy(modifiers, given)
    modifiers.done()
    given.done()
    address, coordinates = tensor_operand(ctx, tensor, rank, mode)
    ctx.emit(
        "tensor.load",
        *ctx.address(destination),
        SHARED if space == "shared::cta" else SHARED_CLUSTER,
        *address,
        *ctx.address(mbarrier),
        rank,
        mode,
        int(group[-1]) if group else 0,
        *mask,
        *coordinates,
    )


def lower_store(
    ctx: Lowering, modifiers: Modifiers, given: Operands, rank: int, mode: int, reduction: int
) -> None:
    modifiers.require("bulk_group")
    tensor, source = given.next(), given.next()
    take_policy(modifiers, given)
    modifiers.done()
    given.done()
    address, coordinates = tensor_operand(ctx, tensor, rank, mode)
    ctx.emit("tensor.store", *address, *ctx.address(source), rank, mode, reduction, *coordinates)


@lowers("cp.reduce.async.bulk.tensor", op_class="tensor copy")
def lower_tensor_reduction(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    modifiers.require("reduce", "async", "bulk", "tensor")
    rank = take_rank(ctx, modifiers)
    direction = take_direction(ctx, modifiers)
    if direction != ("global", "shared::cta"):
        raise ctx.unsupported(f"there is no reduction from .{direction[1]} to .{direction[0]}")
    how = modifiers.take(*REDUCTIONS)
    if how is None:
        raise ctx.unsupported("the reduction is missing")
    modifiers.has("tile")
    lower_store(ctx, modifiers, Operands(ctx, instruction), rank, TILE, REDUCTIONS[how])


@lowers("cp.async.bulk.prefetch.tensor", op_class="tensor copy")
def lower_tensor_prefetch(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    modifiers.require("async", "bulk", "prefetch", "tensor")
    rank = take_rank(ctx, modifiers)
    modifiers.require("L2", "global")
    mode = take_mode(ctx, modifiers, rank, "tile::gather4")
    given = Operands(ctx, instruction)
    tensor = given.next()
    take_policy(modifiers, given)
    modifiers.done()
    given.done()
    address, coordinates = tensor_operand(ctx, tensor, rank, mode)
    ctx.emit("tensor.prefetch", *address, rank, mode, *coordinates)


@lowers("tensormap.replace", op_class="tensor copy")
def lower_replace(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    modifiers.has("replace")
    modifiers.require("tile")
    field = modifiers.take(*FIELDS)
    space = modifiers.take("global", "shared::cta", "shared")
    modifiers.require("b1024")
    type_name = modifiers.type()
    modifiers.done()
    wide = field in ("global_address", "global_stride")
    if field is None or type_name != ("b64" if wide else "b32"):
        raise ctx.unsupported("the field or its type is not known")
    indexed = field in INDEXED_FIELDS
    given = operands(ctx, instruction, 3 if indexed else 2)
    ordinal = given[1].value if indexed and isinstance(given[1], Immediate) else 0
    if indexed and not isinstance(given[1], Immediate):
        raise ctx.unsupported("the ordinal must be a literal")
    value = ctx.src(given[-1], type_name)
    spaces = {None: GENERIC, "global": GLOBAL}
    ctx.emit(
        "tensormap.replace",
        *ctx.address(given[0]),
        spaces.get(space, SHARED),
        FIELDS[field],
        int(ordinal),
        value,
        value.value.bits,
    )


@lowers("tensormap.cp_fenceproxy", op_class="tensor copy")
def lower_copy_and_fence(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    modifiers.has("cp_fenceproxy")
    direction = take_direction(ctx, modifiers)
    modifiers.require("tensormap::generic", "release", "sync", "aligned")
    scope = modifiers.take(*SCOPES)
    if direction != ("global", "shared::cta") or scope is None:
        raise ctx.unsupported("only .global.shared::cta with a scope is known")
    modifiers.done()
    destination, source, size = operands(ctx, instruction, 3)
    if not isinstance(size, Immediate) or size.value != TENSOR_MAP_BYTES:
        raise ctx.unsupported(f"the size must be {TENSOR_MAP_BYTES}")
    ctx.emit("tensormap.copy", *ctx.address(destination), *ctx.address(source), SCOPES.index(scope))

"""Lowering of mma.sync."""

from __future__ import annotations

from ptx_emulator.lower.context import Lowering
from ptx_emulator.lower.modifiers import Modifiers, operands
from ptx_emulator.lower.registry import lowers
from ptx_emulator.ptx.module import Instruction, Operand, Vector

# As Element and Accumulator in mma.cpp.
_ELEMENTS = {
    "f16": 0,
    "bf16": 1,
    "tf32": 2,
    "e4m3": 3,
    "e5m2": 4,
    "e2m1": 5,
    "e2m3": 6,
    "e3m2": 7,
    "s8": 8,
    "u8": 9,
}
_F32, _F16, _S32, _S32_SATURATING = 0, 1, 2, 3
_FP8 = ("e4m3", "e5m2")
_INT8 = ("s8", "u8")
_DEPTHS = {"m16n8k4": 4, "m16n8k8": 8, "m16n8k16": 16, "m16n8k32": 32}
_ALLOWED_DEPTHS = {"f16": (8, 16), "bf16": (8, 16), "tf32": (4, 8)}  # 8-bit elements: 16 and 32


def _bits(element: str) -> int:
    return {"f16": 16, "bf16": 16, "tf32": 32}.get(element, 8)


def _check(ctx: Lowering, depth: int, elements: tuple[str, str], types: tuple[str, str], small: bool) -> None:
    a, b = elements
    if a not in _ELEMENTS or b not in _ELEMENTS:
        raise ctx.unsupported(f"elements .{a} and .{b} are not known here")
    groups: tuple[tuple[str, ...], ...] = (("f16",), ("bf16",), ("tf32",), _FP8, _INT8)
    if small:
        groups = ((*_FP8, "e2m1", "e2m3", "e3m2"),)
    if not any(a in group and b in group for group in groups):
        raise ctx.unsupported(f".{a} and .{b} do not go together here")
    if depth not in ((32,) if small else _ALLOWED_DEPTHS.get(a, (16, 32))):
        raise ctx.unsupported(f".{a} has no shape of depth {depth}")
    results = ("s32",) if a in _INT8 else ("f32",) if a in ("bf16", "tf32") else ("f32", "f16")
    if types[0] != types[1] or types[0] not in results:
        raise ctx.unsupported(f".{types[0]} and .{types[1]} are not accumulators for .{a}")


def _words(ctx: Lowering, operand: Operand, count: int) -> None:
    elements = operand.elements if isinstance(operand, Vector) else (operand,)
    if len(elements) != count:
        raise ctx.unsupported(f"a fragment of {count} registers was expected, not {len(elements)}")


@lowers("mma", op_class="mma")
def lower_mma(ctx: Lowering, instruction: Instruction) -> None:
    """A product of fragments, of 16 x 8 results."""
    modifiers = Modifiers(ctx, instruction)
    if modifiers.take("sp", "sp::ordered_metadata", "block_scale", "kind::mxf8f6f4", "kind::mxf4"):
        raise ctx.unsupported("sparse and block-scaled products are not emulated")
    if not (
        modifiers.has("sync") and modifiers.has("aligned") and modifiers.has("row") and modifiers.has("col")
    ):
        raise ctx.unsupported(".sync.aligned and .row.col are needed")
    small = modifiers.has("kind::f8f6f4")
    saturates = modifiers.has("satfinite")
    shape = modifiers.take(*_DEPTHS)
    if shape is None:
        raise ctx.unsupported("the shape is not known here")
    depth = _DEPTHS[shape]
    c_type, b_type, a_type, d_type = (modifiers.type() for _ in range(4))
    modifiers.done()
    _check(ctx, depth, (a_type, b_type), (d_type, c_type), small)
    accumulator = {"f32": _F32, "f16": _F16, "s32": _S32}[d_type]
    if saturates:
        if accumulator != _S32:
            raise ctx.unsupported(".satfinite belongs to integers")
        accumulator = _S32_SATURATING
    d, a, b, c = operands(ctx, instruction, 4)
    num_results = 2 if accumulator == _F16 else 4
    for operand, count in (
        (d, num_results),
        (a, 16 * depth * _bits(a_type) // 1024),
        (b, 8 * depth * _bits(b_type) // 1024),
        (c, num_results),
    ):
        _words(ctx, operand, count)
    word = "f32" if accumulator == _F32 else "b32"
    uses = [*ctx.dsts(d, word), *ctx.srcs(a, "b32"), *ctx.srcs(b, "b32"), *ctx.srcs(c, word)]
    if any(use.value.bits != 32 for use in uses):
        raise ctx.unsupported("fragments are registers of 32 bits")
    ctx.emit("mma", depth, _ELEMENTS[a_type], _ELEMENTS[b_type], accumulator, *uses)

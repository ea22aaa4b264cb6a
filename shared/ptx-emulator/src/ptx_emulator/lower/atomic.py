"""Atomic operations: `atom` with the old value as its result, `red` without."""

from __future__ import annotations

from ptx_emulator.lower.context import Lowering, Use, bits_of
from ptx_emulator.lower.memory import CACHE_HINT, take_order, take_space, without_policy
from ptx_emulator.lower.modifiers import Modifiers, operands
from ptx_emulator.lower.registry import lowers
from ptx_emulator.ptx.module import Instruction, Operand, Vector

_HALVES = ("f16", "bf16", "f16x2", "bf16x2")
_TYPES = {  # of each operation, for scalars
    "and": ("b32", "b64"),
    "or": ("b32", "b64"),
    "xor": ("b32", "b64"),
    "exch": ("b32", "b64", "b128"),
    "cas": ("b16", "b32", "b64", "b128"),
    "add": ("u32", "s32", "u64", "s64", "f32", "f64", *_HALVES),
    "inc": ("u32",),
    "dec": ("u32",),
    "min": ("u32", "s32", "u64", "s64"),
    "max": ("u32", "s32", "u64", "s64"),
}
_VECTOR_TYPES = {  # of each operation and number of elements
    ("add", 2): ("f32", *_HALVES),
    ("add", 4): ("f32", *_HALVES),
    ("add", 8): ("f16", "bf16"),
    ("min", 2): _HALVES,
    ("min", 4): _HALVES,
    ("min", 8): ("f16", "bf16"),
    ("max", 2): _HALVES,
    ("max", 4): _HALVES,
    ("max", 8): ("f16", "bf16"),
}
_SAME_BITS = {("add", "s32"): "u32", ("add", "s64"): "u64"}  # two's complement


def _elements(ctx: Lowering, operand: Operand, count: int) -> tuple[Operand, ...]:
    elements = operand.elements if isinstance(operand, Vector) else (operand,)
    if len(elements) != count or isinstance(operand, Vector) != (count > 1):
        raise ctx.unsupported(f"{count} registers were expected, not {len(elements)}")
    return elements


def _exact(ctx: Lowering, uses: list[Use], type_name: str) -> list[Use]:
    for use in uses:
        if use.value.bits != bits_of(type_name):
            raise ctx.unsupported(
                f"register {use.value.name} has {use.value.bits} bits, not those of .{type_name}"
            )
    return uses


@lowers("atom", "red", op_class="atomic")
def lower_atomic(ctx: Lowering, instruction: Instruction) -> None:
    has_result = instruction.opcode == "atom"
    modifiers = Modifiers(ctx, instruction)
    type_name = modifiers.type()
    orders = ("relaxed", "acquire", "release", "acq_rel") if has_result else ("relaxed", "release")
    semantics, scope = take_order(modifiers, "relaxed", orders)
    space, space_number = take_space(modifiers)
    if space not in (None, "global", "shared", "shared::cta", "shared::cluster"):
        raise ctx.unsupported(f"there are no atomics in .{space}")
    operation = modifiers.take(*_TYPES)
    if operation is None or (not has_result and operation in ("exch", "cas")):
        raise ctx.unsupported("the operation is missing or not one of this instruction")
    vector = modifiers.take("v2", "v4", "v8")
    count = int(vector[1:]) if vector else 1
    noftz = modifiers.has("noftz")
    hinted = modifiers.has(CACHE_HINT)
    modifiers.done()
    allowed = _VECTOR_TYPES.get((operation, count), ()) if vector else _TYPES[operation]
    if type_name not in allowed:
        raise ctx.unsupported(f".{operation} has no {'vector ' if vector else ''}type .{type_name}")
    if noftz != (type_name in _HALVES):
        raise ctx.unsupported(".noftz belongs to 16-bit floating point, and only there")
    if vector and space not in (None, "global"):
        raise ctx.unsupported("vectors are for global memory")
    num_operands = 1 + has_result + (2 if operation == "cas" else 1)
    found = without_policy(ctx, operands(ctx, instruction, num_operands + hinted), hinted)
    results = found[:1] if has_result else ()
    address, *sources = found[len(results) :]
    ctx.emit(
        f"atom.{operation}.{_SAME_BITS.get((operation, type_name), type_name)}",
        *ctx.address(address),
        space_number,
        semantics,
        scope,
        int(has_result),
        count,
        *_exact(ctx, [ctx.dst(e, type_name) for r in results for e in _elements(ctx, r, count)], type_name),
        *_exact(ctx, [ctx.src(e, type_name) for s in sources for e in _elements(ctx, s, count)], type_name),
    )

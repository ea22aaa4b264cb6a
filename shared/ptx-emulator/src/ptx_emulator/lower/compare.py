"""Lowering of comparison and selection: setp, set, selp, slct."""

from __future__ import annotations

from ptx_emulator.lower.context import Lowering, Use, bits_of
from ptx_emulator.lower.half import HALF_TYPES
from ptx_emulator.lower.modifiers import Modifiers, operands
from ptx_emulator.lower.registry import lowers
from ptx_emulator.ptx.module import Instruction, Operand, Pair, Register

# As Comparison in compare.cpp; the unordered forms are true where an operand is NaN.
_ORDERED = {"eq": 0, "ne": 1, "lt": 2, "le": 3, "gt": 4, "ge": 5}
_UNSIGNED = {"lo": 2, "ls": 3, "hi": 4, "hs": 5}
_UNORDERED = {"equ": 8, "neu": 9, "ltu": 10, "leu": 11, "gtu": 12, "geu": 13}
_NUMBER = {"num": 6, "nan": 7}
_COMBINE = {"and": 1, "or": 2, "xor": 3}

_FLOATS = ("f32", "f64", *HALF_TYPES)
_TRUE = {"u32": 0xFFFFFFFF, "s32": 0xFFFFFFFF, "u16": 0xFFFF, "s16": 0xFFFF, "f32": 0x3F800000}
_TRUE |= {"f16": 0x3C00, "bf16": 0x3F80, "f16x2": 0x3C00, "bf16x2": 0x3F80}


def _storage(type_name: str) -> str:
    if type_name in HALF_TYPES:
        return "b32" if type_name.endswith("x2") else "b16"
    return type_name


def _comparison(ctx: Lowering, modifiers: Modifiers, type_name: str) -> int:
    known = dict(_ORDERED)
    if type_name in _FLOATS:
        known |= _UNORDERED | _NUMBER
    elif type_name.startswith("u"):
        known |= _UNSIGNED
    elif type_name.startswith("b"):
        known = {name: _ORDERED[name] for name in ("eq", "ne")}
    name = modifiers.take(*known)
    if name is None:
        raise ctx.unsupported(f"no comparison that .{type_name} has")
    return known[name]


def _compared(ctx: Lowering, type_name: str) -> str:
    """The type under which the runtime compares."""
    if type_name in ("b16", "b32", "b64"):
        return f"u{bits_of(type_name)}"
    if type_name not in (*_FLOATS, "u16", "s16", "u32", "s32", "u64", "s64"):
        raise ctx.unsupported(f"type .{type_name} is not known here")
    return type_name


def _flush(modifiers: Modifiers, type_name: str) -> int:
    return int(type_name in ("f32", "f16", "f16x2") and modifiers.has("ftz"))


def _combine(ctx: Lowering, modifiers: Modifiers, rest: tuple[Operand, ...]) -> tuple[int, list[Use]]:
    """The number of `.and`, `.or`, `.xor`, and the predicate it takes."""
    combine = modifiers.take(*_COMBINE)
    if (combine is None) == bool(rest):
        raise ctx.unsupported("a third source is a predicate to combine with, by .and, .or or .xor")
    return (0, []) if combine is None else (_COMBINE[combine], [ctx.src(rest[0], "pred")])


@lowers("setp", op_class="compare")
def lower_setp(ctx: Lowering, instruction: Instruction) -> None:
    """Comparison into one or two predicates."""
    modifiers = Modifiers(ctx, instruction)
    type_name = modifiers.type()
    compared = _compared(ctx, type_name)
    how = _comparison(ctx, modifiers, type_name)
    flush = _flush(modifiers, type_name)
    destination, a, b, *rest = operands(ctx, instruction, 3, 4)
    combine, with_predicate = _combine(ctx, modifiers, tuple(rest))
    modifiers.done()
    values = [ctx.src(a, _storage(type_name)), ctx.src(b, _storage(type_name))]
    pair = isinstance(destination, Pair)
    first, second = (
        (destination.first, destination.second) if isinstance(destination, Pair) else (destination, None)
    )
    if type_name.endswith("x2") and not pair:
        raise ctx.unsupported("a comparison of pairs gives p|q")
    p = ctx.dst(first, "pred")
    if not pair and not combine:
        ctx.emit(f"setp.{compared}", p, *values, how, flush)
        return
    q = ctx.dst(second if second is not None else Register("_"), "pred")
    ctx.emit(f"setp.{compared}", p, *values, how, flush, q, combine, *with_predicate)


@lowers("set", op_class="compare")
def lower_set(ctx: Lowering, instruction: Instruction) -> None:
    """Comparison into a number: all ones or 1.0 where true."""
    modifiers = Modifiers(ctx, instruction)
    type_name, result = modifiers.type(), modifiers.type()
    compared = _compared(ctx, type_name)
    how = _comparison(ctx, modifiers, type_name)
    flush = _flush(modifiers, type_name)
    d, a, b, *rest = operands(ctx, instruction, 3, 4)
    combine, with_predicate = _combine(ctx, modifiers, tuple(rest))
    modifiers.done()
    packed = type_name.endswith("x2")
    if result not in _TRUE or (packed and result not in (type_name, "u32", "s32")):
        raise ctx.unsupported(f".{result} cannot be the result")
    truth = 0xFFFF if packed and result in ("u32", "s32") else _TRUE[result]
    values = [ctx.src(a, _storage(type_name)), ctx.src(b, _storage(type_name))]
    bits = bits_of(_storage(result))
    ctx.emit(
        f"set.{compared}",
        ctx.dst(d, _storage(result)),
        *values,
        how,
        flush,
        bits,
        truth,
        combine,
        *with_predicate,
    )


def _selected_bits(ctx: Lowering, type_name: str) -> int:
    bits = bits_of(type_name)
    if type_name == "pred" or bits not in (16, 32, 64):
        raise ctx.unsupported(f"type .{type_name} is not known here")
    return bits


@lowers("selp", op_class="compare")
def lower_selp(ctx: Lowering, instruction: Instruction) -> None:
    """One of two by a predicate."""
    modifiers = Modifiers(ctx, instruction)
    type_name = modifiers.type()
    modifiers.done()
    bits = _selected_bits(ctx, type_name)
    d, a, b, p = operands(ctx, instruction, 4)
    values = [ctx.src(a, type_name), ctx.src(b, type_name), ctx.src(p, "pred")]
    ctx.emit(f"selp.{bits}", ctx.dst(d, type_name), *values)


@lowers("slct", op_class="compare")
def lower_slct(ctx: Lowering, instruction: Instruction) -> None:
    """One of two by the sign of a third."""
    modifiers = Modifiers(ctx, instruction)
    selector, type_name = modifiers.type(), modifiers.type()
    flush = ".ftz" if selector == "f32" and modifiers.has("ftz") else ""
    modifiers.done()
    if selector not in ("s32", "f32"):
        raise ctx.unsupported("the selector is s32 or f32")
    bits = _selected_bits(ctx, type_name)
    d, a, b, c = operands(ctx, instruction, 4)
    values = [ctx.src(a, type_name), ctx.src(b, type_name), ctx.src(c, selector)]
    ctx.emit(f"slct{flush}.{bits}.{selector}", ctx.dst(d, type_name), *values)

"""Lowering of cvt and cvt.pack."""

from __future__ import annotations

from ptx_emulator.lower.context import Lowering, Use, bits_of
from ptx_emulator.lower.modifiers import ROUNDINGS, Modifiers, emit_lanewise, operands
from ptx_emulator.lower.registry import lowers
from ptx_emulator.ptx.module import Instruction, Operand

# As Type in convert.cpp. Bits without a type count as unsigned.
_TYPES = {"u8": 0, "s8": 1, "u16": 2, "s16": 3, "u32": 4, "s32": 5, "u64": 6, "s64": 7}
_TYPES |= {"f16": 8, "bf16": 9, "f32": 10, "f64": 11, "tf32": 12}
_INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
_FLOAT_BITS = {"f16": 16, "bf16": 16, "tf32": 32, "f32": 32, "f64": 64}
_NEAREST, _ZERO, _NEAREST_AWAY = 0, 1, 4  # as Rounding in numeric.h
_FTZ, _SAT, _SATFINITE, _RELU, _INTEGRAL = 1, 2, 4, 8, 16  # as Options in convert.cpp
_INTEGRAL_ROUNDINGS = {"rni": 0, "rzi": 1, "rmi": 2, "rpi": 3}
_SMALL_PAIRS = {"e4m3x2": "b16", "e5m2x2": "b16", "e2m1x2": "b8", "e2m3x2": "b16", "e3m2x2": "b16"}
_WIDENING = (("f64", "f32"), ("f32", "f16"), ("f32", "bf16"))  # have operations of their own
_NARROWING = (("f16", "f32"), ("bf16", "f32"))  # and these, to nearest even
_HALF_PAIRS = ("f16x2", "bf16x2")


@lowers("cvt", op_class="convert")
def lower_cvt(ctx: Lowering, instruction: Instruction) -> None:
    """Conversion of a number, or of two into a packed pair."""
    modifiers = Modifiers(ctx, instruction)
    source, result = modifiers.type(), modifiers.type()
    if "ue8m0x2" in (source, result):
        _lower_scales(ctx, instruction, modifiers, result, source)
    elif source in _SMALL_PAIRS or result in _SMALL_PAIRS:
        _lower_small_pair(ctx, instruction, modifiers, result, source)
    elif result in _HALF_PAIRS and source == "f32":
        _lower_half_pair(ctx, instruction, modifiers, result)
    elif result in _INTEGERS or source in _INTEGERS:
        _lower_with_integer(ctx, instruction, modifiers, result, source)
    elif result in _FLOAT_BITS and source in _FLOAT_BITS and source != "tf32":
        _lower_float(ctx, instruction, modifiers, result, source)
    else:
        raise ctx.unsupported(f"no conversion from .{source} to .{result}")


def _width(ctx: Lowering, type_name: str) -> int:
    if type_name in _FLOAT_BITS:
        return _FLOAT_BITS[type_name]
    if type_name in _INTEGERS:
        return bits_of(type_name)
    raise ctx.unsupported(f"type .{type_name} is not known here")


def _registers(ctx: Lowering, instruction: Instruction, result: str, source: str) -> tuple[Use, Use]:
    """Both registers, which may be wider than their types."""
    d, a = operands(ctx, instruction, 2)
    uses = []
    for operand, type_name in ((d, result), (a, source)):
        bits = _width(ctx, type_name)
        use = ctx.src(operand, f"b{bits}") if operand is a else ctx.dst(operand, f"b{bits}")
        if use.value.bits < bits:
            raise ctx.unsupported(f"{use.value.name} has {use.value.bits} bits, .{type_name} has {bits}")
        uses.append(use)
    return uses[0], uses[1]


def _emit_general(
    ctx: Lowering, name: str, uses: tuple[Use, Use], types: tuple[str, str], mode: int, options: int
) -> None:
    d, a = uses
    numbers = (d.value.bits, a.value.bits, _TYPES[types[0]], _TYPES[types[1]], mode, options)
    ctx.emit(name, d, a, *numbers)


def _holds_all(result: str, source: str) -> bool:
    """Whether an integer type has all values of another."""
    if result[0] == source[0]:
        return bits_of(result) >= bits_of(source)
    return result[0] == "s" and bits_of(result) > bits_of(source)


def _lower_with_integer(
    ctx: Lowering, instruction: Instruction, modifiers: Modifiers, result: str, source: str
) -> None:
    integral = modifiers.take(*_INTEGRAL_ROUNDINGS)
    rounding = modifiers.rounding()
    options = (_FTZ if modifiers.has("ftz") else 0) | (_SAT if modifiers.has("sat") else 0)
    modifiers.done()
    if "bf16" in (result, source) and 8 in (_width(ctx, result), _width(ctx, source)):
        raise ctx.unsupported("there are no conversions between bf16 and integers of 8 bits")
    uses = _registers(ctx, instruction, result, source)
    exact = uses[0].value.bits == _width(ctx, result) and uses[1].value.bits == _width(ctx, source)
    types = (result, source)
    if result not in _INTEGERS:
        if rounding is None or integral:
            raise ctx.unsupported("a rounding mode .rn, .rz, .rm or .rp is needed")
        if exact and not options and result in ("f32", "f64") and bits_of(source) > 8:
            ctx.emit(f"cvt.{result}.{source}", *uses, rounding)
        elif result == "f64" and bits_of(source) == 64:
            raise ctx.unsupported("f64 from 64 bits has no modifiers here")
        else:
            _emit_general(ctx, "cvt.from_integer", uses, types, rounding, options)
    elif source not in _INTEGERS:
        if integral is None or rounding is not None:
            raise ctx.unsupported("a rounding mode .rni, .rzi, .rmi or .rpi is needed")
        if exact and not options and source == "f32" and result in ("s32", "u32"):
            ctx.emit(f"cvt.{integral}.{result}.f32", *uses)
        else:
            # Results of floats always saturate, so .sat says nothing.
            _emit_general(ctx, "cvt.to_integer", uses, types, _INTEGRAL_ROUNDINGS[integral], options & _FTZ)
    else:
        if integral or rounding is not None or options & _FTZ:
            raise ctx.unsupported("integers are not rounded")
        if options & _SAT and _holds_all(result, source):
            raise ctx.unsupported(f".{result} holds every .{source}, there is no .sat")
        if exact and not options and bits_of(result) > 8 and bits_of(source) > 8:
            ctx.emit(f"cvt.b{bits_of(result)}.{source}", *uses)
        else:
            _emit_general(ctx, "cvt.integer", uses, types, _NEAREST, options)


def _lower_float(
    ctx: Lowering, instruction: Instruction, modifiers: Modifiers, result: str, source: str
) -> None:
    integral = modifiers.take(*_INTEGRAL_ROUNDINGS)
    away = modifiers.has("rna")
    rounding = modifiers.rounding()
    options = sum(
        option
        for name, option in (("ftz", _FTZ), ("sat", _SAT), ("satfinite", _SATFINITE), ("relu", _RELU))
        if modifiers.has(name)
    )
    modifiers.done()
    narrows = (result in ("f16", "bf16", "tf32") and result != source) or (result, source) == ("f32", "f64")
    if narrows != (rounding is not None or away) or (away and result != "tf32"):
        raise ctx.unsupported("a rounding mode is needed where precision is lost, and only there")
    if integral is not None and (result != source or options & ~(_FTZ | _SAT)):
        raise ctx.unsupported("rounding to an integral value keeps the type")
    if options & (_SATFINITE | _RELU) and (source != "f32" or result not in ("f16", "bf16", "tf32")):
        raise ctx.unsupported(".relu and .satfinite belong to f16, bf16 and tf32 from f32")
    uses = _registers(ctx, instruction, result, source)
    exact = uses[0].value.bits == _FLOAT_BITS[result] and uses[1].value.bits == _FLOAT_BITS[source]
    types = (result, source)
    if integral is not None:
        _emit_general(ctx, "cvt.float", uses, types, _INTEGRAL_ROUNDINGS[integral], options | _INTEGRAL)
    elif exact and not options and types == ("f32", "f64"):
        ctx.emit("cvt.f32.f64", *uses, rounding or 0)
    elif exact and not options and (types in _WIDENING or (rounding == _NEAREST and types in _NARROWING)):
        ctx.emit(f"cvt.{result}.{source}", *uses)
    else:
        _emit_general(ctx, "cvt.float", uses, types, _NEAREST_AWAY if away else rounding or 0, options)


def _lower_half_pair(ctx: Lowering, instruction: Instruction, modifiers: Modifiers, result: str) -> None:
    rounding = modifiers.rounding()
    options = (_RELU if modifiers.has("relu") else 0) | (_SATFINITE if modifiers.has("satfinite") else 0)
    modifiers.done()
    if rounding not in (_NEAREST, _ZERO):
        raise ctx.unsupported("only .rn and .rz are known here")
    d, a, b = operands(ctx, instruction, 3)
    sources = [(a, "f32"), (b, "f32")]
    if rounding == _NEAREST and not options:
        emit_lanewise(ctx, f"cvt.{result}.f32", (d, "b32"), sources)
    else:
        half = _TYPES[result.removesuffix("x2")]
        emit_lanewise(ctx, "cvt.pair", (d, "b32"), sources, half, rounding, options)


def _lower_small_pair(
    ctx: Lowering, instruction: Instruction, modifiers: Modifiers, result: str, source: str
) -> None:
    """To pairs of 4, 6 and 8-bit floats from two f32 or an f16x2, and back to f16x2."""
    narrows = result in _SMALL_PAIRS
    relu = "relu." if modifiers.has("relu") else ""
    if modifiers.rounding() != _NEAREST or (narrows and not modifiers.has("satfinite")):
        raise ctx.unsupported("only .rn is known here, with .satfinite towards the smaller format")
    modifiers.done()
    name = f"cvt.{relu}{result}.{source}"
    if narrows and source == "f32":
        d, a, b = operands(ctx, instruction, 3)
        emit_lanewise(ctx, name, (d, _SMALL_PAIRS[result]), [(a, "f32"), (b, "f32")])
    elif narrows and source == "f16x2":
        d, a = operands(ctx, instruction, 2)
        emit_lanewise(ctx, name, (d, _SMALL_PAIRS[result]), [(a, "b32")])
    elif result == "f16x2":
        d, a = operands(ctx, instruction, 2)
        emit_lanewise(ctx, name, (d, "b32"), [(a, _SMALL_PAIRS[source])])
    else:
        raise ctx.unsupported(f"no conversion from .{source} to .{result}")


def _lower_scales(
    ctx: Lowering, instruction: Instruction, modifiers: Modifiers, result: str, source: str
) -> None:
    """Pairs of 8-bit exponents."""
    rounding = modifiers.take(*ROUNDINGS)
    satfinite = ".satfinite" if result == "ue8m0x2" and modifiers.has("satfinite") else ""
    modifiers.done()
    d: Operand
    if result == "ue8m0x2" and source in ("f32", "bf16x2") and rounding in ("rz", "rp"):
        d, *values = operands(ctx, instruction, 3 if source == "f32" else 2)
        stored = "f32" if source == "f32" else "b32"
        name = f"cvt.{rounding}{satfinite}.ue8m0x2.{source}"
        emit_lanewise(ctx, name, (d, "b16"), [(value, stored) for value in values])
    elif (result, source, rounding) == ("bf16x2", "ue8m0x2", "rn"):
        d, a = operands(ctx, instruction, 2)
        emit_lanewise(ctx, "cvt.bf16x2.ue8m0x2", (d, "b32"), [(a, "b16")])
    else:
        raise ctx.unsupported(f"no such conversion from .{source} to .{result}")


@lowers("cvt.pack", op_class="convert")
def lower_pack(ctx: Lowering, instruction: Instruction) -> None:
    """Two saturated s32 side by side; below 16 bits, above the low bits of a third operand."""
    modifiers = Modifiers(ctx, instruction)
    modifiers.has("pack")
    if not modifiers.has("sat"):
        raise ctx.unsupported(".sat is missing")
    last = modifiers.type()
    extended = last == "b32"
    source = modifiers.type() if extended else last
    result = modifiers.take("u2", "s2", "u4", "s4", "u8", "s8", "u16", "s16")
    modifiers.done()
    if result is None or source != "s32" or extended == result.endswith("16"):
        raise ctx.unsupported("not a form of cvt.pack")
    bits = bits_of(result)
    d, a, b, *rest = operands(ctx, instruction, 4 if extended else 3)
    sources = [ctx.src(a, "s32"), ctx.src(b, "s32")]
    shift = 2 * bits if extended else 0
    added = [ctx.src(value, "b32") for value in rest]
    ctx.emit("cvt.pack", ctx.dst(d, "b32"), *sources, bits, int(result.startswith("s")), shift, *added)

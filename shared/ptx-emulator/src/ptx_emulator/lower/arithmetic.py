"""Lowering of arithmetic whose opcode exists for many types; half.py and integer.py do theirs."""

from __future__ import annotations

from ptx_emulator.lower.context import Lowering
from ptx_emulator.lower.half import (
    HALF_TYPES,
    extreme_suffix,
    lower_half_extreme,
    lower_half_function,
    lower_half_sign,
    lower_half_sum,
)
from ptx_emulator.lower.integer import (
    lower_integer_difference,
    lower_integer_division,
    lower_integer_extreme,
    lower_integer_product,
    lower_integer_sign,
)
from ptx_emulator.lower.modifiers import Modifiers, emit_lanewise, operands
from ptx_emulator.lower.registry import lowers
from ptx_emulator.ptx.module import Instruction, Operand

_TESTP = ("finite", "infinite", "number", "notanumber", "normal", "subnormal")  # as Property in float.cpp


def _storage(type_name: str) -> str:
    return "b64" if type_name == "f32x2" else type_name


def _emit_float(ctx: Lowering, name: str, type_name: str, values: tuple[Operand, ...], *numbers: int) -> None:
    storage = _storage(type_name)
    emit_lanewise(
        ctx, f"{name}.{type_name}", (values[0], storage), [(v, storage) for v in values[1:]], *numbers
    )


def _flush_and_saturate(ctx: Lowering, modifiers: Modifiers, type_name: str) -> str:
    suffix = ".ftz" if modifiers.has("ftz") else ""
    suffix += ".sat" if modifiers.has("sat") else ""
    if suffix and (type_name == "f64" or (type_name == "f32x2" and suffix != ".ftz")):
        raise ctx.unsupported(f"{type_name} has no {suffix}")
    return suffix


def _lower_float_sum(ctx: Lowering, instruction: Instruction, modifiers: Modifiers, type_name: str) -> None:
    rounding = modifiers.rounding()
    fused = instruction.opcode in ("fma", "mad")
    if fused and rounding is None:
        raise ctx.unsupported("a rounding mode is missing")
    suffix = _flush_and_saturate(ctx, modifiers, type_name)
    modifiers.done()
    name = "fma" if fused else instruction.opcode
    values = operands(ctx, instruction, 4 if fused else 3)
    _emit_float(ctx, name + suffix, type_name, values, rounding or 0)


def _lower_mixed_sum(ctx: Lowering, instruction: Instruction, modifiers: Modifiers, type_name: str) -> None:
    """`add.f32.f16 d, a, c`: a, and b of an fma, are f16 or bf16; the rest is f32."""
    rounding = modifiers.rounding()
    suffix = ".sat" if modifiers.has("sat") else ""
    modifiers.done()
    fused = instruction.opcode == "fma"
    if (fused and rounding is None) or instruction.opcode == "mul":
        raise ctx.unsupported("not a form of mixed precision")
    d, *sources = operands(ctx, instruction, 4 if fused else 3)
    uses = []
    for source in sources[:-1]:
        wide = ctx.temporary(32)
        ctx.emit(f"widen.{type_name}", ctx.written(wide), ctx.src(source, "b16"))
        uses.append(ctx.read(wide))
    uses.append(ctx.src(sources[-1], "f32"))
    ctx.emit(f"{instruction.opcode}{suffix}.f32", ctx.dst(d, "f32"), *uses, rounding or 0)


@lowers("fma", op_class="float")
@lowers("add", "sub", "mul", "mad", op_class="integer", float_class="float")
def lower_sum(ctx: Lowering, instruction: Instruction) -> None:
    """Sums and products of all types."""
    modifiers = Modifiers(ctx, instruction)
    type_name = modifiers.type()
    if type_name in HALF_TYPES and instruction.opcode != "mad":
        if modifiers.has("f32"):
            _lower_mixed_sum(ctx, instruction, modifiers, type_name)
        else:
            lower_half_sum(ctx, instruction, modifiers, type_name)
    elif type_name in ("f32", "f64") or (type_name == "f32x2" and instruction.opcode != "mad"):
        _lower_float_sum(ctx, instruction, modifiers, type_name)
    elif instruction.opcode in ("add", "sub"):
        lower_integer_difference(ctx, instruction, modifiers, type_name)
    elif instruction.opcode in ("mul", "mad"):
        lower_integer_product(ctx, instruction, modifiers, type_name)
    else:
        raise ctx.unsupported(f"type .{type_name} is not known here")


@lowers("min", "max", op_class="integer", float_class="float")
def lower_extreme(ctx: Lowering, instruction: Instruction) -> None:
    """Minimum and maximum of all types; of f32 also of three values."""
    modifiers = Modifiers(ctx, instruction)
    type_name = modifiers.type()
    if type_name in HALF_TYPES:
        lower_half_extreme(ctx, instruction, modifiers, type_name)
    elif type_name == "f32":
        suffix = ".ftz" if modifiers.has("ftz") else ""
        suffix += extreme_suffix(ctx, modifiers)
        modifiers.done()
        values = operands(ctx, instruction, 3, 4)
        three = "3" if len(values) == 4 else ""
        _emit_float(ctx, instruction.opcode + three + suffix, type_name, values)
    elif type_name == "f64":
        modifiers.done()
        _emit_float(ctx, instruction.opcode, type_name, operands(ctx, instruction, 3))
    else:
        lower_integer_extreme(ctx, instruction, modifiers, type_name)


@lowers("neg", "abs", op_class="integer", float_class="float")
def lower_sign(ctx: Lowering, instruction: Instruction) -> None:
    """Negation and absolute value of all types."""
    modifiers = Modifiers(ctx, instruction)
    type_name = modifiers.type()
    if type_name in HALF_TYPES:
        lower_half_sign(ctx, instruction, modifiers, type_name)
    elif type_name in ("f32", "f64"):
        suffix = ".ftz" if type_name == "f32" and modifiers.has("ftz") else ""
        modifiers.done()
        _emit_float(ctx, instruction.opcode + suffix, type_name, operands(ctx, instruction, 2))
    else:
        lower_integer_sign(ctx, instruction, modifiers, type_name)


@lowers("div", op_class="integer", float_class="special")
def lower_div(ctx: Lowering, instruction: Instruction) -> None:
    """Division. `.full` is divided exactly, `.approx` only where the ISA says otherwise."""
    modifiers = Modifiers(ctx, instruction)
    type_name = modifiers.type()
    if type_name not in ("f32", "f64"):
        lower_integer_division(ctx, instruction, modifiers, type_name)
        return
    rounding = modifiers.rounding()
    approximate = modifiers.take("approx", "full") if type_name == "f32" else None
    if (rounding is None) == (approximate is None):
        raise ctx.unsupported("a rounding mode, .approx or .full is needed")
    suffix = ".ftz" if type_name == "f32" and modifiers.has("ftz") else ""
    modifiers.done()
    values = operands(ctx, instruction, 3)
    if approximate == "approx":
        _emit_float(ctx, f"div.approx{suffix}", type_name, values)
    else:
        _emit_float(ctx, f"div{suffix}", type_name, values, rounding or 0)


@lowers("rcp", "sqrt", op_class="special")
def lower_rounded_function(ctx: Lowering, instruction: Instruction) -> None:
    """Reciprocal and square root; `.approx` is computed as `.rn`."""
    modifiers = Modifiers(ctx, instruction)
    type_name = modifiers.type()
    rounding = modifiers.rounding()
    approximate = modifiers.has("approx")
    flush = modifiers.has("ftz")
    modifiers.done()
    values = operands(ctx, instruction, 2)
    if type_name not in ("f32", "f64") or (rounding is None) != approximate:
        raise ctx.unsupported("f32 or f64 with a rounding mode or .approx is needed")
    if type_name == "f64" and (approximate or flush):
        if instruction.opcode != "rcp" or not (approximate and flush):
            raise ctx.unsupported("of f64 only rcp.approx.ftz is approximate")
        _emit_float(ctx, "rcp.approx", type_name, values)
    else:
        _emit_float(ctx, instruction.opcode + (".ftz" if flush else ""), type_name, values, rounding or 0)


@lowers("rsqrt", "ex2", "lg2", "sin", "cos", "tanh", op_class="special")
def lower_function(ctx: Lowering, instruction: Instruction) -> None:
    """The functions that exist as `.approx` only."""
    modifiers = Modifiers(ctx, instruction)
    type_name = modifiers.type()
    opcode = instruction.opcode
    if opcode in ("ex2", "tanh") and type_name in HALF_TYPES:
        lower_half_function(ctx, instruction, modifiers, type_name)
        return
    approximate = modifiers.has("approx")
    flush = modifiers.has("ftz")
    modifiers.done()
    values = operands(ctx, instruction, 2)
    if not approximate:
        raise ctx.unsupported(".approx is missing")
    if opcode == "rsqrt" and type_name == "f64":
        _emit_float(ctx, "rsqrt.approx" if flush else "rsqrt", type_name, values)
    elif type_name == "f32" and not (opcode == "tanh" and flush):
        _emit_float(ctx, opcode + (".ftz" if flush else ""), type_name, values)
    else:
        raise ctx.unsupported(f"type .{type_name} is not known here")


@lowers("copysign", op_class="float")
def lower_copysign(ctx: Lowering, instruction: Instruction) -> None:
    """The sign of a with the magnitude of b."""
    modifiers = Modifiers(ctx, instruction)
    type_name = modifiers.type()
    modifiers.done()
    if type_name not in ("f32", "f64"):
        raise ctx.unsupported(f"type .{type_name} is not known here")
    _emit_float(ctx, "copysign", type_name, operands(ctx, instruction, 3))


@lowers("testp", op_class="compare")
def lower_testp(ctx: Lowering, instruction: Instruction) -> None:
    """What kind of number it is."""
    modifiers = Modifiers(ctx, instruction)
    type_name = modifiers.type()
    kind = modifiers.take(*_TESTP)
    modifiers.done()
    if kind is None or type_name not in ("f32", "f64"):
        raise ctx.unsupported("not a test of f32 or f64")
    p, a = operands(ctx, instruction, 2)
    ctx.emit(f"testp.{type_name}", ctx.dst(p, "pred"), ctx.src(a, type_name), _TESTP.index(kind))

"""Lowering of integer arithmetic, logic and bit fields."""

from __future__ import annotations

from collections.abc import Sequence

from ptx_emulator.lower.context import Lowering, Use, Value, bits_of
from ptx_emulator.lower.modifiers import Modifiers, emit_lanewise, operands
from ptx_emulator.lower.registry import lowers
from ptx_emulator.ptx.module import Immediate, Instruction, Operand, Pair

INTEGER_TYPES = ("u16", "u32", "u64", "s16", "s32", "s64")
_WORDS = ("u32", "u64", "s32", "s64")
_WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
_CARRY = Value("$cc", 1)  # the flag CC.CF
_READS, _WRITES, _SUBTRACTS = 1, 2, 4  # as Carry in integer.cpp


def _require(ctx: Lowering, type_name: str, allowed: Sequence[str]) -> None:
    if type_name not in allowed:
        raise ctx.unsupported(f"type .{type_name} is not known here")


def _unsigned(type_name: str) -> str:
    return f"u{bits_of(type_name)}"


def _emit_carry(
    ctx: Lowering, destination: Operand, sources: Sequence[Use], type_name: str, mode: int
) -> None:
    flag = Use(_CARRY, reads=bool(mode & _READS), writes=bool(mode & _WRITES))
    ctx.emit(f"carry.{_unsigned(type_name)}", ctx.dst(destination, type_name), *sources, flag, mode)


def lower_integer_difference(
    ctx: Lowering, instruction: Instruction, modifiers: Modifiers, type_name: str
) -> None:
    """`add`, `sub`, with `.cc` and `.sat`."""
    d, a, b = operands(ctx, instruction, 3)
    opcode = instruction.opcode
    if type_name in ("u16x2", "s16x2") and opcode == "add":
        modifiers.done()
        emit_lanewise(ctx, f"add.{type_name}", (d, "b32"), [(a, "b32"), (b, "b32")])
        return
    _require(ctx, type_name, INTEGER_TYPES)
    if modifiers.has("cc"):
        modifiers.done()
        _require(ctx, type_name, _WORDS)
        mode = _WRITES | (_SUBTRACTS if opcode == "sub" else 0)
        _emit_carry(ctx, d, [ctx.src(a, type_name), ctx.src(b, type_name)], type_name, mode)
        return
    saturate = modifiers.has("sat")
    modifiers.done()
    if saturate:
        _require(ctx, type_name, ("s32",))
    name = f"{opcode}.sat.s32" if saturate else f"{opcode}.{_unsigned(type_name)}"
    emit_lanewise(ctx, name, (d, type_name), [(a, type_name), (b, type_name)])


@lowers("addc", "subc", op_class="integer")
def lower_carry(ctx: Lowering, instruction: Instruction) -> None:
    """Sums that take the carry of the sum before."""
    modifiers = Modifiers(ctx, instruction)
    type_name = modifiers.type()
    mode = _READS | (_WRITES if modifiers.has("cc") else 0)
    mode |= _SUBTRACTS if instruction.opcode == "subc" else 0
    modifiers.done()
    _require(ctx, type_name, _WORDS)
    d, a, b = operands(ctx, instruction, 3)
    _emit_carry(ctx, d, [ctx.src(a, type_name), ctx.src(b, type_name)], type_name, mode)


def lower_integer_product(
    ctx: Lowering, instruction: Instruction, modifiers: Modifiers, type_name: str
) -> None:
    """`mul`, `mad`."""
    _require(ctx, type_name, INTEGER_TYPES)
    part = modifiers.take("lo", "hi", "wide")
    if part is None:
        raise ctx.unsupported(".lo, .hi or .wide is missing")
    added = instruction.opcode == "mad"
    d, *sources = operands(ctx, instruction, 4 if added else 3)
    if added and modifiers.has("cc"):
        modifiers.done()
        _lower_mad_carry(ctx, part, type_name, d, sources, _WRITES)
        return
    if added and modifiers.has("sat"):
        modifiers.done()
        if (part, type_name) != ("hi", "s32"):
            raise ctx.unsupported(".sat belongs to mad.hi.s32")
        emit_lanewise(ctx, "mad.hi.sat.s32", (d, "s32"), [(source, "s32") for source in sources])
        return
    modifiers.done()
    if part == "wide":
        _require(ctx, type_name, ("u16", "s16", "u32", "s32"))
    result = _WIDER[type_name] if part == "wide" else type_name
    typed = [(source, type_name) for source in sources[:2]] + [(source, result) for source in sources[2:]]
    runtime_type = _unsigned(type_name) if part == "lo" else type_name
    emit_lanewise(ctx, f"{instruction.opcode}.{part}.{runtime_type}", (d, result), typed)


def _lower_mad_carry(
    ctx: Lowering, part: str, type_name: str, d: Operand, sources: Sequence[Operand], mode: int
) -> None:
    _require(ctx, type_name, _WORDS)
    if part == "wide":
        raise ctx.unsupported(".wide has no carry")
    product = ctx.temporary(bits_of(type_name))
    runtime_type = _unsigned(type_name) if part == "lo" else type_name
    a, b, c = (ctx.src(source, type_name) for source in sources)
    ctx.emit(f"mul.{part}.{runtime_type}", ctx.written(product), a, b)
    _emit_carry(ctx, d, [ctx.read(product), c], type_name, mode)


@lowers("madc", op_class="integer")
def lower_madc(ctx: Lowering, instruction: Instruction) -> None:
    """Multiply and add with the carry of the sum before."""
    modifiers = Modifiers(ctx, instruction)
    type_name = modifiers.type()
    part = modifiers.take("lo", "hi")
    mode = _READS | (_WRITES if modifiers.has("cc") else 0)
    modifiers.done()
    if part is None:
        raise ctx.unsupported(".lo or .hi is missing")
    d, *sources = operands(ctx, instruction, 4)
    _lower_mad_carry(ctx, part, type_name, d, sources, mode)


@lowers("mul24", "mad24", op_class="integer")
def lower_24_bits(ctx: Lowering, instruction: Instruction) -> None:
    """Products of 24-bit numbers."""
    modifiers = Modifiers(ctx, instruction)
    type_name = modifiers.type()
    _require(ctx, type_name, ("u32", "s32"))
    part = modifiers.take("lo", "hi")
    saturate = ".sat" if instruction.opcode == "mad24" and modifiers.has("sat") else ""
    modifiers.done()
    if part is None or (saturate and (part, type_name) != ("hi", "s32")):
        raise ctx.unsupported(".lo or .hi is needed; .sat belongs to mad24.hi.s32")
    d, *sources = operands(ctx, instruction, 4 if instruction.opcode == "mad24" else 3)
    name = f"{instruction.opcode}.{part}{saturate}.{type_name}"
    emit_lanewise(ctx, name, (d, type_name), [(source, type_name) for source in sources])


def _lower_same_type(
    ctx: Lowering, instruction: Instruction, name: str, type_name: str, num_sources: int
) -> None:
    """All operands have the instruction's type."""
    d, *sources = operands(ctx, instruction, 1 + num_sources)
    emit_lanewise(ctx, name, (d, type_name), [(source, type_name) for source in sources])


def lower_integer_division(
    ctx: Lowering, instruction: Instruction, modifiers: Modifiers, type_name: str
) -> None:
    """`div`, `rem`."""
    modifiers.done()
    _require(ctx, type_name, INTEGER_TYPES)
    _lower_same_type(ctx, instruction, f"{instruction.opcode}.{type_name}", type_name, 2)


@lowers("rem", op_class="integer")
def lower_rem(ctx: Lowering, instruction: Instruction) -> None:
    """The remainder, with the sign of the dividend."""
    modifiers = Modifiers(ctx, instruction)
    lower_integer_division(ctx, instruction, modifiers, modifiers.type())


def lower_integer_extreme(
    ctx: Lowering, instruction: Instruction, modifiers: Modifiers, type_name: str
) -> None:
    """`min`, `max`."""
    relu = ".relu" if type_name in ("s32", "s16x2") and modifiers.has("relu") else ""
    modifiers.done()
    _require(ctx, type_name, (*INTEGER_TYPES, "u16x2", "s16x2"))
    name = f"{instruction.opcode}{relu}.{type_name}"
    _lower_same_type(ctx, instruction, name, "b32" if type_name.endswith("x2") else type_name, 2)


def lower_integer_sign(ctx: Lowering, instruction: Instruction, modifiers: Modifiers, type_name: str) -> None:
    """`neg`, `abs`."""
    modifiers.done()
    _require(ctx, type_name, ("s16", "s32", "s64"))
    _lower_same_type(ctx, instruction, f"{instruction.opcode}.{type_name}", type_name, 1)


@lowers("sad", op_class="integer")
def lower_sad(ctx: Lowering, instruction: Instruction) -> None:
    """c plus the distance of a and b."""
    modifiers = Modifiers(ctx, instruction)
    type_name = modifiers.type()
    modifiers.done()
    _require(ctx, type_name, INTEGER_TYPES)
    _lower_same_type(ctx, instruction, f"sad.{type_name}", type_name, 3)


@lowers("and", "or", "xor", op_class="integer")
def lower_logic(ctx: Lowering, instruction: Instruction) -> None:
    """Bit by bit, of words and of predicates."""
    modifiers = Modifiers(ctx, instruction)
    type_name = modifiers.type()
    modifiers.done()
    _require(ctx, type_name, ("pred", "b16", "b32", "b64"))
    if type_name == "pred":
        d, a, b = operands(ctx, instruction, 3)
        ctx.emit(f"pred.{instruction.opcode}", ctx.dst(d, "pred"), ctx.src(a, "pred"), ctx.src(b, "pred"))
        return
    _lower_same_type(ctx, instruction, f"{instruction.opcode}.{_unsigned(type_name)}", type_name, 2)


@lowers("not", "cnot", op_class="integer")
def lower_not(ctx: Lowering, instruction: Instruction) -> None:
    """The complement; `cnot` is 1 for 0, else 0."""
    modifiers = Modifiers(ctx, instruction)
    type_name = modifiers.type()
    modifiers.done()
    if type_name == "pred" and instruction.opcode == "not":
        d, a = operands(ctx, instruction, 2)
        ctx.emit("pred.not", ctx.dst(d, "pred"), ctx.src(a, "pred"))
        return
    _require(ctx, type_name, ("b16", "b32", "b64"))
    _lower_same_type(ctx, instruction, f"{instruction.opcode}.{_unsigned(type_name)}", type_name, 1)


@lowers("shl", "shr", op_class="integer")
def lower_shift(ctx: Lowering, instruction: Instruction) -> None:
    """Shifts; the count is a u32 and may exceed the width."""
    modifiers = Modifiers(ctx, instruction)
    type_name = modifiers.type()
    modifiers.done()
    _require(ctx, type_name, ("b16", "b32", "b64", *(INTEGER_TYPES if instruction.opcode == "shr" else ())))
    d, a, count = operands(ctx, instruction, 3)
    runtime_type = type_name if type_name.startswith("s") else _unsigned(type_name)
    name = f"{instruction.opcode}.{runtime_type}"
    emit_lanewise(ctx, name, (d, type_name), [(a, type_name), (count, "u32")])


@lowers("shf", op_class="integer")
def lower_funnel(ctx: Lowering, instruction: Instruction) -> None:
    """Shift of two words."""
    modifiers = Modifiers(ctx, instruction)
    type_name = modifiers.type()
    direction, mode = modifiers.take("l", "r"), modifiers.take("clamp", "wrap")
    modifiers.done()
    _require(ctx, type_name, ("b32",))
    if direction is None or mode is None:
        raise ctx.unsupported("a direction and .clamp or .wrap are needed")
    _lower_same_type(ctx, instruction, f"shf.{direction}.{mode}", "b32", 3)


@lowers("lop3", op_class="integer")
def lower_lop3(ctx: Lowering, instruction: Instruction) -> None:
    """Any function of three bits; with `.and` or `.or` also a predicate: d is not 0, combined with q."""
    modifiers = Modifiers(ctx, instruction)
    type_name = modifiers.type()
    combine = modifiers.take("and", "or")
    modifiers.done()
    _require(ctx, type_name, ("b32",))
    d, *rest = operands(ctx, instruction, 5 if combine is None else 6)
    table = rest[3]
    if not isinstance(table, Immediate) or not isinstance(table.value, int):
        raise ctx.unsupported("the truth table must be a literal")
    sources = [ctx.src(source, "b32") for source in rest[:3]]
    if combine is None:
        ctx.emit("lop3", ctx.dst(d, "b32"), *sources, table.value & 0xFF)
        return
    if not isinstance(d, Pair):
        raise ctx.unsupported("d|p was expected")
    result = ctx.temporary(32)
    q = ctx.src(rest[4], "pred")
    ctx.emit("lop3", ctx.written(result), *sources, table.value & 0xFF)
    ctx.emit("lop3.predicate", ctx.dst(d.second, "pred"), ctx.read(result), q, int(combine == "and"))
    if d.first.name != "_":
        ctx.emit("mov.32", ctx.dst(d.first, "b32"), ctx.read(result))


@lowers("popc", "clz", "brev", op_class="integer")
def lower_bit_count(ctx: Lowering, instruction: Instruction) -> None:
    """Population count, leading zeros, reversal; counts are u32."""
    modifiers = Modifiers(ctx, instruction)
    type_name = modifiers.type()
    modifiers.done()
    _require(ctx, type_name, ("b32", "b64"))
    d, a = operands(ctx, instruction, 2)
    result = type_name if instruction.opcode == "brev" else "u32"
    emit_lanewise(ctx, f"{instruction.opcode}.{_unsigned(type_name)}", (d, result), [(a, type_name)])


@lowers("bfind", op_class="integer")
def lower_bfind(ctx: Lowering, instruction: Instruction) -> None:
    """The highest bit that is not the sign's."""
    modifiers = Modifiers(ctx, instruction)
    type_name = modifiers.type()
    shift = ".shiftamt" if modifiers.has("shiftamt") else ""
    modifiers.done()
    _require(ctx, type_name, _WORDS)
    d, a = operands(ctx, instruction, 2)
    emit_lanewise(ctx, f"bfind{shift}.{type_name}", (d, "u32"), [(a, type_name)])


@lowers("bfe", op_class="integer")
def lower_bfe(ctx: Lowering, instruction: Instruction) -> None:
    """Extracts a bit field."""
    modifiers = Modifiers(ctx, instruction)
    type_name = modifiers.type()
    modifiers.done()
    _require(ctx, type_name, _WORDS)
    d, a, position, length = operands(ctx, instruction, 4)
    sources = [(a, type_name), (position, "u32"), (length, "u32")]
    emit_lanewise(ctx, f"bfe.{type_name}", (d, type_name), sources)


@lowers("bfi", op_class="integer")
def lower_bfi(ctx: Lowering, instruction: Instruction) -> None:
    """Inserts a bit field of a into b."""
    modifiers = Modifiers(ctx, instruction)
    type_name = modifiers.type()
    modifiers.done()
    _require(ctx, type_name, ("b32", "b64"))
    d, a, b, position, length = operands(ctx, instruction, 5)
    sources = [(a, type_name), (b, type_name), (position, "u32"), (length, "u32")]
    emit_lanewise(ctx, f"bfi.{_unsigned(type_name)}", (d, type_name), sources)


@lowers("bmsk", "szext", op_class="integer")
def lower_mask(ctx: Lowering, instruction: Instruction) -> None:
    """`bmsk` makes a mask of ones, `szext` extends a number of some bits."""
    modifiers = Modifiers(ctx, instruction)
    type_name = modifiers.type()
    mode = modifiers.take("clamp", "wrap")
    modifiers.done()
    if mode is None:
        raise ctx.unsupported(".clamp or .wrap is missing")
    if instruction.opcode == "bmsk":
        _require(ctx, type_name, ("b32",))
        _lower_same_type(ctx, instruction, f"bmsk.{mode}", "b32", 2)
        return
    _require(ctx, type_name, ("u32", "s32"))
    _lower_same_type(ctx, instruction, f"szext.{mode}.{type_name}", type_name, 2)


@lowers("fns", op_class="integer")
def lower_fns(ctx: Lowering, instruction: Instruction) -> None:
    """The n-th set bit."""
    modifiers = Modifiers(ctx, instruction)
    type_name = modifiers.type()
    modifiers.done()
    _require(ctx, type_name, ("b32",))
    _lower_same_type(ctx, instruction, "fns", "b32", 3)


@lowers("dp4a", "dp2a", op_class="integer")
def lower_dot(ctx: Lowering, instruction: Instruction) -> None:
    """Dot products of bytes, of halves and bytes."""
    modifiers = Modifiers(ctx, instruction)
    b_type, a_type = modifiers.type(), modifiers.type()
    half = modifiers.take("lo", "hi") if instruction.opcode == "dp2a" else ""
    modifiers.done()
    _require(ctx, a_type, ("u32", "s32"))
    _require(ctx, b_type, ("u32", "s32"))
    if half is None:
        raise ctx.unsupported(".lo or .hi is missing")
    name = ".".join(part for part in (instruction.opcode, half, a_type, b_type) if part)
    _lower_same_type(ctx, instruction, name, "b32", 3)


@lowers("prmt", op_class="integer")
def lower_prmt(ctx: Lowering, instruction: Instruction) -> None:
    """Any four bytes of two words."""
    modifiers = Modifiers(ctx, instruction)
    mode = modifiers.take("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")
    type_name = modifiers.type()
    modifiers.done()
    _require(ctx, type_name, ("b32",))
    _lower_same_type(ctx, instruction, "prmt" if mode is None else f"prmt.{mode}", "b32", 3)

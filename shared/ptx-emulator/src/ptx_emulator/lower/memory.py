"""Loads and stores, conversions of addresses, and hints about what will be accessed."""

from __future__ import annotations

from ptx_emulator.lower.context import Lowering, Use, bits_of
from ptx_emulator.lower.modifiers import Modifiers, operands
from ptx_emulator.lower.registry import lowers
from ptx_emulator.ptx.module import Address, Immediate, Instruction, Operand, Register, Symbol, Vector

SPACES = {  # as Space in memory.h; without a space an address is generic
    "global": 1,
    "shared": 2,
    "shared::cta": 2,
    "shared::cluster": 3,
    "local": 4,
    "param": 5,
    "param::entry": 5,
    "const": 6,
}
GENERIC = 0
SCOPES = {"cta": 0, "cluster": 1, "gpu": 2, "sys": 3}  # as Scope in checker.h
SEMANTICS = {"weak": 0, "relaxed": 1, "acquire": 2, "release": 3, "acq_rel": 4}  # as Strength in strong.h
TYPES = (*(f"{kind}{bits}" for kind in "bus" for bits in (8, 16, 32, 64)), "b128", "f32", "f64")

# What follows says how caches are to be used, and changes no result.
_LOAD_CACHING = ("ca", "cg", "cs", "lu", "cv", "nc")
_STORE_CACHING = ("wb", "cg", "cs", "wt")
_EVICTIONS = ("evict_first", "evict_last", "evict_normal", "evict_unchanged", "no_allocate")
_PRIORITIES = tuple(f"{level}::{eviction}" for level in ("L1", "L2") for eviction in _EVICTIONS)
PREFETCH_SIZES = ("L2::64B", "L2::128B", "L2::256B")
CACHE_HINT = "L2::cache_hint"

_SHARED_WINDOW, _LOCAL_WINDOW = 0x5348, 0x4C4F  # as kSharedWindow and kLocalWindow in memory.h, upper 16 bits
_VECTOR_BYTES, _WIDE_VECTOR_BYTES = 16, 32  # most of one access; the latter from sm_100, global memory only
_POLICIES = {  # opaque to the program
    "L2::evict_first": 0x12F0000000000000,
    "L2::evict_last": 0x14F0000000000000,
    "L2::evict_normal": 0x1000000000000000,
    "L2::evict_unchanged": 0x16F0000000000000,
}


def take_space(modifiers: Modifiers) -> tuple[str | None, int]:
    """The space a memory instruction names, and its number."""
    space = modifiers.take(*SPACES)
    return space, GENERIC if space is None else SPACES[space]


def take_order(modifiers: Modifiers, default: str, allowed: tuple[str, ...]) -> tuple[int, int]:
    """How an access orders others, and its scope: two arguments of the operation."""
    modifiers.has("mmio")
    name = modifiers.take(*allowed) or default
    scope = modifiers.take(*SCOPES) or ("sys" if name == "volatile" else "gpu")
    return SEMANTICS["relaxed" if name == "volatile" else name], SCOPES[scope]


def without_policy(ctx: Lowering, found: tuple[Operand, ...], hinted: bool) -> tuple[Operand, ...]:
    """The operands less the cache policy that ends them when `.L2::cache_hint` is given."""
    if not hinted:
        return found
    if len(found) < 2 or not isinstance(found[-1], Register | Immediate):
        raise ctx.unsupported("a cache policy was expected as the last operand")
    return found[:-1]


def container(type_name: str) -> str:
    """The type of the smallest register that holds an element: 8 bits are kept in 16 or more."""
    return "b16" if bits_of(type_name) == 8 else type_name


def _access(
    ctx: Lowering, instruction: Instruction, caching: tuple[str, ...], orders: tuple[str, ...]
) -> None:
    is_load = instruction.opcode != "st"
    modifiers = Modifiers(ctx, instruction)
    type_name = modifiers.type()
    if type_name not in TYPES:
        raise ctx.unsupported(f"type .{type_name} is none of a load or store")
    vector = modifiers.take("v2", "v4", "v8")
    space, number = take_space(modifiers)
    semantics, scope = take_order(modifiers, "weak", ("weak", "volatile", *orders))
    while modifiers.take(*caching, *_PRIORITIES, *PREFETCH_SIZES):
        pass
    hinted = modifiers.has(CACHE_HINT)
    modifiers.done()
    found = without_policy(ctx, operands(ctx, instruction, 3 if hinted else 2), hinted)
    register, address = found if is_load else found[::-1]
    _check_vector(ctx, register, vector, type_name, space)
    if not is_load and space == "param" and vector is None:
        _pass_argument(ctx, register, address, type_name)
        return
    if not is_load and space in ("const", "param", "param::entry"):
        raise ctx.unsupported(f"a kernel cannot store to .{space}")
    uses = ctx.dsts(register, container(type_name)) if is_load else ctx.srcs(register, container(type_name))
    ctx.emit(
        f"{'ld' if is_load else 'st'}.b{bits_of(type_name)}",
        *ctx.address(address),
        number,
        semantics,
        scope,
        int(type_name[0] == "s"),
        len(uses),
        *(part for use in uses for part in (use, use.value.bits)),
    )


def _pass_argument(ctx: Lowering, value: Operand, address: Operand, type_name: str) -> None:
    """`st.param` to a parameter of the call that follows: kept in a register of its own."""
    base = address.base if isinstance(address, Address) else None
    if not isinstance(base, Symbol) or any(p.name == base.name for p in ctx.function.parameters):
        raise ctx.unsupported("a kernel cannot store to its parameters")
    source = ctx.src(value, container(type_name))
    if source.value.bits not in (16, 32, 64):
        raise ctx.unsupported(f"an argument of {source.value.bits} bits is not passed")
    argument = ctx.arguments[base.name] = ctx.temporary(source.value.bits)
    ctx.emit(f"mov.{argument.bits}", ctx.written(argument), source)


def _check_vector(
    ctx: Lowering, register: Operand, vector: str | None, type_name: str, space: str | None
) -> None:
    count = int(vector[1:]) if vector else 1
    given = len(register.elements) if isinstance(register, Vector) else 1
    if given != count:
        raise ctx.unsupported(f"{count} registers were expected, not {given}")
    num_bytes = count * bits_of(type_name) // 8
    if num_bytes <= _VECTOR_BYTES:
        return
    if num_bytes > _WIDE_VECTOR_BYTES or space not in ("global", None):
        raise ctx.unsupported(
            f"an access has at most {_VECTOR_BYTES} bytes ({_WIDE_VECTOR_BYTES} in global memory)"
        )


@lowers("ld", "ldu", op_class="load")
def lower_load(ctx: Lowering, instruction: Instruction) -> None:
    _access(ctx, instruction, _LOAD_CACHING, ("relaxed", "acquire"))


@lowers("st", op_class="store")
def lower_store(ctx: Lowering, instruction: Instruction) -> None:
    _access(ctx, instruction, _STORE_CACHING, ("relaxed", "release"))


# ---------------------------------------------------------------------------------------------- addresses


def _with_bits(use: Use) -> tuple[Use, int]:
    return use, use.value.bits


def _window(space: str) -> int:
    if space.startswith("shared"):
        return _SHARED_WINDOW
    return _LOCAL_WINDOW if space == "local" else 0


@lowers("cvta", op_class="address")
def lower_cvta(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    type_name = modifiers.type()
    if type_name != "u64":
        raise ctx.unsupported("generic addresses have 64 bits")
    to_space = modifiers.has("to")
    space, _ = take_space(modifiers)
    modifiers.done()
    if space is None:
        raise ctx.unsupported("a state space is missing")
    destination, source = operands(ctx, instruction, 2)
    ctx.emit(
        "cvta.to" if to_space else "cvta.from",
        *_with_bits(ctx.dst(destination, type_name)),
        *_with_bits(ctx.src(source, type_name)),
        _window(space),
    )


@lowers("isspacep", op_class="address")
def lower_isspacep(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    space, number = take_space(modifiers)
    modifiers.done()
    if space is None:
        raise ctx.unsupported("a state space is missing")
    destination, source = operands(ctx, instruction, 2)
    ctx.emit("isspacep", ctx.dst(destination, "pred"), *_with_bits(ctx.src(source, "u64")), number)


@lowers("mapa", op_class="address")
def lower_mapa(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    type_name = modifiers.type()
    space = modifiers.take("shared::cluster")
    modifiers.done()
    if type_name not in ("u32", "u64"):
        raise ctx.unsupported("type .u32 or .u64 was expected")
    if space is None and type_name == "u32":
        raise ctx.unsupported("generic addresses have 64 bits")
    destination, source, rank = operands(ctx, instruction, 3)
    ctx.emit(
        "mapa",
        *_with_bits(ctx.dst(destination, type_name)),
        *_with_bits(ctx.src(source, type_name)),
        ctx.src(rank, "u32"),
        int(space is None),
    )


@lowers("getctarank", op_class="address")
def lower_getctarank(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    type_name = modifiers.type()
    modifiers.take("shared::cluster")
    modifiers.done()
    if type_name not in ("u32", "u64"):
        raise ctx.unsupported("type .u32 or .u64 was expected")
    destination, source = operands(ctx, instruction, 2)
    ctx.emit("getctarank", ctx.dst(destination, "u32"), *_with_bits(ctx.src(source, type_name)))


# ---------------------------------------------------------------------------------------------- hints


@lowers("prefetch", "prefetchu", op_class="hint")
def lower_prefetch(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    take_space(modifiers)
    level = modifiers.take("L1", "L2", "tensormap", "L2::evict_last", "L2::evict_normal")
    modifiers.done()
    if level is None:
        raise ctx.unsupported("a cache level is missing")
    operands(ctx, instruction, 1)
    ctx.emit("memory.hint")


@lowers("applypriority", op_class="hint")
def lower_applypriority(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    modifiers.has("global")
    if not modifiers.has("L2::evict_normal"):
        raise ctx.unsupported("priority .L2::evict_normal was expected")
    modifiers.done()
    _line_bytes(ctx, operands(ctx, instruction, 2)[1])
    ctx.emit("memory.hint")


@lowers("discard", op_class="hint")
def lower_discard(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    modifiers.has("global")
    if not modifiers.has("L2"):
        raise ctx.unsupported("level .L2 was expected")
    modifiers.done()
    address, size = operands(ctx, instruction, 2)
    ctx.emit("memory.discard", *ctx.address(address), _line_bytes(ctx, size))


def _line_bytes(ctx: Lowering, operand: Operand) -> int:
    if not isinstance(operand, Immediate) or operand.value != 128:
        raise ctx.unsupported("the size has to be 128")
    return 128


@lowers("createpolicy", op_class="hint")
def lower_createpolicy(ctx: Lowering, instruction: Instruction) -> None:
    modifiers = Modifiers(ctx, instruction)
    type_name = modifiers.type()
    form = modifiers.take("fractional", "range", "cvt")
    modifiers.has("global")
    if form == "cvt":
        modifiers.has("L2")
    primary = modifiers.take(*_POLICIES)
    modifiers.take(*_POLICIES)  # of the rest of the accesses
    modifiers.done()
    if form is None or type_name != "b64" or (primary is None and form != "cvt"):
        raise ctx.unsupported("createpolicy.fractional, .range or .cvt of type .b64 was expected")
    found = operands(ctx, instruction, *{"fractional": (1, 2), "range": (4,), "cvt": (2,)}[form])
    value = _POLICIES[primary or "L2::evict_normal"]
    ctx.emit("memory.policy", ctx.dst(found[0], "b64"), value & 0xFFFFFFFF, value >> 32)

"""Integer arithmetic, logic and bit fields against exact Python integers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from elementwise import elementwise
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_values import odd_integers, random_bits
from ptx_emulator.errors import UnsupportedInstruction

DTYPES = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
COUNT = 1021  # the last warp is not full


def signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def as_type(value: int, type_name: str) -> int:
    bits = int(type_name[1:])
    return signed(value, bits) if type_name[0] == "s" else value & ((1 << bits) - 1)


def clamp(value: int, type_name: str) -> int:
    bits = int(type_name[1:])
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if type_name[0] == "s" else (0, (1 << bits) - 1)
    return min(max(value, low), high)


def check(
    instruction: str,
    types: list[str],
    result: str,
    function: Callable[..., int],
    seed: int = 0,
    inputs: list[np.ndarray] | None = None,
    target: str = "sm_90a",
) -> None:
    """The function gets Python integers of the given types, and its result is cut to the result's bits."""
    rng = np.random.default_rng(seed)
    if inputs is None:
        inputs = []
        for type_name in types:
            bits = int(type_name[1:])
            inputs.append(random_bits(rng, COUNT, odd_integers(bits), DTYPES[bits]))
    out_bits = int(result[1:])
    got = elementwise(instruction, inputs, DTYPES[out_bits], target=target)
    for n, raw in enumerate(zip(*(array.tolist() for array in inputs), strict=True)):
        values = [as_type(value, type_name) for value, type_name in zip(raw, types, strict=True)]
        expected = function(*values) & ((1 << out_bits) - 1)
        assert int(got[n]) == expected, (instruction, values, hex(int(got[n])), hex(expected))


ALL = ("u16", "s16", "u32", "s32", "u64", "s64")
WORDS = ("u32", "s32", "u64", "s64")


def truncating(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


BINARY: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
    "div": lambda a, b: truncating(a, b) if b else -1,
    "rem": lambda a, b: a - b * truncating(a, b) if b else -1,
}


@pytest.mark.parametrize("type_name", ALL)
@pytest.mark.parametrize("name", BINARY)
def test_two_operands(name: str, type_name: str) -> None:
    check(f"{name}.{type_name} {{d}}, {{a}}, {{b}};", [type_name] * 2, type_name, BINARY[name])


@pytest.mark.parametrize("type_name", ALL)
def test_high_product(type_name: str) -> None:
    bits = int(type_name[1:])
    check(f"mul.hi.{type_name} {{d}}, {{a}}, {{b}};", [type_name] * 2, type_name, lambda a, b: a * b >> bits)
    check(
        f"mad.hi.{type_name} {{d}}, {{a}}, {{b}}, {{c}};",
        [type_name] * 3,
        type_name,
        lambda a, b, c: (a * b >> bits) + c,
    )
    check(
        f"mad.lo.{type_name} {{d}}, {{a}}, {{b}}, {{c}};",
        [type_name] * 3,
        type_name,
        lambda a, b, c: a * b + c,
    )


@pytest.mark.parametrize("type_name", ["u16", "s16", "u32", "s32"])
def test_wide_product(type_name: str) -> None:
    wide = f"{type_name[0]}{2 * int(type_name[1:])}"
    check(f"mul.wide.{type_name} {{d}}, {{a}}, {{b}};", [type_name] * 2, wide, lambda a, b: a * b)
    types = [type_name, type_name, wide]
    check(f"mad.wide.{type_name} {{d}}, {{a}}, {{b}}, {{c}};", types, wide, lambda a, b, c: a * b + c)


def test_saturating() -> None:
    types = ["s32", "s32"]
    check("add.sat.s32 {d}, {a}, {b};", types, "s32", lambda a, b: clamp(a + b, "s32"))
    check("sub.sat.s32 {d}, {a}, {b};", types, "s32", lambda a, b: clamp(a - b, "s32"))
    check(
        "mad.hi.sat.s32 {d}, {a}, {b}, {c};",
        ["s32"] * 3,
        "s32",
        lambda a, b, c: clamp((a * b >> 32) + c, "s32"),
    )
    check("min.relu.s32 {d}, {a}, {b};", types, "s32", lambda a, b: max(min(a, b), 0))
    check("max.relu.s32 {d}, {a}, {b};", types, "s32", lambda a, b: max(a, b, 0))


@pytest.mark.parametrize("type_name", ["u32", "s32"])
def test_24_bits(type_name: str) -> None:
    def low24(value: int) -> int:
        return signed(value << 8, 32) >> 8 if type_name == "s32" else value & 0xFFFFFF

    types = [type_name] * 3
    check(
        f"mul24.lo.{type_name} {{d}}, {{a}}, {{b}};", types[:2], type_name, lambda a, b: low24(a) * low24(b)
    )
    check(
        f"mul24.hi.{type_name} {{d}}, {{a}}, {{b}};",
        types[:2],
        type_name,
        lambda a, b: low24(a) * low24(b) >> 16,
    )
    check(
        f"mad24.lo.{type_name} {{d}}, {{a}}, {{b}}, {{c}};",
        types,
        type_name,
        lambda a, b, c: low24(a) * low24(b) + c,
    )


@pytest.mark.parametrize("type_name", ["s16", "s32", "s64"])
def test_sign(type_name: str) -> None:
    check(f"neg.{type_name} {{d}}, {{a}};", [type_name], type_name, lambda a: -a)
    check(f"abs.{type_name} {{d}}, {{a}};", [type_name], type_name, abs)


@pytest.mark.parametrize("type_name", ALL)
def test_sum_of_distance(type_name: str) -> None:
    check(
        f"sad.{type_name} {{d}}, {{a}}, {{b}}, {{c}};",
        [type_name] * 3,
        type_name,
        lambda a, b, c: c + abs(a - b),
    )


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic(bits: int) -> None:
    t = f"u{bits}"
    check(f"and.b{bits} {{d}}, {{a}}, {{b}};", [t, t], t, lambda a, b: a & b)
    check(f"or.b{bits} {{d}}, {{a}}, {{b}};", [t, t], t, lambda a, b: a | b)
    check(f"xor.b{bits} {{d}}, {{a}}, {{b}};", [t, t], t, lambda a, b: a ^ b)
    check(f"not.b{bits} {{d}}, {{a}};", [t], t, lambda a: ~a)
    check(f"cnot.b{bits} {{d}}, {{a}};", [t], t, lambda a: int(a == 0))


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts_beyond_the_width(bits: int) -> None:
    t, s = f"u{bits}", f"s{bits}"
    rng = np.random.default_rng(bits)
    inputs = [
        random_bits(rng, COUNT, odd_integers(bits), DTYPES[bits]),
        rng.choice(
            np.array([0, 1, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 2**31, 2**32 - 1], np.uint32), COUNT
        ),
    ]
    check(f"shl.b{bits} {{d}}, {{a}}, {{b}};", [t, "u32"], t, lambda a, n: a << min(n, 64), inputs=inputs)
    check(f"shr.u{bits} {{d}}, {{a}}, {{b}};", [t, "u32"], t, lambda a, n: a >> min(n, 64), inputs=inputs)
    check(f"shr.b{bits} {{d}}, {{a}}, {{b}};", [t, "u32"], t, lambda a, n: a >> min(n, 64), inputs=inputs)
    check(f"shr.s{bits} {{d}}, {{a}}, {{b}};", [s, "u32"], s, lambda a, n: a >> min(n, 64), inputs=inputs)


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel(mode: str) -> None:
    def places(n: int) -> int:
        return n & 31 if mode == "wrap" else min(n, 32)

    types = ["u32"] * 3
    check(
        f"shf.l.{mode}.b32 {{d}}, {{a}}, {{b}}, {{c}};",
        types,
        "u32",
        lambda a, b, n: (b << 32 | a) << places(n) >> 32,
    )
    check(
        f"shf.r.{mode}.b32 {{d}}, {{a}}, {{b}}, {{c}};",
        types,
        "u32",
        lambda a, b, n: (b << 32 | a) >> places(n),
    )


@settings(max_examples=10, deadline=None)
@given(table=st.integers(0, 255))
def test_lop3(table: int) -> None:
    def function(a: int, b: int, c: int) -> int:
        bits = (table >> ((a >> n & 1) << 2 | (b >> n & 1) << 1 | (c >> n & 1)) & 1 for n in range(32))
        return sum(bit << n for n, bit in enumerate(bits))

    check(f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {table};", ["u32"] * 3, "u32", function)


def test_lop3_with_predicate() -> None:
    text = """
        setp.lt.u32 %p10, {b}, 1000000000;
        lop3.{how}.b32 %r100|%p11, {a}, {b}, {c}, 0x80, %p10;
        selp.u32 %r101, 1, 0, %p11;
        xor.b32 {d}, %r100, %r101;
    """
    for how, combine in (("and", lambda x, y: x and y), ("or", lambda x, y: x or y)):
        check(
            text.replace("{how}", how),
            ["u32"] * 3,
            "u32",
            lambda a, b, c, f=combine: (a & b & c) ^ int(f((a & b & c) != 0, b < 1000000000)),
        )


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_counts(bits: int) -> None:
    t = f"u{bits}"
    check(f"popc.b{bits} {{d}}, {{a}};", [t], "u32", lambda a: a.bit_count())
    check(f"clz.b{bits} {{d}}, {{a}};", [t], "u32", lambda a: bits - a.bit_length())
    check(f"brev.b{bits} {{d}}, {{a}};", [t], t, lambda a: int(f"{a:0{bits}b}"[::-1], 2))


@pytest.mark.parametrize("type_name", WORDS)
def test_bfind(type_name: str) -> None:
    bits = int(type_name[1:])

    def find(a: int) -> int:
        return (~a if a < 0 else a).bit_length() - 1

    check(f"bfind.{type_name} {{d}}, {{a}};", [type_name], "u32", find)
    check(
        f"bfind.shiftamt.{type_name} {{d}}, {{a}};",
        [type_name],
        "u32",
        lambda a: bits - 1 - find(a) if find(a) >= 0 else -1,
    )


def field_inputs(bits: int, sources: int) -> list[np.ndarray]:
    rng = np.random.default_rng(bits)
    places = np.array(
        [0, 1, 7, 15, 30, 31, 32, 33, 40, 62, 63, 64, 65, 128, 255, 256, 257, -1, -64], np.int64
    )
    places = places.astype(np.uint32)
    return [random_bits(rng, COUNT, odd_integers(bits), DTYPES[bits]) for _ in range(sources)] + [
        rng.choice(places, COUNT) for _ in range(2)
    ]


def field_number(number: int, bits: int) -> int:
    """A position or length, as a GPU takes it beyond the 255 that PTX allows."""
    return number & 0xFF if bits == 32 else number


@pytest.mark.parametrize("type_name", WORDS)
def test_bfe(type_name: str) -> None:
    """The pseudo-code of the PTX ISA."""
    bits = int(type_name[1:])

    def extract(a: int, b: int, c: int) -> int:
        top, pos, length = bits - 1, field_number(b, bits), field_number(c, bits)
        unsigned = type_name[0] == "u" or length == 0
        sign = 0 if unsigned else a >> min(pos + length - 1, top) & 1
        return sum((a >> (pos + i) & 1 if i < length and pos + i <= top else sign) << i for i in range(bits))

    check(
        f"bfe.{type_name} {{d}}, {{a}}, {{b}}, {{c}};",
        [type_name, "u32", "u32"],
        type_name,
        extract,
        inputs=field_inputs(bits, 1),
    )


@pytest.mark.parametrize("bits", [32, 64])
def test_bfi(bits: int) -> None:
    """The pseudo-code of the PTX ISA."""

    def insert(a: int, b: int, c: int, d: int) -> int:
        pos, length = field_number(c, bits), field_number(d, bits)
        for i in range(min(length, bits)):
            if pos + i < bits:
                b = b & ~(1 << (pos + i)) | (a >> i & 1) << (pos + i)
        return b

    t = f"u{bits}"
    check(
        f"bfi.b{bits} {{d}}, {{a}}, {{b}}, {{c}}, {{e}};",
        [t, t, "u32", "u32"],
        t,
        insert,
        inputs=field_inputs(bits, 2),
    )


@pytest.mark.parametrize("mode", ["clamp", "wrap"])
def test_masks_and_extension(mode: str) -> None:
    """The pseudo-code of the PTX ISA."""
    places = field_inputs(32, 1)

    def mask(a: int, b: int) -> int:
        first = a & 31 if mode == "wrap" else min(a, 32)
        length = b & 31 if mode == "wrap" else min(b, 32)
        return ((1 << length) - 1) << first

    def extend(a: int, b: int, is_signed: bool) -> int:
        width = b & 31 if mode == "wrap" else min(b, 32)
        value = a & ((1 << width) - 1)
        return value - (1 << width) if is_signed and width and value >> (width - 1) else value

    check(f"bmsk.{mode}.b32 {{d}}, {{a}}, {{b}};", ["u32", "u32"], "u32", mask, inputs=places[1:])
    for t in ("u32", "s32"):
        check(
            f"szext.{mode}.{t} {{d}}, {{a}}, {{b}};",
            ["u32", "u32"],
            "u32",
            lambda a, b, s=t == "s32": extend(a, b, s),
            inputs=places[:2],
        )


def test_fns() -> None:
    """The pseudo-code of the PTX ISA."""

    def find(mask: int, base: int, offset: int) -> int:
        if offset == 0:
            return base if mask >> base & 1 else 0xFFFFFFFF
        pos, left, step = base, abs(offset) - 1, 1 if offset > 0 else -1
        while 0 <= pos < 32:
            if mask >> pos & 1:
                if left == 0:
                    return pos
                left -= 1
            pos += step
        return 0xFFFFFFFF

    rng = np.random.default_rng(1)
    inputs = [
        rng.integers(0, 2**32, COUNT, np.uint32),
        rng.integers(0, 32, COUNT, np.uint32),
        rng.integers(-20, 20, COUNT, np.int32).view(np.uint32),
    ]
    check("fns.b32 {d}, {a}, {b}, {c};", ["u32", "u32", "s32"], "u32", find, inputs=inputs)


@pytest.mark.parametrize("a_type", ["u32", "s32"])
@pytest.mark.parametrize("b_type", ["u32", "s32"])
def test_dot(a_type: str, b_type: str) -> None:
    def part(value: int, n: int, bits: int, type_name: str) -> int:
        return as_type(value >> n * bits, f"{type_name[0]}{bits}")

    def bytes4(a: int, b: int, c: int) -> int:
        return c + sum(part(a, n, 8, a_type) * part(b, n, 8, b_type) for n in range(4))

    types = ["u32"] * 3
    check(f"dp4a.{a_type}.{b_type} {{d}}, {{a}}, {{b}}, {{c}};", types, "u32", bytes4)
    for half, first in (("lo", 0), ("hi", 2)):
        check(
            f"dp2a.{half}.{a_type}.{b_type} {{d}}, {{a}}, {{b}}, {{c}};",
            types,
            "u32",
            lambda a, b, c, k=first: (
                c + sum(part(a, n, 16, a_type) * part(b, n + k, 8, b_type) for n in range(2))
            ),
        )


def test_prmt() -> None:
    def permute(a: int, b: int, c: int) -> int:
        data = (b << 32 | a).to_bytes(8, "little")
        picked = []
        for n in range(4):
            byte = data[c >> 4 * n & 7]
            picked.append((0xFF if byte & 0x80 else 0) if c >> 4 * n & 8 else byte)
        return int.from_bytes(bytes(picked), "little")

    check("prmt.b32 {d}, {a}, {b}, {c};", ["u32"] * 3, "u32", permute)


@pytest.mark.parametrize(
    ("mode", "rows"),
    [
        ("f4e", ["3210", "4321", "5432", "6543"]),
        ("b4e", ["5670", "6701", "7012", "0123"]),
        ("rc8", ["0000", "1111", "2222", "3333"]),
        ("ecl", ["3210", "3211", "3222", "3333"]),
        ("ecr", ["0000", "1110", "2210", "3210"]),
        ("rc16", ["1010", "3232", "1010", "3232"]),
    ],
)
def test_prmt_modes(mode: str, rows: list[str]) -> None:
    def permute(a: int, b: int, c: int) -> int:
        data = (b << 32 | a).to_bytes(8, "little")
        return int.from_bytes(bytes(data[int(digit)] for digit in reversed(rows[c & 3])), "little")

    check(f"prmt.b32.{mode} {{d}}, {{a}}, {{b}}, {{c}};", ["u32"] * 3, "u32", permute)


@pytest.mark.parametrize("type_name", ["u16x2", "s16x2"])
@pytest.mark.parametrize("name", ["add", "min", "max"])
def test_packed(name: str, type_name: str) -> None:
    def halves(a: int, b: int) -> int:
        low = BINARY[name](as_type(a, type_name[:3]), as_type(b, type_name[:3]))
        high = BINARY[name](as_type(a >> 16, type_name[:3]), as_type(b >> 16, type_name[:3]))
        return (high & 0xFFFF) << 16 | low & 0xFFFF

    check(f"{name}.{type_name} {{d}}, {{a}}, {{b}};", ["u32", "u32"], "u32", halves)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("name", ["add", "sub"])
def test_carry(name: str, bits: int) -> None:
    """Numbers of three words; the last one without .cc."""
    rng = np.random.default_rng(3)
    inputs = [random_bits(rng, COUNT, odd_integers(bits), DTYPES[bits]) for _ in range(4)]
    text = f"""
        {name}.cc.u{bits} {{d0}}, {{a}}, {{b}};
        {name}c.cc.u{bits} {{d1}}, {{c}}, {{e}};
        {name}c.u{bits} {{d2}}, {{a}}, {{e}};
    """
    got = elementwise(text, inputs, DTYPES[bits], num_results=3)
    for n, (a, b, c, e) in enumerate(zip(*(array.tolist() for array in inputs), strict=True)):
        x, y = a << 2 * bits | c << bits | a, e << 2 * bits | e << bits | b
        expected = (x + y if name == "add" else x - y) & ((1 << 3 * bits) - 1)
        assert int(got[2][n]) << 2 * bits | int(got[1][n]) << bits | int(got[0][n]) == expected


@pytest.mark.parametrize("bits", [32, 64])
def test_multiply_with_carry(bits: int) -> None:
    rng = np.random.default_rng(4)
    inputs = [random_bits(rng, COUNT, odd_integers(bits), DTYPES[bits]) for _ in range(4)]
    text = f"""
        mad.lo.cc.u{bits} {{d0}}, {{a}}, {{b}}, {{c}};
        madc.hi.cc.u{bits} {{d1}}, {{a}}, {{b}}, {{e}};
        addc.u{bits} {{d2}}, 0, 0;
    """
    got = elementwise(text, inputs, DTYPES[bits], num_results=3)
    for n, (a, b, c, e) in enumerate(zip(*(array.tolist() for array in inputs), strict=True)):
        expected = a * b + (e << bits | c)
        assert int(got[2][n]) << 2 * bits | int(got[1][n]) << bits | int(got[0][n]) == expected


@settings(max_examples=20, deadline=None)
@given(values=st.lists(st.tuples(*[st.integers(0, 2**32 - 1)] * 2), min_size=1, max_size=70))
def test_any_integers(values: list[tuple[int, int]]) -> None:
    """Several instructions on the same registers, destinations among the sources."""
    inputs = [np.array(column, dtype=np.uint32) for column in zip(*values, strict=True)]
    text = """
        add.u32 {a}, {a}, {b};
        mul.lo.u32 {a}, {a}, {a};
        sub.u32 {a}, {b}, {a};
        xor.b32 {d}, {a}, -1;
    """
    check(text, ["u32", "u32"], "u32", lambda a, b: ~(b - (a + b) ** 2), inputs=inputs)


@pytest.mark.parametrize(
    "instruction",
    [
        "add.sat.u32 {d}, {a}, {b};",
        "mul.u32 {d}, {a}, {b};",
        "shf.l.b32 {d}, {a}, {b}, {a};",
        "abs.u32 {d}, {a};",
    ],
)
def test_what_ptx_does_not_have(instruction: str) -> None:
    words = np.zeros(32, np.uint32)
    with pytest.raises(UnsupportedInstruction):
        elementwise(instruction, [words, words])

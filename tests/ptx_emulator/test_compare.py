"""setp, set, selp, slct against Python's comparisons."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import numpy as np
import pytest
from elementwise import elementwise, pairs_of
from exact import BF16, F16, F32, F64, Format, flush
from odd_values import ODD_BF16, ODD_F16, ODD_F32, ODD_F64, odd_integers

ORDERED: dict[str, Callable[[float, float], bool]] = {
    "eq": operator.eq,
    "ne": lambda a, b: a < b or a > b,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
DTYPES = {16: np.uint16, 32: np.uint32, 64: np.uint64}
FLOATS = [(F16, ODD_F16), (BF16, ODD_BF16), (F32, ODD_F32), (F64, ODD_F64)]
BOTH = "selp.u32 %r100, 1, 0, %p10; selp.u32 %r101, 2, 0, %p11; or.b32 {d}, %r100, %r101;"


def float_comparison(name: str) -> Callable[[float, float], bool]:
    def compare(a: float, b: float) -> bool:
        nan = math.isnan(a) or math.isnan(b)
        if name in ("num", "nan"):
            return nan == (name == "nan")
        unordered = len(name) == 3
        return unordered if nan else ORDERED[name.removesuffix("u") if unordered else name](a, b)

    return compare


FLOAT_NAMES = [*ORDERED, *(name + "u" for name in ORDERED), "num", "nan"]


@pytest.mark.parametrize("type_name", ["u16", "s16", "u32", "s32", "u64", "s64", "b16", "b32", "b64"])
def test_integers(type_name: str) -> None:
    bits = int(type_name[1:])
    dtype = DTYPES[bits]
    a, b = pairs_of(odd_integers(bits), dtype)
    names = {name: name for name in (("eq", "ne") if type_name[0] == "b" else ORDERED)}
    if type_name[0] == "u":
        names |= {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
    kind = a.dtype.str.replace("u", "i") if type_name[0] == "s" else a.dtype
    for name, meaning in names.items():
        text = f"setp.{name}.{type_name} %p10, {{a}}, {{b}}; selp.u32 {{d}}, 1, 0, %p10;"
        expected = [
            ORDERED[meaning](x, y) for x, y in zip(a.view(kind).tolist(), b.view(kind).tolist(), strict=True)
        ]
        assert elementwise(text, [a, b]).astype(bool).tolist() == expected, name


@pytest.mark.parametrize(("fmt", "odd"), FLOATS, ids=[fmt.name for fmt, _ in FLOATS])
def test_floats(fmt: Format, odd: list[int]) -> None:
    a, b = pairs_of(odd, fmt.bits)
    pairs = list(zip(fmt.values(a), fmt.values(b), strict=True))
    for name in FLOAT_NAMES:
        text = f"setp.{name}.{fmt.name} %p10, {{a}}, {{b}}; selp.u32 {{d}}, 1, 0, %p10;"
        got = elementwise(text, [a, b]).astype(bool).tolist()
        assert got == [float_comparison(name)(x, y) for x, y in pairs], name
        if fmt is F32 or fmt is F16:
            got = elementwise(text.replace(f".{fmt.name}", f".ftz.{fmt.name}"), [a, b]).astype(bool).tolist()
            assert got == [float_comparison(name)(flush(x, fmt), flush(y, fmt)) for x, y in pairs], name


@pytest.mark.parametrize("combine", ["and", "or", "xor"])
@pytest.mark.parametrize("negated", [False, True], ids=["plain", "negated"])
def test_two_predicates(combine: str, negated: bool) -> None:
    """p = (a < b) op c, q = !(a < b) op c."""
    function = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}[combine]
    rng = np.random.default_rng(0)
    a, b, c = (rng.integers(0, 4, 301).astype(np.uint32) for _ in range(3))
    third = "!%p12" if negated else "%p12"
    text = f"setp.ge.u32 %p12, {{c}}, 2; setp.lt.{combine}.u32 %p10|%p11, {{a}}, {{b}}, {third}; {BOTH}"
    with_c = (c < 2) if negated else (c >= 2)
    expected = function(a < b, with_c) + 2 * function(~(a < b), with_c)
    np.testing.assert_array_equal(elementwise(text, [a, b, c]), expected)
    text = f"setp.ge.u32 %p10, {{c}}, 2; setp.lt.{combine}.u32 %p10, {{a}}, {{b}}, %p10;"
    text += "selp.u32 {d}, 1, 0, %p10;"
    np.testing.assert_array_equal(elementwise(text, [a, b, c]), function(a < b, c >= 2))


@pytest.mark.parametrize(("fmt", "odd"), FLOATS[:2], ids=["f16x2", "bf16x2"])
def test_pairs(fmt: Format, odd: list[int]) -> None:
    """p is of the low halves, q of the high ones."""
    a, b = (column[: len(column) // 2 * 2] for column in pairs_of(odd, np.uint16))
    words = [a.view(np.uint32), b.view(np.uint32)]
    compare = float_comparison("leu")
    expected = np.array([compare(x, y) for x, y in zip(fmt.values(a), fmt.values(b), strict=True)]).reshape(
        -1, 2
    )
    got = elementwise(f"setp.leu.{fmt.name}x2 %p10|%p11, {{a}}, {{b}}; {BOTH}", words)
    np.testing.assert_array_equal(got, expected[:, 0] + 2 * expected[:, 1])
    one = fmt.encode(1.0)
    got = elementwise(f"set.leu.{fmt.name}x2.{fmt.name}x2 {{d}}, {{a}}, {{b}};", words).view(np.uint16)
    np.testing.assert_array_equal(got.reshape(-1, 2), expected * one)


def test_set() -> None:
    a, b = pairs_of(ODD_F32, np.uint32)
    less = np.array([x < y for x, y in zip(F32.values(a), F32.values(b), strict=True)])
    np.testing.assert_array_equal(
        elementwise("set.lt.u32.f32 {d}, {a}, {b};", [a, b]), less * np.uint32(0xFFFFFFFF)
    )
    np.testing.assert_array_equal(
        elementwise("set.lt.f32.f32 {d}, {a}, {b};", [a, b]), less * np.uint32(0x3F800000)
    )
    text = "setp.eq.u32 %p10, {a}, {b}; set.lt.or.s32.f32 {d}, {a}, {b}, %p10;"
    np.testing.assert_array_equal(elementwise(text, [a, b]), (less | (a == b)) * np.uint32(0xFFFFFFFF))
    a, b = pairs_of(ODD_F16, np.uint16)
    less = np.array([x < y for x, y in zip(F16.values(a), F16.values(b), strict=True)])
    got = elementwise("set.lt.f16.f16 {d}, {a}, {b};", [a, b], np.uint16)
    np.testing.assert_array_equal(got, less * np.uint16(0x3C00))


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_selections(bits: int) -> None:
    dtype = DTYPES[bits]
    a, b = pairs_of(odd_integers(bits), dtype)
    rng = np.random.default_rng(bits)
    c = rng.choice(np.array(ODD_F32, np.uint32), len(a))
    got = elementwise(
        f"setp.lt.s32 %p10, {{c}}, 0; selp.b{bits} {{d}}, {{a}}, {{b}}, %p10;", [a, b, c], dtype
    )
    np.testing.assert_array_equal(got, np.where(c.view(np.int32) < 0, a, b))
    got = elementwise(f"slct.b{bits}.s32 {{d}}, {{a}}, {{b}}, {{c}};", [a, b, c], dtype)
    np.testing.assert_array_equal(got, np.where(c.view(np.int32) >= 0, a, b))
    numbers = np.array(F32.values(c))
    got = elementwise(f"slct.b{bits}.f32 {{d}}, {{a}}, {{b}}, {{c}};", [a, b, c], dtype)
    np.testing.assert_array_equal(got, np.where(numbers >= 0, a, b))
    got = elementwise(f"slct.ftz.b{bits}.f32 {{d}}, {{a}}, {{b}}, {{c}};", [a, b, c], dtype)
    np.testing.assert_array_equal(got, np.where(np.array([flush(x, F32) for x in numbers]) >= 0, a, b))

"""f32 and f64 arithmetic against exact fractions, rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable

import exact
import numpy as np
import pytest
from elementwise import elementwise, pairs_of
from exact import F32, F64, Format, extreme, signed_extreme
from harness import run_kernel
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_values import ODD_F32, ODD_F64, random_bits

MODES = ("rn", "rz", "rm", "rp")
ROUNDED = {"add": (exact.add, 2), "mul": (exact.mul, 2), "fma": (exact.fma, 3), "div": (exact.div, 2)}
WIDE = exact.any_exponent(F32)
COUNT = 141
QUIET = np.uint64(1 << 51)
# Two quiet NaNs, and two whose upper word is that of an infinity.
NANS_F64 = [0x7FFE90515CF475EF, 0xFFF8000000000123, 0xFFF0000000000001, 0x7FF0000012345678]


def inputs_of(fmt: Format, count: int, seed: int = 0) -> list[np.ndarray]:
    """Odd values against each other, then random ones: any bits, and numbers of like magnitude."""
    rng = np.random.default_rng(seed)
    odd = ODD_F32 if fmt is F32 else ODD_F64
    pairs = pairs_of(odd[:: 1 if count < 3 else 2], fmt.bits)
    columns = []
    for n in range(count):
        head = pairs[n] if n < 2 else rng.choice(np.array(odd, fmt.bits), len(pairs[0]))
        close = rng.normal(1, 1e-3 if n else 2, COUNT).astype(fmt.dtype).view(fmt.bits)
        columns.append(np.concatenate([head, random_bits(rng, COUNT, odd, fmt.bits), close]))
    return columns


def check(
    instruction: str,
    fmt: Format,
    inputs: list[np.ndarray],
    function: Callable[..., float],
    ftz: bool = False,
    target: str = "sm_90a",
) -> None:
    got = elementwise(instruction, inputs, fmt.bits, target=target)
    columns = [fmt.values(column) for column in inputs]
    for n, values in enumerate(zip(*columns, strict=True)):
        if ftz:
            values = tuple(exact.flush(value, fmt) for value in values)
        expected = function(*values)
        if ftz:
            expected = exact.flush(expected, fmt)
        if math.isnan(expected) and fmt is F64:
            assert np.isnan(got[n : n + 1].view(fmt.dtype))[0], (instruction, values)
        else:
            assert int(got[n]) == fmt.encode(expected), (instruction, values, hex(int(got[n])), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fmt", [F32, F64], ids=["f32", "f64"])
@pytest.mark.parametrize("name", ROUNDED)
def test_rounding(name: str, fmt: Format, mode: str) -> None:
    function, count = ROUNDED[name]
    sources = ", ".join(["{a}", "{b}", "{c}"][:count])
    text = f"{name}.{mode}.{fmt.name} {{d}}, {sources};"
    check(text, fmt, inputs_of(fmt, count), lambda *values: function(*values, fmt, mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fmt", [F32, F64], ids=["f32", "f64"])
def test_rounded_functions(fmt: Format, mode: str) -> None:
    inputs = inputs_of(fmt, 1)
    check(f"sub.{mode}.{fmt.name} {{d}}, {{a}}, {{a}};", fmt, inputs, lambda a: exact.add(a, -a, fmt, mode))
    check(f"rcp.{mode}.{fmt.name} {{d}}, {{a}};", fmt, inputs, lambda a: exact.div(1.0, a, fmt, mode))
    check(f"sqrt.{mode}.{fmt.name} {{d}}, {{a}};", fmt, inputs, lambda a: exact.sqrt(a, fmt, mode))


@pytest.mark.parametrize("name", ROUNDED)
def test_flush_to_zero(name: str) -> None:
    function, count = ROUNDED[name]
    sources = ", ".join(["{a}", "{b}", "{c}"][:count])
    text = f"{name}.rn.ftz.f32 {{d}}, {sources};"
    check(text, F32, inputs_of(F32, count), lambda *values: function(*values, WIDE), ftz=True)


def near_the_smallest_normal(name: str) -> list[np.ndarray]:
    """Operands of which the result lies within a few units of 2^-149 around +-2^-126."""
    rng = np.random.default_rng(3)
    size, smallest = 1500, 2.0**-126 * (1 - 2.0**-25)
    a = rng.uniform(1, 2, size) * rng.choice([-1, 1], size)
    if name != "div":
        a *= 2.0**-40
    a = a.astype(np.float32).astype(np.float64)
    c = (rng.choice([-1, 1], size) * rng.choice([0, 1, 1.5, 2, 1 + 2.0**-23], size) * 2.0**-126).astype(
        np.float32
    )
    b = {"mul": smallest / a, "fma": (smallest * np.sign(a) - c) / a, "div": smallest * a}[name]
    beside = b.astype(np.float32).view(np.int32) + rng.integers(-1, 2, size, dtype=np.int32)
    a, b = a.astype(np.float32).view(np.uint32), beside.view(np.uint32)
    return {"mul": [a, b], "fma": [a, b, c.view(np.uint32)], "div": [b, a]}[name]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["mul", "fma", "div"])
def test_flush_after_rounding_to_full_precision(name: str, mode: str) -> None:
    """What would be normal only on the grid of subnormal numbers is flushed."""
    inputs = near_the_smallest_normal(name)
    text = f"{name}.{mode}.ftz.f32 {{d}}, {', '.join(['{a}', '{b}', '{c}'][: len(inputs)])};"
    check(text, F32, inputs, lambda *values: ROUNDED[name][0](*values, WIDE, mode), ftz=True)
    if name == "div":
        inverse = np.arange(0x7E7FFF00, 0x7E800100, dtype=np.uint32)
        text = f"rcp.{mode}.ftz.f32 {{d}}, {{a}};"
        check(text, F32, [inverse], lambda a: exact.div(1.0, a, WIDE, mode), ftz=True)


@pytest.mark.parametrize("name", ["add", "mul", "fma"])
def test_saturation(name: str) -> None:
    function, count = ROUNDED[name]
    sources = ", ".join(["{a}", "{b}", "{c}"][:count])

    def saturated(*values: float) -> float:
        result = function(*values, F32)
        return 0.0 if math.isnan(result) or result <= 0 else min(result, 1.0)

    check(f"{name}.rn.sat.f32 {{d}}, {sources};", F32, inputs_of(F32, count), saturated)


@pytest.mark.parametrize("name", ["add", "mul", "fma"])
@pytest.mark.parametrize("mode", ["rn", "rm"])
def test_packed(name: str, mode: str) -> None:
    function, count = ROUNDED[name]
    columns = inputs_of(F32, count)
    columns = [column[: len(column) // 2 * 2] for column in columns]
    sources = ", ".join(["{a}", "{b}", "{c}"][:count])
    text = f"{name}.{mode}.f32x2 {{d}}, {sources};"
    got = elementwise(text, [column.view(np.uint64) for column in columns], np.uint64, target="sm_100a")
    values = zip(*(F32.values(column) for column in columns), strict=True)
    expected = [F32.encode(function(*v, F32, mode)) for v in values]
    np.testing.assert_array_equal(got.view(np.uint32), np.array(expected, np.uint32))


@pytest.mark.parametrize("name", ["min", "max"])
@pytest.mark.parametrize("nan", [False, True], ids=["number", "NaN"])
def test_extremes(name: str, nan: bool) -> None:
    larger = name == "max"
    suffix = ".NaN" if nan else ""
    inputs = inputs_of(F32, 3)
    two = inputs[:2]
    check(f"{name}{suffix}.f32 {{d}}, {{a}}, {{b}};", F32, two, lambda a, b: extreme(a, b, larger, nan))
    text = f"{name}.ftz{suffix}.f32 {{d}}, {{a}}, {{b}};"
    check(text, F32, two, lambda a, b: extreme(a, b, larger, nan), ftz=True)

    numbers = [
        column[~np.isnan(two[0].view(np.float32)) & ~np.isnan(two[1].view(np.float32))] for column in two
    ]
    text = f"{name}{suffix}.xorsign.abs.f32 {{d}}, {{a}}, {{b}};"
    check(text, F32, numbers, lambda a, b: signed_extreme(a, b, larger, nan))
    text = f"{name}{suffix}.f32 {{d}}, {{a}}, {{b}}, {{c}};"

    def three(a: float, b: float, c: float) -> float:
        return extreme(extreme(a, b, larger, nan), c, larger, nan)

    check(text, F32, inputs, three, target="sm_100a")
    if not nan:
        text = f"{name}.f64 {{d}}, {{a}}, {{b}};"
        check(text, F64, inputs_of(F64, 2), lambda a, b: extreme(a, b, larger, False))


def test_signs() -> None:
    for bits, dtype, odd in ((32, np.uint32, ODD_F32), (64, np.uint64, [*ODD_F64, *NANS_F64])):
        a, b = pairs_of(odd, dtype)
        top = dtype(1) << dtype(bits - 1)
        nan = np.isnan(a.view(np.float32 if bits == 32 else np.float64))
        quiet = dtype(0x7FFFFFFF) if bits == 32 else a | QUIET  # an f64 keeps even the sign
        negated, magnitude = np.where(nan, quiet, a ^ top), np.where(nan, quiet, a & ~top)
        np.testing.assert_array_equal(elementwise(f"neg.f{bits} {{d}}, {{a}};", [a], dtype), negated)
        np.testing.assert_array_equal(elementwise(f"abs.f{bits} {{d}}, {{a}};", [a], dtype), magnitude)
        got = elementwise(f"copysign.f{bits} {{d}}, {{a}}, {{b}};", [a, b], dtype)
        np.testing.assert_array_equal(got, (a & top) | (b & ~top))


def test_payloads_of_f64_fma() -> None:
    """The second operand's NaN stays, else the third's, else the first's."""
    values = np.array([*NANS_F64, 0x3FF0000000000000], np.uint64)
    a, b, c = (np.ascontiguousarray(grid.ravel()) for grid in np.meshgrid(values, values, values))
    got = elementwise("fma.rn.f64 {d}, {a}, {b}, {c};", [a, b, c], np.uint64)
    nan_a, nan_b, nan_c = (np.isnan(x.view(np.float64)) for x in (a, b, c))
    expected = np.select([nan_b, nan_c, nan_a], [b, c, a]) | QUIET
    some = nan_a | nan_b | nan_c
    np.testing.assert_array_equal(got[some], expected[some])


@pytest.mark.parametrize("name", ["add.rn", "sub.rn", "mul.rn", "min", "max"])
def test_payloads_of_f64(name: str) -> None:
    """A NaN stays, as a quiet one; of two the second."""
    a, b = pairs_of([*NANS_F64, 0x3FF0000000000000], np.uint64)
    a, b = a[:-1], b[:-1]  # but for the pair of numbers
    got = elementwise(f"{name}.f64 {{d}}, {{a}}, {{b}};", [a, b], np.uint64)
    nan = np.isnan(b.view(np.float64))
    expected = np.where(nan, b, a) | QUIET
    if name in ("min", "max"):
        one = nan ^ np.isnan(a.view(np.float64))
        expected = np.where(one, 0x3FF0000000000000, expected)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("bits", [32, 64])
def test_testp(bits: int) -> None:
    odd, dtype, kind = (ODD_F32, np.uint32, np.float32) if bits == 32 else (ODD_F64, np.uint64, np.float64)
    values = np.array(odd, dtype)
    numbers = values.view(kind)
    tiny = np.finfo(kind).tiny
    expected = {
        "finite": np.isfinite(numbers),
        "infinite": np.isinf(numbers),
        "number": ~np.isnan(numbers),
        "notanumber": np.isnan(numbers),
        "normal": np.isfinite(numbers) & ((np.abs(numbers) >= tiny) | (numbers == 0)),
        "subnormal": (numbers != 0) & (np.abs(numbers) < tiny),
    }
    for name, wanted in expected.items():
        got = elementwise(f"testp.{name}.f{bits} %p10, {{a}}; selp.u32 {{d}}, 1, 0, %p10;", [values])
        np.testing.assert_array_equal(got.astype(bool), wanted, err_msg=name)


# Bounds in units of the last place of the correct result, or absolute ones.
@pytest.mark.parametrize(
    ("name", "function", "low", "high"),
    [
        ("ex2.approx", np.exp2, -148.0, 127.9),
        ("lg2.approx", np.log2, 1e-38, 1e38),
        ("rsqrt.approx", lambda x: 1 / np.sqrt(x), 1e-38, 1e38),
        ("rcp.approx", lambda x: 1 / x, -1e37, 1e37),
        ("sqrt.approx", np.sqrt, 0.0, 1e38),
        ("sin.approx", np.sin, -100.0, 100.0),
        ("cos.approx", np.cos, -100.0, 100.0),
        ("tanh.approx", np.tanh, -12.0, 12.0),
    ],
)
def test_approximate_functions(
    name: str, function: Callable[[np.ndarray], np.ndarray], low: float, high: float
) -> None:
    rng = np.random.default_rng(2)
    a = np.concatenate([rng.uniform(low, high, 500), rng.normal(0, 1, 500).clip(low, high)]).astype(
        np.float32
    )
    got = elementwise(f"{name}.f32 {{d}}, {{a}};", [a.view(np.uint32)], np.float32)
    expected = function(a.astype(np.float64))
    error = np.abs(got - expected) / np.spacing(np.abs(expected).astype(np.float32))
    assert error.max() <= 0.51


@pytest.mark.parametrize(
    ("instruction", "value", "expected"),
    [
        ("ex2.approx.f32", -math.inf, 0.0),
        ("ex2.approx.f32", math.inf, math.inf),
        ("ex2.approx.f32", -149.0, 2.0**-149),
        ("ex2.approx.ftz.f32", -149.0, 0.0),
        ("ex2.approx.ftz.f32", 1e-40, 1.0),
        ("ex2.approx.f32", math.nan, math.nan),
        ("lg2.approx.f32", 0.0, -math.inf),
        ("lg2.approx.f32", -1.0, math.nan),
        ("lg2.approx.f32", math.inf, math.inf),
        ("lg2.approx.ftz.f32", 1e-40, -math.inf),
        ("rcp.approx.f32", -0.0, -math.inf),
        ("rcp.approx.ftz.f32", 1e-40, math.inf),
        ("rcp.approx.f32", math.inf, 0.0),
        ("rsqrt.approx.f32", -0.0, -math.inf),
        ("rsqrt.approx.f32", -1.0, math.nan),
        ("rsqrt.approx.f32", math.inf, 0.0),
        ("sqrt.approx.f32", -0.0, -0.0),
        ("sqrt.approx.f32", -2.0, math.nan),
        ("sin.approx.f32", math.inf, math.nan),
        ("sin.approx.f32", -0.0, -0.0),
        ("cos.approx.f32", math.inf, math.nan),
        ("tanh.approx.f32", -math.inf, -1.0),
        ("tanh.approx.f32", math.nan, math.nan),
    ],
)
def test_ends_of_approximate_functions(instruction: str, value: float, expected: float) -> None:
    """The tables of special values in the PTX ISA."""
    a = np.full(3, value, np.float32).view(np.uint32)
    got = elementwise(f"{instruction} {{d}}, {{a}};", [a], np.float32)
    assert got.view(np.uint32).tolist() == [F32.encode(expected)] * 3


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [(1.0, 1.5 * 2.0**126, 0.0), (math.inf, 2.0**127, math.nan), (1.0, 2.0**126, 2.0**-126), (3.0, 2.0, 1.5)],
)
def test_approximate_division(a: float, b: float, expected: float) -> None:
    inputs = [np.array([value] * 2, np.float32).view(np.uint32) for value in (a, b)]
    got = elementwise("div.approx.f32 {d}, {a}, {b};", inputs, np.float32)
    assert got.view(np.uint32)[0] == F32.encode(expected)
    full = elementwise("div.full.f32 {d}, {a}, {b};", inputs, np.float32)
    assert full.view(np.uint32)[0] == F32.encode(exact.div(a, b, F32))


def test_approximate_f64() -> None:
    """NaN and infinity are what the upper word says."""
    odd = np.array([*NANS_F64, 0xFFF0000000000000, 0x7FF0000000000000, 0x8000000000000001], np.uint64)
    nan = 0x7FFFFFFF00000000
    got = elementwise("rcp.approx.ftz.f64 {d}, {a};", [odd], np.uint64)
    assert got.tolist() == [nan, nan, 1 << 63, 0, 1 << 63, 0, 0xFFF0000000000000]
    got = elementwise("rsqrt.approx.ftz.f64 {d}, {a};", [odd], np.uint64)
    assert got.tolist() == [nan, nan, nan, 0, nan, 0, 0xFFF0000000000000]
    values = np.random.default_rng(5).uniform(0.01, 1e6, 200)
    for name, function in (("rcp", lambda x: 1 / x), ("rsqrt", lambda x: 1 / np.sqrt(x))):
        got = elementwise(f"{name}.approx.ftz.f64 {{d}}, {{a}};", [values.view(np.uint64)], np.float64)
        assert not (got.view(np.uint64) & np.uint64(0xFFFFFFFF)).any()
        np.testing.assert_allclose(got, function(values), rtol=2**-19)
    got = elementwise("rsqrt.approx.f64 {d}, {a};", [values.view(np.uint64)], np.float64)
    np.testing.assert_allclose(got, 1 / np.sqrt(values), rtol=1e-15)


def test_mixed_precision() -> None:
    a = np.array([0x3C00, 0x3555, 0xFC00, 0x0001], np.uint16)
    c = np.array([1.0, 2.0**-24, math.inf, -(2.0**-24)], np.float32)
    wide = a.view(np.float16).astype(np.float64)
    got = elementwise("add.rn.f32.f16 {d}, {a}, {b};", [a, c.view(np.uint32)], target="sm_100a")
    assert got.tolist() == [F32.encode(exact.add(x, float(y), F32)) for x, y in zip(wide, c, strict=True)]
    text = "fma.rz.f32.f16 {d}, {a}, {a}, {b};"
    got = elementwise(text, [a, c.view(np.uint32)], target="sm_100a")
    expected = [F32.encode(exact.fma(x, x, float(y), F32, "rz")) for x, y in zip(wide, c, strict=True)]
    assert got.tolist() == expected


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(st.tuples(*[st.floats(width=32)] * 3), min_size=1, max_size=40),
    mode=st.sampled_from(MODES),
)
def test_any_numbers(values: list[tuple[float, float, float]], mode: str) -> None:
    inputs = [np.array(column, np.float32).view(np.uint32) for column in zip(*values, strict=True)]
    text = f"fma.{mode}.f32 {{d}}, {{a}}, {{b}}, {{c}};"
    check(text, F32, inputs, lambda a, b, c: exact.fma(a, b, c, F32, mode))


def test_exponentials_are_counted() -> None:
    """Of f32 one each lane, of a pair two."""
    result = run_kernel("ex2.approx.ftz.f32 %f1, 0f3F800000; ex2.approx.f16x2 %r2, %r1;", block=(40, 1, 1))
    assert result.counts[0]["exponentials"] == 3 * 40

"""cvt between all types against exact fractions and ml_dtypes."""

from __future__ import annotations

import functools
import itertools
import math
from bisect import bisect_left
from collections.abc import Callable
from fractions import Fraction

import exact
import ml_dtypes
import numpy as np
import pytest
from elementwise import elementwise, pairs_of
from exact import BF16, F16, F32, F64, Format, round_exact
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_values import ODD_BF16, ODD_F16, ODD_F32, ODD_F64, odd_integers, random_bits
from ptx_emulator.errors import UnsupportedInstruction

DTYPES = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
FLOATS = {"f16": (F16, ODD_F16), "bf16": (BF16, ODD_BF16), "f32": (F32, ODD_F32), "f64": (F64, ODD_F64)}
TF32 = Format("f32", np.float32, np.uint32, 10, -126, float(Fraction(2047, 1024) * 2**127))
MODES = ("rn", "rz", "rm", "rp")
COUNT = 301


def register_bits(type_name: str) -> int:
    """8-bit integers are held in 16 bits here."""
    return max(int(type_name.lstrip("usbf")), 16)


def integer(value: int, type_name: str) -> int:
    bits = int(type_name[1:])
    value &= (1 << bits) - 1
    return value - (1 << bits) if type_name[0] == "s" and value >> (bits - 1) else value


def limits(type_name: str) -> tuple[int, int]:
    bits = int(type_name[1:])
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if type_name[0] == "s" else (0, (1 << bits) - 1)


def integer_inputs(type_name: str) -> np.ndarray:
    bits = register_bits(type_name)
    near = [*odd_integers(bits), *odd_integers(int(type_name[1:]))]
    near += [2**24 + 1, 2**53 + 1, 2**25 + 2, 2**63 - 2**9, 2**11 + 1, 65520, 65519]
    values = np.array([value % 2**bits for value in near], DTYPES[bits])
    rng = np.random.default_rng(bits)
    return np.concatenate([values, rng.integers(0, 2**bits - 1, COUNT, DTYPES[bits], endpoint=True)])


def float_inputs(type_name: str) -> np.ndarray:
    fmt, odd = FLOATS[type_name]
    rng = np.random.default_rng(7)
    near = [0.5, 1.5, 2.5, -0.5, -1.5, 127.5, 128.0, 255.5, 255.4, -128.6, 32767.5, 65504.0, 65520.0, 65519.9]
    near += [
        2147483647.0,
        2147483648.0,
        -2147483649.0,
        4294967295.5,
        4294967296.0,
        9.3e18,
        -9.3e18,
        1.9e19,
        0.3,
    ]
    near += [1.00048828125, 1.001, 3.3e38, 3.4e38, 6.1e-5, 5.9e-8, 2.9e-8, 2.98e-8, 1e-40, 9.2e-41, 4.6e-41]
    with np.errstate(over="ignore"):
        numbers = np.array(near).astype(fmt.dtype).view(fmt.bits)
        scaled = (
            (rng.normal(0, 1, COUNT) * 10.0 ** rng.integers(-10, 20, COUNT)).astype(fmt.dtype).view(fmt.bits)
        )
    return np.concatenate([np.array(odd, fmt.bits), numbers, scaled, random_bits(rng, COUNT, odd, fmt.bits)])


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("result", INTEGERS)
def test_integers(source: str, result: str) -> None:
    """A result narrower than its register is extended; .sat, where something is lost, clamps."""
    a = integer_inputs(source)
    values = [integer(value, source) for value in a.tolist()]
    bits = register_bits(result)
    got = elementwise(f"cvt.{result}.{source} {{d}}, {{a}};", [a], DTYPES[bits])
    assert got.tolist() == [integer(value, result) & ((1 << bits) - 1) for value in values]
    low, high = limits(result)
    if low <= limits(source)[0] and limits(source)[1] <= high:
        return
    got = elementwise(f"cvt.sat.{result}.{source} {{d}}, {{a}};", [a], DTYPES[bits])
    assert got.tolist() == [min(max(value, low), high) & ((1 << bits) - 1) for value in values]


def test_wide_registers() -> None:
    """Registers wider than the type: bits above the source are ignored, the result is extended."""
    a = np.array([0x123456FF, 0xFFFFFF7F, 0x00000080], np.uint32)
    assert elementwise("cvt.s32.s8 {d}, {a};", [a]).tolist() == [0xFFFFFFFF, 0x7F, 0xFFFFFF80]
    assert elementwise("cvt.u16.u8 {d}, {a};", [a]).tolist() == [0xFF, 0x7F, 0x80]
    assert elementwise("cvt.s8.s32 {d}, {a};", [a]).tolist() == [0xFFFFFFFF, 0x7F, 0xFFFFFF80]
    got = elementwise("cvt.rn.f32.u8 {d}, {a};", [a]).view(np.float32)
    assert got.tolist() == [255.0, 127.0, 128.0]


def rounded_integer(value: float, mode: str) -> int:
    if mode == "rzi":
        return math.trunc(value)
    return {"rni": round, "rmi": math.floor, "rpi": math.ceil}[mode](Fraction(value))


@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
@pytest.mark.parametrize("source", FLOATS)
def test_float_to_integer(source: str, mode: str) -> None:
    a = float_inputs(source)
    values = FLOATS[source][0].values(a)
    for result in INTEGERS[2 if source == "bf16" else 0 :]:
        low, high = limits(result)
        width = int(result[1:])
        not_a_number = 1 << (width - 1) if source == "f64" or width == 64 else 0

        def convert(value: float, low: int = low, high: int = high, nan: int = not_a_number) -> int:
            if math.isnan(value):
                return nan
            if math.isinf(value):
                return high if value > 0 else low
            return min(max(rounded_integer(value, mode), low), high)

        bits = register_bits(result)
        got = elementwise(f"cvt.{mode}.{result}.{source} {{d}}, {{a}};", [a], DTYPES[bits])
        expected = [integer(convert(value), result) & ((1 << bits) - 1) for value in values]
        assert got.tolist() == expected, result


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("result", FLOATS)
def test_integer_to_float(result: str, mode: str) -> None:
    fmt = FLOATS[result][0]
    for source in INTEGERS:
        if result == "bf16" and source in ("u8", "s8"):
            continue
        a = integer_inputs(source)
        got = elementwise(f"cvt.{mode}.{result}.{source} {{d}}, {{a}};", [a], fmt.bits)
        values = [integer(value, source) for value in a.tolist()]
        expected = [fmt.encode(round_exact(Fraction(v), fmt, mode)) if v else 0 for v in values]
        assert got.tolist() == expected, source


def rounded(value: float, fmt: Format, mode: str) -> float:
    return round_exact(Fraction(value), fmt, mode) if math.isfinite(value) and value != 0 else value


def kept_nan(instruction: str, bits: int) -> int | None:
    """What becomes of a NaN whose payload is kept."""
    if instruction.endswith("f32.bf16"):
        return bits << 16
    if instruction.endswith("f32.f64"):
        return bits >> 32 & 1 << 31 | 0x7FC00000 | bits >> 29 & 0x7FFFFF
    if instruction.endswith(".bf16.f64"):
        return bits >> 48 & 1 << 15 | 0x7FC0 | bits >> 45 & 0x7F
    if instruction.endswith(".f16.f64"):
        return bits >> 48 & 1 << 15 | 0x7E00 | bits >> 42 & 0x3FF
    if "tf32" in instruction:
        return bits & 0xFFFFE000 if "rna" in instruction else 0x7FFFE000
    return None


def check_floats(
    instruction: str,
    source: str,
    fmt: Format,
    function: Callable[[float], float],
    inputs: np.ndarray | None = None,
) -> None:
    a = float_inputs(source) if inputs is None else inputs
    got = elementwise(f"{instruction} {{d}}, {{a}};", [a], fmt.bits)
    for n, value in enumerate(FLOATS[source][0].values(a)):
        if math.isnan(value) and fmt is F64:
            assert np.isnan(got[n : n + 1].view(np.float64))[0]
        elif math.isnan(value) and (expected_bits := kept_nan(instruction, int(a[n]))) is not None:
            assert int(got[n]) == expected_bits, (instruction, hex(int(a[n])), hex(int(got[n])))
        else:
            expected = function(value)
            assert int(got[n]) == fmt.encode(expected), (instruction, value, hex(int(got[n])), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("result", "source"),
    [
        ("f16", "f32"),
        ("bf16", "f32"),
        ("f16", "f64"),
        ("bf16", "f64"),
        ("f32", "f64"),
        ("bf16", "f16"),
        ("f16", "bf16"),
    ],
)
def test_narrower_floats(result: str, source: str, mode: str) -> None:
    fmt = FLOATS[result][0]
    check_floats(f"cvt.{mode}.{result}.{source}", source, fmt, lambda value: rounded(value, fmt, mode))


@pytest.mark.parametrize("mode", MODES)
def test_narrower_floats_flush_after_rounding_to_full_precision(mode: str) -> None:
    smallest = 2.0**-126
    a = np.concatenate([smallest * (1 + np.linspace(-1e-7, 1e-7, 501)), [2.0**-127, 2.0**-160]])
    a = np.concatenate([a, -a]).view(np.uint64)
    wide = exact.any_exponent(F32)
    function = lambda value: exact.flush(rounded(value, wide, mode), F32)  # noqa: E731
    check_floats(f"cvt.{mode}.ftz.f32.f64", "f64", F32, function, a)


@pytest.mark.parametrize(
    ("result", "source"), [("f32", "f16"), ("f32", "bf16"), ("f64", "f32"), ("f64", "f16")]
)
def test_wider_floats(result: str, source: str) -> None:
    check_floats(f"cvt.{result}.{source}", source, FLOATS[result][0], lambda value: value)


@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
@pytest.mark.parametrize("source", ["f16", "f32", "f64"])
def test_integral_floats(source: str, mode: str) -> None:
    def integral(value: float) -> float:
        return math.copysign(rounded_integer(value, mode), value) if math.isfinite(value) else value

    check_floats(f"cvt.{mode}.{source}.{source}", source, FLOATS[source][0], integral)


def test_saturated_and_flushed_floats() -> None:
    def saturated(value: float) -> float:
        return 0.0 if math.isnan(value) or value <= 0 else min(value, 1.0)

    check_floats("cvt.sat.f32.f32", "f32", F32, saturated)
    check_floats("cvt.ftz.f32.f32", "f32", F32, lambda value: exact.flush(value, F32))
    check_floats("cvt.rn.ftz.f16.f32", "f32", F16, lambda value: rounded(exact.flush(value, F32), F16, "rn"))


def relu(value: float) -> float:
    return 0.0 if value <= 0 else value


def finite(value: float, fmt: Format) -> float:
    return math.copysign(fmt.max_finite, value) if math.isinf(value) else value


@pytest.mark.parametrize("mode", ["rn", "rz"])
@pytest.mark.parametrize("fmt", [F16, BF16, TF32], ids=["f16", "bf16", "tf32"])
def test_relu_and_satfinite(fmt: Format, mode: str) -> None:
    name = "tf32" if fmt is TF32 else fmt.name
    target = "sm_100a" if fmt is TF32 else "sm_90a"
    a = float_inputs("f32")
    values = F32.values(a)
    for suffix, function in (
        ("", lambda value: rounded(value, fmt, mode)),
        (".relu", lambda value: rounded(relu(value), fmt, mode)),
        (".satfinite", lambda value: finite(rounded(value, fmt, mode), fmt)),
        (".satfinite.relu", lambda value: finite(rounded(relu(value), fmt, mode), fmt)),
    ):
        got = elementwise(f"cvt.{mode}{suffix}.{name}.f32 {{d}}, {{a}};", [a], fmt.bits, target=target)
        nan = 0x7FFFE000 if fmt is TF32 else 0x7FFF
        expected = [nan if math.isnan(value) else fmt.encode(function(value)) for value in values]
        assert got.tolist() == expected, suffix


@pytest.mark.parametrize("suffix", ["rn", "rz", "rn.relu", "rz.relu"])
def test_tf32(suffix: str) -> None:
    function = relu if "relu" in suffix else float
    check_floats(
        f"cvt.{suffix}.tf32.f32", "f32", TF32, lambda value: rounded(function(value), TF32, suffix[:2])
    )


def test_tf32_ties_away() -> None:
    check_floats("cvt.rna.tf32.f32", "f32", TF32, lambda value: rounded(value, TF32, "rna"))


@pytest.mark.parametrize("suffix", ["rn", "rz", "rn.relu", "rn.satfinite", "rz.satfinite.relu"])
@pytest.mark.parametrize("fmt", [F16, BF16], ids=["f16", "bf16"])
def test_packed_halves(fmt: Format, suffix: str) -> None:
    """The first operand is the upper half."""
    mode = suffix[:2]

    def convert(value: float) -> int:
        value = rounded(relu(value) if "relu" in suffix else value, fmt, mode)
        return fmt.encode(finite(value, fmt) if "satfinite" in suffix else value)

    a = float_inputs("f32")
    b = np.random.default_rng(0).permutation(a)
    got = elementwise(f"cvt.{suffix}.{fmt.name}x2.f32 {{d}}, {{a}}, {{b}};", [a, b])
    columns = zip(F32.values(a), F32.values(b), strict=True)
    assert got.tolist() == [convert(x) << 16 | convert(y) for x, y in columns]


# name: ml_dtypes' format, bits of a code, bits of the register of a pair, code of NaN
SMALL = {
    "e4m3": (ml_dtypes.float8_e4m3fn, 8, 0x7F),
    "e5m2": (ml_dtypes.float8_e5m2, 8, 0x7F),
    "e2m1": (ml_dtypes.float4_e2m1fn, 4, 0x7),
    "e2m3": (ml_dtypes.float6_e2m3fn, 6, 0x1F),
    "e3m2": (ml_dtypes.float6_e3m2fn, 6, 0x1F),
}


@functools.cache
def codes_of(name: str) -> tuple[list[float], int]:
    """The values of the non-negative finite codes, in order, and the sign bit."""
    dtype, bits, _ = SMALL[name]
    values = np.arange(1 << (bits - 1), dtype=np.uint8).view(dtype).astype(np.float64)
    return [float(v) for v in values if np.isfinite(v)], 1 << (bits - 1)


def nearest_code(name: str, value: float) -> int:
    """By search; ties go to the even code, what is too large to the largest."""
    values, sign = codes_of(name)
    if math.isnan(value):
        return SMALL[name][2]
    magnitude = min(abs(value), values[-1])
    code = bisect_left(values, magnitude)
    if values[code] != magnitude:
        below, above = magnitude - values[code - 1], values[code] - magnitude
        if below < above or (below == above and (code - 1) % 2 == 0):
            code -= 1
    return code | (sign if math.copysign(1, value) < 0 else 0)


def small_inputs(name: str) -> np.ndarray:
    """All values of the format, what lies between them, and odd ones."""
    values, _ = codes_of(name)
    points = sorted({*values, *((x + y) / 2 for x, y in itertools.pairwise(values)), values[-1] * 1.1})
    numbers = np.array([*points, *(-p for p in points)], np.float32)
    around = np.concatenate([numbers, np.nextafter(numbers, 9e9), np.nextafter(numbers, -9e9)])
    around = np.concatenate([around.view(np.uint32), float_inputs("f32")])
    return around[: len(around) // 2 * 2]


def pair_code(name: str, high: float, low: float) -> int:
    return nearest_code(name, high) << (4 if name == "e2m1" else 8) | nearest_code(name, low)


def from_small(name: str, text: str, inputs: list[np.ndarray], target: str) -> np.ndarray:
    """Runs a conversion to or from a pair of codes, which for e2m1 is in 8 bits."""
    if name != "e2m1":
        return elementwise(text, inputs, np.uint16, target=target)
    text = (
        ".reg .b8 %c<4>; mov.b16 {{%c1, %c2}}, 0;" + text.replace("{d}", "%c0") + "mov.b16 {d}, {{%c0, %c1}};"
    )
    return elementwise(text, inputs, np.uint16, target=target)


@pytest.mark.parametrize("relu_suffix", ["", ".relu"])
@pytest.mark.parametrize("name", SMALL)
def test_to_small_floats(name: str, relu_suffix: str) -> None:
    target = "sm_90a" if name in ("e4m3", "e5m2") else "sm_100a"
    function = relu if relu_suffix else float
    a = small_inputs(name)
    b = np.random.default_rng(1).permutation(a)
    got = from_small(name, f"cvt.rn.satfinite{relu_suffix}.{name}x2.f32 {{d}}, {{a}}, {{b}};", [a, b], target)
    columns = zip(F32.values(a), F32.values(b), strict=True)
    assert got.tolist() == [pair_code(name, function(x), function(y)) for x, y in columns]
    if name in ("e4m3", "e5m2"):
        halves = np.arange(1 << 16, dtype=np.uint16)
        text = f"cvt.rn.satfinite{relu_suffix}.{name}x2.f16x2 {{d}}, {{a}};"
        got = elementwise(text, [halves.view(np.uint32)], np.uint16, target=target)
        expected = [nearest_code(name, function(value)) for value in F16.values(halves)]
        assert got.view(np.uint8).tolist() == expected


@pytest.mark.parametrize("relu_suffix", ["", ".relu"])
@pytest.mark.parametrize("name", SMALL)
def test_from_small_floats(name: str, relu_suffix: str) -> None:
    dtype, bits, _ = SMALL[name]
    a = np.arange(1 << 16, dtype=np.uint16) if bits == 8 else pairs_code_inputs(bits)
    text = f"cvt.rn{relu_suffix}.f16x2.{name}x2 {{d}}, {{a}};"
    if name == "e2m1":
        text = ".reg .b8 %c<4>; mov.b16 {{%c0, %c1}}, {a};" + text.replace("{a}", "%c0")
    got = elementwise(text, [a], target="sm_90a" if bits == 8 else "sm_100a")
    shift = 4 if bits == 4 else 8
    mask = (1 << bits) - 1
    values = np.arange(1 << bits, dtype=np.uint8).view(dtype).astype(np.float64)
    table = [F16.encode(relu(float(v)) if relu_suffix else float(v)) for v in values]
    assert got.tolist() == [table[code >> shift & mask] << 16 | table[code & mask] for code in a.tolist()]


def pairs_code_inputs(bits: int) -> np.ndarray:
    high, low = pairs_of(range(1 << bits), np.uint16)
    return high << (4 if bits == 4 else 8) | low


@pytest.mark.parametrize("mode", ["rz", "rp"])
@pytest.mark.parametrize("satfinite", [False, True], ids=["nan", "satfinite"])
def test_scales(mode: str, satfinite: bool) -> None:
    """A power of two below or above; the sign is ignored."""

    def code(value: float) -> int:
        if math.isnan(value) or (math.isinf(value) and not satfinite):
            return 0xFF
        if math.isinf(value):
            return 0xFE
        powers = [Fraction(2) ** (n - 127) for n in range(255)]
        below = [n for n, power in enumerate(powers) if power <= abs(Fraction(value))]
        n = below[-1] if below else 0
        if mode == "rp" and abs(Fraction(value)) > powers[n]:
            n += 1
        return min(n, 0xFE) if satfinite else n

    a = float_inputs("f32")[:150]
    b = np.random.default_rng(2).permutation(a)
    text = f"cvt.{mode}{'.satfinite' if satfinite else ''}.ue8m0x2"
    got = elementwise(f"{text}.f32 {{d}}, {{a}}, {{b}};", [a, b], np.uint16, target="sm_100a")
    columns = zip(F32.values(a), F32.values(b), strict=True)
    assert got.tolist() == [code(x) << 8 | code(y) for x, y in columns]
    pair = (a & 0xFFFF0000) | (b >> 16)
    got = elementwise(f"{text}.bf16x2 {{d}}, {{a}};", [pair], np.uint16, target="sm_100a")
    columns = zip(F32.values(pair & 0xFFFF0000), F32.values(pair << 16), strict=True)
    assert got.tolist() == [code(x) << 8 | code(y) for x, y in columns]


def test_from_scales() -> None:
    a = np.arange(1 << 16, dtype=np.uint16)
    got = elementwise("cvt.rn.bf16x2.ue8m0x2 {d}, {a};", [a], target="sm_100a")
    table = [BF16.encode(2.0 ** (n - 127)) for n in range(255)] + [0x7FFF]
    assert got.tolist() == [table[code >> 8] << 16 | table[code & 0xFF] for code in a.tolist()]


@pytest.mark.parametrize("result", ["u2", "s2", "u4", "s4", "u8", "s8", "u16", "s16"])
def test_pack(result: str) -> None:
    bits = int(result[1:])
    low, high = limits(result)
    rng = np.random.default_rng(bits)
    a, b = (random_bits(rng, COUNT, odd_integers(32), np.uint32) for _ in range(2))
    a[1::2] %= 300
    c = rng.integers(0, 2**32, COUNT, np.uint32)

    def clamped(value: int) -> int:
        return min(max(integer(value, "s32"), low), high) & ((1 << bits) - 1)

    if bits == 16:
        got = elementwise(f"cvt.pack.sat.{result}.s32 {{d}}, {{a}}, {{b}};", [a, b])
        expected = [clamped(x) << 16 | clamped(y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    else:
        got = elementwise(f"cvt.pack.sat.{result}.s32.b32 {{d}}, {{a}}, {{b}}, {{c}};", [a, b, c])
        expected = [
            (z << 2 * bits | clamped(x) << bits | clamped(y)) & 0xFFFFFFFF
            for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
        ]
    assert got.tolist() == expected


@settings(max_examples=25, deadline=None)
@given(values=st.lists(st.floats(width=64), min_size=1, max_size=40), mode=st.sampled_from(MODES))
def test_any_numbers(values: list[float], mode: str) -> None:
    a = np.array(values).view(np.uint64)
    for fmt in (F16, BF16, F32):
        check_floats(
            f"cvt.{mode}.{fmt.name}.f64", "f64", fmt, functools.partial(rounded, fmt=fmt, mode=mode), a
        )


@pytest.mark.parametrize(
    "name",
    [
        "cvt.f16.f32",
        "cvt.rn.f32.f16",
        "cvt.s32.f32",
        "cvt.rn.s32.f32",
        "cvt.f32.s32",
        "cvt.rs.f16x2.f32",
        "cvt.rn.u32.s32",
    ],
)
def test_what_is_refused(name: str) -> None:
    words = np.zeros(4, np.uint32)
    with pytest.raises(UnsupportedInstruction):
        elementwise(f"{name} {{d}}, {{a}};", [words])

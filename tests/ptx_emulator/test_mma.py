"""mma.sync against matrix products in float64, fragments laid out by the formulas of the PTX ISA."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch
from harness import run_kernel
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx_emulator.errors import UnsupportedInstruction

Place = Callable[[int, int], tuple[int, int]]


def a_place(bits: int, depth: int) -> Place:
    """(lane, i) -> row and column of a_i."""

    def place(lane: int, i: int) -> tuple[int, int]:
        group, thread = lane >> 2, lane % 4
        if bits == 32:
            return (group if i in (0, 2) else group + 8), (thread if i < 2 else thread + 4)
        if bits == 16:
            row = group if i < 2 or 4 <= i < 6 else group + 8
            return row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)
        row = group if i < 4 or 8 <= i < 12 else group + 8
        return row, thread * 4 + (i & 3) + (16 if i >= 8 else 0)

    return place


def b_place(bits: int) -> Place:
    """(lane, i) -> row and column of b_i."""

    def place(lane: int, i: int) -> tuple[int, int]:
        group, thread = lane >> 2, lane % 4
        if bits == 32:
            return thread + 4 * i, group
        if bits == 16:
            return thread * 2 + (i & 1) + (8 if i >= 2 else 0), group
        return thread * 4 + (i & 3) + (16 if i >= 4 else 0), group

    return place


def c_place(lane: int, i: int) -> tuple[int, int]:
    """(lane, i) -> row and column of c_i."""
    group, thread = lane >> 2, lane % 4
    return (group if i < 2 else group + 8), thread * 2 + (i & 1)


def fragments(matrix: np.ndarray, place: Place) -> np.ndarray:
    """[32, registers] words of a matrix of unsigned integers."""
    per_lane = matrix.size // 32
    lanes = np.zeros((32, per_lane), matrix.dtype)
    for lane in range(32):
        for i in range(per_lane):
            lanes[lane, i] = matrix[place(lane, i)]
    return lanes.view(np.uint32)


def matrix_of(words: np.ndarray, dtype: type) -> np.ndarray:
    """[16, 8] of the fragments of a result."""
    lanes = words.view(dtype)
    matrix = np.zeros((16, 8), dtype)
    for lane in range(32):
        for i in range(4):
            matrix[c_place(lane, i)] = lanes[lane, i]
    return matrix


def run_mma(name: str, a: np.ndarray, b: np.ndarray, c: np.ndarray, target: str = "sm_90a") -> np.ndarray:
    """D of one mma of bit patterns a [16, K], b [K, 8], c [16, 8], as bit patterns."""
    bits = 8 * a.itemsize
    pieces = [fragments(a, a_place(bits, a.shape[1])), fragments(b, b_place(bits)), fragments(c, c_place)]
    memory = np.ascontiguousarray(np.concatenate(pieces, axis=1))
    num_a, num_b, num_c = (piece.shape[1] for piece in pieces)
    out = np.zeros((32, num_c), np.uint32)
    result_type = np.int32 if ".s32." in name else np.float16 if c.itemsize == 2 else np.float32
    words = memory.shape[1]
    text = [f"mad.lo.u32 %r2, %r1, {4 * words}, 0;", "cvt.u64.u32 %rd5, %r2;", "add.u64 %rd5, %rd1, %rd5;"]
    text += [f"ld.global.u32 %r{10 + n}, [%rd5+{4 * n}];" for n in range(words)]
    names = [f"%r{10 + n}" for n in range(words)]
    groups = [names[:num_a], names[num_a : num_a + num_b], names[num_a + num_b :]]
    results = [f"%r{100 + n}" for n in range(num_c)]
    operands = ", ".join("{" + ", ".join(group) + "}" for group in [results, *groups])
    text += [f"{name} {operands};", f"mad.wide.u32 %rd6, %r1, {4 * num_c}, %rd2;"]
    text += [f"st.global.u32 [%rd6+{4 * n}], {result};" for n, result in enumerate(results)]
    run_kernel("\n".join(text), memory, out.view(result_type), target=target)
    return matrix_of(out, c.dtype.type)


FORMATS = {"f16": (np.float16, np.uint16), "bf16": (ml_dtypes.bfloat16, np.uint16)}
FORMATS |= {"e4m3": (ml_dtypes.float8_e4m3fn, np.uint8), "e5m2": (ml_dtypes.float8_e5m2, np.uint8)}
FORMATS |= {"tf32": (np.float32, np.uint32)}
SHAPES = [("f16", 8), ("f16", 16), ("bf16", 8), ("bf16", 16), ("tf32", 4), ("tf32", 8)]
SHAPES += [("e4m3", 16), ("e4m3", 32), ("e5m2", 16), ("e5m2", 32)]
FLOAT_CASES = [(element, depth, "f32") for element, depth in SHAPES] + [
    (element, depth, "f16") for element, depth in SHAPES if element not in ("bf16", "tf32")
]


def random_matrix(
    rng: np.random.Generator, shape: tuple[int, int], name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Bits, and the values they stand for in a product."""
    dtype, bits = FORMATS[name]
    words = rng.normal(0, 1, shape).astype(dtype).view(bits)
    used = words & np.uint32(0xFFFFE000) if name == "tf32" else words
    return words, used.view(dtype).astype(np.float64)


def c_of(rng: np.random.Generator, accumulator: str) -> tuple[np.ndarray, np.ndarray]:
    dtype, bits = (np.float16, np.uint16) if accumulator == "f16" else (np.float32, np.uint32)
    values = rng.normal(0, 2, (16, 8)).astype(dtype)
    return values.view(bits), values.astype(np.float64)


@pytest.mark.parametrize(("element", "depth", "accumulator"), FLOAT_CASES)
def test_floats(element: str, depth: int, accumulator: str) -> None:
    rng = np.random.default_rng(depth)
    a, a_values = random_matrix(rng, (16, depth), element)
    b, b_values = random_matrix(rng, (depth, 8), element)
    c, c_values = c_of(rng, accumulator)
    target = "sm_120a" if element[0] == "e" else "sm_90a"
    name = f"mma.sync.aligned.m16n8k{depth}.row.col.{accumulator}.{element}.{element}.{accumulator}"
    got = run_mma(name, a, b, c, target)
    expected = torch.from_numpy(a_values) @ torch.from_numpy(b_values) + torch.from_numpy(c_values)
    dtype = torch.float32 if accumulator == "f32" else torch.float16
    # The order of the sums in float64 may move a result across a rounding boundary.
    error = np.abs(
        got.view(np.float32 if accumulator == "f32" else np.float16).astype(np.float64) - expected.numpy()
    )
    half_unit = np.spacing(np.abs(expected.to(dtype).numpy())).astype(np.float64) / 2
    assert (error <= half_unit * 1.0001).all()


@pytest.mark.parametrize("depth", [16, 32])
@pytest.mark.parametrize("saturating", [False, True], ids=["wrapping", "satfinite"])
@pytest.mark.parametrize(("a_type", "b_type"), [("s8", "s8"), ("u8", "u8"), ("s8", "u8"), ("u8", "s8")])
def test_integers(a_type: str, b_type: str, saturating: bool, depth: int) -> None:
    rng = np.random.default_rng(depth)
    a = rng.integers(0, 256, (16, depth), np.uint8)
    b = rng.integers(0, 256, (depth, 8), np.uint8)
    ends = np.array([2**31 - 1, 2**31, 0, 5, 2**32 - 1], np.uint32)
    c = rng.choice(ends, (16, 8))
    values = [
        m.view(np.int8 if t == "s8" else np.uint8).astype(np.int64) for m, t in ((a, a_type), (b, b_type))
    ]
    expected = values[0] @ values[1] + c.view(np.int32)
    if saturating:
        expected = expected.clip(-(2**31), 2**31 - 1)
    suffix = ".satfinite" if saturating else ""
    got = run_mma(f"mma.sync.aligned.m16n8k{depth}.row.col{suffix}.s32.{a_type}.{b_type}.s32", a, b, c)
    np.testing.assert_array_equal(got, expected.astype(np.uint64).astype(np.uint32))


def test_mixed_fp8() -> None:
    rng = np.random.default_rng(1)
    a, a_values = random_matrix(rng, (16, 32), "e5m2")
    b, b_values = random_matrix(rng, (32, 8), "e4m3")
    c, c_values = c_of(rng, "f32")
    got = run_mma("mma.sync.aligned.m16n8k32.row.col.f32.e5m2.e4m3.f32", a, b, c, "sm_120a")
    expected = a_values @ b_values + c_values
    np.testing.assert_allclose(got.view(np.float32), expected, rtol=1e-6, atol=1e-6)


SMALL = {"e2m1": (ml_dtypes.float4_e2m1fn, 4, 2), "e2m3": (ml_dtypes.float6_e2m3fn, 6, 0)}
SMALL |= {"e3m2": (ml_dtypes.float6_e3m2fn, 6, 0), "e4m3": (ml_dtypes.float8_e4m3fn, 8, 0)}


@pytest.mark.parametrize("a_type", SMALL)
@pytest.mark.parametrize("b_type", SMALL)
def test_small_floats(a_type: str, b_type: str) -> None:
    """kind::f8f6f4: four bits stand in the middle of a byte, six at its low end."""
    rng = np.random.default_rng(2)
    words, values = [], []
    for name, shape in ((a_type, (16, 32)), (b_type, (32, 8))):
        dtype, bits, shift = SMALL[name]
        codes = rng.integers(0, 1 << bits, shape, np.uint8)
        codes[codes == 0x7F] = codes[codes == 0xFF] = 0
        words.append(codes << shift)
        values.append(codes.view(dtype).astype(np.float64))
    c, c_values = c_of(rng, "f32")
    name = f"mma.sync.aligned.kind::f8f6f4.m16n8k32.row.col.f32.{a_type}.{b_type}.f32"
    got = run_mma(name, *words, c, "sm_120a")
    np.testing.assert_allclose(got.view(np.float32), values[0] @ values[1] + c_values, rtol=1e-6, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(
    row=st.integers(0, 15), depth=st.integers(0, 15), column=st.integers(0, 7), bits=st.integers(0, 0xFFFF)
)
def test_odd_value_reaches_its_row(row: int, depth: int, column: int, bits: int) -> None:
    """One element of A against the unit vector of its column: exact, NaN and infinities included."""
    a, b = np.zeros((16, 16), np.uint16), np.zeros((16, 8), np.uint16)
    a[row, depth], b[depth, column] = bits, 0x3C00
    got = run_mma("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", a, b, np.zeros((16, 8), np.uint32))
    value = a.view(np.float16)[row, depth].astype(np.float32)
    expected = np.zeros((16, 8), np.float32)
    expected[row, :] = 0 if np.isfinite(value) else np.nan  # times the zeros beside the one
    expected[row, column] = value + np.float32(0)
    np.testing.assert_array_equal(got.view(np.float32), expected)
    if np.isnan(value):
        assert got[row, column] == 0x7FFFFFFF


@pytest.mark.parametrize(
    "name",
    [
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.bf16.f32",
        "mma.sync.aligned.m16n8k8.row.col.f32.e4m3.e4m3.f32",
        "mma.sync.aligned.m16n8k16.row.row.f32.f16.f16.f32",
        "mma.sp.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
        "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64",
    ],
)
def test_what_is_refused(name: str) -> None:
    a, b = np.zeros((16, 16), np.uint16), np.zeros((16, 8), np.uint16)
    with pytest.raises(UnsupportedInstruction):
        run_mma(name, a, b, np.zeros((16, 8), np.uint32))


def test_flops_are_counted() -> None:
    words = ", ".join(["%r1"] * 4)
    text = f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{%f1, %f2, %f3, %f4}}, {{{words}}}, "
    text += "{%r1, %r1}, {%f1, %f2, %f3, %f4};"
    zero = "".join(f"mov.f32 %f{n}, 0f00000000;" for n in range(1, 5))
    result = run_kernel(zero + text, block=(64, 1, 1))
    assert result.counts[0]["mma_flops"] == 2 * 2 * 16 * 8 * 16

"""Atomic operations against exact integers, numpy and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from aligned import aligned, poisoned
from harness import run_kernel
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx_emulator.errors import EmulatorError

LANES = 32
rng = np.random.default_rng(21)

SHARED = """
mov.u32 %r5, smem; mad.lo.u32 %r6, %r1, {size}, %r5; ld.global.b{bits} {reg}1, [%rd6];
st.shared.b{bits} [%r6], {reg}1;
"""


def run_scalar(
    operation: str, bits: int, memory: np.ndarray, sources: np.ndarray, others: np.ndarray, space: str
) -> tuple[np.ndarray, np.ndarray]:
    """Memory afterwards and the old values, each lane on an element of its own."""
    reg = {16: "%rs", 32: "%r2", 64: "%rd2", 128: "%rq"}[bits]
    size = bits // 8
    arrays = [aligned(a) for a in (memory, sources, others)]
    old = poisoned(memory.shape, memory.dtype)
    body = f"mul.wide.u32 %rd5, %r1, {size};"
    body += "".join(f"add.u64 %rd{5 + n}, %rd{n}, %rd5;" for n in range(1, 5))
    body += f"ld.global.b{bits} {reg}2, [%rd7]; ld.global.b{bits} {reg}3, [%rd8];"
    operands = f"{reg}2" + (f", {reg}3" if operation.startswith("cas") else "")
    if space == "shared":
        body += SHARED.format(size=size, bits=bits, reg=reg)
        body += f"atom.shared.{operation} {reg}4, [%r6], {operands};"
        body += f"ld.shared.b{bits} {reg}5, [%r6]; st.global.b{bits} [%rd6], {reg}5;"
    elif space == "generic-shared":
        body += SHARED.format(size=size, bits=bits, reg=reg)
        body += "cvt.u64.u32 %rd11, %r6; cvta.shared.u64 %rd12, %rd11;"
        body += f"atom.{operation} {reg}4, [%rd12], {operands};"
        body += f"ld.b{bits} {reg}5, [%rd12]; st.global.b{bits} [%rd6], {reg}5;"
    else:
        body += f"atom.global.{operation} {reg}4, [%rd6], {operands};"
    body += f"st.global.b{bits} [%rd9], {reg}4;"
    run_kernel(body, *arrays, old, shared_bytes=LANES * size)
    return arrays[0], old


def signed(x: int, bits: int) -> int:
    return x - (1 << bits) if x >> (bits - 1) else x


INTEGERS = {
    "add.u32": lambda a, b, c: a + b,
    "add.s32": lambda a, b, c: a + b,
    "add.u64": lambda a, b, c: a + b,
    "and.b32": lambda a, b, c: a & b,
    "and.b64": lambda a, b, c: a & b,
    "or.b32": lambda a, b, c: a | b,
    "or.b64": lambda a, b, c: a | b,
    "xor.b32": lambda a, b, c: a ^ b,
    "xor.b64": lambda a, b, c: a ^ b,
    "exch.b32": lambda a, b, c: b,
    "exch.b64": lambda a, b, c: b,
    "cas.b16": lambda a, b, c: c if a == b else a,
    "cas.b32": lambda a, b, c: c if a == b else a,
    "cas.b64": lambda a, b, c: c if a == b else a,
    "min.u32": lambda a, b, c: min(a, b),
    "max.u64": lambda a, b, c: max(a, b),
    "min.s32": lambda a, b, c: min(a, b, key=lambda x: signed(x, 32)),
    "max.s32": lambda a, b, c: max(a, b, key=lambda x: signed(x, 32)),
    "min.s64": lambda a, b, c: min(a, b, key=lambda x: signed(x, 64)),
    "max.s64": lambda a, b, c: max(a, b, key=lambda x: signed(x, 64)),
    "max.u32": lambda a, b, c: max(a, b),
    "min.u64": lambda a, b, c: min(a, b),
    "inc.u32": lambda a, b, c: 0 if a >= b else a + 1,
    "dec.u32": lambda a, b, c: b if a == 0 or a > b else a - 1,
}


@pytest.mark.parametrize("space", ["global", "shared", "generic-shared"])
@pytest.mark.parametrize("operation", INTEGERS)
def test_integers(operation: str, space: str) -> None:
    bits = int(operation[-2:])
    dtype = np.dtype(f"u{bits // 8}")
    edges = np.array([0, 1, 2, 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2**bits - 1], dtype)
    a = rng.choice(np.concatenate([edges, rng.integers(0, 2**bits, 6, dtype=dtype)]), LANES)
    b = np.where(rng.random(LANES) < 0.4, a, rng.choice(edges, LANES))
    c = rng.integers(0, 2**bits, LANES, dtype=dtype)
    after, old = run_scalar(operation, bits, a, b, c, space)
    exact = [INTEGERS[operation](int(x), int(y), int(z)) % 2**bits for x, y, z in zip(a, b, c, strict=True)]
    np.testing.assert_array_equal(old, a)
    np.testing.assert_array_equal(after, np.array(exact, dtype))


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("operation", ["exch.b128", "cas.b128"])
def test_128_bits(operation: str, space: str) -> None:
    a, c = (rng.integers(0, 2**63, (LANES, 2), dtype=np.uint64) for _ in range(2))
    b = a.copy()
    b[::2, 1] ^= 1 << 40
    after, old = run_scalar(operation, 128, a, b, c, space)
    np.testing.assert_array_equal(old, a)
    expected = b if operation == "exch.b128" else np.where((a == b).all(1, keepdims=True), c, a)
    np.testing.assert_array_equal(after, expected)


def canonical(values: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(values), np.uint32(0x7FFFFFFF).view(np.float32), values).view(np.uint32)


def flushed(values: np.ndarray) -> np.ndarray:
    tiny = np.abs(values) < np.finfo(np.float32).tiny
    return np.where(tiny, np.copysign(np.float32(0), values), values)


ODD_FLOATS = [
    0.0,
    -0.0,
    1e-40,
    -1e-40,
    1.2e-38,
    -1.1754944e-38,
    1.0,
    -1.0,
    3e38,
    -3e38,
    np.inf,
    -np.inf,
    np.nan,
]


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("space", ["global", "shared"])
def test_add_f32(space: str, seed: int) -> None:
    pick = np.random.default_rng(seed)
    a, b = (pick.choice(np.array(ODD_FLOATS, np.float32), LANES) for _ in range(2))
    a[:8], b[:8] = pick.standard_normal((2, 8)).astype(np.float32)
    after, old = run_scalar("add.f32", 32, a, b, b, space)
    with np.errstate(all="ignore"):
        expected = flushed(flushed(a) + flushed(b)) if space == "global" else a + b
    np.testing.assert_array_equal(after.view(np.uint32), canonical(expected))
    np.testing.assert_array_equal(old.view(np.uint32), a.view(np.uint32))


def test_add_f64() -> None:
    a, b = rng.standard_normal((2, LANES))
    after, _ = run_scalar("add.f64", 64, a, b, b, "global")
    np.testing.assert_array_equal(after, a + b)


def halves(count: int, dtype: torch.dtype) -> torch.Tensor:
    odd = [0.0, -0.0, 6e-8, -6e-8, 6e-5, 1.0, -1.0, 2048.0, 1.0009765625, 65504.0, -65504.0]
    odd += [float("inf"), -float("inf"), float("nan"), 0.333, 1e-3]
    picked = torch.tensor(odd)[torch.from_numpy(rng.integers(0, len(odd), count))]
    return picked.to(dtype)


def half_result(operation: str, a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    if operation == "add":
        result = (a.double() + b.double()).to(a.dtype)
    else:
        order = torch.where((a == 0) & (b == 0), torch.signbit(b).long() - torch.signbit(a).long(), 0)
        less = (a < b) | ((a == b) & (order < 0))
        result = torch.where(less == (operation == "min"), a, b)
        result = torch.where(a.isnan(), b, torch.where(b.isnan(), a, result))
    bits = result.view(torch.int16).numpy().view(np.uint16)
    return np.where(result.isnan().numpy(), np.uint16(0x7FFF), bits)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("operation", "vector"), [("add", 1), ("add", 2), ("min", 2), ("max", 4), ("add", 8)]
)
def test_halves(operation: str, vector: int, packed: bool, kind: str) -> None:
    if packed and vector == 8:
        pytest.skip("at most four packed pairs")
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    count = LANES * vector * (2 if packed else 1)
    a, b = halves(count, dtype), halves(count, dtype)
    size = count * 2 // LANES
    memory, sources = (aligned(x.view(torch.int16).numpy().view(np.uint8)) for x in (a, b))
    bits, reg = (32, "%r") if packed else (16, "%rs")
    names = [f"{reg}{20 + n}" for n in range(vector)]
    body = f"mul.wide.u32 %rd5, %r1, {size}; add.u64 %rd6, %rd1, %rd5; add.u64 %rd7, %rd2, %rd5;"
    body += "".join(f"ld.global.b{bits} {name}, [%rd7+{n * bits // 8}];" for n, name in enumerate(names))
    type_name = kind + ("x2" if packed else "")
    if vector > 1:
        body += (
            f"red.relaxed.gpu.global.{operation}.noftz.v{vector}.{type_name} [%rd6], {{{', '.join(names)}}};"
        )
    else:
        body += f"red.global.{operation}.noftz.{type_name} [%rd6], {names[0]};"
    run_kernel(body, memory, sources)
    expected = half_result(operation, a, b)
    got = memory.view(np.uint16)
    nan = np.isnan(torch.from_numpy(got.view(np.int16)).view(dtype).float().numpy())
    np.testing.assert_array_equal(np.where(nan, np.uint16(0x7FFF), got), expected)


@pytest.mark.parametrize("vector", [2, 4])
def test_vectors_of_f32(vector: int) -> None:
    a, b = (aligned(rng.standard_normal(LANES * vector).astype(np.float32)) for _ in range(2))
    expected = a + b
    before = a.copy()
    old = poisoned(a.shape, np.float32)
    names = "{" + ", ".join(f"%f{n}" for n in range(vector)) + "}"
    olds = "{" + ", ".join(f"%f{n + 10}" for n in range(vector)) + "}"
    body = f"mul.wide.u32 %rd5, %r1, {4 * vector};" + "".join(
        f"add.u64 %rd{n + 5}, %rd{n}, %rd5;" for n in (1, 2, 3)
    )
    body += f"ld.global.v{vector}.f32 {names}, [%rd7];"
    body += f"atom.global.add.v{vector}.f32 {olds}, [%rd6], {names}; st.global.v{vector}.f32 [%rd8], {olds};"
    run_kernel(body, a, b, old)
    np.testing.assert_array_equal(a, expected)
    np.testing.assert_array_equal(old, before)


def test_one_location_over_all_clusters() -> None:
    counter = aligned(np.zeros(1, np.uint32))
    tickets = poisoned(16 * 64, np.uint32)
    body = """
    atom.global.add.u32 %r5, [%rd1], 1; mul.wide.u32 %rd5, %r5, 4; add.u64 %rd6, %rd2, %rd5;
    st.global.b32 [%rd6], %r5;
    """
    run_kernel(body, counter, tickets, grid=(16, 1, 1), block=(64, 1, 1))
    assert counter[0] == 16 * 64
    np.testing.assert_array_equal(tickets, np.arange(16 * 64))


def test_lock_over_clusters() -> None:
    """compare-and-swap, exchange and fences guard a plain counter."""
    lock, counter = aligned(np.zeros(1, np.uint32)), aligned(np.zeros(1, np.uint32))
    body = """
    setp.ne.u32 %p1, %r1, 0; @%p1 bra DONE;
    TAKE: atom.acquire.gpu.global.cas.b32 %r5, [%rd1], 0, 1; setp.ne.u32 %p2, %r5, 0; @%p2 bra TAKE;
    ld.global.b32 %r6, [%rd2]; add.u32 %r6, %r6, 1; st.global.b32 [%rd2], %r6;
    atom.release.gpu.global.exch.b32 %r7, [%rd1], 0;
    DONE:
    """
    run_kernel(body, lock, counter, grid=(8, 1, 1), block=(96, 1, 1))
    assert counter[0] == 8
    assert lock[0] == 0


@pytest.mark.parametrize(
    "instruction",
    [
        "atom.global.add.f16 %rs1, [%rd1], %rs2",
        "atom.global.max.f32 %f1, [%rd1], %f2",
        "red.global.exch.b32 [%rd1], %r2",
        "red.acquire.gpu.global.add.u32 [%rd1], %r2",
        "atom.shared.add.v2.f32 {%f1, %f2}, [%rd1], {%f3, %f4}",
        "atom.local.add.u32 %r2, [%rd1], %r2",
        "atom.global.add.u32 %rd2, [%rd1], %r2",
        "atom.global.cas.b32 %r2, [%rd1], %r2",
    ],
)
def test_forms_that_do_not_exist(instruction: str) -> None:
    with pytest.raises(EmulatorError, match="not supported"):
        run_kernel(instruction + ";", np.zeros(32, np.uint32))


def test_misaligned() -> None:
    data = aligned(np.zeros(64, np.uint32))
    result = run_kernel("atom.global.add.u64 %rd5, [%rd1+4], 1;", data, expect_reports=True)
    assert [str(report.kind) for report in result.reports] == ["misaligned"]
    np.testing.assert_array_equal(data, 0)

"""wgmma.mma_async of every type, major-ness and swizzle against numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from harness import run_kernel
from matrix_layouts import OPERANDS, copy_image, encode, place
from ptx_emulator.errors import UnsupportedInstruction
from tcgen05_problem import accumulator_bits, accumulator_values, random_values

DEPTH = {"f16": 16, "bf16": 16, "tf32": 8, "e4m3": 32, "e5m2": 32, "u8": 32, "s8": 32}
ACCUMULATORS = {"f16": np.float16, "f32": np.float32, "s32": np.int32}
M, THREADS = 64, 128


@dataclass(frozen=True)
class Problem:
    """D[m, n] = A[m, k] * B[n, k] (+ D)."""

    a: str = "f16"
    b: str = "f16"
    d: str = "f32"
    n: int = 64
    a_mode: str = "128B"
    b_mode: str = "128B"
    a_mn_major: bool = False
    b_mn_major: bool = False
    a_in_registers: bool = False
    gap: int = 0
    accumulate: bool = True
    scale_a: int = 1
    scale_b: int = 1
    saturate: bool = False

    @property
    def k(self) -> int:
        return DEPTH[self.a]

    @property
    def tail(self) -> str:
        """The literals after scale-d."""
        if self.d == "s32":
            return ""
        text = f", {self.scale_a}, {self.scale_b}"
        if self.a in ("f16", "bf16"):
            text += "" if self.a_in_registers else f", {int(self.a_mn_major)}"
            text += f", {int(self.b_mn_major)}"
        return text


def fragment_d(values: np.ndarray, d: str) -> np.ndarray:
    """[64, n] values as registers [thread, register], by the loops of the manual."""
    n = values.shape[1]
    bits = accumulator_bits(values, d)
    halves = d == "f16"
    out = np.zeros((THREADS, n // 4 if halves else n // 2), dtype=np.uint32)
    for thread in range(THREADS):
        warp, lane = divmod(thread, 32)
        for index in range(n // 2):
            row = 16 * warp + lane // 4 + (8 if index & 2 else 0)
            column = (index // 4) * 8 + (lane % 4) * 2 + (index & 1)
            if halves:
                out[thread, index // 2] |= bits[row, column] << (16 * (index & 1))
            else:
                out[thread, index] = bits[row, column]
    return out


def unfragment_d(registers: np.ndarray, n: int, d: str) -> np.ndarray:
    places = fragment_places(n)
    values = np.zeros((M, n))
    for thread in range(THREADS):
        for index in range(n // 2):
            word = registers[thread, index // 2 if d == "f16" else index]
            half = np.array([word >> (16 * (index & 1)) if d == "f16" else word], dtype=np.uint32)
            values[places[thread, index]] = accumulator_values(half, d)[0]
    return values


def fragment_places(n: int) -> dict[tuple[int, int], tuple[int, int]]:
    return {
        (thread, index): (
            16 * (thread // 32) + thread % 32 // 4 + (8 if index & 2 else 0),
            (index // 4) * 8 + (thread % 4) * 2 + (index & 1),
        )
        for thread in range(THREADS)
        for index in range(n // 2)
    }


def fragment_a(values: np.ndarray, element: str) -> np.ndarray:
    """[64, k] values as four registers of each thread.

    With e elements in a register, element i of a thread is in row lane / 4 + 8 * (i / e % 2) and column
    e * (lane % 4) + i % e + 4 * e * (i / (2 * e)).
    """
    codes = encode(values, element)
    size = codes.shape[-1]
    per = 4 // size
    out = np.zeros((THREADS, 4, per, size), dtype=np.uint8)
    for thread in range(THREADS):
        warp, lane = divmod(thread, 32)
        for i in range(4 * per):
            row = 16 * warp + lane // 4 + 8 * (i // per % 2)
            column = per * (lane % 4) + i % per + 4 * per * (i // (2 * per))
            out[thread, i // per, i % per] = codes[row, column]
    return out.reshape(THREADS, 16).view(np.uint32)


def body(p: Problem, image_bytes: int, a_descriptor: int, b_descriptor: int) -> str:
    count = p.n // 4 if p.d == "f16" else p.n // 2
    registers = ", ".join(f"%q{n}" for n in range(count))
    loads = "\n".join(f"ld.global.b32 %q{n}, [%rd5+{4 * n}];" for n in range(count))
    stores = "\n".join(f"st.global.b32 [%rd5+{4 * n}], %q{n};" for n in range(count))
    a = "{%r20, %r21, %r22, %r23}" if p.a_in_registers else "%ad"
    types = f"{'satfinite.' if p.saturate else ''}{p.d}.{p.a}.{p.b}"
    return f"""
    .reg .b32 %q<{count}>, %n, %mbar;
    .reg .b64 %ad, %bd, %step;
    .reg .pred %more, %scale;
    mov.b32 %mbar, smem;
    {copy_image("%rd1", image_bytes)}
    mad.wide.u32 %rd5, %r1, {4 * count}, %rd2;
    {loads}
    mad.wide.u32 %rd6, %r1, 16, %rd3;
    ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [%rd6];
    shr.u32 %n, %mbar, 4;  // dynamic shared memory begins beyond address 0 on a GPU
    cvt.u64.u32 %step, %n;
    add.u64 %ad, %step, {a_descriptor};
    add.u64 %bd, %step, {b_descriptor};
    setp.ne.u32 %scale, {int(p.accumulate)}, 0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n{p.n}k{p.k}.{types} {{{registers}}}, {a}, %bd, %scale{p.tail};
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    {stores}
    """


def check(p: Problem) -> None:
    rng = np.random.default_rng(1)
    a, b = random_values(p.a, (M, p.k), rng), random_values(p.b, (p.n, p.k), rng)
    d = rng.normal(size=(M, p.n)) * (2.0**31 if p.saturate else 1000 if p.d == "s32" else 1)
    if p.d == "s32":
        d = np.clip(np.round(d), -(2.0**31), 2.0**31 - 1)
    d = accumulator_values(accumulator_bits(d, p.d), p.d)
    a_place = place(a, p.a, p.a_mode, p.a_mn_major, gap=p.gap)
    b_place = place(b, p.b, p.b_mode, p.b_mn_major, gap=p.gap)
    a_bytes = -(-len(a_place.data) // 1024) * 1024
    image = np.zeros(-(-(a_bytes + len(b_place.data)) // 2048) * 2048, dtype=np.uint8)
    image[: len(a_place.data)] = a_place.data
    image[a_bytes : a_bytes + len(b_place.data)] = b_place.data
    registers = fragment_d(d, p.d)
    text = body(
        p,
        len(image),
        a_place.wgmma_descriptor(OPERANDS),
        b_place.wgmma_descriptor(OPERANDS + a_bytes),
    )
    run_kernel(
        text,
        image,
        registers.view(np.dtype(ACCUMULATORS[p.d])),
        fragment_a(a, p.a),
        block=(THREADS, 1, 1),
        target="sm_90a",
        shared_bytes=OPERANDS + len(image),
    )
    kept = d if p.accumulate else 0 * d
    expected = a @ b.T * p.scale_a * p.scale_b + kept
    bound = (np.abs(a) @ np.abs(b).T + np.abs(kept)) * (p.k + 1) * 2.0**-24
    if p.d == "f16":
        bound += np.abs(expected) * 2.0**-11 + 2.0**-24
    if p.d == "s32":
        bound *= 0
        if p.saturate:
            expected = np.clip(expected, -(2.0**31), 2.0**31 - 1)
    actual = unfragment_d(registers, p.n, p.d)
    error = np.abs(actual - expected)
    assert (error <= bound).all(), f"{(error > bound).sum()} of {error.size} elements are wrong"


MODES = ("none", "32B", "64B", "128B")


@pytest.mark.parametrize("gap", [0, 1024])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("a", ["f16", "tf32", "e4m3", "s8"])
def test_k_major(a: str, mode: str, gap: int) -> None:
    check(Problem(a=a, b=a, d="s32" if a == "s8" else "f32", a_mode=mode, b_mode=mode, gap=gap))


@pytest.mark.parametrize("gap", [0, 1024])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("a_mn", "b_mn"), [(True, False), (False, True), (True, True)])
def test_mn_major(a_mn: bool, b_mn: bool, mode: str, gap: int) -> None:
    check(Problem(a="bf16", b="bf16", a_mode=mode, b_mode=mode, a_mn_major=a_mn, b_mn_major=b_mn, gap=gap))


@pytest.mark.parametrize("a", ["f16", "bf16", "tf32", "e4m3", "e5m2", "u8"])
def test_a_in_registers(a: str) -> None:
    check(Problem(a=a, b=a, d="s32" if a == "u8" else "f32", a_in_registers=True))


@pytest.mark.parametrize("n", [8, 24, 128, 256])
@pytest.mark.parametrize("d", ["f16", "f32"])
def test_columns(n: int, d: str) -> None:
    check(Problem(n=n, d=d))


@pytest.mark.parametrize(
    "problem",
    [
        Problem(accumulate=False),
        Problem(scale_a=-1),
        Problem(scale_a=-1, scale_b=-1),
        Problem(scale_b=-1, a="e5m2", b="e4m3", d="f16"),
        Problem(a="u8", b="s8", d="s32"),
        Problem(a="s8", b="s8", d="s32", saturate=True),
        Problem(a="s8", b="s8", d="s32", saturate=True, accumulate=False),
        Problem(a_in_registers=True, b_mn_major=True),
    ],
    ids=str,
)
def test_modifiers(problem: Problem) -> None:
    check(problem)


@pytest.mark.parametrize(
    ("instruction", "target"),
    [
        ("wgmma.fence.sync.aligned;", "sm_100a"),
        ("wgmma.wait_group.sync.aligned 9;", "sm_90a"),
        (
            "wgmma.mma_async.sp.sync.aligned.m64n8k32.f32.f16.f16 {%f1}, %rd1, %rd2, %r1, 0, %p1;",
            "sm_90a",
        ),
        ("wgmma.mma_async.sync.aligned.m64n8k256.s32.b1.b1.and.popc {%r2}, %rd1, %rd2, %p1;", "sm_90a"),
        ("wgmma.mma_async.sync.aligned.m64n12k16.f32.f16.f16 {%f1}, %rd1, %rd2, %p1, 1, 1, 0, 0;", "sm_90a"),
        ("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f1}, %rd1, %rd2, %p1, 1, 1, 0, 0;", "sm_90a"),
        ("wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {%f1}, %rd1, %rd2, %p1, 1, 2;", "sm_90a"),
    ],
)
def test_refused(instruction: str, target: str) -> None:
    with pytest.raises(UnsupportedInstruction):
        run_kernel(instruction, target=target)


def test_missing_fence_and_early_reuse_of_an_operand() -> None:
    """Shared memory is overwritten while the product may still read it."""
    body = """
    mov.b32 %r2, smem;
    shr.u32 %r3, %r2, 4; cvt.u64.u32 %rd5, %r3;
    mad.lo.u32 %r2, %r1, 16, %r2;
    st.shared.v4.b32 [%r2], {0, 0, 0, 0};
    bar.warp.sync -1;
    fence.proxy.async.shared::cta;
    add.u64 %rd5, %rd5, 1;
    setp.eq.u32 %p1, 0, 1;
    WGMMA
    st.shared.b32 [%r2], 1;
    wgmma.wait_group.sync.aligned 0;
    """.replace(
        "WGMMA",
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f1, %f2, %f3, %f4}, %rd5, %rd5, %p1, "
        "1, 1, 0, 0; "
        "wgmma.commit_group.sync.aligned;",
    )
    result = run_kernel(body, block=(32, 1, 1), target="sm_90a", shared_bytes=4096, expect_reports=True)
    kinds = {report.kind for report in result.reports}
    assert kinds >= {"race", "barrier"}

"""tcgen05.mma of every kind, major-ness and swizzle against numpy."""

from __future__ import annotations

import pytest
from harness import run_kernel
from ptx_emulator.errors import UnsupportedInstruction
from tcgen05_problem import Problem, check

MODES = ("none", "32B", "64B", "128B")


def named(*problems: Problem) -> list[object]:
    def name(p: Problem) -> str:
        major = f"{'mn' if p.a_mn_major else 'k'}{'mn' if p.b_mn_major else 'k'}"
        place = "tmem" if p.a_in_tmem else p.a_mode
        return f"{p.a}-{p.b}-{p.d}-cg{p.group}-{p.m}x{p.n}-{place}-{p.b_mode}-{major}-gap{p.gap}"

    return [pytest.param(p, id=name(p)) for p in problems]


@pytest.mark.parametrize(
    "problem",
    named(
        *(
            Problem(a=a, b=a, d="s32" if a == "s8" else "f32", a_mode=mode, b_mode=mode, gap=gap, m=64, n=24)
            for a in ("f16", "tf32", "e4m3", "s8")
            for mode in MODES
            for gap in (0, 1024)
        )
    ),
)
def test_k_major(problem: Problem) -> None:
    check(problem)


@pytest.mark.parametrize(
    "problem",
    named(
        *(
            Problem(a="bf16", b="bf16", a_mode=mode, b_mode=mode, a_mn_major=ma, b_mn_major=mb, gap=gap, n=64)
            for mode in MODES
            for ma, mb in ((True, False), (False, True), (True, True))
            for gap in (0, 1024)
        ),
        *(
            Problem(a="e5m2", b="e4m3", a_mode=mode, b_mode=mode, a_mn_major=True, b_mn_major=True, n=128)
            for mode in MODES
        ),
        Problem(
            a="tf32", b="tf32", a_mode="128B_32B", b_mode="128B_32B", a_mn_major=True, b_mn_major=True, n=32
        ),
        Problem(
            a="tf32",
            b="tf32",
            a_mode="128B_32B",
            b_mode="128B_32B",
            a_mn_major=True,
            b_mn_major=True,
            n=32,
            gap=512,
        ),
        Problem(a="f16", b="f16", a_mode="128B_32B", b_mode="128B", a_mn_major=True, n=32),
    ),
)
def test_mn_major(problem: Problem) -> None:
    check(problem)


@pytest.mark.parametrize(
    "problem",
    named(
        *(Problem(m=m, n=n, group=1) for m, n in ((64, 8), (64, 256), (128, 16), (128, 256))),
        *(Problem(m=m, n=n, group=2) for m, n in ((128, 32), (128, 256), (256, 32), (256, 256))),
        *(Problem(a=a, b=a, m=m, n=64, group=2, b_mn_major=True) for a in ("bf16",) for m in (128, 256)),
        *(Problem(a="e4m3", b="e5m2", m=m, n=64, group=2, a_mode="64B", b_mode="32B") for m in (128, 256)),
        Problem(m=64, d_lane=16),
    ),
)
def test_shapes(problem: Problem) -> None:
    check(problem)


@pytest.mark.parametrize(
    "problem",
    named(
        *(
            Problem(a=a, b=a, m=m, n=64, group=group, a_in_tmem=True, d="s32" if a == "u8" else "f32")
            for a in ("f16", "bf16", "tf32", "e4m3", "u8")
            for group in (1, 2)
            for m in (64 * group, 128 * group)
        ),
        Problem(m=64, n=64, a_in_tmem=True, a_lane=16),
        Problem(m=64, n=64, a_in_tmem=True, d_lane=16),
    ),
)
def test_a_in_tensor_memory(problem: Problem) -> None:
    check(problem)


@pytest.mark.parametrize(
    "problem",
    named(
        *(
            Problem(a=a, b=b, n=16)
            for a, b in (("f16", "bf16"), ("e4m3", "e2m1"), ("e2m3", "e3m2"), ("e2m1", "e5m2"))
        ),
        Problem(a="e2m1", b="e2m3", m=64, a_mn_major=True, b_mn_major=True, n=128),
        *(Problem(a=a, b=b, d="s32") for a, b in (("u8", "s8"), ("s8", "u8"), ("u8", "u8"))),
        *(Problem(a=a, b=a, d="f16", m=m) for a in ("f16", "e4m3") for m in (64, 128)),
    ),
)
def test_types(problem: Problem) -> None:
    check(problem)


@pytest.mark.parametrize(
    "problem",
    [
        Problem(accumulate=False),
        Problem(accumulate=False, d="f16"),
        Problem(negate_a=True),
        Problem(negate_b=True),
        Problem(negate_a=True, negate_b=True),
        Problem(scale=3),
        Problem(scale=0),
        Problem(scale=15, a="tf32", b="tf32"),
        Problem(a="s8", b="s8", d="s32", saturate=True),
        Problem(a="s8", b="s8", d="s32", saturate=True, accumulate=False),
        Problem(disabled=(0xFF00FF00, 0, 1, 0x80000000)),
        Problem(disabled=(0, 0, 0, 0)),
        Problem(disabled=(0, 5, 0, 0, 0xFFFFFFFF, 0, 3, 0), group=2, m=256),
        Problem(disabled=(0, 5, 0, 0, 0xFFFFFFFF, 0, 3, 0), group=2, m=128),
        Problem(modifiers=".collector::a::fill"),
    ],
    ids=str,
)
def test_modifiers(problem: Problem) -> None:
    check(problem)


@pytest.mark.parametrize(
    "instruction",
    [
        "tcgen05.mma.ws.cta_group::1.kind::f16 [%r2], %rd1, %rd2, %r3, %p1;",
        "tcgen05.mma.sp.cta_group::1.kind::f16 [%r2], %rd1, %rd2, [%r4], %r3, %p1;",
        "tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale [%r2], %rd1, %rd2, %r3, [%r4], [%r5], %p1;",
        "tcgen05.mma.cta_group::1.kind::f16.ashift [%r2], [%r4], %rd2, %r3, %p1;",
        "tcgen05.mma.cta_group::1.kind::f8f6f4 [%r2], %rd1, %rd2, %r3, %p1, 3;",
        "tcgen05.mma.cta_group::1.kind::f16 [%r2], %rd1, %rd2, %r3, %p1, 16;",
        "tcgen05.mma.cta_group::2.kind::f16 [%r2], %rd1, %rd2, %r3, {%r4, %r4, %r4, %r4}, %p1;",
        "tcgen05.mma.kind::f16 [%r2], %rd1, %rd2, %r3, %p1;",
        "tcgen05.shift.cta_group::1.down [%r2];",
        "tcgen05.cp.cta_group::1.128x256b.b8x16.b4x16_p64 [%r2], %rd1;",
        "tcgen05.cp.cta_group::1.64x128b [%r2], %rd1;",
        "tcgen05.ld.sync.aligned.16x256b.x64.b32 {%r2}, [%r3];",
        "tcgen05.ld.sync.aligned.32x32b.x2.b32 {%r2}, [%r3];",
        "tcgen05.ld.sync.aligned.16x32bx2.x1.b32 {%r2}, [%r3];",
    ],
)
def test_refused(instruction: str) -> None:
    with pytest.raises(UnsupportedInstruction):
        run_kernel(instruction, target="sm_100a")


def test_tensor_memory_needs_sm_100() -> None:
    with pytest.raises(UnsupportedInstruction):
        run_kernel("tcgen05.wait::ld.sync.aligned;", target="sm_90a")

"""Operations across the lanes of a warp, against definitions on Python integers."""

import numpy as np
import pytest
from harness import run_kernel
from hypothesis import given, settings
from hypothesis import strategies as st

ALL = 0xFFFFFFFF
LANES = np.arange(32, dtype=np.uint32)


def per_lane(values: list[int] | np.ndarray, dtype: type = np.uint32) -> np.ndarray:
    return np.array(values, dtype=dtype)


def shuffled(mode: str, a: np.ndarray, b: int, c: int) -> tuple[np.ndarray, np.ndarray]:
    """The definition in the PTX ISA, one lane at a time."""
    segment, clamp, by = c >> 8 & 31, c & 31, b & 31
    values, in_range = np.zeros_like(a), np.zeros(32, dtype=np.uint32)
    for lane in range(32):
        last, first = (lane & segment) | (clamp & ~segment), lane & segment
        source = {
            "up": lane - by,
            "down": lane + by,
            "bfly": lane ^ by,
            "idx": first | (by & ~segment),
        }[mode]
        ok = source >= last if mode == "up" else source <= last
        values[lane], in_range[lane] = a[source if ok else lane], ok
    return values, in_range


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@given(
    b=st.integers(0, 40),
    segment=st.sampled_from([0, 16, 24, 28, 30, 31]),
    clamp=st.sampled_from([0, 7, 15, 31]),
)
@settings(max_examples=12, deadline=None)
def test_shfl(mode: str, b: int, segment: int, clamp: int):
    a = LANES * 3 + 1
    values, in_range = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    c = segment << 8 | clamp
    run_kernel(
        f"""
        add.u64 %rd10, %rd1, %rd0; add.u64 %rd11, %rd2, %rd0; add.u64 %rd12, %rd3, %rd0;
        ld.global.u32 %r2, [%rd10];
        shfl.sync.{mode}.b32 %r3|%p1, %r2, {b}, {c}, 0xffffffff;
        selp.u32 %r4, 1, 0, %p1;
        st.global.u32 [%rd11], %r3;
        st.global.u32 [%rd12], %r4;
        """,
        a,
        values,
        in_range,
    )
    expected = shuffled(mode, a, b, c)
    np.testing.assert_array_equal(values, expected[0])
    np.testing.assert_array_equal(in_range, expected[1])


def test_shfl_of_half_a_warp_takes_registers_of_b_per_lane():
    out = np.full(32, 99, np.uint32)
    run_kernel(
        """
        add.u64 %rd10, %rd1, %rd0;
        setp.lt.u32 %p1, %r1, 16;
        sub.u32 %r2, 15, %r1;
        @!p1 bra DONE;
        shfl.sync.idx.b32 %r3, %r1, %r2, 31, 0xffff;
        st.global.u32 [%rd10], %r3;
        DONE:
        """.replace("!p1", "!%p1"),
        out,
    )
    np.testing.assert_array_equal(out[:16], 15 - LANES[:16])
    assert (out[16:] == 99).all()


@given(bits=st.integers(0, ALL), members=st.sampled_from([ALL, 0xFFFF, 0x1]))
@settings(max_examples=15, deadline=None)
def test_vote(bits: int, members: int):
    out = np.zeros((4, 32), np.uint32)
    run_kernel(
        f"""
        shr.u32 %r2, {bits}, %r1; and.b32 %r2, %r2, 1; setp.eq.u32 %p1, %r2, 1;
        shr.u32 %r3, {members}, %r1; and.b32 %r3, %r3, 1; setp.eq.u32 %p2, %r3, 0;
        @%p2 bra DONE;
        add.u64 %rd10, %rd1, %rd0;
        vote.sync.all.pred %p3, %p1, {members}; selp.u32 %r4, 1, 0, %p3; st.global.u32 [%rd10], %r4;
        vote.sync.any.pred %p3, !%p1, {members}; selp.u32 %r4, 1, 0, %p3; st.global.u32 [%rd10+128], %r4;
        vote.sync.uni.pred %p3, %p1, {members}; selp.u32 %r4, 1, 0, %p3; st.global.u32 [%rd10+256], %r4;
        vote.sync.ballot.b32 %r5, %p1, {members}; st.global.u32 [%rd10+384], %r5;
        DONE:
        """,
        out,
    )
    here = [lane for lane in range(32) if members >> lane & 1]
    votes = [bits >> lane & 1 for lane in here]
    for lane in range(32):
        expected = (
            [all(votes), not all(votes), len(set(votes)) == 1, bits & members] if lane in here else [0] * 4
        )
        np.testing.assert_array_equal(out[:, lane], expected)


@pytest.mark.parametrize("type_name", ["b32", "b64"])
def test_match(type_name: str):
    wide = type_name == "b64"
    a = np.array([lane % 5 + (lane % 2 << 40 if wide else 0) for lane in range(32)], np.uint64)
    out = np.zeros((5, 32), np.uint32)
    register, scale = ("%rd12", 8) if wide else ("%r12", 8)
    run_kernel(
        f"""
        mul.wide.u32 %rd10, %r1, {scale}; add.u64 %rd10, %rd10, %rd1; add.u64 %rd11, %rd2, %rd0;
        ld.global.{type_name} {register}, [%rd10];
        match.any.sync.{type_name} %r2, {register}, 0xffffffff; st.global.u32 [%rd11], %r2;
        match.all.sync.{type_name} %r3|%p1, {register}, 0xffffffff; st.global.u32 [%rd11+128], %r3;
        selp.u32 %r4, 1, 0, %p1; st.global.u32 [%rd11+256], %r4;
        match.all.sync.b32 %r5|%p2, 7, 0xffffffff; st.global.u32 [%rd11+384], %r5;
        selp.u32 %r6, 1, 0, %p2; st.global.u32 [%rd11+512], %r6;
        """,
        a,
        out,
    )
    for lane in range(32):
        assert out[0, lane] == sum(1 << other for other in range(32) if a[other] == a[lane])
    assert not out[1].any()
    assert not out[2].any()
    assert (out[3] == ALL).all()
    assert (out[4] == 1).all()


REDUCTIONS = {
    "add.u32": lambda v: int(v.astype(np.uint64).sum()) & ALL,
    "add.s32": lambda v: int(v.astype(np.uint64).sum()) & ALL,
    "min.u32": lambda v: int(v.min()),
    "max.u32": lambda v: int(v.max()),
    "min.s32": lambda v: int(v.view(np.int32).min()) & ALL,
    "max.s32": lambda v: int(v.view(np.int32).max()) & ALL,
    "and.b32": lambda v: int(np.bitwise_and.reduce(v)),
    "or.b32": lambda v: int(np.bitwise_or.reduce(v)),
    "xor.b32": lambda v: int(np.bitwise_xor.reduce(v)),
}


@pytest.mark.parametrize("what", REDUCTIONS)
def test_redux(what: str):
    a = np.random.default_rng(1).integers(0, 2**32, 32, dtype=np.uint32)
    out = np.zeros(32, np.uint32)
    run_kernel(
        f"""
        add.u64 %rd10, %rd1, %rd0; add.u64 %rd11, %rd2, %rd0;
        ld.global.u32 %r2, [%rd10];
        redux.sync.{what} %r3, %r2, 0xffffffff;
        st.global.u32 [%rd11], %r3;
        """,
        a,
        out,
    )
    assert set(out.tolist()) == {REDUCTIONS[what](a)}


def reduced_float(values: np.ndarray, maximum: bool, absolute: bool, keep_nan: bool) -> int:
    if absolute:
        values = np.abs(values)
    if keep_nan and np.isnan(values).any():
        return 0x7FFFFFFF
    numbers = [v for v in values if not np.isnan(v)]
    if not numbers:
        return 0x7FFFFFFF
    ordered = sorted(numbers, key=lambda v: (v, 0 if np.signbit(v) else 1))
    return int(np.float32(ordered[-1 if maximum else 0]).view(np.uint32))


@pytest.mark.parametrize("suffix", ["", ".abs", ".NaN", ".abs.NaN"])
@pytest.mark.parametrize("op", ["min", "max"])
@pytest.mark.parametrize("odd", [[], [0.0, -0.0], [np.nan, -np.inf], [np.nan] * 32])
def test_redux_of_floats(op: str, suffix: str, odd: list[float]):
    a = np.linspace(0.5, 9, 32).astype(np.float32) * (0 if len(odd) == 2 and odd[0] == 0 else 1)
    a[: len(odd)] = odd
    out = np.zeros(32, np.uint32)
    run_kernel(
        f"""
        add.u64 %rd10, %rd1, %rd0; add.u64 %rd11, %rd2, %rd0;
        ld.global.f32 %f2, [%rd10];
        redux.sync.{op}{suffix}.f32 %f3, %f2, 0xffffffff;
        st.global.f32 [%rd11], %f3;
        """,
        a,
        out,
        target="sm_100a",
    )
    assert set(out.tolist()) == {reduced_float(a, op == "max", "abs" in suffix, "NaN" in suffix)}


def test_elect_and_activemask():
    out = np.zeros((3, 32), np.uint32)
    run_kernel(
        """
        add.u64 %rd10, %rd1, %rd0;
        setp.lt.u32 %p1, %r1, 8;
        @%p1 bra DONE;
        elect.sync %r2|%p2, 0xffffff00;
        selp.u32 %r3, 1, 0, %p2;
        activemask.b32 %r4;
        st.global.u32 [%rd10], %r2; st.global.u32 [%rd10+128], %r3; st.global.u32 [%rd10+256], %r4;
        DONE:
        """,
        out,
    )
    assert (out[0, 8:] == 8).all()
    np.testing.assert_array_equal(np.flatnonzero(out[1]), [8])
    assert (out[2, 8:] == 0xFFFFFF00).all()
    assert not out[:, :8].any()


def test_elect_without_the_lane():
    out = np.zeros(32, np.uint32)
    run_kernel(
        """
        elect.sync _|%p1, -1;
        add.u64 %rd10, %rd1, %rd0;
        @%p1 st.global.u32 [%rd10], 1;
        """,
        out,
    )
    np.testing.assert_array_equal(np.flatnonzero(out), [0])


def test_lanes_of_both_sides_of_a_branch_meet_in_a_sync():
    out = np.zeros(32, np.uint32)
    run_kernel(
        """
        add.u64 %rd10, %rd1, %rd0;
        and.b32 %r2, %r1, 1; setp.eq.u32 %p1, %r2, 0;
        @%p1 bra EVEN;
        mov.u32 %r3, 5;
        bra.uni TOGETHER;
        EVEN:
        mov.u32 %r3, 2;
        TOGETHER:
        bar.warp.sync 0xffffffff;
        redux.sync.add.u32 %r4, %r3, 0xffffffff;
        st.global.u32 [%rd10], %r4;
        """,
        out,
    )
    assert (out == 16 * 7).all()


def test_a_lane_outside_its_member_mask_is_reported():
    result = run_kernel("vote.sync.ballot.b32 %r2, %p0, 0xfffffffe;", expect_reports=True)
    assert any("member mask" in report.message and report.lane == 0 for report in result.reports)

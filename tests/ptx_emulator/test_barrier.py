"""Named barriers and the barrier of the cluster."""

from typing import Any

import numpy as np
import pytest
from harness import run_kernel
from planted_bugs import MBAR, lines_of, silent
from planted_bugs import SCHEDULES as EVERY_SCHEDULE

SCHEDULES = [
    {"schedule": "fair"},
    {"schedule": "late"},
    {"schedule": "greedy"},
    {"schedule": "random", "seed": 3},
]


# Two warps at one barrier, by two instructions.
TWO_SYNCS = "setp.lt.u32 %p1, %r1, 32; @%p1 bra A; bar.sync 1{}; bra.uni B; A: bar.sync 1{}; B:"


def messages(result: Any) -> str:
    return "\n".join(report.message for report in result.reports)


@pytest.mark.parametrize("options", SCHEDULES)
@pytest.mark.parametrize(
    "instruction", ["bar.sync 0;", "barrier.cta.sync 3;", "barrier.sync.aligned 1, 128;"]
)
def test_all_threads_exchange_through_shared_memory(instruction: str, options: dict[str, Any]):
    out = np.zeros(128, np.uint32)
    run_kernel(
        f"""
        shl.b32 %r2, %r1, 2; mov.u32 %r3, smem; add.u32 %r4, %r3, %r2;
        st.shared.u32 [%r4], %r1;
        {instruction}
        xor.b32 %r5, %r2, 508; add.u32 %r6, %r3, %r5;
        ld.shared.u32 %r7, [%r6];
        add.u64 %rd10, %rd1, %rd0; st.global.u32 [%rd10], %r7;
        """,
        out,
        block=(128, 1, 1),
        shared_bytes=512,
        **options,
    )
    np.testing.assert_array_equal(out, 127 - np.arange(128))


def test_without_the_barrier_it_is_a_race():
    out = np.zeros(64, np.uint32)
    result = run_kernel(
        """
        shl.b32 %r2, %r1, 2; mov.u32 %r3, smem; add.u32 %r4, %r3, %r2;
        st.shared.u32 [%r4], %r1;
        xor.b32 %r5, %r2, 252; add.u32 %r6, %r3, %r5;
        ld.shared.u32 %r7, [%r6];
        add.u64 %rd10, %rd1, %rd0; st.global.u32 [%rd10], %r7;
        """,
        out,
        block=(64, 1, 1),
        shared_bytes=256,
        expect_reports=True,
    )
    assert {report.kind for report in result.reports} & {"race", "uninitialised"}


@pytest.mark.parametrize("options", SCHEDULES)
def test_producer_and_consumer_with_partial_counts(options: dict[str, Any]):
    # Warp 0 produces ten values, warp 1 consumes them; warp 2 takes no part.
    out = np.zeros(10, np.uint32)
    run_kernel(
        """
        shr.u32 %r2, %r1, 5; and.b32 %r3, %r1, 31; mov.u32 %r4, smem;
        setp.eq.u32 %p1, %r2, 2; @%p1 bra DONE;
        setp.eq.u32 %p2, %r3, 0;
        mov.u32 %r5, 0;
        setp.eq.u32 %p3, %r2, 1; @%p3 bra CONSUME;
        PRODUCE:
        mul.lo.u32 %r6, %r5, 7;
        @%p2 st.shared.u32 [%r4], %r6;
        bar.arrive 1, 64;
        bar.sync 2, 64;
        add.u32 %r5, %r5, 1; setp.lt.u32 %p4, %r5, 10; @%p4 bra PRODUCE;
        bra.uni DONE;
        CONSUME:
        bar.sync 1, 64;
        ld.shared.u32 %r6, [%r4];
        mul.wide.u32 %rd10, %r5, 4; add.u64 %rd10, %rd10, %rd1;
        @%p2 st.global.u32 [%rd10], %r6;
        bar.arrive 2, 64;
        add.u32 %r5, %r5, 1; setp.lt.u32 %p4, %r5, 10; @%p4 bra CONSUME;
        DONE:
        """,
        out,
        block=(96, 1, 1),
        shared_bytes=16,
        **options,
    )
    np.testing.assert_array_equal(out, np.arange(10) * 7)


def test_reductions():
    out = np.zeros((4, 96), np.uint32)
    run_kernel(
        """
        add.u64 %rd10, %rd1, %rd0;
        setp.lt.u32 %p1, %r1, 70;
        bar.red.popc.u32 %r2, 0, %p1; st.global.u32 [%rd10], %r2;
        bar.red.and.pred %p2, 1, %p1; selp.u32 %r3, 1, 0, %p2; st.global.u32 [%rd10+384], %r3;
        barrier.cta.red.or.aligned.pred %p3, 1, 96, %p1;
        selp.u32 %r4, 1, 0, %p3; st.global.u32 [%rd10+768], %r4;
        barrier.red.popc.u32 %r5, 2, !%p1; st.global.u32 [%rd10+1152], %r5;
        """,
        out,
        block=(96, 1, 1),
    )
    assert [set(row.tolist()) for row in out] == [{70}, {0}, {1}, {26}]


def test_an_incomplete_warp_counts_as_a_warp_and_exited_warps_are_not_waited_for():
    out = np.zeros(1, np.uint32)
    run_kernel(
        """
        setp.ge.u32 %p1, %r1, 64; @%p1 exit;
        bar.sync 0;
        setp.eq.u32 %p2, %r1, 0; mov.u32 %r2, 1;
        @%p2 st.global.u32 [%rd1], %r2;
        """,
        out,
        block=(80, 1, 1),
    )
    run_kernel("bar.sync 1, 96;", out, block=(80, 1, 1))
    assert out[0] == 1


@pytest.mark.parametrize("counts", [("", ""), (", 64", ", 64")])
def test_all_threads_may_be_counted_or_not(counts: tuple[str, str]):
    run_kernel(TWO_SYNCS.format(*counts), block=(64, 1, 1))


@pytest.mark.parametrize("counts", [("", ", 64"), (", 64", ""), (", 32", ", 64")])
def test_counts_that_differ_are_found(counts: tuple[str, str]):
    """Also that of all threads from none: a GPU stops with an illegal instruction."""
    result = run_kernel(TWO_SYNCS.format(*counts), block=(64, 1, 1), expect_reports=True)
    assert "others did for" in messages(result)


def test_the_two_sides_of_a_branch_may_meet_at_an_unaligned_barrier():
    out = np.zeros(64, np.uint32)
    run_kernel(
        """
        shl.b32 %r2, %r1, 2; mov.u32 %r3, smem; add.u32 %r4, %r3, %r2;
        and.b32 %r8, %r1, 1; setp.eq.u32 %p1, %r8, 0;
        @%p1 bra EVEN;
        st.shared.u32 [%r4], %r1;
        barrier.sync 4;
        bra.uni JOIN;
        EVEN:
        add.u32 %r9, %r1, 100; st.shared.u32 [%r4], %r9;
        barrier.sync 4;
        JOIN:
        xor.b32 %r5, %r2, 252; add.u32 %r6, %r3, %r5;
        ld.shared.u32 %r7, [%r6];
        add.u64 %rd10, %rd1, %rd0; st.global.u32 [%rd10], %r7;
        """,
        out,
        block=(64, 1, 1),
        shared_bytes=256,
    )
    other = 63 - np.arange(64)
    np.testing.assert_array_equal(out, other + np.where(other % 2 == 0, 100, 0))


@pytest.mark.parametrize("arrive", ["barrier.cluster.arrive.aligned;", "barrier.cluster.arrive.release;"])
@pytest.mark.parametrize("options", SCHEDULES)
def test_the_barrier_of_the_cluster(arrive: str, options: dict[str, Any]):
    out = np.zeros((4, 64), np.uint32)
    run_kernel(
        f"""
        mov.u32 %r2, %cluster_ctarank; mov.u32 %r3, smem; shl.b32 %r4, %r1, 2; add.u32 %r5, %r3, %r4;
        mad.lo.u32 %r6, %r2, 1000, %r1; st.shared.u32 [%r5], %r6;
        {arrive}
        barrier.cluster.wait.acquire.aligned;
        add.u32 %r7, %r2, 1; and.b32 %r7, %r7, 3;
        mapa.shared::cluster.u32 %r8, %r5, %r7;
        ld.shared::cluster.u32 %r9, [%r8];
        mad.lo.u32 %r10, %r2, 64, %r1; mul.wide.u32 %rd10, %r10, 4; add.u64 %rd10, %rd10, %rd1;
        st.global.u32 [%rd10], %r9;
        barrier.cluster.arrive; barrier.cluster.wait;
        """,
        out,
        grid=(4, 1, 1),
        cluster=(4, 1, 1),
        block=(64, 1, 1),
        shared_bytes=256,
        **options,
    )
    for rank in range(4):
        np.testing.assert_array_equal(out[rank], (rank + 1) % 4 * 1000 + np.arange(64))


EXCHANGE = """
        mov.u32 %r2, %cluster_ctarank; mov.u32 %r3, smem; mov.u32 %r6, 9;
        setp.eq.u32 %p1, %r1, 0;
        @%p1 st.shared.u32 [%r3], %r6;
        {fence}
        barrier.cluster.arrive.relaxed.aligned;
        barrier.cluster.wait.aligned;
        xor.b32 %r7, %r2, 1; mapa.shared::cluster.u32 %r8, %r3, %r7;
        ld.shared::cluster.u32 %r9, [%r8];
        barrier.cluster.arrive; barrier.cluster.wait;
        """


@pytest.mark.parametrize("fence", ["", "fence.acq_rel.cluster;"])
def test_a_relaxed_arrival_orders_only_with_a_fence(fence: str):
    result = run_kernel(
        EXCHANGE.format(fence=fence),
        grid=(2, 1, 1),
        cluster=(2, 1, 1),
        shared_bytes=16,
        expect_reports=True,
    )
    assert bool(result.reports) == (not fence)


@pytest.mark.parametrize(
    ("body", "block", "expected"),
    [
        ("bar.arrive 1, 64; bar.arrive 1, 64;", 64, "again before it has completed"),
        ("mov.u32 %r2, 17; bar.sync %r2;", 32, "does not exist"),
        ("mov.u32 %r2, 40; bar.sync 0, %r2;", 64, "multiple of 32"),
        (
            "setp.lt.u32 %p1, %r1, 32; @%p1 bra A; bar.arrive 1, 64; exit; A: bar.sync 1, 96;",
            96,
            "others did for",
        ),
        ("setp.lt.u32 %p1, %r1, 32; @%p1 bra A; bar.sync 1; exit; A: bar.sync 2;", 64, "has not"),
        ("setp.lt.u32 %p1, %r1, 16; @%p1 bar.sync 0;", 32, ".aligned"),
        ("barrier.cluster.wait;", 32, "without barrier.cluster.arrive"),
        ("barrier.cluster.arrive; barrier.cluster.arrive; barrier.cluster.wait;", 32, "a second time"),
    ],
)
def test_misuse_is_reported(body: str, block: int, expected: str):
    result = run_kernel(body, block=(block, 1, 1), expect_reports=True)
    assert expected in messages(result)


def found_under_every_schedule(body: str, *lines: str, **launch: Any) -> str:
    """The messages of the last; each must have a misuse of a barrier at marked lines, and none elsewhere."""
    marks = lines_of(body, 0, "sm_90a", launch.get("globals", ""))
    wanted = {marks[line] for line in lines}
    for schedule in EVERY_SCHEDULE:
        result = run_kernel(body, schedule=schedule, expect_reports=True, **launch)
        misuse = [report for report in result.reports if report.kind == "barrier"]
        assert misuse, (schedule, messages(result))
        assert {report.kind for report in result.reports} <= {"barrier", "deadlock"}
        assert {report.line for report in misuse} <= wanted, schedule
    return messages(result)


@pytest.mark.parametrize("instruction", ["bar.sync 1, 48;", "bar.arrive 1, 48;", "barrier.sync 1, 48;"])
def test_64_threads_at_a_barrier_of_48(instruction: str):
    text = found_under_every_schedule(f"\n{instruction} // <here>\n", "here", block=(64, 1, 1))
    assert "is 48; a multiple of 32 up to 64 is expected" in text


SURPLUS = """
    setp.lt.u32 %p1, %r1, 32; @%p1 bra WAIT;
    {before}
    bar.arrive 1, 64; // <arrive>
    bra.uni DONE;
    WAIT:
    bar.sync 1, 64; // <sync>
    DONE:
"""


def test_more_threads_arrive_than_the_barrier_counts():
    """Two warps arrive where one is counted: a GPU goes on, and the next use ends too early."""
    text = found_under_every_schedule(SURPLUS.format(before=""), "arrive", "sync", block=(96, 1, 1))
    assert "more threads arrive than the barrier counts" in text
    silent(SURPLUS.format(before="setp.ge.u32 %p2, %r1, 64; @%p2 bra DONE;"), block=(96, 1, 1))


TWO_COUNTS = """
    setp.lt.u32 %p1, %r1, 32; @%p1 bra A;
    {one} // <one>
    bra.uni B;
    A: {other} // <other>
    B:
"""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("bar.sync 1, 32;", "bar.sync 1, 64;"),
        ("bar.arrive 1, 32;", "bar.sync 1, 64;"),
        ("bar.arrive 1, 64;", "bar.sync 1, 32;"),
        ("bar.arrive 1, 64;", "barrier.sync 1, 96;"),
        ("bar.arrive 1, 32;", "bar.arrive 1, 64;"),
    ],
)
def test_counts_of_two_warps_that_disagree(one: str, other: str):
    """Also where the first to come is alone the whole count, and the second waits for a use of its own."""
    body = TWO_COUNTS.format(one=one, other=other)
    found_under_every_schedule(body, "one", "other", block=(96, 1, 1) if "96" in other else (64, 1, 1))


def test_an_arrival_for_the_next_use_that_comes_too_early():
    """The first warp arrives again without knowing that the second has come."""
    body = """
        setp.lt.u32 %p1, %r1, 32; @%p1 bra FIRST;
        bar.sync 1, 64; // <wait>
        {signal}
        bar.sync 1, 64; // <again>
        bra.uni DONE;
        FIRST:
        bar.arrive 1, 64;
        {wait}
        bar.arrive 1, 64; // <early>
        DONE:
    """
    two = {"block": (64, 1, 1)}
    silent(body.format(signal="bar.arrive 2, 64;", wait="bar.sync 2, 64;"), **two)
    found_under_every_schedule(
        body.format(signal="", wait="nanosleep.u32 5000;"), "early", "again", "wait", **two
    )


def test_a_barrier_may_be_used_again_with_another_count():
    body = """
        setp.eq.u32 %p9, %r1, 0; mov.u32 %r9, full; @%p9 mbarrier.init.shared.b64 [%r9], 1;
        bar.sync 0;
        setp.ge.u32 %p1, %r1, 64; @%p1 bra THIRD;
        bar.sync 1, 64;
        @%p9 mbarrier.arrive.shared.b64 _, [%r9];
        bra.uni ALL;
        THIRD: WAIT: mbarrier.try_wait.parity.shared.b64 %p2, [%r9], 0; @!%p2 bra WAIT;
        ALL:
        bar.sync 1, 96;
        bar.sync 1;
    """
    silent(body, block=(96, 1, 1), globals=MBAR)


@pytest.mark.parametrize(
    ("body", "lane"),
    [
        ("and.b32 %r2, %r1, 16; add.u32 %r2, %r2, 32; bar.sync 1, %r2;", 16),
        (
            "setp.eq.u32 %p1, %r1, 5; @%p1 bra A; barrier.sync 1, 32; bra B; A: barrier.sync 1, 64; B:",
            None,
        ),
    ],
)
def test_lanes_of_a_warp_must_expect_the_same_count(body: str, lane: int | None):
    reports = run_kernel(body, expect_reports=True).reports
    found = [report for report in reports if "others of its warp do for" in report.message]
    assert found
    assert found[0].lane in ({lane} if lane is not None else {0, 5})
    assert {(report.kind, report.warp, report.cta) for report in found} == {("barrier", 0, (0, 0, 0))}

"""mbarrier objects: the protocol, and reports of its misuse."""

from typing import Any

import numpy as np
import pytest
from harness import kernel_text, run_kernel

SCHEDULES = [
    {"schedule": "fair"},
    {"schedule": "late"},
    {"schedule": "greedy"},
    {"schedule": "random", "seed": 5},
]
INIT = """
        mov.u32 %r20, smem;
        setp.eq.u32 %p20, %r1, 0;
        @%p20 mbarrier.init.shared::cta.b64 [%r20], {count};
        fence.mbarrier_init.release.cluster;
        bar.sync 0;
        """


def messages(result: Any) -> str:
    return "\n".join(report.message for report in result.reports)


@pytest.mark.parametrize("options", SCHEDULES)
@pytest.mark.parametrize("wait", ["test_wait", "try_wait"])
@pytest.mark.parametrize("form", ["state", "parity"])
def test_all_threads_meet_for_several_phases(form: str, wait: str, options: dict[str, Any]):
    out = np.zeros(64, np.uint32)
    suffix, wanted = (".parity", "%r6") if form == "parity" else ("", "%rd12")
    run_kernel(
        INIT.format(count=64)
        + f"""
        shl.b32 %r2, %r1, 2; add.u32 %r3, %r20, %r2;
        mov.u32 %r5, 0; mov.u32 %r9, 0;
        LOOP:
        add.u32 %r4, %r5, %r1; st.shared.u32 [%r3+64], %r4;
        mbarrier.arrive.shared.b64 %rd12, [%r20];
        and.b32 %r6, %r5, 1; shl.b32 %r6, %r6, 1; and.b32 %r6, %r6, 1;
        WAIT1: mbarrier.{wait}{suffix}.shared::cta.b64 %p1, [%r20], {wanted};
        @!%p1 bra WAIT1;
        xor.b32 %r7, %r2, 252; add.u32 %r8, %r20, %r7; ld.shared.u32 %r10, [%r8+64]; add.u32 %r9, %r9, %r10;
        mbarrier.arrive.release.cta.shared::cta.b64 %rd12, [%r20], 1;
        mov.u32 %r6, 1;
        WAIT2: mbarrier.{wait}{suffix}.acquire.cta.shared::cta.b64 %p1, [%r20], {wanted};
        @!%p1 bra WAIT2;
        add.u32 %r5, %r5, 1; setp.lt.u32 %p2, %r5, 5; @%p2 bra LOOP;
        add.u64 %rd10, %rd1, %rd0; st.global.u32 [%rd10], %r9;
        """,
        out,
        block=(64, 1, 1),
        shared_bytes=512,
        **options,
    )
    np.testing.assert_array_equal(out, 5 * (63 - np.arange(64)) + 10)


def test_counts_drops_and_tokens():
    out = np.zeros(6, np.uint32)
    run_kernel(
        """
        mov.u32 %r2, smem; setp.ne.u32 %p1, %r1, 0; @%p1 bra DONE;
        mbarrier.init.shared.b64 [%r2], 10;
        mbarrier.arrive.noComplete.release.cta.shared.b64 %rd10, [%r2], 3;
        mbarrier.pending_count.b64 %r3, %rd10; st.global.u32 [%rd1], %r3;
        mbarrier.arrive_drop.shared.b64 %rd11, [%r2], 2;
        mbarrier.pending_count.b64 %r3, %rd11; st.global.u32 [%rd1+4], %r3;
        mbarrier.test_wait.shared.b64 %p2, [%r2], %rd10; selp.u32 %r4, 1, 0, %p2; st.global.u32 [%rd1+8], %r4;
        mbarrier.arrive.shared.b64 _, [%r2], 5;
        mbarrier.test_wait.shared.b64 %p2, [%r2], %rd10;
        selp.u32 %r4, 1, 0, %p2; st.global.u32 [%rd1+12], %r4;
        mbarrier.arrive.noComplete.shared.b64 %rd12, [%r2], 1;
        mbarrier.pending_count.b64 %r3, %rd12; st.global.u32 [%rd1+16], %r3;
        mbarrier.arrive.shared.b64 _, [%r2], 7;
        mbarrier.test_wait.parity.shared.b64 %p2, [%r2], 1;
        selp.u32 %r4, 1, 0, %p2; st.global.u32 [%rd1+20], %r4;
        mbarrier.inval.shared.b64 [%r2];
        DONE:
        """,
        out,
        shared_bytes=16,
    )
    assert out.tolist() == [10, 7, 0, 1, 8, 1]


def test_transaction_bytes_may_arrive_before_they_are_expected():
    out = np.zeros(3, np.uint32)
    run_kernel(
        """
        mov.u32 %r2, smem; setp.ne.u32 %p1, %r1, 0; @%p1 bra DONE;
        mbarrier.init.shared.b64 [%r2], 1;
        mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r2], 48;
        mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 64;
        mbarrier.test_wait.parity.shared.b64 %p2, [%r2], 0;
        selp.u32 %r4, 1, 0, %p2; st.global.u32 [%rd1], %r4;
        mbarrier.expect_tx.b64 [%rd20], 16;
        mbarrier.complete_tx.shared::cta.b64 [%r2], 32;
        mbarrier.test_wait.parity.shared.b64 %p2, [%r2], 0;
        selp.u32 %r4, 1, 0, %p2; st.global.u32 [%rd1+4], %r4;
        mbarrier.test_wait.parity.shared.b64 %p2, [%r2], 1;
        selp.u32 %r4, 1, 0, %p2; st.global.u32 [%rd1+8], %r4;
        DONE:
        """.replace("setp.ne", "cvt.u64.u32 %rd20, %r2; cvta.shared.u64 %rd20, %rd20; setp.ne"),
        out,
        shared_bytes=16,
    )
    assert out.tolist() == [0, 1, 0]


@pytest.mark.parametrize("options", SCHEDULES)
def test_remote_arrivals(options: dict[str, Any]):
    # Every CTA of the cluster sends its rank to CTA 0, which waits for all.
    out = np.zeros(4, np.uint32)
    run_kernel(
        """
        mov.u32 %r20, smem; mov.u32 %r21, %cluster_ctarank; setp.eq.u32 %p1, %r1, 0;
        @%p1 mbarrier.init.shared.b64 [%r20], 4;
        fence.mbarrier_init.release.cluster;
        barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
        mapa.shared::cluster.u32 %r22, %r20, 0; shl.b32 %r23, %r21, 2; add.u32 %r24, %r22, %r23;
        mul.lo.u32 %r25, %r21, 11;
        @%p1 st.shared::cluster.u32 [%r24+16], %r25;
        @%p1 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r22];
        setp.ne.u32 %p2, %r21, 0; @%p2 bra DONE;
        WAIT: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p3, [%r20], 0, 1000;
        @!%p3 bra WAIT;
        setp.lt.u32 %p4, %r1, 4; add.u64 %rd10, %rd1, %rd0; shl.b32 %r26, %r1, 2; add.u32 %r27, %r20, %r26;
        @%p4 ld.shared.u32 %r28, [%r27+16];
        @%p4 st.global.u32 [%rd10], %r28;
        DONE:
        barrier.cluster.arrive; barrier.cluster.wait;
        """,
        out,
        grid=(4, 1, 1),
        cluster=(4, 1, 1),
        shared_bytes=64,
        **options,
    )
    assert out.tolist() == [0, 11, 22, 33]


@pytest.mark.parametrize("options", SCHEDULES)
def test_a_try_wait_gives_up_when_nothing_else_can_run(options: dict[str, Any]):
    # A glance at a barrier whose phase the same thread completes afterwards; then the wait itself.
    out = np.full(2, 9, np.uint32)
    run_kernel(
        """
        mov.u32 %r2, smem; setp.ne.u32 %p1, %r1, 0; @%p1 exit;
        mbarrier.init.shared.b64 [%r2], 1;
        mbarrier.try_wait.parity.shared.b64 %p2, [%r2], 0; selp.u32 %r3, 1, 0, %p2; st.global.u32 [%rd1], %r3;
        mbarrier.arrive.shared.b64 _, [%r2];
        WAIT: mbarrier.try_wait.parity.shared.b64 %p2, [%r2], 0; @!%p2 bra WAIT;
        selp.u32 %r3, 1, 0, %p2; st.global.u32 [%rd1+4], %r3;
        """,
        out,
        shared_bytes=16,
        **options,
    )
    assert out.tolist() == [0, 1]


@pytest.mark.parametrize("semantics", ["", ".relaxed.cta"])
def test_a_relaxed_arrival_orders_nothing(semantics: str):
    result = run_kernel(
        INIT.format(count=1)
        + f"""
        setp.ge.u32 %p1, %r1, 32; @%p1 bra READ;
        mov.u32 %r2, 5;
        @%p20 st.shared.u32 [%r20+16], %r2;
        @%p20 mbarrier.arrive{semantics}.shared.b64 _, [%r20];
        bra.uni DONE;
        READ:
        mbarrier.try_wait.parity.shared.b64 %p3, [%r20], 0;
        ld.shared.u32 %r3, [%r20+16];
        DONE:
        """,
        block=(64, 1, 1),
        shared_bytes=64,
        expect_reports=True,
    )
    assert {report.kind for report in result.reports} == ({"race"} if semantics else set())


def test_an_initialisation_that_nobody_waited_for_is_a_race():
    result = run_kernel(
        """
        mov.u32 %r20, smem; setp.eq.u32 %p20, %r1, 0; setp.eq.u32 %p21, %r1, 32;
        @%p20 mbarrier.init.shared.b64 [%r20], 1;
        @%p21 nanosleep.u32 100;
        @%p21 mbarrier.arrive.shared.b64 _, [%r20];
        """,
        block=(64, 1, 1),
        shared_bytes=16,
        expect_reports=True,
    )
    assert [report.kind for report in result.reports] == ["race"]


INITIALISED = "mbarrier.init.shared.b64 [%r2], {count}; "
ARRIVE = "mbarrier.arrive.shared.b64 _, [%r2]; "
ONE, TWO = INITIALISED.format(count=1), INITIALISED.format(count=2)
MISUSE = {
    ARRIVE: "not initialised",
    ONE + "mbarrier.inval.shared.b64 [%r2];" + ARRIVE: "not initialised",
    "mbarrier.try_wait.parity.shared.b64 %p2, [%r2], 0;": "not initialised",
    TWO + "mbarrier.arrive.shared.b64 _, [%r2], 3;": "3 arrivals",
    TWO + ARRIVE + TWO: "in flight: 1 of 2 arrivals missing",
    TWO + ARRIVE + "mbarrier.inval.shared.b64 [%r2];": "in flight: 1 of 2 arrivals missing",
    INITIALISED.format(count=0): "with count 0",
    INITIALISED.format(count=1048576): "with count 1048576",
    "mbarrier.init.shared.b64 [%r2+4], 1;": "8",
    ONE + "mbarrier.expect_tx.shared.b64 [%r2], 1048576;": "the limit is 1048575",
    ONE + "mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 32;": "tx-count of 32",
    TWO + "mbarrier.complete_tx.shared.b64 [%r2], 32;": "more bytes arrived",
    ONE + "mbarrier.arrive.noComplete.shared.b64 _, [%r2], 1;": "with .noComplete",
    ONE
    + "mbarrier.arrive.shared.b64 %rd9, [%r2];"
    + ARRIVE * 2
    + "mbarrier.test_wait.shared.b64 %p2, [%r2], %rd9;": "only the current",
    ONE + "WAIT: mbarrier.try_wait.parity.shared.b64 %p2, [%r2], 0; @!%p2 bra WAIT;": (
        "phase 0 (parity 0): 1 of 1 arrivals missing"
    ),
}


@pytest.mark.parametrize("body", MISUSE)
def test_misuse_is_reported(body: str):
    result = run_kernel(
        "mov.u32 %r2, smem; setp.ne.u32 %p1, %r1, 0; @%p1 exit;" + body, shared_bytes=16, expect_reports=True
    )
    assert MISUSE[body] in messages(result)


def test_bytes_that_never_arrive_are_reported_at_expect_tx() -> None:
    body = """mov.u32 %r2, smem; setp.ne.u32 %p1, %r1, 0; @%p1 exit;
mbarrier.init.shared.b64 [%r2], 1;
mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 48;
"""
    (report,) = run_kernel(body, shared_bytes=16, expect_reports=True).reports
    line = next(n for n, text in enumerate(kernel_text(body, 0).splitlines(), 1) if "expect_tx" in text)
    assert (report.kind, report.line, report.lane) == ("barrier", line, 0)

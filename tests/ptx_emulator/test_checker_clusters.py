"""The checker on clusters: their barrier, and shared memory of other CTAs."""

from __future__ import annotations

import pytest
from harness import run_kernel
from planted_bugs import MBAR, SCHEDULES, find, lines_of, silent, without

CLUSTER = """
mov.u32 %r20, smem;
mov.u32 %r2, %cluster_ctarank;
xor.b32 %r3, %r2, 1;
mapa.shared::cluster.u32 %r4, %r20, %r3;
setp.eq.u32 %p1, %r1, 0;
@%p1 st.shared::cluster.u32 [%r4], %r2;  // <write>
barrier.cluster.arrive.aligned;  // [cluster]
barrier.cluster.wait.aligned;  // [cluster]
@%p1 ld.shared.u32 %r5, [smem];  // <read>
barrier.cluster.arrive.aligned;
barrier.cluster.wait.aligned;
"""
TWO_CTAS = {"grid": (2, 1, 1), "cluster": (2, 1, 1), "shared_bytes": 1024}


def test_cluster_barrier() -> None:
    silent(CLUSTER, **TWO_CTAS)


def test_race_between_ctas_of_a_cluster() -> None:
    body = without(CLUSTER, "cluster")
    marks = lines_of(body, 0, "sm_90a", "")
    for schedule in SCHEDULES:
        result = run_kernel(body, expect_reports=True, schedule=schedule, **TWO_CTAS)
        (race, *_) = [r for r in result.reports if r.kind == "race"]
        assert race.other is not None
        assert {race.line, race.other.line} == {marks["read"], marks["write"]}
        assert {race.cta, race.other.cta} == {(0, 0, 0), (1, 0, 0)}


def test_relaxed_cluster_arrival_releases_nothing() -> None:
    body = CLUSTER.replace("arrive.aligned;  // [cluster]", "arrive.relaxed.aligned;  // [cluster]")
    find(body, kind="race", at="read", other="write", **TWO_CTAS)
    silent(
        body.replace(
            "barrier.cluster.arrive.relaxed", "fence.acq_rel.cluster;\nbarrier.cluster.arrive.relaxed"
        ),
        **TWO_CTAS,
    )


# Rank 1 accesses the shared memory of rank 0, which ends without it but for the last barrier.
REMOTE = """
mov.u32 %r20, smem;
mov.u32 %r21, full;
mov.u32 %r2, %cluster_ctarank;
setp.eq.u32 %p1, %r2, 0;
setp.eq.u32 %p2, %r1, 0;
@%p2 mbarrier.init.shared.b64 [full], 1;
fence.mbarrier_init.release.cluster;
@%p2 st.shared.v4.u32 [smem+256], {%r2, %r2, %r2, %r2};
@%p2 st.shared.u32 [smem], %r2;
fence.proxy.async;
barrier.cluster.arrive.aligned;
barrier.cluster.wait.aligned;
mapa.shared::cluster.u32 %r4, %r20, 0;
mapa.shared::cluster.u32 %r5, %r21, 0;
@%p1 bra last;
@!%p2 bra last;
ACCESS
last:
barrier.cluster.arrive.aligned;  // [last]
barrier.cluster.wait.aligned;  // [last]
"""
ACCESSES = {
    "ld": "ld.shared::cluster.u32 %r6, [%r4];  // <access>",
    "st": "st.shared::cluster.u32 [%r4], %r2;  // <access>",
    "atom": "atom.shared::cluster.add.u32 %r6, [%r4], 1;  // <access>",
    "generic": """
        cvt.u64.u32 %rd5, %r4;
        cvta.shared::cluster.u64 %rd5, %rd5;
        st.u32 [%rd5], %r2;  // <access>""",
    "arrive": "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r5];  // <access>",
}
ENDING = {**TWO_CTAS, "globals": MBAR}


@pytest.mark.parametrize("access", ACCESSES)
def test_access_to_a_cta_that_may_have_exited(access: str) -> None:
    body = REMOTE.replace("ACCESS", ACCESSES[access])
    silent(body, **ENDING)
    find(without(body, "last"), kind="out-of-bounds", at="access", **ENDING)


def test_arrival_that_the_other_cta_waits_for_needs_no_barrier_at_the_end() -> None:
    body = REMOTE.replace("ACCESS", ACCESSES["arrive"])
    wait = """
    @!%p1 bra done;
    wait_full:
    mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p3, [full], 0;
    @!%p3 bra wait_full;
    done:
    """
    silent(without(body, "last") + wait, **ENDING)


def test_copy_into_a_cta_that_may_have_exited() -> None:
    """Rank 1 copies twice into rank 0, which waits for the bytes of both, or of one."""
    copies = """
    mbarrier.arrive.expect_tx.shared::cluster.b64 _, [%r5], BYTES;
    mov.u32 %r9, 0;
    add.u32 %r7, %r20, 256;
    again:
    cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r4], [%r7], 16, [%r5];  // <copy>
    add.u32 %r4, %r4, 16;
    add.u32 %r9, %r9, 1;
    setp.lt.u32 %p4, %r9, 2;
    @%p4 bra again;
    """
    wait = """
    @!%p1 bra done;
    wait_full:
    mbarrier.try_wait.parity.shared.b64 %p3, [full], 0;
    @!%p3 bra wait_full;
    done:
    """
    body = without(REMOTE, "last") + wait
    silent(body.replace("ACCESS", copies.replace("BYTES", "32")), **ENDING)
    early = body.replace("ACCESS", copies.replace("BYTES", "16"))
    line = lines_of(early, 0, "sm_90a", MBAR)["copy"]
    for schedule in SCHEDULES:
        result = run_kernel(early, expect_reports=True, schedule=schedule, **ENDING)
        assert any(r.line == line and r.kind == "out-of-bounds" for r in result.reports), schedule

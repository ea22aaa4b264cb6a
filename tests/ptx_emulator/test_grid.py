"""Cluster launch control, register counts, clocks, sleep; fences."""

from typing import Any

import numpy as np
import pytest
from harness import run_kernel
from ptx_emulator.errors import UnsupportedInstruction

PERSISTENT = """
    mov.u32 %r20, smem; setp.eq.u32 %p20, %r1, 0; mov.u32 %r2, %ctaid.x; mov.u32 %r3, 0;
    mov.u32 %r21, %cluster_ctarank; mov.u32 %r22, %cluster_nctarank;
    @%p20 mbarrier.init.shared.b64 [%r20], 1;
    fence.mbarrier_init.release.cluster;
    barrier.cluster.arrive; barrier.cluster.wait;
    LOOP:
    mul.wide.u32 %rd10, %r2, 4; add.u64 %rd11, %rd1, %rd10; mov.u32 %r4, 1;
    @%p20 atom.global.add.u32 %r5, [%rd11], %r4;
    @%p20 mbarrier.arrive.expect_tx.shared.b64 _, [%r20], 16;
    {sync}
    setp.eq.u32 %p24, %r21, 0; and.pred %p24, %p24, %p20;
    @%p24 clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes{multicast}.b128
        [%r20+16], [%r20];
    WAIT: mbarrier.try_wait.parity.shared.b64 %p21, [%r20], %r3; @!%p21 bra WAIT;
    ld.shared.b128 %rq1, [%r20+16];
    clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 %p22, %rq1;
    @!%p22 bra DONE;
    clusterlaunchcontrol.query_cancel.get_first_ctaid.v4.b32.b128 {{%r6, %r7, %r8, _}}, %rq1;
    clusterlaunchcontrol.query_cancel.get_first_ctaid::x.b32.b128 %r9, %rq1;
    add.u32 %r2, %r9, %r21; xor.b32 %r3, %r3, 1;
    fence.proxy.async.shared::cta;
    {sync}
    bra LOOP;
    DONE:
    barrier.cluster.arrive; barrier.cluster.wait;
"""


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("options", [{"schedule": "fair"}, {"schedule": "random", "seed": 2}])
def test_every_tile_is_done_once_by_clusters_that_take_those_of_others(cluster: int, options: dict[str, Any]):
    done = np.zeros(24, np.uint32)
    sync = "barrier.cluster.arrive; barrier.cluster.wait;" if cluster > 1 else "bar.sync 0;"
    multicast = ".multicast::cluster::all" if cluster > 1 else ""
    body = PERSISTENT.format(sync=sync, multicast=multicast)
    shape = {"grid": (24, 1, 1), "cluster": (cluster, 1, 1)}
    run_kernel(body, done, target="sm_100a", shared_bytes=64, **shape, **options)
    np.testing.assert_array_equal(done, 1)


def test_clocks_go_on():
    out = np.zeros(6, np.uint64)
    run_kernel(
        """
        setp.ne.u32 %p1, %r1, 0; @%p1 bra DONE;
        mov.u64 %rd10, %clock64; mov.u32 %r2, %clock; mov.u64 %rd11, %globaltimer;
        nanosleep.u32 1000;
        mov.u64 %rd12, %clock64; mov.u32 %r3, %clock; mov.u64 %rd13, %globaltimer;
        cvt.u64.u32 %rd14, %r2; cvt.u64.u32 %rd15, %r3;
        st.global.u64 [%rd1], %rd10; st.global.u64 [%rd1+8], %rd12;
        st.global.u64 [%rd1+16], %rd14; st.global.u64 [%rd1+24], %rd15;
        st.global.u64 [%rd1+32], %rd11; st.global.u64 [%rd1+40], %rd13;
        DONE:
        """,
        out,
    )
    before, after = out[0::2].astype(np.int64), out[1::2].astype(np.int64)
    assert (after - before >= [1500, 1500, 1000]).all()
    assert (after - before <= [1520, 1520, 1020]).all()


def test_without_a_predecessor_there_is_nothing_to_wait_for():
    run_kernel("griddepcontrol.wait; griddepcontrol.launch_dependents; pmevent 3;")


FLAG = """
    mov.u32 %r20, smem; setp.eq.u32 %p20, %r1, 0; mov.u32 %r2, 0; mov.u32 %r3, 1; mov.u32 %r4, 77;
    @%p20 st.shared.u32 [%r20], %r2;
    bar.sync 0;
    setp.ge.u32 %p1, %r1, 32; @%p1 bra READ;
    @%p20 st.shared.u32 [%r20+4], %r4;
    {before}
    @%p20 st.relaxed.cta.shared.u32 [%r20], %r3;
    bra.uni DONE;
    READ:
    SPIN: ld.relaxed.cta.shared.u32 %r5, [%r20]; setp.eq.u32 %p2, %r5, 0; @%p2 bra SPIN;
    {after}
    ld.shared.u32 %r6, [%r20+4];
    DONE:
"""


@pytest.mark.parametrize(
    ("before", "after", "ordered"),
    [
        ("fence.acq_rel.cta;", "fence.acq_rel.cta;", True),
        ("membar.cta;", "membar.gl;", True),
        ("fence.sc.cluster;", "fence.sc.cluster;", True),
        ("fence.release.gpu;", "fence.acquire.gpu;", True),
        ("", "", False),
        ("fence.proxy.alias;", "fence.proxy.alias;", False),
        ("fence.mbarrier_init.release.cluster;", "", False),
    ],
)
def test_fences_around_a_relaxed_flag(before: str, after: str, ordered: bool):
    body = FLAG.format(before=before, after=after)
    result = run_kernel(body, block=(64, 1, 1), shared_bytes=16, expect_reports=True)
    assert {report.kind for report in result.reports} == (set() if ordered else {"race"})


@pytest.mark.parametrize(
    "instruction",
    [
        "fence.proxy.async;",
        "fence.proxy.async.global;",
        "fence.proxy.async.shared::cta;",
        "fence.proxy.async.shared::cluster;",
        "fence.acquire.sync_restrict::shared::cluster.cluster;",
        "fence.release.sync_restrict::shared::cta.cluster;",
        "fence.proxy.async::generic.acquire.sync_restrict::shared::cluster.cluster;",
        "fence.proxy.async::generic.release.sync_restrict::shared::cta.cluster;",
        "fence.proxy.tensormap::generic.release.gpu;",
        "fence.cluster;",
        "membar.sys;",
    ],
)
def test_known_forms(instruction: str):
    run_kernel(instruction)


@pytest.mark.parametrize(
    "instruction",
    [
        "fence.acq_rel;",
        "fence.proxy.texture;",
        "fence.release.sync_restrict::shared::cluster.cluster;",
        "fence.mbarrier_init.release.cta;",
        "membar.gpu;",
        "griddepcontrol.launch;",
        "bar.sync.relaxed 0;",
        "mbarrier.arrive.release.shared.b64 _, [%r1];",
        "mbarrier.arrive.shared::cluster.b64 %rd1, [%r1];",
        "mbarrier.try_wait.parity.shared::cluster.b64 %p1, [%r1], 0;",
        "shfl.idx.b32 %r2, %r1, 0, 31;",
        "redux.sync.add.f32 %f1, %f2, 0xffffffff;",
        "redux.sync.min.f32 %f1, %f2, 0xffffffff;",
        "cp.async.bulk.tensor.4d.shared::cta.global.im2col.mbarrier::complete_tx::bytes"
        " [%r1], [%rd1, {0, 0, 0, 0}], [%r2], {%rs1, %rs2};",
        "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes.ignore_oob [%r1], [%rd1], 16, [%r2];",
    ],
)
def test_unknown_forms_are_refused(instruction: str):
    with pytest.raises(UnsupportedInstruction, match="not supported"):
        run_kernel(instruction)

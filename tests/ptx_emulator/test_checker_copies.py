"""The checker on asynchronous copies: mbarriers, bulk copies and their groups, proxy fences, cp.async."""

from __future__ import annotations

import pytest
from harness import run_kernel
from planted_bugs import MBAR, SCHEDULES, TWO_WARPS, find, lines_of, silent, without, zeros

PIPELINE = """
mov.u32 %r20, smem;
mov.u32 %r21, full;
mov.u32 %r22, empty;
setp.eq.u32 %p1, %r1, 0;
@%p1 mbarrier.init.shared.b64 [full], 1;
@%p1 mbarrier.init.shared.b64 [empty], 32;
fence.mbarrier_init.release.cluster;
bar.sync 0;
setp.lt.u32 %p2, %r1, 32;
mov.u32 %r9, 0;
@!%p2 bra consumer;
@!%p1 bra done;
producer:
and.b32 %r10, %r9, 1;
xor.b32 %r11, %r10, 1;
wait_empty:  // [empty]
mbarrier.try_wait.parity.shared.b64 %p3, [empty], %r11;  // [empty]
@!%p3 bra wait_empty;  // [empty]
mbarrier.arrive.expect_tx.shared.b64 %rd9, [full], 128;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r20], [%rd1], 128, [%r21];  // <load>
add.u32 %r9, %r9, 1;
setp.lt.u32 %p4, %r9, 4;
@%p4 bra producer;
bra done;
consumer:
and.b32 %r10, %r9, 1;
wait_full:  // [full]
mbarrier.try_wait.parity.shared.b64 %p3, [full], %r10;  // [full]
@!%p3 bra wait_full;  // [full]
ld.shared.u32 %r3, [smem+64];  // <read>
mbarrier.arrive.shared.b64 %rd9, [empty];
add.u32 %r9, %r9, 1;
setp.lt.u32 %p4, %r9, 4;
@%p4 bra consumer;
done:
"""
PIPELINED = {"block": (64, 1, 1), "shared_bytes": 1024, "globals": MBAR}


def test_pipeline_is_silent() -> None:
    silent(PIPELINE, zeros(), **PIPELINED)


def test_consumer_that_does_not_wait() -> None:
    body = without(PIPELINE, "full")
    marks = lines_of(body, 1, "sm_90a", MBAR)
    for schedule in SCHEDULES:
        result = run_kernel(body, zeros(), expect_reports=True, schedule=schedule, **PIPELINED)
        assert any(r.line == marks["read"] and r.kind in ("race", "uninitialised") for r in result.reports)


def test_load_over_what_is_being_read() -> None:
    body = without(PIPELINE, "empty")
    marks = lines_of(body, 1, "sm_90a", MBAR)
    for schedule in SCHEDULES:
        result = run_kernel(body, zeros(), expect_reports=True, schedule=schedule, **PIPELINED)
        races = [{r.line, r.other.line} for r in result.reports if r.other and r.kind == "race"]
        assert {marks["load"], marks["read"]} in races or {marks["load"]} in races, schedule


STORE = """
shl.b32 %r2, %r1, 2;
mov.u32 %r20, smem;
add.u32 %r3, %r20, %r2;
st.shared.u32 [%r3], %r1;  // <write>
fence.proxy.async.shared::cta;  // [writer]
bar.sync 0;
fence.proxy.async.shared::cta;  // [issuer]
setp.eq.u32 %p1, %r1, 0;
@%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r20], 256;  // <store>
@%p1 cp.async.bulk.commit_group;
@%p1 cp.async.bulk.wait_group.read 0;  // [reuse]
bar.sync 0;
st.shared.u32 [%r3], %r2;  // <second>
"""


@pytest.mark.parametrize("fence", ["writer", "issuer"])
def test_one_proxy_fence_is_enough(fence: str) -> None:
    silent(without(STORE, fence), zeros(), **TWO_WARPS)


def test_missing_proxy_fence() -> None:
    find(
        without(STORE, "writer", "issuer"), zeros(), kind="proxy-race", at="store", other="write", **TWO_WARPS
    )


def test_source_of_a_store_reused_too_early() -> None:
    body = without(STORE, "issuer", "reuse")
    marks = lines_of(body, 1, "sm_90a", "")
    for schedule in SCHEDULES:
        result = run_kernel(body, zeros(), expect_reports=True, schedule=schedule, **TWO_WARPS)
        assert any(
            {r.line, r.other.line} == {marks["store"], marks["second"]} for r in result.reports if r.other
        )


def test_load_over_generic_writes() -> None:
    body = """
    setp.eq.u32 %p1, %r1, 0;
    mov.u32 %r20, smem;
    mov.u32 %r21, full;
    @%p1 mbarrier.init.shared.b64 [full], 1;
    fence.mbarrier_init.release.cluster;
    st.shared.u32 [smem], %r1;  // <write>
    fence.proxy.async;  // [fence]
    bar.sync 0;
    @!%p1 bra wait_full;
    mbarrier.arrive.expect_tx.shared.b64 %rd9, [full], 128;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r20], [%rd1], 128, [%r21];  // <load>
    wait_full:
    mbarrier.try_wait.parity.shared.b64 %p3, [full], 0;  // [wait]
    @!%p3 bra wait_full;  // [wait]
    ld.shared.u32 %r3, [smem];  // <read>
    """
    launch = {"block": (32, 1, 1), "shared_bytes": 1024, "globals": MBAR}
    silent(body, zeros(), **launch)
    find(without(body, "fence"), zeros(), kind="proxy-race", at="load", other="write", **launch)
    find(without(body, "wait"), zeros(), kind="race", at="load", other="read", **launch)


ASYNC_COPY = """
shl.b32 %r2, %r1, 4;
mov.u32 %r20, smem;
add.u32 %r3, %r20, %r2;
mul.wide.u32 %rd3, %r1, 16;
add.u64 %rd4, %rd1, %rd3;
cp.async.cg.shared.global [%r3], [%rd4], 16;  // <copy>
cp.async.commit_group;
cp.async.wait_group 0;  // [wait]
bar.sync 0;
xor.b32 %r5, %r2, 512;
add.u32 %r6, %r20, %r5;
ld.shared.u32 %r7, [%r6];  // <read>
"""


def test_cp_async() -> None:
    silent(ASYNC_COPY, zeros(256), **TWO_WARPS)
    body = without(ASYNC_COPY, "wait")
    marks = lines_of(body, 1, "sm_90a", "")
    for schedule in SCHEDULES:
        result = run_kernel(body, zeros(256), expect_reports=True, schedule=schedule, **TWO_WARPS)
        pairs = [{r.line, r.other.line} for r in result.reports if r.other and r.kind == "race"]
        assert {marks["copy"], marks["read"]} in pairs, schedule


INITIALISED = """
setp.eq.u32 %p1, %r1, ISSUER;
setp.eq.u32 %p5, %r1, 0;
mov.u32 %r20, smem;
mov.u32 %r21, full;
@%p5 mbarrier.init.shared.b64 [full], 1;  // <init>
FENCE
bar.sync 0;
LATER
@!%p1 bra wait_full;
mbarrier.arrive.expect_tx.shared.b64 %rd9, [full], 128;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r20], [%rd1], 128, [%r21];  // <load>
wait_full:
mbarrier.try_wait.parity.shared.b64 %p3, [full], 0;
@!%p3 bra wait_full;
ld.shared.u32 %r3, [smem];
"""


@pytest.mark.parametrize("issuer", ["0", "32"], ids=["same-thread", "other-warp"])
def test_initialisation_of_an_mbarrier_is_fenced(issuer: str) -> None:
    body = INITIALISED.replace("ISSUER", issuer)
    launch = {**TWO_WARPS, "globals": MBAR}
    fences = ("fence.mbarrier_init.release.cluster;", "fence.proxy.async;", "fence.proxy.async.shared::cta;")
    for fence in fences:
        silent(body.replace("FENCE", fence).replace("LATER", ""), zeros(), **launch)
    silent(body.replace("FENCE", "").replace("LATER", fences[1]), zeros(), **launch)
    without_fence = body.replace("FENCE", "").replace("LATER", "")
    find(without_fence, zeros(), kind="proxy-race", at="load", other="init", **launch)
    elsewhere = body.replace("FENCE", "@!%p5 fence.mbarrier_init.release.cluster;").replace("LATER", "")
    if issuer == "32":  # a fence of threads that have not initialised it
        elsewhere = elsewhere.replace("@!%p5", "@%p1")
        find(elsewhere, zeros(), kind="proxy-race", at="load", other="init", **launch)

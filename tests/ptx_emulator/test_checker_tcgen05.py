"""The checker on tensor memory: waits, tcgen05 fences, commits, and the proxy fence of the operands."""

from __future__ import annotations

import re

import pytest
from harness import run_kernel
from planted_bugs import SCHEDULES, find, lines_of, silent, without

BLACKWELL = {"target": "sm_100a", "shared_bytes": 16384}
MBAR = ".shared .align 8 .b64 full;\n.shared .align 4 .b32 slot;\n"
ALLOC = """
setp.lt.u32 %p10, %r1, 32;
setp.eq.u32 %p11, %r1, 0;
@%p11 mbarrier.init.shared.b64 [full], 1;
fence.mbarrier_init.release.cluster;
mov.u32 %r40, slot;
@%p10 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r40], 64;
bar.sync 0;
ld.shared.b32 %r41, [slot];
"""
FREE = """
tcgen05.fence::before_thread_sync;
bar.sync 0;
@%p10 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r41, 64;
@%p10 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
"""

# Warps 0 and 4 have the same quarter of the lanes.
HANDOVER = f"""{ALLOC}
setp.lt.u32 %p1, %r1, 128;
@%p1 tcgen05.st.sync.aligned.32x32b.x1.b32 [%r41], {{%r1}};  // <store>
@%p1 tcgen05.wait::st.sync.aligned;  // [wait_st]
tcgen05.fence::before_thread_sync;  // [before]
bar.sync 0;  // [bar]
tcgen05.fence::after_thread_sync;  // [after]
@!%p1 tcgen05.ld.sync.aligned.32x32b.x1.b32 {{%r2}}, [%r41];  // <load>
@!%p1 tcgen05.wait::ld.sync.aligned;  // [wait_ld]
tcgen05.fence::before_thread_sync;
bar.sync 0;
tcgen05.fence::after_thread_sync;
@%p1 tcgen05.st.sync.aligned.32x32b.x1.b32 [%r41], {{%r1}};  // <again>
@%p1 tcgen05.wait::st.sync.aligned;
{FREE}
"""
EIGHT_WARPS = {"block": (256, 1, 1), "globals": MBAR, **BLACKWELL}


def test_handover_is_silent() -> None:
    silent(HANDOVER, **EIGHT_WARPS)


@pytest.mark.parametrize("fence", ["before", "after"])
def test_missing_tcgen05_fence(fence: str) -> None:
    find(without(HANDOVER, fence), kind="tcgen05-order", at="load", other="store", **EIGHT_WARPS)


def test_missing_wait_for_stores() -> None:
    find(without(HANDOVER, "wait_st"), kind="race", at="load", other="store", **EIGHT_WARPS)


def test_missing_wait_for_loads() -> None:
    find(without(HANDOVER, "wait_ld"), kind="tcgen05-order", at="again", other="load", **EIGHT_WARPS)


def test_missing_barrier() -> None:
    body = without(HANDOVER, "bar")
    marks = lines_of(body, 0, "sm_100a", MBAR)
    for schedule in SCHEDULES:
        result = run_kernel(body, expect_reports=True, schedule=schedule, **EIGHT_WARPS)
        pairs = [{r.line, r.other.line} for r in result.reports if r.other and r.kind == "race"]
        assert {marks["load"], marks["store"]} in pairs, schedule


def test_load_behind_a_store_of_the_same_warp() -> None:
    body = f"""{ALLOC}
    tcgen05.st.sync.aligned.32x32b.x1.b32 [%r41], {{%r1}};  // <store>
    tcgen05.wait::st.sync.aligned;  // [wait]
    tcgen05.ld.sync.aligned.32x32b.x1.b32 {{%r2}}, [%r41];  // <load>
    tcgen05.wait::ld.sync.aligned;
    {FREE}
    """
    launch = {"block": (128, 1, 1), "globals": MBAR, **BLACKWELL}
    silent(body, **launch)
    find(without(body, "wait"), kind="race", at="load", other="store", **launch)


def test_store_behind_a_load_of_the_same_warp() -> None:
    body = f"""{ALLOC}
    tcgen05.st.sync.aligned.32x32b.x1.b32 [%r41], {{%r1}};
    tcgen05.wait::st.sync.aligned;
    tcgen05.ld.sync.aligned.32x32b.x1.b32 {{%r2}}, [%r41];
    tcgen05.st.sync.aligned.32x32b.x1.b32 [%r41], {{%r1}};
    tcgen05.wait::st.sync.aligned;
    {FREE}
    """
    silent(body, block=(128, 1, 1), globals=MBAR, **BLACKWELL)


def test_uninitialised_tensor_memory() -> None:
    body = f"""{ALLOC}
    tcgen05.st.sync.aligned.32x32b.x1.b32 [%r41], {{%r1}};
    tcgen05.wait::st.sync.aligned;
    tcgen05.ld.sync.aligned.32x32b.x2.b32 {{%r2, %r3}}, [%r41];  // <load>
    tcgen05.wait::ld.sync.aligned;
    {FREE}
    """
    result = run_kernel(body, block=(128, 1, 1), globals=MBAR, expect_reports=True, **BLACKWELL)
    (report,) = result.reports
    assert report.kind == "uninitialised"
    assert re.search(r"TMEM lane (0|32|64|96), column 1 of CTA \(0, 0, 0\)", report.message)
    assert report.line == lines_of(body, 0, "sm_100a", MBAR)["load"]


# D [128, 64] = A [128, 16] * B [64, 16] in fp16, operands without a swizzle. 128 threads.
INSTRUCTION_DESCRIPTOR = 1 << 4 | 64 // 8 << 17 | 128 // 16 << 24
DESCRIPTOR = 1 << 46 | (256 >> 4) << 32 | (128 >> 4) << 16
PRODUCT = f"""{ALLOC}
shl.b32 %r2, %r1, 2;
mov.u32 %r20, smem;
mov.u32 %r42, full;
add.u32 %r3, %r20, %r2;
mov.u32 %r9, 0;
fill:
st.shared.u32 [%r3], 0;  // <fill>
add.u32 %r3, %r3, 512;
add.u32 %r9, %r9, 1;
setp.lt.u32 %p1, %r9, 12;
@%p1 bra fill;
fence.proxy.async.shared::cta;  // [proxy]
bar.sync 0;
shr.u32 %r4, %r20, 4;
cvt.u64.u32 %rd10, %r4;
or.b64 %rd11, %rd10, {DESCRIPTOR};
add.u64 %rd12, %rd11, 256;
mov.u32 %r5, {INSTRUCTION_DESCRIPTOR};
setp.ne.u32 %p2, %r1, %r1;
setp.eq.u32 %p3, %r1, %r1;
@!%p11 bra wait_full;
tcgen05.mma.cta_group::1.kind::f16 [%r41], %rd11, %rd12, %r5, %p2;  // <mma>
tcgen05.mma.cta_group::1.kind::f16 [%r41], %rd11, %rd12, %r5, %p3;  // <accumulate>
tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r42];
wait_full:
mbarrier.try_wait.parity.shared.b64 %p4, [full], 0;  // [wait]
@!%p4 bra wait_full;  // [wait]
tcgen05.fence::after_thread_sync;  // [after]
tcgen05.ld.sync.aligned.32x32b.x1.b32 {{%r6}}, [%r41];  // <load>
tcgen05.wait::ld.sync.aligned;
st.shared.u32 [%r3+-512], 0;  // <reuse>
{FREE}
"""
FOUR_WARPS = {"block": (128, 1, 1), "globals": MBAR, **BLACKWELL}


def test_product_is_silent() -> None:
    silent(PRODUCT, **FOUR_WARPS)


def test_operands_need_a_proxy_fence() -> None:
    find(without(PRODUCT, "proxy"), kind="proxy-race", at="mma", other="fill", **FOUR_WARPS)


def test_missing_fence_behind_a_commit() -> None:
    find(without(PRODUCT, "after"), kind="tcgen05-order", at="load", other="accumulate", **FOUR_WARPS)


def test_missing_wait_for_a_product() -> None:
    body = without(PRODUCT, "wait")
    marks = lines_of(body, 0, "sm_100a", MBAR)
    for schedule in ("fair", "greedy"):
        result = run_kernel(body, expect_reports=True, schedule=schedule, **FOUR_WARPS)
        pairs = [{r.line, r.other.line} for r in result.reports if r.other and r.kind == "race"]
        assert any(marks["load"] in pair for pair in pairs), schedule
        assert any(marks["reuse"] in pair for pair in pairs), schedule
    late = run_kernel(body, expect_reports=True, schedule="late", **FOUR_WARPS)
    assert {r.kind for r in late.reports} == {"uninitialised", "tmem"}  # freed before the product begins


def test_accumulator_that_holds_nothing() -> None:
    body = PRODUCT.replace("%r5, %p2;", "%r5, %p3;")
    find(body, kind="uninitialised", at="mma", **FOUR_WARPS)


# ---------------------------------------------------------------------- registers of tcgen05.ld

LOADED = f"""{ALLOC}
tcgen05.st.sync.aligned.32x32b.x2.b32 [%r41], {{%r1, %r1}};
tcgen05.wait::st.sync.aligned;
tcgen05.ld.sync.aligned.32x32b.x2.b32 {{%r2, %r3}}, [%r41];  // <load>
MOVES
tcgen05.wait::ld.sync.aligned;  // [wait]
USES
{FREE}
"""
USES = {
    "add": ("", "add.u32 %r4, %r1, %r3;  // <use>"),
    "moved": ("mov.b64 %rd5, {%r2, %r3};\nmov.b64 %rd6, %rd5;", "add.u64 %rd7, %rd6, 1;  // <use>"),
    "unpacked": ("mov.b64 %rd5, {%r2, %r3};\nmov.b64 {%r6, %r7}, %rd5;", "add.u32 %r8, %r6, 1;  // <use>"),
    "stored": ("", "st.shared.u32 [smem], %r3;  // <use>"),
    "predicate": ("", "setp.eq.u32 %p1, %r2, 0;  // <use>"),
    "guarded": ("", "setp.eq.u32 %p1, %r1, %r1;\n@%p1 add.u32 %r4, %r2, 1;  // <use>"),
}


@pytest.mark.parametrize("form", USES)
def test_register_used_before_the_wait_for_loads(form: str) -> None:
    launch = {"block": (32, 1, 1), "globals": MBAR, **BLACKWELL}
    body = LOADED.replace("MOVES", USES[form][0]).replace("USES", USES[form][1])
    silent(body, **launch)
    find(without(body, "wait"), kind="tcgen05-order", at="use", other="load", **launch)


def test_register_used_before_the_wait_in_one_of_two_ways() -> None:
    body = f"""{ALLOC}
    tcgen05.st.sync.aligned.32x32b.x1.b32 [%r41], {{%r1}};
    tcgen05.wait::st.sync.aligned;
    mov.u32 %r9, 0;
    again:
    tcgen05.ld.sync.aligned.32x32b.x1.b32 {{%r2}}, [%r41];  // <load>
    setp.eq.u32 %p1, %r9, WAY;
    @%p1 bra skip;
    tcgen05.wait::ld.sync.aligned;
    skip:
    add.u32 %r3, %r2, 1;  // <use>
    add.u32 %r9, %r9, 1;
    setp.lt.u32 %p2, %r9, 3;
    @%p2 bra again;
    tcgen05.wait::ld.sync.aligned;
    {FREE}
    """
    launch = {"block": (32, 1, 1), "globals": MBAR, **BLACKWELL}
    silent(body.replace("WAY", "7"), **launch)
    find(body.replace("WAY", "2"), kind="tcgen05-order", at="use", other="load", **launch)


def test_register_that_is_written_again_before_it_is_read() -> None:
    body = LOADED.replace("MOVES", "").replace("USES", "mov.u32 %r2, 5;\nadd.u32 %r4, %r2, 1;")
    silent(without(body, "wait"), block=(32, 1, 1), globals=MBAR, **BLACKWELL)


# ---------------------------------------------------------------------- freeing, lanes

# Warp 1 tells warp 0 through a flag that it has finished.
FREED = f"""{ALLOC}
setp.eq.u32 %p1, %r1, 32;
@%p11 st.volatile.shared.u32 [smem], 0;
bar.sync 0;
@%p10 bra poll;
tcgen05.st.sync.aligned.32x32b.x1.b32 [%r41], {{%r1}};  // <store>
tcgen05.wait::st.sync.aligned;
membar.cta;  // [fence]
@%p1 st.volatile.shared.u32 [smem], 1;
bra done;
poll:
ld.volatile.shared.u32 %r3, [smem];
setp.eq.u32 %p2, %r3, 0;
@%p2 bra poll;
membar.cta;
tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r41, 64;  // <free>
tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
done:
"""
TWO_WARPS_TMEM = {"block": (64, 1, 1), "globals": MBAR, **BLACKWELL}


def test_memory_freed_while_it_may_be_in_use() -> None:
    silent(FREED, **TWO_WARPS_TMEM)
    find(without(FREED, "fence"), kind="race", at="free", other="store", **TWO_WARPS_TMEM)


def test_memory_freed_before_own_stores_are_complete() -> None:
    body = f"""{ALLOC}
    tcgen05.st.sync.aligned.32x32b.x1.b32 [%r41], {{%r1}};  // <store>
    tcgen05.wait::st.sync.aligned;  // [wait]
    tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r41, 64;  // <free>
    """
    launch = {"block": (32, 1, 1), "globals": MBAR, **BLACKWELL}
    silent(body, **launch)
    find(without(body, "wait"), kind="race", at="free", other="store", **launch)


@pytest.mark.parametrize("instruction", ["ld", "st"])
def test_lanes_of_another_warp(instruction: str) -> None:
    store = "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r42], {%r1};"
    load = "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r2}, [%r42];"
    body = f"""{ALLOC}
    mov.u32 %r42, %r41;
    {"" if instruction == "st" else store}
    tcgen05.wait::st.sync.aligned;
    ADDRESS
    {store if instruction == "st" else load}  // <access>
    tcgen05.wait::ld.sync.aligned;
    tcgen05.wait::st.sync.aligned;
    {FREE}
    """
    launch = {"block": (128, 1, 1), "globals": MBAR, **BLACKWELL}
    own = "shl.b32 %r3, %r1, 16;\nand.b32 %r3, %r3, 0x600000;\nor.b32 %r42, %r41, %r3;"
    silent(body.replace("ADDRESS", ""), **launch)
    silent(body.replace("ADDRESS", own), **launch)
    other = body.replace("ADDRESS", "add.u32 %r42, %r41, 0x200000;")
    find(other, kind="tmem-lanes", at="access", **launch)
    result = run_kernel(other, expect_reports=True, **launch)
    assert result.reports[0].times == 3  # warps 0, 2 and 3
    assert re.search(r"lane 32 .* warp [023] can access", result.reports[0].message)


# ---------------------------------------------------------------------- initialised mbarriers


def test_commit_to_an_mbarrier_that_was_not_fenced() -> None:
    body = f"""
    setp.lt.u32 %p10, %r1, 32;
    setp.eq.u32 %p11, %r1, 0;
    @%p11 mbarrier.init.shared.b64 [full], 1;  // <init>
    fence.mbarrier_init.release.cluster;  // [fence]
    mov.u32 %r42, full;
    mov.u32 %r40, slot;
    @%p10 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r40], 64;
    bar.sync 0;
    ld.shared.b32 %r41, [slot];
    @%p11 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r42];  // <commit>
    wait_full:
    mbarrier.try_wait.parity.shared.b64 %p4, [full], 0;
    @!%p4 bra wait_full;
    {FREE}
    """
    silent(body, **FOUR_WARPS)
    find(without(body, "fence"), kind="proxy-race", at="commit", other="init", **FOUR_WARPS)

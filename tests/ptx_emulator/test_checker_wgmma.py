"""The checker on wgmma: operands are read through the async proxy, until the group has been waited for."""

from __future__ import annotations

import pytest
from harness import run_kernel
from planted_bugs import SCHEDULES, find, lines_of, silent, without

# A [64, 16] and B [8, 16] in fp16 without a swizzle.
D, E = "{%f0, %f1, %f2, %f3}", "{%f4, %f5, %f6, %f7}"
DESCRIPTOR = (256 >> 4) << 32 | (128 >> 4) << 16
PRODUCT = f"""
shl.b32 %r2, %r1, 2;
mov.u32 %r20, smem;
add.u32 %r3, %r20, %r2;
mov.u32 %r9, 0;
fill:
st.shared.u32 [%r3], 0;  // <fill>
add.u32 %r3, %r3, 512;
add.u32 %r9, %r9, 1;
setp.lt.u32 %p1, %r9, 5;
@%p1 bra fill;
fence.proxy.async;  // [proxy]
bar.sync 0;
shr.u32 %r4, %r20, 4;
cvt.u64.u32 %rd10, %r4;
or.b64 %rd11, %rd10, {DESCRIPTOR};
add.u64 %rd12, %rd11, 128;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {D}, %rd11, %rd12, 0, 1, 1, 0, 0;  // <mma>
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;  // [wait]
bar.sync 0;
st.shared.u32 [%r3+-512], 0;  // <reuse>
"""
WARPGROUP = {"block": (128, 1, 1), "shared_bytes": 4096}


def test_product_is_silent() -> None:
    silent(PRODUCT, **WARPGROUP)


def test_operands_need_a_proxy_fence() -> None:
    find(without(PRODUCT, "proxy"), kind="proxy-race", at="mma", other="fill", **WARPGROUP)


def test_operands_overwritten_before_the_wait() -> None:
    body = without(PRODUCT, "wait")
    marks = lines_of(body, 0, "sm_90a", "")
    for schedule in SCHEDULES:
        result = run_kernel(body, expect_reports=True, schedule=schedule, **WARPGROUP)
        pairs = [{r.line, r.other.line} for r in result.reports if r.other and r.kind == "race"]
        assert {marks["mma"], marks["reuse"]} in pairs, schedule


# The result of PRODUCT is stored, perhaps with a copy in between.
STORED = PRODUCT.partition("bar.sync 0;\nst.shared")[0] + "mov.f32 %f10, %f1;\n"
STORE = "st.shared.f32 [%r3], %f0;  // <use>"


@pytest.mark.parametrize(
    "use",
    [STORE, "add.f32 %f11, %f10, %f0;  // <use>", "fma.rn.f32 %f2, %f20, %f20, %f20;  // <use>",
     "mov.f32 %f3, 0f00000000;  // <use>", "st.shared.f32 [%r3], %f10;  // <use>"],
    ids=["read", "read of a copy too", "write", "constant", "read of a copy"],
)  # fmt: skip
def test_accumulators_used_before_the_wait(use: str) -> None:
    silent(STORED + use, **WARPGROUP)
    body = without(STORED, "wait") + use
    marks = lines_of(body, 0, "sm_90a", "")
    for schedule in SCHEDULES:
        result = run_kernel(body, expect_reports=True, schedule=schedule, **WARPGROUP)
        pairs = [(r.line, r.other.line) for r in result.reports if r.other and r.kind == "wgmma-order"]
        assert pairs == [(marks["use"], marks["mma"])], schedule


# Two products in flight: one is waited for, or both.
PIPELINED = f"""
{PRODUCT.partition("wgmma.fence")[0]}
wgmma.fence.sync.aligned;
mov.u32 %r9, 0;
again:
wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {D}, %rd11, %rd12, 0, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {E}, %rd11, %rd12, 0, 1, 1, 0, 0;  // <second>
wgmma.commit_group.sync.aligned;
setp.eq.u32 %p2, %r9, 0;
@%p2 bra first;
add.f32 %f11, %f20, %f21;
first:
wgmma.wait_group.sync.aligned 1;
add.f32 %f10, %f0, %f1;
mov.f32 %f20, %f0;
mov.f32 %f21, %f1;
wgmma.wait_group.sync.aligned N;
add.f32 %f10, %f4, %f5;  // <use>
add.u32 %r9, %r9, 1;
setp.lt.u32 %p1, %r9, 3;
@%p1 bra again;
"""


def test_groups_that_were_waited_for_are_silent() -> None:
    silent(PIPELINED.replace("aligned N", "aligned 0"), **WARPGROUP)
    find(
        PIPELINED.replace("aligned N", "aligned 1"), kind="wgmma-order", at="use", other="second", **WARPGROUP
    )

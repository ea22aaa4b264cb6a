"""The checker finds planted bugs at the right line, and is silent about code that is right.

Each kernel is written right, with `// [name]` behind instructions that a test drops; `// <name>` marks where
a finding is expected.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from harness import kernel_text, run_kernel
from ptx_emulator.machine import LoadedModule, Machine, Result

SCHEDULES = ("fair", "greedy", "late", "greedy-late", "random")
MBAR = ".shared .align 8 .b64 full;\n.shared .align 8 .b64 empty;\n"


def without(body: str, *names: str) -> str:
    """The kernel without the lines that carry `// [name]`; the line numbers stay."""
    for name in names:
        assert f"[{name}]" in body
        body = re.sub(rf"^.*// \[{name}\]$", "//", body, flags=re.M)
    return body


def lines_of(body: str, num_arrays: int, target: str, module_scope: str) -> dict[str, int]:
    """PTX line of each `// <name>`."""
    text = kernel_text(body, num_arrays, target, module_scope)
    return {m[1]: n for n, line in enumerate(text.splitlines(), 1) if (m := re.search(r"// .*<(\w+)>", line))}


def find(body: str, *arrays: np.ndarray, kind: str, at: str, other: str = "", **launch: Any) -> None:
    """Runs under every schedule; each must report `kind` at the marks and nothing of another kind.

    `at` is the instruction, `other` the one it conflicts with; the schedule says which of them comes first.
    """
    marks = lines_of(body, len(arrays), launch.get("target", "sm_90a"), launch.get("globals", ""))
    wanted = {marks[at], marks[other]} if other else {marks[at], 0}
    for schedule in SCHEDULES:
        result = run_kernel(
            body, *(a.copy() for a in arrays), expect_reports=True, schedule=schedule, **launch
        )
        assert {r.kind for r in result.reports} == {kind}, (schedule, [str(r) for r in result.reports])
        found = [{r.line, r.other.line if r.other else 0} for r in result.reports]
        assert wanted in found, (schedule, wanted, [str(r) for r in result.reports])


def silent(body: str, *arrays: np.ndarray, **launch: Any) -> None:
    """Runs under every schedule and a few seeds without a finding."""
    for schedule in SCHEDULES:
        for seed in range(4 if schedule == "random" else 1):
            run_kernel(body, *(a.copy() for a in arrays), schedule=schedule, seed=seed, **launch)


def zeros(size: int = 64) -> np.ndarray:
    return np.zeros(size, dtype=np.uint32)


# ---------------------------------------------------------------------- bar.sync

EXCHANGE = """
shl.b32 %r2, %r1, 2;
mov.u32 %r3, smem;
add.u32 %r4, %r3, %r2;
xor.b32 %r5, %r2, 128;
add.u32 %r6, %r3, %r5;
st.shared.u32 [%r4], %r1;  // <write>
bar.sync 0;  // [raw]
ld.shared.u32 %r7, [%r6];  // <read>
bar.sync 0;  // [war]
st.shared.u32 [%r4], %r7;  // <second>
add.u64 %rd2, %rd1, %rd0;
st.global.u32 [%rd2], %r7;
"""
TWO_WARPS = {"block": (64, 1, 1), "shared_bytes": 1024}


def test_exchange_is_silent() -> None:
    silent(EXCHANGE, zeros(), **TWO_WARPS)


def test_read_after_write() -> None:
    body = without(EXCHANGE, "raw")
    marks = lines_of(body, 1, "sm_90a", "")
    for schedule in SCHEDULES:
        result = run_kernel(body, zeros(), expect_reports=True, schedule=schedule, **TWO_WARPS)
        races = [{r.line, r.other.line} for r in result.reports if r.kind == "race" and r.other]
        assert {marks["write"], marks["read"]} in races, schedule
        assert {r.kind for r in result.reports} <= {"race", "uninitialised"}


def test_write_after_read() -> None:
    find(without(EXCHANGE, "war"), zeros(), kind="race", at="second", other="read", **TWO_WARPS)


def test_write_after_write() -> None:
    body = """
    st.shared.u32 [smem], %r1;  // <write>
    """
    find(body, kind="race", at="write", other="write", **TWO_WARPS)


def test_bytes_of_a_word_are_apart() -> None:
    body = """
    setp.lt.u32 %p1, %r1, 32;
    @%p1 st.shared.u8 [smem], %r1;
    @!%p1 st.shared.u8 [smem+1], %r1;
    bar.sync 0;
    ld.shared.u16 %rs1, [smem];
    """
    silent(body, **TWO_WARPS)


def test_report_says_who_and_where() -> None:
    body = without(EXCHANGE, "war")
    result = run_kernel(body, zeros(), expect_reports=True, schedule="greedy", **TWO_WARPS)
    report = result.reports[0]
    assert report.kernel == "kernel"
    assert report.cta == 0
    assert report.other is not None
    assert {report.warp, report.other.warp} == {0, 1}
    assert 0 <= report.lane < 32
    assert re.search(r"shared memory 0x[0-9a-f]+ of CTA 0", report.message)


def test_each_pair_of_instructions_is_reported_once() -> None:
    body = """
    mov.u32 %r9, 0;
    again:
    st.shared.u32 [smem], %r1;
    add.u32 %r9, %r9, 1;
    setp.lt.u32 %p1, %r9, 50;
    @%p1 bra again;
    """
    result = run_kernel(body, expect_reports=True, schedule="random", **TWO_WARPS)
    assert [r.kind for r in result.reports] == ["race"]


def test_checks_can_be_off() -> None:
    assert not run_kernel(without(EXCHANGE, "raw", "war"), zeros(), checks=False, **TWO_WARPS).reports


NAMED_PAIR = """
setp.lt.u32 %p1, %r1, 32;
mov.u32 %r9, 0;
@!%p1 bra consumer;
producer:
st.shared.u32 [smem], %r9;  // <write>
bar.arrive 1, 64;
bar.sync 2, 64;  // [back]
add.u32 %r9, %r9, 1;
setp.lt.u32 %p2, %r9, 4;
@%p2 bra producer;
bra done;
consumer:
bar.sync 1, 64;
ld.shared.u32 %r3, [smem];  // <read>
bar.arrive 2, 64;  // [back]
add.u32 %r9, %r9, 1;
setp.lt.u32 %p2, %r9, 4;
@%p2 bra consumer;
done:
"""


def test_named_barrier_pair() -> None:
    silent(NAMED_PAIR, **TWO_WARPS)


def test_single_buffer_with_one_barrier() -> None:
    body = NAMED_PAIR.replace("bar.arrive 1, 64", "bar.sync 1, 64")
    find(without(body, "back"), kind="race", at="write", other="read", **TWO_WARPS)


def test_double_buffer_needs_no_second_barrier() -> None:
    body = """
    setp.lt.u32 %p1, %r1, 32;
    mov.u32 %r9, 0;
    again:
    and.b32 %r10, %r9, 1;
    shl.b32 %r10, %r10, 7;
    mov.u32 %r11, smem;
    add.u32 %r11, %r11, %r10;
    @%p1 st.shared.u32 [%r11], %r9;
    bar.sync 0;
    ld.shared.u32 %r3, [%r11];
    add.u32 %r9, %r9, 1;
    setp.lt.u32 %p2, %r9, 6;
    @%p2 bra again;
    """
    silent(body, **TWO_WARPS)


# ---------------------------------------------------------------------- mbarriers and bulk copies

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


# ---------------------------------------------------------------------- what nobody wrote


def test_uninitialised_shared_memory() -> None:
    body = """
    setp.lt.u32 %p1, %r1, 8;
    shl.b32 %r2, %r1, 2;
    mov.u32 %r3, smem;
    add.u32 %r4, %r3, %r2;
    @%p1 st.shared.u32 [%r4], %r1;
    ld.shared.u32 %r5, [%r4];  // <read>
    """
    result = run_kernel(body, expect_reports=True, shared_bytes=256)
    (report,) = result.reports
    assert (report.kind, report.lane) == ("uninitialised", 8)
    assert "0x20" in report.message
    assert report.line == lines_of(body, 0, "sm_90a", "")["read"]


def test_uninitialised_global_memory() -> None:
    body = """
    add.u64 %rd2, %rd1, %rd0;
    setp.ne.u32 %p1, %r1, 5;
    @%p1 st.global.u32 [%rd2], %r1;
    ld.global.u32 %r5, [%rd2];  // <read>
    """
    result = run_kernel(body, zeros(32), expect_reports=True, initialised=False)
    (report,) = result.reports
    assert (report.kind, report.lane) == ("uninitialised", 5)
    assert "array1 + 20 bytes" in report.message
    silent(body, zeros(32))


# ---------------------------------------------------------------------- clusters

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
        assert {race.cta, race.other.cta} == {0, 1}


def test_relaxed_cluster_arrival_releases_nothing() -> None:
    body = CLUSTER.replace("arrive.aligned;  // [cluster]", "arrive.relaxed.aligned;  // [cluster]")
    find(body, kind="race", at="read", other="write", **TWO_CTAS)
    silent(
        body.replace(
            "barrier.cluster.arrive.relaxed", "fence.acq_rel.cluster;\nbarrier.cluster.arrive.relaxed"
        ),
        **TWO_CTAS,
    )


# ---------------------------------------------------------------------- global memory, between CTAs

TWO_BLOCKS = {"grid": (2, 1, 1)}


def test_race_between_ctas() -> None:
    body = """
    mov.u32 %r2, %ctaid.x;
    st.global.u32 [%rd1+16], %r2;  // <write>
    """
    find(body, zeros(), kind="race", at="write", other="write", **TWO_BLOCKS)
    result = run_kernel(body, zeros(), expect_reports=True, **TWO_BLOCKS)
    assert "array1 + 16 bytes" in result.reports[0].message
    assert {result.reports[0].cta, result.reports[0].other.cta} == {0, 1}


def test_ctas_may_write_side_by_side_and_read_together() -> None:
    body = """
    mov.u32 %r2, %ctaid.x;
    mul.wide.u32 %rd5, %r2, 1;
    add.u64 %rd6, %rd1, %rd5;
    st.global.u8 [%rd6], %r2;
    ld.global.u32 %r3, [%rd1+64];
    """
    silent(body, zeros(), grid=(8, 1, 1))


def test_atomics_do_not_race() -> None:
    body = """
    atom.global.add.u32 %r2, [%rd1], 1;
    red.global.add.u32 [%rd1+4], 1;
    ld.volatile.global.u32 %r3, [%rd1];
    """
    silent(body, zeros(), grid=(4, 1, 1), block=(64, 1, 1))


FLAG = """
mov.u32 %r2, %ctaid.x;
setp.eq.u32 %p1, %r1, 0;
setp.ne.u32 %p2, %r2, 0;
@%p2 bra consumer;
@%p1 st.global.u32 [%rd1], %r1;  // <write>
PUBLISH
bra done;
consumer:
OBSERVE
ld.global.u32 %r4, [%rd1];  // <read>
done:
"""
FENCE = "membar.gl;  // [fence]\n"
SET = "@%p1 st.relaxed.gpu.global.u32 [%rd1+128], 1;"
POLL = "poll:\nld.relaxed.gpu.global.u32 %r3, [%rd1+128];\nsetp.eq.u32 %p3, %r3, 0;\n@%p3 bra poll;"
PUBLISH = {
    "release": "@%p1 st.release.gpu.global.u32 [%rd1+128], 1;",
    "fence": FENCE + SET,
    "volatile": FENCE + SET.replace("relaxed.gpu", "volatile"),
    "atomic": FENCE + "@%p1 atom.global.add.u32 %r9, [%rd1+128], 1;",
    "atom.release": "@%p1 atom.release.gpu.global.exch.b32 %r9, [%rd1+128], 1;",
    "red.release": "@%p1 red.release.gpu.global.add.u32 [%rd1+128], 1;",
}
OBSERVE = {
    "acquire": POLL.replace("relaxed", "acquire"),
    "fence": POLL + "\n" + FENCE,
    "volatile": POLL.replace("relaxed.gpu", "volatile") + "\n" + FENCE,
    "atomic": POLL.replace(
        "ld.relaxed.gpu.global.u32 %r3, [%rd1+128]", "atom.acquire.gpu.global.or.b32 %r3, [%rd1+128], 0"
    ),
}


@pytest.mark.parametrize("observe", OBSERVE)
@pytest.mark.parametrize("publish", PUBLISH)
def test_flag_between_ctas(publish: str, observe: str) -> None:
    body = FLAG.replace("PUBLISH", PUBLISH[publish]).replace("OBSERVE", OBSERVE[observe])
    silent(body, zeros(), **TWO_BLOCKS)


@pytest.mark.parametrize(
    ("publish", "observe"), [("fence", "acquire"), ("release", "fence"), ("atomic", "fence")]
)
def test_flag_without_fence(publish: str, observe: str) -> None:
    body = FLAG.replace("PUBLISH", PUBLISH[publish]).replace("OBSERVE", OBSERVE[observe])
    find(without(body, "fence"), zeros(), kind="race", at="read", other="write", **TWO_BLOCKS)


def test_fence_of_the_wrong_scope() -> None:
    body = FLAG.replace("PUBLISH", PUBLISH["fence"]).replace("OBSERVE", OBSERVE["acquire"])
    body = body.replace("membar.gl", "membar.cta")
    find(body, zeros(), kind="race", at="read", other="write", **TWO_BLOCKS)


LAST_BLOCK = """
mov.u32 %r2, %ctaid.x;
mov.u32 %r3, %ntid.x;
mad.lo.u32 %r4, %r2, %r3, %r1;
mul.wide.u32 %rd5, %r4, 4;
add.u64 %rd6, %rd1, %rd5;
st.global.u32 [%rd6], %r4;  // <write>
membar.gl;  // [fence]
bar.sync 0;
setp.eq.u32 %p1, %r1, 0;
@!%p1 bra join;
atom.global.add.u32 %r7, [%rd2], 1;
st.shared.u32 [smem], %r7;
join:
bar.sync 0;
ld.shared.u32 %r8, [smem];
setp.ne.u32 %p2, %r8, 3;
@%p2 bra done;
mov.u32 %r9, 0;
mov.u64 %rd7, %rd1;
sum:
ld.global.u32 %r10, [%rd7];  // <read>
add.u64 %rd7, %rd7, 4;
add.u32 %r9, %r9, 1;
setp.lt.u32 %p3, %r9, 256;
@%p3 bra sum;
@%p1 st.global.u32 [%rd2], 0;
done:
"""
FOUR_BLOCKS = {"grid": (4, 1, 1), "block": (64, 1, 1), "shared_bytes": 64}


def test_last_block_reduction() -> None:
    silent(LAST_BLOCK, zeros(256), zeros(), **FOUR_BLOCKS)


def test_last_block_reduction_without_fence() -> None:
    find(
        without(LAST_BLOCK, "fence"),
        zeros(256),
        zeros(),
        kind="race",
        at="read",
        other="write",
        **FOUR_BLOCKS,
    )


def meet(number: int) -> str:
    """All CTAs of a grid meet: thread 0 of each counts, and waits for the count in %r9. %p2: not thread 0."""
    return f"""
bar.sync 0;
@%p2 bra join{number};
membar.gl;
atom.global.add.u32 %r7, [%rd2], 1;
poll{number}:
ld.acquire.gpu.global.u32 %r8, [%rd2];
setp.lt.u32 %p3, %r8, %r9;
@%p3 bra poll{number};
join{number}:
bar.sync 0;
"""


GRID_BARRIER = f"""
mov.u32 %r2, %ctaid.x;
mul.wide.u32 %rd5, %r2, 4;
add.u64 %rd6, %rd1, %rd5;
xor.b32 %r3, %r2, 1;
mul.wide.u32 %rd7, %r3, 4;
add.u64 %rd8, %rd1, %rd7;
setp.eq.u32 %p1, %r1, 32;
setp.ne.u32 %p2, %r1, 0;
mov.u32 %r9, 4;
again:
@%p1 st.global.u32 [%rd6], %r9;  // <write>
{meet(1)}
ld.global.u32 %r10, [%rd8];  // <read>
add.u32 %r9, %r9, 4;
{meet(2)}
add.u32 %r9, %r9, 4;
setp.lt.u32 %p4, %r9, 24;
@%p4 bra again;
"""


def test_barrier_of_the_grid() -> None:
    silent(GRID_BARRIER, zeros(), zeros(), grid=(4, 1, 1), block=(64, 1, 1))
    silent(GRID_BARRIER, zeros(), zeros(), grid=(4, 1, 1), cluster=(2, 1, 1), block=(64, 1, 1))


def test_shared_flag_with_volatile_accesses() -> None:
    body = """
    setp.lt.u32 %p1, %r1, 32;
    setp.eq.u32 %p4, %r1, 0;
    @%p4 st.volatile.shared.u32 [smem], 0;
    bar.sync 0;
    @!%p1 bra consumer;
    st.shared.u32 [smem+64], %r1;  // <write>
    membar.cta;  // [fence]
    st.volatile.shared.u32 [smem], 1;
    bra done;
    consumer:
    ld.volatile.shared.u32 %r3, [smem];
    setp.eq.u32 %p2, %r3, 0;
    @%p2 bra consumer;
    membar.cta;
    ld.shared.u32 %r4, [smem+64];  // <read>
    done:
    """
    silent(body, **TWO_WARPS)
    find(without(body, "fence"), kind="race", at="read", other="write", **TWO_WARPS)


# ---------------------------------------------------------------------- launches

WRITER = """
griddepcontrol.launch_dependents;
add.u64 %rd2, %rd1, %rd0;
st.global.u32 [%rd2], %r1;  // <write>
"""
READER = """
griddepcontrol.wait;  // [wait]
add.u64 %rd2, %rd1, %rd0;
ld.global.u32 %r2, [%rd2];  // <read>
st.global.u32 [%rd2+128], %r2;
"""


def run_two(first: str, second: str, array: np.ndarray, pdl: bool, early: bool) -> Result:
    machine = Machine("sm_90a", early_dependents=early)
    machine.add_range("array1", array.ctypes.data, array.nbytes)
    for body, dependent in ((first, False), (second, pdl)):
        module = LoadedModule(kernel_text(body, 1), "sm_90a")
        machine.attach(module)
        params = array.ctypes.data.to_bytes(8, "little")
        machine.enqueue(module.kernel(), (1, 1, 1), (32, 1, 1), params=params, pdl=dependent)
    return machine.synchronize()


@pytest.mark.parametrize("early", [True, False])
def test_dependent_launch(early: bool) -> None:
    assert not run_two(WRITER, READER, zeros(), pdl=True, early=early).reports
    result = run_two(WRITER, without(READER, "wait"), zeros(), pdl=True, early=early)
    assert {r.kind for r in result.reports} == {"grid-dependency"}
    lines = {r.line for r in result.reports}
    writes, reads = lines_of(WRITER, 1, "sm_90a", ""), lines_of(READER, 1, "sm_90a", "")
    assert lines <= {writes["write"], reads["read"]}


@pytest.mark.parametrize("early", [True, False])
def test_dependent_launch_writes_what_is_read(early: bool) -> None:
    second = "add.u64 %rd2, %rd1, %rd0;\nst.global.u32 [%rd2], %r1;"
    result = run_two(READER, second, zeros(128), pdl=True, early=early)
    assert {r.kind for r in result.reports} == {"grid-dependency"}
    elsewhere = second.replace("[%rd2]", "[%rd2+256]")
    assert not run_two(READER, elsewhere, zeros(128), pdl=True, early=early).reports


def test_launches_of_a_stream_are_ordered() -> None:
    assert not run_two(WRITER, without(READER, "wait"), zeros(), pdl=False, early=True).reports


def test_waiting_is_known_behind_a_barrier() -> None:
    body = """
    setp.ge.u32 %p1, %r1, 32;
    @%p1 bra join;
    griddepcontrol.wait;  // [wait]
    join:
    bar.sync 0;  // [bar]
    ld.global.u32 %r2, [%rd1];
    """

    def kinds(second: str) -> set[str]:
        array = zeros()
        machine = Machine("sm_90a")
        machine.add_range("array1", array.ctypes.data, array.nbytes)
        for text, dependent in ((WRITER, False), (second, True)):
            module = LoadedModule(kernel_text(text, 1), "sm_90a")
            machine.attach(module)
            params = array.ctypes.data.to_bytes(8, "little")
            machine.enqueue(module.kernel(), (1, 1, 1), (64, 1, 1), params=params, pdl=dependent)
        return {r.kind for r in machine.synchronize().reports}

    assert not kinds(body)
    assert "grid-dependency" in kinds(without(body, "bar"))

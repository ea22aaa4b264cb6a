"""The checker on global memory: races between CTAs, flags, fences, counters."""

from __future__ import annotations

import numpy as np
import pytest
from harness import run_kernel
from planted_bugs import TWO_WARPS, find, silent, without, zeros

TWO_BLOCKS = {"grid": (2, 1, 1)}


def test_race_between_ctas() -> None:
    body = """
    mov.u32 %r2, %ctaid.x;
    st.global.u32 [%rd1+16], %r2;  // <write>
    """
    find(body, zeros(), kind="race", at="write", other="write", **TWO_BLOCKS)
    result = run_kernel(body, zeros(), expect_reports=True, **TWO_BLOCKS)
    assert "array1 + 16 bytes" in result.reports[0].message
    assert {result.reports[0].cta, result.reports[0].other.cta} == {(0, 0, 0), (1, 0, 0)}


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


def test_a_race_names_ctas_by_their_index() -> None:
    out = np.zeros(1, dtype=np.uint32)
    result = run_kernel("st.global.u32 [%rd1], %r1;", out, grid=(1, 2, 1), expect_reports=True)
    report = next(r for r in result.reports if r.other is not None and r.other.cta != r.cta)
    assert report.other is not None
    assert f"of CTA {report.other.cta}." in report.message

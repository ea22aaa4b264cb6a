"""Bulk copies, their groups and reductions; st.async and red.async."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from copies import REDUCTIONS
from harness import reports_of, run_kernel
from ptx_emulator.errors import UnsupportedInstruction

SCHEDULES = [
    {"schedule": "fair"},
    {"schedule": "late"},
    {"schedule": "greedy"},
    {"schedule": "random", "seed": 11},
]
INIT = """
    mov.u32 %r20, smem; add.u32 %r21, %r20, 64; setp.eq.u32 %p20, %r1, 0;
    mov.u32 %r22, %cluster_ctarank;
    @%p20 mbarrier.init.shared.b64 [%r20], 1;
    fence.mbarrier_init.release.cluster;
    barrier.cluster.arrive; barrier.cluster.wait;
"""
WAIT = """
    WAIT: mbarrier.try_wait.parity.shared.b64 %p21, [%r20], 0;
    @!%p21 bra WAIT;
"""
EXPECT = "@%p20 mbarrier.arrive.expect_tx.shared.b64 _, [%r20], {bytes};"
COMPLETE = "mbarrier::complete_tx::bytes"
END = "barrier.cluster.arrive; barrier.cluster.wait;"
# A word of each thread, from its place behind %r21 to array `out`, which has 32 words for each CTA.
DUMP = """
    shl.b32 %r40, %r1, 2; add.u32 %r41, %r21, %r40; ld.shared.u32 %r42, [%r41];
    mad.lo.u32 %r43, %r22, 32, %r1; mul.wide.u32 %rd20, %r43, 4; add.u64 %rd21, %rd{out}, %rd20;
    st.global.u32 [%rd21], %r42;
"""
# A word of each thread from array `source` to shared memory, for the async proxy to read.
FILL = """
    shl.b32 %r40, %r1, 2; add.u32 %r41, %r21, %r40;
    add.u64 %rd20, %rd{source}, %rd0; ld.global.u32 %r42, [%rd20]; st.shared.u32 [%r41], %r42;
    fence.proxy.async;
    bar.sync 0;
"""


def aligned(values: np.ndarray) -> np.ndarray:
    """A copy whose memory starts at a multiple of 16 bytes."""
    memory = np.zeros(values.nbytes + 16, np.uint8)
    start = -memory.ctypes.data % 16
    copy = memory[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


def words(count: int = 32, first: int = 1) -> np.ndarray:
    return aligned(np.arange(first, first + count, dtype=np.uint32))


@pytest.mark.parametrize("options", SCHEDULES)
@pytest.mark.parametrize("hint", ["", ".L2::cache_hint"])
@pytest.mark.parametrize("space", ["shared::cta", "shared::cluster"])
def test_load(space: str, hint: str, options: dict[str, Any]):
    source, out = words(), np.zeros(32, np.uint32)
    policy = ", %rd0" if hint else ""
    body = (
        INIT
        + EXPECT.format(bytes=128)
        + f"@%p20 cp.async.bulk.{space}.global.{COMPLETE}{hint} [%r21], [%rd1], 128, [%r20]{policy};"
        + WAIT
        + DUMP.format(out=2)
    )
    run_kernel(body, source, out, shared_bytes=256, **options)
    np.testing.assert_array_equal(out, source)


def test_a_load_that_nobody_waits_for_is_a_race():
    body = INIT + EXPECT.format(bytes=128) + COPY + "[%r21], [%rd1], 128, [%r20];" + DUMP.format(out=2) + WAIT
    found = reports_of(body, words(), np.zeros(32, np.uint32), shared_bytes=256)
    assert "race" in found or "uninitialised" in found


@pytest.mark.parametrize("options", SCHEDULES)
def test_multicast(options: dict[str, Any]):
    source, out = words(), np.zeros((4, 32), np.uint32)
    body = (
        INIT
        + EXPECT.format(bytes=128)
        + f"""
        setp.eq.u32 %p23, %r22, 3; and.pred %p23, %p23, %p20; mov.u16 %rs1, 15;
        @%p23 cp.async.bulk.shared::cluster.global.{COMPLETE}.multicast::cluster
            [%r21], [%rd1], 128, [%r20], %rs1;
        """
        + WAIT
        + DUMP.format(out=2)
        + END
    )
    shape = {"grid": (4, 1, 1), "cluster": (4, 1, 1)}
    run_kernel(body, source, out, shared_bytes=256, **shape, **options)
    np.testing.assert_array_equal(out, np.broadcast_to(source, (4, 32)))


@pytest.mark.parametrize("options", SCHEDULES)
@pytest.mark.parametrize("what", ["copy", "add.u32", "max.s32", "xor.b32"])
def test_sending_to_another_cta(what: str, options: dict[str, Any]):
    # Each CTA sends its numbers to the other one, whose memory holds ones.
    source, out = words(), np.zeros((2, 32), np.uint32)
    name = "cp.async.bulk" if what == "copy" else "cp.reduce.async.bulk"
    suffix = "" if what == "copy" else f".{what}"
    body = (
        INIT
        + "add.u32 %r21, %r21, 128; shl.b32 %r40, %r1, 2; add.u32 %r41, %r21, %r40; mov.u32 %r42, 1;"
        + "st.shared.u32 [%r41], %r42; sub.u32 %r21, %r21, 128;"
        + FILL.format(source=1)
        + END
        + EXPECT.format(bytes=128)
        + f"""
        xor.b32 %r30, %r22, 1; mapa.shared::cluster.u32 %r31, %r21, %r30;
        mapa.shared::cluster.u32 %r32, %r20, %r30;
        add.u32 %r33, %r31, 128;
        @%p20 {name}.shared::cluster.shared::cta.{COMPLETE}{suffix} [%r33], [%r21], 128, [%r32];
        """
        + WAIT
        + "add.u32 %r21, %r21, 128;"
        + DUMP.format(out=2)
        + END
    )
    shape = {"grid": (2, 1, 1), "cluster": (2, 1, 1)}
    run_kernel(body, source, out, shared_bytes=512, **shape, **options)
    expected = {
        "copy": source,
        "add.u32": source + 1,
        "max.s32": np.maximum(source, 1),
        "xor.b32": source ^ 1,
    }
    np.testing.assert_array_equal(out, np.broadcast_to(expected[what], (2, 32)))


@pytest.mark.parametrize("options", SCHEDULES)
def test_store(options: dict[str, Any]):
    source, out = words(), aligned(np.zeros(32, np.uint32))
    body = (
        INIT
        + FILL.format(source=1)
        + """
        @!%p20 bra STORED;
        cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r21], 64;
        cp.async.bulk.commit_group;
        cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%rd2+64], [%r21+64], 64, %rd0;
        cp.async.bulk.commit_group;
        cp.async.bulk.wait_group 1;
        cp.async.bulk.wait_group 0;
        STORED:
        """
    )
    run_kernel(body, source, out, shared_bytes=256, **options)
    np.testing.assert_array_equal(out, source)


def test_store_of_masked_bytes():
    source, out = words(), aligned(np.full(32, 0xEEEEEEEE, np.uint32))
    body = (
        INIT
        + FILL.format(source=1)
        + """
        @!%p20 bra STORED;
        mov.u16 %rs1, 0x0f21;
        cp.async.bulk.global.shared::cta.bulk_group.cp_mask [%rd2], [%r21], 128, %rs1;
        cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
        STORED:
        """
    )
    result = run_kernel(body, source, out, shared_bytes=256, target="sm_100a")
    assert result.counts[0]["tma_store_bytes"] == 128 // 16 * (0x0F21).bit_count()
    expected = np.full(128, 0xEE, np.uint8)
    for k in range(128):
        if 0x0F21 >> k % 16 & 1:
            expected[k] = source.view(np.uint8)[k]
    np.testing.assert_array_equal(out.view(np.uint8), expected)


@pytest.mark.parametrize("wait", ["cp.async.bulk.wait_group.read 0;", ""])
def test_the_source_may_be_overwritten_when_it_has_been_read(wait: str):
    source, out = words(), aligned(np.zeros(32, np.uint32))
    body = (
        INIT
        + FILL.format(source=1)
        + f"""
        @!%p20 bra STORED;
        cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r21], 128;
        cp.async.bulk.commit_group;
        {wait}
        st.shared.u32 [%r21], %r20;
        cp.async.bulk.wait_group 0;
        STORED:
        """
    )
    found = reports_of(body, source, out, shared_bytes=256)
    assert ("race" in found) == (not wait)
    if wait:
        np.testing.assert_array_equal(out, source)


@pytest.mark.parametrize("wait", ["cp.async.bulk.wait_group.read 0;", "cp.async.bulk.wait_group 0;"])
def test_the_destination_may_be_read_only_when_it_has_been_written(wait: str):
    source, out, copy = words(), aligned(np.zeros(32, np.uint32)), np.zeros(1, np.uint32)
    body = (
        INIT
        + FILL.format(source=1)
        + f"""
        @!%p20 bra STORED;
        cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r21], 128;
        cp.async.bulk.commit_group;
        {wait}
        ld.global.u32 %r30, [%rd2]; st.global.u32 [%rd3], %r30;
        STORED:
        """
    )
    found = reports_of(body, source, out, copy, shared_bytes=256, schedule="random", seed=1)
    assert ("race" in found) == (".read" in wait)


def random_values(dtype: Any, seed: int, count: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind in "iu":
        info = np.iinfo(dtype)
        values = rng.integers(info.min, info.max, count, dtype=dtype, endpoint=True)
        values[:4] = (0, info.max, info.min, 1)
        return values
    return (rng.standard_normal(count) * 100).astype(dtype)


TYPES = {
    "u32": np.uint32,
    "s32": np.int32,
    "u64": np.uint64,
    "s64": np.int64,
    "b32": np.uint32,
    "b64": np.uint64,
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "f32": np.float32,
    "f64": np.float64,
}
GLOBAL_REDUCTIONS = [
    *(f"add.{t}" for t in ("u32", "s32", "u64", "f32", "f64")),
    "add.noftz.f16",
    "add.noftz.bf16",
    *(f"{op}.{t}" for op in ("min", "max") for t in ("u32", "s32", "u64", "s64", "f16", "bf16")),
    *(f"{op}.{t}" for op in ("and", "or", "xor") for t in ("b32", "b64")),
    "inc.u32",
    "dec.u32",
]


@pytest.mark.parametrize("what", GLOBAL_REDUCTIONS)
def test_reduction_in_global_memory(what: str):
    dtype = np.dtype(TYPES[what.split(".")[-1]])
    count = 128 // dtype.itemsize
    operand, memory = random_values(dtype, 1, count), aligned(random_values(dtype, 2, count))
    if what == "add.f32":
        memory.view(np.uint32)[:2] = 0x7FC12345, 0xFF800001  # of which the canonical NaN is made
    if what.startswith(("inc", "dec")):
        operand[:8], memory[:8] = (5, 5, 5, 0, 0, 9, 2**32 - 1, 3), (4, 5, 6, 0, 1, 2**32 - 1, 7, 0)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = REDUCTIONS[what.split(".")[0]](memory, operand)
    body = (
        INIT
        + FILL.format(source=1)
        + f"""
        @!%p20 bra STORED;
        cp.reduce.async.bulk.global.shared::cta.bulk_group.{what} [%rd2], [%r21], 128;
        cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
        STORED:
        """
    )
    run_kernel(body, operand.view(np.uint32), memory, shared_bytes=256)
    expected = expected.astype(dtype)
    if what == "add.f32":
        expected.view(np.uint32)[:2] = 0x7FFFFFFF
    np.testing.assert_array_equal(memory.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize(
    "what",
    [
        "global.shared::cta.bulk_group.add.s64 [%rd2], [%r21], 128;",
        "global.shared::cta.bulk_group.and.u32 [%rd2], [%r21], 128;",
        "shared::cluster.shared::cta.mbarrier::complete_tx::bytes.min.u64 [%r21], [%r21], 128, [%r20];",
        "shared::cluster.shared::cta.mbarrier::complete_tx::bytes.xor.b64 [%r21], [%r21], 128, [%r20];",
    ],
)
def test_reductions_that_do_not_exist(what: str):
    with pytest.raises(UnsupportedInstruction, match="there is no reduction"):
        run_kernel(f"cp.reduce.async.bulk.{what}")


@pytest.mark.parametrize("options", SCHEDULES)
@pytest.mark.parametrize(("form", "vector", "count"), [("", "%r30", 1), (".v4", "{%r30, %r1, %r30, %r1}", 4)])
def test_st_async(form: str, vector: str, count: int, options: dict[str, Any]):
    out = np.zeros((2, 32), np.uint32)
    body = (
        INIT
        + EXPECT.format(bytes=128 * count)
        + f"""
        xor.b32 %r30, %r22, 1; mapa.shared::cluster.u32 %r31, %r21, %r30;
        mapa.shared::cluster.u32 %r32, %r20, %r30;
        mul.lo.u32 %r33, %r1, {4 * count}; add.u32 %r34, %r31, %r33; add.u32 %r30, %r1, 50;
        st.async.weak.shared::cluster.{COMPLETE}{form}.b32 [%r34], {vector}, [%r32];
        """
        + WAIT
        + DUMP.format(out=1)
        + END
    )
    shape = {"grid": (2, 1, 1), "cluster": (2, 1, 1)}
    run_kernel(body, out, shared_bytes=1024, **shape, **options)
    lanes = np.arange(32)
    expected = lanes + 50 if count == 1 else np.where(lanes % 2, 0, 50) + lanes // 4
    np.testing.assert_array_equal(out, np.broadcast_to(expected, (2, 32)))


def test_red_async():
    out = np.zeros((2, 32), np.uint32)
    body = (
        INIT
        + "shl.b32 %r40, %r1, 2; add.u32 %r41, %r21, %r40; st.shared.u32 [%r41], %r1;"
        + END
        + EXPECT.format(bytes=128)
        + f"""
        xor.b32 %r30, %r22, 1; mapa.shared::cluster.u32 %r31, %r21, %r30;
        mapa.shared::cluster.u32 %r32, %r20, %r30;
        red.async.relaxed.cluster.shared::cluster.{COMPLETE}.add.u32 [%r31], %r1, [%r32];
        """
        + WAIT
        + DUMP.format(out=1)
        + END
    )
    run_kernel(body, out, shared_bytes=1024, grid=(2, 1, 1), cluster=(2, 1, 1))
    expected = np.arange(32)
    expected[0] = 31 * 16
    np.testing.assert_array_equal(out, np.broadcast_to(expected, (2, 32)))


def test_st_async_signals_in_the_cta_that_it_writes():
    body = (
        INIT
        + f"""
        xor.b32 %r30, %r22, 1; mapa.shared::cluster.u32 %r31, %r21, %r30;
        @%p20 st.async.shared::cluster.{COMPLETE}.b32 [%r31], %r1, [%r20];
        """
        + END
    )
    found = reports_of(body, shared_bytes=128, grid=(2, 1, 1), cluster=(2, 1, 1))
    assert "in different CTAs" in found


LOAD = INIT + EXPECT.format(bytes=128)
COPY = f"@%p20 cp.async.bulk.shared::cta.global.{COMPLETE} "


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (COPY + "[%r21], [%rd1], 120, [%r20];", "multiple of 16"),
        (COPY + "[%r21], [%rd1+4], 112, [%r20];", "misaligned"),
        (
            COPY + "[%r21], [%rd1+16], 128, [%r20];",
            "out-of-bounds",
        ),
        (
            COPY + "[%r21+128], [%rd1], 128, [%r20];",
            "out-of-bounds",
        ),
        (COPY + "[%r21], [%rd1], 64, [%r20];", "tx-count of 64"),
        (
            "mov.u16 %rs1, 3;"
            f"@%p20 cp.async.bulk.shared::cluster.global.{COMPLETE}.multicast::cluster"
            " [%r21], [%rd1], 128, [%r20], %rs1;",
            "does not have",
        ),
    ],
)
def test_misuse_is_reported(body: str, expected: str):
    found = reports_of(LOAD + body, words(), shared_bytes=192)
    assert expected in found.replace("_", "-")


def test_a_prefetch_does_nothing_but_is_known():
    run_kernel("cp.async.bulk.prefetch.L2.global [%rd1], 128;", words())

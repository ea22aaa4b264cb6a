"""tcgen05.ld, st, alloc: shapes against tables, misuse of tensor memory."""

from __future__ import annotations

import numpy as np
import pytest
from harness import run_kernel

ALLOC = """
.reg .b32 %base, %quarter, %addr;
.reg .pred %first;
mov.b32 %quarter, smem;
setp.lt.u32 %first, %r1, 32;
@%first tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%quarter], 512;
bar.sync 0;
ld.shared.b32 %base, [smem];
"""
FREE = """
bar.sync 0;
@%first tcgen05.dealloc.cta_group::1.sync.aligned.b32 %base, 512;
@%first tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
"""
# Registers of .x1, 32-bit columns of .x1.
SHAPES = {"32x32b": (1, 1), "16x64b": (1, 2), "16x128b": (2, 4), "16x256b": (4, 8), "16x32bx2": (1, 1)}


def registers(prefix: str, count: int) -> str:
    return "{" + ", ".join(f"%{prefix}{n}" for n in range(count)) + "}"


def fill_columns(columns: int) -> str:
    """Each of 128 threads writes lane * 1000 + column to its lane."""
    lines = ["mul.lo.u32 %r2, %r1, 1000;"]
    for column in range(columns):
        lines.append(f"add.u32 %r3, %r2, {column};")
        lines.append(f"add.u32 %addr, %base, {column};")
        lines.append("tcgen05.st.sync.aligned.32x32b.x1.b32 [%addr], {%r3};")
    return "\n".join([*lines, "tcgen05.wait::st.sync.aligned;", "bar.sync 0;"])


def place_of(shape: str, thread: int, register: int, split: int) -> tuple[int, int]:
    """Lane in the quarter and column, from the bit layouts of the copy traits: for each shape the strides of
    the bits of thread and register in (lane, column)."""
    bits = {
        "32x32b": ([(1, 0), (2, 0), (4, 0), (8, 0), (16, 0)], lambda r: (0, r)),
        "16x64b": ([(8, 0), (0, 1), (1, 0), (2, 0), (4, 0)], lambda r: (0, 2 * r)),
        "16x128b": ([(0, 1), (0, 2), (1, 0), (2, 0), (4, 0)], lambda r: (8 * (r & 1), 4 * (r >> 1))),
        "16x256b": (
            [(0, 2), (0, 4), (1, 0), (2, 0), (4, 0)],
            lambda r: (8 * (r >> 1 & 1), (r & 1) + 8 * (r >> 2)),
        ),
        "16x32bx2": ([(1, 0), (2, 0), (4, 0), (8, 0), (0, split)], lambda r: (0, r)),
    }
    strides, of_register = bits[shape]
    lane, column = of_register(register)
    for bit, (lane_step, column_step) in enumerate(strides):
        if thread >> bit & 1:
            lane, column = lane + lane_step, column + column_step
    return lane, column


CASES = [
    (shape, number, lane)
    for shape, (per_x1, _) in SHAPES.items()
    for number in (1, 2, 4, 8)
    for lane in ((0,) if shape == "32x32b" else (0, 16))
    if per_x1 * number <= 32
]


@pytest.mark.parametrize(("shape", "number", "lane"), CASES)
def test_load_reads_the_right_places(shape: str, number: int, lane: int) -> None:
    per_x1, _ = SHAPES[shape]
    count, split = per_x1 * number, 37
    out = np.zeros((128, count), dtype=np.uint32)
    extra = f", {split}" if shape == "16x32bx2" else ""
    stores = "\n".join(f"st.global.b32 [%rd5+{4 * r}], %q{r};" for r in range(count))
    body = f"""{ALLOC}
    .reg .b32 %q<{count}>;
    {fill_columns(80)}
    and.b32 %r4, %r1, 96;
    shl.b32 %r4, %r4, 16;
    add.u32 %addr, %base, %r4;
    add.u32 %addr, %addr, {(lane << 16) + 3};
    tcgen05.ld.sync.aligned.{shape}.x{number}.b32 {registers("q", count)}, [%addr]{extra};
    tcgen05.wait::ld.sync.aligned;
    mad.wide.u32 %rd5, %r1, {4 * count}, %rd1;
    {stores}
    {FREE}"""
    run_kernel(body, out, block=(128, 1, 1), target="sm_100a", shared_bytes=64)
    for thread in range(128):
        for register in range(count):
            row, column = place_of(shape, thread % 32, register, split)
            row += thread // 32 * 32 + lane
            assert out[thread, register] == row * 1000 + column + 3, (thread, register)


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_load_takes_low_halves_of_two_columns(shape: str) -> None:
    count = SHAPES[shape][0] * 2
    split = 40
    out = np.zeros((128, count), dtype=np.uint32)
    extra = f", {split}" if shape == "16x32bx2" else ""
    stores = "\n".join(f"st.global.b32 [%rd5+{4 * r}], %q{r};" for r in range(count))
    body = f"""{ALLOC}
    .reg .b32 %q<{count}>;
    {fill_columns(80)}
    tcgen05.ld.sync.aligned.{shape}.x2.pack::16b.b32 {registers("q", count)}, [%base]{extra};
    tcgen05.wait::ld.sync.aligned;
    mad.wide.u32 %rd5, %r1, {4 * count}, %rd1;
    {stores}
    {FREE}"""
    run_kernel(body, out, block=(128, 1, 1), target="sm_100a", shared_bytes=64)
    for thread in range(128):
        for register in range(count):
            row, column = place_of(shape, thread % 32, register, 0)
            first = 2 * column + (split if shape == "16x32bx2" and thread % 32 >= 16 else 0)
            value = (row + thread // 32 * 32) * 1000 + first
            assert out[thread, register] == (value & 0xFFFF) | ((value + 1) & 0xFFFF) << 16


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_store_is_the_inverse_of_load(shape: str, packed: bool) -> None:
    count = SHAPES[shape][0] * 4
    values = np.arange(128 * count, dtype=np.uint32).reshape(128, count) * 7919
    out = np.zeros_like(values)
    extra = ", 20" if shape == "16x32bx2" else ""
    unpack, pack = (".unpack::16b", ".pack::16b") if packed else ("", "")
    loads = "\n".join(f"ld.global.b32 %q{r}, [%rd5+{4 * r}];" for r in range(count))
    stores = "\n".join(f"st.global.b32 [%rd6+{4 * r}], %s{r};" for r in range(count))
    body = f"""{ALLOC}
    .reg .b32 %q<{count}>, %s<{count}>;
    mad.wide.u32 %rd5, %r1, {4 * count}, %rd1;
    mad.wide.u32 %rd6, %r1, {4 * count}, %rd2;
    {loads}
    tcgen05.st.sync.aligned.{shape}.x4{unpack}.b32 [%base]{extra}, {registers("q", count)};
    tcgen05.wait::st.sync.aligned;
    tcgen05.ld.sync.aligned.{shape}.x4{pack}.b32 {registers("s", count)}, [%base]{extra};
    tcgen05.wait::ld.sync.aligned;
    {stores}
    {FREE}"""
    run_kernel(body, values, out, block=(128, 1, 1), target="sm_100a", shared_bytes=64)
    assert np.array_equal(values, out)


@pytest.mark.parametrize(
    ("form", "reduce"),
    [
        ("min.f32", lambda v: np.fmin.reduce(v, axis=1)),
        ("max.f32", lambda v: np.fmax.reduce(v, axis=1)),
        ("max.abs.f32", lambda v: np.fmax.reduce(np.abs(v), axis=1)),
        ("max.NaN.f32", lambda v: np.maximum.reduce(v, axis=1)),
    ],
)
def test_load_and_reduce(form: str, reduce) -> None:  # type: ignore[no-untyped-def]
    values = np.random.default_rng(0).normal(size=(128, 4)).astype(np.float32)
    values[5, 2], values[6] = np.nan, np.nan
    out = np.zeros((128, 1), dtype=np.float32)
    body = f"""{ALLOC}
    mad.wide.u32 %rd5, %r1, 16, %rd1;
    ld.global.v4.f32 {{%f1, %f2, %f3, %f4}}, [%rd5];
    tcgen05.st.sync.aligned.32x32b.x4.b32 [%base], {{%f1, %f2, %f3, %f4}};
    tcgen05.wait::st.sync.aligned;
    tcgen05.ld.red.sync.aligned.32x32b.x4.{form} {{%f5, %f6, %f7, %f8}}, %f9, [%base];
    tcgen05.wait::ld.sync.aligned;
    add.u64 %rd6, %rd2, %rd0;
    st.global.f32 [%rd6], %f9;
    {FREE}"""
    run_kernel(body, values, out, block=(128, 1, 1), target="sm_103a", shared_bytes=64)
    np.testing.assert_array_equal(out[:, 0], reduce(values))


def findings(body: str, block: int = 128, **options: object) -> list[str]:
    result = run_kernel(
        body, block=(block, 1, 1), target="sm_100a", shared_bytes=64, expect_reports=True, **options
    )
    return [report.message for report in result.reports]


def test_columns_not_freed() -> None:
    (message,) = findings(ALLOC)
    assert "not deallocated" in message


def test_dealloc_of_what_is_not_allocated() -> None:
    messages = findings(
        ALLOC + "@%first tcgen05.dealloc.cta_group::1.sync.aligned.b32 %base, 256;" + FREE,
    )
    assert any("256 columns" in m and "512 columns were allocated" in m for m in messages)


@pytest.mark.parametrize("columns", [0, 16, 48, 1024])
def test_impossible_number_of_columns(columns: int) -> None:
    messages = findings(
        f"mov.b32 %r2, {columns}; tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [smem], %r2;",
        block=32,
    )
    assert any("power of two" in m for m in messages)


def test_alloc_after_relinquish() -> None:
    messages = findings(
        """tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
        tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [smem], 32;
        ld.shared.b32 %r2, [smem];
        tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r2, 32;""",
        block=32,
    )
    assert any("after tcgen05.relinquish" in m for m in messages)


def test_access_to_unallocated_columns() -> None:
    messages = findings(
        """tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [smem], 32;
        ld.shared.b32 %r2, [smem];
        tcgen05.st.sync.aligned.32x32b.x4.b32 [%r2+30], {%r3, %r3, %r3, %r3};
        tcgen05.wait::st.sync.aligned;
        tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r2, 32;""",
        block=32,
    )
    assert any("column 32" in m and "not allocated" in m for m in messages)


def test_alloc_waits_for_columns() -> None:
    """The second warp's allocation is only possible after the first has freed its own."""
    out = np.zeros(2, dtype=np.uint32)
    body = """
    setp.ge.u32 %p1, %r1, 32;
    @%p1 bra second;
    tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [smem], 512;
    bar.sync 0;
    ld.shared.b32 %r2, [smem];
    tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r2, 512;
    bra done;
    second:
    bar.sync 0;
    tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [smem+16], 256;
    ld.shared.b32 %r2, [smem+16];
    tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r2, 256;
    st.global.b32 [%rd1], 7;
    done:
    """
    run_kernel(body, out, block=(64, 1, 1), target="sm_100a", shared_bytes=64)
    assert out[0] == 7


def test_alloc_that_can_never_be_had_is_a_deadlock() -> None:
    messages = findings(
        """tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [smem], 512;
        tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [smem+4], 32;""",
        block=32,
    )
    assert any("512 of 512 columns" in m for m in messages)


@pytest.mark.parametrize(("first", "second"), [(64, 512), (512, 32)])
def test_too_much_allocated_by_one_warp_is_misuse(first: int, second: int) -> None:
    body = f"""
    tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [smem], {first};
    tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [smem+4], {second};"""
    result = run_kernel(body, target="sm_100a", shared_bytes=64, expect_reports=True)
    (misuse,) = (r for r in result.reports if r.kind == "tmem")
    assert f"{second} columns: {first} of 512 columns" in misuse.message


def test_alloc_of_a_pair_needs_both_ctas() -> None:
    messages = findings(
        """mov.u32 %r2, %cluster_ctarank;
        setp.eq.u32 %p1, %r2, 0;
        @%p1 tcgen05.alloc.cta_group::2.sync.aligned.shared::cta.b32 [smem], 32;""",
        block=32,
        cluster=(2, 1, 1),
        grid=(2, 1, 1),
    )
    assert any("the other one of the pair" in m for m in messages)


def test_cta_group_2_needs_a_pair() -> None:
    messages = findings("tcgen05.alloc.cta_group::2.sync.aligned.shared::cta.b32 [smem], 32;", block=32)
    assert any("even number of CTAs" in m for m in messages)

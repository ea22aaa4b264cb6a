"""The checker on barriers of a CTA: planted bugs are found at the right line, right code is silent."""

from __future__ import annotations

import re

from harness import kernel_text, run_kernel
from planted_bugs import SCHEDULES, TWO_WARPS, find, lines_of, silent, without, zeros
from ptx_emulator.machine import LoadedModule, Machine
from ptx_emulator.reports import Report

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
    assert report.cta == (0, 0, 0)
    assert report.other is not None
    assert {report.warp, report.other.warp} == {0, 1}
    assert 0 <= report.lane < 32
    assert re.search(r"shared memory 0x[0-9a-f]+ of CTA \(0, 0, 0\)", report.message)


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
    assert "0x420" in report.message
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


def test_memory_stays_written_in_later_runs() -> None:
    """The first eight words, by a launch that another synchronize() has run."""
    array = zeros(32)
    machine = Machine("sm_90a")

    def run(body: str) -> list[Report]:
        module = LoadedModule(kernel_text(body, 1), "sm_90a")
        machine.attach(module)
        params = array.ctypes.data.to_bytes(8, "little")
        machine.enqueue(module.kernel(), (1, 1, 1), (32, 1, 1), params=params)
        return machine.synchronize().reports

    head = "add.u64 %rd2, %rd1, %rd0;\nsetp.lt.u32 %p1, %r1, NUM;\n"
    write = head.replace("NUM", "8") + "@%p1 st.global.u32 [%rd2], %r1;"
    read = head + "@%p1 ld.global.u32 %r2, [%rd2];"
    machine.add_range("output", array.ctypes.data, array.nbytes, initialised=False)
    assert not run(write)
    assert not run(read.replace("NUM", "8"))
    machine.add_range("output", array.ctypes.data, array.nbytes, initialised=False)
    assert not run(read.replace("NUM", "8"))
    (report,) = run(read.replace("NUM", "9"))
    assert (report.kind, report.lane) == ("uninitialised", 8)
    # Other memory in the same place.
    machine.add_range("workspace", array.ctypes.data, array.nbytes, initialised=False)
    (report,) = run(read.replace("NUM", "8"))
    assert (report.kind, report.lane) == ("uninitialised", 0)

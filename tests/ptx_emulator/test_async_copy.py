"""cp.async: what arrives in shared memory, and when a thread may read it."""

from __future__ import annotations

import numpy as np
import pytest
from aligned import aligned, poisoned
from harness import run_kernel
from ptx_emulator.errors import EmulatorError

LANES = 32
SCHEDULES = ("fair", "greedy", "random")
rng = np.random.default_rng(23)


def addresses(size: int) -> str:
    return f"""
    mov.u32 %r5, smem; mad.lo.u32 %r6, %r1, {size}, %r5; mul.wide.u32 %rd5, %r1, {size};
    add.u64 %rd6, %rd1, %rd5; add.u64 %rd7, %rd2, %rd5;
    """


def copy_out(size: int) -> str:
    return "".join(
        f"ld.shared.b32 %r20, [%r6+{at}]; st.global.b32 [%rd7+{at}], %r20;" for at in range(0, size, 4)
    )


def random_bytes(count: int) -> np.ndarray:
    return aligned(rng.integers(0, 256, count, dtype=np.uint8))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("form", "size"), [("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16), ("cg.L2", 16)])
def test_copy(form: str, size: int, schedule: str) -> None:
    source, result = random_bytes(LANES * size), poisoned(LANES * size, np.uint8)
    words = "cg.shared::cta.global.L2::128B" if form == "cg.L2" else f"{form}.shared.global"
    body = addresses(size) + f"cp.async.{words} [%r6], [%rd6], {size}; cp.async.wait_all;" + copy_out(size)
    run_kernel(body, source, result, shared_bytes=LANES * size, schedule=schedule)
    np.testing.assert_array_equal(result, source)


@pytest.mark.parametrize("size", [4, 8, 16])
def test_zero_fill(size: int) -> None:
    source, result = random_bytes(LANES * size), poisoned((LANES, size), np.uint8)
    body = addresses(size) + f"rem.u32 %r7, %r1, {size + 1};"
    body += f"cp.async.ca.shared.global [%r6], [%rd6], {size}, %r7; cp.async.wait_all;" + copy_out(size)
    run_kernel(body, source, result, shared_bytes=LANES * size)
    kept = np.arange(size) < (np.arange(LANES) % (size + 1))[:, None]
    np.testing.assert_array_equal(result, np.where(kept, source.reshape(LANES, size), 0))


def test_source_size_zero_does_not_touch_the_source() -> None:
    result = poisoned(LANES * 16, np.uint8)
    body = addresses(16).replace("%rd1", "%rd20").replace("%rd2", "%rd1")
    body = "mov.u64 %rd20, 0; mov.u32 %r7, 0; createpolicy.fractional.L2::evict_first.b64 %rd21;" + body
    body += "cp.async.cg.shared.global.L2::cache_hint [%r6], [%rd6], 16, %r7, %rd21; cp.async.wait_all;"
    run_kernel(body + copy_out(16), result, shared_bytes=LANES * 16)
    np.testing.assert_array_equal(result, 0)


def test_ignore_source() -> None:
    source, result = random_bytes(LANES * 16), poisoned((LANES, 16), np.uint8)
    body = addresses(16) + "setp.lt.u32 %p1, %r1, 5; "
    body += "cp.async.cg.shared.global [%r6], [%rd6], 16, %p1; cp.async.wait_all;" + copy_out(16)
    run_kernel(body, source, result, shared_bytes=LANES * 16)
    expected = source.reshape(LANES, 16).copy()
    expected[:5] = 0
    np.testing.assert_array_equal(result, expected)


PIPELINE = """
cp.async.ca.shared.global [%r6], [%rd6], 4; cp.async.commit_group;
cp.async.ca.shared.global [%r6+128], [%rd6+128], 4; cp.async.commit_group;
cp.async.commit_group;
cp.async.ca.shared.global [%r6+256], [%rd6+256], 4; cp.async.commit_group;
cp.async.wait_group 3; ld.shared.b32 %r20, [%r6]; st.global.b32 [%rd7], %r20;
cp.async.wait_group {second}; ld.shared.b32 %r20, [%r6+128]; st.global.b32 [%rd7+128], %r20;
cp.async.wait_group {third}; ld.shared.b32 %r20, [%r6+256]; st.global.b32 [%rd7+256], %r20;
"""


@pytest.mark.parametrize("schedule", [*SCHEDULES, ("fair", "late"), ("greedy", "random")])
def test_groups(schedule: str | tuple[str, str]) -> None:
    source, result = random_bytes(384), poisoned(384, np.uint8)
    body = addresses(4) + PIPELINE.format(second=2, third=0)
    run_kernel(body, source, result, shared_bytes=384, schedule=schedule)  # type: ignore[arg-type]
    np.testing.assert_array_equal(result, source)


@pytest.mark.parametrize(("second", "third", "races"), [(3, 0, 1), (2, 1, 1), (3, 1, 2)])
def test_waiting_for_too_few_groups_is_a_race(second: int, third: int, races: int) -> None:
    source, result = random_bytes(384), poisoned(384, np.uint8)
    body = "mov.u32 %r5, smem; mad.lo.u32 %r6, %r1, 4, %r5; mov.u32 %r8, 0;"
    body += "st.shared.b32 [%r6], %r8; st.shared.b32 [%r6+128], %r8; st.shared.b32 [%r6+256], %r8;"
    body += addresses(4) + PIPELINE.format(second=second, third=third)
    found = run_kernel(body, source, result, shared_bytes=384, expect_reports=True).reports
    assert [str(report.kind) for report in found] == ["race"] * races


def test_groups_belong_to_threads() -> None:
    """Odd lanes commit twice, so they may read after wait_group 1 what even lanes may not."""
    source, result = random_bytes(128), poisoned(128, np.uint8)
    body = (
        addresses(4)
        + """
    and.b32 %r7, %r1, 1; setp.eq.u32 %p1, %r7, 1;
    cp.async.ca.shared.global [%r6], [%rd6], 4; cp.async.commit_group;
    @%p1 cp.async.commit_group;
    @%p1 cp.async.wait_group 1;
    @!%p1 cp.async.wait_group 0;
    """
    )
    run_kernel(body + copy_out(4), source, result, shared_bytes=128, schedule=("fair", "late"))
    np.testing.assert_array_equal(result, source)


@pytest.mark.parametrize("schedule", [*SCHEDULES, ("fair", "late"), ("greedy", "random")])
@pytest.mark.parametrize("noinc", [False, True])
def test_mbarrier_arrive(noinc: bool, schedule: str | tuple[str, str]) -> None:
    """One warp copies, the other reads what it waited for at the mbarrier."""
    source, result = random_bytes(128), poisoned(128, np.uint8)
    arrive = "" if noinc else "mbarrier.arrive.shared.b64 _, [%r5+256];"
    body = f"""
    mov.u32 %r5, smem; setp.eq.u32 %p1, %r1, 0; and.b32 %r7, %r1, 31; mad.lo.u32 %r6, %r7, 4, %r5;
    mul.wide.u32 %rd5, %r7, 4; add.u64 %rd6, %rd1, %rd5; add.u64 %rd7, %rd2, %rd5;
    @%p1 mbarrier.init.shared.b64 [%r5+256], {LANES};
    bar.sync 0;
    setp.ge.u32 %p2, %r1, 32; @%p2 bra READER;
    cp.async.ca.shared.global [%r6], [%rd6], 4;
    cp.async.mbarrier.arrive{".noinc" if noinc else ""}.shared.b64 [%r5+256]; {arrive}
    bra DONE;
    READER: mbarrier.try_wait.parity.shared.b64 %p3, [%r5+256], 0; @!%p3 bra READER;
    {copy_out(4)}
    DONE:
    """
    run_kernel(body, source, result, block=(64, 1, 1), shared_bytes=512, schedule=schedule)  # type: ignore[arg-type]
    np.testing.assert_array_equal(result, source)


def test_bounds() -> None:
    source, result = random_bytes(120), poisoned(128, np.uint8)
    body = addresses(4) + "cp.async.ca.shared.global [%r6], [%rd6], 4; cp.async.wait_all;" + copy_out(4)
    found = run_kernel(body, source, result, shared_bytes=128, expect_reports=True).reports
    assert [(report.kind, report.lane, report.times) for report in found] == [("out-of-bounds", 30, 2)]
    assert "array1" in found[0].message
    np.testing.assert_array_equal(result[:120], source)


def test_misaligned() -> None:
    source, result = random_bytes(1024), poisoned(128, np.uint8)
    body = addresses(4) + "cp.async.cg.shared.global [%r5+16], [%rd6], 16; cp.async.wait_all;"
    found = run_kernel(body, source, result, shared_bytes=128, checks=False, expect_reports=True).reports
    assert {str(report.kind) for report in found} == {"misaligned"}


@pytest.mark.parametrize(
    "instruction",
    [
        "cp.async.cg.shared.global [%r5], [%rd1], 8",
        "cp.async.ca.shared.global [%r5], [%rd1], 12",
        "cp.async.ca.global.shared [%rd1], [%r5], 16",
        "cp.async.ca.shared.global [%r5], [%rd1]",
    ],
)
def test_forms_that_do_not_exist(instruction: str) -> None:
    with pytest.raises(EmulatorError, match="not supported"):
        run_kernel("mov.u32 %r5, smem;" + instruction + ";", np.zeros(32, np.uint32), shared_bytes=16)

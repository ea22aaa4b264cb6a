"""tcgen05.cp, and what the checker says of operations that are not waited for."""

from __future__ import annotations

import numpy as np
import pytest
import tcgen05_problem
from harness import run_kernel
from matrix_layouts import OPERANDS, Placement, copy_image, layout, swizzle
from tcgen05_problem import Problem, body, solve

LANES = 128
WIDTHS = {"none": ((0, 4, 3), 16), "32B": ((1, 4, 3), 32), "64B": ((2, 4, 3), 64), "128B": ((3, 4, 3), 128)}
# Source row of every lane, -1: not written. From the copy traits' value layouts.
SOURCE_ROWS = {
    "128x256b": layout((128,), (1,)),
    "128x128b": layout((128,), (1,)),
    "4x256b": [lane // 32 if lane % 32 == 0 else -1 for lane in range(LANES)],
    "64x128b.warpx2::02_13": layout((64, 2), (1, 0)),
    "64x128b.warpx2::01_23": layout((32, 2, 2), (1, 0, 32)),
    "32x128b.warpx4": layout((32, 4), (1, 0)),
}


def place_rows(words: np.ndarray, mode: str, gap: int) -> Placement:
    """Rows of 32-bit words as a K-major matrix."""
    rows, chunks = len(words), words.shape[1] // 4
    parameters, width = WIDTHS[mode]
    groups = -(-rows // 8)
    stride = 8 * width + gap
    leading = groups * stride if mode == "none" else 16
    data = np.full(chunks * groups * stride + 16 * 128, 0xEE, dtype=np.uint8)
    for row in range(rows):
        for chunk in range(chunks):
            at = swizzle(row // 8 * stride + row % 8 * width + chunk * leading, parameters)
            data[at : at + 16] = words[row, 4 * chunk : 4 * chunk + 4].view(np.uint8)
    return Placement(data, leading, stride, mode)


COPY = """
.reg .b32 %base, %addr, %mbar, %n;
.reg .b64 %desc, %step;
.reg .pred %first, %more, %done, %issue;
mov.b32 %mbar, smem;
setp.lt.u32 %first, %r1, 32;
setp.eq.u32 %issue, %r1, 0;
@%first tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [smem+16], 32;
@%issue mbarrier.init.shared::cta.b64 [%mbar], 1;
{copy}
ld.shared.b32 %base, [smem+16];
mov.b32 %r2, 0x55555555;
tcgen05.st.sync.aligned.32x32b.x8.b32 [%base], {{%r2, %r2, %r2, %r2, %r2, %r2, %r2, %r2}};
tcgen05.wait::st.sync.aligned;
tcgen05.fence::before_thread_sync;
bar.sync 0;
tcgen05.fence::after_thread_sync;
shr.u32 %r7, %mbar, 4; cvt.u64.u32 %desc, %r7;
add.u64 %desc, %desc, {descriptor};
@!%issue bra wait;
tcgen05.cp.cta_group::1.{form} [%base], %desc;
tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%mbar];
wait:
mbarrier.try_wait.parity.shared::cta.b64 %done, [%mbar], 0;
@!%done bra wait;
tcgen05.fence::after_thread_sync;
tcgen05.ld.sync.aligned.32x32b.x8.b32 {{%r10, %r11, %r12, %r13, %r14, %r15, %r16, %r17}}, [%base];
tcgen05.wait::ld.sync.aligned;
mad.wide.u32 %rd5, %r1, 32, %rd2;
st.global.v4.b32 [%rd5], {{%r10, %r11, %r12, %r13}};
st.global.v4.b32 [%rd5+16], {{%r14, %r15, %r16, %r17}};
bar.sync 0;
@%first tcgen05.dealloc.cta_group::1.sync.aligned.b32 %base, 32;
"""


@pytest.mark.parametrize("gap", [0, 1024])
@pytest.mark.parametrize("mode", WIDTHS)
@pytest.mark.parametrize("form", SOURCE_ROWS)
def test_copy(form: str, mode: str, gap: int) -> None:
    rows = int(form.split("x")[0])
    columns = 8 if "256b" in form else 4
    words = np.random.default_rng(2).integers(0, 2**32, size=(rows, columns), dtype=np.uint32)
    placed = place_rows(words, mode, gap)
    image = np.zeros(-(-len(placed.data) // 2048) * 2048, dtype=np.uint8)
    image[: len(placed.data)] = placed.data
    out = np.zeros((LANES, 8), dtype=np.uint32)
    copy, descriptor = copy_image("%rd1", len(image)), placed.tcgen05_descriptor(OPERANDS)
    text = COPY.format(copy=copy, descriptor=descriptor, form=form)
    run_kernel(text, image, out, block=(128, 1, 1), target="sm_100a", shared_bytes=1024 + len(image))
    expected = np.full((LANES, 8), 0x55555555, dtype=np.uint32)
    for lane, row in enumerate(SOURCE_ROWS[form]):
        if row >= 0:
            expected[lane, :columns] = words[row]
    np.testing.assert_array_equal(out, expected)


def reports_without(monkeypatch: pytest.MonkeyPatch, *removed: str, **options: object) -> list[str]:
    """What is found in a matrix product whose kernel lacks the given lines."""

    def cut(*args: object) -> str:
        text = body(*args)  # type: ignore[arg-type]
        for line in removed:
            assert line in text
            text = text.replace(line, "")
        return text

    monkeypatch.setattr(tcgen05_problem, "body", cut)
    outcome = solve(Problem(), expect_reports=True, **options)
    return [f"{r.kind}: {r.message}" for r in outcome.result.reports]


def test_complete_kernel_has_no_findings() -> None:
    assert not solve(Problem(), expect_reports=True).result.reports


def test_missing_wait_for_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    wait = "mbarrier.try_wait.parity.shared::cta.b64 %done, [%mbar], 0;"
    assert reports_without(monkeypatch, wait, "@!%done bra wait;")


def test_missing_wait_for_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reports_without(monkeypatch, "tcgen05.wait::st.sync.aligned;")


def test_missing_proxy_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    found = reports_without(monkeypatch, "fence.proxy.async.shared::cta;")
    assert any("proxy" in report for report in found)


@pytest.mark.parametrize("fence", ["before", "after"])
def test_missing_thread_sync_fence(monkeypatch: pytest.MonkeyPatch, fence: str) -> None:
    found = reports_without(monkeypatch, f"tcgen05.fence::{fence}_thread_sync;")
    assert any("tcgen05" in report for report in found)


def test_accumulator_in_columns_that_are_not_allocated() -> None:
    problem = Problem()
    text = "tcgen05.mma"
    assert text in body(problem, None, Placement(np.zeros(16, np.uint8), 0, 0, "none"), 2048)
    found = _reports_with(problem, "add.u32 %addr, %base, 0;", "add.u32 %addr, %base, 500;")
    assert any("column 512 of tensor memory does not exist" in report for report in found)


def _reports_with(problem: Problem, old: str, new: str) -> list[str]:
    original = tcgen05_problem.body
    try:
        tcgen05_problem.body = lambda *args: original(*args).replace(old, new)
        outcome = solve(problem, expect_reports=True)
    finally:
        tcgen05_problem.body = original
    return [f"{r.kind}: {r.message}" for r in outcome.result.reports]


@pytest.mark.parametrize("bits", [4, 1 << 30, 5 << 7, 3 << 4, 9 << 24, 63 << 17])
def test_impossible_instruction_descriptor(bits: int) -> None:
    problem = Problem()
    found = _reports_with(
        problem, f"mov.b32 %r8, {problem.descriptor};", f"mov.b32 %r8, {problem.descriptor ^ bits};"
    )
    assert any("instruction descriptor" in report for report in found)


@pytest.mark.parametrize("schedule", ["greedy", "random"])
def test_schedules_give_the_same_result(schedule: str) -> None:
    for seed in range(3):
        tcgen05_problem.check(Problem(group=2, m=256, n=64), schedule=schedule, seed=seed)

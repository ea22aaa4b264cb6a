"""The checker on launches that overlap: what is accessed before griddepcontrol.wait."""

from __future__ import annotations

import numpy as np
import pytest
from harness import kernel_text
from planted_bugs import lines_of, without, zeros
from ptx_emulator.machine import LoadedModule, Machine, Result
from ptx_emulator.options import Options

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
    machine = Machine("sm_90a", Options(early_dependents=early))
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


# ---------------------------------------------------------------------- chains

LAUNCH = "griddepcontrol.launch_dependents;"
WAIT = "griddepcontrol.wait;"
FIRST = f"{LAUNCH}\nst.global.u32 [%rd1], 1;  // <write>"
LAST = "ld.global.u32 %r2, [%rd1];  // <read>\nst.global.u32 [%rd1+256], %r2;"


def run_chain(*bodies: str, early: bool) -> Result:
    """Launches of one array, each dependent on the one before."""
    array = zeros(128)
    machine = Machine("sm_90a", Options(early_dependents=early))
    machine.add_range("array1", array.ctypes.data, array.nbytes)
    for number, body in enumerate(bodies):
        module = LoadedModule(kernel_text(body, 1), "sm_90a")
        machine.attach(module)
        params = array.ctypes.data.to_bytes(8, "little")
        machine.enqueue(module.kernel(), (2, 1, 1), (32, 1, 1), params=params, pdl=number > 0)
    return machine.synchronize()


def one_writer(body: str) -> str:
    """By the first thread of the grid alone."""
    head = "mov.u32 %r30, %ctaid.x;\nor.b32 %r30, %r30, %r1;\nsetp.eq.u32 %p9, %r30, 0;\n"
    return head + body.replace("st.global", "@%p9 st.global")


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize(
    ("middle", "last", "ordered"),
    [
        (f"{WAIT}\n{LAUNCH}", WAIT, True),
        (f"{LAUNCH}\n{WAIT}", WAIT, True),
        (WAIT, WAIT, True),  # dependents start when the launch ends
        (LAUNCH, WAIT, False),  # the middle launch may end before the first one
        ("", WAIT, False),
        (f"{WAIT}\n{LAUNCH}", "", True),  # the first one has ended before the last one starts
        (f"{LAUNCH}\n{WAIT}", "", False),
    ],
    ids=["wait-launch", "launch-wait", "wait", "launch", "nothing", "last-no-wait", "last-no-wait-early"],
)
def test_chain_of_dependent_launches(middle: str, last: str, ordered: bool, early: bool) -> None:
    body = f"{last}\n{LAST}" if last else LAST
    bodies = [one_writer(part) for part in (FIRST, middle, body)]
    result = run_chain(*bodies, early=early)
    if ordered:
        assert not result.reports
        return
    assert {r.kind for r in result.reports} == {"grid-dependency"}
    sites = {(r.launch, r.line) for r in result.reports}
    marks = [lines_of(part, 1, "sm_90a", "") for part in bodies]
    assert sites <= {(0, marks[0]["write"]), (2, marks[2]["read"])}


def test_report_names_the_launch_that_is_not_waited_for() -> None:
    bodies = [one_writer(part) for part in (FIRST, LAUNCH, f"{WAIT}\n{LAST}")]
    result = run_chain(*bodies, early=False)
    assert "waits for launch 1 alone, which may end before launch 0" in result.reports[0].message


COUNTER = """
griddepcontrol.launch_dependents;
griddepcontrol.wait;
mov.u32 %r2, %ctaid.x;
mul.wide.u32 %rd2, %r2, 128;
add.u64 %rd2, %rd1, %rd2;
add.u64 %rd2, %rd2, %rd0;
ld.global.u32 %r3, [%rd2];
add.u32 %r3, %r3, 1;
st.global.u32 [%rd2], %r3;
"""
BLOCKS, LAUNCHES = 3, 400


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_every_launch_of_a_long_chain_runs(workers: int) -> None:
    """Also where a worker wakes late, long after others have found nothing more to do without it."""
    module = LoadedModule(kernel_text(COUNTER, 1), "sm_90a")
    for _ in range(15):
        counts = np.zeros(BLOCKS * 32, np.uint32)
        machine = Machine("sm_90a", Options(workers=workers))
        machine.add_range("counts", counts.ctypes.data, counts.nbytes)
        machine.attach(module)
        params = counts.ctypes.data.to_bytes(8, "little")
        for _ in range(LAUNCHES):
            machine.enqueue(module.kernel(), (BLOCKS, 1, 1), (32, 1, 1), params=params, pdl=True)
        assert not machine.synchronize().reports
        assert (counts == LAUNCHES).all()

"""setmaxnreg against the registers that a CTA was launched with."""

from typing import Any

import numpy as np
import pytest
from harness import run_kernel
from planted_bugs import SCHEDULES, find, silent
from ptx_emulator.errors import EmulatorError, UnsupportedInstruction
from ptx_emulator.launch_registers import fits, launch_registers
from ptx_emulator.options import Options

THREE_GROUPS = {"block": (384, 1, 1), "directives": ".maxntid 384 .minnctapersm 1"}  # 168 registers
TWO_GROUPS = {"block": (256, 1, 1), "directives": ".maxnreg 128"}

# Two warp groups that compute, one that loads.
ROLES = """
    setp.ge.u32 %p1, %r1, 256; @%p1 bra LOAD;
    setmaxnreg.inc.sync.aligned.u32 {compute};
    bra.uni DONE;
    LOAD:
    setmaxnreg.dec.sync.aligned.u32 {load};
    DONE:
    bar.sync 0;
"""


def reports_of(body: str, **launch: Any) -> list[Any]:
    return run_kernel(body, expect_reports=True, **launch).reports


@pytest.mark.parametrize(("compute", "load"), [(232, 40), (240, 24), (168, 168)])
def test_shares_that_fit(compute: int, load: int):
    silent(ROLES.format(compute=compute, load=load), **THREE_GROUPS)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("compute", "load"), [(240, 32), (224, 80)])
def test_more_than_the_block_was_launched_with_is_a_deadlock(compute: int, load: int, schedule: str):
    """2 * 240 + 32 is 512 registers, the launch gave 3 * 168: what comes last waits for ever."""
    reports = reports_of(ROLES.format(compute=compute, load=load), schedule=schedule, **THREE_GROUPS)
    assert {report.kind for report in reports} == {"deadlock"}
    text = "\n".join(report.message for report in reports)
    more = compute - 168
    assert f"waits for {more} registers per thread, for setmaxnreg.inc to {compute}; the pool of CTA" in text
    assert "launched with 168 and has now: warp" in text
    assert f"warps 8-11 {load}" in text


def test_the_pool_is_what_dec_has_released():
    """Also a single increase that would fit the multiprocessor, but not what the block has."""
    (message,) = {r.message for r in reports_of("setmaxnreg.inc.sync.aligned.u32 136;", **TWO_GROUPS)}
    assert "8 registers per thread" in message
    assert "has 0 for one warp" in message


def test_registers_that_exited_warps_had_stay_theirs():
    body = """
        setp.ge.u32 %p1, %r1, 128; {dec} @%p1 exit;
        setmaxnreg.inc.sync.aligned.u32 152;
    """
    silent(body.format(dec="@%p1 setmaxnreg.dec.sync.aligned.u32 104;"), **TWO_GROUPS)
    assert {r.kind for r in reports_of(body.format(dec=""), **TWO_GROUPS)} == {"deadlock"}


def test_a_wait_for_the_pool_ends_when_registers_are_released():
    """The first group takes what the second releases later, then the other way round."""
    out = np.zeros(256, np.uint32)
    body = """
        setp.ge.u32 %p1, %r1, 128; @%p1 bra SECOND;
        setmaxnreg.inc.sync.aligned.u32 216;
        bar.sync 1, 128;
        setmaxnreg.dec.sync.aligned.u32 40;
        bar.sync 2, 256;
        bra.uni DONE;
        SECOND:
        nanosleep.u32 1000;
        setmaxnreg.dec.sync.aligned.u32 40;
        bar.sync 2, 256;
        setmaxnreg.inc.sync.aligned.u32 216;
        DONE:
        add.u64 %rd10, %rd1, %rd0; st.global.u32 [%rd10], %r1;
    """
    silent(body, out, **TWO_GROUPS)
    run_kernel(body, out, **TWO_GROUPS)
    np.testing.assert_array_equal(out, np.arange(256))


def test_registers_are_allocated_in_units_of_eight():
    """A launch with 100 registers allocates 104, so that 104 needs nothing from the pool."""
    launch = {"block": (128, 1, 1), "directives": ".maxnreg 100"}
    silent("setmaxnreg.inc.sync.aligned.u32 104;", **launch)
    silent("setmaxnreg.inc.sync.aligned.u32 256;", block=(128, 1, 1), directives=".maxnreg 255")
    assert {r.kind for r in reports_of("setmaxnreg.inc.sync.aligned.u32 112;", **launch)} == {"deadlock"}


@pytest.mark.parametrize(
    "directives",
    ["", ".reqntid 256", ".maxntid 256, 1, 1", ".minnctapersm 1", ".reqntid 256 .minnctapersm 0"],
)
def test_without_registers_of_the_launch_it_has_no_effect(directives: str):
    """ptxas says "'setmaxnreg' ignored; unable to determine register count at entry"."""
    silent("setmaxnreg.inc.sync.aligned.u32 240;", block=(256, 1, 1), directives=directives)


def test_registers_given_as_an_option_count_without_directives():
    body = "setmaxnreg.inc.sync.aligned.u32 240;"
    (kind,) = {r.kind for r in reports_of(body, block=(256, 1, 1), max_registers=128)}
    assert kind == "deadlock"
    silent(body, block=(256, 1, 1), directives=".reqntid 256", max_registers=128)


# Registers per thread that ptxas 13.0 reports for a kernel with setmaxnreg: block, blocks, `.maxnreg`, the
# option --maxrregcount.
PTXAS = [
    ((33,), 1, None, None, 255),
    ((256,), 1, None, None, 255),
    ((288,), 1, None, None, 168),
    ((320,), 1, None, None, 168),
    ((384,), 1, None, None, 168),
    ((416,), 1, None, None, 128),
    ((200, 2), 1, None, None, 128),
    ((640,), 1, None, None, 96),
    ((768,), 1, None, None, 80),
    ((896,), 1, None, None, 72),
    ((1024,), 1, None, None, 64),
    ((160,), 2, None, None, 168),
    ((288,), 2, None, None, 96),
    ((416,), 2, None, None, 72),
    ((160,), 3, None, None, 128),
    ((320,), 1, 200, None, 168),
    ((320,), 1, 160, None, 160),
    ((320,), None, 100, None, 100),
    (None, None, 100, 64, 100),
    (None, None, 300, 64, 255),
    (None, None, 20, None, 24),
    (None, None, None, 100, 100),
    ((320,), 1, None, 64, 168),
    ((320,), None, None, 64, None),
    (None, 1, None, None, None),
]


@pytest.mark.parametrize("size", ["reqntid", "maxntid"])
@pytest.mark.parametrize(("block", "blocks", "maxnreg", "option", "expected"), PTXAS)
def test_registers_of_a_launch_are_those_that_ptxas_gives(
    block: tuple[int, ...] | None,
    blocks: int | None,
    maxnreg: int | None,
    option: int | None,
    expected: int | None,
    size: str,
):
    given = {size: block, "minnctapersm": blocks and (blocks,), "maxnreg": maxnreg and (maxnreg,)}
    directives = {name: value for name, value in given.items() if value}
    assert launch_registers(directives, option) == expected


def test_a_block_must_fit_a_multiprocessor():
    assert all(fits(*given) for given in ((168, 384), (168, 288), (255, 256)))
    assert not any(fits(*given) for given in ((169, 384), (176, 288), (168, 416)))
    with pytest.raises(EmulatorError, match="512 threads with 160 registers"):
        run_kernel("setmaxnreg.dec.sync.aligned.u32 40;", block=(512, 1, 1), directives=".maxnreg 160")
    run_kernel("", block=(512, 1, 1), directives=".maxnreg 160")  # which is a maximum only


@pytest.mark.parametrize("count", [20, 256])
def test_options_refuse_registers_that_a_thread_cannot_have(count: int):
    with pytest.raises(EmulatorError, match="24 to 255"):
        Options(max_registers=count)


@pytest.mark.parametrize("action", ["inc", "dec"])
@pytest.mark.parametrize("count", [16, 264, 36])
def test_register_counts_that_do_not_exist(action: str, count: int):
    with pytest.raises(UnsupportedInstruction, match="multiple of 8 from 24 to 256"):
        run_kernel(f"setmaxnreg.{action}.sync.aligned.u32 {count};")


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        (
            "dec.sync.aligned.u32 136",
            "setmaxnreg.dec to 136 registers, but a thread of the warp has 128 only",
        ),
        (
            "inc.sync.aligned.u32 120",
            "setmaxnreg.inc to 120 registers, but a thread of the warp has 128 already",
        ),
    ],
)
def test_the_wrong_direction(instruction: str, message: str):
    body = f"\nsetmaxnreg.{instruction}; // <change>\n"
    find(body, kind="registers", at="change", **TWO_GROUPS)
    assert message in reports_of(body, **TWO_GROUPS)[0].message
    silent("setmaxnreg.dec.sync.aligned.u32 128;", **TWO_GROUPS)
    silent("setmaxnreg.inc.sync.aligned.u32 128;", **TWO_GROUPS)


@pytest.mark.parametrize("directives", ["", ".maxnreg 128"])
def test_warps_of_a_group_must_execute_the_same(directives: str):
    launch = {"block": (256, 1, 1), "directives": directives}
    body = """
        setp.{condition}.u32 %p1, %r1, 64;
        @%p1 bra FEW;
        setmaxnreg.dec.sync.aligned.u32 48; // <first>
        bra.uni DONE;
        FEW:
        {few} // <second>
        DONE:
    """
    other = "setmaxnreg.dec.sync.aligned.u32 40;"
    for schedule in SCHEDULES:
        reports = reports_of(body.format(condition="lt", few=other), schedule=schedule, **launch)
        assert {r.kind for r in reports} == {"registers"}
        assert any("of the same warp group has executed setmaxnreg.dec to" in r.message for r in reports)
    find(body.format(condition="lt", few=""), kind="registers", at="first", **launch)
    find(body.format(condition="ge", few=other), kind="registers", at="second", **launch)
    silent(body.format(condition="lt", few="setmaxnreg.dec.sync.aligned.u32 48;"), **launch)


def test_warps_of_a_group_synchronise_between_two():
    body = """
        setp.ge.u32 %p1, %r1, 128; @%p1 bra DONE;
        setmaxnreg.dec.sync.aligned.u32 40;
        {between}
        setmaxnreg.inc.sync.aligned.u32 64; // <second>
        DONE:
    """
    silent(body.format(between="bar.sync 1, 128;"), **TWO_GROUPS)
    find(body.format(between=""), kind="registers", at="second", **TWO_GROUPS)


def test_all_threads_of_a_warp_execute_it():
    body = "setp.lt.u32 %p1, %r1, 16; @%p1 setmaxnreg.dec.sync.aligned.u32 40;"
    assert {r.kind for r in reports_of(body, **TWO_GROUPS)} == {"divergence", "registers"}

"""Divergence, reconvergence, switches, exits, traps, spinning and deadlock."""

import os
import subprocess
import sys

import numpy as np
import pytest
from harness import kernel_text, run_kernel
from ptx_emulator.errors import EmulatorError, UnsupportedInstruction
from ptx_emulator.lower.context import SPECIAL_REGISTERS
from ptx_emulator.machine import LoadedModule
from ptx_emulator.reports import EmulationError
from ptx_emulator.support import unsupported

STORE = "add.u64 %rd2, %rd1, %rd0; st.global.u32 [%rd2], %r2;"


def lanes(body: str, num_threads: int = 32, **options: object) -> np.ndarray:
    out = np.zeros(num_threads, dtype=np.uint32)
    run_kernel(body + STORE, out, block=(num_threads, 1, 1), **options)
    return out


def test_if_else():
    body = """
    setp.lt.u32 %p1, %r1, 10;
    @%p1 bra SMALL;
    mov.u32 %r2, 7;
    bra END;
    SMALL: mov.u32 %r2, 3;
    END:
    """
    np.testing.assert_array_equal(lanes(body), np.where(np.arange(32) < 10, 3, 7))


def test_a_loop_with_a_trip_count_per_lane():
    body = """
    mov.u32 %r2, 0; mov.u32 %r3, 0;
    LOOP: setp.ge.u32 %p1, %r3, %r1; @%p1 bra END;
    add.u32 %r3, %r3, 1; add.u32 %r2, %r2, %r3; bra LOOP;
    END:
    """
    n = np.arange(32)
    np.testing.assert_array_equal(lanes(body), n * (n + 1) // 2)


def test_nested_divergence():
    body = """
    and.b32 %r3, %r1, 1; and.b32 %r4, %r1, 2;
    setp.ne.u32 %p1, %r3, 0; setp.ne.u32 %p2, %r4, 0;
    mov.u32 %r2, 0;
    @!%p1 bra EVEN;
    @!%p2 bra ODD_LOW;
    add.u32 %r2, %r2, 100;
    ODD_LOW: add.u32 %r2, %r2, 10;
    bra END;
    EVEN: @%p2 bra END; add.u32 %r2, %r2, 1;
    END: bar.warp.sync -1;
    """
    n = np.arange(32)
    expected = np.where(n & 1, 10 + np.where(n & 2, 100, 0), np.where(n & 2, 0, 1))
    np.testing.assert_array_equal(lanes(body), expected)


def test_a_switch():
    body = """
    and.b32 %r3, %r1, 3;
    TABLE: .branchtargets A, B, C, A;
    brx.idx %r3, TABLE;
    A: mov.u32 %r2, 1; bra END;
    B: mov.u32 %r2, 2; bra END;
    C: mov.u32 %r2, 3;
    END:
    """
    np.testing.assert_array_equal(lanes(body), np.array([1, 2, 3, 1])[np.arange(32) % 4])


def test_lanes_that_exit_early_leave_the_others_alone():
    out = np.full(48, 9, dtype=np.uint32)
    body = "setp.gt.u32 %p1, %r1, 40; @%p1 exit; mov.u32 %r2, 5; bar.warp.sync -1;" + STORE
    run_kernel(body, out, block=(48, 1, 1))
    np.testing.assert_array_equal(out, np.where(np.arange(48) > 40, 9, 5))


def test_a_lane_waits_for_another_lane_of_its_warp():
    """Independent thread scheduling: lane 0 spins on what lane 1 writes later in the program."""
    out = np.zeros(32, dtype=np.uint32)
    body = """
    setp.ne.u32 %p1, %r1, 0;
    @%p1 bra OTHERS;
    SPIN: ld.volatile.global.u32 %r3, [%rd1+4]; setp.eq.u32 %p2, %r3, 0; @%p2 bra SPIN;
    bra END;
    OTHERS: setp.ne.u32 %p3, %r1, 1; mov.u32 %r4, 1; @!%p3 st.volatile.global.u32 [%rd1+4], %r4;
    END:
    """
    run_kernel(body, out)
    assert out[1] == 1


@pytest.mark.parametrize("schedule", ["fair", "greedy", "late", "random"])
def test_a_cta_waits_for_another(schedule: str):
    """The CTA that starts first spins on a flag of the last."""
    flags = np.zeros(4, dtype=np.uint32)
    body = """
    mov.u32 %r2, %ctaid.x; setp.ne.u32 %p1, %r2, 0; @%p1 bra RELEASE;
    SPIN: ld.acquire.gpu.global.u32 %r3, [%rd1+12]; setp.eq.u32 %p2, %r3, 0; @%p2 bra SPIN;
    bra END;
    RELEASE: mul.wide.u32 %rd3, %r2, 4; add.u64 %rd4, %rd1, %rd3; mov.u32 %r4, 1;
    st.release.gpu.global.u32 [%rd4], %r4;
    END:
    """
    run_kernel(body, flags, grid=(4, 1, 1), block=(1, 1, 1), schedule=schedule)
    np.testing.assert_array_equal(flags, [0, 1, 1, 1])


def test_deadlock_says_who_waits():
    out = np.zeros(1, dtype=np.uint32)
    body = "setp.gt.u32 %p1, %r1, 31; @%p1 bra END; bar.sync 1, 64; END:"
    result = run_kernel(body, out, block=(64, 1, 1), expect_reports=True)
    assert {r.kind for r in result.reports} == {"deadlock"}
    assert any(r.warp == 0 and "barrier 1" in r.message for r in result.reports)


# Kernel -> (warp, what the table says), of 64 threads.
WAITS = {
    "named": ("setp.lt.u32 %p1, %r1, 32; @%p1 bar.sync 1, 64; @!%p1 bar.sync 2, 64;", {
        (0, "waits for barrier 1 of CTA (0, 0, 0): 32 of 64 threads have arrived; warp 1 has not"),
        (1, "waits for barrier 2 of CTA (0, 0, 0): 32 of 64 threads have arrived; warp 0 has not"),
    }),
    "bytes": ("mov.u32 %r2, smem; setp.eq.u32 %p1, %r1, 0;"
              "@%p1 mbarrier.init.shared.b64 [%r2], 2; bar.sync 0;"
              "@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 48; setp.ge.u32 %p2, %r1, 32; @%p2 exit;"
              "WAIT: mbarrier.try_wait.parity.shared.b64 %p3, [%r2], 0; @!%p3 bra WAIT;", {
        (0, "waits for mbarrier 0x400 of CTA (0, 0, 0), phase 0 (parity 0): "
            "1 of 2 arrivals and 48 bytes missing"),
    }),
    "lanes": ("setp.ge.u32 %p2, %r1, 32; @%p2 exit; setp.lt.u32 %p1, %r1, 16; @%p1 bra LOW;"
              "shfl.sync.idx.b32 %r3, %r1, 0, 31, -1; bra END; LOW: barrier.sync 3, 64; END:", {
        (0, "lanes 0-15 wait for barrier 3 of CTA (0, 0, 0): lanes 16-31 of its own warp have not arrived"),
        (0, "lanes 16-31 wait for lanes 0-15 of its warp at a .sync instruction"),
    }),
    "poll": ("setp.ge.u32 %p2, %r1, 32; @%p2 exit;"
             "SPIN: ld.volatile.global.u32 %r3, [%rd1]; setp.eq.u32 %p1, %r3, 0; @%p1 bra SPIN;", {
        (0, "is in a loop where nothing changes"),
    }),
}  # fmt: skip


@pytest.mark.parametrize("case", WAITS)
def test_deadlock_says_what_each_warp_waits_for(case: str):
    body, expected = WAITS[case]
    out = np.zeros(4, dtype=np.uint32)
    result = run_kernel(body, out, block=(64, 1, 1), shared_bytes=16, expect_reports=True)
    assert {(r.warp, r.message) for r in result.reports} == expected


def test_an_endless_poll_is_a_deadlock():
    out = np.zeros(1, dtype=np.uint32)
    body = "SPIN: ld.volatile.global.u32 %r3, [%rd1]; setp.eq.u32 %p2, %r3, 0; @%p2 bra SPIN;"
    result = run_kernel(body, out, expect_reports=True)
    assert {r.kind for r in result.reports} == {"deadlock"}


# Polls of each warp that write what is there already: zeros.
ZERO = "setp.eq.u32 %p1, %r1, 0; @%p1 st.shared.u32 [%r2], 0;"
ATOMIC_POLLS = (
    "atom.global.add.u32 %r3, [%rd1], 0;",
    "atom.global.cas.b32 %r3, [%rd1], 1, 2;",
    "atom.global.cas.b32 %r3, [%rd1], 0, 0;",
    "atom.acquire.gpu.global.exch.b32 %r3, [%rd1], 0;",
    "atom.shared.or.b32 %r3, [%r2], 0;",
    "red.global.max.u32 [%rd1], 0; ld.relaxed.gpu.global.u32 %r3, [%rd1];",
)


def test_an_endless_poll_with_an_atomic_is_a_deadlock():
    out = np.zeros(1, dtype=np.uint32)
    polls = "".join(
        f"setp.ne.u32 %p1, %r10, {warp}; @%p1 bra NEXT{warp};"
        f"SPIN{warp}: {poll} setp.eq.u32 %p2, %r3, 0; @%p2 bra SPIN{warp}; NEXT{warp}:\n"
        for warp, poll in enumerate(ATOMIC_POLLS)
    )
    body = f"shr.u32 %r10, %r1, 5; mov.u32 %r2, smem; {ZERO} bar.sync 0; {polls}"
    block = (32 * len(ATOMIC_POLLS), 1, 1)
    result = run_kernel(body, out, block=block, shared_bytes=16, expect_reports=True)
    assert {(r.kind, r.warp) for r in result.reports} == {("deadlock", w) for w in range(len(ATOMIC_POLLS))}


@pytest.mark.parametrize("schedule", ["fair", "greedy", "random"])
def test_a_lock_by_compare_and_swap_is_passed_on(schedule: str):
    out = np.zeros(2, dtype=np.uint32)
    body = """
    SPIN: atom.acquire.gpu.global.cas.b32 %r3, [%rd1], 0, 1; setp.ne.u32 %p2, %r3, 0; @%p2 bra SPIN;
    ld.global.u32 %r4, [%rd1+4]; add.u32 %r4, %r4, 1; st.global.u32 [%rd1+4], %r4;
    atom.release.gpu.global.exch.b32 %r5, [%rd1], 0;
    """
    run_kernel(body, out, grid=(16, 1, 1), block=(1, 1, 1), schedule=schedule)
    np.testing.assert_array_equal(out, [0, 16])


ENDLESS = """
import signal, threading, time
import numpy as np
from harness import run_kernel

counter = np.zeros(1, dtype=np.uint32)

def interrupt():
    while not counter[0]:
        time.sleep(0.05)
    signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
threading.Thread(target=interrupt).start()
try:
    run_kernel("L: atom.global.add.u32 %r2, [%rd1], 1; bra L;", counter)
except KeyboardInterrupt:
    before = counter[0]
    run_kernel("st.global.u32 [%rd1], 7;", counter)
    print("interrupted", before > 0, counter[0])
"""


def test_an_interrupt_ends_a_run():
    result = subprocess.run(
        [sys.executable, "-c", ENDLESS],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.stdout.split() == ["interrupted", "True", "7"], result.stderr


TEXTS = """
.extern .func vprintf (.param .b64 a, .param .b64 b);
.extern .func __assertfail (.param .b64 a, .param .b64 b, .param .b32 c, .param .b64 d, .param .b64 e);
.global .align 1 .b8 message[6] = {97, 32, 60, 32, 98};
.global .align 1 .b8 file[5] = {107, 46, 99, 117};
.global .align 1 .b8 function[2] = {102};
"""
CALL = """{
.param .b64 param0; .param .b64 param1; .param .b32 param2; .param .b64 param3; .param .b64 param4;
st.param.b64 [param0+0], message; st.param.b64 [param1+0], file; st.param.b32 [param2+0], 12;
st.param.b64 [param3+0], function; st.param.b64 [param4+0], 1;
call.uni __assertfail, (param0, param1, param2, param3, param4);
}"""


def test_a_failed_assertion_is_a_finding():
    body = f"setp.ne.u32 %p1, %r1, 5; @%p1 bra DONE; {CALL} DONE: st.global.u32 [%rd1], 3;"
    out = np.zeros(1, dtype=np.uint32)
    (report,) = run_kernel(body, out, globals=TEXTS, expect_reports=True).reports
    assert (report.kind, report.lane) == ("trap", 5)
    assert report.message == "The assertion `a < b` of f failed at k.cu:12."


def test_a_call_of_printf_is_refused_by_name():
    body = """{ .param .b64 param0; st.param.b64 [param0+0], message; .param .b64 param1;
    st.param.b64 [param1+0], 0;
    call.uni vprintf, (param0, param1); }"""
    with pytest.raises(UnsupportedInstruction, match=r"PTX line \d+ .*call.*vprintf is called"):
        run_kernel(body, globals=TEXTS)


@pytest.mark.parametrize("name", ["%ctaidx", "%r9999", "%pm0", "value"])
def test_an_unknown_register_is_refused_with_its_line(name: str):
    text = kernel_text(f"\nadd.u32 %r2, %r1, {name};", 0)
    line = next(n for n, words in enumerate(text.splitlines(), 1) if words.startswith("add"))
    with pytest.raises(UnsupportedInstruction, match=f"PTX line {line} .*{name}"):
        LoadedModule(text).kernel()
    (found,) = unsupported(text)
    assert f"PTX line {line} " in str(found)


def test_every_special_register_is_known_to_the_runtime():
    others = {"gridid": "u64 %rd3", "is_explicit_cluster": "pred %p1"}
    moves = (f"mov.{others.get(name, 'u32 %r3')}, %{name};" for name in sorted(SPECIAL_REGISTERS))
    run_kernel("".join(moves))


def test_divergence_at_an_aligned_instruction():
    out = np.zeros(32, dtype=np.uint32)
    body = "setp.lt.u32 %p1, %r1, 4;\n@%p1 bra END;\nbarrier.sync.aligned 0;\nEND:"
    result = run_kernel(body, out, expect_reports=True)
    report = next(r for r in result.reports if r.kind == "divergence")
    assert "0-3" in report.message


def test_a_finding_at_one_instruction_is_reported_once():
    out = np.zeros(1, dtype=np.uint32)
    body = """
    mov.u32 %r2, 0;
    LOOP: ld.global.u32 %r3, [%rd1+4096]; add.u32 %r2, %r2, 1; setp.lt.u32 %p1, %r2, 5; @%p1 bra LOOP;
    """
    (report,) = run_kernel(body, out, block=(1, 1, 1), expect_reports=True).reports
    assert (report.kind, report.times) == ("out-of-bounds", 5)


def test_allowed_findings_are_kept_apart():
    out = np.zeros(1, dtype=np.uint32)
    result = run_kernel("ld.global.u32 %r3, [%rd1+4096];", out, allow=("out-of-bounds",))
    assert result.reports == []
    assert [report.kind for report in result.allowed] == ["out-of-bounds"]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"allow": ("typo",)}, "allow"),
        ({"workers": 0}, "workers"),
        ({"schedule": "slow"}, "schedule"),
        ({"shared_bytes": -5}, "shared_bytes"),
        ({"block": (32, -1, -1)}, "block"),
        ({"grid": (1, 70000, 1)}, "grid"),
    ],
)
def test_arguments_that_make_no_sense_are_named(options: dict[str, object], name: str):
    with pytest.raises(EmulatorError, match=f"^{name}:"):
        run_kernel("", np.zeros(1, dtype=np.uint32), **options)


def test_trap_stops_the_grid():
    out = np.zeros(1, dtype=np.uint32)
    with pytest.raises(EmulationError, match="trap"):
        run_kernel("setp.eq.u32 %p1, %r1, 3; @%p1 trap;", out)


def test_an_unknown_instruction_names_itself_and_its_line():
    with pytest.raises(UnsupportedInstruction, match=r"PTX line \d+ of kernel: frobnicate.u32"):
        run_kernel("frobnicate.u32 %r2, %r1;", np.zeros(1, dtype=np.uint32))


def test_an_unknown_form_names_itself():
    with pytest.raises(UnsupportedInstruction, match=r"add.sideways.u32"):
        run_kernel("add.sideways.u32 %r2, %r1, %r1;", np.zeros(1, dtype=np.uint32))

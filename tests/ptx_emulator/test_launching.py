"""Launches of PTX, exploration of schedules, arrays, tensor maps."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import kernel_text
from ptx_emulator import (
    EmulationError,
    EmulatorError,
    Launch,
    Launches,
    Options,
    aligned,
    explore,
    launch,
    tensor_map,
)
from ptx_emulator.host.arrays import disjoint, memory_of
from ptx_emulator.host.exploring import ScheduleError
from ptx_emulator.host.tensor_maps import encoder
from ptx_emulator.tensor_map import BYTES, DataType, Swizzle, decode

SCALE = """.version 8.0
.target sm_90
.address_size 64
.visible .entry scale(.param .u64 x, .param .f32 factor, .param .u32 n)
{
.reg .pred %p; .reg .b32 %r<4>; .reg .f32 %f<4>; .reg .b64 %rd<4>;
ld.param.u64 %rd1, [x];
ld.param.f32 %f1, [factor];
ld.param.u32 %r1, [n];
mov.u32 %r2, %tid.x;
setp.ge.u32 %p, %r2, %r1;
@%p bra DONE;
mul.wide.u32 %rd2, %r2, 4;
add.u64 %rd1, %rd1, %rd2;
ld.global.f32 %f2, [%rd1];
mul.f32 %f2, %f2, %f1;
st.global.f32 [%rd1], %f2;
DONE:
ret;
}
"""
# Two warps write the same word.
RACE = kernel_text("shr.u32 %r2, %r1, 5; st.global.u32 [%rd1], %r2;", 1)


@pytest.mark.parametrize("make", [np.ones, lambda n, dtype: torch.ones(n)], ids=["numpy", "torch"])
def test_launch(make) -> None:
    x = make(40, dtype=np.float32)
    launch(SCALE, block=64, args=[x, 2.5, 40])
    assert all(x == 2.5)


def test_sizes_may_be_numpy_integers() -> None:
    x = np.ones(40, dtype=np.float32)
    launch(SCALE, grid=np.int64(1), block=(np.int32(64), 1), args=[x, 2.5, 40])
    assert all(x == 2.5)


def test_an_array_that_numpy_may_not_write_is_read_only() -> None:
    constant = np.ones(4, dtype=np.float32).tobytes()
    with pytest.raises(EmulationError):
        launch(SCALE, block=4, args=[np.frombuffer(constant, dtype=np.float32), 2.5, 4])
    assert constant == np.ones(4, dtype=np.float32).tobytes()


def test_arguments_are_checked() -> None:
    x = np.ones(4, dtype=np.float32)
    with pytest.raises(EmulatorError, match="2 given, scale takes 3"):
        launch(SCALE, args=[x, 2.0])
    with pytest.raises(EmulatorError, match="does not fit n, which has 4 bytes"):
        launch(SCALE, args=[x, 2.0, 2**32])
    with pytest.raises(EmulatorError, match="factor has 4 bytes, not 8"):
        launch(SCALE, args=[x, np.float64(2.0), 4])
    with pytest.raises(EmulatorError, match="x cannot be a str"):
        launch(SCALE, args=["x", 2.0, 4])
    with pytest.raises(ValueError, match="2 for 3 arguments"):
        launch(SCALE, args=[x, 2.0, 4], names=["x", "factor"])
    with pytest.raises(ValueError, match="y"):
        launch(SCALE, args=[x, 2.0, 4], uninitialised=["y"])
    with pytest.raises(EmulatorError, match=r"n is a \.u32, it cannot be 4\.0"):
        launch(SCALE, args=[x, 2.0, 4.0])
    with pytest.raises(EmulatorError, match=r"x is a \.u64, it cannot be 0\.5"):
        launch(SCALE, args=[0.5, 2.0, 4])
    with pytest.raises(EmulatorError, match=r"n is a \.u32, it cannot be np.float32"):
        launch(SCALE, args=[x, 2.0, np.float32(4)])
    with pytest.raises(EmulatorError, match=r"factor is a \.f32, it cannot be the address of an array"):
        launch(SCALE, args=[x, x, 4])
    with pytest.raises(EmulatorError, match=r"1e\+39 does not fit factor, a \.f32"):
        launch(SCALE, args=[x, 1e39, 4])


def test_what_has_another_type_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^block: '40', expected an integer"):
        launch(SCALE, block="40", args=[np.ones(4, dtype=np.float32), 2.0, 4])
    with pytest.raises(TypeError, match=r"^job: a function, expected a Launch"):
        explore(lambda: None, 3)
    path, x = tmp_path / "scale.ptx", np.ones(4, dtype=np.float32)
    path.write_text(SCALE)
    launch(path, args=[x, 2.0, 4])
    assert list(x) == [2.0] * 4


@pytest.mark.parametrize("factor", [3, 3.0, np.float32(3), np.int64(3), True + 2], ids=repr)
def test_a_number_for_a_float_is_its_value(factor: float) -> None:
    x = np.ones(4, dtype=np.float32)
    launch(SCALE, args=[x, factor, np.uint32(4)])
    assert list(x) == [3.0] * 4


def test_alignment_as_on_a_gpu() -> None:
    text = kernel_text("ld.global.v8.b32 {%r1,%r2,%r3,%r4,%r5,%r6,%r7,%r8}, [%rd1];", 1, "sm_100a")
    x = aligned(np.arange(100, dtype=np.float32).reshape(4, 25)[:, :20])
    assert x.ctypes.data % 256 == 0
    assert np.array_equal(x, np.arange(100).reshape(4, 25)[:, :20])
    launch(text, args=[x])
    with pytest.raises(EmulationError, match="isaligned"):
        launch(text, args=[x.reshape(-1)[4:]])


def test_two_arrays_of_one_name() -> None:
    text = kernel_text("", 2)
    x, y = np.ones(4), np.ones(4)
    with pytest.raises(ValueError, match="'x' is the name of two arrays"):
        launch(text, args=[x, y], names=["x", "x"])
    with pytest.raises(ValueError, match="'y' is the name of two arrays"):
        launch(text, args=[x, y], names=["x", "y"], memory={"y": np.ones(4)})


def test_kernels_by_their_names_in_cpp() -> None:
    text = kernel_text("", 0)
    start = text.index(".visible")
    mangled = ("_ZN4gemm6kernelIfEEvPT_", "_ZN3mla6kernelEv", "_Z7combinePf", "plain", "_ZN3mla5plainEv")
    module = text[:start] + "".join(
        text[start:].replace(" kernel()", f" {name}()").replace("smem", f"smem{k}")
        for k, name in enumerate(mangled)
    )
    found = {}
    for name in ("gemm::kernel", "mla::kernel", "combine", "plain", "mla::plain", mangled[0]):
        found[name] = launch(module, name).counts[0].kernel
    assert list(found.values()) == [*mangled, mangled[0]]
    with pytest.raises(EmulatorError, match=f"kernel is ambiguous, it may be {mangled[0]}, {mangled[1]}"):
        launch(module, "kernel")
    with pytest.raises(EmulatorError, match=r"the module has _ZN4gemm.*, not 'ernel'"):
        launch(module, "ernel")
    with pytest.raises(EmulatorError, match=r"the module has _ZN4gemm.*, say which"):
        launch(module)


def test_an_array_that_is_too_small_is_named() -> None:
    x = np.ones(8, dtype=np.float32)
    with pytest.raises(EmulationError, match="past the end of x") as caught:
        launch(SCALE, args=[x[:4], 2.0, 8], names=["x", "factor", "n"])
    assert {report.kind for report in caught.value.reports} == {"out-of-bounds"}
    assert list(x) == [2.0] * 4 + [1.0] * 4


def test_launches_run_in_order() -> None:
    x = np.ones(4, dtype=np.float32)
    Launches([Launch(SCALE, args=[x, 3.0, 4]), Launch(SCALE, args=[x, -1.0, 2])]).run()
    assert list(x) == [-3.0, -3.0, 3.0, 3.0]


def test_explore_restores_the_arrays_between_runs() -> None:
    x = np.ones(4, dtype=np.float32)
    found = explore(Launch(SCALE, args=[x, 3.0, 4]), 6, progress=False)
    assert found.first_wrong is None
    assert list(x) == [3.0] * 4
    assert len({(run.options.schedule, run.options.seed) for run in found.runs}) == 6


def test_explore_finds_a_schedule_and_its_seed_repeats_it() -> None:
    x = np.zeros(1, dtype=np.uint32)
    job = Launch(RACE, block=256, args=[x], names=["x"])
    found = explore(job, 40, options=Options(checks=False), progress=False)
    wrong = found.first_wrong
    assert wrong is not None, "no schedule changed the order of the warps"
    assert wrong.disagreement is not None
    assert wrong.disagreement.array == "x"
    value = int(x[0])
    job.run(wrong.options)
    assert int(x[0]) == value
    with pytest.raises(ScheduleError, match="x, element 0"):
        found.raise_if_wrong()


def test_explore_reports_races_of_the_first_schedule() -> None:
    x = np.zeros(1, dtype=np.uint32)
    found = explore(Launch(RACE, block=64, args=[x]), 4, progress=False)
    assert found.first_wrong is found.runs[0]
    assert {report.kind for report in found.runs[0].result.reports} == {"race"}


def test_error_of_a_schedule_has_all_findings_the_most_telling_first() -> None:
    """Shared memory is read before anybody has written it; later the warps race in global memory."""
    unwritten = ".reg .b32 %u;\n.shared .b32 slot;\nld.shared.u32 %u, [slot];\n"
    body = RACE.replace("{\n", "{\n" + unwritten, 1)
    x = np.zeros(1, dtype=np.uint32)
    with pytest.raises(ScheduleError) as error:
        explore(Launch(body, block=64, args=[x]), 4, progress=False).raise_if_wrong()
    assert [r.kind for r in error.value.run.result.reports] == ["uninitialised", "race"]
    text = str(error.value)
    assert text.startswith("schedule fair: race in ")
    assert "(and 1 more findings)" in text
    assert text.index("Races:") < text.index("Reads of what nobody wrote:")
    assert "finds nothing: it has not been written" in text


def test_views_of_one_buffer_become_one_range() -> None:
    rows = torch.zeros(4, 10, dtype=torch.bfloat16)
    left, right = memory_of("left", rows[:, :6]), memory_of("right", rows[:, 6:])
    assert left.num_bytes == (3 * 10 + 6) * 2
    (both,) = disjoint([right, left])
    assert (both.name, both.address, both.num_bytes) == ("left+right", rows.data_ptr(), 80)
    apart = disjoint([memory_of("a", rows[:2]), memory_of("b", rows[2:]), memory_of("none", rows[:0])])
    assert [m.name for m in apart] == ["a", "b"]


def test_arrays_that_cannot_be_passed() -> None:
    with pytest.raises(ValueError, match="negative strides"):
        memory_of("x", np.zeros(4)[::-1])
    with pytest.raises(ValueError, match="on meta"):
        memory_of("x", torch.zeros(4, device="meta"))


def test_tensor_map_of_an_array() -> None:
    matrix = torch.zeros(64, 256, dtype=torch.bfloat16)[:, :128]
    made = tensor_map(matrix, (16, 64), swizzle=Swizzle.B128)
    assert made.dims == (128, 64)
    assert made.strides == (512,)
    assert made.box == (64, 16)
    assert decode(made.encode()).address == matrix.data_ptr()
    with pytest.raises(ValueError, match="box"):
        tensor_map(matrix, (16,))
    with pytest.raises(ValueError, match="contiguous"):
        tensor_map(matrix.T, (16, 64))


def test_the_c_function_encodes_as_the_python_function() -> None:
    matrix = torch.zeros(64, 128)
    made = tensor_map(matrix, (16, 32), swizzle=Swizzle.B128)
    out = (ctypes.c_uint8 * BYTES)()
    sizes, counts = ctypes.c_uint64 * 2, ctypes.c_uint32 * 2
    swizzle, dtype = int(Swizzle.B128), int(DataType.FLOAT32)
    shape, box, ones = sizes(128, 64), counts(32, 16), counts(1, 1)
    arguments = (dtype, 2, matrix.data_ptr(), shape, sizes(512, 0), box, ones, 0, swizzle, 0, 0)
    assert encoder()(ctypes.addressof(out), *arguments) == 0
    assert bytes(out) == made.encode()
    assert encoder()(ctypes.addressof(out), dtype, 7, *arguments[2:]) == 1


INLINED = """.version 8.0
.target sm_90
.address_size 64
.file 1 "kernel.cu"
.file 2 "helpers.h"
.visible .entry k(.param .u64 x)
{
.reg .b32 %r<2>; .reg .b64 %rd<2>;
ld.param.u64 %rd1, [x];
.loc 1 6 3
.loc 2 4 3, function_name $L__info_string0, inlined_at 1 6 3
ld.global.b32 %r1, [%rd1+4000];
ret;
}
.section .debug_str
{
$L__info_string0:
.b8 95,90,54,104,101,108,112,101,114,80,102,105,0
}
"""


def test_a_finding_in_inlined_code_names_the_helper_and_its_caller() -> None:
    with pytest.raises(EmulationError) as caught:
        launch(INLINED, args=[np.zeros(4, dtype=np.float32)])
    report = caught.value.reports[0]
    assert report.location is not None
    assert (report.location.file, report.location.line) == ("helpers.h", 4)
    assert "helpers.h:4 (helper), inlined at kernel.cu:6 (PTX line 12)" in str(caught.value)


def test_options_are_checked() -> None:
    for wrong in ({"schedule": "slow"}, {"schedule": ("fair", "slow")}, {"workers": 0}, {"allow": ("bugs",)}):
        with pytest.raises(EmulatorError, match=next(iter(wrong))):
            Options(**wrong)
    assert Options(schedule=("greedy", "late")).policies == Options(schedule="greedy-late").policies

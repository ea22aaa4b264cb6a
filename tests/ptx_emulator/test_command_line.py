"""python -m ptx_emulator and the pytest fixture."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness import kernel_text
from ptx_emulator.__main__ import main
from ptx_emulator.command_line_arguments import parse_argument
from ptx_emulator.host import cuda_source
from test_launching import RACE, SCALE

pytest_plugins = ["pytester"]
SUBJECT = """
import numpy as np
from ptx_emulator import Launch

def scale():
    x = np.ones(4, dtype=np.float32)
    return Launch({ptx!r}, args=[x, 3.0, 4])
"""


@pytest.fixture
def scale(tmp_path: Path) -> str:
    path = tmp_path / "scale.ptx"
    path.write_text(SCALE)
    return str(path)


def test_run(scale: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--block", "64", "--arg", "f32:40=arange", "--arg", "2.5", "--arg", "40"]
    assert main(["run", scale, *arguments]) == 0
    assert "no findings" in capsys.readouterr().out
    assert main(["run", scale, "--json", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["reports"] == []
    assert found["counts"][0]["kernel"] == "scale"


def test_run_with_findings(scale: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", scale, "--arg", "f32:4=zeros", "--arg", "2.5", "--arg", "5"]) == 1
    assert "out of bounds" in capsys.readouterr().out


def test_run_what_cannot_be_run(scale: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", scale]) == 2
    assert "0 given, scale takes 3" in capsys.readouterr().err
    assert main(["run", "nowhere.ptx"]) == 2
    assert main(["run", "nowhere.py:job"]) == 2


def test_names_of_arrays(scale: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", scale, "--arg", "f32:4=zeros", "--arg", "2.5", "--arg", "4"]
    names = ["--name", "x", "--name", "factor", "--name", "n"]
    assert main([*arguments, *names]) == 0
    assert main([*arguments, *names, "--uninitialised", "x"]) == 1
    assert "The read of x + 0 bytes finds nothing" in capsys.readouterr().out
    assert main([*arguments, "--read-only", "arg0"]) == 1
    assert main([*arguments, "--name", "x"]) == 2
    assert main([*arguments, "--uninitialised", "x"]) == 2
    assert "uninitialised: ['x'] are none of ['arg0']" in capsys.readouterr().err


LAUNCH_OPTIONS = (
    "--kernel k|--grid 2|--block 32|--cluster 1|--shared-bytes 0|--arg 1|--name x|--uninitialised x|"
    "--read-only x|--device sm_90"
)


@pytest.mark.parametrize("option", LAUNCH_OPTIONS.split("|"))
@pytest.mark.parametrize("command", ["run", "check", "trace"])
def test_options_of_a_launch_are_not_for_python(
    command: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "subject.py"
    path.write_text(SUBJECT.format(ptx=SCALE))
    assert main([command, f"{path}:scale", *option.split()]) == 2
    assert f"{option.split()[0]}: is for a PTX file or a CUDA source" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["", "4,", "a", "1,2,3,4", "-1"])
def test_sizes(scale: str, size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", scale, f"--grid={size}"]) == 2
    assert f"--grid {size}: expected" in capsys.readouterr().err


def test_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "subject.py"
    path.write_text(SUBJECT.format(ptx=SCALE))
    assert main(["check", f"{path}:scale", "--schedules", "3"]) == 0
    assert capsys.readouterr().out.count("no findings") == 3
    assert main(["check", f"{path}:nothing"]) == 2
    race = tmp_path / "race.ptx"
    race.write_text(RACE)
    assert main(["check", str(race), "--block", "64", "--arg", "u32:1=zeros", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[0]["reports"][0]["kind"] == "race"


def test_trace(scale: str, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    arguments = ["--arg", "f32:4=zeros", "--arg", "2.5", "--arg", "4"]
    assert main(["trace", scale, *arguments, "--role", "scaling=0", "-o", str(output)]) == 0
    events = json.loads(output.read_text())["traceEvents"]
    assert "warp 0 scaling" in [e["args"]["name"] for e in events if e["name"] == "thread_name"]


def test_trace_of_a_deadlock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stuck, output = tmp_path / "stuck.ptx", tmp_path / "out.json"
    stuck.write_text(kernel_text("setp.lt.u32 %p1, %r1, 32; @%p1 bra END; bar.sync 1, 96; END:", 0))
    assert main(["trace", str(stuck), "--block", "64", "-o", str(output)]) == 1
    assert "Deadlock" in capsys.readouterr().out
    events = json.loads(output.read_text())["traceEvents"]
    assert {e["tid"] for e in events if e["ph"] == "X"} == {0, 1}


def test_roles(scale: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [scale, "--block", "128", "--arg", "f32:4=zeros", "--arg", "2.5", "--arg", "4"]
    assert main(["run", *arguments, "--role", "work=0", "--role", "idle=1-2,3"]) == 0
    assert re.search(r"^ +work +idle +all$", capsys.readouterr().out, re.MULTILINE)
    assert main(["run", *arguments, "--role", "work"]) == 2
    assert main(["run", *arguments, "--role", "work=7"]) == 2
    assert "work" in capsys.readouterr().err


def test_ops(scale: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ops"]) == 0
    listed = capsys.readouterr().out.split()
    assert "tcgen05.mma" in listed
    assert "tcgen05.shift" not in listed  # it is refused
    assert main(["ops", scale]) == 0
    other = tmp_path / "other.ptx"
    other.write_text(SCALE.replace("mul.f32", "frobnicate.f32"))
    assert main(["ops", str(other)]) == 1
    assert "PTX line 16 of scale: frobnicate.f32 is not supported" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"), [("7", 7), ("0x10", 16), ("-3", -3), ("2.5", 2.5), ("1e3", 1000.0)]
)
def test_numbers(text: str, expected: float) -> None:
    assert parse_argument(text, 0) == expected
    assert type(parse_argument(text, 0)) is type(expected)


@pytest.mark.parametrize("text", ["x", "f32:4=nowhere", "f99:4=zeros", "f32:4"])
def test_arguments_that_are_none(text: str) -> None:
    with pytest.raises(ValueError):
        parse_argument(text, 0)


def test_fixture(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        SUBJECT.format(ptx=SCALE)
        + """
def test_it(emulator):
    assert emulator.device == "sm_90a"
    assert len(emulator.explore(scale()).runs) == 3
    assert not emulator.run(scale()).reports
    assert emulator.with_options(schedules=2).schedules == 2
"""
    )
    options = ["--emulator-device", "sm_90a", "--emulator-schedules", "3"]
    plugin = [] if _is_installed() else ["-p", "ptx_emulator.pytest_plugin"]
    pytester.runpytest(*options, *plugin).assert_outcomes(passed=1)


def _is_installed() -> bool:
    from importlib.metadata import entry_points

    return any(point.name == "ptx_emulator" for point in entry_points(group="pytest11"))


@pytest.mark.skipif(
    not (os.environ.get("NVCC") or shutil.which("nvcc") or cuda_source._nvrtc()),
    reason="neither nvcc nor NVRTC is installed",
)
def test_a_cuda_source_is_compiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "add.cu"
    path.write_text("__global__ void add(float* x) { x[threadIdx.x] += 1; }", encoding="utf-8")
    assert main(["run", str(path), "--arg", "f32:32=zeros"]) == 0
    assert main(["run", str(path), "--arg", "f32:31=zeros"]) == 1
    assert "add.cu:1" in capsys.readouterr().out


def test_output_that_nobody_reads_to_its_end() -> None:
    command = f"{sys.executable} -m ptx_emulator ops; echo status $? >&2"
    process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == "status 1\n"
    process.wait()


def test_a_file_without_a_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ops", os.devnull]) == 2
    assert "no .target" in capsys.readouterr().err


def test_zero_counts_are_named_in_one_line(scale: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", scale, "--arg", "f32:4=zeros", "--arg", "2.5", "--arg", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (none,) = [line for line in lines if line.startswith("none: ")]
    assert "mma flops" in none
    assert not any(line.startswith("mma flops") for line in lines)


def test_a_trace_says_that_races_were_not_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "race.ptx"
    path.write_text(RACE)
    trace = ["trace", str(path), "--block", "64", "--arg", "f32:64=zeros", "-o", str(tmp_path / "trace.json")]
    assert main(trace) == 0
    assert "races not looked for" in capsys.readouterr().out
    assert main([*trace, "--checks"]) == 1

"""Which targets have which instructions, and on which devices PTX runs."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from harness import kernel_text, run_kernel
from ptx_emulator import EmulatorError, Launch, Launches, UnsupportedInstruction, launch
from ptx_emulator.lower.availability import missing, missing_register
from ptx_emulator.machine import LoadedModule, Machine
from ptx_emulator.ptx.module import Instruction, Register
from ptx_emulator.ptx.parser import parse
from ptx_emulator.support import unsupported
from ptx_emulator.targets import check_runs_on

NAMES = "80 86 89 90 90a 100 100a 100f 103a 110 110a 120 120a 120f 121 121a"
TARGETS = [f"sm_{name}" for name in NAMES.split()]


def instructions() -> dict[str, set[str]]:
    """Instruction -> the targets that have it, as ptxas of CUDA 13.0 says."""
    found = {}
    path = Path(__file__).with_name("instructions_by_target.txt")
    for section in path.read_text(encoding="utf-8").split("targets: ")[1:]:
        targets, *lines = section.strip().splitlines()
        found |= {line: set(targets.split()) for line in lines}
    return found


@pytest.mark.parametrize("text", instructions())
def test_who_has_an_instruction(text: str) -> None:
    body = parse(kernel_text(text, 4)).functions["kernel"].body
    instruction = body[-2]
    assert isinstance(instruction, Instruction)
    specials = [
        operand.name.removeprefix("%")
        for operand in instruction.operands
        if isinstance(operand, Register) and re.fullmatch(r"%[a-z]+_[a-z_]+|%clusterid\.x", operand.name)
    ]
    having = {
        target
        for target in TARGETS
        if missing(instruction, target) is None
        and not any(missing_register(name, target) for name in specials)
    }
    assert having == instructions()[text]


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="ptxas is not installed")
@pytest.mark.parametrize("target", TARGETS)
def test_ptxas_agrees(target: str, tmp_path: Path) -> None:
    known = subprocess.run(["ptxas", "--help"], capture_output=True, text=True, check=True).stdout
    if f"{target}" not in known:
        pytest.skip(f"this ptxas does not know {target}")
    texts = list(instructions())
    start, end = kernel_text("@@", 4, target).replace(".reg .b128", ".reg .b8 %b<4>; .reg .b128").split("@@")
    start = start.replace(".version 8.8", ".version 9.0")
    path = tmp_path / "all.ptx"
    path.write_text(start + "\n".join(texts) + end)
    command = ["ptxas", "-arch", target, str(path), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    first = start.count("\n") + 1
    lines = {int(n) for n in re.findall(r"line (\d+); *error", done.stdout + done.stderr)}
    refused = {texts[n - first] for n in lines}
    assert refused == {text for text, targets in instructions().items() if target not in targets}


@pytest.mark.parametrize(
    ("body", "target", "needs"),
    [
        ("elect.sync %r2|%p1, 0xffffffff;", "sm_80", "sm_90"),
        ("griddepcontrol.wait;", "sm_89", "sm_90"),
        ("wgmma.fence.sync.aligned;", "sm_90", "sm_90a"),
        ("wgmma.fence.sync.aligned;", "sm_100a", "sm_90a"),
        ("setmaxnreg.inc.sync.aligned.u32 64;", "sm_90", "sm_90a"),
        ("tcgen05.wait::ld.sync.aligned;", "sm_100", "sm_100f, sm_100a or sm_110f, sm_110a"),
        ("tcgen05.wait::ld.sync.aligned;", "sm_120a", "sm_100f, sm_100a or sm_110f, sm_110a"),
        ("mov.u32 %r2, %cluster_ctarank;", "sm_80", "sm_90"),
        ("ld.shared::cluster.u32 %r2, [%r3];", "sm_86", "sm_90"),
    ],
)
def test_an_instruction_that_the_target_lacks(body: str, target: str, needs: str) -> None:
    with pytest.raises(UnsupportedInstruction, match=f".target {target} does not have .*needs {needs}"):
        run_kernel(body, target=target)
    (error,) = unsupported(kernel_text(body, 0, target))
    assert "PTX line" in str(error)


@pytest.mark.parametrize("target", ["sm_100a", "sm_100f", "sm_103a", "sm_103f", "sm_110a", "sm_101a"])
def test_tensor_memory_in_its_families(target: str) -> None:
    run_kernel("tcgen05.wait::ld.sync.aligned;", target=target)


@pytest.mark.parametrize(
    ("ptx_target", "devices", "others"),
    [
        ("sm_80", "sm_80 sm_86 sm_90a sm_120", ""),
        ("sm_90", "sm_90 sm_90a sm_100a sm_121", "sm_89"),
        ("sm_90a", "sm_90 sm_90a", "sm_80 sm_100 sm_100a sm_120a"),
        ("sm_100a", "sm_100 sm_100a", "sm_90a sm_103a sm_110a sm_120a"),
        ("sm_100f", "sm_100a sm_103a", "sm_90 sm_110a sm_120a"),
        ("sm_103f", "sm_103", "sm_100"),
        ("sm_101a", "sm_101a sm_110a", "sm_100a sm_103"),
        ("sm_120a", "sm_120a", "sm_121a sm_100a"),
        ("sm_120f", "sm_120 sm_121", "sm_100"),
    ],
)
def test_where_ptx_runs(ptx_target: str, devices: str, others: str) -> None:
    for device in devices.split():
        check_runs_on(ptx_target, device)
    for device in others.split():
        with pytest.raises(EmulatorError, match=f"cannot run on {device}, it is for {ptx_target}"):
            check_runs_on(ptx_target, device)


def test_every_way_to_run_refuses_ptx_for_another_device() -> None:
    ptx = kernel_text("", 0, "sm_90a")
    with pytest.raises(EmulatorError, match="cannot run on sm_100a"):
        launch(ptx, device="sm_100a")
    with pytest.raises(EmulatorError, match="cannot run on sm_100a"):
        Machine("sm_100a").attach(LoadedModule(ptx))
    with pytest.raises(EmulatorError, match="cannot run on sm_120a"):
        unsupported(ptx, "sm_120a")
    with pytest.raises(ValueError, match="one architecture"):
        Launches([Launch(ptx), Launch(kernel_text("", 0, "sm_100a"))]).run()
    launch(kernel_text("", 0, "sm_90"), device="sm_100a")


def test_what_the_kernel_demands_of_its_launch() -> None:
    with pytest.raises(EmulatorError, match="sm_89 has no clusters"):
        launch(kernel_text("", 0, "sm_89"), grid=2, cluster=2)
    for directive, sizes, message in [
        (".reqntid 64, 1, 1", {"block": 32}, "requires"),
        (".maxntid 64, 1, 1", {"block": 128}, "allows 64"),
        (".reqnctapercluster 2, 1, 1", {"grid": 2}, "cluster: .*requires"),
    ]:
        with pytest.raises(EmulatorError, match=message):
            launch(kernel_text("", 0, directives=directive), **sizes)


def test_devices_by_name() -> None:
    for name in ("sm_42", "hopper", "sm_90b"):
        with pytest.raises(EmulatorError, match="device"):
            launch(kernel_text("", 0, "sm_80"), args=[np.zeros(1)], device=name)

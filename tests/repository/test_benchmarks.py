"""bench_gdn_mtp.py as far as no GPU is needed: it starts, says what it needs, and counts bytes right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "bench_gdn_mtp.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARK), *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_it_explains_itself_and_needs_a_gpu() -> None:
    assert run("--help").returncode == 0
    without_gpu = run()
    assert without_gpu.returncode == 1
    assert "needs a CUDA device" in without_gpu.stderr


@pytest.mark.parametrize(
    ("update", "cache", "mode", "states"),
    [
        (True, False, "update", 2),
        (True, True, "cache+update", 10),
        (False, True, "cache", 9),
        (False, False, "frozen", 1),
    ],
)
def test_bytes_of_a_gdn_cell(
    monkeypatch: pytest.MonkeyPatch, update: bool, cache: bool, mode: str, states: int
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARK.parent))
    from _gdn_cases import Cell

    for dtype, slot_nbytes in ((torch.float32, 2 << 20), (torch.bfloat16, 1 << 20)):
        cell = Cell(H=16, HV=32, B=4, T=8, update=update, cache=cache, state_dtype=dtype)
        assert cell.mode == mode
        assert cell.slot_nbytes == slot_nbytes
        assert cell.necessary_nbytes == 4 * states * slot_nbytes

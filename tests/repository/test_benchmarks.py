"""The benchmarks as far as no GPU is needed: they start, say what they need, and count right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("name", ["bench_gdn_mtp.py", "bench_gdn_stages.py", "bench_mla_decode.py"])
def test_it_explains_itself_and_needs_a_gpu(name: str) -> None:
    assert run(name, "--help").returncode == 0
    without_gpu = run(name)
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
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from _gdn_cases import Cell

    for dtype, slot_nbytes in ((torch.float32, 2 << 20), (torch.bfloat16, 1 << 20)):
        cell = Cell(H=16, HV=32, B=4, T=8, update=update, cache=cache, state_dtype=dtype)
        assert cell.mode == mode
        assert cell.slot_nbytes == slot_nbytes
        assert cell.necessary_nbytes == 4 * states * slot_nbytes


@pytest.mark.parametrize(
    ("text", "rows", "keys", "element_bytes"),
    [
        ("B64-H128-s8192-bf16", 64 * 128, 64 * 8192, 2),
        ("B1-q4-H16-p16-s1000-fp8", 4 * 16, 1000, 1),
    ],
)
def test_bytes_and_operations_of_an_mla_cell(
    monkeypatch: pytest.MonkeyPatch, text: str, rows: int, keys: int, element_bytes: int
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from bench_mla_decode import parse_cell

    cell = parse_cell(text)
    assert parse_cell(str(cell)) == cell
    outputs = rows * (512 * 2 + 4)  # bf16, and the LSE
    assert cell.necessary_bytes == (keys + rows) * 576 * element_bytes + outputs
    assert cell.flops == 2 * rows * (keys // cell.batch) * (576 + 512)


def test_an_mla_cell_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from bench_mla_decode import parse_cell

    for text in ("B64-H128-s8192", "H128-s8192-bf16", "B64-H128-s8192-fp32"):
        with pytest.raises(SystemExit, match=text):
            parse_cell(text)

"""The emulator's speed with a two-CTA kernel, far from what it takes, so that a busy machine passes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from emulation import config_of, run_on_emulator
from kernel_testing.mla import Case, Inputs
from ptx_emulator import Options

RECORD = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "emulator_speed.json"
SLACK = 10


@pytest.mark.parametrize(("lengths", "limit_s"), [((256,), 0.2), ((4096,) * 4, 3.0)], ids=["B1", "B4"])
def test_a_pair_is_emulated_in_time(lengths: tuple[int, ...], limit_s: float) -> None:
    inputs = Inputs(Case(lengths, "bf16", num_heads=128))
    run = run_on_emulator(config_of(inputs, pair=True), inputs, options=Options(checks=False))
    assert run.function.result is not None
    assert run.function.result.seconds < SLACK * limit_s


def test_the_record_keeps_the_limits() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    for run in record["runs"]:
        if not run["checks"]:
            assert run["seconds"] < record["wanted_s"][run["problem"]]

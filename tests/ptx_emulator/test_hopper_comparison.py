"""How kernels are kept for a GPU, and what their results are held to."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import emulator_recording
import numpy as np
import pytest
from harness import run_kernel
from ptx_emulator.machine import Machine

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "emulator_on_hopper.py"


@pytest.fixture(scope="module")
def hopper() -> ModuleType:
    spec = importlib.util.spec_from_file_location("emulator_on_hopper", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("ptx", "text"),
    [
        ("add.f32 %f1, %f2, %f3;", None),
        ("ex2.approx.ftz.f32 %f1, %f2;", "2 ulp"),
        ("rcp.approx.ftz.f64 %fd1, %fd2;", "20-bit"),
        ("rcp.approx.f32 %f1, %f2;", "1 ulp"),
        ("ex2.approx.f32 %f1, %f2; rcp.approx.f32 %f3, %f4;", "several"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {", "2^-21"),
        ("wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e5m2 {", "2^-12"),
        ("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f1}; tanh.approx.f32 %f1, %f2;", "several"),
        ("red.global.add.f32 [%rd1], %f1;", "any order"),
    ],
)
def test_bound_of_a_kernel(hopper: ModuleType, ptx: str, text: str | None) -> None:
    bound = hopper.bound_of(ptx)
    assert (bound is None) == (text is None)
    assert text is None or text in bound.text


def share(
    hopper: ModuleType, expected: list[float], got: list[float], ptx: str, dtype: str = "float32"
) -> float:
    a, b = (np.array(values, dtype).view(np.uint8) for values in (expected, got))
    result: float = hopper.share_of_bound(a, b, dtype, hopper.bound_of(ptx))
    return result


def test_share_of_the_bound(hopper: ModuleType) -> None:
    one, two = 1 + 2.0**-23, 1 + 2.0**-22
    assert share(hopper, [1.0, 3.0], [one, 3.0], "rcp.approx.f32") == 0.5
    assert share(hopper, [1.0, 3.0], [two, 3.0], "rcp.approx.f32") == 1.0
    assert share(hopper, [1.0, 3.0], [two + 2.0**-23, 3.0], "rcp.approx.f32") == 1.5
    assert share(hopper, [2.0**-149], [0.0], "rcp.approx.f32") == 0.5
    assert share(hopper, [1e-3, 2.0], [1e-3 + 2.0**-21, 2.0], "wgmma.mma_async.f32.f16.f16") < 1
    assert share(hopper, [1e-3, 1e-3], [1e-3 + 2.0**-21, 1e-3], "wgmma.mma_async.f32.f16.f16") > 1


@pytest.mark.parametrize(
    ("expected", "got"), [(math.nan, 1.0), (1.0, math.nan), (math.inf, -math.inf), (math.inf, 3e38)]
)
def test_nan_and_infinity_must_be_in_the_same_places(hopper: ModuleType, expected: float, got: float) -> None:
    assert share(hopper, [expected], [got], "rcp.approx.f32") == math.inf
    assert share(hopper, [expected], [expected], "rcp.approx.f32") == 0


def test_integers_must_be_equal(hopper: ModuleType) -> None:
    words = np.zeros(4, np.uint8)
    assert hopper.share_of_bound(words, words + 1, "uint32", hopper.bound_of("rcp.approx.f32")) == math.inf


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which kernels are kept while a test runs."""
    monkeypatch.setenv(emulator_recording.VARIABLE, str(tmp_path))
    monkeypatch.setattr(Machine, "enqueue", Machine.enqueue)  # to be put back at the end
    monkeypatch.setattr(Machine, "synchronize", Machine.synchronize)
    emulator_recording.install()
    return tmp_path


STORE_ITS_OWN_ADDRESS = "setp.eq.u32 %p1, %r1, 0; @%p1 st.global.u64 [%rd1+8], %rd1;"


def headers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(str(np.load(path)["header"])) for path in folder.glob("*.npz")]


def test_addresses_are_kept_that_the_kernel_has_written(kept: Path) -> None:
    run_kernel(STORE_ITS_OWN_ADDRESS, np.zeros(3, np.uint64))
    (header,) = headers(kept)
    assert header["params_addresses"] == [[0, 0, 0]]
    assert header["addresses"] == [[]]
    assert header["addresses_after"] == [[[8, 0, 0]]]
    assert header["dtypes"] == ["uint64"]


def test_what_changes_from_run_to_run_is_not_kept(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_kernel("mov.u32 %r2, %clock; st.global.u32 [%rd1], 1;", np.zeros(3, np.uint64), expect_reports=True)
    name = next(iter(emulator_recording.NOT_RECORDED))
    monkeypatch.setenv("PYTEST_CURRENT_TEST", f"tests/test_checker.py::{name}[1] (call)")
    run_kernel(STORE_ITS_OWN_ADDRESS, np.zeros(3, np.uint64))
    assert not headers(kept)


def test_kernels_are_counted_by_test_function(hopper: ModuleType) -> None:
    names = ("tests/a/test_mma.py::test_sums[1]", "tests/a/test_mma.py::test_sums[2]", "test_bulk.py::test_x")
    outcomes = ("equal", "within bound", "equal")
    results = [{"test": name, "outcome": outcome} for name, outcome in zip(names, outcomes, strict=True)]
    assert hopper._counts_by_test(results) == {
        "test_bulk.py::test_x": {"equal": 1},
        "test_mma.py::test_sums": {"equal": 1, "within bound": 1},
    }


def test_the_kept_record_adds_up() -> None:
    path = BENCHMARK.parent / "results" / "emulator_on_hopper-h200.json"
    kept = json.loads(path.read_text(encoding="utf-8"))
    for outcome, number in kept["outcomes"].items():
        assert sum(counts.get(outcome, 0) for counts in kept["by_test"].values()) == number
    of_bounds = sum(group["cases"] for group in kept["within_bound"])
    assert of_bounds == kept["outcomes"]["within bound"]

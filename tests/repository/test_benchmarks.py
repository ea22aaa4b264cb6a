"""The benchmarks as far as no GPU is needed: they start, say what they need, and count right."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_dispatch import Arch
from kernel_testing import cubin_resources

MEMORY_GOAL = "T = 8: bytes of intermediate states over the cache's, at least 16"
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("name", sorted(path.name for path in BENCHMARKS.glob("bench_*.py")))
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


def test_k_major_states_are_timed_for_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from _gdn_cases import make_calls, make_pool
    from _gdn_variants import Variant
    from bench_gdn_mtp import make_cells, parse_arguments

    cells = make_cells(parse_arguments(["--heads", "1/1/2", "--batch", "3", "--state-layout", "kv"]))
    assert [str(cell) for cell in cells] == ["1/1/2 B3-T1 update fp32 kv", "1/1/2 B3-T1 update bf16 kv"]
    problem = cells[0].problem()
    assert (problem.state_layout, problem.index_dtype) == ("kv", None)

    calls = make_calls(cells[0], make_pool(cells[0], torch.device("cpu"), slots=7), count=2)
    assert [call.first_slot for call in calls] == [0, 3]
    variant = Variant()
    variant.k_major = True
    before = variant.before(calls[1], torch.tensor([0, 2]))
    assert torch.equal(before.mT, calls[1].pool[[3, 5]])


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


def test_variants_of_an_mla_cell_are_checked_and_then_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_mla_decode

    timed: list[dict[str, int]] = []

    def time_cuda_us(variants: dict[str, list[object]], repeats: int) -> dict[str, float]:
        timed.append({name: len(calls) for name, calls in variants.items()} | {"repeats": repeats})
        return dict.fromkeys(variants, 1.0)

    monkeypatch.setattr(bench_mla_decode, "time_cuda_us", time_cuda_us)
    monkeypatch.setattr(bench_mla_decode, "calls_for_cold_l2", lambda nbytes, device: 3)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    cell, cpu = bench_mla_decode.parse_cell("B2-H4-p16-s40-bf16"), torch.device("cpu")
    options = SimpleNamespace(tactics=False, repeats=5)
    found = bench_mla_decode.measure(cell, options, "torch", cpu, with_torch=True)
    ours, torch_provider = found["us"]
    assert ours.startswith("torch ")
    assert torch_provider == "torch"
    assert timed == [{ours: 3, "repeats": 5}, {"torch": 1, "repeats": 5}]
    monkeypatch.setattr(bench_mla_decode.Call, "check", lambda call, cell, what: pytest.fail("wrong"))
    with pytest.raises(pytest.fail.Exception, match="wrong"):
        bench_mla_decode.measure(cell, options, "torch", cpu, with_torch=True)
    assert len(timed) == 2


@pytest.mark.parametrize(
    ("copies", "attempts", "slowdown", "us"),
    [
        ([101.0, 102.0], 1, 1.02, 1.0),
        ([100.0, 103.0, 101.0, 100.0], 2, 1.01, 2.0),
        ([105.0, 99.0, 100.0, 104.0, 110.0, 100.0], 3, 1.04, 2.0),
    ],
)
def test_what_is_timed_while_memory_is_slow_is_timed_again(
    monkeypatch: pytest.MonkeyPatch, copies: list[float], attempts: int, slowdown: float, us: float
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from _pace import Pace

    at_the_start = [100.0, 99.0, 130.0, 100.0, 101.0]
    times, left = iter((1.0, 2.0, 3.0)), iter(at_the_start + copies)
    steady = Pace(lambda: next(left)).steady(lambda: {"ours": next(times)})
    assert steady == ({"ours": us}, pytest.approx(slowdown), attempts)
    assert not list(left)


@pytest.mark.parametrize("count", [1, 3, 20])
def test_every_tactic_is_compiled_ahead_by_one_of_the_tasks(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from _gdn_variants import _shares

    tactics = list(range(17))
    shares = _shares(True, count)
    assert None not in shares
    assert sorted(x for share in shares for x in tactics[share or slice(0)]) == tactics
    assert _shares(False, count) == [None]


def test_arguments_of_the_stages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from bench_gdn_stages import parse_arguments

    assert vars(parse_arguments([])) == {"batch": [16, 32, 64], "out": None}
    given = parse_arguments(["--batch", "1", "8", "--out", "folder"])
    assert vars(given) == {"batch": [1, 8], "out": Path("folder")}
    with pytest.raises(SystemExit):
        parse_arguments(["--batches", "1"])
    assert "--batches" in capsys.readouterr().err


def test_states_in_order_and_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from _gdn_cases import Cell, make_calls, make_pool
    from bench_gdn_stages import bound

    taken: list[tuple[object, ...]] = []
    cell = Cell(H=1, HV=1, B=3, T=2, update=True, cache=True, state_dtype=torch.bfloat16)
    pool = make_pool(cell, torch.device("cpu"), slots=7)
    _, call = make_calls(cell, pool, count=2)
    for in_order, expected in ((False, pool[call.indices.long()]), (True, pool[3:6])):
        bound(lambda *arguments: taken.append(arguments), call, in_order)()
        state, indices, write_indices, intermediate, scatter, output = taken.pop()[8:]
        assert isinstance(state, torch.Tensor)
        assert isinstance(indices, torch.Tensor)
        assert indices.dtype == torch.int32
        assert torch.equal(state[indices.long()], expected)
        assert state.untyped_storage().data_ptr() == pool.untyped_storage().data_ptr()
        assert write_indices is None
        assert scatter is None
        assert intermediate is call.intermediate
        assert output is call.output


def test_every_kernel_with_stages_left_out_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from _gdn_cases import Cell
    from _gdn_spec_report import Cell as Step
    from _gdn_stages import STAGES, STEP_STAGES, StagesConfig
    from bench_gdn_stages import VARIANTS
    from gdn_mtp.cute import kernels, kernels_speculative

    hopper = Arch.from_name("sm_90a")
    calls = [
        Cell(H=16, HV=32, B=16, T=T, update=True, cache=cache, state_dtype=dtype).problem()
        for T, cache, dtype in ((1, False, torch.float32), (4, True, torch.bfloat16))
    ]
    step = Step(16, 32, 16, 4, torch.bfloat16, capacity=16, fold="auto").problem()
    names = {name for name, _ in VARIANTS.values()} | {"everything"}
    left_out = [(kernels.KERNELS, call, name) for call in calls for name in names]
    left_out += [(kernels_speculative.KERNELS, step, name) for name in STEP_STAGES]
    for kernel, problem, name in left_out:
        config = kernel.config(problem, hopper, kernel.tactics(problem, hopper)[0])
        resources = cubin_resources(
            STAGES.compiled(StagesConfig(config, name), hopper.name).cubin.read_bytes()
        )
        assert resources.stack_bytes == 0


def test_kernels_with_stages_left_out_override_methods_of_the_whole_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A method that the whole kernel calls by another name would leave nothing out."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _gdn_stages
    from gdn_mtp.cute.kernel import GatedDeltaRule
    from gdn_mtp.cute.speculative import Verify

    kernels = [
        x
        for x in vars(_gdn_stages).values()
        if isinstance(x, type) and issubclass(x, (GatedDeltaRule, Verify))
    ]
    of_stages = [x for x in kernels if x.__module__ == "_gdn_stages"]
    assert len(of_stages) == 5
    for kernel in of_stages:
        whole = GatedDeltaRule if issubclass(kernel, GatedDeltaRule) else Verify
        own = {name for name, member in vars(kernel).items() if callable(member)}
        assert own - {"__init__", "store_states", "move"} <= set(dir(whole)), kernel.__name__


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_gdn_stages

    cell = bench_gdn_stages.Cell(H=1, HV=1, B=1, T=1, update=True, cache=False, state_dtype=torch.float32)
    plan = SimpleNamespace(tactic="w4t1s")
    stand_ins = {
        "as_arch": lambda device: None,
        "Ours": lambda cell, device: SimpleNamespace(plan=plan),
        "make_calls": lambda cell, pool: [None],
        "checked": lambda whole, cell, call: "output: is not finite",
        "time_cuda_us": lambda *_, **__: pytest.fail("timed"),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(bench_gdn_stages, name, stand_in)
    pool = torch.full((2, 1, 128, 128), float("nan"))
    row = bench_gdn_stages.time_calls(cell, pool, copy_gb_s=3000.0)
    assert row.wrong == "output: is not finite"
    assert row.us == row.fraction == {}
    assert row.line() == f"{'1/1/1 B1-T1 update fp32':<34} w4t1s   WRONG: output: is not finite"
    assert pool.isfinite().all()  # for the next row


def test_results_of_the_stages_are_found_by_the_tables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gdn_tables
    from _gdn_cases import Cell
    from _host_time import HostTime
    from bench_gdn_stages import STATE_DTYPES, VARIANTS, Row, write_results

    names = ("nothing", *VARIANTS, "copy")
    rows = []
    for number, dtype in enumerate(STATE_DTYPES):
        cell = Cell(H=16, HV=32, B=16, T=1, update=True, cache=False, state_dtype=dtype)
        rows.append(Row(str(cell), "w4t1s"))
        rows[-1].us = {name: 20.0 + i for i, name in enumerate(names)}
        rows[-1].fraction = dict.fromkeys(names, 0.9 - number / 10)
    assert "w4t1s   without nothing 20.00 (0.900), arithmetic 21.00 (0.900), tokens" in rows[0].line()
    host = {"Plan.run, B1-T1 update": HostTime(7.5, 7.0, 9.25)}
    path = write_results(tmp_path / "gdn_mtp-stages-h100", rows, host, copy_gb_s=3000.0)
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["copy_gb_s"] == 3000.0
    assert content["host_us"] == {"Plan.run, B1-T1 update": 7.5}
    assert content["host_us_range"] == {"Plan.run, B1-T1 update": [7.0, 9.25]}
    recorded = gdn_tables.stages("16/16/32 B16-T1 update fp32")
    assert list(recorded) == list(names)
    monkeypatch.setattr(gdn_tables, "RESULTS", tmp_path)
    assert gdn_tables.stages("16/16/32 B16-T1 update fp32") == dict.fromkeys(names, 0.9)
    assert gdn_tables.stages("16/16/32 B16-T1 update bf16") == dict.fromkeys(names, 0.8)


def test_host_time_is_taken_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _host_time

    order: list[str] = []
    clock_us = [0.0]
    costs_us = {"a": iter([90.0, 4.0, 2.0, 9.0]), "b": iter([90.0, 1.0, 1.0, 1.0])}

    def run(name: str) -> None:
        order.append(name)
        clock_us[0] += next(costs_us[name])

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(_host_time, "HOST_CALLS", 1)
    monkeypatch.setattr(_host_time, "HOST_BATCHES", 3)
    monkeypatch.setattr(_host_time, "time", SimpleNamespace(perf_counter=lambda: clock_us[0] / 1e6))
    found = _host_time.time_host({"a": lambda: run("a"), "b": lambda: run("b")})
    assert order == ["a", "b"] * 4
    assert {name: str(us) for name, us in found.items()} == {
        "a": "4.00 (2.00 to 9.00)",
        "b": "1.00 (1.00 to 1.00)",
    }


FAULTS = {
    "": "",
    "outputs": "output: not finite everywhere",
    "states": "state: ",
    "the token accepted": "state: ",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("missing", FAULTS)
def test_a_peers_wrong_step_is_named(
    monkeypatch: pytest.MonkeyPatch, missing: str, dtype: torch.dtype
) -> None:
    """FlashInfer's place is taken by ours of the same names, which leaves something out."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_gdn_spec
    import gdn_mtp

    def verify(**arguments: Any) -> None:
        left_out = {"output": None} if missing == "outputs" else {}
        name = "gated_delta_rule_decode_pretranspose" if "state" in arguments else "gated_delta_rule_mtp"
        getattr(gdn_mtp, name)(**arguments | left_out)

    def gather_accepted(
        buffer: torch.Tensor, accepted: torch.Tensor, pool: torch.Tensor, slots: torch.Tensor
    ) -> None:
        if missing == "states":
            return
        token = accepted.long() - (0 if missing == "the token accepted" else 1)
        pool[slots.long()] = buffer[torch.arange(len(buffer)), token % buffer.shape[1]]

    module = SimpleNamespace(gated_delta_rule_mtp=verify, gated_delta_rule_decode_pretranspose=verify)
    monkeypatch.setattr(bench_gdn_spec, "import_peer", lambda name: module)
    monkeypatch.setattr(bench_gdn_spec, "calls_for_cold_l2", lambda nbytes, device: 2)
    monkeypatch.setitem(sys.modules, "_gdn_gather", SimpleNamespace(gather_accepted=gather_accepted))
    cell = bench_gdn_spec.Cell(H=1, HV=2, B=3, T=4, state_dtype=dtype, capacity=16, fold="auto")
    pool = torch.randn(8, 2, 128, 128, generator=torch.Generator().manual_seed(0)).mul_(0.5).to(dtype)
    steps = bench_gdn_spec.make_steps(cell, len(pool), pool.device)
    found = bench_gdn_spec.fault_of(bench_gdn_spec.FlashInfer(cell, pool), steps)
    assert found.startswith(FAULTS[missing])
    assert bool(found) == bool(missing)


@pytest.mark.parametrize("accepts", ["what it should", "too little"])
def test_our_steps_are_compared(monkeypatch: pytest.MonkeyPatch, accepts: str) -> None:
    """In the place of the kernel, which needs a GPU, is the function."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_gdn_spec
    import gdn_mtp

    monkeypatch.setattr(bench_gdn_spec, "calls_for_cold_l2", lambda nbytes, device: 2)
    materialize = gdn_mtp.materialize
    monkeypatch.setattr(gdn_mtp, "materialize", lambda *tensors, backend: materialize(*tensors))
    cell = bench_gdn_spec.Cell(H=1, HV=2, B=3, T=4, state_dtype=torch.float32, capacity=16, fold="auto")
    pool = torch.randn(8, 2, 128, 128, generator=torch.Generator().manual_seed(0)).mul_(0.5)
    steps = bench_gdn_spec.make_steps(cell, len(pool), pool.device)
    cache = gdn_mtp.SpeculativeCache(8, 1, 2, 128, 128, max_tokens=4, capacity=16, device="cpu")
    verified: list[int] = []

    def step(steps: bench_gdn_spec.Steps, i: int) -> Callable[[], object]:
        accepted = steps.accepted[i] if verified else torch.zeros_like(steps.accepted[i])
        if accepts == "too little":
            accepted = accepted.clamp_max(3)
        verified.append(i)
        tokens = steps.tokens[i % len(steps.tokens)] | steps.weights
        named = {"state_pool": pool, "state_indices": steps.slots(i), "cache": cache, "output": steps.output}
        return functools.partial(gdn_mtp.verify, **tokens, **named, num_accepted=accepted)

    ours = SimpleNamespace(cell=cell, pool=pool, cache=cache, step=step)
    if accepts == "what it should":
        bench_gdn_spec.check_ours(ours, steps)
        return
    with pytest.raises(AssertionError, match="output: "):
        bench_gdn_spec.check_ours(ours, steps)


def test_goals_of_speculative_steps_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gdn_mtp
    from _gdn_spec_report import Cell, Row, verdicts

    def row(B: int, T: int = 8, HV: int = 32, ours: float = 100.0, **changes: Any) -> Row:
        cell = Cell(H=16, HV=HV, B=B, T=T, state_dtype=torch.bfloat16, capacity=3 * T, fold="auto")
        cache = gdn_mtp.SpeculativeCache(
            4, 16, HV, 128, 128, max_tokens=T, capacity=cell.capacity, device="cpu"
        )
        us = {"ours": ours, "flashinfer": 600.0}
        return Row(cell, 3000.0, **{"us": us, "cache_nbytes": cache.nbytes // 4} | changes)

    rows = [
        row(16),
        row(64, ours=150.0),
        row(128, failed={"flashinfer": "state: wrong"}),
        row(256, HV=16, us={}, wrong="w4t1s: output: wrong"),
        row(1, T=4, us={"ours": 4.0}),
    ]
    found = verdicts(rows)
    assert found.pop("T = 8, B >= 16: x FlashInfer's speed, at least 5") == (
        "MISSED: met in 1 of 3 cells, lowest 4.000 at 16/16/32 B64-T8-R24 auto bf16, 1 with wrong results, "
        "1 more not measured"
    )
    assert found.pop("T = 4, B <= 4: x FlashInfer's speed, at least 1.3") == "not measured"
    assert found.pop(MEMORY_GOAL).startswith("MISSED: met in 3 of 4 cells, lowest 16.")
    copied = found.pop("B >= 32: of the copy bandwidth, at least 0.85")
    assert copied.startswith("MISSED: met in 0 of 3 cells")
    assert not found
    assert rows[2].record()["ratio"] == {"flashinfer": None}  # what gdn_tables.py shows
    assert rows[2].record()["failed"] == {"flashinfer": "state: wrong"}
    assert "us, WRONG" in rows[2].line()
    assert verdicts([row(16), row(64)])[MEMORY_GOAL].startswith("met in 2 of 2 cells")
    assert verdicts([row(16, HV=16)])[MEMORY_GOAL].startswith("MISSED: met in 0 of 1 cells, lowest 14.")


def test_a_copy_that_was_not_made_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_copy_floor

    monkeypatch.setattr(bench_copy_floor, "calls_for_cold_l2", lambda nbytes, device: 3)
    copies = bench_copy_floor.Copies(64, torch.device("cpu"))
    assert len(copies.calls) == bench_copy_floor.MIN_CALLS
    for call in copies.calls[1:]:
        call()
    with pytest.raises(RuntimeError, match="the copy is wrong"):
        copies.check()
    copies.calls[0]()
    copies.check()


def test_results_lie_where_the_tables_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from _results import results_folder

    folder = results_folder("gdn_mtp", "NVIDIA H100 80GB HBM3")
    assert folder == BENCHMARKS / "results" / "gdn_mtp-h100"
    assert (folder / "results.json").exists()


def test_launches_of_mla_sm120_by_other_means(monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    driver = pytest.importorskip("cuda.bindings.driver")
    from kernel_dispatch import as_arch
    from mla_sm120 import launch
    from mla_sm120.config import Division

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _mla_launches

    launched: list[int] = []  # addresses of parameters

    def launch_kernel(config: object, function: object, pointers: int, extra: int) -> tuple[object]:
        launched.append(ctypes.c_uint64.from_address(pointers).value)
        return (driver.CUresult.CUDA_SUCCESS,)

    def no_driver(name: str, mode: int = 0) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(driver, "cuLaunchKernelEx", launch_kernel)
    context = (driver.CUresult.CUDA_SUCCESS, driver.CUcontext(1))
    monkeypatch.setattr(driver, "cuCtxGetCurrent", lambda: context)
    monkeypatch.setattr(launch, "encode_map", lambda key, problem: bytes(launch.TENSOR_MAP_BYTES))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0x100, raising=False)
    monkeypatch.setattr(ctypes, "CDLL", no_driver)
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    problem = _mla_launches.CELL.problem
    division = Division.of(problem, as_arch("sm_90a"), "m16")
    launcher = launch.Launcher(problem, division, driver.CUfunction(1), None, -1, pdl=True)

    def run(*positional: torch.Tensor, softmax_scale: float, **outputs: torch.Tensor) -> None:
        launcher(*positional, None, softmax_scale, 1.0, outputs["out"], outputs["lse"], outputs["workspace"])

    plan = SimpleNamespace(run=run, workspace_nbytes=0, _launch=launcher)
    monkeypatch.setattr(_mla_launches, "plan", lambda problem, device, backend, tactic=None: plan)
    launches = _mla_launches.Launches("sm90", torch.device("cpu"))
    plans = ["Plan.run", "Plan.run, layers in turn"]
    cut = "Plan.run, cut in two"
    assert list(launches.runs) == [*plans, "launcher", cut, "cuda-bindings"]
    assert len(launcher._threads.own.calls) == _mla_launches.LAYERS + 1
    assert set(launches.missing) == {"ctypes", "TVM-FFI", "cuda.core"}
    assert launches.missing["ctypes"] == "OSError: libcuda.so.1: cannot open shared object file"
    launched.clear()
    for launch_once in launches.runs.values():
        launch_once()
    first, *_, of_the_cut = launcher._threads.own.calls.values()
    of_one = ctypes.addressof(first.bytes)
    assert launched == [of_one, of_one, of_one, ctypes.addressof(of_the_cut.bytes), of_one]


def test_launches_of_other_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _mla_launches

    launches = _mla_launches.Launches("torch", torch.device("cpu"))
    assert launches.missing == {}
    assert list(launches.runs) == ["Plan.run", "Plan.run, layers in turn", "launcher"]
    for run in launches.runs.values():
        launches._call.out.fill_(float("nan"))
        run()
        launches._call.check(_mla_launches.CELL, "torch")

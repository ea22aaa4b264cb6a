"""Autotuning: what is timed, what is chosen, what is saved, and what tuning leaves as it was."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_dispatch import (
    Arch,
    ArgumentError,
    CompilationForbiddenError,
    CompileCache,
    CompileKey,
    NoKernelError,
    Provider,
    as_arch,
    autotune,
    bucket_batch,
    clear_tuning,
    explain,
    forbid_compilation,
    generation,
    load_tuning,
    providers,
    registered,
    resolve,
    tuned_choice,
    tuning,
)
from kernel_dispatch.autotune import measure_us
from tuning_fakes import (
    CPU,
    SLOW_S,
    Scaling,
    ScalingKernel,
    scale,
    scaling_providers,
    select,
    tune_in_process,
)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def untuned() -> Iterator[None]:
    clear_tuning()
    yield
    clear_tuning()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tune.json"


def slow_then_fast() -> tuple[ScalingKernel, ScalingKernel]:
    """The heuristic's choice is p0 with tactic a; the fastest candidate is p1 with tactic d."""
    return ScalingKernel({"a": SLOW_S, "b": SLOW_S}), ScalingKernel({"c": SLOW_S, "d": 0.0})


def saved_batches(path: Path) -> list[int]:
    entries = json.loads(path.read_text())["entries"].values()
    return sorted(entry["key"]["problem"]["fields"]["batch"] for entry in entries)


# Buckets.


@given(st.integers(min_value=1, max_value=10**9))
def test_a_batch_goes_to_the_next_lower_power_of_two_up_to_2048(batch: int) -> None:
    bucket = bucket_batch(batch)
    assert bucket & (bucket - 1) == 0
    assert bucket <= min(batch, 2048)
    assert batch < 2 * bucket or bucket == 2048


def test_the_edges_of_buckets() -> None:
    assert [bucket_batch(n) for n in (0, 1, 2, 3, 4, 2047, 2048, 4096)] == [0, 1, 2, 2, 4, 1024, 2048, 2048]
    with pytest.raises(ArgumentError, match="batch: -1, expected at least 0"):
        bucket_batch(-1)


# Choosing.


def test_outside_the_context_the_heuristic_decides_and_nothing_is_timed() -> None:
    first, second = slow_then_fast()
    with scaling_providers(first, second):
        selection = scale(torch.ones(4))
    assert (selection.provider.name, selection.tactic) == ("p0", "a")
    assert first.runs == ["a"]
    assert second.prepared == []


def test_the_fastest_candidate_wins_and_stays_in_effect() -> None:
    first, second = slow_then_fast()
    with scaling_providers(first, second):
        with autotune(progress=False):
            selection = scale(torch.ones(4))
        assert (selection.provider.name, selection.tactic) == ("p1", "d")
        assert set(first.runs) == {"a", "b"}
        assert set(second.runs) == {"c", "d"}
        assert tuned_choice(Scaling(4), CPU) == ("p1", "d")
        assert resolve(Scaling(4), CPU).tactic == "d"
        assert explain(Scaling(4), CPU).chosen == "p1"
        clear_tuning()
        assert tuned_choice(Scaling(4), CPU) is None
        assert resolve(Scaling(4), CPU).tactic == "a"


def test_a_tuned_tactic_that_is_gone_is_named_and_gives_way_to_the_heuristic() -> None:
    first, second = slow_then_fast()
    with scaling_providers(first, second):
        with autotune(progress=False):
            scale(torch.ones(4))
        second.tactics = lambda problem, arch: ("c",)
        selection = resolve(Scaling(4), CPU)
        assert (selection.provider.name, selection.tactic) == ("p1", "c")
        assert "tactic 'd', fastest when tuned, is not offered any more" in selection.reason


def test_a_bucket_is_timed_once_and_serves_all_its_batches() -> None:
    kernels = slow_then_fast()
    with scaling_providers(*kernels), autotune(progress=False):
        scale(torch.ones(4))
        runs = len(kernels[0].runs)
        for batch in (4, 5, 7):
            assert scale(torch.ones(batch)).tactic == "d"
        assert len(kernels[0].runs) == runs
        scale(torch.ones(8))
        assert len(kernels[0].runs) > runs
        assert tuned_choice(Scaling(4, torch.float64), CPU) is None


def test_a_single_candidate_is_not_timed_nor_saved(path: Path) -> None:
    kernel = ScalingKernel({"only": 0.0})
    with scaling_providers(kernel), autotune(path, progress=False):
        assert scale(torch.ones(4)).tactic == "only"
    assert kernel.runs == ["only"]
    assert not path.exists()


def test_a_tie_goes_to_the_heuristic(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("kernel_dispatch.autotune")  # the package's attribute is the function
    monkeypatch.setattr(module, "measure_us", lambda run, device, l2_bytes: 1.0)
    with scaling_providers(*slow_then_fast()), autotune(progress=False):
        assert scale(torch.ones(4)).tactic == "a"


def test_declining_providers_are_no_candidates() -> None:
    kernel = ScalingKernel({"a": SLOW_S, "b": 0.0})
    declined = Provider("declined", ("sm_90",), lambda problem, arch: None, lambda: pytest.fail("loaded"), 99)
    with scaling_providers(kernel), registered(Scaling.entry_point_group, declined), autotune(progress=False):
        assert scale(torch.ones(4)).tactic == "b"


# In-place state.


def test_tuning_leaves_in_place_state_as_it_was() -> None:
    values = torch.arange(1.0, 5.0)
    with scaling_providers(*slow_then_fast()), autotune(progress=False):
        scale(values)
    assert torch.equal(values, 2 * torch.arange(1.0, 5.0))  # the one call itself, and no trace of the timing


def test_every_candidate_starts_from_the_same_state_even_after_one_failed() -> None:
    seen: list[float] = []
    values = torch.ones(4)
    first = ScalingKernel({"a": ValueError("broken"), "b": 0.0})
    first.on_prepare = lambda problem: seen.append(values[0].item())
    with scaling_providers(first), autotune(progress=False), pytest.warns(RuntimeWarning, match="broken"):
        scale(values)
    assert seen == [1.0] * 3
    assert torch.equal(values, torch.full((4,), 2.0))


# Failing candidates.


@pytest.mark.parametrize("when", ["prepare", "run", "load"])
def test_a_failing_candidate_is_reported_and_left_out(when: str) -> None:
    bad, good = ScalingKernel({"bad": 0.0}), ScalingKernel({"slow": SLOW_S, "fast": 0.0})

    def fail(*_: object) -> ScalingKernel:
        raise ValueError("no such instruction")

    if when == "run":
        bad.cost_s["bad"] = ValueError("no such instruction")
    elif when == "prepare":
        bad.on_prepare = fail
    provider = Provider(
        "bad", ("any",), lambda problem, arch: None, fail if when == "load" else lambda: bad, 99
    )
    with scaling_providers(good), registered(Scaling.entry_point_group, provider), autotune(progress=False):
        with pytest.warns(RuntimeWarning, match=r"(leaves|left) out .*bad.*no such instruction"):
            assert scale(torch.ones(4)).tactic == "fast"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scale(torch.ones(4))


@pytest.mark.filterwarnings("ignore:tuning:RuntimeWarning")
def test_if_all_candidates_fail_each_is_listed(path: Path) -> None:
    kernel = ScalingKernel({"a": ValueError("first reason"), "b": OSError("second reason")})
    values = torch.ones(4)
    with scaling_providers(kernel), autotune(path, progress=False), pytest.raises(NoKernelError) as caught:
        scale(values)
    assert "p0 a: ValueError: first reason" in str(caught.value)
    assert "p0 b: OSError: second reason" in str(caught.value)
    assert torch.equal(values, torch.ones(4))
    assert not path.exists()


def refusing() -> ArgumentError:
    return ArgumentError("workspace", "10 bytes, expected at least 20")


@pytest.mark.parametrize("refused", ["b", "c"], ids=["tactic", "provider"])
def test_a_mistake_of_the_caller_leaves_no_choice_behind(path: Path, refused: str) -> None:
    first, second = slow_then_fast()
    kernel = first if refused in first.cost_s else second
    good = kernel.cost_s[refused]
    kernel.cost_s[refused] = refusing()
    with scaling_providers(first, second), autotune(path, progress=False):
        with pytest.warns(RuntimeWarning, match=rf"{refused}: ArgumentError: workspace: .*no choice is kept"):
            assert scale(torch.ones(4)).tactic == "a"  # the heuristic's
        assert tuned_choice(Scaling(4), CPU) is None
        assert not path.exists()
        kernel.cost_s[refused] = good
        assert scale(torch.ones(4)).tactic == "d"
        assert saved_batches(path) == [4]


@pytest.mark.filterwarnings("ignore:tuning:RuntimeWarning")
def test_a_mistake_that_no_candidate_fits_is_the_callers_error(path: Path) -> None:
    kernel = ScalingKernel({"a": refusing(), "b": refusing()})
    with scaling_providers(kernel), autotune(path, progress=False):
        with pytest.raises(ArgumentError, match=r"^workspace: 10 bytes") as caught:
            scale(torch.ones(4))
        assert caught.value is kernel.cost_s["a"]
        kernel.cost_s["b"] = ValueError("no such instruction")
        with pytest.raises(NoKernelError, match="every candidate failed"):
            scale(torch.ones(4))
    assert not path.exists()


def test_warnings_point_at_the_caller(path: Path) -> None:
    def fail() -> ScalingKernel:
        raise ValueError("no such file")

    broken = Provider("broken", ("any",), lambda problem, arch: None, fail, 1)
    kernel = ScalingKernel({"a": 0.0, "b": refusing(), "c": OSError("bad")})
    path.write_text("{")
    with (
        scaling_providers(kernel),
        registered(Scaling.entry_point_group, broken),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        with autotune(path, progress=False):
            scale(torch.ones(4))
        path.write_text("{")
        load_tuning(path)
    texts = ("corrupt", "failed to load", "b: ArgumentError", "c: OSError", "corrupt")
    assert len(caught) == len(texts)
    for warning, text in zip(caught, texts, strict=True):
        assert text in str(warning.message)
        assert warning.filename == __file__


def test_an_interrupt_restores_the_state_and_is_not_swallowed() -> None:
    def interrupt(problem: Scaling) -> None:
        values.zero_()
        raise KeyboardInterrupt

    values = torch.ones(4)
    kernel = ScalingKernel({"a": 0.0, "b": 0.0}, on_prepare=interrupt)
    with scaling_providers(kernel), autotune(progress=False), pytest.raises(KeyboardInterrupt):
        scale(values)
    assert torch.equal(values, torch.ones(4))


def test_a_forbidden_compilation_is_an_error_and_not_a_failing_candidate(tmp_path: Path) -> None:
    key = CompileKey("scaling", {}, "cpu", (), {}, "")
    kernel = ScalingKernel({"a": 0.0, "b": 0.0})
    kernel.on_prepare = lambda problem: CompileCache(tmp_path).get_or_build(key, lambda directory: None)
    with (
        scaling_providers(kernel),
        autotune(progress=False),
        forbid_compilation(),
        pytest.raises(CompilationForbiddenError, match="scaling for cpu"),
    ):
        scale(torch.ones(4))


# The file.


def test_choices_are_saved_as_they_are_found_and_used_by_the_next_process(path: Path) -> None:
    kernels = slow_then_fast()
    with scaling_providers(*kernels):
        with autotune(str(path), progress=False):
            scale(torch.ones(4))
            assert saved_batches(path) == [4]
            scale(torch.ones(9))
        assert saved_batches(path) == [4, 8]
        clear_tuning()
        runs = len(kernels[0].runs)
        with autotune(path, progress=False):
            assert scale(torch.ones(4)).tactic == "d"
        assert len(kernels[0].runs) == runs
        clear_tuning()
        assert load_tuning(path) == 2
        assert scale(torch.ones(4)).tactic == "d"
        assert len(kernels[0].runs) == runs


def test_the_entry_spells_out_its_environment(path: Path) -> None:
    with scaling_providers(*slow_then_fast()), autotune(path, progress=False):
        scale(torch.ones(5))
    (entry,) = json.loads(path.read_text())["entries"].values()
    assert entry["key"] == {
        "operation": "tests.scaling.v1",
        "arch": {"name": "cpu", "sm_count": 1},
        "distributions": {"registered()": ""},
        "torch": str(torch.__version__),
        "cuda_driver": None,
        "problem": {
            "$dataclass": "tuning_fakes.Scaling",
            "fields": {"batch": 4, "dtype": {"$dtype": "float32"}},
        },
    }
    assert (entry["provider"], entry["tactic"]) == ("p1", "d")
    assert 0 < entry["median_us"] < SLOW_S * 1e6


def test_choices_of_another_environment_are_kept_but_not_used(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scaling_providers(*slow_then_fast()):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "__version__", "0.1")
            with autotune(path, progress=False):
                scale(torch.ones(4))
            assert tuned_choice(Scaling(4), CPU) == ("p1", "d")
        assert tuned_choice(Scaling(4), CPU) is None
        with autotune(path, progress=False):
            scale(torch.ones(4))
        assert saved_batches(path) == [4, 4]


def test_arch_driver_and_provider_versions_are_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = as_arch("sm_90a")
    provider = Provider("gpu", ("sm_90",), lambda problem, arch: None, lambda: pytest.fail("loaded"), 10)
    with registered(Scaling.entry_point_group, provider):
        keys = [
            tuning.bucket_key(Scaling(4), gpu),
            tuning.bucket_key(Scaling(4), replace(gpu, sm_count=78)),
            tuning.bucket_key(Scaling(4), CPU),
        ]
        monkeypatch.setattr(tuning, "cuda_driver_version", lambda: 13010)
        keys.append(tuning.bucket_key(Scaling(4), gpu))
        entries = [replace(entry, version="9.9") for entry in providers(Scaling.entry_point_group)]
        monkeypatch.setattr(tuning, "providers", lambda group: tuple(entries))
        keys.append(tuning.bucket_key(Scaling(4), gpu))
    assert len({tuning.key_digest(key) for key in keys}) == len(keys)
    assert (
        keys[2]["distributions"] == {}
    )  # the provider does not support the CPU, so its version does not matter


def test_a_corrupt_file_is_moved_aside_and_tuning_goes_on(path: Path) -> None:
    path.write_text("{")
    with (
        scaling_providers(*slow_then_fast()),
        pytest.warns(RuntimeWarning, match="corrupt; moved to"),
        autotune(path, progress=False),
    ):
        scale(torch.ones(4))
    assert saved_batches(path) == [4]
    assert len(list(path.parent.glob("*.corrupt-*"))) == 1


@pytest.mark.filterwarnings("ignore:tuning file:RuntimeWarning")
def test_a_foreign_file_stays_untouched_and_the_choice_holds_in_the_process(path: Path) -> None:
    path.write_text('{"format": 7}')
    with scaling_providers(*slow_then_fast()):
        with autotune(path, progress=False):
            assert scale(torch.ones(4)).tactic == "d"
        assert path.read_text() == '{"format": 7}'
        assert resolve(Scaling(4), CPU).tactic == "d"


def test_the_directory_of_the_cache_is_made(tmp_path: Path) -> None:
    with scaling_providers(*slow_then_fast()), autotune(tmp_path / "new" / "tune.json", progress=False):
        scale(torch.ones(4))
    assert saved_batches(tmp_path / "new" / "tune.json") == [4]


def test_an_unwritable_cache_is_an_error_before_anything_is_timed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"), autotune(tmp_path / "file" / "tune.json", progress=False):
        pytest.fail("entered")


def test_loading_a_missing_file_is_an_error(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tune\.json does not exist"):
        load_tuning(path)


def test_two_processes_tuning_into_one_file_lose_nothing(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    batches = ([1, 2, 4, 8, 16], [16, 32, 64, 128, 256])
    processes = [context.Process(target=tune_in_process, args=(str(path), part, barrier)) for part in batches]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert saved_batches(path) == [1, 2, 4, 8, 16, 32, 64, 128, 256]


# Nesting, generations, threads.


def test_nested_blocks_the_innermost_tunes_and_each_file_holds_what_its_block_met(tmp_path: Path) -> None:
    outer, inner = tmp_path / "outer.json", tmp_path / "inner.json"
    kernels = slow_then_fast()
    with scaling_providers(*kernels), autotune(outer, progress=False):
        scale(torch.ones(1))
        with autotune(inner, progress=False):
            runs = len(kernels[0].runs)
            scale(torch.ones(1))
            assert len(kernels[0].runs) == runs  # known already, so saved without timing it again
            scale(torch.ones(2))
        scale(torch.ones(4))
        assert saved_batches(inner) == [1, 2]
        assert saved_batches(outer) == [1, 4]
        scale(torch.ones(2))
    assert saved_batches(outer) == [1, 2, 4]


def test_leaving_by_an_exception_ends_the_block() -> None:
    kernels = slow_then_fast()
    with scaling_providers(*kernels):
        with pytest.raises(ZeroDivisionError), autotune(progress=False):
            raise ZeroDivisionError
        scale(torch.ones(4))
    assert kernels[1].runs == []


def test_the_generation_grows_exactly_when_plans_may_be_out_of_date(path: Path) -> None:
    seen = [generation()]

    def grew() -> bool:
        seen.append(generation())
        return seen[-1] > seen[-2]

    with scaling_providers(*slow_then_fast()):
        scale(torch.ones(4))
        assert not grew()
        with autotune(path, progress=False):
            assert grew()  # a plan made before must not keep its problem from being tuned
            scale(torch.ones(4))
            assert grew()
            scale(torch.ones(4))
            assert not grew()
        assert not grew()
        load_tuning(path)
        assert not grew()  # nothing new in it
        clear_tuning()
        assert grew()
        clear_tuning()
        assert not grew()
        load_tuning(path)
        assert grew()


def test_threads_time_a_bucket_once_and_one_at_a_time() -> None:
    busy = threading.Lock()
    overlaps: list[bool] = []

    class Exclusive(ScalingKernel):
        def prepare(
            self, problem: Scaling, arch: Arch, device: torch.device, tactic: str
        ) -> Callable[[torch.Tensor], None]:
            launch = super().prepare(problem, arch, device, tactic)

            def exclusive(values: torch.Tensor) -> None:
                free = busy.acquire(blocking=False)
                overlaps.append(not free)
                launch(values)
                time.sleep(0.001)
                if free:
                    busy.release()

            return exclusive

    kernel = Exclusive({"a": 0.0, "b": 0.0})
    tensors = [torch.ones(4) for _ in range(4)]
    with scaling_providers(kernel), autotune(progress=False):
        threads = [threading.Thread(target=select, args=(values,)) for values in tensors]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert sorted(kernel.prepared) == ["a", "b"]
    assert not any(overlaps)
    assert all(torch.equal(values, torch.ones(4)) for values in tensors)


# CUDA graphs and progress.


def test_tuning_during_a_capture_is_an_error_and_a_known_bucket_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels = slow_then_fast()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with scaling_providers(*kernels):
        with (
            autotune(progress=False),
            pytest.raises(RuntimeError, match=r"scaling B4 .* while a CUDA graph is being"),
        ):
            scale(torch.ones(4), device="cuda")
        assert kernels[0].runs == kernels[1].runs == []
        with autotune(progress=False):
            scale(torch.ones(4))
            assert scale(torch.ones(4), device="cuda").tactic == "d"


@pytest.mark.parametrize("progress", [True, False])
def test_the_progress_bar_goes_to_stderr(progress: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with scaling_providers(*slow_then_fast()), autotune(progress=progress):
        scale(torch.ones(4))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("tuning scaling B4 float32" in captured.err) == progress


# Timing.


def test_the_cpu_time_is_a_median_of_the_wall_clock() -> None:
    calls: list[None] = []

    def run() -> None:
        calls.append(None)
        time.sleep(0.05 if len(calls) % 5 == 0 else 0.002)  # every fifth call is an outlier

    assert 2_000 <= measure_us(run, torch.device("cpu"), 0) < 20_000


def test_a_slow_candidate_is_stopped_early() -> None:
    calls: list[None] = []

    def run() -> None:
        calls.append(None)
        time.sleep(0.11)

    measure_us(run, torch.device("cpu"), 0)
    assert len(calls) == 6  # 3 warm-up runs, 3 repeats


def increment(values: torch.Tensor) -> None:
    values.add_(1)


@needs_cuda
def test_the_cuda_time_follows_the_work_and_excludes_the_flush() -> None:
    device = torch.device("cuda")
    l2_bytes = as_arch(device).l2_bytes
    small, large = (torch.zeros(n, device=device) for n in (1 << 10, 1 << 28))
    small_us, large_us = (
        measure_us(partial(increment, values), device, l2_bytes) for values in (small, large)
    )
    assert 0 < small_us < 50
    assert large_us > 5 * small_us
    assert large[0].item() == small[0].item()

"""Timing: the arithmetic on the CPU; the CUDA part where there is a GPU."""

from __future__ import annotations

import time

import pytest
import torch
from kernel_testing import calls_for_cold_l2, copy_bandwidth_gb_s, environment, time_cpu_us, time_cuda_us
from kernel_testing import timing as timing_module

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_cpu_time_is_the_median_of_the_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 1_000, 5_000, 8_000, 10_000, 110_000])
    monkeypatch.setattr(time, "perf_counter_ns", lambda: next(clock))
    calls: list[int] = []
    assert time_cpu_us(lambda: calls.append(1), repeats=3, warmup=2) == 3.0
    assert len(calls) == 5


def test_copy_bandwidth_counts_read_and_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing_module, "time_cpu_us", lambda run: 2.0)
    assert copy_bandwidth_gb_s(torch.device("cpu"), nbytes=1000) == pytest.approx(1.0)


def test_environment_is_complete() -> None:
    record = environment("torch", "no-such-distribution")
    assert set(record) == {
        "device", "driver", "torch", "cuda", "python", "platform", "git_commit", "no-such-distribution",
    }  # fmt: skip
    assert record["torch"] == torch.__version__
    assert record["no-such-distribution"] == "unknown"
    assert all(record.values())


@pytest.mark.parametrize(("bytes_per_call", "calls"), [(10, 11), (30, 5), (1000, 2)])
def test_calls_that_keep_the_l2_cold(
    monkeypatch: pytest.MonkeyPatch, bytes_per_call: int, calls: int
) -> None:
    properties = type("Properties", (), {"L2_cache_size": 50})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert calls_for_cold_l2(bytes_per_call, torch.device("cuda")) == calls


@needs_gpu
def test_cuda_time_counts_one_call() -> None:
    source = [torch.zeros(1 << 24, device="cuda") for _ in range(4)]
    target = torch.empty_like(source[0])
    times_us = time_cuda_us(
        {
            "one": [lambda s=s: target.copy_(s) for s in source],  # type: ignore[misc]
            "two": [lambda s=s: (target.copy_(s), target.copy_(s)) for s in source],  # type: ignore[misc]
        }
    )
    assert 1.5 < times_us["two"] / times_us["one"] < 2.5


@needs_gpu
def test_copy_bandwidth_of_the_gpu() -> None:
    assert copy_bandwidth_gb_s(torch.device("cuda"), nbytes=1 << 28) > 10


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GeForce RTX 5090", "rtx-5090"),
        ("NVIDIA RTX PRO 6000 Blackwell", "rtx-pro-6000"),
        ("NVIDIA GB10", "gb10"),
        ("Tesla V", "tesla-v"),
    ],
)
def test_the_model_of_a_device(name, model):
    assert timing_module.device_model(name) == model

"""Architectures by name and by device; the devices are made up, two of them of different kinds."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from kernel_dispatch import Arch, ArgumentError, ArgumentTypeError, as_arch
from kernel_dispatch import arch as arch_module

KIB = 1024
H100 = SimpleNamespace(
    major=9,
    minor=0,
    multi_processor_count=114,
    shared_memory_per_block_optin=232448,
    L2_cache_size=52428800,
    memory_clock_rate=1593000,
    memory_bus_width=5120,
    is_integrated=0,
)
A100 = SimpleNamespace(
    major=8,
    minor=0,
    multi_processor_count=108,
    shared_memory_per_block_optin=166912,
    L2_cache_size=41943040,
    is_integrated=0,
)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """An H100 at index 0, an A100 at index 1 that is the current device; yields the indices asked for."""
    asked: list[int] = []

    def properties(index: int) -> SimpleNamespace:
        asked.append(index)
        return (H100, A100)[index]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    arch_module._cuda_arch.cache_clear()
    yield asked
    arch_module._cuda_arch.cache_clear()


@pytest.mark.parametrize(
    ("name", "base", "suffix", "smem_optin_bytes"),
    [
        ("sm_80", "sm_80", "", 166912),
        ("sm_86", "sm_86", "", 101376),
        ("sm_89", "sm_89", "", 101376),
        ("sm_90", "sm_90", "", 232448),
        ("sm_90a", "sm_90", "a", 232448),
        ("sm_100a", "sm_100", "a", 232448),
        ("sm_100f", "sm_100", "f", 232448),
        ("sm_103a", "sm_103", "a", 232448),
        ("sm_110a", "sm_110", "a", 232448),
        ("sm_120a", "sm_120", "a", 101376),
        ("sm_121a", "sm_121", "a", 101376),
    ],
)
def test_name(name: str, base: str, suffix: str, smem_optin_bytes: int) -> None:
    arch = Arch.from_name(name)
    assert (arch.name, arch.base, arch.suffix) == (name, base, suffix)
    assert arch.base == f"sm_{arch.major}{arch.minor}"
    assert arch.smem_optin_bytes == smem_optin_bytes
    assert arch.is_gpu
    assert arch.supports_pdl == (arch.major >= 9)
    assert arch.sm_count > 0
    assert arch.l2_bytes > 0
    assert arch.memory_gb_s > 0
    assert as_arch(name) == arch
    assert str(arch).startswith(f"{name} ({arch.sm_count} SMs, {smem_optin_bytes // KIB} KiB")


@pytest.mark.parametrize(
    "name", ["", "sm_", "sm_9", "sm90", "SM_90", "sm_90b", "sm_75", "sm_999a", "sm_90a ", "sm_0900", "gpu"]
)
def test_unknown_name(name: str) -> None:
    with pytest.raises(
        ArgumentError, match=r"^arch: .* is unknown, expected one of sm_80, .*sm_121a or cpu$"
    ):
        Arch.from_name(name)


@pytest.mark.parametrize(
    ("name", "expected"), [("sm_80a", "sm_80"), ("sm_89f", "sm_89"), ("sm_90f", "sm_90")]
)
def test_suffix_that_does_not_exist(name: str, expected: str) -> None:
    with pytest.raises(ArgumentError, match=f"^arch: '{name}' does not exist, expected '{expected}'$"):
        Arch.from_name(name)


@pytest.mark.parametrize(
    ("name", "target"),
    [("sm_90", "sm_90a"), ("sm_90a", "sm_90a"), ("sm_100f", "sm_100f"), ("sm_80", "sm_80"), ("cpu", "cpu")],
)
def test_target(name: str, target: str) -> None:
    assert Arch.from_name(name).target == target


def test_cpu() -> None:
    cpu = as_arch(torch.device("cpu"))
    assert cpu == as_arch("cpu")
    assert (cpu.name, cpu.base, str(cpu)) == ("cpu", "cpu", "cpu")
    assert not cpu.is_gpu
    assert not cpu.supports_pdl
    assert cpu.sm_count == 1


def test_devices_of_different_kinds(two_gpus: list[int]) -> None:
    first, second = (as_arch(torch.device("cuda", index)) for index in (0, 1))
    assert (first.name, first.sm_count, first.l2_bytes) == ("sm_90a", 114, 52428800)
    assert (second.name, second.sm_count, second.smem_optin_bytes) == ("sm_80", 108, 166912)
    assert as_arch(torch.device("cuda", 0)) is first
    assert two_gpus == [0, 1], "the properties of a device are read once"


def test_memory_bandwidth_of_a_device(two_gpus: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (as_arch(torch.device("cuda", index)) for index in (0, 1))
    assert first.memory_gb_s == pytest.approx(2039, abs=1)  # H100 PCIe
    assert second.memory_gb_s == Arch.from_name("sm_80").memory_gb_s  # not told by older PyTorch
    arch_module._cuda_arch.cache_clear()
    monkeypatch.setattr(H100, "is_integrated", 1)
    assert as_arch(torch.device("cuda", 0)).memory_gb_s == Arch.from_name("sm_90").memory_gb_s
    arch_module._cuda_arch.cache_clear()
    monkeypatch.setattr(H100, "minor", 9)  # of which nothing nominal is known
    assert as_arch(torch.device("cuda", 0)).memory_gb_s == 0


def test_current_device(two_gpus: list[int]) -> None:
    assert as_arch(torch.device("cuda")).name == "sm_80"
    assert as_arch(None).name == "sm_80"
    assert two_gpus == [1]


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert as_arch(None).name == "cpu"
    with pytest.raises(ArgumentError, match=r"^device: cuda:0, but no CUDA device is available$"):
        as_arch(torch.device("cuda", 0))


def test_other_devices(monkeypatch: pytest.MonkeyPatch, two_gpus: list[int]) -> None:
    with pytest.raises(ArgumentError, match=r"^device: meta is not supported"):
        as_arch(torch.device("meta"))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(ArgumentError, match=r"^device: cuda:0 is not supported, expected an NVIDIA GPU"):
        as_arch(torch.device("cuda", 0))
    assert two_gpus == []


@pytest.mark.parametrize("value", [90, 9.0, ("sm_90",)])
def test_wrong_type(value: object) -> None:
    with pytest.raises(ArgumentTypeError, match=r"^arch: .*, expected Arch, str, torch.device or None$"):
        as_arch(value)  # type: ignore[arg-type]

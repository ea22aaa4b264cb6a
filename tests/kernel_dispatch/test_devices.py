"""What a caller may name as a device, and the errors that name it."""

from __future__ import annotations

import pytest
import torch
from kernel_dispatch import ArgumentError, ArgumentTypeError
from kernel_dispatch.devices import as_device

HAS_CUDA = torch.cuda.is_available()


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu")], ids=str)
def test_the_cpu_is_that_of_its_tensors(device: torch.device | str) -> None:
    assert as_device(device) == torch.device("cpu")


def test_none_is_where_kernels_would_run() -> None:
    assert as_device(None) == torch.empty(0, device="cuda" if HAS_CUDA else "cpu").device


@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")
def test_a_gpu_gets_its_index() -> None:
    assert as_device("cuda") == torch.device("cuda", torch.cuda.current_device())
    with pytest.raises(ArgumentError, match=r"^device: cuda:99, expected an index below"):
        as_device("cuda:99")


@pytest.mark.skipif(HAS_CUDA, reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there(device: str) -> None:
    with pytest.raises(ArgumentError, match=f"^device: {device}, but no CUDA device is available"):
        as_device(device)


@pytest.mark.parametrize("device", ["foo", "", "cpu:x", "meta", "mps"])
def test_a_device_that_is_neither_names_itself(device: str) -> None:
    with pytest.raises(ArgumentError, match=r"^device: "):
        as_device(device)


@pytest.mark.parametrize("device", [3.5, 0, True, ["cpu"]], ids=str)
def test_another_type_is_a_type_error(device: object) -> None:
    with pytest.raises(ArgumentTypeError, match=f"^device: {type(device).__name__}, expected"):
        as_device(device)  # type: ignore[arg-type]

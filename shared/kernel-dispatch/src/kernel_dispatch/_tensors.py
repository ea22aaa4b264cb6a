"""Small questions about tensors that several modules ask."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .debug import debug_mode


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" rather than "torch.bfloat16"."""
    return str(dtype).removeprefix("torch.")


def same_device(device: torch.device, expected: torch.device) -> bool:
    """Whether `device` is `expected`; an expected "cuda" without an index accepts every index."""
    return device.type == expected.type and (expected.index is None or device.index == expected.index)


def has_data(tensor: torch.Tensor) -> bool:
    """False for fake and meta tensors, which have neither values nor an address."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def values_are_readable(tensor: torch.Tensor) -> bool:
    """Whether a check may read values: on the CPU always, on a GPU in debug mode outside graph capture."""
    if not has_data(tensor):
        return False
    if tensor.device.type == "cpu":
        return True
    return debug_mode() and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())

"""The `device` argument of a plan: what callers may write for it, and what it then means."""

from __future__ import annotations

import torch

from .arch import Arch
from .errors import ArgumentError, ArgumentTypeError


def as_device(device: torch.device | str | None) -> torch.device:
    """`device` as tensors on it have it: the CPU, or an NVIDIA GPU with its index.

    None is the current CUDA device, or the CPU where there is none. Raises ArgumentTypeError or ArgumentError
    naming `device`, also for a GPU that is not there.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(device, torch.device | str):
        expected = "a torch.device, its name, or None"
        raise ArgumentTypeError("device", f"{type(device).__name__}, expected {expected}")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ArgumentError("device", f"{device!r}, expected the CPU or a CUDA device") from error
    if found.type == "cpu":
        return torch.device("cpu")  # a tensor on "cpu:0" says "cpu"
    if found.type == "cuda" and torch.cuda.is_available():
        index = torch.cuda.current_device() if found.index is None else found.index
        if index >= torch.cuda.device_count():
            raise ArgumentError("device", f"{found}, expected an index below {torch.cuda.device_count()}")
        found = torch.device("cuda", index)
    Arch.from_device(found)  # raises for what is no NVIDIA GPU, or is not there
    return found

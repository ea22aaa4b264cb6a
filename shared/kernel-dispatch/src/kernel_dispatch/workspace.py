"""Workspaces: scratch memory of the caller, one per stream in flight; contents on entry do not matter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from ._tensors import dtype_name, has_data, same_device
from .debug import debug_mode
from .errors import ArgumentError, ArgumentTypeError

CANARY_BYTES = 256  # also keeps the workspace between the canaries as aligned as the allocation
ALIGNMENT_BYTES = 16  # one vector load; every allocation of PyTorch has it, a slice of one may not
_POISON_BYTE = 0xFF  # a NaN in every floating-point dtype, -1 in every integer dtype


def check_workspace(
    workspace: torch.Tensor | None, nbytes: int, device: torch.device, name: str = "workspace"
) -> None:
    """Raises unless `workspace` can serve as `nbytes` of scratch memory on `device`.

    A workspace is a one-dimensional contiguous uint8 or int8 tensor; None will do where nbytes is 0.
    Raises ArgumentTypeError (not a tensor, wrong dtype) or ArgumentError (device, shape, size, alignment),
    naming `name`.
    """
    if workspace is None and nbytes == 0:
        return
    if not isinstance(workspace, torch.Tensor):
        came = "None" if workspace is None else type(workspace).__name__
        raise ArgumentTypeError(name, f"{came}, expected a uint8 tensor of {nbytes} bytes on {device}")
    if workspace.dtype not in (torch.uint8, torch.int8):
        raise ArgumentTypeError(name, f"dtype {dtype_name(workspace.dtype)}, expected uint8 or int8")
    if not same_device(workspace.device, device):
        raise ArgumentError(name, f"on {workspace.device}, expected {device}")
    if workspace.dim() != 1 or not workspace.is_contiguous():
        came = f"strides {list(workspace.stride())} for shape {list(workspace.shape)}"
        raise ArgumentError(name, f"{came}, expected one contiguous dimension")
    if workspace.numel() < nbytes:
        raise ArgumentError(name, f"{workspace.numel()} bytes, expected at least {nbytes}")
    if nbytes > 0 and has_data(workspace) and workspace.data_ptr() % ALIGNMENT_BYTES:
        raise ArgumentError(name, f"address not a multiple of {ALIGNMENT_BYTES} bytes")


class GuardedWorkspace:
    """`nbytes` of workspace on `device`, between two canaries of CANARY_BYTES and filled with NaN.

    tensor: [nbytes] uint8, the workspace to hand to a kernel.
    """

    def __init__(self, nbytes: int, device: torch.device | str) -> None:
        self._block = torch.full((nbytes + 2 * CANARY_BYTES,), _POISON_BYTE, dtype=torch.uint8, device=device)
        self._canary = torch.arange(CANARY_BYTES, dtype=torch.uint8, device=device) ^ 0xA5
        self._before = self._block[:CANARY_BYTES]
        self._after = self._block[CANARY_BYTES + nbytes :]
        self._before.copy_(self._canary)
        self._after.copy_(self._canary)
        self.tensor = self._block[CANARY_BYTES : CANARY_BYTES + nbytes]

    def check(self) -> None:
        """Raises RuntimeError if a byte outside the workspace was written. Synchronises with the device."""
        before = torch.nonzero(self._before != self._canary)
        if before.numel():
            offset = int(before.max()) - CANARY_BYTES
            raise self._overrun(before.numel(), f"before its start, the nearest at offset {offset}")
        after = torch.nonzero(self._after != self._canary)
        if after.numel():
            offset = self.tensor.numel() + int(after.min())
            raise self._overrun(after.numel(), f"past its end, the nearest at offset {offset}")

    def _overrun(self, count: int, where: str) -> RuntimeError:
        return RuntimeError(f"workspace of {self.tensor.numel()} bytes: {count} bytes were written {where}")


@contextmanager
def guard_workspace(
    nbytes: int, device: torch.device | str, dtype: torch.dtype = torch.uint8
) -> Iterator[torch.Tensor]:
    """Lends a workspace, [nbytes] full of NaN; raises RuntimeError on exit if its surroundings changed.

    dtype: of the workspace, one byte wide. An error from the block itself goes first: the canaries are then
    not looked at.
    """
    workspace = GuardedWorkspace(nbytes, device)
    yield workspace.tensor.view(dtype)
    workspace.check()


def launch_workspace(
    workspace: torch.Tensor | None, nbytes: int, device: torch.device
) -> AbstractContextManager[torch.Tensor | None]:
    """The workspace for one launch that needs `nbytes`: `workspace` itself, or in debug mode a guarded one.

    An operation launches inside the block, on what it yields, once `workspace` has passed `check_workspace`:

        with launch_workspace(workspace, plan.workspace_nbytes, device) as scratch:
            launcher(..., scratch)

    In debug mode that is exactly `nbytes` between canaries, full of NaN and of the dtype of `workspace`; the
    caller's memory is then neither read nor written. `guard_workspace` says what the end of the block raises.
    Launches without a workspace are left alone, and those captured in a CUDA graph: looking at the canaries
    would synchronise.
    """
    if not debug_mode() or nbytes == 0 or workspace is None or not has_data(workspace):
        return nullcontext(workspace)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return nullcontext(workspace)
    return guard_workspace(nbytes, device, workspace.dtype)

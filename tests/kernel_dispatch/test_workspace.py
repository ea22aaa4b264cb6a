"""Workspace checks and canaries."""

from __future__ import annotations

import pytest
import torch
from kernel_dispatch import (
    ArgumentError,
    ArgumentTypeError,
    GuardedWorkspace,
    check_workspace,
    guard_workspace,
    launch_workspace,
)
from kernel_dispatch.debug import debug, debug_mode

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("nbytes", [0, 1, 64])
def test_good_workspace(dtype: torch.dtype, nbytes: int) -> None:
    check_workspace(torch.empty(64, dtype=dtype), nbytes, CPU)


def test_no_workspace_needed() -> None:
    check_workspace(None, 0, CPU)


@pytest.mark.parametrize(
    ("workspace", "error", "problem"),
    [
        (None, ArgumentTypeError, "None, expected a uint8 tensor of 64 bytes on cpu"),
        (bytearray(64), ArgumentTypeError, "bytearray, expected a uint8 tensor of 64 bytes on cpu"),
        (torch.empty(16), ArgumentTypeError, "dtype float32, expected uint8 or int8"),
        (torch.empty(64, dtype=torch.uint8, device="meta"), ArgumentError, "on meta, expected cpu"),
        (
            torch.empty(8, 8, dtype=torch.uint8),
            ArgumentError,
            r"strides \[8, 1\] for shape \[8, 8\], expected one",
        ),
        (
            torch.empty(128, dtype=torch.uint8)[::2],
            ArgumentError,
            r"strides \[2\] for shape \[64\], expected one",
        ),
        (torch.empty(63, dtype=torch.uint8), ArgumentError, "63 bytes, expected at least 64"),
        (torch.empty(80, dtype=torch.uint8)[1:], ArgumentError, "address not a multiple of 16 bytes"),
    ],
)
def test_bad_workspace(workspace: object, error: type[Exception], problem: str) -> None:
    with pytest.raises(error, match=f"^workspace_buffer: {problem}"):
        check_workspace(workspace, 64, CPU, name="workspace_buffer")  # type: ignore[arg-type]


@pytest.mark.parametrize("nbytes", [0, 1, 1000])
def test_guarded_workspace_may_be_written_everywhere(nbytes: int) -> None:
    with guard_workspace(nbytes, "cpu") as workspace:
        check_workspace(workspace, nbytes, CPU)
        assert (workspace == 0xFF).all(), "its contents on entry must look wrong in every dtype"
        workspace.zero_()


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (slice(255, 256), "1 bytes were written before its start, the nearest at offset -1"),
        (slice(0, 3), "3 bytes were written before its start, the nearest at offset -254"),
        (slice(256 + 40, 256 + 44), "4 bytes were written past its end, the nearest at offset 40"),
    ],
)
def test_overrun_is_reported(written: slice, message: str) -> None:
    workspace = GuardedWorkspace(40, "cpu")
    workspace.check()
    block = torch.empty(0, dtype=torch.uint8).set_(workspace.tensor.untyped_storage())
    block[written] += 1
    with pytest.raises(RuntimeError, match=rf"^workspace of 40 bytes: {message}$"):
        workspace.check()


def overrun(workspace: torch.Tensor) -> None:
    torch.empty(0, dtype=torch.uint8).set_(workspace.untyped_storage()).zero_()


def test_guard_workspace_checks_on_exit() -> None:
    with pytest.raises(RuntimeError, match="workspace of 40 bytes"), guard_workspace(40, "cpu") as workspace:
        overrun(workspace)


def test_error_of_the_block_goes_first() -> None:
    def fails_after_an_overrun() -> None:
        with guard_workspace(40, "cpu") as workspace:
            overrun(workspace)
            raise KeyError

    with pytest.raises(KeyError):
        fails_after_an_overrun()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_debug_mode_launches_on_a_guarded_workspace_in_place_of_the_callers(dtype: torch.dtype) -> None:
    given = torch.zeros(100, dtype=dtype)
    with launch_workspace(given, 40, CPU) as workspace:
        assert workspace is given
    with debug(), launch_workspace(given, 40, CPU) as workspace:
        assert workspace is not None
        check_workspace(workspace, 40, CPU)
        assert (workspace.shape, workspace.dtype) == ((40,), dtype)
        assert (workspace.view(torch.uint8) == 0xFF).all()
        workspace.fill_(7)
    assert not given.any()


@pytest.mark.parametrize("offset", [-1, 40], ids=["before", "past"])
def test_overrun_of_a_given_workspace_is_found_in_debug_mode(offset: int) -> None:
    def overruns_in_debug_mode() -> None:
        given = torch.zeros(4096, dtype=torch.uint8)[1024:]  # an overrun of 40 bytes stays inside of it
        with debug(), launch_workspace(given, 40, CPU) as workspace:
            assert workspace is not None
            block = torch.empty(0, dtype=torch.uint8).set_(workspace.untyped_storage())
            block[workspace.storage_offset() + offset] = 0

    with pytest.raises(RuntimeError, match=f"^workspace of 40 bytes: .*at offset {offset}$"):
        overruns_in_debug_mode()


def test_launches_without_a_workspace_and_captured_ones_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given, fake = torch.zeros(64, dtype=torch.uint8), torch.empty(64, dtype=torch.uint8, device="meta")
    with debug():
        with launch_workspace(None, 0, CPU) as workspace:
            assert workspace is None
        with launch_workspace(given, 0, CPU) as workspace:
            assert workspace is given
        with launch_workspace(fake, 64, fake.device) as workspace:
            assert workspace is fake
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with launch_workspace(given, 64, torch.device("cuda")) as workspace:
            assert workspace is given


def test_debug_mode_is_for_the_block() -> None:
    before = debug_mode()
    with debug():
        assert debug_mode()
        with debug():
            assert debug_mode()
        assert debug_mode()
    assert debug_mode() == before

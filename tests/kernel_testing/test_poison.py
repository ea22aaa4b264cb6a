"""Poison, guards and snapshots notice what they are there to notice."""

from __future__ import annotations

import pytest
import torch
from kernel_testing import UNUSED_INDEX, Guarded, poison_, poisoned, snapshot_untouched

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_floats_start_as_nan(dtype: torch.dtype) -> None:
    tensor = poisoned((2, 3), dtype)
    assert (tensor.shape, tensor.dtype) == ((2, 3), dtype)
    assert tensor.float().isnan().all()


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.int32, UNUSED_INDEX), (torch.int64, UNUSED_INDEX), (torch.int8, 127), (torch.uint8, 255)],
)
def test_integers_start_as_an_unusable_index(dtype: torch.dtype, value: int) -> None:
    assert poisoned((3,), dtype).tolist() == [value] * 3


def test_poison_fills_a_view_only() -> None:
    page = torch.zeros(2, 4)
    assert poison_(page[1, 2:]).shape == (2,)
    assert page.isnan().tolist() == [[False] * 4, [False, False, True, True]]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_guarded_tensor_may_be_written_everywhere(dtype: torch.dtype) -> None:
    guarded = Guarded((3, 5), dtype)
    assert guarded.tensor.float().isnan().all()
    assert guarded.tensor.is_contiguous()
    guarded.tensor.fill_(1.0)
    guarded.check()


@pytest.mark.parametrize(
    ("first_byte", "message"),
    [
        (-4, "4 bytes written before the tensor, the last at -1"),
        (12, r"4 bytes written past the tensor, .* \+ 0"),
    ],
)
def test_write_outside_is_reported(first_byte: int, message: str) -> None:
    guarded = Guarded((3,), torch.float32)
    offset = guarded.tensor.storage_offset() + first_byte // 4
    torch.as_strided(guarded.tensor, (1,), (1,), offset).fill_(1.0)
    with pytest.raises(AssertionError, match=message):
        guarded.check()


def pool_of(strided: bool) -> torch.Tensor:
    block = torch.randn(6, 4, 8)
    return block[:, 1:3, ::2] if strided else block


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("touched", [[], [2], [5, -1, 0], torch.tensor([[1], [3]], dtype=torch.int32)])
def test_touched_slots_may_change(strided: bool, touched: list[int] | torch.Tensor) -> None:
    pool = pool_of(strided)
    check = snapshot_untouched(pool, touched)
    for slot in torch.as_tensor(touched, dtype=torch.int64).flatten().tolist():
        if slot >= 0:
            pool[slot] += 1
    check()


@pytest.mark.parametrize("strided", [False, True])
def test_other_slots_may_not(strided: bool) -> None:
    pool = pool_of(strided)
    check = snapshot_untouched(pool, [0, -1], "state_pool")
    pool[[0, 3, 5]] += 1
    with pytest.raises(AssertionError, match=r"^state_pool: 2 untouched slots changed, the first is slot 3$"):
        check()


@pytest.mark.parametrize("change", [-0.0, float("nan")])
def test_comparison_is_bit_for_bit(change: float) -> None:
    pool = torch.zeros(3, 2)
    pool[1] = float("nan")
    check = snapshot_untouched(pool, [])
    check()
    pool[2, 1] = change
    with pytest.raises(AssertionError, match="slot 2"):
        check()


def test_pool_of_scalars_and_pool_of_nothing_left() -> None:
    pool = torch.arange(3)
    everything = snapshot_untouched(pool, [0, 1, 2])
    check = snapshot_untouched(pool, [0, 1])
    pool[0] = 7
    everything()
    check()
    pool[2] = 7
    everything()
    with pytest.raises(AssertionError, match="1 untouched slots changed"):
        check()

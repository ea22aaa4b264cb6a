"""The comparison fails on every kind of difference, and says where."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_testing import assert_close_elementwise

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_equal_values_pass(dtype: torch.dtype) -> None:
    actual = torch.tensor([[0.0, 1.5], [-2.0, NAN]]).to(dtype)
    assert_close_elementwise(actual, actual.to(torch.float64), 0.0, 0.0, "out")


def test_special_values_pass_in_place() -> None:
    values = torch.tensor([NAN, INF, -INF, 0.0])
    assert_close_elementwise(values, values.double(), 0.0, 0.0, "lse")


def test_empty_tensors_pass() -> None:
    assert_close_elementwise(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.float64), 0.0, 0.0, "out")


@pytest.mark.parametrize(
    ("got", "want"),
    [(NAN, 1.0), (1.0, NAN), (INF, 1.0), (1.0, INF), (INF, -INF), (NAN, INF), (1.0, 1.5), (-1.0, 1.0)],
)
def test_one_wrong_element_fails(got: float, want: float) -> None:
    actual, expected = torch.ones(3, 4), torch.ones(3, 4, dtype=torch.float64)
    actual[1, 2], expected[1, 2] = got, want
    with pytest.raises(AssertionError, match=r"^out: 1 of 12 elements outside .* at \[1, 2\]: got "):
        assert_close_elementwise(actual, expected, 0.1, 0.1, "out")


def test_message_shows_the_worst_element() -> None:
    actual, expected = torch.tensor([1.0, 2.5, 103.0]), torch.tensor([1.0, 2.0, 100.0], dtype=torch.float64)
    with pytest.raises(AssertionError) as raised:
        assert_close_elementwise(actual, expected, 0.0, 0.01, "o_partial")
    assert str(raised.value) == (
        "o_partial: 2 of 3 elements outside 0 + 0.01 * |expected|; "
        "the worst, at [1]: got 2.5, expected 2, error 0.5, bound 0.02"
    )


def test_special_value_is_worse_than_any_number() -> None:
    actual, expected = torch.tensor([1e30, NAN]), torch.zeros(2, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"2 of 2 .* at \[1\]: got nan, expected 0"):
        assert_close_elementwise(actual, expected, 0.0, 0.0, "out")


@pytest.mark.parametrize(
    ("expected", "problem"),
    [
        (torch.zeros(2, 3), "the reference is torch.float32, expected torch.float64"),
        (torch.zeros(3, 2, dtype=torch.float64), r"shape \[2, 3\], expected \[3, 2\]"),
        (torch.zeros(1, 3, dtype=torch.float64), r"shape \[2, 3\], expected \[1, 3\]"),
    ],
)
def test_unusable_reference(expected: torch.Tensor, problem: str) -> None:
    with pytest.raises(AssertionError, match=f"^out: {problem}$"):
        assert_close_elementwise(torch.zeros(2, 3), expected, 1.0, 1.0, "out")


values = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=6)


@given(expected=values, errors=values, atol=st.floats(0, 10), rtol=st.floats(0, 0.5))
def test_every_element_is_held_to_its_bound(
    expected: list[float], errors: list[float], atol: float, rtol: float
) -> None:
    count = min(len(expected), len(errors))
    want = torch.tensor(expected[:count], dtype=torch.float64)
    got = want + torch.tensor(errors[:count], dtype=torch.float64)
    inside = all(abs(g - w) <= atol + rtol * abs(w) for g, w in zip(got.tolist(), want.tolist(), strict=True))
    if inside:
        assert_close_elementwise(got, want, atol, rtol, "out")
    else:
        with pytest.raises(AssertionError, match=r"^out: "):
            assert_close_elementwise(got, want, atol, rtol, "out")

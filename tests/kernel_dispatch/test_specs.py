"""`bind` and the value checks: what they accept, and what their errors say."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_dispatch import (
    ArgumentError,
    ArgumentTypeError,
    TensorSpec,
    are_disjoint,
    bind,
    check_index_range,
    check_no_overlap,
    check_scale,
    debug,
)
from torch._subclasses.fake_tensor import FakeTensorMode

LOW_PRECISION = (torch.bfloat16, torch.float16)
SPECS = (
    TensorSpec("query", ("batch", "num_heads", 16), LOW_PRECISION),
    TensorSpec("kv_cache", ("num_pages", "page_size", 16), LOW_PRECISION),
    TensorSpec("block_tables", ("batch", "max_pages"), (torch.int32,)),
    TensorSpec("lse", ("batch", "num_heads"), (torch.float32,), layout="any", optional=True, written=True),
    TensorSpec("out", ("batch", "num_heads", 8), LOW_PRECISION, layout="contiguous", written=True),
)
SIZES = {"batch": 3, "num_heads": 4, "num_pages": 5, "page_size": 2, "max_pages": 2}

Tensors = dict[str, "torch.Tensor | None"]


def good_tensors() -> Tensors:
    return {
        "query": torch.zeros(3, 4, 16, dtype=torch.bfloat16),
        "kv_cache": torch.zeros(5, 2, 16, dtype=torch.bfloat16),
        "block_tables": torch.zeros(3, 2, dtype=torch.int32),
        "lse": torch.zeros(3, 4),
        "out": torch.zeros(3, 4, 8, dtype=torch.bfloat16),
    }


def test_sizes_are_bound_in_order() -> None:
    assert bind(SPECS, good_tensors()) == SIZES


def test_optional_tensor_may_be_none_or_left_out() -> None:
    tensors = good_tensors() | {"lse": None}
    assert bind(SPECS, tensors) == SIZES
    del tensors["lse"]
    assert bind(SPECS, tensors) == SIZES


BAD = [
    ("query", lambda t: None, ArgumentTypeError, r"None, expected a tensor \[batch, num_heads, 16\]"),
    ("query", lambda t: t.tolist(), ArgumentTypeError, r"list, expected a tensor \[batch, num_heads, 16\]"),
    ("query", lambda t: t.double(), ArgumentTypeError, "dtype float64, expected bfloat16 or float16"),
    (
        "query",
        lambda t: t[0],
        ArgumentError,
        r"shape \[4, 16\] has 2 dimensions, expected 3: \[batch, num_he",
    ),
    ("query", lambda t: t[..., :8].clone(), ArgumentError, "dimension 2 = 8, expected 16"),
    ("query", lambda t: t.mT.contiguous().mT, ArgumentError, "stride 4 in the last dimension, expected 1"),
    ("query", lambda t: t[0, 0, 0].expand_as(t), ArgumentError, "stride 0 in the last dimension, expected 1"),
    ("query", lambda t: t.to_sparse(), ArgumentError, "layout torch.sparse_coo, expected torch.strided"),
    ("kv_cache", lambda t: t.to("meta"), ArgumentError, "on meta, expected cpu"),
    ("block_tables", lambda t: t.long(), ArgumentTypeError, "dtype int64, expected int32"),
    ("block_tables", lambda t: t.new_zeros(4, 2), ArgumentError, "batch = 4, expected 3 from query"),
    ("lse", lambda t: t[:, :1], ArgumentError, "num_heads = 1, expected 4 from query"),
    ("lse", lambda t: t[:1].expand(3, 4), ArgumentError, r"strides \[0, 1\] .* address of its own"),
    ("out", lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), ArgumentError, "a contiguous tensor"),
    ("out", lambda t: t.new_zeros(3, 5, 8), ArgumentError, "num_heads = 5, expected 4 from query"),
]


@pytest.mark.parametrize(
    ("name", "change", "error", "message"), BAD, ids=[f"{name}-{message[:20]}" for name, _, _, message in BAD]
)
def test_bad_tensor_is_named(
    name: str, change: Callable[[torch.Tensor], object], error: type[Exception], message: str
) -> None:
    tensors = good_tensors()
    tensors[name] = change(tensors[name])  # type: ignore[arg-type, assignment]
    with pytest.raises(error, match=rf"^{name}: .*{message}") as raised:
        bind(SPECS, tensors)
    assert raised.value.argument == name  # type: ignore[attr-defined]


def test_given_sizes_come_from_the_arguments() -> None:
    with pytest.raises(ArgumentError, match=r"^query: batch = 3, expected 2 from the arguments$"):
        bind(SPECS, good_tensors(), dims={"batch": 2})


@pytest.mark.parametrize(("device", "fits"), [("cpu", True), ("cuda", False), ("cuda:1", False)])
def test_given_device_is_required(device: str, fits: bool) -> None:
    if fits:
        assert bind(SPECS, good_tensors(), device=torch.device(device)) == SIZES
    else:
        with pytest.raises(ArgumentError, match=f"^query: on cpu, expected {device}$"):
            bind(SPECS, good_tensors(), device=torch.device(device))


def test_tensor_without_a_spec_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="without a spec"):
        bind(SPECS, good_tensors() | {"scale": torch.ones(1)})


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(6, 4)[::2, :1],
        torch.zeros(3, 1).expand(3, 1),
        torch.zeros(0, 4).T[:1].T,
        torch.zeros(3, 8)[:, :1],
    ],
    ids=["column", "expanded-by-1", "empty", "row-slice"],
)
def test_dimension_of_size_one_may_have_any_stride(tensor: torch.Tensor) -> None:
    rows = tensor.shape[0]
    assert bind([TensorSpec("x", ("rows", 1), (torch.float32,))], {"x": tensor}) == {"rows": rows}


def test_fake_tensors_bind() -> None:
    with FakeTensorMode() as mode:
        fake: Tensors = {name: mode.from_tensor(t) for name, t in good_tensors().items() if t is not None}
        assert bind(SPECS, fake) == SIZES
        fake["out"] = torch.empty(2, 4, 8, dtype=torch.bfloat16)
        with pytest.raises(ArgumentError, match=r"^out: batch = 2, expected 3 from query$"):
            bind(SPECS, fake)


def addresses(tensor: torch.Tensor) -> list[int]:
    """The address of the first byte of every element, by the definition of strides."""
    start, itemsize = tensor.data_ptr(), tensor.element_size()
    return [
        start + itemsize * sum(i * s for i, s in zip(index, tensor.stride(), strict=True))
        for index in itertools.product(*map(range, tensor.shape))
    ]


shapes = st.lists(st.integers(1, 4), min_size=2, max_size=2)


@given(shape=shapes, strides=st.lists(st.integers(0, 9), min_size=2, max_size=2))
def test_accepted_output_has_one_address_per_element(shape: list[int], strides: list[int]) -> None:
    tensor = torch.zeros(64).as_strided(shape, strides)
    spec = TensorSpec("out", ("m", "n"), (torch.float32,), layout="any", written=True)
    distinct = len(set(addresses(tensor))) == tensor.numel()
    nested = max(strides) > (min(strides) * (shape[strides.index(min(strides))] - 1))
    try:
        bind([spec], {"out": tensor})
    except ArgumentError:
        assert not (distinct and nested and min(strides) > 0), "a slice or a transpose was refused"
    else:
        assert distinct


def overlap_by_ranges(a: torch.Tensor, b: torch.Tensor) -> bool:
    first, second = addresses(a), addresses(b)
    return min(first) <= max(second) and min(second) <= max(first)


@given(
    first=st.tuples(shapes, st.integers(0, 12)),
    second=st.tuples(shapes, st.integers(0, 12)),
    outer_stride=st.integers(4, 9),
)
def test_accepted_outputs_share_no_byte(
    first: tuple[list[int], int], second: tuple[list[int], int], outer_stride: int
) -> None:
    buffer = torch.zeros(128)
    a, b = (buffer.as_strided(shape, [outer_stride, 1], offset) for shape, offset in (first, second))
    shared = set(addresses(a)) & set(addresses(b))
    assert are_disjoint([a], [b]) == are_disjoint([b, a], []) == (not overlap_by_ranges(a, b))
    try:
        check_no_overlap({"a": a}, {"b": b})
    except ArgumentError:
        assert overlap_by_ranges(a, b), "tensors in disjoint ranges were refused"
    else:
        assert not shared


def test_overlap_names_both_tensors() -> None:
    buffer = torch.zeros(16)
    with pytest.raises(ArgumentError, match=r"^out: shares memory with query"):
        check_no_overlap({"out": buffer[4:8], "lse": None}, {"kv": torch.zeros(3), "query": buffer[:5]})
    with pytest.raises(ArgumentError, match=r"^lse: shares memory with out"):
        check_no_overlap({"out": buffer[:4], "lse": buffer[3:]}, {})


def test_neighbours_and_interleaved_slots_do_not_overlap() -> None:
    pool = torch.zeros(6, 10)
    check_no_overlap({"state": pool[:, :4], "states": pool[:, 4:]}, {"other": torch.zeros(6, 10)})
    check_no_overlap({"state": pool[:, 0]}, {"one": pool[2:3, 1:]})  # of which one item has no period
    check_no_overlap({"one": pool[2:3, 1:]}, {"state": pool[:, 0]})
    check_no_overlap({"state": pool[:3]}, {"states": pool[3:], "empty": pool[:0], "meta": pool.to("meta")})
    with pytest.raises(ArgumentError, match=r"^states: shares memory with state"):
        check_no_overlap({"state": pool[:, :5], "states": pool[:, 4:]}, {})


@pytest.mark.parametrize(
    ("values", "lower", "problem"),
    [
        ([0, 3], -1, None),
        ([-1, -7, 2], -1, None),
        ([], 0, None),
        ([0, 4], -1, r"4 at \[1\], expected 0 to 3, or negative for padding"),
        ([1, -1], 0, r"-1 at \[1\], expected 0 to 3$"),
        ([0, 1], 1, r"0 at \[0\], expected 1 to 3$"),
        ([2147480000], -1, r"2147480000 at \[0\]"),
    ],
)
def test_index_range(values: list[int], lower: int, problem: str | None) -> None:
    indices = torch.tensor(values, dtype=torch.int32)
    if problem is None:
        check_index_range("state_indices", indices, upper=4, lower=lower)
        check_index_range("state_indices", indices.reshape(1, -1), upper=4, lower=lower)
    else:
        with pytest.raises(ArgumentError, match=f"^state_indices: {problem}"):
            check_index_range("state_indices", indices, upper=4, lower=lower)


def test_index_of_a_table_is_shown_with_its_position() -> None:
    with pytest.raises(ArgumentError, match=r"9 at \[1, 0\]"):
        check_index_range("block_tables", torch.tensor([[0, 1], [9, 2]]), upper=4)


def test_values_out_of_reach_are_not_read() -> None:
    with debug():
        check_index_range("block_tables", torch.zeros(2, dtype=torch.int32, device="meta"), upper=0)
        check_scale("scale", torch.zeros(1, device="meta"))


@pytest.mark.parametrize(
    "value",
    [1.0, 0, -2, np.float32(0.5), np.float16(2), np.int64(3), Fraction(1, 3)],
    ids=lambda value: type(value).__name__,
)
def test_scale_may_be_any_real_number_and_is_launched_with_as_a_float(value: float) -> None:
    scale = check_scale("scale", value, device=torch.device("cpu"))
    assert type(scale) is float
    assert scale == float(value)


@pytest.mark.parametrize("value", [torch.tensor(0.5), torch.tensor([0.5])])
def test_scale_may_be_a_tensor_of_one_element(value: torch.Tensor) -> None:
    assert check_scale("scale", value, device=torch.device("cpu")) is value


@pytest.mark.parametrize(
    ("value", "error", "problem"),
    [
        (float("nan"), ArgumentError, "nan, expected a finite number"),
        (float("-inf"), ArgumentError, "-inf, expected a finite number"),
        (np.float32("nan"), ArgumentError, "nan, expected a finite number"),
        pytest.param(10**400, ArgumentError, "int beyond the range of float32, expected", id="big"),
        pytest.param(-(10**5000), ArgumentError, "int beyond the range of float32, expected", id="huge"),
        (-1e39, ArgumentError, r"-1e\+39 beyond the range of float32, expected"),
        (True, ArgumentTypeError, "bool, expected a float"),
        (np.bool_(True), ArgumentTypeError, "bool_?, expected a float"),
        (1j, ArgumentTypeError, "complex, expected a float"),
        ("1.0", ArgumentTypeError, "str, expected a float"),
        (None, ArgumentTypeError, "NoneType, expected a float"),
        (torch.tensor(1.0, dtype=torch.float64), ArgumentTypeError, "dtype float64, expected float32"),
        (torch.ones(2), ArgumentError, r"shape \[2\], expected one element"),
        (torch.tensor([float("nan")]), ArgumentError, "nan, expected a finite number"),
        (torch.ones(1, device="meta"), ArgumentError, "on meta, expected cpu"),
    ],
)
def test_bad_scale_is_named(value: object, error: type[Exception], problem: str) -> None:
    with pytest.raises(error, match=f"^softmax_scale: {problem}"):
        check_scale("softmax_scale", value, device=torch.device("cpu"))  # type: ignore[arg-type]


def test_sizes_known_beforehand_are_from_where_the_caller_says() -> None:
    specs = [TensorSpec("query", ("batch",), (torch.float32,))]
    with pytest.raises(ArgumentError, match=r"^query: batch = 3, expected 2 from the plan$"):
        bind(specs, {"query": torch.zeros(3)}, {"batch": 2}, source="the plan")

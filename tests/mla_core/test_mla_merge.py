"""Merging of partial attention: exact at empty sides, elsewhere attention over the union within rounding."""

import math

import pytest
import torch
from kernel_testing import assert_close_elementwise
from mla_cases import FP32_ROUNDOFF, OUTPUT_ROUNDING, Case, bits
from mla_core import decode_reference, merge_states

SHAPES = [(), (3,), (2, 5), (2, 3, 4)]


def merged_in_float64(o: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total = torch.logsumexp(lse.double(), dim=0)
    weights = torch.exp(lse.double() - total).unsqueeze(-1)
    return (weights * o.double()).sum(dim=0), total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_merge_matches_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    o = torch.randn(2, *shape, 16).to(dtype)
    lse = 5 * torch.randn(2, *shape)
    merged, merged_lse = merge_states(o[0], lse[0], o[1], lse[1])
    expected, expected_lse = merged_in_float64(o, lse)
    assert (merged.dtype, merged_lse.dtype) == (dtype, torch.float32)
    # The weights carry the roundings of a difference of up to 2^5 and of an exponential; |o| is below 8.
    weights = 8 * 64 * FP32_ROUNDOFF
    relative = FP32_ROUNDOFF if dtype is torch.float32 else OUTPUT_ROUNDING[dtype].relative
    assert_close_elementwise(merged, expected, weights, relative, "o")
    assert_close_elementwise(merged_lse, expected_lse, 64 * FP32_ROUNDOFF, FP32_ROUNDOFF, "lse")


@pytest.mark.parametrize("junk", [0.0, math.nan, math.inf], ids=str)
def test_a_side_without_keys_leaves_the_other_exactly(junk: float) -> None:
    o, lse = torch.randn(3, 8), torch.randn(3)
    empty, no_keys = torch.full((3, 8), junk), torch.full((3,), -math.inf)
    for merged, merged_lse in (merge_states(o, lse, empty, no_keys), merge_states(empty, no_keys, o, lse)):
        assert torch.equal(bits(merged), bits(o))
        assert torch.equal(bits(merged_lse), bits(lse))
    merged, merged_lse = merge_states(empty, no_keys, empty, no_keys)
    assert torch.equal(merged, torch.zeros(3, 8))
    assert (merged_lse == -math.inf).all()


def test_extreme_log_sum_exps_neither_overflow_nor_vanish() -> None:
    o = torch.tensor([[1.0], [2.0]])
    for lse in (torch.tensor([1e30, 1e30]), torch.tensor([-1e30, -1e30])):
        merged, merged_lse = merge_states(o[0], lse[0], o[1], lse[1])
        assert merged.item() == 1.5
        assert merged_lse.item() == pytest.approx(lse[0].item())


def test_merging_is_symmetric() -> None:
    o_a, lse_a, o_b, lse_b = torch.randn(9, 8), torch.randn(9), torch.randn(9, 8), torch.randn(9)
    merged, merged_lse = merge_states(o_a, lse_a, o_b, lse_b)
    swapped, swapped_lse = merge_states(o_b, lse_b, o_a, lse_a)
    assert torch.equal(merged, swapped)
    assert torch.equal(merged_lse, swapped_lse)


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_combined_parts_are_attention_over_all_keys(parts: int) -> None:
    case = Case((20,), num_heads=3, page_size=4, latent=8, rope=4)
    query, kv_cache, block_tables, seq_lens = case.inputs().positional
    options = {"kv_lora_rank": 8, "softmax_scale": 1.0}
    partial = []
    for part in range(parts):
        table = block_tables.clone()
        table[0, [column for column in range(5) if column % parts != part]] = -1
        o, lse = decode_reference(query, kv_cache, table, seq_lens, **options)
        partial.append((o.float(), lse.float()))
    o, lse = partial[0]
    for other in partial[1:]:
        o, lse = merge_states(o, lse, *other)
    expected, expected_lse = decode_reference(query, kv_cache, block_tables, seq_lens, **options)
    assert_close_elementwise(o, expected, parts * 256 * FP32_ROUNDOFF, FP32_ROUNDOFF, "o")
    assert_close_elementwise(lse, expected_lse, parts * 64 * FP32_ROUNDOFF, FP32_ROUNDOFF, "lse")

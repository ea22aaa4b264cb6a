"""The float64 oracle against a dense softmax that shares nothing with it."""

import math

import pytest
import torch
from kernel_testing import assert_close_elementwise
from mla_cases import BF16, E4M3, FP16, Case
from mla_core import decode_reference

CASES = [
    Case((5, 12, 9), q_len=2, num_heads=3, page_size=4, latent=12, rope=4),
    Case((7, 1, 30), num_heads=2, page_size=1, latent=8, rope=3, dtype=FP16),
    Case((4, 20), num_heads=1, page_size=16, q_len=4, dtype=E4M3),
    Case((6, 3, 17), num_heads=2, page_size=8, q_lens=(2, 1, 4), latent=16, rope=8, dtype=BF16),
]


def dense_attention(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """One masked softmax per request over a dense copy of its keys."""
    inputs = case.inputs()
    q_lens = case.q_lens or (case.q_len,) * len(case.lengths)
    tokens = inputs.query.double().reshape(-1, case.num_heads, case.latent + case.rope)
    outs, lses = [], []
    for request, (queries, length) in enumerate(zip(tokens.split(q_lens), case.lengths, strict=True)):
        pages = inputs.block_tables[request, : math.ceil(length / case.page_size)].long()
        keys = inputs.kv_cache.double()[pages].flatten(0, 1)[:length]
        logits = torch.einsum("qhd,kd->qhk", queries, keys) * case.scale
        future = torch.ones(len(queries), length, dtype=torch.bool).triu(diagonal=length - len(queries) + 1)
        logits = logits.masked_fill(future.unsqueeze(1), -math.inf)
        outs.append(torch.softmax(logits, dim=-1) @ keys[:, : case.latent])
        lses.append(torch.log(torch.exp(logits).sum(dim=-1)))
    shape = inputs.query.shape[:-1]
    return torch.cat(outs).reshape(*shape, case.latent), torch.cat(lses).reshape(shape)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_a_dense_softmax(case: Case) -> None:
    inputs = case.inputs()
    out, lse = decode_reference(
        *inputs.positional,
        kv_lora_rank=case.latent,
        softmax_scale=case.scale,
        cum_seq_lens_q=inputs.cum_seq_lens_q,
    )
    expected_out, expected_lse = dense_attention(case)
    assert_close_elementwise(out, expected_out, 1e-13, 1e-13, "out")
    assert_close_elementwise(lse, expected_lse, 1e-13, 1e-13, "lse")


def test_output_scale_multiplies_the_output_only() -> None:
    inputs, scale = CASES[0].inputs(), CASES[0].scale
    out, lse = decode_reference(*inputs.positional, kv_lora_rank=12, softmax_scale=scale)
    scaled, same_lse = decode_reference(
        *inputs.positional, kv_lora_rank=12, softmax_scale=scale, output_scale=4.0
    )
    assert torch.equal(scaled, 4 * out)
    assert torch.equal(same_lse, lse)


def test_a_query_of_three_dimensions_is_one_token_per_request() -> None:
    case = CASES[1]
    query, *rest = case.inputs().positional
    arguments = {"kv_lora_rank": case.latent, "softmax_scale": case.scale}
    out, lse = decode_reference(query, *rest, **arguments)
    flat_out, flat_lse = decode_reference(query.squeeze(1), *rest, **arguments)
    assert torch.equal(flat_out, out.squeeze(1))
    assert torch.equal(flat_lse, lse.squeeze(1))


def test_rows_without_a_key_are_zero_and_minus_infinity() -> None:
    case = Case((0, 1), q_len=3, num_heads=2, page_size=4, latent=6, rope=2)
    out, lse = decode_reference(*case.inputs().positional, kv_lora_rank=6, softmax_scale=1.0)
    assert (lse.isinf() == torch.tensor([[True] * 3, [True, True, False]]).unsqueeze(-1)).all()
    assert (out[lse == -math.inf] == 0).all()


def test_keys_of_a_negative_table_entry_are_absent() -> None:
    case = Case((12,), num_heads=2, page_size=4, latent=6, rope=2)
    query, kv_cache, block_tables, seq_lens = case.inputs().positional
    arguments = {"kv_lora_rank": 6, "softmax_scale": 1.0}
    holed = block_tables.clone()
    holed[0, 1] = -1
    without = block_tables[:, [0, 2]]
    out, lse = decode_reference(query, kv_cache, holed, seq_lens, **arguments)
    expected = decode_reference(query, kv_cache, without, torch.tensor([8]), **arguments)
    assert_close_elementwise(out, expected[0], 1e-15, 1e-15, "out")
    assert_close_elementwise(lse, expected[1], 1e-15, 1e-15, "lse")

"""FlashInfer's CuTe DSL MLA decode, a published SM100 kernel, gives on the emulator what the maths gives."""

from __future__ import annotations

import pytest
import torch
from flashinfer_mla import KV_LORA_RANK, QK_ROPE_HEAD_DIM, decode_call, installed
from ptx_emulator import Options

pytestmark = pytest.mark.skipif(not installed(), reason="needs flashinfer-python; see nox -s peers")

# Against float64 on the rounded inputs: P is rounded to the input's dtype, O to that of the output.
O_BOUNDS = {torch.bfloat16: 8e-3, torch.float16: 2e-3, torch.float8_e4m3fn: 4e-2}
LSE_BOUND = 2e-5


def problem(
    batch: int, max_seq_len: int, page_size: int, dtype: torch.dtype, num_heads: int = 128
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs of a decode with a shuffled page table; unused entries of it are -1."""
    generator = torch.Generator().manual_seed(batch * max_seq_len)
    head_dim = KV_LORA_RANK + QK_ROPE_HEAD_DIM
    pages = -(-max_seq_len // page_size)
    seq_lens = torch.tensor([max_seq_len - 77 * b for b in range(batch)], dtype=torch.int32)
    query = torch.randn(batch, 1, num_heads, head_dim, generator=generator).to(dtype)
    kv_cache = torch.randn(batch * pages, page_size, head_dim, generator=generator).to(dtype)
    order = torch.randperm(batch * pages, generator=generator)
    block_tables = order.view(batch, pages).to(torch.int32)
    return query, kv_cache, block_tables, seq_lens


def reference(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """O [B, 1, H, 512] and LSE [B, 1, H] in float64."""
    outs, lses = [], []
    for q, table, length in zip(query.double(), block_tables, seq_lens, strict=True):
        keys = kv_cache.double()[table.long()].flatten(0, 1)[: int(length)]
        scores = q[0] @ keys.T * scale
        lses.append(scores.logsumexp(-1))
        outs.append(scores.softmax(-1) @ keys[:, :KV_LORA_RANK])
    return torch.stack(outs)[:, None], torch.stack(lses)[:, None]


CASES = [
    pytest.param(1, 256, 128, torch.bfloat16, id="B1-256-bf16"),
    pytest.param(1, 256, 128, torch.float8_e4m3fn, id="B1-256-fp8"),
    pytest.param(2, 300, 64, torch.float16, id="B2-300-p64-fp16"),
    pytest.param(4, 4096, 128, torch.bfloat16, id="B4-4096-bf16"),
]


@pytest.mark.parametrize(("batch", "max_seq_len", "page_size", "dtype"), CASES)
def test_mla_decode(batch: int, max_seq_len: int, page_size: int, dtype: torch.dtype) -> None:
    inputs = problem(batch, max_seq_len, page_size, dtype)
    scale = (128 + QK_ROPE_HEAD_DIM) ** -0.5 / 2
    decode = decode_call(*inputs, softmax_scale=scale, max_seq_len=max_seq_len)
    decode.job.run(Options(checks=False))
    out, lse = reference(*inputs, scale)
    assert (decode.out.double() - out).abs().max() < O_BOUNDS[dtype]
    assert (decode.lse.double() - lse).abs().max() < LSE_BOUND * lse.abs().max()

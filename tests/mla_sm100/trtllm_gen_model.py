"""FlashInfer's trtllm-gen MLA decode, modelled on the CPU from its sources (0.7.2).

`paged_attention_decode` stands for the compiled launcher and its kernels, with what they demand and what they
leave undone; `trtllm_batch_decode_with_kv_cache_mla` stands for the public function before it. The tests in
tests/peers hold the second against the installed package, and put the first under the package's own code.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

LOG2_E = math.log2(math.e)
SM_COUNT = 1  # that of the CPU, as kernel_dispatch counts it
LONGEST_UNSPLIT = 512  # from here on keys are spread over blocks, which are merged afterwards
STATS_GUARD_BYTES = 1 << 20

CALLS: list[dict[str, Any]] = []  # the arguments of every public call, defaults included
COUNTERS: list[torch.Tensor] = []  # the counters of every launch


def get_trtllm_gen_multi_ctas_kv_counter_bytes(batch_size: int, num_qo_heads: int, sm_count: int) -> int:
    """Bytes of counters."""
    return -(-max(batch_size * num_qo_heads, sm_count) // 8) * 8 * 4


def trtllm_batch_decode_with_kv_cache_mla(
    query,
    kv_cache,
    workspace_buffer,
    qk_nope_head_dim,
    kv_lora_rank,
    qk_rope_head_dim,
    block_tables,
    seq_lens,
    max_seq_len,
    sparse_mla_top_k=0,
    out=None,
    bmm1_scale=1.0,
    bmm2_scale=1.0,
    sinks=None,
    skip_softmax_threshold_scale_factor=None,
    enable_pdl=None,
    backend="auto",
    is_var_seq=True,
    uses_shared_paged_kv_idx=True,
    lse=None,
    return_lse=False,
    cute_dsl_impl="auto",
    kv_scale_format="auto",
    cum_seq_lens_q=None,
    max_q_len=None,
    multi_ctas_kv_counter_buffer=None,
    sparse_mla_top_k_lens=None,
    enable_dcp=False,
    cp_world=1,
    cp_rank=0,
    causal_seqlens_kv_global=None,
    use_fp16_softmax=None,
    return_lse_base=None,
):
    """The public function, as far as the provider uses it."""
    CALLS.append(dict(locals()))
    assert backend == "trtllm-gen"
    if isinstance(bmm1_scale, torch.Tensor):
        bmm1_scale = bmm1_scale * LOG2_E
    ragged = cum_seq_lens_q is not None
    assert not (ragged and return_lse)
    batch = len(seq_lens)
    paged_attention_decode(
        out,
        None,
        query if ragged else query.flatten(0, 1),
        kv_cache.unsqueeze(1),
        kv_cache.unsqueeze(1),
        workspace_buffer,
        multi_ctas_kv_counter_buffer,
        block_tables,
        seq_lens,
        max_q_len if ragged else query.shape[1],
        max_seq_len,
        bmm1_scale,
        bmm2_scale,
        -1,
        -1,
        0,
        batch,
        -1,
        sparse_mla_top_k,
        SM_COUNT,
        bool(enable_pdl),
        workspace_buffer.numel(),
        sinks,
        cum_seq_lens_q,
        None,
        None,
        skip_softmax_threshold_scale_factor,
        uses_shared_paged_kv_idx,
        lse,
        1.0 / LOG2_E if return_lse_base == "basee" else 1.0,
        lse.stride(0) if return_lse else 0,
        lse.stride(1) if return_lse else 0,
        False,
        sparse_mla_top_k_lens,
        0,
        use_fp16_softmax,
    )
    return (out, lse) if return_lse else out


def paged_attention_decode(
    out,
    out_scale_factor,
    query,  # [tokens, num_heads, head_dim]
    key_cache,  # [num_pages, 1, page_size, head_dim]
    value_cache,
    workspace,
    counters,
    block_tables,
    seq_lens,
    max_q_len,
    max_kv_len,
    bmm1_scale,  # a float in natural units, or a tensor times log2(e)
    bmm2_scale,
    o_sf_scale,
    o_sf_vec_size,
    o_sf_start_index,
    batch,
    window_left,
    sparse_top_k,
    sm_count,
    enable_pdl,
    workspace_size,
    sinks,
    cum_seq_lens_q,
    key_block_scales,
    value_block_scales,
    skip_softmax_threshold,
    shared_page_index,
    lse,
    lse_scale,
    lse_stride_tokens,
    lse_stride_heads,
    block_sparse,
    sparse_top_k_lens,
    transform_mode,
    fp16_softmax,
):
    """The launcher: everything but query, cache and LSE is read as contiguous, whatever its strides say."""
    options = (out_scale_factor, sinks, key_block_scales, value_block_scales, skip_softmax_threshold)
    assert all(option is None for option in options)
    assert (window_left, sparse_top_k, sparse_top_k_lens, block_sparse) == (-1, 0, None, False)
    assert (o_sf_scale, o_sf_vec_size, o_sf_start_index, transform_mode) == (-1, -1, 0, 0)
    assert not fp16_softmax
    assert shared_page_index
    assert key_cache is value_cache or key_cache.data_ptr() == value_cache.data_ptr()
    assert isinstance(enable_pdl, bool)
    tokens, num_heads, _ = query.shape
    assert num_heads <= 64 or num_heads == 128
    page_size = key_cache.shape[2]
    assert page_size in (32, 64)
    assert out.dtype is torch.bfloat16
    latent = out.shape[-1]
    _use_counters(counters, batch, num_heads, sm_count)
    _use_scratch(workspace, workspace_size, batch, num_heads, max_q_len, latent, sm_count, lse is not None)
    device_scale = isinstance(bmm1_scale, torch.Tensor)
    assert isinstance(bmm2_scale, torch.Tensor) == device_scale
    assert not device_scale or query.dtype is torch.float8_e4m3fn
    scale_log2 = torch.as_tensor(bmm1_scale if device_scale else bmm1_scale * LOG2_E, dtype=torch.float32)
    tables = _contiguous_view(block_tables, (batch, block_tables.shape[-1]))
    out_rows = _contiguous_view(out, (tokens, num_heads, latent))
    if cum_seq_lens_q is None:
        assert tokens == batch * max_q_len
        offsets = [max_q_len * request for request in range(batch + 1)]
    else:
        offsets = cum_seq_lens_q.tolist()
    split = max_kv_len > LONGEST_UNSPLIT
    for request, (first, last) in enumerate(itertools.pairwise(offsets)):
        assert last - first <= max_q_len
        for token in range(first, last):
            num_keys = max(int(seq_lens[request]) - (last - first) + (token - first) + 1, 0)
            assert num_keys <= max_kv_len
            stats = _attend(
                query[token],
                key_cache,
                tables[request],
                num_keys,
                scale_log2,
                bmm2_scale,
                out_rows[token],
                split,
            )
            if lse is not None:
                row = torch.as_strided(
                    lse,
                    (num_heads,),
                    (lse_stride_heads,),
                    lse.storage_offset() + token * lse_stride_tokens,
                )
                row.copy_(stats * lse_scale)


def _attend(rows, cache, table, num_keys, scale_log2, output_scale, out, split):
    """One token: writes `out` [num_heads, latent] and returns the LSE in base 2, [num_heads]."""
    if num_keys == 0:
        if split:
            out.fill_(math.nan)  # merging nothing divides by a sum of zero; alone, a block returns early
        return torch.full((len(rows),), math.nan)  # FlashInfer promises nothing here
    page_size = cache.shape[2]
    pages = table[: -(-num_keys // page_size)].long()
    keys = cache[:, 0].double()[pages.clamp(min=0)] * (pages >= 0)[:, None, None]  # outside: TMA gives zeros
    keys = keys.flatten(0, 1)[:num_keys]
    logits = rows.double() @ keys.T * scale_log2.double()
    stats = torch.logsumexp(logits * math.log(2), dim=-1) / math.log(2)
    weights = torch.exp2(logits - stats[:, None])
    out.copy_(weights @ keys[:, : out.shape[-1]] * float(output_scale))
    return stats


def _use_counters(counters, batch, num_heads, sm_count):
    """They come in as zeros and leave so; launches in flight must not share them."""
    assert counters.is_contiguous()
    assert counters.data_ptr() % 16 == 0
    needed = get_trtllm_gen_multi_ctas_kv_counter_bytes(batch, num_heads, sm_count)
    assert counters.numel() * counters.element_size() >= needed
    assert not counters.view(torch.uint8).any(), "the kernel hangs or merges too early: counters are not zero"
    COUNTERS.append(counters)


def _use_scratch(workspace, workspace_size, batch, num_heads, max_q_len, latent, sm_count, wants_lse):
    """What is there is overwritten; nothing checks that it is enough."""
    needed = sm_count * 64 * (8 + 2 * latent)
    if wants_lse:
        needed += 8 * num_heads * batch * (-(-max_q_len // 256) * 256) + STATS_GUARD_BYTES
    assert workspace_size == workspace.numel() >= needed
    assert workspace.data_ptr() % 16 == 0
    workspace.view(torch.uint8).fill_(0xA5)


def _contiguous_view(tensor, shape):
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return torch.as_strided(tensor, shape, strides)

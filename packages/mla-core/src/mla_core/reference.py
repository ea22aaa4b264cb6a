"""Decode in float64, one request and one query token at a time: the oracle that every kernel is held against.

s_k = softmax_scale * (q_latent . c_latent_k + q_rope . k_rope_k)
out = output_scale * sum_k softmax(s)_k c_latent_k        lse = log sum_k exp(s_k)
"""

from __future__ import annotations

import math

import torch

from .specs import Scale


def decode_reference(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    kv_lora_rank: int = 512,
    softmax_scale: Scale,
    output_scale: Scale = 1.0,
    cum_seq_lens_q: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out [..., num_heads, kv_lora_rank] and lse [..., num_heads], shaped as the query, in float64.

    query: [batch, q_len, num_heads, head_dim], or [batch, num_heads, head_dim] for one token per request, or
        [total_q, num_heads, head_dim] with cum_seq_lens_q [batch + 1].
    kv_cache: [num_pages, page_size, head_dim], or with a unit dimension after the first.
    block_tables: [batch, max_pages]; keys of a negative entry are absent.
    seq_lens: [batch], keys per request; query token i of q_len sees the keys before seq_len - q_len + i + 1.

    A row that sees no key gets zeros and lse = -inf. Inputs are upcast exactly and are not checked.
    """
    pages = kv_cache[:, 0] if kv_cache.dim() == 4 else kv_cache
    if cum_seq_lens_q is not None:
        offsets = [int(offset) for offset in cum_seq_lens_q]
        tokens = query
    else:
        q_len = 1 if query.dim() == 3 else query.shape[1]
        offsets = [request * q_len for request in range(len(seq_lens) + 1)]
        tokens = query.reshape(-1, *query.shape[-2:])

    out = torch.zeros(*tokens.shape[:-1], kv_lora_rank, dtype=torch.float64)
    lse = torch.full(tokens.shape[:-1], -math.inf, dtype=torch.float64)
    for request in range(len(seq_lens)):
        keys, positions = _keys_of(pages, block_tables[request], int(seq_lens[request]))
        first, last = offsets[request], offsets[request + 1]
        for token in range(first, last):
            visible = positions < int(seq_lens[request]) - (last - token) + 1
            if not visible.any():
                continue
            rows = tokens[token].cpu().double()  # [num_heads, head_dim]
            scores = float(softmax_scale) * rows @ keys[visible].T
            lse[token] = torch.logsumexp(scores, dim=-1)
            weights = torch.exp(scores - lse[token].unsqueeze(-1))
            out[token] = float(output_scale) * weights @ keys[visible, :kv_lora_rank]
    return out.reshape(*query.shape[:-1], kv_lora_rank), lse.reshape(query.shape[:-1])


def _keys_of(pages: torch.Tensor, table: torch.Tensor, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The present keys of one request [keys, head_dim] in float64 and their positions [keys]."""
    page_size, head_dim = pages.shape[-2:]
    keys = [torch.empty(0, head_dim, dtype=torch.float64)]
    positions = [torch.empty(0, dtype=torch.int64)]
    for start in range(0, seq_len, page_size):
        page = int(table[start // page_size])
        if page >= 0:
            stop = min(start + page_size, seq_len)
            keys.append(pages[page, : stop - start].cpu().double())
            positions.append(torch.arange(start, stop))
    return torch.cat(keys), torch.cat(positions)

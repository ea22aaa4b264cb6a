"""Decode in plain PyTorch: online softmax over chunks of keys, on the CPU and on any GPU.

Per chunk of keys, with s = softmax_scale * q . k (minus infinity where the row may not see the key):
    m' = max(m, max s)        p = exp(s - m')        decay = exp(m - m')
    l' = l * decay + sum p    acc' = acc * decay + p . c_latent
and finally out = output_scale * acc / l, lse = m + log l.

Work is cut into tiles of requests, query tokens and keys, so that the temporary memory does not grow with the
problem. The number of chunks follows from max_seq_len (on the CPU, from the longest sequence), never from a
value on a GPU: nothing synchronises, and a call can be captured in a CUDA graph.

A request's result does not depend on the other requests: no product mixes them, every chunk has the same
width, a chunk that a request does not reach leaves its running values as they are, and on a GPU, where the
matrix library chooses its algorithm by the number of requests too, every tile is filled up to one size.
Products are in float32 at the precision set by `torch.set_float32_matmul_precision`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from kernel_dispatch import Arch

from .problem import DecodeProblem
from .specs import Scale

CHUNK_KEYS = 256
TILE_ROWS = 512  # (query token, head) rows of a request that are processed at a time
TEMPORARY_BYTES = 128 << 20  # of a call, at most; or those of one request's tile if they are more

FLOAT32_BYTES = 4
FLOAT8_MAX = torch.finfo(torch.float8_e4m3fn).max


class TorchKernel:
    """The kernel object of the provider `torch`: it needs no workspace and has one tactic."""

    def workspace_nbytes(self, problem: DecodeProblem, arch: Arch, tactic: str | None = None) -> int:
        """None: temporaries come from PyTorch's caching allocator."""
        return 0

    def tactics(self, problem: DecodeProblem, arch: Arch) -> Sequence[str]:
        """The one tactic there is."""
        return ("chunked",)

    def prepare(
        self, problem: DecodeProblem, arch: Arch, device: torch.device, tactic: str
    ) -> Callable[..., None]:
        """The launcher of a problem; there is nothing to compile."""
        return Launcher(problem)


@dataclass(frozen=True)
class Units:
    """What is attended independently: a request with all its tokens, or one token of a ragged query.

    query: [units, tokens, num_heads, head_dim]. out: alike, of kv_lora_rank. lse: without the last dimension.
    block_tables: [units, max_pages].
    key_limit: [units, tokens], int64; a token sees the keys before its limit (none where it is not positive).
    """

    query: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor | None
    block_tables: torch.Tensor
    key_limit: torch.Tensor

    def tile(self, units: slice, tokens: slice) -> Units:
        """Views of some units and some of their tokens."""
        lse = None if self.lse is None else self.lse[units, tokens]
        limit = self.key_limit[units, tokens]
        return Units(self.query[units, tokens], self.out[units, tokens], lse, self.block_tables[units], limit)

    def store(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Write float32 results, of which there may be more than units; rows that saw no key become zero."""
        out, lse = out[: self.out.shape[0]], lse[: self.out.shape[0]]
        out.masked_fill_(torch.isneginf(lse).unsqueeze(-1), 0.0)
        if self.out.dtype is torch.float8_e4m3fn:
            out.clamp_(-FLOAT8_MAX, FLOAT8_MAX)  # saturate; NaN stays NaN
        self.out.copy_(out)
        if self.lse is not None:
            self.lse.copy_(lse)


@dataclass(frozen=True)
class Launcher:
    """Launches one problem; the arguments are those of every launcher of `mla_core.decode.v1`."""

    problem: DecodeProblem

    @torch.no_grad()
    def __call__(
        self,
        query: torch.Tensor,  # [batch, q_len, num_heads, head_dim], or ragged [total_q, num_heads, head_dim]
        kv_cache: torch.Tensor,  # [num_pages, page_size, head_dim]
        block_tables: torch.Tensor,  # [batch, max_pages] int32
        seq_lens: torch.Tensor,  # [batch] int32
        cum_seq_lens_q: torch.Tensor | None,  # [batch + 1] int32
        softmax_scale: Scale,
        output_scale: Scale,
        out: torch.Tensor,  # [..., num_heads, kv_lora_rank]
        lse: torch.Tensor | None,  # [..., num_heads] float32
        workspace: torch.Tensor | None,
    ) -> None:
        """Write `out` and, where given, `lse`."""
        if cum_seq_lens_q is None:
            units = _units_of_requests(query, out, lse, block_tables, seq_lens)
        else:
            units = _units_of_tokens(query, out, lse, block_tables, seq_lens, cum_seq_lens_q)
        num_keys = self.problem.max_seq_len
        if seq_lens.device.type == "cpu":
            num_keys = int(seq_lens.max())
        unit_tile, token_tile = self._tile_shape()
        for first_unit in range(0, units.query.shape[0], unit_tile):
            for first_token in range(0, units.query.shape[1], token_tile):
                tile = units.tile(
                    slice(first_unit, first_unit + unit_tile), slice(first_token, first_token + token_tile)
                )
                fill_to = unit_tile if query.is_cuda else 0
                tile_out, tile_lse = _attend(
                    _filled_up(tile.query.float(), fill_to),
                    kv_cache,
                    _filled_up(tile.block_tables, fill_to),
                    _filled_up(tile.key_limit, fill_to),
                    num_keys,
                    _scalar(softmax_scale),
                    self.problem.kv_lora_rank,
                )
                tile.store(tile_out * _scalar(output_scale), tile_lse)

    def _tile_shape(self) -> tuple[int, int]:
        """Requests (or ragged tokens) and tokens per request of a tile; independent of the batch."""
        problem = self.problem
        tokens = 1 if problem.ragged else min(problem.q_len, max(1, TILE_ROWS // problem.num_heads))
        rows = tokens * problem.num_heads
        key_elements = CHUNK_KEYS * problem.head_dim * 3  # gathered, upcast, masked
        row_elements = problem.head_dim + 4 * problem.kv_lora_rank + 4 * CHUNK_KEYS  # query, output, scores
        unit_bytes = FLOAT32_BYTES * (key_elements + rows * row_elements)
        return max(1, TEMPORARY_BYTES // unit_bytes), tokens


def _units_of_requests(
    query: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
) -> Units:
    q_len = query.shape[1]
    token = torch.arange(q_len, device=query.device)
    key_limit = seq_lens.long().unsqueeze(1) - q_len + token + 1
    return Units(query, out, lse, block_tables, key_limit)


def _units_of_tokens(
    query: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    cum_seq_lens_q: torch.Tensor,
) -> Units:
    token = torch.arange(query.shape[0], device=query.device, dtype=torch.int32)
    request = torch.searchsorted(cum_seq_lens_q[1:].contiguous(), token, right=True)
    tokens_to_end = cum_seq_lens_q[request + 1] - token  # including this one
    key_limit = seq_lens[request].long() - tokens_to_end + 1
    return Units(
        query.unsqueeze(1),
        out.unsqueeze(1),
        None if lse is None else lse.unsqueeze(1),
        block_tables[request],
        key_limit.unsqueeze(1),
    )


def _attend(
    query: torch.Tensor,  # [units, tokens, num_heads, head_dim] float32
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,  # [units, max_pages]
    key_limit: torch.Tensor,  # [units, tokens]
    num_keys: int,
    softmax_scale: Scale,
    kv_lora_rank: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [units, tokens, num_heads, kv_lora_rank] and lse [units, tokens, num_heads] in float32."""
    units, tokens, num_heads, head_dim = query.shape
    rows = query.reshape(units, tokens * num_heads, head_dim)
    row_limit = key_limit.repeat_interleave(num_heads, dim=1).unsqueeze(-1)  # [units, rows, 1]
    row_max = rows.new_full((units, tokens * num_heads, 1), -math.inf)
    row_sum = torch.zeros_like(row_max)
    acc = rows.new_zeros(units, tokens * num_heads, kv_lora_rank)
    for first_key in range(0, num_keys, CHUNK_KEYS):
        position = torch.arange(first_key, first_key + CHUNK_KEYS, device=query.device)
        keys, present = _gather(kv_cache, block_tables, key_limit[:, -1:], position)
        scores = torch.bmm(rows, keys.transpose(1, 2)).mul_(softmax_scale)
        visible = (position < row_limit) & present.unsqueeze(1)
        scores.masked_fill_(~visible, -math.inf)
        new_max = torch.maximum(row_max, scores.amax(dim=-1, keepdim=True))
        finite_max = new_max.masked_fill(torch.isneginf(new_max), 0.0)  # -inf - -inf would be NaN
        weights = scores.sub_(finite_max).exp_()
        decay = torch.exp(row_max - finite_max)
        row_sum = row_sum * decay + weights.sum(dim=-1, keepdim=True)
        acc.mul_(decay).add_(torch.bmm(weights, keys[..., :kv_lora_rank]))
        row_max = new_max
    lse = (row_max + row_sum.log()).squeeze(-1)
    shape = (units, tokens, num_heads)
    return acc.div_(row_sum).view(*shape, kv_lora_rank), lse.view(shape)


def _gather(
    kv_cache: torch.Tensor, block_tables: torch.Tensor, seq_len: torch.Tensor, position: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [units, keys, head_dim] in float32, zero where absent, and which are present [units, keys].

    seq_len [units, 1] bounds the keys read: table entries and page slots beyond it are not looked at, and
    what a clamped index reads in their place is overwritten (a zero weight would not do: 0 * NaN is NaN).
    """
    page_size = kv_cache.shape[1]
    column = (position // page_size).clamp_(max=block_tables.shape[1] - 1)  # a chunk may outreach the table
    page = block_tables[:, column].long()
    present = (position < seq_len) & (page >= 0)
    page = page.masked_fill(~present, 0)
    fp8 = kv_cache.dtype is torch.float8_e4m3fn
    elements = kv_cache.view(torch.uint8) if fp8 else kv_cache  # torch 2.9 cannot index fp8 on a CPU
    keys = elements[page, position % page_size].view(kv_cache.dtype).float()
    return keys.masked_fill_(~present.unsqueeze(-1), 0.0), present


def _scalar(scale: Scale) -> Scale:
    return scale.reshape(()) if isinstance(scale, torch.Tensor) else scale


def _filled_up(tensor: torch.Tensor, units: int) -> torch.Tensor:
    """`tensor` with zeros, which are units without keys, behind its first dimension up to `units`."""
    missing = units - tensor.shape[0]
    if missing <= 0:
        return tensor
    return torch.cat((tensor, tensor.new_zeros(missing, *tensor.shape[1:])))

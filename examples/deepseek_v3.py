"""DeepSeek-V3 of transformers, its attention replaced by absorbed MLA decode over a paged latent cache.

The stock module expands the cached latents to per-head keys and values. Here the up-projections are absorbed:

    q_latent[h] = q_nope[h] @ W_UK[h]            [qk_nope_head_dim] -> [kv_lora_rank]
    o_latent[h] = mla_core.decode(q_latent[h] | q_rope[h], cached latents)
    attn_out[h] = o_latent[h] @ W_UV[h].T        [kv_lora_rank] -> [v_head_dim]

so that attention reads one [kv_lora_rank + qk_rope_head_dim] row per cached token, whatever the head count.

Prefill, decode and the verification of drafts are the same call; they differ in query tokens per request. All
requests travel in one ragged batch: `model(input_ids [1, total_q])`, one request after the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import mla_core
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as stock

UNUSED_PAGE = -1  # block table entries past the last page of a request; never read


def small_config(num_heads: int) -> DeepseekV3Config:
    """Two dense layers and one MoE layer with DeepSeek-V3's latent and rope sizes and its YaRN scaling."""
    return DeepseekV3Config(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        first_k_dense_replace=2,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        q_lora_rank=96,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=64,
        v_head_dim=64,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        num_nextn_predict_layers=0,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    )


@dataclasses.dataclass(frozen=True)
class Step:
    """Where the tokens of one forward pass go in the cache, and what each request attends to.

    block_tables    [B, max_pages] int32, of the same width in every step
    seq_lens        [B] int32, lengths with the new tokens included
    token_pages     [total_q] int64, page of each new token; token_offsets: its row within that page
    positions       [total_q] int64, position of each new token within its request
    q_lens          new tokens of each request
    cum_seq_lens_q  [B + 1] int32
    max_seq_len     what a request may grow to; the same in every step
    """

    block_tables: Tensor
    seq_lens: Tensor
    token_pages: Tensor
    token_offsets: Tensor
    positions: Tensor
    q_lens: tuple[int, ...]
    cum_seq_lens_q: Tensor
    max_seq_len: int


class PagedLatentCache:
    """Latent rows of all layers and requests in pages of `page_size` rows, handed out in a shuffled order.

    pages [num_layers, num_pages, page_size, kv_lora_rank + qk_rope_head_dim]. Rows that hold no token are
    NaN, so reading one shows in the output. No request grows beyond `max_seq_len` tokens: block tables are as
    wide as that takes from the start, so that a growing request poses the same problem at every step. Kernels
    are then planned once, and a step could be captured in a CUDA graph.
    """

    def __init__(
        self, model: DeepseekV3ForCausalLM, num_pages: int, page_size: int, max_seq_len: int, seed: int = 0
    ) -> None:
        config = model.config
        row = config.kv_lora_rank + config.qk_rope_head_dim
        shape = (config.num_hidden_layers, num_pages, page_size, row)
        self.pages = torch.full(shape, torch.nan, dtype=model.dtype, device=model.device)
        self.page_size, self.max_seq_len = page_size, max_seq_len
        self.max_pages = -(-max_seq_len // page_size)
        self.free_pages = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed)).tolist()
        self.request_pages: list[list[int]] = []
        self.seq_lens: list[int] = []

    def admit(self) -> int:
        """A new empty request's number."""
        self.request_pages.append([])
        self.seq_lens.append(0)
        return len(self.seq_lens) - 1

    def extend(self, requests: Sequence[int], q_lens: Sequence[int]) -> Step:
        """Make room for `q_lens[i]` more tokens of `requests[i]`; pages are written later."""
        pages, offsets, positions = [], [], []
        for request, q_len in zip(requests, q_lens, strict=True):
            start = self.seq_lens[request]
            if start + q_len > self.max_seq_len:
                grown = f"request {request} grows to {start + q_len} tokens"
                raise RuntimeError(f"{grown}, the cache was built for {self.max_seq_len}")
            self.seq_lens[request] = start + q_len
            while len(self.request_pages[request]) * self.page_size < start + q_len:
                if not self.free_pages:
                    raise RuntimeError(f"no free page for request {request}: the cache is full")
                self.request_pages[request].append(self.free_pages.pop())
            for position in range(start, start + q_len):
                pages.append(self.request_pages[request][position // self.page_size])
                offsets.append(position % self.page_size)
                positions.append(position)
        device = self.pages.device
        tables = torch.full((len(requests), self.max_pages), UNUSED_PAGE, dtype=torch.int32)
        for table, request in zip(tables, requests, strict=True):
            used = self.request_pages[request]
            table[: len(used)] = torch.tensor(used, dtype=torch.int32)
        return Step(
            block_tables=tables.to(device),
            seq_lens=torch.tensor([self.seq_lens[r] for r in requests], dtype=torch.int32, device=device),
            token_pages=torch.tensor(pages, device=device),
            token_offsets=torch.tensor(offsets, device=device),
            positions=torch.tensor(positions, device=device),
            q_lens=tuple(q_lens),
            cum_seq_lens_q=torch.tensor([0, *q_lens]).cumsum(0).to(torch.int32).to(device),
            max_seq_len=self.max_seq_len,
        )

    def truncate(self, request: int, seq_len: int) -> None:
        """Forget the tokens of `request` from `seq_len` on; rows become NaN, whole pages free."""
        pages = self.request_pages[request]
        kept_pages = -(-seq_len // self.page_size)
        if seq_len % self.page_size:
            self.pages[:, pages[kept_pages - 1], seq_len % self.page_size :] = torch.nan
        self.pages[:, pages[kept_pages:]] = torch.nan
        self.free_pages += pages[kept_pages:]
        del pages[kept_pages:]
        self.seq_lens[request] = seq_len


class PagedMLAAttention(nn.Module):
    """Takes the place of a `DeepseekV3Attention`, whose projections it keeps using.

    backend: for `mla_core.decode`.
    """

    def __init__(self, attention: stock.DeepseekV3Attention, backend: str) -> None:
        super().__init__()
        self.attention = attention
        self.backend = backend

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        *,
        cache: PagedLatentCache,
        step: Step,
        **unused: object,
    ) -> tuple[Tensor, None]:
        """hidden_states [1, total_q, hidden_size]; writes the new latents to the layer's pages of `cache`.

        transformers also passes its own mask, positions and cache, for which `step` stands.
        """
        q_nope, q_rope = self._queries(hidden_states)
        c_latent, k_rope = self._latents(hidden_states)
        rotate = stock.apply_rotary_pos_emb_interleave
        if not self.attention.config.rope_interleave:
            rotate = stock.apply_rotary_pos_emb
        q_rope, k_rope = rotate(q_rope, k_rope, *position_embeddings, unsqueeze_dim=2)

        kv_cache = cache.pages[self.attention.layer_idx]
        kv_cache[step.token_pages, step.token_offsets] = torch.cat([c_latent[0], k_rope[0, :, 0]], dim=-1)

        w_uk, w_uv = self._up_projections()
        q_latent = torch.einsum("thn,hnc->thc", q_nope[0], w_uk)
        o_latent = self._decode(torch.cat([q_latent, q_rope[0]], dim=-1), kv_cache, step)
        attn_out = torch.einsum("thc,hvc->thv", o_latent, w_uv)
        return self.attention.o_proj(attn_out.flatten(1))[None], None

    def _queries(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """q_nope [1, total_q, H, qk_nope_head_dim] and q_rope [1, total_q, H, qk_rope_head_dim]."""
        attention = self.attention
        if attention.q_lora_rank is None:
            q = attention.q_proj(hidden_states)
        else:
            q = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(hidden_states)))
        sizes = [attention.qk_nope_head_dim, attention.qk_rope_head_dim]
        return q.unflatten(-1, (attention.num_heads, sum(sizes))).split(sizes, dim=-1)

    def _latents(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """c_latent [1, total_q, kv_lora_rank] and k_rope [1, total_q, 1, qk_rope_head_dim], unrotated."""
        attention = self.attention
        sizes = [attention.kv_lora_rank, attention.qk_rope_head_dim]
        c_latent, k_rope = attention.kv_a_proj_with_mqa(hidden_states).split(sizes, dim=-1)
        return attention.kv_a_layernorm(c_latent), k_rope.unsqueeze(2)

    def _up_projections(self) -> tuple[Tensor, Tensor]:
        """W_UK [H, qk_nope_head_dim, kv_lora_rank] and W_UV [H, v_head_dim, kv_lora_rank], views."""
        attention = self.attention
        sizes = [attention.qk_nope_head_dim, attention.v_head_dim]
        return attention.kv_b_proj.weight.unflatten(0, (attention.num_heads, sum(sizes))).split(sizes, dim=1)

    def _decode(self, query: Tensor, kv_cache: Tensor, step: Step) -> Tensor:
        """query [total_q, H, kv_lora_rank + qk_rope_head_dim] -> latent output [total_q, H, kv_lora_rank].

        Equal numbers of query tokens make a dense batch, others a ragged one.
        """
        arguments = {
            "block_tables": step.block_tables,
            "seq_lens": step.seq_lens,
            "kv_lora_rank": self.attention.kv_lora_rank,
            "qk_rope_head_dim": self.attention.qk_rope_head_dim,
            "softmax_scale": self.attention.scaling,
            "max_seq_len": step.max_seq_len,
            "backend": self.backend,
        }
        if len(set(step.q_lens)) == 1:
            dense = query.unflatten(0, (len(step.q_lens), step.q_lens[0]))  # [B, q_len, H, head_dim]
            return mla_core.decode(dense, kv_cache, **arguments).flatten(0, 1)
        ragged = {"cum_seq_lens_q": step.cum_seq_lens_q, "max_q_len": max(step.q_lens)}
        return mla_core.decode(query, kv_cache, **arguments, **ragged)


def patch(model: DeepseekV3ForCausalLM, backend: str = "auto") -> None:
    """Replace the attention of every layer of `model`, in place; weights stay shared and unchanged.

    Afterwards `model(...)` needs the keyword arguments `cache` and `step`, which `PagedEngine` supplies,
    and no longer takes a transformers cache. backend: for `mla_core.decode`.
    """
    for layer in model.model.layers:
        layer.self_attn = PagedMLAAttention(layer.self_attn, backend)


class PagedEngine:
    """Serves a patched model from a cache of its own; implements `common.Engine`."""

    def __init__(
        self, model: DeepseekV3ForCausalLM, num_pages: int, page_size: int, max_seq_len: int, seed: int = 0
    ) -> None:
        self.model = model
        self.cache = PagedLatentCache(model, num_pages, page_size, max_seq_len, seed)
        self.num_verified = 0

    def prefill(self, prompts: Sequence[Tensor]) -> Tensor:
        """Admit one request per prompt [prompt_len]; logits [B, vocab] after each prompt's last token."""
        requests = [self.cache.admit() for _ in prompts]
        logits, step = self._forward(requests, list(prompts))
        return logits[step.cum_seq_lens_q[1:] - 1]

    def decode(self, requests: Sequence[int], tokens: Tensor) -> Tensor:
        """Append tokens [n] to n requests; logits [n, vocab]."""
        return self._forward(requests, tokens.unsqueeze(1))[0]

    def verify(self, requests: Sequence[int], tokens: Tensor) -> Tensor:
        """Append tokens [n, T] provisionally; logits [n, T, vocab]. `commit` must follow."""
        self.num_verified = tokens.shape[1]
        return self._forward(requests, tokens)[0].unflatten(0, tokens.shape)

    def commit(self, requests: Sequence[int], kept: Sequence[int]) -> None:
        """Keep the first `kept[i]` verified tokens of `requests[i]`: drop the latents of the others."""
        for request, num_kept in zip(requests, kept, strict=True):
            self.cache.truncate(request, self.cache.seq_lens[request] - self.num_verified + num_kept)

    @torch.no_grad()
    def _forward(self, requests: Sequence[int], tokens: Sequence[Tensor] | Tensor) -> tuple[Tensor, Step]:
        """tokens: one [q_len] row per request. Logits [total_q, vocab], and where the tokens went."""
        step = self.cache.extend(requests, [len(row) for row in tokens])
        out = self.model(
            torch.cat(list(tokens))[None],
            position_ids=step.positions[None],
            use_cache=False,
            cache=self.cache,
            step=step,
        )
        return out.logits[0], step

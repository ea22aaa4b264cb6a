"""Qwen3-Next of transformers, its linear attention replaced by gdn_mtp decode and multi-token verify.

Per layer and request, Gated DeltaNet keeps a state [HV, V, K] and the last inputs of a short convolution.
Here the states live in a pool, and a request's states in a slot of it:

    prefill  the stock module's chunk function; its final state moves into the slot
    decode   gdn_mtp.gated_delta_rule_decode_pretranspose on the slot, in place
    verify   T = 1 + drafts tokens, a chain or a tree, such that drafts can be rejected

A recurrent state cannot be shortened as a KV cache can, so rejected drafts are undone by going back to the
state after the last accepted token. Three ways, all without recomputing anything:

    compact  gdn_mtp.verify keeps compact updates instead of states, and the next one is told which tokens
             are accepted; takes trees as well

    gather   gdn_mtp.gated_delta_rule_mtp leaves the pool as it is (`disable_state_update=True`), the states
             after each token go to a buffer, and commit copies the right one into the slot
    scatter  the states after each token go to spare slots (`ssm_state_indices`), and commit makes the right
             one the request's slot, copying nothing

Full-attention layers stay stock; their keys and values are kept per request, at each request's own length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import common
import gdn_mtp
import torch
from torch import Tensor, nn

with common.pytorch_models():
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
    from transformers.models.qwen3_next import modeling_qwen3_next as stock

PADDING = -1  # slot of a batch row that holds no request

Rollback = Literal["compact", "gather", "scatter"]


def small_config() -> Qwen3NextConfig:
    """Three Gated DeltaNet layers with Qwen3-Next's head size, then an attention layer, which has the MoE."""
    return Qwen3NextConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_hidden_layers=4,
        mlp_only_layers=[0, 1, 2],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        num_experts=8,
        num_experts_per_tok=2,
    )


class StatePool:
    """What the model remembers: recurrent states in pool slots; inputs of the convolution, keys and values.

    state[layer]         [num_slots, HV, V, K] float32; a slot that holds nothing is NaN
    caches[layer]        compact updates of the slots, with rollback "compact"
    conv[layer]          [num_requests + 1, conv_dim, kernel_size - 1]
    keys[layer], values  [num_requests + 1, num_kv_heads, max_len, head_dim]
    lengths              [num_requests + 1] int64, committed tokens
    slots                [num_requests + 1] int32, the request's pool slot; PADDING in the last row

    The last row belongs to padding: index -1 finds it, and what is written there is never used.
    """

    def __init__(
        self, model: Qwen3NextForCausalLM, num_requests: int, num_slots: int, max_len: int, num_compact: int
    ) -> None:
        """num_compact: tokens of a verify that keeps compact updates, 0 for none."""
        config, device, dtype = model.config, model.device, model.dtype
        state_shape = (
            config.linear_num_value_heads,
            config.linear_value_head_dim,
            config.linear_key_head_dim,
        )
        kv_shape = (config.num_key_value_heads, max_len, config.head_dim)
        rows = num_requests + 1
        self.state, self.conv, self.keys, self.values = {}, {}, {}, {}
        self.caches: dict[int, gdn_mtp.SpeculativeCache] = {}
        for index, layer in enumerate(model.model.layers):
            if layer.block_type == "linear_attention":
                conv_shape = (layer.linear_attn.net.conv_dim, config.linear_conv_kernel_dim - 1)
                self.state[index] = torch.full((num_slots, *state_shape), torch.nan, device=device)
                self.conv[index] = torch.zeros(rows, *conv_shape, dtype=dtype, device=device)
                if num_compact:
                    self.caches[index] = gdn_mtp.SpeculativeCache(
                        num_slots,
                        H=config.linear_num_key_heads,
                        HV=config.linear_num_value_heads,
                        K=config.linear_key_head_dim,
                        V=config.linear_value_head_dim,
                        max_tokens=num_compact,
                        io_dtype=dtype,
                        device=device,
                    )
            else:
                self.keys[index] = torch.zeros(rows, *kv_shape, dtype=dtype, device=device)
                self.values[index] = torch.zeros_like(self.keys[index])
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.slots = torch.full((rows,), PADDING, dtype=torch.int32, device=device)


@dataclasses.dataclass
class Step:
    """One forward pass over tokens [B, T]; the patched model takes it where transformers passes a cache.

    rows           [B] int64, the requests' rows of the pool; -1 is padding
    slots          [B] int32, their state slots; negative is padding
    positions      [B, T] int64, where keys and values are stored
    num_keys       keys and values each query may see at most
    kind           "prefill" (one request), "decode" (T = 1) or "verify"
    intermediate   verify with gather: [B, T, HV, V, K] float32 per layer
    spare_slots    verify with scatter: [B, T] int32
    accepted       verify with compact: num_accepted, accepted_nodes, one of them None, for gdn_mtp.verify
    parents        verify of trees: [B, T] int32, the token that each follows, -1 for the last committed one
    conv_windows   set by verify: [B, conv_dim, kernel_size - 1 + T] per layer
    """

    pool: StatePool
    rows: Tensor
    slots: Tensor
    positions: Tensor
    num_keys: int
    kind: Literal["prefill", "decode", "verify"]
    intermediate: dict[int, Tensor] | None = None
    spare_slots: Tensor | None = None
    accepted: tuple[Tensor | None, Tensor | None] | None = None
    parents: Tensor | None = None
    conv_windows: dict[int, Tensor] = dataclasses.field(default_factory=dict)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, num_kv_heads, T, head_dim] of an attention layer; return all of them."""
        stored = []
        for buffer, new in ((self.pool.keys[layer_idx], keys), (self.pool.values[layer_idx], values)):
            buffer[self.rows[:, None], :, self.positions] = new.transpose(1, 2)
            stored.append(buffer[self.rows, :, : self.num_keys])
        return stored[0], stored[1]

    def ancestors(self) -> Tensor:
        """[B, T, T] bool: whether token t (dimension 1) is token s (dimension 2) or follows it."""
        batch, T = self.positions.shape
        seen = torch.eye(T, dtype=torch.bool, device=self.positions.device).repeat(batch, 1, 1)
        if self.parents is None:
            return seen.cumsum(1) > 0
        for t in range(T):
            parent = self.parents[:, t].long()
            seen[:, t] |= seen[torch.arange(batch), parent.clamp_min(0)] & (parent >= 0)[:, None]
        return seen

    def token_positions(self) -> Tensor:
        """Position of each token in its request, [B, T] int64: siblings share one."""
        return self.positions[:, :1] + self.ancestors().sum(-1) - 1

    def causal_mask(self, dtype: torch.dtype) -> Tensor:
        """Additive mask [B, 1, T, num_keys]: each token sees its request up to itself, along its path."""
        key_positions = torch.arange(self.num_keys, device=self.positions.device)
        node = key_positions - self.positions[:, :1]  # [B, num_keys], negative for committed tokens
        index = node.clamp(0, self.positions.shape[1] - 1)[:, None].expand(*self.positions.shape, -1)
        seen = self.ancestors().gather(2, index) & (node < self.positions.shape[1])[:, None]
        hidden = ~(seen | (node < 0)[:, None])[:, None]
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(
            hidden, torch.finfo(dtype).min
        )


class PooledGatedDeltaNet(nn.Module):
    """Takes the place of a `Qwen3NextGatedDeltaNet`, whose projections, convolution and norm it keeps using.

    The gates stay raw: gdn_mtp computes the decay from A_log, a and dt_bias, and beta from b, in float32.
    """

    def __init__(self, net: stock.Qwen3NextGatedDeltaNet, backend: str) -> None:
        super().__init__()
        self.net = net
        self.backend = backend
        self.register_buffer("A_log", net.A_log.detach().float(), persistent=False)

    def forward(self, hidden_states: Tensor, cache_params: Step, **unused: object) -> Tensor:
        """hidden_states [B, T, hidden_size]; reads and writes the layer's states in `cache_params.pool`."""
        net, step = self.net, cache_params
        qkvz, ba = net.in_proj_qkvz(hidden_states), net.in_proj_ba(hidden_states)
        q, k, v, z, b, a = net.fix_query_key_value_ordering(qkvz, ba)
        mixed = self._convolve(torch.cat([x.flatten(2) for x in (q, k, v)], dim=-1), step)
        q, k, v = mixed.split([net.key_dim, net.key_dim, net.value_dim], dim=-1)
        q = q.unflatten(-1, (net.num_k_heads, net.head_k_dim))
        k = k.unflatten(-1, (net.num_k_heads, net.head_k_dim))
        v = v.unflatten(-1, (net.num_v_heads, net.head_v_dim))
        attend = {"prefill": self._prefill, "decode": self._decode, "verify": self._verify}[step.kind]
        out = attend(q, k, v, a, b, step)
        out = net.norm(out.reshape(-1, net.head_v_dim), z.reshape(-1, net.head_v_dim))
        return net.out_proj(out.view(*hidden_states.shape[:2], net.value_dim))

    def _convolve(self, mixed: Tensor, step: Step) -> Tensor:
        """Causal depthwise convolution of mixed [B, T, conv_dim] with what came before it."""
        net, history = self.net, step.pool.conv[self.net.layer_idx]
        window = torch.cat([history[step.rows], mixed.transpose(1, 2)], dim=-1)
        if step.kind == "verify":
            step.conv_windows[net.layer_idx] = window
        else:
            history[step.rows] = window[..., -history.shape[-1] :]
        batch, T = mixed.shape[:2]
        if step.parents is not None:  # every token's own window, along its path
            columns = path_columns(step.parents, net.conv_kernel_size)
            own = window[torch.arange(batch)[:, None, None], :, columns]  # [B, T, kernel_size, conv_dim]
            window = own.flatten(0, 1).transpose(1, 2)
        convolved = nn.functional.conv1d(window, net.conv1d.weight, groups=net.conv_dim)
        if step.parents is not None:
            convolved = convolved.view(batch, T, net.conv_dim).transpose(1, 2)
        return stock.ACT2FN[net.activation](convolved).transpose(1, 2).contiguous()

    def _prefill(self, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, step: Step) -> Tensor:
        """The stock chunk function from an empty state; its K-major final state is stored V-major."""
        g = -self.A_log.exp() * nn.functional.softplus(a.float() + self.net.dt_bias)
        # To as many heads as v has, which some versions of transformers leave to the caller.
        q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
        out, state = stock.torch_chunk_gated_delta_rule(
            q, k, v, g=g, beta=b.sigmoid(), output_final_state=True, use_qk_l2norm_in_kernel=True
        )
        step.pool.state[self.net.layer_idx][step.slots] = state.transpose(-1, -2)
        return out

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, step: Step) -> Tensor:
        out, _ = gdn_mtp.gated_delta_rule_decode_pretranspose(
            q,
            k,
            v,
            None,
            self.A_log,
            a,
            self.net.dt_bias,
            b,
            initial_state=step.pool.state[self.net.layer_idx],
            initial_state_indices=step.slots,
            backend=self.backend,
        )
        return out

    def _verify(self, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, step: Step) -> Tensor:
        layer = self.net.layer_idx
        if step.accepted is not None:
            return gdn_mtp.verify(
                q,
                k,
                v,
                a,
                b,
                self.A_log,
                self.net.dt_bias,
                step.pool.state[layer],
                step.slots,
                step.pool.caches[layer],
                *step.accepted,
                parent_indices=step.parents,
                backend=self.backend,
            )
        out, _ = gdn_mtp.gated_delta_rule_mtp(
            q,
            k,
            v,
            step.pool.state[layer],
            step.slots,
            self.A_log,
            a,
            self.net.dt_bias,
            b,
            intermediate_states_buffer=None if step.intermediate is None else step.intermediate[layer],
            ssm_state_indices=step.spare_slots,
            disable_state_update=step.spare_slots is None,
            backend=self.backend,
        )
        return out


def path_columns(parents: Tensor, width: int) -> Tensor:
    """Columns of a window [.., width - 1 + T] that end in each token and follow its path, [B, T, width]."""
    current = torch.arange(parents.shape[1], device=parents.device).expand(parents.shape)
    columns = [current]
    for _ in range(width - 1):
        before = parents.long().gather(1, current.clamp_min(0))
        current = torch.where(current >= 0, before, current - 1)  # -1 is the last committed token
        columns.insert(0, current)
    return torch.stack(columns, dim=-1) + width - 1


def patch(model: Qwen3NextForCausalLM, backend: str = "auto") -> None:
    """Replace the linear attention of every layer of `model` that has one, in place; weights stay shared.

    Patch once the model has its final dtype: gdn_mtp takes A_log in float32, so a copy of it is made here.
    Afterwards `model(...)` needs a `Step` as `past_key_values`, which `PooledEngine` supplies.
    backend: for the gdn_mtp functions.
    """
    for layer in model.model.layers:
        if layer.block_type == "linear_attention":
            layer.linear_attn = PooledGatedDeltaNet(layer.linear_attn, backend)


class PooledEngine:
    """Serves a patched model with a batch of constant size; implements `common.Engine`.

    Rows of the batch without a request to advance are padding, as they would be in a captured graph.

    max_batch       rows of every decode and verify batch, at least the number of requests
    max_len         tokens that a request may grow to, unaccepted drafts included
    num_verify      T of `verify`
    rollback        how rejected tokens are undone; see the module
    trees           `verify` takes trees and `commit` their accepted paths; with rollback "compact"
    seed            order in which slots are handed out
    """

    def __init__(
        self,
        model: Qwen3NextForCausalLM,
        *,
        max_batch: int,
        max_len: int,
        num_verify: int = 1,
        rollback: Rollback = "gather",
        trees: bool = False,
        seed: int = 0,
    ) -> None:
        if trees and rollback != "compact":
            raise ValueError(f"rollback {rollback!r} takes chains, expected 'compact' for trees")
        self.model, self.max_batch, self.max_len, self.num_verify = model, max_batch, max_len, num_verify
        spares = num_verify if rollback == "scatter" else 0
        num_slots = max_batch * (1 + spares)
        num_compact = num_verify if rollback == "compact" else 0
        self.pool = StatePool(model, max_batch, num_slots, max_len, num_compact)
        order = torch.randperm(num_slots, generator=torch.Generator().manual_seed(seed))
        order = order.to(torch.int32).to(model.device).view(max_batch, 1 + spares)
        self.free_slots = order[:, 0].tolist()
        self.spare_slots = nn.functional.pad(order[:, 1:], (0, 0, 0, 1), value=PADDING)  # [max_batch + 1, T]
        self.num_requests = 0
        self.trees = trees
        # Of the last verify, as the next one takes it: counts [max_batch + 1], nodes [max_batch + 1, T]
        self.num_accepted = torch.zeros(max_batch + 1, dtype=torch.int32, device=model.device)
        self.accepted_nodes = self.num_accepted.new_full((max_batch + 1, num_verify), -1)
        self.intermediate: dict[int, Tensor] | None = None
        if rollback == "gather":
            self.intermediate = {
                layer: state.new_full((max_batch, num_verify, *state.shape[1:]), torch.nan)
                for layer, state in self.pool.state.items()
            }
        self.verified: Step | None = None

    def prefill(self, prompts: Sequence[Tensor]) -> Tensor:
        """Admit one request per prompt [prompt_len], one pass each; logits [B, vocab] after the last ones."""
        logits = []
        for prompt in prompts:
            row, self.num_requests = self.num_requests, self.num_requests + 1
            self.pool.slots[row] = self.free_slots[row]
            for cache in self.pool.caches.values():
                cache.reset_slots(self.pool.slots[row : row + 1])
            step = self._step(torch.tensor([row], device=prompt.device), len(prompt), "prefill")
            logits.append(self._forward(prompt[None], step)[0, -1])
            self.pool.lengths[row] = len(prompt)
        return torch.stack(logits)

    def decode(self, requests: Sequence[int], tokens: Tensor) -> Tensor:
        """Append tokens [n] to n requests; logits [n, vocab]."""
        rows, batch = self._pad(requests, tokens.unsqueeze(1))
        if self.pool.caches:
            self._fold(rows)
        logits = self._forward(batch, self._step(rows, 1, "decode"))
        self.pool.lengths[rows[: len(requests)]] += 1
        return logits[: len(requests), 0]

    def verify(self, requests: Sequence[int], tokens: Tensor, parents: Tensor | None = None) -> Tensor:
        """Append tokens [n, T] provisionally; logits [n, T, vocab]. `commit` must follow.

        parents: [n, T] int32, of trees.
        """
        rows, batch = self._pad(requests, tokens)
        step = self._step(rows, self.num_verify, "verify")
        if self.pool.caches:
            step.accepted = self._accepted(rows)
            if parents is not None:
                step.parents = nn.functional.pad(parents, (0, 0, 0, len(rows) - len(requests)), value=-1)
        elif self.intermediate is None:
            step.spare_slots = self.spare_slots[rows]
        else:
            step.intermediate = self.intermediate
        self.verified = step
        return self._forward(batch, step)[: len(requests)]

    def commit(self, requests: Sequence[int], kept: Sequence[int] | Sequence[Sequence[int]]) -> None:
        """Keep the first `kept[i]` verified tokens of `requests[i]`, or its path; undo the others."""
        assert self.verified is not None, "commit follows verify"
        step, self.verified = self.verified, None
        pool, device = self.pool, self.model.device
        rows = step.rows[: len(requests)]
        paths = [list(range(path)) if isinstance(path, int) else list(path) for path in kept]
        num_kept = torch.tensor([len(path) for path in paths], device=device)
        padded = [path + [-1] * (self.num_verify - len(path)) for path in paths]
        nodes = torch.tensor(padded, dtype=torch.int32, device=device)
        last = nodes.amax(1).long()
        batch_row = torch.arange(len(requests), device=device)
        for layer, window in step.conv_windows.items():
            width = pool.conv[layer].shape[-1]
            parents = self._parents(step)[: len(requests)]
            columns = path_columns(parents, width + 1)[batch_row, last, 1:]
            pool.conv[layer][rows] = window[batch_row[:, None], :, columns].transpose(1, 2)
        if self.trees:
            self._compact_keys(rows, nodes)
        if pool.caches:
            self.num_accepted[rows], self.accepted_nodes[rows] = num_kept.int(), nodes
        elif self.intermediate is None:
            current = pool.slots[rows]
            pool.slots[rows] = self.spare_slots[rows, last]
            self.spare_slots[rows, last] = current
        else:
            for layer, states in self.intermediate.items():
                pool.state[layer][pool.slots[rows]] = states[batch_row, last]
        pool.lengths[rows] += num_kept

    def _parents(self, step: Step) -> Tensor:
        """[B, T] int32, of a chain as well."""
        if step.parents is not None:
            return step.parents
        chain = torch.arange(-1, self.num_verify - 1, dtype=torch.int32, device=step.rows.device)
        return chain.expand(len(step.rows), -1)

    def _compact_keys(self, rows: Tensor, nodes: Tensor) -> None:
        """Move the keys and values of accepted nodes [n, T] together, behind the committed tokens."""
        start = self.pool.lengths[rows][:, None]
        source = start + nodes.clamp_min(0)
        target = start + torch.arange(nodes.shape[1], device=rows.device)
        for buffers in (self.pool.keys, self.pool.values):
            for buffer in buffers.values():
                buffer[rows[:, None], :, target] = buffer[rows[:, None], :, source]

    def _accepted(self, rows: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What of the last verify of each row is accepted; it is told once."""
        counts, nodes = self.num_accepted[rows], self.accepted_nodes[rows]
        self.num_accepted[rows], self.accepted_nodes[rows] = 0, -1
        return (None, nodes) if self.trees else (counts, None)

    def _fold(self, rows: Tensor) -> None:
        """Fold accepted tokens into the pool, for a decode that reads it."""
        accepted = self._accepted(rows)
        for layer, cache in self.pool.caches.items():
            gdn_mtp.commit(self.pool.state[layer], self.pool.slots[rows], cache, *accepted)

    def _pad(self, requests: Sequence[int], tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Fill requests and tokens [n, T] up to max_batch rows: rows [max_batch], tokens [max_batch, T]."""
        missing = self.max_batch - len(requests)
        rows = torch.tensor([*requests, *[-1] * missing], device=tokens.device)
        return rows, nn.functional.pad(tokens, (0, 0, 0, missing))

    def _step(self, rows: Tensor, num_tokens: int, kind: Literal["prefill", "decode", "verify"]) -> Step:
        positions = self.pool.lengths[rows][:, None] + torch.arange(num_tokens, device=rows.device)
        num_keys = int(positions.max()) + 1
        if num_keys > self.max_len:
            raise RuntimeError(
                f"a request grows to {num_keys} tokens, the engine was built for {self.max_len}"
            )
        return Step(self.pool, rows, self.pool.slots[rows], positions, num_keys, kind)

    @torch.no_grad()
    def _forward(self, tokens: Tensor, step: Step) -> Tensor:
        """Logits [B, T, vocab] of tokens [B, T]."""
        masks = {"full_attention": step.causal_mask(self.model.dtype), "linear_attention": None}
        positions = step.token_positions()
        out = self.model(tokens, attention_mask=masks, position_ids=positions, past_key_values=step)
        return out.logits

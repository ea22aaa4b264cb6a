"""The float64 oracle of verify and commit: every token advances the state of the token that it follows."""

from typing import NamedTuple

import torch
from torch import Tensor

from gdn_mtp.reference import per_value_head, softplus


class _Tokens(NamedTuple):
    """The inputs of a window in float64, one row per value head."""

    q: Tensor  # [B, T, HV, K]
    k: Tensor  # [B, T, HV, K]
    v: Tensor  # [B, T, HV, V]
    decay: Tensor  # [B, T, HV]
    beta: Tensor  # [B, T, HV]


class SpeculativeReference:
    """What the slots of a pool stand for, by sequential decoding of accepted tokens; nothing is compact here.

    states: [pool, HV, V, K] float64, the state of each slot after its accepted tokens.
    windows: by slot, the states after each token of its last window.
    """

    def __init__(self, state_pool: Tensor) -> None:
        self.states = state_pool.double().clone()
        self.windows: dict[int, list[Tensor]] = {}

    def verify(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        A_log: Tensor,
        dt_bias: Tensor,
        state_indices: Tensor,
        num_accepted: Tensor | None = None,
        accepted_nodes: Tensor | None = None,
        *,
        num_tokens: Tensor | None = None,
        parent_indices: Tensor | None = None,
        scale: float | None = None,
        use_qk_l2norm: bool = True,
    ) -> Tensor:
        """The output of `gdn_mtp.verify` in float64, [B, T, HV, V]."""
        T, value_heads = v.shape[1:3]
        self._accept(state_indices, num_accepted, accepted_nodes)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        q64, k64 = (per_value_head(x.double(), value_heads, use_qk_l2norm) for x in (q, k))
        decay = torch.exp(-torch.exp(A_log.double()) * softplus(a.double() + dt_bias.double()))
        tokens = _Tokens(q64, k64, v.double(), decay, torch.sigmoid(b.double()))
        output = torch.zeros(v.shape, dtype=torch.float64, device=v.device)
        for request, slot in enumerate(state_indices.tolist()):
            if slot < 0:
                continue
            count = T if num_tokens is None else int(num_tokens[request])
            window: list[Tensor] = []
            for t in range(count):
                parent = t - 1 if parent_indices is None else int(parent_indices[request, t])
                before = self.states[slot] if parent < 0 else window[parent]
                window.append(_advance(before, tokens, request, t))
                output[request, t] = scale * (window[t] @ tokens.q[request, t, :, :, None])[..., 0]
            self.windows[slot] = window
        return output

    def commit(
        self,
        state_indices: Tensor,
        num_accepted: Tensor | None = None,
        accepted_nodes: Tensor | None = None,
    ) -> Tensor:
        """The states of the requests afterwards, [B, HV, V, K]; zeros for padding."""
        self._accept(state_indices, num_accepted, accepted_nodes)
        states = self.states.new_zeros(len(state_indices), *self.states.shape[1:])
        for request, slot in enumerate(state_indices.tolist()):
            if slot >= 0:
                states[request] = self.states[slot]
        return states

    def copy_slots(self, src: Tensor, dst: Tensor) -> None:
        """Make slot dst[i] what slot src[i] is."""
        pairs = [(s, d) for s, d in zip(src.tolist(), dst.tolist(), strict=True) if s >= 0 and d >= 0]
        moved = [(d, self.states[s].clone(), self.windows.get(s, [])) for s, d in pairs]
        for slot, state, window in moved:
            self.states[slot], self.windows[slot] = state, window

    def reset_slots(self, slots: Tensor, state_pool: Tensor) -> None:
        """Let `slots` stand for what `state_pool` holds."""
        for slot in slots.tolist():
            if slot >= 0:
                self.states[slot], self.windows[slot] = state_pool[slot].double(), []

    def _accept(
        self, state_indices: Tensor, num_accepted: Tensor | None, accepted_nodes: Tensor | None
    ) -> None:
        for request, slot in enumerate(state_indices.tolist()):
            if slot < 0:
                continue
            window = self.windows.pop(slot, [])
            last = -1
            if num_accepted is not None:
                last = int(num_accepted[request]) - 1
            elif accepted_nodes is not None:
                last = int(accepted_nodes[request].max()) if accepted_nodes.shape[1] else -1
            if last >= 0:
                self.states[slot] = window[last]


def _advance(state: Tensor, tokens: _Tokens, request: int, t: int) -> Tensor:
    """The state [HV, V, K] after token t."""
    key = tokens.k[request, t]
    decayed = tokens.decay[request, t][:, None, None] * state
    u = tokens.beta[request, t][:, None] * (tokens.v[request, t] - (decayed @ key[..., None])[..., 0])
    return decayed + u[:, :, None] * key[:, None, :]

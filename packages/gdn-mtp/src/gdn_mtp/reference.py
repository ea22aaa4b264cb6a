"""The float64 oracle: the recurrence as it is written down, one request and one token at a time."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gdn_mtp.problem import L2NORM_EPSILON


class ReferenceResult(NamedTuple):
    """What a call should leave behind, in float64 (bits of an untouched slot are those of `state`, upcast).

    output: [B, T, HV, V]. state: the whole pool, in the layout of the argument. intermediate_states:
    [B, T, HV, V, K] ([B, T, HV, K, V] for "kv"), entry [i, t] the state after token t, NaN for padded
    requests.
    """

    output: Tensor
    state: Tensor
    intermediate_states: Tensor


def gated_delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    scale: float | None = None,
    *,
    use_qk_l2norm: bool = True,
    state_layout: str = "vk",
    initial_state_indices: Tensor | None = None,
    output_state_indices: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    update_state: bool = True,
) -> ReferenceResult:
    """Evaluate the gated delta rule in float64 without mutating anything.

    With g = -exp(A_log) softplus(a + dt_bias) and beta = sigmoid(b), each token does
    S <- exp(g) S; u = beta (v - S k); S <- S + u k^T; o = scale S q (Yang et al., "Gated Delta Networks",
    2024). Shapes and index semantics are those of `gdn_mtp.gated_delta_rule_mtp`; every request reads the
    state that the pool held on entry. `scale` None means K ** -0.5.
    """
    batch, tokens, value_heads, value_dim = v.shape
    key_dim = q.shape[-1]
    scale = key_dim**-0.5 if scale is None else scale
    entry_pool = state.double()
    if state_layout == "kv":
        entry_pool = entry_pool.transpose(-1, -2)
    pool = entry_pool.clone()
    reads = list(range(batch)) if initial_state_indices is None else initial_state_indices.tolist()
    writes = reads if output_state_indices is None else output_state_indices.tolist()
    output = torch.zeros(batch, tokens, value_heads, value_dim, dtype=torch.float64, device=q.device)
    states = output.new_full((batch, tokens, value_heads, value_dim, key_dim), math.nan)

    decay = torch.exp(-torch.exp(A_log.double()) * softplus(a.double() + dt_bias.double()))  # [B, T, HV]
    beta = torch.sigmoid(b.double())
    q64, k64 = (per_value_head(x.double(), value_heads, use_qk_l2norm) for x in (q, k))  # [B, T, HV, K]

    for i in range(batch):
        if reads[i] < 0:
            continue
        current = entry_pool[reads[i]].clone()  # [HV, V, K]
        for t in range(tokens):
            key, query = k64[i, t], q64[i, t]
            current = decay[i, t][:, None, None] * current
            u = beta[i, t][:, None] * (v[i, t].double() - (current @ key[..., None])[..., 0])  # [HV, V]
            current = current + u[:, :, None] * key[:, None, :]
            output[i, t] = scale * (current @ query[..., None])[..., 0]
            states[i, t] = current
            if ssm_state_indices is not None and int(ssm_state_indices[i, t]) >= 0:
                pool[int(ssm_state_indices[i, t])] = current
        if update_state and ssm_state_indices is None and writes[i] >= 0:
            pool[writes[i]] = current

    if state_layout == "kv":
        pool, states = pool.transpose(-1, -2), states.transpose(-1, -2)
    return ReferenceResult(output, pool, states)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) without overflow and without a threshold beyond which it is replaced by x."""
    return torch.logaddexp(x, torch.zeros_like(x))


def per_value_head(x: Tensor, value_heads: int, use_l2norm: bool) -> Tensor:
    """Queries or keys [B, T, H, K], normalised where asked, repeated to [B, T, HV, K]."""
    if use_l2norm:
        x = x / torch.sqrt((x * x).sum(-1, keepdim=True) + L2NORM_EPSILON)
    return x.repeat_interleave(value_heads // x.shape[2], dim=2)

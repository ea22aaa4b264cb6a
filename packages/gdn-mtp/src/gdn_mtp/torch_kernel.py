"""The gated delta rule in PyTorch operations: any device, vectorised over requests and heads, a loop over T.

Per token, in float32: S <- exp(g) S; u = beta (v - S k); S <- S + u k^T; o = scale S q.
States are loaded once, kept in float32 for all T tokens and rounded once at each store. Products are
elementwise multiplications and sums, so TF32 and autocast do not change them. Nothing waits for the device,
so a call can be captured in a CUDA graph.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from kernel_dispatch import Arch
from torch import Tensor
from torch.nn.functional import softplus

from gdn_mtp.problem import L2NORM_EPSILON, GatedDeltaRuleProblem

# Bound on the float32 states and tokens of the requests processed together (at least one request). The
# temporaries of a call stay below four times this.
CHUNK_BYTES = 32 << 20
TACTIC = "chunked"


class TorchKernel:
    """The `kernel_dispatch` kernel of the torch provider; it needs no workspace and has one tactic."""

    def workspace_nbytes(self, problem: GatedDeltaRuleProblem, arch: Arch, tactic: str | None = None) -> int:
        """None is needed."""
        return 0

    def tactics(self, problem: GatedDeltaRuleProblem, arch: Arch) -> Sequence[str]:
        """The only way to run any problem."""
        return (TACTIC,)

    def prepare(
        self, problem: GatedDeltaRuleProblem, arch: Arch, device: torch.device, tactic: str
    ) -> Callable[..., None]:
        """`launch` for the problem; nothing to compile."""
        return partial(launch, problem)


def requests_per_chunk(problem: GatedDeltaRuleProblem) -> int:
    """How many requests fit into CHUNK_BYTES, at least one."""
    tokens = problem.T * (2 * problem.H * problem.K + 2 * problem.HV * problem.V)
    floats = problem.HV * problem.V * problem.K + tokens
    return max(1, CHUNK_BYTES // (4 * floats))


@torch.inference_mode()
def launch(
    problem: GatedDeltaRuleProblem,
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, HV, V]
    a: Tensor,  # [B, T, HV]
    b: Tensor,  # [B, T, HV]
    A_log: Tensor,  # [HV]
    dt_bias: Tensor,  # [HV]
    scale: float | Tensor,
    state: Tensor,  # [pool or B, HV, V, K], or [.., K, V]
    state_indices: Tensor | None,  # [B]
    write_indices: Tensor | None,  # [B]
    intermediate_states: Tensor | None,  # [>= B, >= T, HV, V, K], or [.., K, V]
    ssm_state_indices: Tensor | None,  # [B, T]
    output: Tensor,  # [B, T, HV, V]
) -> None:
    """Run checked arguments; writes `output`, the named slots of `state`, and `intermediate_states`."""
    if problem.state_layout == "kv":
        state = state.transpose(-1, -2)
        intermediate_states = None if intermediate_states is None else intermediate_states.transpose(-1, -2)
    scale = scale.reshape(()) if isinstance(scale, Tensor) else scale
    step = requests_per_chunk(problem)
    for start in range(0, q.shape[0], step):
        rows = slice(start, min(start + step, q.shape[0]))
        tokens = _load_tokens(problem, q[rows], k[rows], v[rows])
        decay, beta = _gates(a[rows], b[rows], A_log, dt_bias)
        pool = state[rows] if state_indices is None else state
        reads = None if state_indices is None else state_indices[rows].long()
        valid = None if reads is None else reads >= 0
        current = load_states(pool, reads)
        for t in range(problem.T):
            out = _advance(current, tokens, decay[:, t], beta[:, t], t).mul_(scale)
            output[rows, t] = out if valid is None else out.masked_fill_(~valid[:, None, None], 0.0)
            if intermediate_states is not None:
                _store_rows(intermediate_states[rows, t], current, valid)
            if ssm_state_indices is not None:
                store_slots(pool, _masked(ssm_state_indices[rows, t], valid), current)
        if problem.writes_state:
            writes = reads if write_indices is None else _masked(write_indices[rows], valid)
            if writes is None:
                pool.copy_(current)
            else:
                store_slots(pool, writes, current)


class _Tokens(NamedTuple):
    """Inputs of a chunk of n requests in float32."""

    q: Tensor  # [n, T, H, K]
    k: Tensor  # [n, T, H, K]
    v: Tensor  # [n, T, HV, V]


def _load_tokens(problem: GatedDeltaRuleProblem, q: Tensor, k: Tensor, v: Tensor) -> _Tokens:
    q, k = q.float(), k.float()
    if problem.use_qk_l2norm:
        q, k = q * norm_factors(q), k * norm_factors(k)
    return _Tokens(q, k, v.float())


def _gates(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """exp(g) and beta, each [n, T, HV] float32."""
    return log_decays(a, A_log, dt_bias).exp(), torch.sigmoid(b.float())


def norm_factors(x: Tensor) -> Tensor:
    """What the l2norm multiplies vectors [..., K] float32 with, [..., 1]."""
    return (x.square().sum(-1, keepdim=True) + L2NORM_EPSILON).rsqrt()


def log_decays(a: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """g of tokens with a [..., HV], float32."""
    return -A_log.float().exp() * softplus(a.float() + dt_bias.float())


def load_states(pool: Tensor, reads: Tensor | None) -> Tensor:
    """A float32 copy [n, HV, V, K] of the states; padding loads slot 0, whose values no result depends on."""
    if reads is None:
        return pool.to(torch.float32, copy=True)
    return pool.index_select(0, reads.clamp_min(0)).float()


def _advance(states: Tensor, tokens: _Tokens, decay: Tensor, beta: Tensor, t: int) -> Tensor:
    """Move `states` [n, HV, V, K] past token t in place; returns S q, [n, HV, V].

    R = HV / H value heads share one query and key head.
    """
    q, v = tokens.q[:, t], tokens.v[:, t]
    n, heads, key_dim = q.shape
    grouped = states.view(n, heads, -1, v.shape[-1], key_dim)  # [n, H, R, V, K]
    k = tokens.k[:, t].view(n, heads, 1, 1, key_dim)
    grouped.mul_(decay.view(n, heads, -1, 1, 1))
    retrieved = (grouped * k).sum(-1)  # [n, H, R, V]
    u = beta.view(n, heads, -1, 1) * (v.view_as(retrieved) - retrieved)
    grouped.addcmul_(u[..., None], k)
    return (grouped * q.view(n, heads, 1, 1, key_dim)).sum(-1).flatten(1, 2)


def _masked(slots: Tensor, valid: Tensor | None) -> Tensor:
    """`slots` as int64, negative where the request is padding."""
    return slots.long() if valid is None else slots.long().masked_fill(~valid, -1)


def _store_rows(rows: Tensor, states: Tensor, valid: Tensor | None) -> None:
    """Round `states` into `rows`, one each; rows that are not valid keep their bits."""
    rounded = states.to(rows.dtype)
    rows.copy_(rounded if valid is None else torch.where(valid[:, None, None, None], rounded, rows))


def store_slots(pool: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Round `rows` [n, ...], such as states, into `pool` [slots, ...]; a negative slot is skipped.

    How many slots are not negative is known to the device alone, and waiting for it would stall the host, so
    n rows are always written. A skipped row repeats the store of the anchor, some row that is not skipped:
    the same bits to the same slot, hence no race and no slot that nobody named. Where every row is skipped,
    all of them put back the bits that slot 0 holds.
    """
    named = slots >= 0
    anchor = named.byte().argmax().reshape(1)
    anchor_slot = slots.index_select(0, anchor).clamp_min(0)
    rounded = rows.to(pool.dtype)
    anchor_row = torch.where(
        named.any(), rounded.index_select(0, anchor), pool.index_select(0, anchor_slot)
    )  # [1, ...]
    values = torch.where(named.view(-1, *[1] * (rows.dim() - 1)), rounded, anchor_row)
    pool.index_copy_(0, torch.where(named, slots, anchor_slot), values)


KERNEL = TorchKernel()

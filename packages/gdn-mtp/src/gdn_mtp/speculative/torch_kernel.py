"""Verify, commit and materialize in PyTorch operations: any device, vectorised over requests and heads.

Pending tokens are applied to a float32 state one after the other, as sequential decoding would. The window
is evaluated against the state S before it, with products of its own tokens: for token t with ancestors s,

    u_t = beta_t (v_t - E_t S k_t - sum_s D_ts (k_s . k_t) u_s)
    o_t = scale (E_t S q_t + sum_s D_ts (k_s . q_t) u_s)

where D_ts is the decay after s along the path to t, E_t that along the whole path, and the sum of o_t
includes t itself. Products are elementwise multiplications and sums, so TF32 and autocast do not change them.
Nothing waits for a GPU, so a call can be captured in a CUDA graph.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from kernel_dispatch import Arch
from torch import Tensor
from torch.nn.functional import pad

from gdn_mtp.speculative.cache import CacheTensors
from gdn_mtp.speculative.folding import FLOAT_BYTES
from gdn_mtp.speculative.problem import SpeculativeProblem
from gdn_mtp.torch_kernel import (
    CHUNK_BYTES,
    TACTIC,
    load_states,
    log_decays,
    norm_factors,
    store_slots,
)


class TorchKernel:
    """The `kernel_dispatch` kernel of the torch provider; it needs no workspace and has one tactic."""

    def workspace_nbytes(self, problem: SpeculativeProblem, arch: Arch, tactic: str | None = None) -> int:
        """None is needed."""
        return 0

    def tactics(self, problem: SpeculativeProblem, arch: Arch) -> Sequence[str]:
        """The only way to run any problem."""
        return (TACTIC,)

    def prepare(
        self, problem: SpeculativeProblem, arch: Arch, device: torch.device, tactic: str
    ) -> Callable[..., None]:
        """The launcher of the problem's mode; nothing to compile."""
        modes: dict[str, Callable[..., None]]
        modes = {"verify": verify, "commit": commit, "materialize": materialize}
        return partial(modes[problem.mode], problem)


@torch.inference_mode()
def verify(
    problem: SpeculativeProblem,
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, HV, V]
    a: Tensor,  # [B, T, HV]
    b: Tensor,  # [B, T, HV]
    A_log: Tensor,  # [HV]
    dt_bias: Tensor,  # [HV]
    scale: float | Tensor,
    state: Tensor,  # [pool, HV, V, K]
    state_indices: Tensor,  # [B]
    keys: Tensor,  # [pool, R, H, K], and the other tensors of the cache
    updates: Tensor,
    gates: Tensor,
    k_scale: Tensor,
    cursor: Tensor,
    live: Tensor,
    num_accepted: Tensor | None,  # [B]
    accepted_nodes: Tensor | None,  # [B, n]
    num_tokens: Tensor | None,  # [B]
    parent_indices: Tensor | None,  # [B, T]
    fold_above: int,
    output: Tensor,  # [B, T, HV, V]
) -> None:
    """Run checked arguments; writes `output`, the cache's named slots, and those of `state` that fold."""
    cache = CacheTensors(keys, updates, gates, k_scale, cursor, live)
    scale = scale.reshape(()) if isinstance(scale, Tensor) else scale
    for rows in _chunks(problem, len(state_indices)):
        ring = _accept(problem, cache, rows, state_indices, num_accepted, accepted_nodes)
        if problem.debug:
            _trap_window(problem, ring.slots < 0, _at(num_tokens, rows), _at(parent_indices, rows))
        states = _load(cache, ring, state)
        folds = ring.length > fold_above
        window = _evaluate(
            problem,
            states,
            _load_tokens(problem, q[rows], k[rows], v[rows], a[rows], b[rows], A_log, dt_bias),
            _at(parent_indices, rows),
        )
        counts = torch.full_like(ring.length, problem.T)
        if num_tokens is not None:
            counts = num_tokens[rows].long().clamp(0, problem.T)
        absent = (torch.arange(problem.T, device=q.device) >= counts[:, None]) | (ring.slots < 0)[:, None]
        output[rows] = (window.output * scale).masked_fill_(absent[..., None, None], 0.0)
        _record(cache, ring, k[rows], window)
        # Pool and cursor go last: whatever fails before leaves what the slots stand for as it was.
        store_slots(state, ring.slots.masked_fill(~folds, -1), states)
        _store_cursor(cache, ring, folds, counts)


@torch.inference_mode()
def commit(
    problem: SpeculativeProblem,
    state: Tensor,
    state_indices: Tensor,
    keys: Tensor,
    updates: Tensor,
    gates: Tensor,
    k_scale: Tensor,
    cursor: Tensor,
    live: Tensor,
    num_accepted: Tensor | None,
    accepted_nodes: Tensor | None,
) -> None:
    """Run checked arguments; writes the named slots of the cache, and those of `state` that fold."""
    cache = CacheTensors(keys, updates, gates, k_scale, cursor, live)
    for rows in _chunks(problem, len(state_indices)):
        ring = _accept(problem, cache, rows, state_indices, num_accepted, accepted_nodes)
        states = _load(cache, ring, state)
        store_slots(state, ring.slots.masked_fill(ring.length == 0, -1), states)
        _store_cursor(cache, ring, ring.length > 0, torch.zeros_like(ring.length))


@torch.inference_mode()
def materialize(
    problem: SpeculativeProblem,
    state: Tensor,
    state_indices: Tensor,
    keys: Tensor,
    updates: Tensor,
    gates: Tensor,
    k_scale: Tensor,
    cursor: Tensor,
    live: Tensor,
    num_accepted: Tensor | None,
    accepted_nodes: Tensor | None,
    states: Tensor,  # [B, HV, V, K]
) -> None:
    """Run checked arguments; writes `states`."""
    cache = CacheTensors(keys, updates, gates, k_scale, cursor, live)
    for rows in _chunks(problem, len(state_indices)):
        ring = _accept(problem, cache, rows, state_indices, num_accepted, accepted_nodes)
        padding = (ring.slots < 0)[:, None, None, None]
        states[rows] = _load(cache, ring, state).masked_fill_(padding, 0.0).to(states.dtype)


def requests_per_chunk(problem: SpeculativeProblem) -> int:
    """How many requests fit into CHUNK_BYTES, at least one."""
    tokens = problem.capacity * (problem.H * problem.K + problem.HV * problem.V)
    floats = problem.HV * problem.V * problem.K * (2 if problem.T else 1) + tokens
    return max(1, CHUNK_BYTES // (FLOAT_BYTES * floats))


def _chunks(problem: SpeculativeProblem, batch: int) -> Iterator[slice]:
    step = requests_per_chunk(problem)
    for start in range(0, batch, step):
        yield slice(start, min(start + step, batch))


def _at(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


class _Ring(NamedTuple):
    """Where the tokens of n requests are, once those of the last window are accepted."""

    slots: Tensor  # [n] int64, -1 for padding
    start: Tensor  # [n] int64, ring position of the first pending token
    length: Tensor  # [n] int64, tokens from `start` on, accepted or dropped
    live: Tensor  # [n, R] bool, whether the token j after `start` is pending


def _accept(
    problem: SpeculativeProblem,
    cache: CacheTensors,
    rows: slice,
    state_indices: Tensor,
    num_accepted: Tensor | None,
    accepted_nodes: Tensor | None,
) -> _Ring:
    """Take over what is accepted of the last windows of requests `rows`.

    Nothing is written, and all sizes end up in range.
    """
    R, pool_size = problem.capacity, cache.cursor.shape[0]
    slots = state_indices[rows].long()
    num_accepted, accepted_nodes = _at(num_accepted, rows), _at(accepted_nodes, rows)
    if problem.debug:
        within = (slots < pool_size).all()
        torch._assert_async(within, "gdn_mtp: state_indices names a slot beyond the pool")
    slots = slots.masked_fill((slots < 0) | (slots >= pool_size), -1)
    cursor = cache.cursor.index_select(0, slots.clamp_min(0)).long()
    bits = cache.live.index_select(0, slots.clamp_min(0)).long()
    if problem.debug:
        _trap(problem, slots, cursor, num_accepted, accepted_nodes)
    start, length = cursor[:, 0] % R, cursor[:, 1].clamp(0, R)
    window = cursor[:, 2].clamp_min(0).minimum(R - length)
    offsets = torch.arange(R, device=slots.device)
    live = ((bits[:, None] >> offsets) & 1).bool() & (offsets < length[:, None])
    accepted = torch.zeros_like(length)
    if num_accepted is not None:
        accepted = num_accepted.long().clamp_min(0).minimum(window)
        live |= (offsets >= length[:, None]) & (offsets < (length + accepted)[:, None])
    elif accepted_nodes is not None and accepted_nodes.shape[1] > 0:
        nodes = accepted_nodes.long()
        nodes = nodes.masked_fill((nodes < 0) | (nodes >= window[:, None]), -1)
        named = (offsets == (length[:, None] + nodes)[..., None]) & (nodes >= 0)[..., None]
        live |= named.any(1)
        accepted = nodes.amax(1) + 1
    length = (length + accepted).masked_fill(slots < 0, 0)
    return _Ring(slots, start, length, live & (slots >= 0)[:, None])


def _trap(
    problem: SpeculativeProblem,
    slots: Tensor,
    cursor: Tensor,
    num_accepted: Tensor | None,
    accepted_nodes: Tensor | None,
) -> None:
    """Stop where the host could not look: on a GPU the process's context is lost, which is the point."""
    padding = slots < 0
    start, length, window, arrivals = cursor.unbind(1)
    sizes = (start >= 0) & (start < problem.capacity) & (length >= 0) & (window >= 0) & (arrivals == 0)
    fits = sizes & (length + window <= problem.capacity - problem.T)
    torch._assert_async((fits | padding).all(), "gdn_mtp: a cursor of the speculative cache is out of range")
    if num_accepted is not None:
        allowed = (num_accepted >= 0) & (num_accepted <= window)
        torch._assert_async((allowed | padding).all(), "gdn_mtp: num_accepted exceeds what was verified")
    if accepted_nodes is not None:
        within = (accepted_nodes < window[:, None]).all(1)
        torch._assert_async((within | padding).all(), "gdn_mtp: accepted_nodes exceed what was verified")
        highest = pad(accepted_nodes, (1, 0), value=-1).cummax(1).values[:, :-1]
        ascend = ((accepted_nodes < 0) | (accepted_nodes > highest)).all(1)
        torch._assert_async((ascend | padding).all(), "gdn_mtp: accepted_nodes do not ascend")


def _trap_window(
    problem: SpeculativeProblem, padding: Tensor, num_tokens: Tensor | None, parents: Tensor | None
) -> None:
    """Stop as `_trap` does, for a number of tokens or a parent out of range."""
    steps = torch.arange(problem.T, device=padding.device)
    absent = padding[:, None]
    if num_tokens is not None:
        allowed = (num_tokens >= 0) & (num_tokens <= problem.T)
        torch._assert_async((allowed | padding).all(), "gdn_mtp: num_tokens is not between 0 and T")
        absent = absent | (steps >= num_tokens[:, None])
    if parents is not None:
        earlier = (parents >= -1) & (parents < steps)
        torch._assert_async(
            (earlier | absent).all(), "gdn_mtp: parent_indices names neither -1 nor an earlier token"
        )


def _load(cache: CacheTensors, ring: _Ring, state_pool: Tensor) -> Tensor:
    """The float32 states [n, HV, V, K] that the slots stand for; those of padding mean nothing."""
    states = load_states(state_pool, ring.slots)
    R = cache.keys.shape[1]
    slots = ring.slots.clamp_min(0)
    _, heads, key_dim = cache.keys.shape[1:]
    grouped = states.view(len(slots), heads, -1, *states.shape[-2:])  # [n, H, G, V, K]
    bound = int(ring.length.max()) if slots.device.type == "cpu" else R  # reading it would wait for a GPU
    for offset in range(bound):
        live, position = ring.live[:, offset], (ring.start + offset) % R
        # A token that is not live may hold anything, NaN included: it is masked, not multiplied by 0.
        k = cache.keys[slots, position].float() * cache.k_scale[slots, position][..., None]
        k = k.masked_fill_(~live[:, None, None], 0.0).view(-1, heads, 1, 1, key_dim)
        u = cache.updates[slots, position].masked_fill_(~live[:, None, None], 0.0)
        decay = cache.gates[slots, position].masked_fill_(~live[:, None], 0.0).exp_()
        grouped.mul_(decay.view(-1, heads, grouped.shape[2], 1, 1))
        grouped.addcmul_(u.view(grouped.shape[:-1])[..., None], k)
    return states


class _Tokens(NamedTuple):
    """A window of n requests in float32; q and k are normalised."""

    q: Tensor  # [n, T, H, K]
    k: Tensor  # [n, T, H, K]
    v: Tensor  # [n, T, HV, V]
    gates: Tensor  # [n, T, HV]
    beta: Tensor  # [n, T, HV]
    k_scale: Tensor  # [n, T, H]


def _load_tokens(
    problem: SpeculativeProblem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
) -> _Tokens:
    q, k = q.float(), k.float()
    k_scale = torch.ones_like(k[..., 0])
    if problem.use_qk_l2norm:
        q, k_scale = q * norm_factors(q), norm_factors(k)[..., 0]
        k = k * k_scale[..., None]
    gates = log_decays(a, A_log, dt_bias)
    return _Tokens(q, k, v.float(), gates, torch.sigmoid(b.float()), k_scale)


class _Window(NamedTuple):
    """What a window comes to."""

    output: Tensor  # [n, T, HV, V] float32, before the scale
    updates: Tensor  # [n, T, HV, V] float32
    gates: Tensor  # [n, T, HV] float32
    k_scale: Tensor  # [n, T, H] float32


def _evaluate(
    problem: SpeculativeProblem, states: Tensor, tokens: _Tokens, parent_indices: Tensor | None
) -> _Window:
    """The window's tokens against `states` [n, HV, V, K], which stay as they are; see the module."""
    n, T, HV, V = tokens.v.shape
    group = problem.heads_per_group
    steps = torch.arange(T, device=states.device)
    parents = (steps - 1).expand(n, T) if parent_indices is None else parent_indices.long()
    parents = parents.masked_fill((parents < 0) | (parents >= steps), -1)
    grouped = states.view(n, problem.H, group, V, problem.K)
    every = torch.arange(n, device=states.device)
    # Row 0 is the state before the window, row t + 1 token t.
    decay = states.new_ones(n, T + 1, HV)  # E
    decays = states.new_zeros(n, T + 1, T, HV)  # D
    ancestors = torch.zeros(n, T + 1, T, dtype=torch.bool, device=states.device)
    output, updates = torch.zeros_like(tokens.v), torch.zeros_like(tokens.v)
    for t in range(T):
        before = parents[:, t] + 1
        step = tokens.gates[:, t].exp()
        decay[:, t + 1] = decay[every, before] * step
        decays[:, t + 1] = decays[every, before] * step[:, None]
        ancestors[:, t + 1] = ancestors[every, before]
        for x, result in ((tokens.k, updates), (tokens.q, output)):
            if x is tokens.q:  # its own update counts for the output
                ancestors[:, t + 1, t], decays[:, t + 1, t] = True, 1.0
            from_state = (grouped * x[:, t].view(n, problem.H, 1, 1, problem.K)).sum(-1).view(n, HV, V)
            products = (tokens.k[:, : t + 1] * x[:, t : t + 1]).sum(-1)  # [n, t + 1, H]
            weights = decays[:, t + 1, : t + 1] * products.repeat_interleave(group, dim=-1)
            added = weights[..., None] * updates[:, : t + 1]
            added = added.masked_fill(~ancestors[:, t + 1, : t + 1, None, None], 0.0).sum(1)
            sought = decay[:, t + 1, :, None] * from_state + added
            if x is tokens.k:
                sought = tokens.beta[:, t, :, None] * (tokens.v[:, t] - sought)
            result[:, t] = sought
    return _Window(output, updates, tokens.gates, tokens.k_scale)


def _record(cache: CacheTensors, ring: _Ring, k: Tensor, window: _Window) -> None:
    """Write the window behind the pending tokens."""
    R, T = cache.keys.shape[1], k.shape[1]
    every, slots = torch.arange(len(k), device=k.device), ring.slots.clamp_min(0)
    positions = (ring.start + ring.length)[:, None] + torch.arange(T, device=k.device)
    for tensor, new in (
        (cache.keys, k),
        (cache.updates, window.updates),
        (cache.gates, window.gates),
        (cache.k_scale, window.k_scale),
    ):
        rows = tensor.index_select(0, slots)
        rows[every[:, None], positions % R] = new
        store_slots(tensor, ring.slots, rows)


def _store_cursor(cache: CacheTensors, ring: _Ring, folds: Tensor, window: Tensor) -> None:
    """Write how many tokens are pending, and in the window; `folds` [n] says whose are none any more."""
    R = cache.keys.shape[1]
    start = torch.where(folds, (ring.start + ring.length) % R, ring.start)
    length = ring.length.masked_fill(folds, 0)
    offsets = torch.arange(R, device=length.device)
    bits = (ring.live.long() << offsets).sum(1).masked_fill(folds, 0)
    cursor = torch.stack((start, length, window, torch.zeros_like(window)), dim=1)
    store_slots(cache.cursor, ring.slots, cursor)
    store_slots(cache.live, ring.slots, bits)


KERNEL = TorchKernel()

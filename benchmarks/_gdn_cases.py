"""The shapes that bench_gdn_mtp.py times, their tensors and bytes, and the check against the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gdn_mtp import GatedDeltaRuleProblem
from gdn_mtp.problem import StateLayout, short_dtype
from gdn_mtp.reference import gated_delta_rule_reference
from kernel_testing import assert_close_elementwise, calls_for_cold_l2
from torch import Tensor

STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEAD_DIM = 128  # K and V
POOL_SLOTS = 768  # at least; 768 MiB of state or more, so that slots drawn at random are not in the L2 cache
TRAFFIC_PER_GRAPH = 8  # bytes that the calls of one graph move, at least, in sizes of the L2 cache
MIN_CALLS, MAX_CALLS = 4, 128  # per graph

# A result is rounded once to its dtype. Before that, arithmetic errs per token by at most a multiple of the
# largest norm of a state row; outputs additionally by the scale. The bound of our kernels is that of their
# tests, 32 roundings of float32. What peers round on the way is theirs to choose, so theirs is wider.
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
OUR_ERROR = 32 * 2.0**-24
PEER_ERROR = {torch.float32: 2.0**-14, torch.bfloat16: 2.0**-8}
REQUESTS_CHECKED = 8  # of each call; the first and the last among them


@dataclass(frozen=True)
class Cell:
    """One shape and mode: what a row of the table is about."""

    H: int
    HV: int
    B: int
    T: int
    update: bool
    cache: bool
    state_dtype: torch.dtype
    state_layout: StateLayout = "vk"

    @property
    def heads(self) -> str:
        """Query, key and value heads: `16/16/32`."""
        return f"{self.H}/{self.H}/{self.HV}"

    @property
    def mode(self) -> str:
        """What is written: the updated state, every intermediate state, both, or neither."""
        return {(True, False): "update", (True, True): "cache+update", (False, True): "cache"}.get(
            (self.update, self.cache), "frozen"
        )

    @property
    def state_name(self) -> str:
        return short_dtype(self.state_dtype)

    @property
    def states(self) -> str:
        """The states' dtype, and their layout where it is not V-major: `fp32 kv`."""
        return self.state_name + (" kv" if self.state_layout == "kv" else "")

    @property
    def slot_nbytes(self) -> int:
        """Bytes of one request's state."""
        return self.HV * HEAD_DIM * HEAD_DIM * self.state_dtype.itemsize

    @property
    def necessary_nbytes(self) -> int:
        """Bytes of the states read once and of the states written, queries to outputs not counted."""
        return self.B * self.slot_nbytes * (1 + self.update + self.T * self.cache)

    @property
    def touched_nbytes(self) -> int:
        """Bytes of distinct memory under those states; an updated state is read and written in place."""
        return self.B * self.slot_nbytes * (1 + self.T * self.cache)

    @property
    def pool_slots(self) -> int:
        return max(POOL_SLOTS, self.B)

    def problem(self) -> GatedDeltaRuleProblem:
        bf16 = torch.bfloat16
        return GatedDeltaRuleProblem(
            B=self.B,
            T=self.T,
            H=self.H,
            HV=self.HV,
            K=HEAD_DIM,
            V=HEAD_DIM,
            io_dtype=bf16,
            gate_dtype=bf16,
            dt_bias_dtype=torch.float32,
            out_dtype=bf16,
            state_dtype=self.state_dtype,
            state_layout=self.state_layout,
            use_qk_l2norm=True,
            update_state=self.update,
            intermediate="buffer" if self.cache else "none",
            index_dtype=torch.int32 if self.state_layout == "vk" else None,
            separate_write_indices=False,
        )

    def __str__(self) -> str:
        return f"{self.heads} B{self.B}-T{self.T} {self.mode} {self.states}"


@dataclass(frozen=True)
class Call:
    """The tensors of one call.

    inputs: q, k [B, T, H, K], v [B, T, HV, V], A_log [HV], a [B, T, HV], dt_bias [HV], b [B, T, HV].
    pool: [slots, HV, V, K]. indices: [B]. first_slot: where B slots in a row begin, for variants without
    indices. output: [B, T, HV, V]. intermediate: [B, T, HV, V, K] or None.
    """

    inputs: dict[str, Any]
    pool: Tensor
    indices: Tensor
    first_slot: int
    output: Tensor
    intermediate: Tensor | None

    @property
    def consecutive(self) -> Tensor:
        """States of B slots in a row. As K = V, they may be taken for K-major ones, [B, HV, K, V]."""
        return self.pool[self.first_slot : self.first_slot + len(self.indices)]


def calls_per_graph(cell: Cell, device: torch.device) -> int:
    """So many that none finds its states in the L2 cache, and that what stays in the cache hardly counts."""
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    traffic = math.ceil(TRAFFIC_PER_GRAPH * l2_bytes / cell.necessary_nbytes)
    wanted = max(MIN_CALLS, traffic, calls_for_cold_l2(cell.touched_nbytes, device))
    return min(MAX_CALLS, wanted)


def buffers_in_rotation(nbytes: int, device: torch.device) -> int:
    """How many buffers of `nbytes` in turn exceed the L2 cache twice over."""
    return calls_for_cold_l2(nbytes, device) - 1


def needed_nbytes(cell: Cell, device: torch.device) -> int:
    """GPU memory that timing the cell takes beside the pool, peers' own states included."""
    states = cell.B * cell.slot_nbytes
    cached = states * cell.T * cell.cache
    if cached:
        cached *= buffers_in_rotation(cached, device)
    # FLA's final states, of two streams
    final = 0 if cell.cache else 2 * states * (1 + calls_for_cold_l2(states, device))
    # q, k, v, output and a, b in bf16, the peers' gates in fp32
    tokens = cell.B * cell.T * (2 * (2 * cell.H + 2 * cell.HV) * HEAD_DIM + 12 * cell.HV)
    per_request = cell.slot_nbytes * (1 + cell.T)
    check = 6 * min(cell.B, REQUESTS_CHECKED) * per_request * 8 // cell.state_dtype.itemsize
    return cached + final + tokens * calls_per_graph(cell, device) + check


def make_pool(cell: Cell, device: torch.device, slots: int) -> Tensor:
    """Random states [slots, HV, V, K]."""
    shape = (slots, cell.HV, HEAD_DIM, HEAD_DIM)
    return fill_pool(torch.empty(shape, dtype=cell.state_dtype, device=device))


def fill_pool(pool: Tensor) -> Tensor:
    """The pool, with new random states."""
    return pool.normal_(std=0.5)


def make_calls(cell: Cell, pool: Tensor, count: int | None = None) -> list[Call]:
    """Calls on inputs of their own: random tokens, and slots of the pool in one random order."""
    device = pool.device
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    B, T, H, HV, slots = cell.B, cell.T, cell.H, cell.HV, len(pool)
    weights = {"A_log": 0.5 * normal(HV, dtype=torch.float32), "dt_bias": normal(HV, dtype=torch.float32)}
    order = torch.randperm(slots, generator=generator, device=device)
    buffers: list[Tensor | None] = [None]
    if cell.cache:
        shape = (B, T, HV, HEAD_DIM, HEAD_DIM)
        rotation = 1 if count else buffers_in_rotation(B * T * cell.slot_nbytes, device)
        buffers = [torch.empty(shape, dtype=cell.state_dtype, device=device) for _ in range(rotation)]
    calls = []
    for i in range(count or calls_per_graph(cell, device)):
        tokens = {"q": normal(B, T, H, HEAD_DIM), "k": normal(B, T, H, HEAD_DIM)}
        tokens |= {"v": normal(B, T, HV, HEAD_DIM), "a": normal(B, T, HV), "b": normal(B, T, HV)}
        calls.append(
            Call(
                inputs=tokens | weights,
                pool=pool,
                indices=order.roll(-i * B)[:B].to(torch.int32),
                first_slot=i * B % (slots - B + 1),
                output=torch.empty_like(tokens["v"]),
                intermediate=buffers[i % len(buffers)],
            )
        )
    return calls


@dataclass(frozen=True)
class Outcome:
    """What a call left behind, states only of the requests that are checked.

    output: [B, T, HV, V]. state: [n, HV, V, K]. intermediate: [n, T, HV, V, K] or None.
    """

    output: Tensor
    state: Tensor
    intermediate: Tensor | None


def checked_requests(batch: int, device: torch.device) -> Tensor:
    """All requests, or evenly spread ones with the first and the last."""
    count = min(batch, REQUESTS_CHECKED)
    return torch.linspace(0, batch - 1, count, device=device).round().long()


def check(cell: Cell, call: Call, requests: Tensor, before: Tensor, got: Outcome, error: float) -> None:
    """Raises AssertionError unless every element of the results of `requests` lies in its bound.

    Of the other requests the output has to be finite. before: the states [n, HV, V, K] that `requests` [n]
    read. error: of the arithmetic, per token, in norms of a state row.
    """
    per_request = {name: x if x.ndim == 1 else x[requests] for name, x in call.inputs.items()}
    expected = gated_delta_rule_reference(**per_request, state=before, update_state=cell.update)
    row_norm = max(x.norm(dim=-1).max().item() for x in (before.double(), expected.intermediate_states))
    arithmetic = cell.T * error * row_norm
    if not bool(got.output.isfinite().all()):
        raise AssertionError("output: not finite everywhere; it was NaN before the call")
    _assert_close(got.output[requests], expected.output, HEAD_DIM**-0.5 * arithmetic, "output")
    if cell.update:
        _assert_close(got.state, expected.state, arithmetic, "state")
    elif not torch.equal(got.state, before):
        raise AssertionError("state: changed, although it is not to be updated")
    if got.intermediate is not None:
        _assert_close(got.intermediate, expected.intermediate_states, arithmetic, "intermediate_states")


def _assert_close(actual: Tensor, expected: Tensor, arithmetic: float, what: str) -> None:
    """One rounding to the dtype of `actual` on top of an absolute error of `arithmetic`."""
    u = UNIT_ROUNDOFF[actual.dtype]
    atol = (1 + u) * arithmetic
    error = (actual.double() - expected).abs_()
    if not bool((error <= expected.abs().mul_(u).add_(atol)).all()):  # a NaN fails as well
        assert_close_elementwise(actual, expected, atol, u, what)


def parse_heads(text: str) -> tuple[int, int]:
    """(H, HV) of "16/16/32": query, key and value heads."""
    parts = text.split("/")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{text!r}, expected query/key/value heads such as 16/16/32")
    query, key, value = map(int, parts)
    if query != key or value % key:
        raise ValueError(f"{text!r}, expected as many query as key heads, and a multiple of value heads")
    return key, value


def modes(update: bool | None, cache: bool | None) -> Sequence[tuple[bool, bool]]:
    """(update, cache) pairs that the flags leave; a call that writes no state at all only by both flags."""
    both = [(u, c) for u, c in ((True, False), (True, True), (False, True), (False, False))]
    asked = [(u, c) for u, c in both if update in (None, u) and cache in (None, c)]
    return [(u, c) for u, c in asked if u or c or (update is False and cache is False)]

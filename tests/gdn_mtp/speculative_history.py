"""Random histories of a speculative kernel's launches, each compared with sequential decoding in float64."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from gdn_mtp.cute.config import LOWEST_LOG_DECAY, Tactic
from gdn_mtp.cute.config_speculative import SpeculativeConfig
from gdn_support import (
    BF16,
    FORGETS,
    FP32,
    NAN,
    ROUNDINGS,
    UNIT_ROUNDOFF,
    assert_close,
    assert_same_bits,
    rows_apart,
)
from torch import Tensor

SMEM_OPTIN_BYTES = 99 * 1024  # of SM120, and less than others have
SM90_SMEM_OPTIN_BYTES = 227 * 1024

# Fields of a `KernelSetup` of SM90 in which one warp of a block reads for all.
CROWDED: dict[str, Any] = {"K": 128, "V": 128, "state": BF16, "crowded": True}
# (config, launcher's arguments) -> None
Launch = Callable[[SpeculativeConfig, tuple[Any, ...]], None]


@dataclass(frozen=True)
class KernelSetup:
    """What a history is about.

    max_tokens: the most that a verify takes. apart: rows of the pool lie apart. forgets: some tokens leave
    nothing of the state, and those of the last head have a log decay beyond float32.
    """

    max_tokens: int = 4
    capacity: int = 16
    H: int = 1
    HV: int = 2
    K: int = 64
    V: int = 64
    io: torch.dtype = BF16
    gates: torch.dtype | None = None  # None: as io
    bias: torch.dtype = FP32
    state: torch.dtype = FP32
    apart: bool = False
    forgets: bool = False
    tree: bool = False
    variable: bool = True
    l2norm: bool = True
    index: torch.dtype = torch.int32
    tactic: Tactic = field(default_factory=lambda: Tactic(4, 1))
    pdl: bool = True
    debug: bool = False
    crowded: bool = False  # with the shared memory of SM90, where more blocks fit on a multiprocessor

    def __str__(self) -> str:
        flags = "-tree" * self.tree + "-raw" * (not self.l2norm) + "-debug" * self.debug
        flags += "-apart" * self.apart + "-forgets" * self.forgets + "-crowded" * self.crowded
        dtypes = "-".join(str(x).removeprefix("torch.").replace("float", "fp") for x in (self.io, self.state))
        sizes = f"T{self.max_tokens}-R{self.capacity}-H{self.H}-HV{self.HV}-K{self.K}-V{self.V}"
        return f"{sizes}-{dtypes}{flags}-{self.tactic.name}"

    def config(self, mode: str, tokens: int, accept: str) -> SpeculativeConfig:
        io, gates, bias, state, index = (
            str(x).removeprefix("torch.")
            for x in (self.io, self.gate_dtype, self.bias, self.state, self.index)
        )
        return SpeculativeConfig(
            mode=mode, T=tokens, K=self.K, V=self.V, capacity=self.capacity, io_dtype=io, gate_dtype=gates,
            dt_bias_dtype=bias, out_dtype=io, state_dtype=state, index_dtype=index,
            use_qk_l2norm=self.l2norm, accept=accept, variable_tokens=self.variable and mode == "verify",
            tree=self.tree and mode == "verify", tensor_scale=False, debug=self.debug, pdl=self.pdl,
            smem_optin_bytes=SM90_SMEM_OPTIN_BYTES if self.crowded else SMEM_OPTIN_BYTES, tactic=self.tactic,
        )  # fmt: skip

    @property
    def gate_dtype(self) -> torch.dtype:
        """Of a and b."""
        return self.io if self.gates is None else self.gates

    @property
    def roundings(self) -> int:
        """What an element may err by for each token, in units of roundoff of the longest row.

        Decays between tokens are made of sums of g, which is at least LOWEST_LOG_DECAY.
        """
        return ROUNDINGS + (2 * round(-LOWEST_LOG_DECAY) if self.forgets else 0)


@dataclass
class Slot:
    """What a slot should stand for. nodes: the state [HV, V, K] on the CPU after each token of its window."""

    state: Tensor
    steps: int = 0  # tokens since the state was last read from the pool
    start: int = 0
    length: int = 0
    live: int = 0
    nodes: list[Tensor] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)


class KernelHistory:
    """A pool and its cache on `device`, and what they should hold; ring entries start as NaN.

    What is expected is computed on the CPU: it takes some hundred small operations per launch.
    """

    def __init__(
        self, setup: KernelSetup, launch: Launch, pool_size: int, device: torch.device, seed: int = 0
    ) -> None:
        torch.set_num_threads(1)  # more only get in the way of such small operations
        self.setup, self.launch, self.device = setup, launch, device
        self.random = random.Random(seed)
        self.generator = torch.Generator(device).manual_seed(seed)
        R, H, HV, K, V = setup.capacity, setup.H, setup.HV, setup.K, setup.V

        def poisoned(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
            return torch.full((pool_size, *shape), NAN, dtype=dtype, device=device)

        self.pool = self.normal(pool_size, HV, V, K).mul_(0.5).to(setup.state)
        if setup.apart:
            self.pool = rows_apart(self.pool).copy_(self.pool)
        self.keys, self.updates = poisoned(R, H, K, dtype=setup.io), poisoned(R, HV, V)
        self.gates, self.k_scale = poisoned(R, HV), poisoned(R, H)
        self.cursor = torch.zeros((pool_size, 4), dtype=torch.int32, device=device)
        self.live = torch.zeros((pool_size,), dtype=torch.int32, device=device)
        self.A_log, self.dt_bias = self.normal(HV) * 0.5, self.normal(HV).to(setup.bias)
        if setup.forgets:
            self.A_log[-1] = 100.0  # exp of which is beyond float32
        self.weights = self.A_log.cpu().double(), self.dt_bias.cpu().double()
        self.slots = [Slot(state.double()) for state in self.pool.cpu()]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    @property
    def cache(self) -> tuple[Tensor, ...]:
        return (self.keys, self.updates, self.gates, self.k_scale, self.cursor, self.live)

    def ints(self, values: list[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def indices(self, named: list[int]) -> Tensor:
        return torch.tensor(named, dtype=self.setup.index, device=self.device)

    # What should happen

    def accept(self, named: list[int], keep: bool = False) -> tuple[str, Tensor | None, Tensor | None]:
        """Choose what each named slot accepts; (accept, num_accepted, accepted_nodes) for a launch.

        keep: the slots' expectations stay as they are, for a launch that changes nothing; they are returned
        by `accepted_state`.
        """
        self.after: dict[int, Slot] = {}
        counts, paths = [], []
        for index in named:
            if index < 0:
                counts.append(3)
                paths.append([0, 1])
                continue
            slot = self.slots[index]
            path: list[int] = []
            node = self.random.randrange(-1, len(slot.nodes))
            while node >= 0:
                path.insert(0, node)
                node = slot.parents[node]
            after = Slot(slot.state, slot.steps + len(path), slot.start, slot.length, slot.live)
            if path:
                after.state = slot.nodes[path[-1]]
                after.length += path[-1] + 1
                after.live |= sum(1 << (slot.length + node) for node in path)
            self.after[index] = after
            counts.append(len(path))
            paths.append(path)
        if not keep:
            for index, after in self.after.items():
                self.slots[index] = after
        if not self.setup.tree:
            return "counts", self.ints(counts), None
        width = max(1, *(len(path) for path in paths))
        return "nodes", None, self.ints([path + [-1] * (width - len(path)) for path in paths])

    def fold(self, index: int) -> None:
        """Slot `index` was folded: compare it with the pool, from which it goes on."""
        slot = self.slots[index]
        self.check_state(self.pool[index], slot, f"state of slot {index}")
        slot.state, slot.steps = self.pool[index].cpu().double(), 0
        slot.start, slot.length, slot.live = (slot.start + slot.length) % self.setup.capacity, 0, 0

    def bound(self, slot: Slot) -> float:
        return (
            (slot.steps + 1)
            * self.setup.roundings
            * UNIT_ROUNDOFF[FP32]
            * max(slot.state.norm(dim=-1).max().item(), 1.0)
        )

    def check_state(self, actual: Tensor, slot: Slot, what: str) -> None:
        assert_close(actual.cpu(), slot.state, self.bound(slot), what)

    def check_cursors(self) -> None:
        expected = [[slot.start, slot.length, len(slot.nodes), 0] for slot in self.slots]
        assert self.cursor.tolist() == expected, f"cursors are {self.cursor.tolist()}, expected {expected}"
        live = [slot.live if slot.live < 1 << 31 else slot.live - (1 << 32) for slot in self.slots]
        assert self.live.tolist() == live

    def untouched(self, named: list[int]) -> Callable[[], None]:
        """Remember the slots not named, pool and cache; the result compares them."""
        others = torch.tensor(sorted(set(range(len(self.slots))) - set(named)), dtype=torch.long).to(
            self.device
        )
        before = [x[others].clone() for x in (self.pool, *self.cache)]

        def check() -> None:
            for x, old in zip((self.pool, *self.cache), before, strict=True):
                assert_same_bits(x[others], old, "a slot that nobody names")

        return check

    # Launches

    def verify(self, named: list[int], tokens: int, fold_above: int) -> None:
        """Accept at random, verify `tokens` tokens per slot (negative: padding), compare everything."""
        setup = self.setup
        B, H, HV, K, V = len(named), setup.H, setup.HV, setup.K, setup.V
        check_others = self.untouched(named)
        accept, num_accepted, accepted_nodes = self.accept(named)
        numbers = [self.random.randrange(tokens + 1) if setup.variable else tokens for _ in named]
        parents = [
            [self.random.randrange(-1, t) if setup.tree else t - 1 for t in range(tokens)] for _ in named
        ]
        key_norm = 1.0 if setup.l2norm else 1.25 * K**0.5
        q, k = (self.normal(B, tokens, H, K).div_(key_norm).to(setup.io) for _ in range(2))
        v = self.normal(B, tokens, HV, V).to(setup.io)
        a, b = (self.normal(B, tokens, HV).to(setup.gate_dtype) for _ in range(2))
        if setup.forgets:
            a[self.normal(B, tokens, HV) > 1.0] = FORGETS
        for x in (q, k, v, a, b):
            for i, number in enumerate(numbers):
                x[i, number:] = NAN
        output = torch.full((B, tokens, HV, V), NAN, dtype=setup.io, device=self.device)
        self.launch(
            setup.config("verify", tokens, accept),
            (
                q, k, v, a, b, self.A_log, self.dt_bias, K**-0.5, self.pool, self.indices(named), *self.cache,
                num_accepted, accepted_nodes, self.ints(numbers) if setup.variable else None,
                self.ints(parents) if setup.tree else None, fold_above, output,
            ),
        )  # fmt: skip
        check_others()
        output, q, k, v, a, b = (x.cpu() for x in (output, q, k, v, a, b))
        for i, index in enumerate(named):
            expected = torch.zeros(tokens, HV, V, dtype=torch.double)
            bound = 0.0
            if index >= 0:
                slot = self.slots[index]
                exact = slot.state
                if slot.length > fold_above:
                    bound = self.bound(slot)
                    self.fold(index)
                slot.parents, slot.nodes = parents[i][: numbers[i]], []
                above = {-1: (exact, slot.state - exact)}  # before the fold's rounding, and the rounding
                for t, parent in enumerate(slot.parents):
                    inputs = [x[i, t].double() for x in (q, k, v, a, b)]
                    state, rounding = above[parent]
                    state, expected[t], decay = self.decode(state, *inputs)
                    above[t] = state, decay[:, None, None] * rounding
                    slot.nodes.append(sum(above[t]))
                bound = max(bound, (tokens + 1) * self.bound(slot))
            q_norm = 1.0 if setup.l2norm else q[i].double().nan_to_num(0.0).norm(dim=-1).max().item()
            assert_close(output[i], expected, K**-0.5 * q_norm * bound, f"output of request {i}")
        self.check_cursors()

    def decode(
        self, state: Tensor, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One token in float64: the state after it, its output [HV, V], and the decay [HV]."""
        if self.setup.l2norm:
            q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
        q, k = (x.repeat_interleave(self.setup.HV // self.setup.H, 0) for x in (q, k))
        A_log, dt_bias = self.weights
        decay = torch.exp(-A_log.exp() * torch.nn.functional.softplus(a + dt_bias))
        state = decay[:, None, None] * state
        u = torch.sigmoid(b)[:, None] * (v - torch.einsum("hvk,hk->hv", state, k))
        state = state + u[:, :, None] * k[:, None, :]
        return state, self.setup.K**-0.5 * torch.einsum("hvk,hk->hv", state, q), decay

    def commit(self, named: list[int]) -> None:
        check_others = self.untouched(named)
        accept, num_accepted, accepted_nodes = self.accept(named)
        arguments = (self.pool, self.indices(named), *self.cache, num_accepted, accepted_nodes, None)
        self.launch(self.setup.config("commit", 0, accept), arguments)
        check_others()
        for index in named:
            if index >= 0:
                self.fold(index)
        self.check_cursors()

    def materialize(self, named: list[int]) -> None:
        before = [x.clone() for x in (self.pool, *self.cache)]
        accept, num_accepted, accepted_nodes = self.accept(named, keep=True)
        states = torch.full(
            (len(named), *self.pool.shape[1:]), NAN, dtype=self.setup.state, device=self.device
        )
        arguments = (self.pool, self.indices(named), *self.cache, num_accepted, accepted_nodes, states)
        self.launch(self.setup.config("materialize", 0, accept), arguments)
        for x, old in zip((self.pool, *self.cache), before, strict=True):
            assert_same_bits(x, old, "pool or cache")
        for i, index in enumerate(named):
            if index < 0:
                assert bool((states[i] == 0).all())
            else:
                self.check_state(states[i], self.after[index], f"materialized state of slot {index}")

    def step(self, batch: int) -> None:
        """One random launch of `batch` requests, some of them padding."""
        named = self.random.sample(range(len(self.slots)), batch)
        named = [-1 if self.random.random() < 0.1 else index for index in named]
        mode = self.random.choices(("verify", "commit", "materialize"), (8, 1, 1))[0]
        if mode != "verify":
            getattr(self, mode)(named)
            return
        most = self.setup.max_tokens
        full = self.setup.capacity - 2 * most
        self.verify(named, most, self.random.choice((0, full // 2, full, full, full)))


@dataclass(frozen=True)
class Misuse:
    """A call of a slot whose cursor begins with `cursor`, and what a kernel of debug mode says of it."""

    message: str
    mode: str = "commit"
    slot: int = 1
    cursor: tuple[int, int, int] = (0, 4, 2)
    accepted: int | tuple[int, ...] = 0  # a number of tokens, or nodes
    tokens: int = 4
    parents: tuple[int, ...] | None = None

    def launch(self, launch: Launch, device: torch.device, **fields: Any) -> None:
        setup = KernelSetup(tree=self.parents is not None, debug=True, **fields)
        history = KernelHistory(setup, launch, 3, device)
        history.cursor[1, :3] = history.ints(list(self.cursor))
        nodes = None if isinstance(self.accepted, int) else history.ints([list(self.accepted)])
        counts = history.ints([self.accepted]) if nodes is None else None
        named = (history.pool, history.indices([self.slot]), *history.cache, counts, nodes)
        T, H, HV, D = setup.max_tokens, setup.H, setup.HV, setup.K
        accept = "counts" if nodes is None else "nodes"
        config = setup.config(self.mode, T if self.mode == "verify" else 0, accept)
        if self.mode != "verify":
            launch(config, (*named, None))
            return
        q, k, v = (history.normal(1, T, heads, D).to(setup.io) for heads in (H, H, HV))
        a, b = (history.normal(1, T, HV).to(setup.io) for _ in range(2))
        parents = None if self.parents is None else history.ints([list(self.parents)])
        tokens = (q, k, v, a, b, history.A_log, history.dt_bias, D**-0.5)
        window = (history.ints([self.tokens]), parents, 0, torch.empty_like(v))
        launch(config, (*tokens, *named, *window))


MISUSES = {
    "more accepted": Misuse("num_accepted is not between 0", accepted=3),
    "node past the window": Misuse("accepted_nodes names a node", accepted=(0, 2)),
    "nodes out of order": Misuse("accepted_nodes do not ascend", accepted=(1, -1, 0)),
    "node twice": Misuse("accepted_nodes do not ascend", accepted=(1, 1)),
    "start out of range": Misuse("cursor of a slot", cursor=(16, 0, 0)),
    "window too long": Misuse("cursor of a slot", cursor=(0, 12, 5)),
    "no room for the next window": Misuse("cursor of a slot", "verify", cursor=(0, 12, 4)),
    "more pending than leaves room": Misuse("cursor of a slot", "verify", cursor=(0, 16, 0)),
    "slot beyond the pool": Misuse("state_indices names a slot beyond the pool", slot=3),
    "slot of a verify beyond the pool": Misuse("state_indices names a slot", "verify", slot=3),
    "more tokens than there are": Misuse("num_tokens is not between 0 and T", "verify", tokens=5),
    "fewer tokens than none": Misuse("num_tokens is not between 0 and T", "verify", tokens=-1),
    "parent of its own": Misuse("parent_indices names neither", "verify", parents=(-1, 0, 2, 0)),
    "parent beyond the root": Misuse("parent_indices names neither", "verify", parents=(-1, 0, 1, -2)),
}
# What a kernel of debug mode passes over: nodes that are none, parents of tokens that a request has not.
USES = {
    "nodes with gaps": Misuse("", accepted=(-1, 0, -7, 1)),
    "parents of no tokens": Misuse("", "verify", tokens=2, parents=(-1, 0, 7, -9)),
    "a slot that is padding": Misuse("", "verify", slot=-1, tokens=9, parents=(5, 5, 5, 5)),
}

"""Histories of a speculative cache beside the float64 oracle, shared by the tests of gdn_mtp.speculative."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import gdn_mtp
import torch
from gdn_mtp.speculative import SpeculativeReference
from gdn_support import BF16, DEVICE, FP32, NAN, ROUNDINGS, UNIT_ROUNDOFF, assert_close, assert_same_bits
from torch import Tensor

# Gates are drawn so that g <= -exp(-1) softplus(-1) < -0.11 for every token.
LARGEST_DECAY = 0.9
FLOAT_TENSORS = ("keys", "updates", "gates", "k_scale")


@dataclass(frozen=True)
class Setup:
    """Sizes and dtypes of one history."""

    pool_size: int = 6
    H: int = 2
    HV: int = 4
    K: int = 16
    V: int = 8
    max_tokens: int = 4
    capacity: int | None = None
    io: torch.dtype = BF16
    state: torch.dtype = FP32
    l2norm: bool = True
    scale: float | None = None

    def pool(self, seed: int = 1) -> Tensor:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        shape = (self.pool_size, self.HV, self.V, self.K)
        return torch.randn(shape, generator=generator, device=DEVICE).mul_(0.5).to(self.state)

    def cache(self) -> gdn_mtp.SpeculativeCache:
        """A cache whose unused memory holds NaN."""
        cache = gdn_mtp.SpeculativeCache(
            *(self.pool_size, self.H, self.HV, self.K, self.V),
            max_tokens=self.max_tokens,
            capacity=self.capacity,
            io_dtype=self.io,
            device=DEVICE,
        )
        for name in FLOAT_TENSORS:
            getattr(cache, name).fill_(NAN)
        return cache

    def tokens(self, batch: int, T: int, seed: int) -> dict[str, Tensor]:
        """q, k, v, a, b as keyword arguments; keys have about unit length in any case."""
        generator = torch.Generator(DEVICE).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=DEVICE)

        unit = 1.0 if self.l2norm else 0.8 * self.K**-0.5
        drawn = {
            "q": normal(batch, T, self.H, self.K) * unit,
            "k": normal(batch, T, self.H, self.K) * unit,
            "v": normal(batch, T, self.HV, self.V),
            "a": normal(batch, T, self.HV).clamp_min(-1.0),
            "b": normal(batch, T, self.HV),
        }
        if not self.l2norm:  # an update must not lengthen a state
            drawn["k"] /= drawn["k"].norm(dim=-1, keepdim=True).clamp_min(0.99) / 0.99
        return {name: x.to(self.io) for name, x in drawn.items()}

    def heads(self) -> dict[str, Tensor]:
        """A_log and dt_bias."""
        generator = torch.Generator(DEVICE).manual_seed(7)
        A_log, dt_bias = torch.randn(2, self.HV, generator=generator, device=DEVICE).mul_(0.5)
        return {"A_log": A_log.clamp_min(-1.0), "dt_bias": dt_bias.clamp_min(0.0)}

    @property
    def options(self) -> dict[str, object]:
        return {"scale": self.scale, "use_qk_l2norm": self.l2norm}


@dataclass
class Accepted:
    """The tokens that made a slot's state, oldest first, each a dict of [1, 1, ...] tensors."""

    base: Tensor  # [HV, V, K] float64
    tokens: list[dict[str, Tensor]] = field(default_factory=list)


class History:
    """A pool with its cache and the oracle; every call is made on both and compared.

    Slots that a call does not name keep their bits, in the pool and in the cache.
    """

    def __init__(self, setup: Setup, backend: str = "auto") -> None:
        self.setup, self.backend = setup, backend
        self.pool, self.cache = setup.pool(), setup.cache()
        self.oracle = SpeculativeReference(self.pool)
        self.accepted = [Accepted(state.clone()) for state in self.oracle.states]
        self.windows: list[tuple[dict[str, Tensor], list[int]]] = [({}, [])] * setup.pool_size
        self.row_norm = float(self.oracle.states.norm(dim=-1).max())
        # By slot, a bound on the error of the state that it stands for, before that is rounded again. A token
        # adds ROUNDINGS * u of the longest row, a fold a rounding to the pool's dtype, and before a token
        # comes on top what was there shrinks by a decay of at most LARGEST_DECAY: no history exceeds
        # 1 / (1 - LARGEST_DECAY) = 10 times what a token and a fold add.
        self.errors = [0.0] * setup.pool_size

    def window_sizes(self, slots: list[int]) -> list[int]:
        return [len(self.windows[slot][1]) if slot >= 0 else 0 for slot in slots]

    def random_acceptance(self, slots: list[int], rng: random.Random) -> dict[str, Tensor]:
        """num_accepted or accepted_nodes for requests on `slots`: a path of each window, perhaps empty."""
        paths = []
        for slot in slots:
            parents = self.windows[slot][1] if slot >= 0 else []
            node, path = rng.randrange(-1, len(parents)), []
            while node >= 0:
                path.insert(0, node)
                node = parents[node]
            paths.append(path)
        chains = all(path == list(range(len(path))) for path in paths)
        if chains and rng.random() < 0.8:
            return {"num_accepted": int32([len(path) for path in paths])}
        width = max(1, *map(len, paths)) + rng.randrange(2)
        return {"accepted_nodes": int32([path + [-1] * (width - len(path)) for path in paths])}

    def verify(
        self,
        slots: list[int],
        T: int,
        seed: int,
        acceptance: dict[str, Tensor] | None = None,
        *,
        num_tokens: list[int] | None = None,
        parents: list[list[int]] | None = None,
        fold: str = "auto",
        out: torch.dtype = FP32,
    ) -> Tensor:
        setup, acceptance = self.setup, acceptance or {}
        tokens, indices = setup.tokens(len(slots), T, seed), index_tensor(slots)
        window = {
            "num_tokens": None if num_tokens is None else int32(num_tokens),
            "parent_indices": None if parents is None else int32(parents),
        }
        output = torch.full(tokens["v"].shape, NAN, dtype=out, device=DEVICE)
        unchanged, pool = self.snapshot(slots), self.pool.clone()
        returned = gdn_mtp.verify(
            *(tokens[name] for name in ("q", "k", "v", "a", "b")),
            **setup.heads(),
            state_pool=self.pool,
            state_indices=indices,
            cache=self.cache,
            **said(acceptance),
            **window,
            **setup.options,
            fold=fold,
            output=output,
            backend=self.backend,
        )
        unchanged()
        assert returned is output
        self._note_acceptance(slots, acceptance)
        carried = self.largest_error(slots)
        self._note_folds(slots, pool)
        expected = self.oracle.verify(
            **tokens, **setup.heads(), state_indices=indices, **acceptance, **window, **setup.options
        )
        for request, slot in enumerate(slots):
            if slot >= 0:
                count = T if num_tokens is None else num_tokens[request]
                own = list(range(-1, T - 1)) if parents is None else parents[request]
                assert self.cache.cursor[slot, 2:].tolist() == [count, 0]
                row = {name: x[request : request + 1] for name, x in tokens.items()}
                self.windows[slot] = (row, own[:count])
        nodes = [state for window in self.oracle.windows.values() for state in window]
        self.row_norm = max([self.row_norm, *(float(state.norm(dim=-1).max()) for state in nodes)])
        scale = setup.K**-0.5 if setup.scale is None else abs(setup.scale)
        q_norm = 1.0 if setup.l2norm else float(tokens["q"].double().norm(dim=-1).max())
        arithmetic = carried + T * ROUNDINGS * UNIT_ROUNDOFF[FP32] * self.row_norm
        assert_close(output, expected, scale * q_norm * arithmetic, "output")
        for request, slot in enumerate(slots):
            count = T if num_tokens is None else num_tokens[request]
            assert (output[request, 0 if slot < 0 else count :] == 0).all()
        return output

    def commit(self, slots: list[int], acceptance: dict[str, Tensor] | None = None) -> None:
        """Materialize, then commit: the same states, and nothing left in the cache."""
        acceptance, indices = acceptance or {}, index_tensor(slots)
        named = (self.pool, indices, self.cache)
        everything = self.snapshot([])
        states = gdn_mtp.materialize(*named, **said(acceptance), backend=self.backend)
        everything()
        unchanged, pool = self.snapshot(slots), self.pool.clone()
        returned = gdn_mtp.commit(*named, **said(acceptance), backend=self.backend)
        unchanged()
        assert returned is self.pool
        self._note_acceptance(slots, acceptance)
        expected = self.oracle.commit(indices, **acceptance)
        assert_close(states, expected, self.largest_error(slots), "states")
        self._note_folds(slots, pool)
        for request, slot in enumerate(slots):
            if slot >= 0:
                self.windows[slot] = ({}, [])
                assert_same_bits(self.pool[slot], states[request], "pool")
                assert self.cache.cursor[slot, 1:].tolist() == [0, 0, 0]
                assert self.cache.live[slot] == 0
            else:
                assert (states[request] == 0).all()

    def copy(self, src: list[int], dst: list[int]) -> None:
        unchanged = self.snapshot(dst)
        self.cache.copy_slots(index_tensor(src), index_tensor(dst), self.pool)
        unchanged()
        self.oracle.copy_slots(index_tensor(src), index_tensor(dst))
        pairs = [(s, d) for s, d in zip(src, dst, strict=True) if s >= 0 and d >= 0]
        accepted, windows, errors = list(self.accepted), list(self.windows), list(self.errors)
        for s, d in pairs:
            self.errors[d] = errors[s]
            self.accepted[d] = Accepted(accepted[s].base, list(accepted[s].tokens))
            self.windows[d] = windows[s]

    def reset(self, slots: list[int], seed: int) -> None:
        """A new request moves into each slot: another state in the pool, nothing in the cache."""
        unchanged = self.snapshot(slots)
        self.pool[slots] = self.setup.pool(seed)[slots]
        self.cache.reset_slots(index_tensor(slots))
        unchanged()
        self.oracle.reset_slots(index_tensor(slots), self.pool)
        for slot in slots:
            self.accepted[slot] = Accepted(self.oracle.states[slot].clone())
            self.windows[slot] = ({}, [])
            self.errors[slot] = 0.0
        self.row_norm = max(self.row_norm, float(self.oracle.states.norm(dim=-1).max()))

    def check_against_sequential_decoding(self) -> None:
        """Every slot, committed, is what decoding its accepted tokens one by one makes of its first state."""
        self.commit(list(range(self.setup.pool_size)))
        for slot, accepted in enumerate(self.accepted):
            expected = accepted.base
            if accepted.tokens:
                tokens = {
                    name: torch.cat([token[name] for token in accepted.tokens], dim=1)
                    for name in accepted.tokens[0]
                }
                reference = gdn_mtp.gated_delta_rule_reference(
                    **tokens, **self.setup.heads(), state=accepted.base[None], **self.setup.options
                )
                expected = reference.state[0]
            assert_close(self.pool[slot], expected, self.errors[slot], f"slot {slot}")

    def snapshot(self, named: list[int]) -> object:
        """A function that asserts that pool and cache changed in the named slots only."""
        others = [slot for slot in range(self.setup.pool_size) if slot not in named]
        tensors = {"pool": self.pool, **self.cache.state_dict()}
        before = {name: tensor[others].clone() for name, tensor in tensors.items()}

        def check() -> None:
            for name, tensor in tensors.items():
                assert_same_bits(tensor[others], before[name], f"{name} of a slot that was not named")

        return check

    def largest_error(self, slots: list[int]) -> float:
        """The largest bound among named slots."""
        return max((self.errors[slot] for slot in slots if slot >= 0), default=0.0)

    def _note_folds(self, slots: list[int], before: Tensor) -> None:
        """A state of the pool that is another than `before` was rounded, but for a float32 one."""
        for slot in slots:
            if slot >= 0 and self.setup.state != FP32 and not torch.equal(self.pool[slot], before[slot]):
                self.errors[slot] += UNIT_ROUNDOFF[self.setup.state] * self.row_norm

    def _note_acceptance(self, slots: list[int], acceptance: dict[str, Tensor]) -> None:
        for request, slot in enumerate(slots):
            if slot < 0:
                continue
            path: list[int] = []
            if "num_accepted" in acceptance:
                path = list(range(int(acceptance["num_accepted"][request])))
            elif "accepted_nodes" in acceptance:
                path = [node for node in acceptance["accepted_nodes"][request].tolist() if node >= 0]
            row = self.windows[slot][0]
            for _ in path:
                added = ROUNDINGS * UNIT_ROUNDOFF[FP32] * self.row_norm
                self.errors[slot] = LARGEST_DECAY * self.errors[slot] + added
            self.accepted[slot].tokens += [
                {name: x[:, node : node + 1] for name, x in row.items()} for node in path
            ]
            self.windows[slot] = ({}, [])


def random_tree(T: int, rng: random.Random) -> list[int]:
    """Parents of T nodes, each an earlier one or the root."""
    return [rng.randrange(-1, node) if node else -1 for node in range(T)]


def said(acceptance: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """`acceptance` with `num_accepted`, which has no default."""
    return {"num_accepted": None, **acceptance}


def int32(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def index_tensor(slots: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(slots, dtype=dtype, device=DEVICE)


def arguments(history: History, slots: list[int], T: int, seed: int = 0) -> tuple[Any, ...]:
    """The positional arguments of verify."""
    tokens = history.setup.tokens(len(slots), T, seed)
    heads = history.setup.heads()
    return (
        *(tokens[name] for name in ("q", "k", "v", "a", "b")),
        *(heads["A_log"], heads["dt_bias"], history.pool, index_tensor(slots), history.cache),
    )

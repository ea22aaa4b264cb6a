"""The compact updates of draft tokens: per pool slot a ring of keys, corrected values and decays.

A Gated DeltaNet token changes a state by a decay and a product u k^T. Keeping u, k and the decay instead of
the state after the token takes (V + K * H / HV) / (V K) of its elements. A slot of the cache belongs to the
slot of the same number in a state pool; together they stand for one state:

    S = pool[slot];  per pending token j, in order:  S <- exp(gates[j]) S + updates[j] (k_scale[j] keys[j])^T
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from kernel_dispatch import (
    ArgumentError,
    ArgumentTypeError,
    TensorSpec,
    as_device,
    bind,
    check_index_range,
    is_plain,
    is_watched,
    values_are_readable,
)
from torch import Tensor

from gdn_mtp.problem import INDEX_DTYPES, INPUT_DTYPES, STATE_DTYPES, check_size
from gdn_mtp.speculative.problem import MAX_CAPACITY, check_slot
from gdn_mtp.speculative.values import cursor_fault, named_slots
from gdn_mtp.torch_kernel import store_slots

CURSOR_FIELDS = 4
CAPACITY_STEP = 8  # pending tokens are applied in chunks of as many


class CacheTensors(NamedTuple):
    """What a cache consists of; R is its capacity.

    keys     [pool, R, H, K] the dtype of k: keys as given
    updates  [pool, R, HV, V] float32: corrected values u
    gates    [pool, R, HV] float32: log decays g
    k_scale  [pool, R, H] float32: the factor of a key, 1 without l2norm
    cursor   [pool, 4] int32: start, length, window, arrivals
    live     [pool] int32, bits: bit j is set if the token at ring position (start + j) % R was accepted

    The tokens at start .. start + length - 1 are pending where they are live, those of the last verify lie at
    start + length .. start + length + window - 1, modulo R. `arrivals` is 0 between calls.
    """

    keys: Tensor
    updates: Tensor
    gates: Tensor
    k_scale: Tensor
    cursor: Tensor
    live: Tensor


CACHE_SPECS = tuple(
    TensorSpec(f"cache.{name}", shape, dtypes, layout="contiguous", written=True)
    for name, shape, dtypes in (
        ("keys", ("pool", "capacity", "H", "K"), INPUT_DTYPES),
        ("updates", ("pool", "capacity", "HV", "V"), (torch.float32,)),
        ("gates", ("pool", "capacity", "HV"), (torch.float32,)),
        ("k_scale", ("pool", "capacity", "H"), (torch.float32,)),
        ("cursor", ("pool", CURSOR_FIELDS), (torch.int32,)),
        ("live", ("pool",), (torch.int32,)),
    )
)


class PoolKey(NamedTuple):
    """What tells a state pool from another one; two views of the same memory may begin at one address."""

    address: int
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, state_pool: Tensor) -> "PoolKey":
        """The key of a tensor that has an address."""
        return cls(state_pool.data_ptr(), state_pool.stride(), state_pool.dtype)

    def fits(self, state_pool: Tensor) -> bool:
        """Whether it is the key of a tensor, which each launch asks, without making that one's key."""
        same_memory = state_pool.data_ptr() == self.address and state_pool.stride() == self.strides
        return same_memory and state_pool.dtype == self.dtype

    def __str__(self) -> str:
        return f"{self.address:#x} ({self.dtype}, strides {self.strides})"


class SpeculativeCache:
    """Room for the draft tokens of every slot of a state pool [pool_size, HV, V, K]; allocated once.

    max_tokens: the largest T of a verify, 1 to 16. capacity: tokens per slot, 2 * max_tokens to 32; None for
    3 * max_tokens rounded up to a multiple of 8. What exceeds 2 * max_tokens is room for accepted tokens that
    wait to be folded into the pool, so that it is written the more seldom; with none, as at max_tokens = 16,
    they are folded at the next verify whatever its `fold` says.
    io_dtype: of q, k and v. device: None for the current CUDA device, or the CPU where there is none.
    Raises ArgumentError or ArgumentTypeError naming the argument.
    Attributes, all read-only: the arguments, and the tensors of `CacheTensors`, which a caller may read and
    copy.

    A cache belongs to one pool: the first call that succeeds, outside code that `torch.compile` traces, binds
    it to the pool's address, strides and dtype, and another pool is refused from then on. `bind` says that
    the pool has moved. A copy of a cache, by pickle or `copy.deepcopy`, is not bound yet; one by `copy.copy`
    shares the tensors and is bound as the cache is.
    A pool does not know its cache: a second one, fresh, is accepted with it, and what is pending in the first
    is then ignored, so `commit` comes before a change of caches.

    A slot that gets a new request has to be reset. While tokens are pending, the pool's state alone is not
    the slot's state: `gdn_mtp.commit` folds them before anything else reads it.
    """

    def __init__(
        self,
        pool_size: int,
        H: int,
        HV: int,
        K: int,
        V: int,
        *,
        max_tokens: int,
        capacity: int | None = None,
        io_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        sizes = {"pool_size": pool_size, "H": H, "HV": HV, "K": K, "V": V, "max_tokens": max_tokens}
        for name, size in sizes.items():
            check_size(name, size)
        if HV % H:
            raise ArgumentError("HV", f"{HV}, expected a multiple of H = {H}")
        if 2 * max_tokens > MAX_CAPACITY:
            raise ArgumentError("max_tokens", f"{max_tokens}, expected at most {MAX_CAPACITY // 2}")
        if capacity is None:
            capacity = min(MAX_CAPACITY, -(-3 * max_tokens // CAPACITY_STEP) * CAPACITY_STEP)
        check_size("capacity", capacity)
        if not 2 * max_tokens <= capacity <= MAX_CAPACITY:
            expected = f"2 * max_tokens = {2 * max_tokens} to {MAX_CAPACITY}"
            raise ArgumentError("capacity", f"{capacity}, expected {expected}")
        check_slot(capacity, H, HV, K, V)
        if io_dtype not in INPUT_DTYPES:
            raise ArgumentTypeError("io_dtype", f"{io_dtype}, expected one of {INPUT_DTYPES}")
        self.pool_size, self.H, self.HV, self.K, self.V = pool_size, H, HV, K, V
        self.max_tokens, self.capacity, self.io_dtype = max_tokens, capacity, io_dtype
        self._pool: PoolKey | None = None
        known = {"pool": pool_size, "capacity": capacity, "H": H, "HV": HV, "K": K, "V": V}
        place = as_device(device)
        for spec, name in zip(self.specs, CacheTensors._fields, strict=True):
            shape = [known[dim] if isinstance(dim, str) else dim for dim in spec.shape]
            setattr(self, name, torch.zeros(shape, dtype=spec.dtypes[0], device=place))

    keys: Tensor
    updates: Tensor
    gates: Tensor
    k_scale: Tensor
    cursor: Tensor
    live: Tensor

    def __setattr__(self, name: str, value: object) -> None:
        """What kernels are compiled for and tensors that a graph has captured stay; the pool may move."""
        if name != "_pool" and hasattr(self, name):
            raise AttributeError(
                f"SpeculativeCache.{name} is read-only; load_state_dict copies tensors into a cache"
            )
        super().__setattr__(name, value)

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """One `kernel_dispatch.TensorSpec` per tensor, in the order of `CacheTensors`."""
        keys, *others = CACHE_SPECS
        return (replace(keys, dtypes=(self.io_dtype,)), *others)

    @property
    def tensors(self) -> CacheTensors:
        """The tensors themselves."""
        return CacheTensors(self.keys, self.updates, self.gates, self.k_scale, self.cursor, self.live)

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.keys.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, pool_size times those of a slot."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def __repr__(self) -> str:
        sizes = f"pool_size={self.pool_size}, H={self.H}, HV={self.HV}, K={self.K}, V={self.V}"
        room = f"max_tokens={self.max_tokens}, capacity={self.capacity}"
        return f"SpeculativeCache({sizes}, {room}, {self.io_dtype} on {self.device}, {self.nbytes} bytes)"

    def bind(self, state_pool: Tensor) -> None:
        """Say that `state_pool` [pool_size, HV, V, K] holds this cache's states from now on.

        Raises ArgumentError or ArgumentTypeError naming `state_pool` if it cannot.
        """
        self._check_sizes(state_pool)
        self._pool = PoolKey.of(state_pool)

    def is_bound_to(self, state_pool: Tensor) -> bool:
        """Whether the cache is bound to `state_pool`; false for what has no address."""
        return self._pool is not None and type(state_pool) is Tensor and self._pool.fits(state_pool)

    def check_pool(self, state_pool: Tensor) -> None:
        """Raises ArgumentError naming `cache` if it is bound to another pool.

        Names `state_pool` where that has other sizes than the cache. A pool without an address, as tracing
        sees it, is not looked at.
        """
        if self._pool is None or not has_address(state_pool) or self._pool.fits(state_pool):
            return
        self._check_sizes(state_pool)  # what cannot be the cache's pool at all has an error of its own
        raise ArgumentError(
            "cache",
            f"is of the state pool at {self._pool}, not of this one at {PoolKey.of(state_pool)}; "
            "cache.bind(state_pool) says that the pool has moved",
        )

    def adopt(self, state_pool: Tensor) -> None:
        """Bind a cache that is not bound yet to the pool of a call that succeeded, if it has an address."""
        if self._pool is None and has_address(state_pool):
            self._pool = PoolKey.of(state_pool)

    def __getstate__(self) -> dict[str, object]:
        """A copy's pool is another one, at an address that is not known yet."""
        return self.__dict__ | {"_pool": None}

    def __copy__(self) -> "SpeculativeCache":
        """A copy that shares the tensors is of the same pool."""
        shared = type(self).__new__(type(self))
        shared.__dict__.update(self.__dict__)
        return shared

    @torch.inference_mode()
    def reset_slots(self, slots: Tensor) -> None:
        """Forget all tokens of `slots` [n], int32 or int64; a negative one is skipped.

        The pool keeps what it holds. Waits for no device, so it can be captured in a CUDA graph. Raises
        ArgumentError or ArgumentTypeError naming `slots`; their values are read on the CPU and in debug mode,
        and one beyond the pool is skipped where they are not.
        """
        chosen = self._checked("slots", slots)
        if len(chosen) == 0:
            return
        for tensor in (self.cursor, self.live):
            store_slots(tensor, chosen, tensor.new_zeros(len(chosen), *tensor.shape[1:]))

    @torch.inference_mode()
    def copy_slots(self, src: Tensor, dst: Tensor, state_pool: Tensor | None = None) -> None:
        """Make slot dst[i] what slot src[i] is, for all i at once; src and dst [n], int32 or int64.

        A pair with a negative slot is skipped. No slot may be named twice in the dst of the others; one may
        be in src and in dst, and its old content moves on. state_pool: also copies the states, which else is
        up to the caller. Waits for no device, so it can be captured in a CUDA graph. Raises as `reset_slots`
        does, naming the argument, and naming `cache` for another pool than the cache's own.
        """
        sources, targets = self._checked("src", src), self._checked("dst", dst)
        if len(sources) != len(targets):
            raise ArgumentError("dst", f"{len(targets)} slots, expected {len(sources)} as src has")
        targets = targets.masked_fill(sources < 0, -1)
        if _may_read(targets):
            named_slots("dst", targets, self.pool_size)
        moved: tuple[Tensor, ...] = self.tensors
        if state_pool is not None:
            self._check_sizes(state_pool)
            self.check_pool(state_pool)
            moved = (*moved, state_pool)
        if len(sources) == 0:
            return
        for tensor in moved:
            store_slots(tensor, targets, tensor.index_select(0, sources.clamp_min(0)))
        if state_pool is not None:
            self.adopt(state_pool)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors by name, not copied; together with the pool they are the states."""
        return self.tensors._asdict()

    @torch.inference_mode()
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copy the tensors of a cache of the same sizes into this one, from any device.

        Raises ArgumentError or ArgumentTypeError before any change: naming `state_dict` for other entries
        than `state_dict()` has, else the entry: for another shape or dtype, for a tensor that is sparse or on
        the meta device, for a cursor or live bits out of range. Waits for the device.
        """
        expected = sorted(CacheTensors._fields)
        if not isinstance(state_dict, Mapping):
            raise ArgumentTypeError(
                "state_dict", f"{type(state_dict).__name__}, expected a mapping of {expected}"
            )
        if state_dict.keys() != set(expected):
            raise ArgumentError("state_dict", f"entries {sorted(state_dict)}, expected {expected}")
        for name, own in self.tensors._asdict().items():
            given = state_dict[name]
            if not isinstance(given, Tensor):
                raise ArgumentTypeError(name, f"{type(given).__name__}, expected a tensor")
            if given.is_meta or given.layout != torch.strided:
                raise ArgumentError(name, f"{given.layout} on {given.device}, expected dense values")
            if (given.shape, given.dtype) != (own.shape, own.dtype):
                came, fitting = (f"{list(x.shape)} {x.dtype}" for x in (given, own))
                raise ArgumentError(name, f"{came}, expected {fitting}")
        cursors, lives = state_dict["cursor"].tolist(), state_dict["live"].tolist()
        for slot, (cursor, live) in enumerate(zip(cursors, lives, strict=True)):
            fault = cursor_fault(slot, cursor, live, self.capacity, self.max_tokens)
            if fault is not None:
                raise ArgumentError(*fault)
        for name, own in self.tensors._asdict().items():
            own.copy_(state_dict[name])

    def _check_sizes(self, state_pool: Tensor) -> None:
        """Raises, naming `state_pool`, unless it is a pool of the cache's sizes on its device."""
        specs = (*self.specs, TensorSpec("state_pool", ("pool", "HV", "V", "K"), STATE_DTYPES, written=True))
        own = {f"cache.{name}": tensor for name, tensor in self.state_dict().items()}
        bind(specs, {**own, "state_pool": state_pool}, device=self.device)

    def _checked(self, name: str, slots: Tensor) -> Tensor:
        """`slots` as int64, checked; one out of range becomes -1 where values cannot be read."""
        bind((TensorSpec(name, ("n",), INDEX_DTYPES, layout="any"),), {name: slots}, device=self.device)
        if _may_read(slots):
            check_index_range(name, slots, self.pool_size)
        return slots.long().masked_fill(slots >= self.pool_size, -1)


def _may_read(slots: Tensor) -> bool:
    return not is_watched() and values_are_readable(slots)


def has_address(tensor: Tensor) -> bool:
    """Whether a tensor is known to be in memory; false inside a trace, and for a subclass."""
    return is_plain(tensor) and not tensor.is_meta and not is_watched()


def tensors_of(cache: SpeculativeCache) -> CacheTensors:
    """`cache.tensors`; raises ArgumentTypeError naming `cache` for anything else."""
    if not isinstance(cache, SpeculativeCache):
        raise ArgumentTypeError("cache", f"{type(cache).__name__}, expected a SpeculativeCache")
    return cache.tensors

"""Memory that shows misuse: NaN where nothing was written, guard bytes, slots that must not change."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

GUARD_BYTES = 512  # before and after a guarded tensor; keeps its address as aligned as the allocation
UNUSED_INDEX = (
    2147480000  # for index entries that must not be read: near the int32 limit, never a valid index
)
_GUARD_BYTE = 0xC3


def poisoned(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """An output to be written: full of NaN, or of UNUSED_INDEX (the dtype's maximum, where that is less)."""
    return poison_(torch.empty(tuple(shape), dtype=dtype, device=device))


def poison_(tensor: Tensor) -> Tensor:
    """Fills `tensor`, a view of unused memory for instance, like `poisoned`; returns it."""
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    return tensor.fill_(min(UNUSED_INDEX, torch.iinfo(tensor.dtype).max))


class Guarded:
    """A tensor between guard bytes. tensor: [shape], contiguous, poisoned; `check()` looks at the guards."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        nbytes = torch.empty(tuple(shape), dtype=dtype, device="meta").nbytes
        self._block = torch.full((nbytes + 2 * GUARD_BYTES,), _GUARD_BYTE, dtype=torch.uint8, device=device)
        self.tensor = poison_(self._block[GUARD_BYTES : GUARD_BYTES + nbytes].view(dtype).view(tuple(shape)))

    def check(self) -> None:
        """Raises AssertionError if a guard was written to, with the number of bytes and the nearest."""
        changed = (self._block != _GUARD_BYTE).nonzero().flatten().cpu() - GUARD_BYTES
        before, after = changed[changed < 0], changed[changed >= self.tensor.nbytes]
        if before.numel():
            raise AssertionError(
                f"{before.numel()} bytes written before the tensor, the last at {int(before.max())}"
            )
        if after.numel():
            past_end = int(after.min()) - self.tensor.nbytes
            raise AssertionError(
                f"{after.numel()} bytes written past the tensor, the first at its end + {past_end}"
            )


def snapshot_untouched(
    pool: Tensor, touched: Tensor | Sequence[int], what: str = "pool"
) -> Callable[[], None]:
    """Remembers every slot of `pool` but the touched ones; the returned function checks them bit for bit.

    pool: [slots, ...], any strides. touched: slot numbers that may change; negative ones are padding.
    The check raises AssertionError naming `what` and the first slot that changed.
    """
    may_change = torch.as_tensor(touched, dtype=torch.int64).flatten().cpu()
    untouched = torch.ones(pool.shape[0], dtype=torch.bool)
    untouched[may_change[may_change >= 0]] = False
    slots = untouched.nonzero().flatten()
    before = _bits(pool, slots)

    def check() -> None:
        changed = (_bits(pool, slots) != before).any(dim=1)
        if changed.any():
            first = int(slots[int(changed.nonzero()[0])])
            raise AssertionError(
                f"{what}: {int(changed.sum())} untouched slots changed, the first is slot {first}"
            )

    return check


def _bits(pool: Tensor, slots: Tensor) -> Tensor:
    """The bytes of the given slots on the CPU: [slots, bytes per slot] uint8, a copy."""
    slot_bytes = math.prod(pool.shape[1:]) * pool.element_size()
    return pool.detach()[slots.to(pool.device)].flatten().view(torch.uint8).view(-1, slot_bytes).cpu()

"""The memory of PyTorch tensors and NumPy arrays."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ALLOCATION_ALIGNMENT = 256  # bytes, of cudaMalloc


@dataclass(frozen=True)
class Memory:
    """Where the elements of an array lie: from the first byte of the first to the last byte of the last."""

    name: str
    address: int
    num_bytes: int
    item_bytes: int
    initialised: bool = True
    read_only: bool = False

    @property
    def end(self) -> int:
        return self.address + self.num_bytes

    def view(self) -> NDArray[np.uint8]:
        """The bytes themselves, not a copy."""
        if not self.num_bytes:
            return np.zeros(0, dtype=np.uint8)
        return np.ctypeslib.as_array((ctypes.c_uint8 * self.num_bytes).from_address(self.address))


def aligned(array: NDArray[Any]) -> NDArray[Any]:
    """A copy of an array whose memory starts as GPU allocations do, at a multiple of 256 bytes.

    NumPy promises 16 bytes only. Where a kernel needs more (64 for a tensor map, 32 for 256-bit accesses),
    its accesses may be reported as misaligned although they would not be on a GPU.
    """
    raw = np.zeros(array.nbytes + _ALLOCATION_ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % _ALLOCATION_ALIGNMENT
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def is_array(value: Any) -> bool:
    """Whether `value` is a tensor or an array that `memory_of` understands."""
    return _is_torch(value) or isinstance(value, np.ndarray)


def memory_of(name: str, array: Any, *, initialised: bool = True, read_only: bool = False) -> Memory:
    """The memory of an array, gaps between its rows included. What NumPy may not write, a kernel may not.

    Raises:
        ValueError: a tensor that is not in host memory, or an array with negative strides.
        TypeError: neither a PyTorch tensor nor a NumPy array.
    """
    if _is_torch(array):
        if array.device.type != "cpu":
            raise ValueError(f"{name}: is on {array.device}, the emulator takes tensors on the CPU")
        address, item = array.data_ptr(), array.element_size()
        sizes, strides = tuple(array.shape), [stride * item for stride in array.stride()]
    elif isinstance(array, np.ndarray):
        address, item = array.ctypes.data, array.itemsize
        sizes, strides = array.shape, list(array.strides)
        read_only = read_only or not array.flags.writeable
    else:
        raise TypeError(f"{name}: a {type(array).__name__} is neither a torch.Tensor nor a numpy.ndarray")
    if any(stride < 0 for stride in strides):
        raise ValueError(f"{name}: has negative strides, {strides} bytes")
    num_bytes = item if all(sizes) else 0
    if num_bytes:
        num_bytes += sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    return Memory(name, address, num_bytes, item, initialised, read_only)


def disjoint(memories: Iterable[Memory]) -> list[Memory]:
    """The same memory as ranges that do not overlap: views of one buffer become one range with all names."""
    ranges: list[Memory] = []
    for memory in sorted((m for m in memories if m.num_bytes), key=lambda m: (m.address, m.end)):
        last = ranges[-1] if ranges else None
        if last is None or memory.address >= last.end:
            ranges.append(memory)
            continue
        names = last.name.split("+")
        ranges[-1] = Memory(
            name=last.name if memory.name in names else f"{last.name}+{memory.name}",
            address=last.address,
            num_bytes=max(last.end, memory.end) - last.address,
            item_bytes=min(last.item_bytes, memory.item_bytes),
            initialised=last.initialised or memory.initialised,
            read_only=last.read_only and memory.read_only,
        )
    return ranges


def memories_of(
    arrays: Mapping[str, Any], *, uninitialised: Iterable[str] = (), read_only: Iterable[str] = ()
) -> list[Memory]:
    """The memory of named arrays as disjoint ranges.

    Raises:
        ValueError: `uninitialised` or `read_only` names what is not in `arrays`.
    """
    fresh, constant = set(uninitialised), set(read_only)
    for label, names in (("uninitialised", fresh), ("read_only", constant)):
        if names - arrays.keys():
            raise ValueError(f"{label}: {sorted(names - arrays.keys())} are none of {sorted(arrays)}")
    return disjoint(
        memory_of(name, array, initialised=name not in fresh, read_only=name in constant)
        for name, array in arrays.items()
    )


def _is_torch(value: Any) -> bool:
    return hasattr(value, "data_ptr") and hasattr(value, "element_size")

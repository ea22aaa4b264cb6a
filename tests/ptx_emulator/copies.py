"""Boxes, swizzles and reductions of bulk copies as their definitions say, on numpy arrays."""

from itertools import product

import numpy as np
from ptx_emulator.tensor_map import BYTES, DataType, Swizzle, TensorMap

# What a reducing copy makes of the old value and the one that is copied.
REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "inc": lambda old, limit: np.where(old >= limit, 0, old + 1),
    "dec": lambda old, limit: np.where((old == 0) | (old > limit), limit, old - 1),
}
# Where each 16-byte chunk of a 128-byte line of shared memory goes, line by line: the tables of the PTX ISA.
PATTERNS = {
    Swizzle.NONE: ["01234567"],
    Swizzle.B32: ["01234567", "10325476"],
    Swizzle.B64: ["01234567", "10325476", "23016745", "32107654"],
    Swizzle.B128: [
        "01234567",
        "10325476",
        "23016745",
        "32107654",
        "45670123",
        "54761032",
        "67452301",
        "76543210",
    ],
    Swizzle.B128_ATOM_32B: ["01234567", "23016745", "45670123", "67452301"],
    Swizzle.B128_ATOM_32B_FLIP_8B: ["01234567", "23016745", "45670123", "67452301"],
    Swizzle.B128_ATOM_64B: ["01234567", "45670123"],
}


def swizzled(data: bytes, swizzle: Swizzle, offset: int = 0) -> np.ndarray:
    """Shared memory from `offset` on after an unswizzled `data` has been written there with a swizzle."""
    table = PATTERNS[swizzle]
    out = np.zeros(-(-len(data) // 128) * 128, np.uint8)
    for position, byte in enumerate(data):
        line, chunk, inner = (offset + position) // 128, position // 16 % 8, position % 16
        if swizzle == Swizzle.B128_ATOM_32B_FLIP_8B and line % 2:
            inner ^= 8
        out[position // 128 * 128 + int(table[line % len(table)][chunk]) * 16 + inner] = byte
    return out


def tensor_map_array(tensor_map: TensorMap) -> np.ndarray:
    """The encoded tensor map in memory that is aligned as it must be."""
    memory = np.zeros(BYTES + 64, np.uint8)
    start = -memory.ctypes.data % 64
    memory[start : start + BYTES] = np.frombuffer(tensor_map.encode(), np.uint8)
    return memory[start : start + BYTES]


def aligned(shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
    """A zeroed array whose memory starts at a multiple of 64 bytes."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(count + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + count].view(dtype).reshape(shape)


def map_of(
    tensor: np.ndarray,
    data_type: DataType,
    box: tuple[int, ...],
    dims: tuple[int, ...] | None = None,
    **options: object,
) -> TensorMap:
    """The tensor map of an array whose last axis is dimension 0. `dims`, dimension 0 first, may be less."""
    return TensorMap(
        data_type,
        tensor.ctypes.data,
        dims or tensor.shape[::-1],
        tensor.strides[-2::-1],
        box,
        **options,  # type: ignore[arg-type]
    )


def box_positions(tensor_map: TensorMap, start: tuple[int, ...]) -> list[tuple[int, ...] | None]:
    """The array index of each element of the box in the order of shared memory; None outside the tensor."""
    steps = (1, *tensor_map.steps[1:])
    ranges = [
        range(first, first + length, step)
        for first, length, step in zip(start, tensor_map.box, steps, strict=True)
    ]
    positions: list[tuple[int, ...] | None] = []
    for at in product(*reversed(ranges)):
        inside = all(0 <= c < d for c, d in zip(reversed(at), tensor_map.dims, strict=True))
        positions.append(at if inside else None)
    return positions


def boxed(tensor: np.ndarray, tensor_map: TensorMap, start: tuple[int, ...], fill: bytes) -> bytes:
    """The bytes of the box, unswizzled."""
    return b"".join(fill if at is None else tensor[at].tobytes() for at in box_positions(tensor_map, start))

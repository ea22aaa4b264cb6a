"""Values at which arithmetic goes wrong."""

from __future__ import annotations

import numpy as np

ODD_F32 = [
    0x00000000, 0x80000000, 0x3F800000, 0xBF800000, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC12345,
    0x7F800001, 0x00000001, 0x80000001, 0x007FFFFF, 0x00800000, 0x80800000, 0x7F7FFFFF, 0xFF7FFFFF,
    0x3F800001, 0x3F7FFFFF, 0x34000000, 0x33800000, 0x4B000000, 0x4B800001, 0x5F000000, 0x1F800000,
    0x20000001, 0x40490FDB, 0x3EAAAAAB,
]  # fmt: skip
ODD_F16 = [
    0x0000, 0x8000, 0x3C00, 0xBC00, 0x7C00, 0xFC00, 0x7E00, 0xFE01, 0x7C01, 0x0001, 0x8001, 0x03FF,
    0x0400, 0x8400, 0x7BFF, 0xFBFF, 0x3C01, 0x3BFF, 0x1400, 0x6400, 0x6801, 0x4248, 0x3555,
]  # fmt: skip
ODD_BF16 = [
    0x0000, 0x8000, 0x3F80, 0xBF80, 0x7F80, 0xFF80, 0x7FC0, 0xFFC1, 0x7F81, 0x0001, 0x8001, 0x007F,
    0x0080, 0x8080, 0x7F7F, 0xFF7F, 0x3F81, 0x3F7F, 0x3B00, 0x4380, 0x4401, 0x4049, 0x3EAB, 0x1F80,
    0x2001,
]  # fmt: skip
ODD_F64 = [
    0x0000000000000000, 0x8000000000000000, 0x3FF0000000000000, 0xBFF0000000000000,
    0x7FF0000000000000, 0xFFF0000000000000, 0x0000000000000001, 0x800FFFFFFFFFFFFF,
    0x0010000000000000, 0x7FEFFFFFFFFFFFFF, 0xFFEFFFFFFFFFFFFF, 0x3FF0000000000001,
    0x3FEFFFFFFFFFFFFF, 0x3CA0000000000000, 0x4340000000000001, 0x400921FB54442D18,
    0x1FF0000000000001, 0x36A0000000000001, 0x47EFFFFFF0000000, 0x380FFFFFFFFFFFFF,
    0x7FF8000000000000, 0xFFF8000012345678, 0x7FF0000000000001,
]  # fmt: skip


def odd_integers(bits: int) -> list[int]:
    """Integers next to the ends and to powers of two, as unsigned numbers."""
    top = 1 << (bits - 1)
    near = {0, 1, 2, 3, 7, 31, 32, 33, 63, 64, 65, top - 1, top, top + 1, 2 * top - 1, 2 * top - 2, 0x5A}
    return sorted(value % (2 * top) for value in near)


def random_bits(rng: np.random.Generator, count: int, odd: list[int], dtype: type) -> np.ndarray:
    """Random bits, every fourth one an odd value, every fourth one near another's magnitude."""
    info = np.iinfo(dtype)
    values = rng.integers(0, info.max, count, dtype=dtype, endpoint=True)
    values[::4] = rng.choice(np.array(odd, dtype=dtype), len(values[::4]))
    return values

"""Arrays that start at a multiple of 128 bytes, as device memory does."""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike

ALIGNMENT = 128


def aligned(values: np.ndarray) -> np.ndarray:
    """A copy of an array with an aligned start."""
    raw = np.zeros(values.nbytes + ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    copy = raw[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


def poisoned(shape: int | tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An aligned array of bytes 0xCD."""
    array = aligned(np.empty(shape, dtype))
    array.view(np.uint8)[...] = 0xCD
    return array

"""Arrays that start as device memory does."""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike
from ptx_emulator import aligned


def poisoned(shape: int | tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An aligned array of bytes 0xCD."""
    array = aligned(np.empty(shape, dtype))
    array.view(np.uint8)[...] = 0xCD
    return array

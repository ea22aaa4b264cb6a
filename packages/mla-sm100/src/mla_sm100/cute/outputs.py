"""Where results go, and stores of a row's elements and of its lse."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from .block import VECTOR_BYTES
from .schedule import Unit

LN2 = math.log(2.0)
NUMERIC = {"bf16": cutlass.BFloat16, "fp16": cutlass.Float16, "e4m3": cutlass.Float8E4M3FN}


@dataclass(frozen=True)
class Outputs:
    """The caller's tensors and, where keys are split, the workspace."""

    mO: Any  # [batch, q_len, num_heads, 512], or ragged [total_q, num_heads, 512]
    mLSE: Any  # the same without its last dimension, or None
    o_partial: Any  # float32 [num_splits, batch * q_len * num_heads, 512], or None
    lse_partial: Any  # float32 [num_splits, batch * q_len * num_heads] with base 2, or None
    output_scale: Float32


def store_values(target: Any, values: Any, dtype: Any) -> None:
    """Store float32 registers to consecutive elements of `dtype`, in accesses of up to 16 bytes."""
    count = cute.size(values)
    rounded = cute.make_rmem_tensor((count,), dtype)
    rounded.store(values.load().to(dtype))
    per_store = min(count, VECTOR_BYTES * 8 // dtype.width)
    for first in range(0, count, per_store):
        part = cute.make_tensor(rounded.iterator + first, cute.make_layout((per_store,)))
        align = per_store * dtype.width // 8
        aligned = cute.make_ptr(dtype, (target + first).toint(), cute.AddressSpace.gmem, assumed_align=align)
        cute.autovec_copy(part, cute.make_tensor(aligned, cute.make_layout((per_store,))))


def store_lse(mLSE: Any, unit: Unit, row: Int32, num_heads: Int32, ragged: bool, lse: Float32) -> None:
    """Store a row's natural log-sum-exp to the caller's tensor."""
    token = row // num_heads
    head = row - token * num_heads
    if ragged:
        mLSE[unit.first_token + token, head] = lse
    else:
        mLSE[unit.request, token, head] = lse

"""Copies accepted intermediate states to their pool slots, each read and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096


@triton.jit
def _copy(buffer, accepted, pool, slots, T, slot_elements, BLOCK: tl.constexpr):
    request = tl.program_id(1).to(tl.int64)
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(accepted + request) - 1
    slot = tl.load(slots + request).to(tl.int64)
    values = tl.load(buffer + (request * T + token) * slot_elements + offsets)
    tl.store(pool + slot * slot_elements + offsets, values)


def gather_accepted(
    buffer: torch.Tensor, accepted: torch.Tensor, pool: torch.Tensor, slots: torch.Tensor
) -> None:
    """pool[slots[i]] = buffer[i, accepted[i] - 1]; buffer [B, T, HV, V, K], pool [slots, HV, V, K]."""
    B, T = buffer.shape[:2]
    elements = pool[0].numel()
    _copy[(elements // BLOCK, B)](buffer, accepted, pool, slots, T, elements, BLOCK=BLOCK, num_warps=8)

"""Merges the partial results of a request's splits: one block per (token, head) row.

With lse_s of the splits in base 2, m = max lse_s and w_s = 2^(lse_s - m),
    out = output_scale * sum_s w_s o_s / sum_s w_s        lse = ln(2) * (m + log2(sum_s w_s))
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.memory import SmemAllocator

from mla_sm100.config import KV_LORA_RANK, DecodeConfig

from .block import WARP_LANES
from .load import row_pointer
from .outputs import LN2, NUMERIC, Outputs, store_lse, store_values
from .schedule import Schedule, Unit, select

THREADS = 128
THREAD_ELEMENTS = KV_LORA_RANK // THREADS
UNROLL = 4  # partial rows in flight


class Combine:
    """The kernel for one configuration. Rows that see no key get zeros and lse = -inf."""

    def __init__(self, config: DecodeConfig) -> None:
        self.config = config

    @cute.jit
    def run(self, schedule: Schedule, outputs: Outputs):
        """The row of the calling block."""
        config = self.config
        thread, _, _ = cute.arch.thread_idx()
        index, _, _ = cute.arch.block_idx()
        unit, row = self.row(schedule, index)
        weights = SmemAllocator().allocate_tensor(Float32, cute.make_layout((THREADS,)))
        if row < unit.q_len * schedule.num_heads:
            splits = schedule.splits_of(cute.ceil_div(unit.seq_len, config.tile_n))
            splits = select(unit.seq_len > 0, splits, Int32(0))
            top = self.largest(outputs.lse_partial, index, splits)
            safe_top = select(top == -Float32.inf, Float32(0.0), top)
            total = Float32(0.0)
            merged = cute.make_rmem_tensor((THREAD_ELEMENTS,), Float32)
            merged.fill(0.0)
            source = outputs.o_partial[0, index, None].iterator + thread * THREAD_ELEMENTS
            address, stride_bytes = source.toint(), outputs.o_partial.stride[0] * (Float32.width // 8)
            for first in cutlass.range(0, splits, THREADS, unroll=1):
                count = cutlass.min(splits - first, THREADS)
                cute.arch.sync_threads()
                if thread < count:
                    lse = outputs.lse_partial[first + thread, index]
                    weights[thread] = cute.math.exp2(lse - safe_top, fastmath=True)
                cute.arch.sync_threads()
                for split in cutlass.range(count, unroll=UNROLL):
                    weight = weights[split]
                    total += weight
                    part = load_vector(address)
                    for at in cutlass.range_constexpr(0, THREAD_ELEMENTS, 2):
                        x, y = cute.arch.fma_packed_f32x2(
                            (part[at], part[at + 1]), (weight, weight), (merged[at], merged[at + 1])
                        )
                        merged[at], merged[at + 1] = x, y
                    address += stride_bytes
            seen = total != 0.0  # NaN is seen
            scale = select(seen, outputs.output_scale / total, Float32(0.0))
            merged.store(merged.load() * scale)
            target = row_pointer(outputs.mO, unit, row, schedule.num_heads, config.ragged)
            store_values(target + thread * THREAD_ELEMENTS, merged, NUMERIC[config.out_dtype])
            if cutlass.const_expr(config.return_lse):
                if thread == 0:
                    lse = select(seen, top + cute.math.log2(total, fastmath=True), -Float32.inf)
                    store_lse(outputs.mLSE, unit, row, schedule.num_heads, config.ragged, lse * LN2)

    @cute.jit
    def largest(self, lse_partial: cute.Tensor, index: Int32, splits: Int32) -> Float32:
        """The largest lse of a row's splits; every warp finds it for itself."""
        top = -Float32.inf
        for split in cutlass.range(cute.arch.lane_idx(), splits, WARP_LANES, unroll=1):
            top = cute.arch.fmax(top, lse_partial[split, index])
        for step in cutlass.range_constexpr(WARP_LANES.bit_length() - 1):
            top = cute.arch.fmax(top, cute.arch.shuffle_sync_bfly(top, offset=1 << step))
        return top

    def row(self, schedule: Schedule, index: Int32) -> tuple[Unit, Int32]:
        """The request that row `index` of all belongs to, and the row in the request."""
        rows = schedule.q_len * schedule.num_heads
        request = index // rows
        unit = schedule.unit_of(request, Int32(0), Int32(0))
        return unit, index - request * rows


def load_vector(address: Int64) -> Any:
    """THREAD_ELEMENTS float32 of global memory."""
    align = THREAD_ELEMENTS * Float32.width // 8
    pointer = cute.make_ptr(Float32, address, cute.AddressSpace.gmem, assumed_align=align)
    values = cute.make_rmem_tensor((THREAD_ELEMENTS,), Float32)
    cute.autovec_copy(cute.make_tensor(pointer, cute.make_layout((THREAD_ELEMENTS,))), values)
    return values

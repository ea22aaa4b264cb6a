"""Merges the partial results of a request's splits: one block per (token, head) row.

With lse_s of the splits in base 2, m = max lse_s and w_s = 2^(lse_s - m),
    out = output_scale * sum_s w_s o_s / sum_s w_s        lse = ln(2) * (m + log2(sum_s w_s))
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from mla_sm100.config import KV_LORA_RANK, DecodeConfig

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
        if row < unit.q_len * schedule.num_heads:
            splits = schedule.splits_of(cute.ceil_div(unit.seq_len, config.tile_n))
            splits = select(unit.seq_len > 0, splits, Int32(0))
            top = -Float32.inf
            for split in cutlass.range(splits, unroll=UNROLL):
                top = cute.arch.fmax(top, outputs.lse_partial[split, index])
            safe_top = select(top == -Float32.inf, Float32(0.0), top)
            total = Float32(0.0)
            merged = cute.make_rmem_tensor((THREAD_ELEMENTS,), Float32)
            merged.fill(0.0)
            for split in cutlass.range(splits, unroll=UNROLL):
                weight = cute.math.exp2(outputs.lse_partial[split, index] - safe_top, fastmath=True)
                total += weight
                part = cute.make_rmem_tensor((THREAD_ELEMENTS,), Float32)
                source = cute.local_tile(outputs.o_partial[split, index, None], (THREAD_ELEMENTS,), (thread,))
                cute.autovec_copy(source, part)
                merged.store(merged.load() + part.load() * weight)
            seen = total > 0.0
            scale = select(seen, outputs.output_scale / total, Float32(0.0))
            merged.store(merged.load() * scale)
            target = row_pointer(outputs.mO, unit, row, schedule.num_heads, config.ragged)
            store_values(target + thread * THREAD_ELEMENTS, merged, NUMERIC[config.out_dtype])
            if cutlass.const_expr(config.return_lse):
                if thread == 0:
                    lse = select(seen, top + cute.math.log2(total, fastmath=True), -Float32.inf)
                    store_lse(outputs.mLSE, unit, row, schedule.num_heads, config.ragged, lse * LN2)

    def row(self, schedule: Schedule, index: Int32) -> tuple[Unit, Int32]:
        """The request that row `index` of all belongs to, and the row in the request."""
        rows = schedule.q_len * schedule.num_heads
        request = index // rows
        unit = schedule.unit_of(request, Int32(0), Int32(0))
        return unit, index - request * rows

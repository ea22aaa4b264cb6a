"""The role of four warps that turn scores into probabilities, rescale the output where needed, and store it.

A thread holds half a row of a tile's scores s, of which the other half is in its partner: the same lane two
warps on in a pair of CTAs, sixteen lanes on otherwise. With x = s * scale * log2(e), in the exp2 domain,
    p = 2^(x - reference)        total = sum p        out = output_scale * acc_o / total
    lse = ln(2) * (reference + log2(total))
The reference follows the row's maximum, less `probability_shift_log2`. It stays as long as no score exceeds
it by more than `rescale_threshold_log2` (beyond the shift); only then acc_o and total are rescaled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from mla_sm100.config import (
    ACC_O_COLS,
    ACC_S_COLS,
    ACC_S_STAGES,
    CHUNK_BYTES,
    CHUNK_ROW_BYTES,
    CHUNK_ROWS,
    SOFTMAX_WARPS,
    DecodeConfig,
)

from . import tmem
from .block import (
    VECTOR_BYTES,
    WARP_LANES,
    Block,
    ring_phase,
    ring_slot,
    store_vector,
    swizzled,
    zeros,
)
from .load import ends_in_page, row_pointer
from .mma import HALF_LANES, OUT_N
from .outputs import LN2, NUMERIC, Outputs, store_lse, store_values
from .schedule import Schedule, Unit, select

OUT_COLS = 32  # accumulator columns that a thread has in registers at a time
EXCHANGE_BARRIER = 1  # of warps 0 and 2; the next is that of warps 1 and 3
EXCHANGE_FLOATS = 2 * SOFTMAX_WARPS * WARP_LANES  # one buffer for maxima, one for sums


@dataclass(frozen=True)
class Place:
    """What of a tile a thread has.

    row: in the CTA's tile. half: of the row's scores.
    out_column: latent element of its first column of acc_o. tmem_lane: address of the warp's first lane.
    thread, warp: of the block.
    """

    row: Int32
    half: Int32
    out_column: Int32
    tmem_lane: Int32
    thread: Int32
    warp: Int32


class Softmax:
    """The softmax role: warps 0 to 3, or as many as have rows."""

    def __init__(self, config: DecodeConfig) -> None:
        self.config = config
        self.keys = config.thread_keys

    def place(self, tmem_base: Int32) -> Place:
        """The calling thread's place."""
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        lane = cute.arch.lane_idx()
        tmem_lane = tmem_base + warp * (WARP_LANES * tmem.LANE)
        if self.config.pair:
            half = warp // 2
            row = warp % 2 * WARP_LANES + lane
            return Place(row, half, half * (OUT_N // 2), tmem_lane, thread, warp)
        half = lane // HALF_LANES
        row = warp * HALF_LANES + lane % HALF_LANES
        return Place(row, half, half * OUT_N, tmem_lane, thread, warp)

    @cute.jit
    def run(
        self,
        block: Block,
        schedule: Schedule,
        mTables: cute.Tensor,
        outputs: Outputs,
        exchange: cute.Tensor,
        tmem_base: Int32,
        scale_log2: Float32,
        active_warps: Int32,
    ):
        """Owns the probabilities, acc_s while full, acc_o between MMAs. Waits on s_full, pv_done, v_tail.

        Signals s_empty, p_full. Does not own keys and values, but for clearing rows after the sequence.
        """
        config = self.config
        place = self.place(tmem_base)
        tiles = Int32(0)
        index = block.cluster
        while index < schedule.num_units:
            unit = schedule.unit(index)
            row = unit.first_row + place.row
            if cutlass.const_expr(config.pair):
                row += block.rank * CHUNK_ROWS
            visible = cutlass.min(unit.seq_len, unit.seq_len - unit.q_len + row // schedule.num_heads + 1)
            reference, total = -Float32.inf, Float32(0.0)
            for i in cutlass.range(unit.num_tiles, unroll=1):
                tile = tiles + i
                first_key = (unit.first_tile + i) * config.tile_n
                stage = ring_slot(tile, ACC_S_STAGES)
                entries = self.entries(mTables, unit, first_key + place.half * self.keys)
                cute.arch.mbarrier_wait(block.barriers.s_full + stage, ring_phase(tile, ACC_S_STAGES))
                tmem.after_thread_sync()
                scores = self.load_scores(place, stage)
                self.release(block, block.barriers.s_empty + stage)
                if ends_in_page(config, unit.seq_len, first_key):
                    if cutlass.const_expr(config.pair):
                        self.wait_output(block, tile)  # or v_tail might be a phase behind
                        tail = block.barriers.v_tail + ring_slot(tile, config.v_tiles)
                        cute.arch.mbarrier_wait(tail, ring_phase(tile, config.v_tiles))
                    self.clear_values(block, place, tile, unit.seq_len - first_key, active_warps)
                self.mask(scores, entries, visible, first_key + place.half * self.keys, unit)
                top = self.maximum(scores) * scale_log2
                raised, factor = reference, Float32(1.0)
                rescale = Boolean(False)
                if self.any_above(place, top, reference + self.limit):
                    top = cute.arch.fmax(top, self.partner(exchange, place, top, 0))
                    if top > reference + self.limit:
                        raised = top - config.probability_shift_log2
                        factor = cute.math.exp2(reference - raised, fastmath=True)
                    rescale = i > 0
                reference = raised
                self.exponentials(scores, scale_log2, reference)
                total = total * factor + self.sum(scores)
                self.wait_output(block, tile)
                if rescale:
                    tmem.after_thread_sync()
                    self.rescale(place, factor)
                self.store_probabilities(block, place, scores)
                cute.arch.fence_proxy("async.shared", space="cta")
                self.release(block, block.barriers.p_full)
            tiles += unit.num_tiles
            if cutlass.const_expr(config.split and config.pdl):
                if index + schedule.num_clusters >= schedule.num_units:
                    cute.arch.griddepcontrol_launch_dependents()
            self.finish(block, schedule, outputs, exchange, place, unit, row, tiles, reference, total)
            index += schedule.num_clusters

    @property
    def limit(self) -> float:
        """By how much a scaled score may exceed the reference."""
        return self.config.rescale_threshold_log2 + self.config.probability_shift_log2

    def entries(self, mTables: Any, unit: Unit, first_key: Int32) -> list:
        """Table entries of the thread's keys; 0 after the end of the sequence."""
        page_size = self.config.page_size
        entries = []
        for key in range(0, self.keys, page_size):
            present = first_key + key < unit.seq_len
            entry = mTables[unit.request, select(present, (first_key + key) // page_size, Int32(0))]
            entries.append(select(present, entry, Int32(0)))
        return entries

    def load_scores(self, place: Place, stage: Int32) -> Any:
        """The thread's half of a row of acc_s."""
        address = place.tmem_lane + ACC_O_COLS + stage * ACC_S_COLS
        load = tmem.load if self.config.pair else tmem.load_halves
        scores = cute.make_rmem_tensor((self.keys,), Float32)
        scores.store(load(address, self.keys))
        tmem.wait_loads()
        return scores

    @cute.jit
    def wait_output(self, block: Block, tile: Int32):
        """Wait until acc_o holds all tiles before `tile`, if there are any, and P is free."""
        if tile > 0:
            cute.arch.mbarrier_wait(block.barriers.pv_done, (tile - 1) & 1)

    def release(self, block: Block, mbar: Any) -> None:
        """Arrive at a barrier of the leader once per warp, after what all of its lanes have done."""
        tmem.before_thread_sync()
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            block.arrive_at_leader(mbar)

    @cute.jit
    def clear_values(self, block: Block, place: Place, tile: Int32, keys: Int32, active_warps: Int32):
        """Zero the values from row `keys` of the tile on: 0 times what a page holds there may be NaN."""
        config = self.config
        vectors = CHUNK_ROW_BYTES // VECTOR_BYTES
        zero = zeros()
        if cutlass.const_expr(config.pair):
            first = (
                block.v_chunk
                + ring_slot(tile, config.v_tiles) * config.v_stages_per_tile * config.v_stage_chunks
            )
            chunks = config.v_stages_per_tile * config.v_stage_chunks
        else:
            first = block.k_chunk + ring_slot(tile, config.k_tiles) * config.chunks + 1
            chunks = config.latent_chunks
        for chunk in cutlass.range_constexpr(chunks):
            first_row = Int32(0)
            if cutlass.const_expr(config.pair and chunk >= chunks // 2):
                first_row = Int32(CHUNK_ROWS)
            begin = cutlass.max(keys - first_row, 0)
            rest = cutlass.max(CHUNK_ROWS - begin, 0) * vectors
            for vector in cutlass.range(place.thread, rest, active_warps * WARP_LANES, unroll=1):
                offset = (first + chunk) * CHUNK_BYTES + begin * CHUNK_ROW_BYTES + vector * VECTOR_BYTES
                store_vector(block.chunks + offset, zero)

    @cute.jit
    def mask(self, scores: cute.Tensor, entries: Any, visible: Int32, first_key: Int32, unit: Unit):
        """-inf for keys that the row does not see, and for those of absent pages."""
        absent = Int32(0)
        for entry in entries:
            absent = absent | entry
        all_visible = unit.seq_len - unit.q_len + 1  # what the request's first token sees
        if (first_key + self.keys > all_visible) | (absent < 0):
            self.hide(scores, entries, visible - first_key)

    def hide(self, scores: Any, entries: list, visible: Int32) -> None:
        """-inf for keys from `visible` on, and for those of absent pages."""
        for key in range(self.keys):
            seen = (key < visible) & (entries[key // self.config.page_size] >= 0)
            scores[key] = select(seen, scores[key], -Float32.inf)

    def maximum(self, scores: Any) -> Float32:
        """Of the thread's scores."""
        tops = [scores[k] for k in range(4)]
        for k in range(4, self.keys):
            tops[k % 4] = cute.arch.fmax(tops[k % 4], scores[k])
        return cute.arch.fmax(cute.arch.fmax(tops[0], tops[1]), cute.arch.fmax(tops[2], tops[3]))

    def any_above(self, place: Place, top: Float32, limit: Float32) -> Boolean:
        """Whether any row of the warp, or of its partners, has a score above its limit."""
        if not self.config.pair:
            return cute.arch.vote_any_sync(top > limit)
        found = cute.arch.inline_ptx(
            "{{ .reg .pred p; .reg .pred q; setp.gt.f32 p, {$r0}, {$r1};"
            " barrier.cta.red.or.pred q, {$r2}, {$r3}, p; selp.u32 {$w0}, 1, 0, q; }}",
            write_only_types=[Int32],
            read_only_args=[top, limit, EXCHANGE_BARRIER + place.warp % 2, Int32(2 * WARP_LANES)],
        )
        return found != 0

    def partner(self, exchange: Any, place: Place, value: Float32, buffer: int) -> Float32:
        """The partner's value. Every thread of both warps takes part.

        `buffer` of the exchange is free again when they have met at their barrier once more.
        """
        if not self.config.pair:
            return cute.arch.shuffle_sync_bfly(value, offset=HALF_LANES)
        first = buffer * SOFTMAX_WARPS * WARP_LANES
        exchange[first + place.thread] = value
        cute.arch.barrier(barrier_id=EXCHANGE_BARRIER + place.warp % 2, number_of_threads=2 * WARP_LANES)
        return exchange[first + (place.thread ^ (2 * WARP_LANES))]

    def exponentials(self, scores: Any, scale_log2: Float32, reference: Float32) -> None:
        """Scores become probabilities."""
        safe = select(reference == -Float32.inf, Float32(0.0), reference)
        for k in range(0, self.keys, 2):
            x, y = cute.arch.fma_packed_f32x2(
                (scores[k], scores[k + 1]), (scale_log2, scale_log2), (-safe, -safe)
            )
            scores[k] = cute.math.exp2(x, fastmath=True)
            scores[k + 1] = cute.math.exp2(y, fastmath=True)

    def sum(self, scores: Any) -> Float32:
        """Of the thread's probabilities."""
        even, odd = (scores[0], scores[1]), (scores[2], scores[3])
        for k in range(4, self.keys, 4):
            even = cute.arch.add_packed_f32x2(even, (scores[k], scores[k + 1]))
            odd = cute.arch.add_packed_f32x2(odd, (scores[k + 2], scores[k + 3]))
        x, y = cute.arch.add_packed_f32x2(even, odd)
        return x + y

    @cute.jit
    def rescale(self, place: Place, factor: Float32):
        """acc_o of the warp's rows times their factors."""
        if cutlass.const_expr(not self.config.pair):  # the upper lanes hold the rows of the lower ones
            factor = cute.arch.shuffle_sync(factor, cute.arch.lane_idx() % HALF_LANES)
        for column in cutlass.range(0, ACC_O_COLS, OUT_COLS, unroll=1):
            values = tmem.load(place.tmem_lane + column, OUT_COLS)
            tmem.wait_loads()
            tmem.store(place.tmem_lane + column, values * factor)
        tmem.wait_stores()

    def store_probabilities(self, block: Block, place: Place, scores: Any) -> None:
        """The thread's part of a row of P, rounded to the cache's dtype."""
        config = self.config
        dtype = NUMERIC[config.dtype]
        rounded = cute.make_rmem_tensor((self.keys,), dtype)
        rounded.store(scores.load().to(dtype))
        words = cute.recast_tensor(rounded, Int32)
        row_bytes = config.probability_row_bytes
        first_byte = place.half * (self.keys * config.element_bytes)
        chunk = block.p_chunk + first_byte // row_bytes
        for at in range(0, self.keys * config.element_bytes, VECTOR_BYTES):
            vector = cute.make_rmem_tensor((VECTOR_BYTES // 4,), Int32)
            for word in range(VECTOR_BYTES // 4):
                vector[word] = words[at // 4 + word]
            offset = chunk * CHUNK_BYTES + swizzled(place.row, first_byte % row_bytes + at, row_bytes)
            store_vector(block.chunks + offset, vector)

    @cute.jit
    def finish(
        self,
        block: Block,
        schedule: Schedule,
        outputs: Outputs,
        exchange: cute.Tensor,
        place: Place,
        unit: Unit,
        row: Int32,
        tiles: Int32,
        reference: Float32,
        total: Float32,
    ):
        """Store a unit's result. Without keys it is zeros, which a combine kernel does not ask for."""
        config = self.config
        if unit.num_tiles > 0:
            total += self.partner(exchange, place, total, 1)
            self.wait_output(block, tiles)
            tmem.after_thread_sync()
        if cutlass.const_expr(config.split):
            wanted = unit.num_tiles > 0
        else:
            wanted = unit.rows > 0
        if wanted:
            seen = total != 0.0  # NaN is seen
            scale = select(seen, 1.0 / total, Float32(0.0))
            if cutlass.const_expr(not config.split):
                scale = scale * outputs.output_scale
            in_unit = row - unit.first_row < unit.rows
            safe_row = select(in_unit, row, unit.first_row)
            target = self.target(outputs, schedule, unit, safe_row) + place.out_column
            for column in cutlass.range_constexpr(0, ACC_O_COLS, OUT_COLS):
                values = cute.make_rmem_tensor((OUT_COLS,), Float32)
                values.fill(0.0)
                if unit.num_tiles > 0:
                    values.store(tmem.load(place.tmem_lane + column, OUT_COLS))
                    tmem.wait_loads()
                offset = column
                if cutlass.const_expr(config.pair):
                    offset = column % (OUT_N // 2) + column // (OUT_N // 2) * OUT_N
                if in_unit:
                    values.store(values.load() * scale)
                    store_values(
                        target + offset, values, Float32 if config.split else NUMERIC[config.out_dtype]
                    )
            tmem.before_thread_sync()
            lse_log2 = select(seen, reference + cute.math.log2(total, fastmath=True), -Float32.inf)
            if in_unit & (place.half == 0):
                self.store_lse(outputs, schedule, unit, row, lse_log2)

    def target(self, outputs: Outputs, schedule: Schedule, unit: Unit, row: Int32) -> Any:
        """The first element of the row in the output or the workspace."""
        if self.config.split:
            return outputs.o_partial[unit.split, self.partial_row(schedule, unit, row), None].iterator
        return row_pointer(outputs.mO, unit, row, schedule.num_heads, self.config.ragged)

    def partial_row(self, schedule: Schedule, unit: Unit, row: Int32) -> Int32:
        """Index of a row among those of all requests."""
        return unit.request * (schedule.q_len * schedule.num_heads) + row

    @cute.jit
    def store_lse(self, outputs: Outputs, schedule: Schedule, unit: Unit, row: Int32, lse_log2: Float32):
        """Natural in the caller's tensor, with base 2 in the workspace."""
        if cutlass.const_expr(self.config.split):
            outputs.lse_partial[unit.split, self.partial_row(schedule, unit, row)] = lse_log2
        elif cutlass.const_expr(self.config.return_lse):
            store_lse(outputs.mLSE, unit, row, schedule.num_heads, self.config.ragged, lse_log2 * LN2)

"""The role that issues MMAs: scores of a tile, then the output of the tile before."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32

from mla_sm100.config import (
    ACC_O_COLS,
    ACC_S_COLS,
    ACC_S_STAGES,
    CHUNK_BYTES,
    CHUNK_ROW_BYTES,
    CHUNK_ROWS,
    KV_LORA_RANK,
    DecodeConfig,
)

from . import tmem, umma
from .block import Block, ring_phase, ring_slot
from .load import key_stages
from .schedule import Schedule

OUT_N = KV_LORA_RANK // 2  # output columns of one MMA
HALF_LANES = 16  # the second half of the output of a single CTA is that many lanes on


class Mmas:
    """The MMA role: one thread of the leader CTA."""

    def __init__(self, config: DecodeConfig) -> None:
        self.config = config
        self.qk = umma.Mma(config.dtype, config.tile_m, config.tile_n, config.pair)
        self.pv = umma.Mma(config.dtype, config.tile_m, OUT_N, config.pair, b_mn_major=True)
        self.key_steps = CHUNK_ROWS * config.element_bytes // umma.STEP_BYTES  # of PV in 64 keys
        self.step_keys = umma.STEP_BYTES // config.element_bytes

    @cute.jit
    def run(self, block: Block, schedule: Schedule, tmem_base: Int32, negate: Boolean):
        """Owns acc_s and acc_o while empty. Waits on q_full, k_full, v_full, s_empty, p_full.

        Signals q_empty, k_empty, v_empty, s_full, pv_done. Does not own the probabilities.
        negate: take the scores' sign from a negative scale, which softmax sees as positive.
        """
        barriers = block.barriers
        tiles, units = Int32(0), Int32(0)
        index = block.cluster
        while index < schedule.num_units:
            count = schedule.unit(index).num_tiles
            if count > 0:
                cute.arch.mbarrier_wait(barriers.q_full, units & 1)
                for i in cutlass.range(count + 1, unroll=1):
                    if i < count:
                        self.scores(block, tmem_base, tiles + i, negate)
                        if i == count - 1:
                            umma.commit(barriers.q_empty, self.config.pair)
                    if i > 0:
                        self.output(block, tmem_base, tiles + i - 1, i > 1)
                tiles += count
                units += 1
            index += schedule.num_clusters

    @cute.jit
    def scores(self, block: Block, tmem_base: Int32, tile: Int32, negate: Boolean):
        """acc_s = Q K^T of one tile."""
        config, barriers = self.config, block.barriers
        stage = ring_slot(tile, ACC_S_STAGES)
        cute.arch.mbarrier_wait(barriers.s_empty + stage, ring_phase(tile, ACC_S_STAGES) ^ 1)
        tmem.after_thread_sync()
        acc_s = tmem_base + ACC_O_COLS + stage * ACC_S_COLS
        slot, phase = ring_slot(tile, config.k_tiles), ring_phase(tile, config.k_tiles)
        chunks_of_stage = key_stages(config)
        for k_stage in cutlass.range_constexpr(len(chunks_of_stage)):
            mbar = slot * config.k_stages_per_tile + k_stage
            cute.arch.mbarrier_wait(barriers.k_full + mbar, phase)
            self.score_steps(block, acc_s, slot, chunks_of_stage[k_stage], negate)
            if cutlass.const_expr(config.pair or k_stage == 0):
                umma.commit(barriers.k_empty + mbar, config.pair)
        umma.commit(barriers.s_full + stage, config.pair)

    def score_steps(
        self, block: Block, acc_s: Int32, slot: Int32, chunks: list[int], negate: Boolean
    ) -> None:
        """The instructions of some chunks. The first of chunk 0 overwrites acc_s."""
        for chunk in chunks:
            row_bytes = CHUNK_ROW_BYTES if chunk else CHUNK_ROWS * self.config.element_bytes
            descriptor = umma.k_major(row_bytes)
            q = umma.operand(descriptor, block.address(0))
            k = umma.operand(descriptor, block.address(block.k_chunk + slot * self.config.chunks))
            for step in range(row_bytes // umma.STEP_BYTES):
                self.qk.issue(
                    acc_s,
                    umma.advance(q, chunk * CHUNK_BYTES + step * umma.STEP_BYTES),
                    umma.advance(k, chunk * CHUNK_BYTES + step * umma.STEP_BYTES),
                    Boolean(chunk > 0 or step > 0),
                    negate,
                )

    @cute.jit
    def output(self, block: Block, tmem_base: Int32, tile: Int32, accumulate: Boolean):
        """acc_o (+)= P V of one tile."""
        cute.arch.mbarrier_wait(block.barriers.p_full, tile & 1)
        tmem.after_thread_sync()
        if cutlass.const_expr(self.config.pair):
            self.output_of_pair(block, tmem_base, tile, accumulate)
        else:
            self.output_of_one(block, tmem_base, tile, accumulate)
        umma.commit(block.barriers.pv_done, self.config.pair)

    @cute.jit
    def output_of_pair(self, block: Block, tmem_base: Int32, tile: Int32, accumulate: Boolean):
        """Values from their own ring, 64 keys by 256 latent elements (128 in either CTA) per stage."""
        config, barriers = self.config, block.barriers
        slot, phase = ring_slot(tile, config.v_tiles), ring_phase(tile, config.v_tiles)
        for stage in cutlass.range_constexpr(config.v_stages_per_tile):
            key_half, out_half = stage // 2, stage % 2
            mbar = slot * config.v_stages_per_tile + stage
            cute.arch.mbarrier_wait(barriers.v_full + mbar, phase)
            values = block.address(block.v_chunk + mbar * config.v_stage_chunks)
            acc_o = tmem_base + out_half * (OUT_N // 2)
            for step in cutlass.range_constexpr(self.key_steps):
                self.output_step(
                    block, acc_o, key_half, step, values, accumulate if stage < 2 else Boolean(True)
                )
            umma.commit(barriers.v_empty + mbar, True)

    @cute.jit
    def output_of_one(self, block: Block, tmem_base: Int32, tile: Int32, accumulate: Boolean):
        """Values from the latent chunks of the ring of keys."""
        config, barriers = self.config, block.barriers
        slot = ring_slot(tile, config.k_tiles)
        for out_half in cutlass.range_constexpr(2):
            chunk = 1 + out_half * (config.latent_chunks // 2)
            values = block.address(block.k_chunk + slot * config.chunks + chunk)
            acc_o = tmem_base + out_half * HALF_LANES * tmem.LANE
            for step in cutlass.range_constexpr(self.key_steps):
                self.output_step(block, acc_o, 0, step, values, accumulate)
            umma.commit(barriers.k_empty + slot * config.k_stages_per_tile + 1 + out_half, False)

    def output_step(
        self, block: Block, acc_o: Int32, key_half: int, step: int, values: Int32, accumulate: Boolean
    ) -> None:
        """One instruction: the keys of `step` in a half of the tile. `accumulate` is for the first."""
        config = self.config
        at = key_half * CHUNK_ROWS * config.element_bytes + step * umma.STEP_BYTES  # byte in a row of P
        chunk, byte = divmod(at, config.probability_row_bytes)
        probabilities = umma.operand(umma.k_major(config.probability_row_bytes), block.address(block.p_chunk))
        self.pv.issue(
            acc_o,
            umma.advance(probabilities, chunk * CHUNK_BYTES + byte),
            umma.advance(
                umma.operand(umma.mn_major(CHUNK_BYTES), values), step * self.step_keys * CHUNK_ROW_BYTES
            ),
            accumulate if step == 0 else Boolean(True),
            Boolean(False),
        )

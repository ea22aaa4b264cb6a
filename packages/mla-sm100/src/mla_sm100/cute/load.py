"""The roles that bring operands to shared memory: keys and values page by page by TMA, queries row by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64

from mla_sm100.config import CHUNK_BYTES, CHUNK_ROW_BYTES, CHUNK_ROWS, KV_LORA_RANK, DecodeConfig

from .block import LEADER, VECTOR_BYTES, WARP_LANES, Block, ring_phase, ring_slot, swizzled
from .schedule import Schedule, Unit, select

ROW_VECTORS = CHUNK_ROW_BYTES // VECTOR_BYTES
ROWS_PER_COPY = WARP_LANES // ROW_VECTORS  # rows of queries that one instruction of a warp copies


@dataclass(frozen=True)
class PagedCopy:
    """One kind of TMA copy of `box_keys` keys of a page to a part of a chunk.

    source: [box, key box of a page, column box, page]. destination: [box, part, chunk].
    A page that does not exist arrives as zeros.
    """

    atom: cute.CopyAtom
    source: Any
    destination: Any

    def start(self, key_box: Any, column: Any, page: Any, part: Any, chunk: Any, mbar: Any) -> None:
        """Start the copy; its bytes are counted on `mbar`. By a whole warp."""
        cute.copy(
            self.atom,
            self.source[None, key_box, column, page],
            self.destination[None, part, chunk],
            tma_bar_ptr=mbar,
        )


@dataclass(frozen=True)
class PagedCopies:
    """Copies of 128 bytes of latent elements per key, and of the rope part.

    own_latent reports to the CTA's own barrier, where the others report to the leader's.
    """

    latent: PagedCopy
    rope: PagedCopy
    own_latent: PagedCopy


@dataclass(frozen=True)
class Pages:
    """The pages of 64 consecutive keys: one TMA box each, or half of one."""

    page: Int32  # of the box that has the number of the calling lane
    key_box: Int32  # which box of their page it is, the same for all


class Loads:
    """The loading roles, one warp each."""

    def __init__(self, config: DecodeConfig) -> None:
        self.config = config
        self.parts = CHUNK_ROWS // config.box_keys

    @cute.jit
    def keys(
        self, block: Block, schedule: Schedule, copies: PagedCopies, mTables: cute.Tensor, num_pages: Int32
    ):
        """Owns the ring of keys. Waits on k_empty. Signals k_full. Does not own values of a pair."""
        tiles = Int32(0)
        index = block.cluster
        while index < schedule.num_units:
            unit = schedule.unit(index)
            for i in cutlass.range(unit.num_tiles, unroll=1):
                first_key = (unit.first_tile + i) * self.config.tile_n
                if cutlass.const_expr(self.config.pair):
                    first_key += block.rank * CHUNK_ROWS
                pages = self.pages(mTables, unit, first_key, num_pages)
                self.key_tile(block, copies, pages, tiles)
                tiles += 1
            index += schedule.num_clusters
        stages = self.config.k_stages_per_tile
        self.drain(block.barriers.k_empty, tiles, self.config.k_tiles, stages)

    @cute.jit
    def values(
        self, block: Block, schedule: Schedule, copies: PagedCopies, mTables: cute.Tensor, num_pages: Int32
    ):
        """Owns the ring of values of a pair. Waits on v_empty. Signals v_full; v_tail.

        The bytes of a tile in which the sequence ends inside a page are reported to v_tail of either CTA, so
        that softmax can clear what follows the sequence before the MMA reads it.
        """
        tiles = Int32(0)
        index = block.cluster
        while index < schedule.num_units:
            unit = schedule.unit(index)
            for i in cutlass.range(unit.num_tiles, unroll=1):
                first_key = (unit.first_tile + i) * self.config.tile_n
                is_tail = ends_in_page(self.config, unit.seq_len, first_key)
                for half in cutlass.range_constexpr(2):
                    pages = self.pages(mTables, unit, first_key + half * CHUNK_ROWS, num_pages)
                    for out_half in cutlass.range_constexpr(2):
                        self.value_stage(block, copies, pages, tiles, half * 2 + out_half, out_half, is_tail)
                tiles += 1
            index += schedule.num_clusters
        self.drain(block.barriers.v_empty, tiles, self.config.v_tiles, self.config.v_stages_per_tile)

    @cute.jit
    def queries(self, block: Block, schedule: Schedule, mQ: cute.Tensor):
        """Owns the chunks of queries while empty. Waits on q_empty. Signals q_full.

        Rows that the unit does not have are zeros; those that no unit has are not written here.
        """
        units = Int32(0)
        used_rows = schedule.used_rows
        index = block.cluster
        while index < schedule.num_units:
            unit = schedule.unit(index)
            if unit.num_tiles > 0:
                cute.arch.mbarrier_wait(block.barriers.q_empty, (units & 1) ^ 1)
                for first_row in cutlass.range(0, used_rows, WARP_LANES, unroll=1):
                    self.query_rows(block, schedule, mQ, unit, first_row, used_rows)
                cute.arch.cp_async_commit_group()
                cute.arch.cp_async_wait_group(0)
                cute.arch.fence_proxy("async.shared", space="cta")
                cute.arch.sync_warp()
                with cute.arch.elect_one():
                    block.arrive_at_leader(block.barriers.q_full)
                units += 1
            index += schedule.num_clusters
        if units > 0:
            cute.arch.mbarrier_wait(block.barriers.q_empty, (units - 1) & 1)

    @cute.jit
    def query_rows(
        self,
        block: Block,
        schedule: Schedule,
        mQ: cute.Tensor,
        unit: Unit,
        first_row: Int32,
        used_rows: Int32,
    ):
        """Start copying up to 32 rows, each by eight lanes; a lane finds the address of one row."""
        lane = cute.arch.lane_idx()
        row_in_unit = first_row + lane
        if cutlass.const_expr(self.config.pair):
            row_in_unit += block.rank * CHUNK_ROWS
        present = row_in_unit < unit.rows
        row_in_request = select(present, unit.first_row + row_in_unit, Int32(0))
        pointer = row_pointer(mQ, unit, row_in_request, schedule.num_heads, self.config.ragged)
        address = pointer.toint()
        num_bytes = select(present, Int32(VECTOR_BYTES), Int32(0))
        rows = cutlass.min(used_rows - first_row, WARP_LANES)
        for step in cutlass.range(cute.ceil_div(rows, ROWS_PER_COPY), unroll=1):
            row = step * ROWS_PER_COPY + lane // ROW_VECTORS
            source = cute.arch.shuffle_sync(address, row)
            self.query_row(block, first_row + row, source, cute.arch.shuffle_sync(num_bytes, row), lane)

    def query_row(self, block: Block, row: Int32, source: Int64, num_bytes: Int32, lane: Int32) -> None:
        """Start copying one row, spread over eight lanes; zeros where `num_bytes` is 0."""
        config = self.config
        byte = lane % ROW_VECTORS * VECTOR_BYTES
        target = block.address(0) + swizzled(row, byte, CHUNK_ROW_BYTES)
        for chunk in range(1, config.chunks):
            at = (chunk - 1) * CHUNK_ROW_BYTES  # of the row
            _copy_vector(target, chunk * CHUNK_BYTES, source + byte, at, num_bytes)
        row_bytes = self.rope_row_bytes
        target = block.address(0) + swizzled(row, byte % row_bytes, row_bytes)
        at = KV_LORA_RANK * config.element_bytes
        _copy_vector(target, 0, source + byte % row_bytes, at, num_bytes)

    @property
    def rope_row_bytes(self) -> int:
        """Bytes of a row in a chunk of rope elements."""
        return CHUNK_ROWS * self.config.element_bytes

    @cute.jit
    def key_tile(self, block: Block, copies: PagedCopies, pages: Pages, tile: Int32):
        """Load 64 keys: rope first, then latent chunks."""
        config = self.config
        slot, phase = ring_slot(tile, config.k_tiles), ring_phase(tile, config.k_tiles)
        chunks_of_stage = key_stages(config)
        for stage in cutlass.range_constexpr(len(chunks_of_stage)):
            mbar = slot * config.k_stages_per_tile + stage
            full = block.barriers.k_full + mbar
            cute.arch.mbarrier_wait(block.barriers.k_empty + mbar, phase ^ 1)
            self.expect(block, full, self.stage_bytes(chunks_of_stage[stage]))
            self.start_keys(block, copies, pages, slot, chunks_of_stage[stage], full)

    def stage_bytes(self, chunks: list[int]) -> int:
        """Bytes of some chunks of 64 keys."""
        return sum(CHUNK_ROWS * (CHUNK_ROW_BYTES if chunk else self.rope_row_bytes) for chunk in chunks)

    def start_keys(
        self, block: Block, copies: PagedCopies, pages: Pages, slot: Int32, chunks: list[int], full: Any
    ) -> None:
        """Start copying some chunks of 64 keys."""
        for chunk in chunks:
            copy = copies.latent if chunk else copies.rope
            column = chunk - 1 if chunk else KV_LORA_RANK // CHUNK_ROWS
            self.start_chunk(copy, pages, column, block.k_chunk + slot * self.config.chunks + chunk, full)

    @cute.jit
    def start_chunk(self, copy: PagedCopy, pages: Pages, column: Any, chunk: Any, mbar: Any):
        """Start copying a chunk, box by box. The boxes are a loop: unrolled, they take too many registers."""
        if cutlass.const_expr(self.parts == 1):
            copy.start(pages.key_box, column, pages.page, 0, chunk, mbar)
        else:
            for part in cutlass.range(self.parts, unroll=1):
                page = cute.arch.shuffle_sync(pages.page, part)
                copy.start(pages.key_box, column, page, part, chunk, mbar)

    @cute.jit
    def value_stage(
        self,
        block: Block,
        copies: PagedCopies,
        pages: Pages,
        tile: Int32,
        stage: cutlass.Constexpr,
        out_half: cutlass.Constexpr,
        is_tail: Boolean,
    ):
        """Load 64 keys by the 128 latent elements of half `out_half` of the output that this CTA has."""
        config = self.config
        slot, phase = ring_slot(tile, config.v_tiles), ring_phase(tile, config.v_tiles)
        mbar = slot * config.v_stages_per_tile + stage
        full = block.barriers.v_full + mbar
        cute.arch.mbarrier_wait(block.barriers.v_empty + mbar, phase ^ 1)
        tail = block.barriers.v_tail + slot
        if cutlass.const_expr(stage == 0):
            tile_bytes = config.v_stages_per_tile * config.v_stage_chunks * CHUNK_BYTES
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(tail, select(is_tail, Int32(tile_bytes), Int32(0)))
        first_chunk = block.v_chunk + mbar * config.v_stage_chunks
        first_column = (out_half * 2 + block.rank) * config.v_stage_chunks
        if is_tail:
            if block.rank == LEADER:
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive(full)
            self.start_values(copies.own_latent, pages, first_column, first_chunk, tail)
        else:
            self.expect(block, full, config.v_stage_chunks * CHUNK_BYTES)
            self.start_values(copies.latent, pages, first_column, first_chunk, full)

    def start_values(
        self, copy: PagedCopy, pages: Pages, first_column: Int32, first_chunk: Int32, mbar: Any
    ) -> None:
        """Start copying a stage of values."""
        for chunk in range(self.config.v_stage_chunks):
            self.start_chunk(copy, pages, first_column + chunk, first_chunk + chunk, mbar)

    @cute.jit
    def expect(self, block: Block, full: Any, num_bytes: cutlass.Constexpr):
        """Announce the bytes of a stage, those of both CTAs, at the leader's barrier."""
        if block.rank == LEADER:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full, num_bytes * self.config.cluster_size)

    def pages(self, mTables: Any, unit: Unit, first_key: Int32, num_pages: Int32) -> Pages:
        """The pages of 64 keys; `num_pages`, which does not exist, where the sequence has ended."""
        page_size = self.config.page_size
        key = first_key
        if self.parts > 1:
            key += cute.arch.lane_idx() % self.parts * self.config.box_keys
        present = key < unit.seq_len
        entry = mTables[unit.request, select(present, key // page_size, Int32(0))]
        key_box = first_key % page_size // self.config.box_keys
        return Pages(select(present, entry, num_pages), key_box)

    @cute.jit
    def drain(self, empty: Any, tiles: Int32, ring_tiles: cutlass.Constexpr, stages: cutlass.Constexpr):
        """Wait until what was loaded has been read: no barrier is signalled after the block has ended."""
        for tile in cutlass.range(cutlass.max(0, tiles - ring_tiles), tiles, unroll=1):
            for stage in cutlass.range_constexpr(stages):
                mbar = ring_slot(tile, ring_tiles) * stages + stage
                cute.arch.mbarrier_wait(empty + mbar, ring_phase(tile, ring_tiles))


def key_stages(config: DecodeConfig) -> list[list[int]]:
    """Chunks of each stage of a tile of keys. Chunk 0 is the rope part."""
    if config.pair:
        return [[chunk] for chunk in range(config.chunks)]
    half = config.latent_chunks // 2
    return [[0], list(range(1, 1 + half)), list(range(1 + half, 1 + 2 * half))]


def ends_in_page(config: DecodeConfig, seq_len: Int32, first_key: Int32) -> Boolean:
    """Whether the sequence ends inside a page of the tile at `first_key`: what follows it is unknown."""
    return (seq_len < first_key + config.tile_n) & (seq_len % config.box_keys != 0)


def row_pointer(m: Any, unit: Unit, row: Int32, num_heads: Int32, ragged: bool) -> Any:
    """The first element of a (token, head) row in a tensor of rows."""
    token = row // num_heads
    head = row - token * num_heads
    if ragged:
        return m[unit.first_token + token, head, None].iterator
    return m[unit.request, token, head, None].iterator


def _copy_vector(target: Int32, offset: int, source: Int64, source_offset: int, num_bytes: Int32) -> None:
    """Start copying 16 bytes to shared memory, of which only `num_bytes` are read and the rest are zeros."""
    cute.arch.inline_ptx(
        f"cp.async.cg.shared.global [{{$r0}}+{offset}], [{{$r1}}+{source_offset}], 16, {{$r2}};",
        read_only_args=[target, source, num_bytes],
    )

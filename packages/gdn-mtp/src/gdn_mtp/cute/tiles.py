"""A warp's tiles of 16 state rows: global memory to shared memory to registers, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int64

from .config import MMA_ROWS, PART_ROWS, VECTOR_BYTES, TokenTiles
from .fragments import NUMERIC, bulk_load, bulk_store, load_vector, load_words, store_vector


@dataclass(frozen=True)
class Shared:
    """A block's shared memory."""

    tiles: Any  # [K, (8, 2), buffers per warp, warps], the state's dtype
    kq: Any  # k then q of every token, unscaled, `token_stride` apart, in `TokenTiles.token_dtype`
    pairs: Any  # float32 k of tokens 2p and 2p + 1 side by side; columns 4i, 4i + 2, 4i + 1, 4i + 3, or None
    matrices: Any  # [chunks, MATRICES_PER_CHUNK, 8, 8]
    gate: Any  # GATE_COLUMNS of each token, GATE_STRIDE apart
    mbars: Any  # one per tile, warp-major


@dataclass(frozen=True)
class Place:
    """Where a warp works."""

    request: Any
    hv: Any
    write_slot: Any  # pool slot of the updated state; negative: none; None: not read yet
    row: Any  # first row of the warp's first tile
    warp: Any
    lane: Any

    @property
    def g(self):
        return self.lane // 4

    @property
    def t(self):
        return self.lane % 4

    def row_in_tile(self, half):
        """The row of a tile that stands in row g + 8 * half of a product; a lane's two lie side by side."""
        return PART_ROWS * (self.g % 2) + 2 * (self.g // 2) + half


def with_dynamic_rows(states):
    """`states` [..., V, K], or None, with a row stride that the compiler does not know.

    Of contiguous rows the launcher demands a stride of K. With that in its code the kernel would take longer
    with few requests: loads come in another order.
    """
    if states is None:
        return None
    divisor = VECTOR_BYTES * 8 // states.element_type.width
    stride = (*states.stride[:-2], cute.assume(Int64(states.stride[-2]), divby=divisor), 1)
    return cute.make_tensor(states.iterator, cute.make_layout(states.shape, stride=stride))


def allocate_tokens(cfg, smem):
    """Shared memory of k and q of all tokens: `Shared.kq`."""
    size = 2 * cfg.T * cfg.token_stride
    return smem.allocate_tensor(NUMERIC[cfg.token_dtype], cute.make_layout(size), 16)


def allocate_slack(cfg, smem):
    """What a block asks for beyond what it uses."""
    if cfg.smem_bytes > cfg.used_smem_bytes:
        smem.allocate(cfg.smem_bytes - cfg.used_smem_bytes)


class TileCopies:
    """Moves tiles for one `TokenTiles`, a configuration.

    Owns the tile buffers and their barriers. Lane (g, t) of a warp holds two rows of a tile, of each every
    fourth 16-byte vector from t on. A buffer is two parts of 8 rows that start in other banks: lanes of even
    g have their rows in one, those of odd g in the other. Waits for its loads and, before it reuses a buffer,
    for the stores that read it; the kernel waits for the last stores.
    """

    def __init__(self, config: TokenTiles):
        self.config = config

    def grid(self, value_heads, key_heads, requests):
        """Thread blocks of a launch, in the order of requests, value heads and rows."""
        return value_heads // key_heads * self.config.blocks_per_head, key_heads, requests

    def block_place(self):
        """(block of rows, key head, value head, number of that among those of the key head, request)."""
        x, head, request = cute.arch.block_idx()
        blocks, _, _ = cute.arch.grid_dim()
        member = x // self.config.blocks_per_head
        value_head = head * (blocks // self.config.blocks_per_head) + member
        return x % self.config.blocks_per_head, head, value_head, member, request

    def tile_row(self, place, tile):
        """First row of a tile of this warp."""
        return place.row + tile * MMA_ROWS

    @cute.jit
    def init_barriers(self, shared, warp, lane):
        """Make this warp's barriers ready, one per tile."""
        count = self.config.tactic.tiles_per_warp
        if lane == 0:
            for tile in cutlass.range_constexpr(count):
                cute.arch.mbarrier_init(shared.mbars + warp * count + tile, 1)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_warp()

    @cute.jit
    def start_loads(self, matrix, shared, place):
        """Start the copies of this warp's rows of `matrix` [V, K], one barrier per tile."""
        cfg = self.config
        count = cfg.tactic.tiles_per_warp
        mbars = shared.mbars + place.warp * count
        with cute.arch.elect_one():
            for tile in cutlass.range_constexpr(count):
                cute.arch.mbarrier_arrive_and_expect_tx(mbars + tile, cfg.tile_bytes)
                if cutlass.const_expr(not cfg.tactic.row_copies):
                    for part in cutlass.range_constexpr(0, MMA_ROWS, PART_ROWS):
                        self.load_rows(matrix, part, PART_ROWS, shared, place, tile, mbars + tile)
        if cutlass.const_expr(cfg.tactic.row_copies):
            cute.arch.sync_warp()
            if place.lane < MMA_ROWS:
                for tile in cutlass.range_constexpr(count):
                    self.load_rows(matrix, place.lane, 1, shared, place, tile, mbars + tile)

    def load_rows(self, matrix, first, count, shared, place, tile, mbar):
        """Start one copy of `count` rows of a tile from row `first` of it on."""
        source = matrix[place.row + tile * MMA_ROWS + first, None].iterator
        target = self.row_pointer(shared, place, tile, first)
        bulk_load(target, source, count * self.config.row_bytes, mbar, self.config.tactic.evict_first)

    def row_pointer(self, shared, place, buffer, row):
        return shared.tiles[None, row, buffer, place.warp].iterator

    @cute.jit
    def store_rows(self, matrix, row, shared, place, buffer):
        """Start copying a tile buffer to rows `row` to `row` + 15 of `matrix` [V, K]."""
        cfg = self.config
        to_evict = cfg.tactic.evict_first
        if cutlass.const_expr(cfg.tactic.row_copies):
            if place.lane < MMA_ROWS:
                source = self.row_pointer(shared, place, buffer, place.lane)
                bulk_store(matrix[row + place.lane, None].iterator, source, cfg.row_bytes, to_evict)
        else:
            with cute.arch.elect_one():
                for part in cutlass.range_constexpr(0, MMA_ROWS, PART_ROWS):
                    source = self.row_pointer(shared, place, buffer, part)
                    bulk_store(matrix[row + part, None].iterator, source, PART_ROWS * cfg.row_bytes, to_evict)

    def vectors(self):
        """(row half, vector index) of each 16-byte vector of a lane."""
        count = self.config.K // (4 * self.config.vector_elements)
        return [(half, i) for i in range(count) for half in range(2)]

    def vector_pointer(self, shared, place, buffer, half, i):
        vec = self.config.vector_elements
        row = self.row_pointer(shared, place, buffer, place.row_in_tile(0)) + half * self.config.K
        return row + cute.assume((4 * i + place.t) * vec, divby=vec)

    def load_tile(self, shared, place, buffer):
        """s[half][column of the lane] as float32: rows g and g + 8 of a tile."""
        s = [[], []]
        for half, i in self.vectors():
            pointer = self.vector_pointer(shared, place, buffer, half, i)
            s[half] += load_vector(pointer, shared.tiles.element_type)
        return s

    def load_tile_words(self, shared, place, buffer):
        """`load_tile` of bfloat16 rows as they are, two values a register."""
        words = [[], []]
        for half, i in self.vectors():
            words[half] += load_words(self.vector_pointer(shared, place, buffer, half, i))
        return words

    def write_tile(self, s, shared, place, buffer):
        """Write s to where `load_tile` reads it."""
        vec = self.config.vector_elements
        for half, i in self.vectors():
            pointer = self.vector_pointer(shared, place, buffer, half, i)
            store_vector(pointer, s[half][vec * i : vec * (i + 1)], shared.tiles.element_type)

    @cute.jit
    def stage_tile(self, s, shared, place, buffer, pending):
        """Write s to a tile buffer for bulk stores.

        First waits until at most `pending` earlier groups of stores still read their buffers (None: no wait).
        """
        if cutlass.const_expr(pending is not None):
            cute.arch.cp_async_bulk_wait_group(pending, read=True)
        cute.arch.sync_warp()
        self.write_tile(s, shared, place, buffer)
        cute.arch.fence_view_async_shared()
        cute.arch.sync_warp()

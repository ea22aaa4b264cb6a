"""Units of work: which keys and rows a cluster has next, and how many there are.

A unit is a tile of rows of one request against the keys of one split. Unit
    ((request * num_splits) + split) * row_tiles + row_tile
so that the row tiles of a request, which read the same keys, run side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cutlass_dsl import select_

from mla_sm100.config import CHUNK_ROWS, DecodeConfig


def select(condition, x, y):
    """x where `condition` holds, else y; of one type."""
    return type(x)(select_(condition, x, y))


@dataclass(frozen=True)
class Unit:
    """One unit of work.

    rows: of the tile; 0 or less where a ragged request has fewer.
    first_token: of the request's queries in a ragged tensor, else 0. q_len: of the request.
    first_tile, num_tiles: of tile_n keys.
    """

    request: Int32
    split: Int32
    first_row: Int32
    rows: Int32
    seq_len: Int32
    first_token: Int32
    q_len: Int32
    first_tile: Int32
    num_tiles: Int32


@dataclass(frozen=True)
class Schedule:
    """The units of a launch. A cluster takes every num_clusters-th of them."""

    config: DecodeConfig
    seq_lens: Any  # [batch]
    cum_seq_lens_q: Any  # [batch + 1], or None
    num_heads: Int32
    q_len: Int32  # the most of any request
    num_splits: Int32
    tiles_per_split: Int32
    num_clusters: Int32

    @property
    def row_tiles(self) -> Int32:
        """Tiles of rows of a request."""
        return cute.ceil_div(self.q_len * self.num_heads, self.config.tile_m)

    @property
    def used_rows(self) -> Int32:
        """Rows that a CTA may have at most."""
        return cutlass.min(CHUNK_ROWS, self.q_len * self.num_heads)

    @property
    def num_units(self) -> Int32:
        """Units of all requests."""
        return cute.size(self.seq_lens, mode=[0]) * self.num_splits * self.row_tiles

    def unit(self, index: Int32) -> Unit:
        """Unit `index`. Without keys or rows it has no tiles."""
        row_tiles = self.row_tiles
        item = index // row_tiles
        request = item // self.num_splits
        split = item - request * self.num_splits
        return self.unit_of(request, split, (index - item * row_tiles) * self.config.tile_m)

    def unit_of(self, request: Int32, split: Int32, first_row: Int32) -> Unit:
        """The tile of rows at `first_row` against a split's keys."""
        first_token, q_len = Int32(0), self.q_len
        if cutlass.const_expr(self.cum_seq_lens_q is not None):
            first_token = self.cum_seq_lens_q[request]
            q_len = self.cum_seq_lens_q[request + 1] - first_token
        seq_len = self.seq_lens[request]
        rows = q_len * self.num_heads - first_row
        tiles = cute.ceil_div(seq_len, self.config.tile_n)
        splits = self.splits_of(tiles)
        begin = split * tiles // splits
        end = (split + 1) * tiles // splits
        has_work = (rows > 0) & (split < splits)
        return Unit(
            request=request,
            split=split,
            first_row=first_row,
            rows=rows,
            seq_len=seq_len,
            first_token=first_token,
            q_len=q_len,
            first_tile=begin,
            num_tiles=select(has_work, end - begin, Int32(0)),
        )

    def splits_of(self, tiles: Int32) -> Int32:
        """Splits of a request with that many tiles of keys."""
        return cutlass.max(1, cutlass.min(self.num_splits, cute.ceil_div(tiles, self.tiles_per_split)))

"""What blocks bring to the L2 cache while the previous grid still runs, and read as that grid leaves it.

L2 is coherent, so a line that the previous grid writes after all is as it leaves it.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from .config import L2_LINE_BYTES

FEW_BLOCKS = 2  # of a small grid, per multiprocessor; docs/speed.md, "K-major states", has what it brings


def prefetch_l2(source) -> None:
    """Bring the cache line at `source` to L2."""
    cute.arch.inline_ptx("prefetch.global.L2 [{$r0}];", read_only_args=[source])


def bulk_prefetch_l2(source, num_bytes: int) -> None:
    """Start bringing `num_bytes` of global memory at `source` to L2."""
    cute.arch.inline_ptx(
        "cp.async.bulk.prefetch.L2.global [{$r0}], {$r1};", read_only_args=[source, Int32(num_bytes)]
    )


def among_first(per_multiprocessor: int):
    """Whether the block is among the first of the grid, so many for each multiprocessor."""
    return block_number() < cute.arch.nsmid() * per_multiprocessor


def out_of_the_way(cfg, ahead: int | None):
    """Whether the block may prefetch its state while the previous grid ends, as `Tactic.ahead` says.

    Blocks start in the order of their numbers, as many on each multiprocessor.
    """
    if ahead is None or ahead >= cfg.blocks_per_sm:
        return True
    x, y, z = cute.arch.grid_dim()
    return may_prefetch(block_number(), x * y * z, cute.arch.nsmid(), cfg.blocks_per_sm, ahead)


def may_prefetch(block, blocks, sm_count, blocks_per_sm: int, ahead: int):
    """Whether block number `block` of `blocks` prefetches, for numbers known here or in the kernel."""
    return (blocks <= FEW_BLOCKS * sm_count) | (block >= (blocks_per_sm - ahead) * sm_count)


def block_number():
    """The number of the block in the order in which blocks start."""
    x, y, z = cute.arch.block_idx()
    blocks_x, blocks_y, _ = cute.arch.grid_dim()
    return (z * blocks_y + y) * blocks_x + x


@cute.jit
def prefetch_tokens(cfg, qk, v, token_gates, head_gates, place, head):
    """Bring k, q, the first line of v and the gates of a block's tokens to L2; for one warp.

    qk: q and k [B, T, H, K]. v: [B, T, HV, V]. token_gates: a, b [B, T, HV]. head_gates: A_log, dt_bias [HV].
    place: of the warp, `row` its first of v.
    """
    if place.lane < cfg.T:
        for x in reversed(qk):
            for line in cutlass.range_constexpr(-(-cfg.K * x.element_type.width // (8 * L2_LINE_BYTES))):
                column = line * L2_LINE_BYTES * 8 // x.element_type.width
                prefetch_l2(x[place.request, Int64(place.lane), Int64(head), None].iterator + column)
        prefetch_l2(v[place.request, Int64(place.lane), Int64(place.hv), None].iterator + place.row)
        for x in token_gates:
            prefetch_l2(x[place.request, Int64(place.lane), None].iterator + place.hv)
    if place.lane == 0:
        for x in head_gates:
            prefetch_l2(x.iterator + place.hv)

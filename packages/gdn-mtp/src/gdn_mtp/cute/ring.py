"""Pending tokens of a speculative cache: accepted by a request, but not yet folded into its state.

Of each token a ring keeps k, the corrected value u, the log decay g and the factor of k, so that
    S' = D(end) S + sum_j w_j u_j k_j^T,    w_j = exp(g_{j+1} + ... + g_end) k_scale_j
is the state after them. Every warp finds the pending tokens, a lane for each token of the ring; where many
share a multiprocessor, one does for its block. Each has some of them copied to shared memory, where they are
in order: in the ring they may lie apart, where nodes between them were rejected. What follows takes them in
chunks of eight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.testing import assert_

from .chunks import TokenChunks, as_operand
from .config import CHUNK_TOKENS, MMA_ROWS, WARP_LANES
from .config_speculative import REQUEST_WORDS
from .fragments import (
    BF16_PARTS,
    bulk_load,
    increment,
    is_slot,
    load_shared,
    load_values,
    load_words,
    mma_bf16,
    mma_split,
    parts,
    read_index,
    read_l2,
    read_l2_words,
    same_halves,
    select,
    split_bf16,
    store_vector,
    unpack,
    write_l2,
)
from .prefetch import bulk_prefetch_l2, prefetch_l2


@dataclass(frozen=True)
class Cache:
    """A speculative cache in global memory."""

    keys: Any  # [pool, R, H, K], as given
    updates: Any  # [pool, R, HV, V] float32: u
    gates: Any  # [pool, R, HV] float32: log decay
    k_scale: Any  # [pool, R, H] float32: what k is multiplied with
    cursor: Any  # [pool, 4] int32: start, length, window, blocks that have read it
    live: Any  # [pool] int32: bit j for the token at ring position start + j


@dataclass(frozen=True)
class Pending:
    """A request's pending tokens, with those it accepts now; the same in all its blocks."""

    slot: Any
    head: Any  # of keys
    start: Any  # ring position
    length: Any  # positions from `start` on, rejected nodes included
    live: Any
    count: Any  # accepted tokens


class RingTiles(TokenChunks):
    """Reads pending tokens, and advances tiles of the state by them."""

    def read_slot(self, state_indices, request, pool_size):
        """The slot of a request, which is padding where it is negative or beyond the pool."""
        slot = read_index(state_indices, request)
        if self.config.debug:
            assert_(slot < pool_size, "gdn_mtp: state_indices names a slot beyond the pool")
        return slot

    def expected_slot(self, state_indices, request):
        """The slot of a request before the previous grid has ended, which may still change it."""
        return read_index(state_indices, request)

    def load_window(self, cache, slot):
        """Start and length of a slot's pending tokens, and the length of its last window."""
        return read_l2_words(cache.cursor[slot, None].iterator)[:3]

    @cute.jit
    def share_request(self, cache, state_indices, expected, num_accepted, accepted_nodes, shared, place):
        """One warp: find the slot and what the request accepts, for all.

        expected: the slot before the previous grid ended, or none of the pool. Its ring is read beside the
        slot, and again of another slot. `shared_request` gives what was found, past a barrier of the block.
        """
        pool_size = cache.live.shape[0]
        slot = self.read_slot(state_indices, place.request, pool_size)
        accepted = self.load_accepted(num_accepted, accepted_nodes, place)
        ring = (Int32(0),) * 4
        if is_slot(expected, pool_size):
            ring = self.load_ring(cache, expected)
        found = (Int32(-1), Int32(0), Int32(0), Int32(0))
        if is_slot(slot, pool_size):
            if slot != expected:
                ring = self.load_ring(cache, slot)
            found = (Int32(slot), *self.accept(ring, accepted))
        if place.lane == 0:
            for i in cutlass.range_constexpr(REQUEST_WORDS):
                shared.request[i] = found[i]

    def shared_request(self, shared):
        """(slot, what `accept` gave) of `share_request`; padding has slot -1."""
        slot, *accepted = load_words(shared.request.iterator)
        return Int64(slot), tuple(accepted)

    def load_ring(self, cache, slot):
        """Start, length and window of a slot's ring, and its live tokens."""
        return *self.load_window(cache, slot), read_l2(cache.live.iterator + slot, Int32)

    @cute.jit
    def load_accepted(self, num_accepted, accepted_nodes, place):
        """What a request accepts of its window: a number of tokens, or this lane's node, or None."""
        accepted = None
        if cutlass.const_expr(self.config.accept == "counts"):
            accepted = read_l2(num_accepted.iterator + place.request, Int32)
        if cutlass.const_expr(self.config.accept == "nodes"):
            accepted = Int32(-1)
            if place.lane < accepted_nodes.shape[1]:
                accepted = read_l2(accepted_nodes[place.request, None].iterator + place.lane, Int32)
        return accepted

    @cute.jit
    def accept(self, ring, accepted):
        """(start, length, live) after the request accepts tokens of its window; in range for any input.

        The arguments are what `load_ring` and `load_accepted` gave.
        """
        capacity = self.config.capacity
        start, length, window, live = ring
        if cutlass.const_expr(self.config.debug):
            in_range = (start >= 0) & (start < capacity) & (length >= 0) & (window >= 0)
            in_range = in_range & (length + window <= capacity - self.config.T)  # room for the new ones
            assert_(in_range, "gdn_mtp: the cursor of a slot of the speculative cache is out of range")
        start = cutlass.min(cutlass.max(start, 0), capacity - 1)
        length = cutlass.min(cutlass.max(length, 0), capacity)
        window = cutlass.min(cutlass.max(window, 0), capacity - length)
        live = live & bits_below(length)
        if cutlass.const_expr(self.config.accept == "counts"):
            if cutlass.const_expr(self.config.debug):
                within = (accepted >= 0) & (accepted <= window)
                assert_(within, "gdn_mtp: num_accepted is not between 0 and the tokens that were verified")
            accepted = cutlass.min(cutlass.max(accepted, 0), window)
            live = live | (bits_below(length + accepted) & ~bits_below(length))
            length = length + accepted
        if cutlass.const_expr(self.config.accept == "nodes"):
            node = accepted
            if cutlass.const_expr(self.config.debug):
                assert_(node < window, "gdn_mtp: accepted_nodes names a node that was not verified")
                ascends = (node < 0) | (node > highest_before(node))
                assert_(ascends, "gdn_mtp: accepted_nodes do not ascend, as a path from a root does")
            valid = (node >= 0) & (node < window)
            bit = select(valid, Int32(1) << ((length + node) & (WARP_LANES - 1)), Int32(0))
            live = live | cute.arch.warp_redux_sync(bit, "or")
            length = length + cute.arch.warp_redux_sync(select(valid, node + 1, Int32(0)), "max")
        return start, length, live

    @cute.jit
    def prefetch_pending(self, cache, state_indices, num_accepted, head, block_row, place):
        """One warp: bring to L2 what `accept` and `fetch_pending` will read, as far as it can be foreseen.

        Indices and cursors may still change: they are used where they are in range, and read again.
        """
        cfg = self.config
        slot = read_index(state_indices, place.request)
        if is_slot(slot, cache.live.shape[0]):
            start, length, window = self.load_window(cache, slot)
            prefetch_l2(cache.live.iterator + slot)
            if cutlass.const_expr(cfg.accept == "none"):
                window = Int32(0)
            if cutlass.const_expr(cfg.accept == "counts"):
                window = cutlass.min(window, read_l2(num_accepted.iterator + place.request, Int32))
            length = cutlass.min(length + cutlass.max(window, 0), cfg.capacity)
            if (place.lane < length) & (start >= 0) & (start < cfg.capacity):
                position = self.wrapped(start + place.lane)
                bulk_prefetch_l2(cache.keys[slot, position, head, None].iterator, cfg.key_bytes)
                update = cache.updates[slot, position, place.hv, None].iterator
                update = update + cute.assume(block_row, divby=MMA_ROWS)
                bulk_prefetch_l2(update, cfg.update_bytes)
                prefetch_l2(cache.gates[slot, position, None].iterator + place.hv)
                prefetch_l2(cache.k_scale[slot, position, None].iterator + head)

    @cute.jit
    def fetch_pending(self, cache, accepted, slot, head, block_row, shared, place):
        """Copy pending tokens to shared memory, rows of u from `block_row` on, this warp's share of them.

        accepted: what `accept` gave. The copies are counted on the ring's barrier. Returns the gate and the
        factor of k of the token that this lane has, for `stage_weights`.
        """
        cfg = self.config
        start, _, live = accepted
        lane = place.lane
        mbar = self.ring_barrier(shared)
        rank = cute.arch.popc(live & bits_below(lane))
        alive = (((live >> lane) & 1) == 1) & (rank < cfg.ring_rows)
        position = self.wrapped(start + lane)
        gate, k_scale = Float32(0.0), Float32(0.0)
        if place.warp == 0:
            if lane == 0:
                count = cutlass.min(cute.arch.popc(live), cfg.ring_rows)
                num_bytes = count * (cfg.key_bytes + cfg.update_bytes)
                cute.arch.mbarrier_arrive_and_expect_tx(mbar, num_bytes)
            if alive:
                gate = read_l2(cache.gates[slot, position, None].iterator + place.hv, Float32)
                k_scale = read_l2(cache.k_scale[slot, position, None].iterator + head, Float32)
        mine = cute.arch.vote_ballot_sync(alive & (rank % cfg.tactic.warps == place.warp))
        while mine != 0:  # the same in all lanes, so that copies need no loop over lanes each
            before = (mine & -mine) - 1
            mine = mine & (mine - 1)
            number, at = cute.arch.popc(live & before), self.wrapped(start + cute.arch.popc(before))
            key = cache.keys[slot, at, head, None].iterator
            to_key = shared.ring_keys[None, number].iterator
            update = cache.updates[slot, at, place.hv, None].iterator
            update = update + cute.assume(block_row, divby=MMA_ROWS)
            to_update = shared.ring_updates.iterator + cute.assume(cfg.update_offset(number), divby=4)
            with cute.arch.elect_one():
                bulk_load(to_key, key, cfg.key_bytes, mbar)
                bulk_load(to_update, update, cfg.update_bytes, mbar)
        return gate, k_scale

    @cute.jit
    def stage_weights(self, gate, k_scale, pending, shared, lane):
        """The first warp: write the weights of the pending tokens, zeros behind them, and their decay."""
        after = cute.arch.shuffle_sync_down(gate, 1)
        after = select(lane + 1 < WARP_LANES, after, Float32(0.0))
        for i in cutlass.range_constexpr(WARP_LANES.bit_length() - 1):
            further = cute.arch.shuffle_sync_down(after, 1 << i)
            after = select(lane + (1 << i) < WARP_LANES, after + further, after)
        rank = cute.arch.popc(pending.live & bits_below(lane))
        if (((pending.live >> lane) & 1) == 1) & (rank < pending.count):
            shared.weights[rank] = cute.math.exp(after) * k_scale
        if lane >= pending.count:
            shared.weights[lane] = Float32(0.0)
        if lane == 0:
            shared.weights[WARP_LANES] = cute.math.exp(gate + after)

    def ring_barrier(self, shared):
        """The barrier on which copies of pending tokens are counted, after those of the tiles."""
        return shared.mbars + self.config.tactic.warps * self.config.tactic.tiles_per_warp

    @cute.jit
    def init_ring_barrier(self, shared, tid):
        """Thread 0 makes the barrier ready, for the block past a barrier of its own."""
        if tid == 0:
            cute.arch.mbarrier_init(self.ring_barrier(shared), 1)
        cute.arch.mbarrier_init_fence()

    def pending(self, accepted, slot, head):
        """The pending tokens, of what `accept` gave."""
        start, length, live = accepted
        count = cutlass.min(cute.arch.popc(live), self.config.ring_rows)
        return Pending(slot, head, start, length, live, count)

    def pending_decay(self, shared):
        """D(end) of the value head, once `stage_weights` has written it."""
        return shared.weights[WARP_LANES]

    def wrapped(self, position):
        """The ring position that `position`, less than twice the capacity, stands for."""
        capacity = self.config.capacity
        return select(position >= capacity, position - capacity, position)

    def blocks_per_request(self):
        """Blocks that read a request's cursor."""
        blocks_x, blocks_y, _ = cute.arch.grid_dim()
        return blocks_x * blocks_y

    def count_reader(self, cache, slot):
        """One thread of a block, past a barrier: the block has read the cursor. Returns how many had before.

        No fence is needed, which would wait for all that the thread has under way: the barrier has performed
        the block's reads of the cursor, and nothing that was written is handed over with the count.
        """
        return increment(cache.cursor[slot, None].iterator + 3, self.blocks_per_request() - 1)

    @cute.jit
    def move_cursor(self, cache, reader, pending, folded, window):
        """The same thread, with what `count_reader` gave: the last reader moves the cursor."""
        if reader == self.blocks_per_request() - 1:
            start, length, live = pending.start, pending.length, pending.live
            if folded:
                start, length, live = self.wrapped(start + length), Int32(0), Int32(0)
            cursor = cache.cursor[pending.slot, None].iterator
            for i, value in enumerate((start, length, window)):
                write_l2(cursor + i, value)
            write_l2(cache.live.iterator + pending.slot, live)

    def rank(self, pending, p, x):
        """Number of token x of pending chunk p, clamped to the tokens that there are."""
        return cutlass.min(CHUNK_TOKENS * p + x, pending.count - 1)

    def key_pointer(self, pending, shared, p, x):
        """k of token x of pending chunk p, as given."""
        return shared.ring_keys[None, self.rank(pending, p, x)].iterator

    def load_updates(self, pending, shared, place, tile, p):
        """w_j u_j of pending chunk p as an accumulator, zero for tokens that do not exist."""
        cfg = self.config
        first = (place.warp * cfg.tactic.tiles_per_warp + tile) * MMA_ROWS + place.row_in_tile(0)
        weights = load_shared(shared.weights, CHUNK_TOKENS * p + 2 * place.t, 2)
        of_lane, last = cfg.update_offset(2 * place.t), cfg.update_offset(pending.count - 1)
        values = [None] * 4
        for e in range(2):
            at = cutlass.min(of_lane + cfg.update_offset(CHUNK_TOKENS * p + e), last) + first
            u = load_shared(shared.ring_updates, at, 2)
            values[e], values[2 + e] = (weights[e] * x for x in u)
        return values

    @cute.jit
    def store_advanced(self, matrix, pending, shared, place, tile):
        """Start storing a tile of the state, which is in its buffer, after all pending tokens, to `matrix`.

        matrix: [V, K].
        """
        if pending.count > 0:
            if cutlass.const_expr(self.config.bf16_tokens):
                self.advance_bf16(pending, shared, place, tile)
            else:
                self.advance(pending, shared, place, tile)
        cute.arch.fence_view_async_shared()
        cute.arch.sync_warp()
        self.store_rows(matrix, self.tile_row(place, tile), shared, place, tile)
        cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def advance(self, pending, shared, place, tile):
        """S <- D(end) S + sum_j w_j u_j k_j^T over the pending tokens, for a tile in its buffer."""
        s, decay = self.load_tile(shared, place, tile), self.pending_decay(shared)
        count = len(s[0])
        state = cute.make_rmem_tensor((2 * count,), Float32)
        for half in cutlass.range_constexpr(2):
            for x in cutlass.range_constexpr(count):
                state[half * count + x] = decay * s[half][x]
        chunks = (pending.count + CHUNK_TOKENS - 1) // CHUNK_TOKENS
        for p in cutlass.range(chunks, unroll=1):
            self.advance_by_chunk(state, pending, shared, place, tile, p)
        advanced = [[state[half * count + x] for x in range(count)] for half in range(2)]
        self.write_tile(advanced, shared, place, tile)

    def advance_by_chunk(self, state, pending, shared, place, tile, p):
        """state <- state + sum_j w_j u_j k_j^T over pending chunk p; state holds rows g, then rows g + 8.

        Product h of a run of four columns has columns h and h + 2 of each lane's run.
        """
        u = self.load_updates(pending, shared, place, tile, p)
        a_parts = parts(as_operand(u), False)
        keys = [self.key_pointer(pending, shared, p, 2 * place.t + e) for e in range(2)]
        count = self.config.K // 4
        for column, at in self.quads(place.g // 2):
            offset = cute.assume(column + 2 * (place.g % 2), divby=2)
            k = [load_values(key + offset, shared.ring_keys.element_type, 2) for key in keys]
            for h in range(2):
                places = [half * count + at + h + 2 * e for half in range(2) for e in range(2)]
                acc = mma_split([state[x] for x in places], a_parts, parts([k[0][h], k[1][h]], self.exact_io))
                for x, value in zip(places, acc, strict=True):
                    state[x] = value

    def advance_bf16(self, pending, shared, place, tile):
        """`advance` by bfloat16 keys, in products of two chunks.

        Product j of a run of columns has columns 2j and 2j + 1 of each lane's run.
        """
        decay, chunks = self.pending_decay(shared), self.config.pending_chunks
        dtype = shared.tiles.element_type
        words = 2 * dtype.width // 32  # of two columns of a row
        updates, keys = [], []
        for p in range(chunks):
            u = self.load_updates(pending, shared, place, tile, p)
            updates.append(zip(split_bf16(u[0], u[1]), split_bf16(u[2], u[3]), strict=True))
            keys += [self.key_pointer(pending, shared, p, 2 * place.t + e) for e in range(2)]
        if chunks % 2:
            updates.append([(Int32(0), Int32(0))] * BF16_PARTS)
        pairs = [[(*x, *y) for x, y in zip(*updates[p : p + 2], strict=True)] for p in range(0, chunks, 2)]
        for i, column in self.runs(place.g // 2):
            pointers = [self.vector_pointer(shared, place, tile, half, i) for half in range(2)]
            rows = [load_words(pointer) for pointer in pointers]
            k = [self.load_run(key + column) for key in keys]
            columns = []
            for j in range(len(k[0])):
                pair = range(words * j, words * (j + 1))
                acc = [decay * x for row in rows for word in pair for x in unpack(row[word], dtype)]
                b = [same_halves(k[2 * p][j], k[2 * p + 1][j], place.g % 2) for p in range(chunks)]
                b += [Int32(0)] * (chunks % 2)
                for p, a_parts in enumerate(pairs):
                    for a in a_parts:
                        acc = mma_bf16(acc, a, b[2 * p : 2 * p + 2])
                columns.append(acc)
            for half in range(2):
                values = [x for acc in columns for x in acc[2 * half : 2 * half + 2]]
                store_vector(pointers[half], values, dtype)


def highest_before(x):
    """The largest x of all earlier lanes, at least -1."""
    lane = cute.arch.lane_idx()
    highest = Int32(-1)
    for i in range(WARP_LANES - 1):
        highest = select(i < lane, cutlass.max(highest, cute.arch.shuffle_sync(x, i)), highest)
    return highest


def bits_below(n):
    """An int32 with the lowest n bits set, 0 <= n <= 32."""
    return select(n >= WARP_LANES, Int32(-1), (Int32(1) << (n & (WARP_LANES - 1))) - 1)

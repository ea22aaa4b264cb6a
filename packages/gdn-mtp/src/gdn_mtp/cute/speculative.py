"""Verify T tokens against a state and its pending tokens, which are folded into it only where that is due.

With the state S of the pool, the pending tokens' u_j and keys k_j, their weights w_j and their decay D(end),
as in `ring`, the state that meets the new tokens is S' = D(end) S + sum_j w_j u_j k_j^T. It is never formed:
    S' k_t = D(end) S k_t + sum_j w_j u_j (k_j.k_t)
so the state is read once and meets the new keys and queries alone, and the products of pending keys with new
ones are made while it is on its way; likewise those of a second chunk of tokens with the first. From there on
it is the chunk form of `kernel`, with D and L along the paths of a tree where tokens have parents. Where the
fold is due, the tile is read again from its buffer, advanced and stored after the outputs: u of new tokens is
that of the state before a bfloat16 pool rounds it.

Loads are started in the order in which they are waited for: what comes late delays what comes after it. First
the cursor, then the new tokens, the pending ones as soon as the cursor says which, the state last.

Grid: (V / rows per block * HV / H, H, B). Each block reads the request's cursor; the last one moves it.
Ring positions that are written are not read in the same launch: pending and new tokens fit the ring together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.testing import assert_
from cutlass.memory import SmemAllocator

from .chunks import LOWER, QUERY, as_operand
from .config import (
    CHUNK_TOKENS,
    GATE_STRIDE,
    MATRICES_PER_CHUNK,
    MATRIX_FLOATS,
    MMA_ROWS,
    PART_ROWS,
    WARP_LANES,
)
from .config_speculative import REQUEST_WORDS, RING_WEIGHTS
from .fragments import (
    NUMERIC,
    is_slot,
    mma_split,
    parts,
    read_l2,
    select,
    store_vector,
)
from .gates import BETA, K_SCALE, LOG_DECAY, PATH, Q_SCALE, load_gates, no_gates, stage_path_gates
from .prefetch import among_first, prefetch_tokens
from .ring import Cache, RingTiles
from .tiles import Place, allocate_slack, allocate_tokens, with_dynamic_rows


@dataclass(frozen=True)
class Tensors:
    """The call's tensors in global memory."""

    q: Any  # [B, T, H, K]
    k: Any  # [B, T, H, K]
    v: Any  # [B, T, HV, V]
    state: Any  # [pool, HV, V, K]
    output: Any  # [B, T, HV, V]


@dataclass(frozen=True)
class Shared:
    """A block's shared memory; k, q, matrices and gates as in `tiles.Shared`, absent without new tokens."""

    tiles: Any  # [K, (8, 2), tiles per warp, warps], the state's dtype
    weights: Any  # w of each pending token; at 32 their decay
    ring_keys: Any  # [K, tokens]: k of each pending token, as given
    ring_updates: Any  # float32, rows of u of each pending token at `SpeculativeConfig.update_offset`
    request: Any  # int32: what `RingTiles.share_request` found
    mbars: Any  # one per tile, warp-major, and that of the ring
    kq: Any = None
    matrices: Any = None  # `SpeculativeConfig.num_matrices` times [8, 8]
    gate: Any = None
    pairs: None = None


def allocate(cfg) -> Shared:
    """The shared memory of a block."""
    tactic = cfg.tactic
    smem = SmemAllocator()
    count, parts_per_tile = tactic.tiles_per_warp, MMA_ROWS // PART_ROWS
    tiles = cute.make_layout(
        (cfg.K, (PART_ROWS, parts_per_tile), count, tactic.warps),
        stride=(
            1, (cfg.K, cfg.part_stride), parts_per_tile * cfg.part_stride,
            count * parts_per_tile * cfg.part_stride,
        ),
    )  # fmt: skip

    def floats(size):
        return smem.allocate_tensor(Float32, cute.make_layout(size), 16)

    # Barriers, whose size is no multiple of 16 bytes, come last, so that there are no gaps.
    state_tiles = smem.allocate_tensor(NUMERIC[cfg.state_dtype], tiles, 128)
    tokens = {}
    if cfg.T:
        tokens = {
            "kq": allocate_tokens(cfg, smem),
            "matrices": floats(cfg.num_matrices * MATRIX_FLOATS),
            "gate": floats(cfg.T * GATE_STRIDE),
        }
    shared = Shared(
        tiles=state_tiles,
        weights=floats(RING_WEIGHTS),
        ring_keys=smem.allocate_tensor(
            NUMERIC[cfg.io_dtype], cute.make_layout((cfg.K, cfg.ring_rows), stride=(1, cfg.key_stride)), 16
        ),
        ring_updates=floats(cfg.updates_floats),
        request=smem.allocate_tensor(Int32, cute.make_layout(REQUEST_WORDS), 16),
        mbars=smem.allocate_array(Int64, tactic.warps * count + 1),
        **tokens,
    )
    allocate_slack(cfg, smem)
    return shared


class Verify(RingTiles):
    """The kernel of one `SpeculativeConfig` of mode "verify"; calling it (traced) launches."""

    @cute.jit
    def __call__(
        self, q, k, v, a, b, A_log, dt_bias, scale, state_pool, state_indices, keys, updates, gates, k_scale,
        cursor, live, num_accepted, accepted_nodes, num_tokens, parent_indices, fold_above, output, stream,
    ):  # fmt: skip
        cfg = self.config
        state = state_pool if cfg.many_warps else with_dynamic_rows(state_pool)
        self.kernel(
            q, k, v, a, b, A_log, dt_bias, scale, state, state_indices, keys, updates, gates, k_scale, cursor,
            live, num_accepted, accepted_nodes, num_tokens, parent_indices, fold_above, output,
        ).launch(
            grid=self.grid(v.shape[2], q.shape[2], v.shape[0]),
            block=(cfg.tactic.threads, 1, 1),
            stream=stream,
            min_blocks_per_mp=cfg.blocks_per_sm,
            preferred_smem_carveout=cfg.smem_carveout_percent,
            use_pdl=cfg.pdl,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self, q, k, v, a, b, A_log, dt_bias, scale, state, state_indices, keys, updates, gates, k_scale,
        cursor, live, num_accepted, accepted_nodes, num_tokens, parent_indices, fold_above, output,
    ):  # fmt: skip
        cfg = self.config
        v_block, head, hv, member, request = self.block_place()
        tid, _, _ = cute.arch.thread_idx()
        warp, lane = cute.arch.make_warp_uniform(tid // WARP_LANES), tid % WARP_LANES
        tensors, gate_tensors = Tensors(q, k, v, state, output), (a, b, A_log, dt_bias)
        cache = Cache(keys, updates, gates, k_scale, cursor, live)
        shared = allocate(cfg)
        block_row = v_block * cfg.tactic.rows
        row = block_row + warp * cfg.tactic.tiles_per_warp * MMA_ROWS
        expected = Int64(-1)
        self.init_ring_barrier(shared, tid)
        self.init_barriers(shared, warp, lane)
        if cutlass.const_expr(cfg.pdl):
            if among_first(cfg.blocks_per_sm):
                here = Place(request, hv, None, row, warp, lane)
                if warp == 0:
                    if cutlass.const_expr(cfg.one_reader):
                        expected = self.expected_slot(state_indices, request)
                    prefetch_tokens(cfg, (q, k), v, (a, b), (A_log, dt_bias), here, head)
                if warp == cfg.tactic.warps - 1:
                    self.prefetch_pending(cache, state_indices, num_accepted, head, block_row, here)
                if among_first(cfg.prefetching_blocks):
                    self.prefetch_state(state, state_indices, here)
            cute.arch.griddepcontrol_wait()
            self.launch_dependents("start")
        place = Place(request, hv, None, row, warp, lane)
        token = cutlass.min(lane, cfg.T - 1)
        if cutlass.const_expr(cfg.one_reader):
            if warp == 0:
                self.share_request(
                    cache, state_indices, expected, num_accepted, accepted_nodes, shared, place
                )
            early_gates = no_gates(gate_tensors)
            if warp == cfg.tactic.warps - 1:
                early_gates = load_gates(*gate_tensors, request, hv, token)
            early_tokens = self.load_tokens(tensors, place, head)
            early_values = self.load_values(tensors, place, 0)
            cute.arch.sync_threads()
            slot, found = self.shared_request(shared)
        else:
            early_tokens = early_values = early_gates = found = None
            slot = self.read_slot(state_indices, request, state.shape[0])
            cute.arch.sync_threads()
        if cutlass.const_expr(cfg.tensor_scale):
            scale = scale[0]
        if not is_slot(slot, state.shape[0]):
            self.zero_output(tensors, place)
        else:
            if cutlass.const_expr(cfg.one_reader):
                tokens, values, gate_inputs = early_tokens, early_values, early_gates
            else:
                ring = self.load_ring(cache, slot)
                numbers = self.load_accepted(num_accepted, accepted_nodes, place)
                gate_inputs = load_gates(*gate_tensors, request, hv, token)
                tokens = self.load_tokens(tensors, place, head)
                values = self.load_values(tensors, place, 0)
            parent = None
            if cutlass.const_expr(cfg.tree):
                parent = read_l2(parent_indices[request, None].iterator + token, Int32)
            count = cfg.T
            if cutlass.const_expr(cfg.variable_tokens):
                count = read_l2(num_tokens.iterator + request, Int32)
                if cutlass.const_expr(cfg.debug):
                    assert_((count >= 0) & (count <= cfg.T), "gdn_mtp: num_tokens is not between 0 and T")
                count = cutlass.min(cutlass.max(count, 0), cfg.T)
            if cutlass.const_expr(cfg.tree and cfg.debug):
                earlier = (lane >= count) | ((parent >= -1) & (parent < lane))
                assert_(earlier, "gdn_mtp: parent_indices names neither -1 nor an earlier token")
            accepted = found
            if cutlass.const_expr(not cfg.one_reader):
                accepted = self.accept(ring, numbers)
            pending = self.pending(accepted, slot, head)
            pending_gate, pending_scale = self.fetch_pending(
                cache, accepted, slot, head, block_row, shared, place
            )
            self.start_loads(state[slot, hv, None, None], shared, place)
            self.stage_tokens(tokens, scale, shared, place)
            log_decay = Float32(0.0)
            if warp == cfg.tactic.warps - 1:
                log_decay = stage_path_gates(gate_inputs, parent, shared.gate, lane, cfg.T)
            cute.arch.sync_threads()
            window = self.wrapped(pending.start + pending.length)
            fold = pending.length > fold_above
            if v_block == 0:
                if (warp == cfg.tactic.warps - 1) & (lane < count):
                    cache.gates[slot, self.wrapped(window + lane), hv] = log_decay
                if member == 0:
                    self.record_keys(tokens, cache, pending, window, count, shared, place)
            reader = Int32(0)  # counted no earlier: the compiler waits for it where it waits for gates
            if (warp == cfg.tactic.warps - 1) & (lane == 0):
                reader = self.count_reader(cache, slot)
            self.make_matrices(pending, count, shared, place)
            if warp == 0:
                self.stage_weights(pending_gate, pending_scale, pending, shared, lane)
            for tile in cutlass.range_constexpr(cfg.tactic.tiles_per_warp):
                if cutlass.const_expr(tile > 0):
                    if cutlass.const_expr(cfg.renews_lane):
                        place = replace(place, lane=cute.arch.lane_idx())
                    values = self.load_values(tensors, place, tile)
                self.process_tile(tensors, cache, values, pending, window, count, fold, shared, place, tile)
            if (warp == cfg.tactic.warps - 1) & (lane == 0):
                self.move_cursor(cache, reader, pending, fold, Int32(count))
            self.launch_dependents("late")
            cute.arch.cp_async_bulk_wait_group(0, read=True)

    # The ring

    @cute.jit
    def record_keys(self, tokens, cache, pending, window, count, shared, place):
        """Write k of this warp's tokens to the ring, as it was given, and its factor."""
        cfg = self.config
        for i in cutlass.range_constexpr(len(tokens)):
            t = place.warp + i * cfg.tactic.warps
            if t < count:
                row = cache.keys[pending.slot, self.wrapped(window + t), pending.head, None]
                k, _ = tokens[i]
                if place.lane == 0:
                    factor = self.gate(shared, t, K_SCALE)
                    cache.k_scale[pending.slot, self.wrapped(window + t), pending.head] = factor
                for j in cutlass.range_constexpr(len(k)):
                    row[place.lane + WARP_LANES * j] = k[j]

    @cute.jit
    def record_updates(self, u, cache, pending, window, count, place, row, c):
        """Write u, in accumulator layout, of the tokens of chunk c that exist."""
        t0, n = self.config.chunks[c]
        first = 2 * place.t
        updates = cache.updates[pending.slot, None, place.hv, None]
        for e in cutlass.range_constexpr(2):
            if (first + e < n) & (t0 + first + e < count):
                position = self.wrapped(window + t0 + first + e)
                rows = cute.assume(row + place.row_in_tile(0), divby=2)
                store_vector(updates[position, None].iterator + rows, [u[e], u[2 + e]], Float32)

    # Matrices: products of keys and queries, no state

    @cute.jit
    def make_matrices(self, pending, count, shared, place):
        """One warp makes those of the new tokens, the others begin with those of the pending.

        The first warp has the weights of the pending tokens to stage, so the new ones are the second's.
        """
        cfg = self.config
        if place.warp == min(1, cfg.tactic.warps - 1):
            for c in cutlass.range_constexpr(len(cfg.chunks)):
                self.token_products(shared, place, count, c, c)
                if cutlass.const_expr(c > 0):
                    self.token_products(shared, place, count, c, 0)
            cute.arch.sync_warp()
            for c in cutlass.range_constexpr(len(cfg.chunks)):
                self.invert(shared, place, c)
        cute.arch.mbarrier_wait(self.ring_barrier(shared), 0)
        warps = cfg.tactic.warps
        for i in cutlass.range_constexpr(-(-cfg.pending_chunks // warps)):
            p = ((place.warp + warps - 2) & (warps - 1)) + i * warps
            if (p < cfg.pending_chunks) & (CHUNK_TOKENS * p < pending.count):
                for c in cutlass.range_constexpr(len(cfg.chunks)):
                    self.pending_products(pending, shared, place, p, c)

    @cute.jit
    def store_products(self, kk, qk, shared, place, c, matrix):
        """Write rows g of two [8, 8] matrices, columns 2t and 2t + 1; packed, of one: k's rows, then q's."""
        at = matrix * MATRIX_FLOATS + CHUNK_TOKENS * place.g + 2 * place.t
        if cutlass.const_expr(self.packed(c)):
            half = CHUNK_TOKENS // 2
            if place.g < half:
                for e in cutlass.range_constexpr(2):
                    shared.matrices[at + e] = kk[e]
                    shared.matrices[at + CHUNK_TOKENS * half + e] = qk[e]
        else:
            for e in cutlass.range_constexpr(2):
                shared.matrices[at + e] = kk[e]
                shared.matrices[at + MATRIX_FLOATS + e] = qk[e]

    def pending_products(self, pending, shared, place, p, c):
        """Write k_t.k_j and q_t.k_j of new chunk c and pending chunk p, unscaled."""
        key = self.key_pointer(pending, shared, p, place.g)
        products = self.key_products(key, shared.ring_keys.element_type, shared, place, c)
        matrix = self.config.pending_matrix(p, c)
        self.store_products(products[:2], products[2:], shared, place, c, matrix)

    def token_products(self, shared, place, count, c, d):
        """Write L and QUERY[t, j] = D(t, j) scale q_t.k_j of tokens t of chunk c and j of chunk d.

        They are zero unless j is on the path to t; of a chunk with an earlier one, L is negated.
        """
        cfg = self.config
        (t0, n), (j0, m) = cfg.chunks[c], cfg.chunks[d]
        g, t = place.g, place.t
        key = self.token_pointer(shared, self.token_offset(False, d, cutlass.min(g, m - 1)))
        products = self.key_products(key, shared.kq.element_type, shared, place, c)
        row = t0 + cutlass.min(g, n - 1)
        beta, k_scale, q_scale, log_decay = (
            self.gate(shared, row, x) for x in (BETA, K_SCALE, Q_SCALE, LOG_DECAY)
        )
        lower, query = [], []
        for e in range(2):
            j = 2 * t + e
            other = j0 + cutlass.min(j, m - 1)
            decay = cute.math.exp(log_decay - self.gate(shared, other, LOG_DECAY))
            decay = decay * self.gate(shared, other, K_SCALE)
            on_path = (t0 + g < count) & (g < n) & (j0 + j <= t0 + g)
            if cfg.tree:
                path = self.gate(shared, row, PATH).bitcast(Int32)
                on_path = on_path & (((path >> (j0 + j)) & 1) == 1)
            kk, qk = products[e] * beta * k_scale * decay, products[2 + e] * q_scale * decay
            lower.append(select(on_path & (j0 + j < t0 + g), kk, Float32(0.0)))
            query.append(select(on_path, qk, Float32(0.0)))
        if c != d:
            lower = [-x for x in lower]
            self.store_products(lower, query, shared, place, c, cfg.cross_matrix)
            return
        for which, values in ((LOWER, lower), (QUERY, query)):
            at = (MATRICES_PER_CHUNK * c + which) * MATRIX_FLOATS + CHUNK_TOKENS * g + 2 * t
            for e in range(2):
                shared.matrices[at + e] = values[e]

    # Tiles

    def accumulators(self, c):
        """Number of accumulators that the products of chunk c with k and q take."""
        return 1 if self.packed(c) else 2

    @cute.jit
    def process_tile(self, tensors, cache, v, pending, window, count, fold, shared, place, tile):
        """All tokens of the call on one tile. The first tile also waits for the matrices."""
        cfg = self.config
        row = self.tile_row(place, tile)
        cute.arch.mbarrier_wait(shared.mbars + place.warp * cfg.tactic.tiles_per_warp + tile, 0)
        operand = self.load_operand(shared, place, tile)
        chunks = range(len(cfg.chunks))
        state_products = [self.operand_products(operand, shared, place, c) for c in chunks]
        self.launch_dependents("early")
        if cutlass.const_expr(tile == 0):
            cute.arch.sync_threads()
        corrections = [
            [cute.make_rmem_tensor((4,), Float32) for _ in range(self.accumulators(c))] for c in chunks
        ]
        self.pending_corrections(corrections, pending, shared, place, tile)
        decay = self.pending_decay(shared)
        u = None
        for c in cutlass.range_constexpr(len(cfg.chunks)):
            products = [
                [decay * x + y[i] for i, x in enumerate(product)]
                for product, y in zip(state_products[c], corrections[c], strict=True)
            ]
            weighed = self.weigh_existing(products, v[c], count, shared, place, c)
            if cutlass.const_expr(c > 0):
                weighed = self.add_products(weighed, u, shared, place, cfg.cross_matrix)
            u, o = self.apply(weighed, shared, place, c)
            self.store_output(tensors, o, place, row, c)
            self.record_updates(u, cache, pending, window, count, place, row, c)
        if fold:  # read again, so that no registers are held for it where it is not due
            cute.arch.sync_warp()
            matrix = tensors.state[pending.slot, place.hv, None, None]
            self.store_advanced(matrix, pending, shared, place, tile)

    @cute.jit
    def pending_corrections(self, corrections, pending, shared, place, tile):
        """sum_j w_j u_j (k_j.k_t) and likewise with q_t over the pending tokens, for each chunk."""
        cfg = self.config
        for c in cutlass.range_constexpr(len(cfg.chunks)):
            for x in cutlass.range_constexpr(self.accumulators(c)):
                corrections[c][x].fill(0.0)
        for p in cutlass.range_constexpr(cfg.pending_chunks):
            if CHUNK_TOKENS * p < pending.count:
                for c in cutlass.range_constexpr(len(cfg.chunks)):
                    before = [[acc[i] for i in range(4)] for acc in corrections[c]]
                    u = self.load_updates(pending, shared, place, tile, p)
                    after = self.add_products(before, u, shared, place, cfg.pending_matrix(p, c))
                    for x in cutlass.range_constexpr(self.accumulators(c)):
                        fill(corrections[c][x], after[x])

    def add_products(self, accumulators, u, shared, place, matrix):
        """Each accumulator plus u M, with M the matrices from number `matrix` on."""
        a_parts = parts(as_operand(u), False)
        return [
            mma_split(acc, a_parts, self.matrix_parts(shared, place, matrix + x))
            for x, acc in enumerate(accumulators)
        ]

    def weigh_existing(self, products, v, count, shared, place, c):
        """`weigh`, with zeros for tokens that the request does not have."""
        weighed = self.weigh(products, v, shared, place, c)
        if not self.config.variable_tokens:
            return weighed
        tokens = self.lane_tokens(place, c)
        return [[select(tokens[x % 2] < count, acc[x], Float32(0.0)) for x in range(4)] for acc in weighed]


def fill(tensor, values):
    """Write a list of registers to a register tensor."""
    for i, value in enumerate(values):
        tensor[i] = value

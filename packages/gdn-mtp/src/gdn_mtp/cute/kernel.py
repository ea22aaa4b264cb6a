"""Gated delta rule over T tokens in one pass over the state, V-major, on tensor cores; SM90 and newer.

With the state S [V, K] of a value head, decays d_t = exp(g_t), D(t, j) = d_{j+1} ... d_t and D(t) = D(t, -1),
a chunk of tokens obeys
    w_t = beta_t (v_t - D(t) S k_t)        u = (I + L)^-1 w,    L[t, j] = beta_t D(t, j) k_t.k_j  for j < t
    o_t = scale (D(t) S q_t + sum_{j <= t} D(t, j) q_t.k_j u_j)
    S'  = D(end) S + sum_j D(end, j) u_j k_j^T
so the state meets the keys and queries of all tokens in two small matrix products. (Chunk form of the delta
rule: Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", 2024.)

Products are m16n8k8 tf32 with float32 operands split into two tf32 parts, which keeps float32 accuracy; those
of keys and queries with each other and with a state that is read are m16n8k16 bf16 where all are bfloat16.
Every warp owns tiles of 16 rows of the state: bulk copies bring them to shared memory and back. Lane (g, t) =
(lane / 4, lane % 4) holds two rows in registers, of each every fourth 16-byte vector from t on. They are rows
g and g + 8 of a product; which of the tile's they are, `Place.row_in_tile` says.
Grid: (V / rows per block * HV / H, H, B); a block whose request is padding writes zeros to its output.
A non-finite value in a request's inputs may reach all of that request's outputs, earlier tokens included.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int64
from cutlass.memory import SmemAllocator

from .chunks import LOWER, QUERY, TokenChunks, as_operand
from .config import (
    CHUNK_TOKENS,
    GATE_STRIDE,
    MATRICES_PER_CHUNK,
    MATRIX_FLOATS,
    MMA_ROWS,
    PART_ROWS,
    WARP_LANES,
)
from .fragments import (
    NUMERIC,
    load_shared,
    load_values,
    mma_split,
    opaque,
    parts,
    read_index,
    select,
)
from .gates import (
    BETA,
    CHUNK_DECAY,
    DECAY,
    K_SCALE,
    LOG_DECAY,
    Q_SCALE,
    QK,
    load_gates,
    stage_gates,
)
from .prefetch import out_of_the_way, prefetch_tokens
from .tiles import Place, Shared, allocate_slack, allocate_tokens, with_dynamic_rows


@dataclass(frozen=True)
class Tensors:
    """The call's tensors in global memory, shapes as in `gdn_mtp.gated_delta_rule_mtp`; None where absent."""

    q: Any  # [B, T, H, K]
    k: Any  # [B, T, H, K]
    v: Any  # [B, T, HV, V]
    state: Any  # [pool, HV, V, K]
    intermediate: Any  # [>= B, >= T, HV, V, K]
    scatter: Any  # [B, T]
    output: Any  # [B, T, HV, V]


class GatedDeltaRule(TokenChunks):
    """The kernel of one `KernelConfig`; calling it (traced) launches."""

    @cute.jit
    def __call__(
        self, q, k, v, a, b, A_log, dt_bias, scale, state, initial_state_indices, output_state_indices,
        intermediate_states_buffer, ssm_state_indices, output, stream,
    ):  # fmt: skip
        """Launch the kernel on `stream`.

        a, b: [B, T, HV]; A_log, dt_bias: [HV] float32, or dt_bias in its own dtype; scale: a float32, or [1];
        initial_state_indices, output_state_indices: [B] or None; others as in `Tensors`.
        """
        cfg = self.config
        self.kernel(
            q, k, v, a, b, A_log, dt_bias, scale, with_dynamic_rows(state), initial_state_indices,
            output_state_indices, with_dynamic_rows(intermediate_states_buffer), ssm_state_indices, output,
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
        self, q, k, v, a, b, A_log, dt_bias, scale, state, state_indices, write_indices,
        intermediate_states, ssm_state_indices, output,
    ):  # fmt: skip
        cfg = self.config
        v_block, head, hv, _, request = self.block_place()
        tid, _, _ = cute.arch.thread_idx()
        warp, lane = cute.arch.make_warp_uniform(tid // WARP_LANES), tid % WARP_LANES
        tensors = Tensors(q, k, v, state, intermediate_states, ssm_state_indices, output)
        shared = self.allocate()
        row = (v_block * cfg.tactic.warps + warp) * cfg.tactic.tiles_per_warp * MMA_ROWS
        self.init_barriers(shared, warp, lane)
        if cutlass.const_expr(cfg.pdl):
            here = Place(request, hv, None, row, warp, lane)
            if warp == 0:
                prefetch_tokens(cfg, (q, k), v, (a, b), (A_log, dt_bias), here, head)
            if cutlass.const_expr(cfg.prefetch) and out_of_the_way(cfg, cfg.tactic.ahead):
                self.prefetch_state(tensors.state, state_indices, here)
            cute.arch.griddepcontrol_wait()
            self.launch_dependents("start")
        slot = Int64(request)
        if cutlass.const_expr(state_indices is not None):
            slot = read_index(state_indices, request)
        write_slot = slot
        if cutlass.const_expr(write_indices is not None):
            write_slot = read_index(write_indices, request)
        place = Place(request, hv, write_slot, row, warp, lane)
        values = [self.load_values(tensors, place, tile) for tile in range(cfg.tactic.tiles_per_warp)]
        gates = load_gates(a, b, A_log, dt_bias, request, hv, cutlass.min(lane, cfg.T - 1))
        if cutlass.const_expr(cfg.tensor_scale):
            scale = scale[0]
        tokens = self.load_tokens(tensors, place, head)
        if slot < 0:
            self.zero_output(tensors, place)
        else:
            self.start_loads(state[slot, hv, None, None], shared, place)
            self.stage_tokens(tokens, scale, shared, place)
            for group in cutlass.range_constexpr(1, len(cfg.token_groups)):
                more = self.load_tokens(tensors, place, head, group)
                self.stage_tokens(more, scale, shared, place, group)
            if warp == cfg.tactic.warps - 1:
                stage_gates(gates, shared.gate, lane, cfg.T)
            cute.arch.sync_threads()
            if cutlass.const_expr(cfg.T == 1):
                for tile in cutlass.range_constexpr(cfg.tactic.tiles_per_warp):
                    self.single_token(tensors, values[tile][0], shared, place, tile)
            else:
                if warp == 0:
                    for c in cutlass.range_constexpr(len(cfg.chunks)):
                        self.chunk_matrices(shared, place, c)
                for tile in cutlass.range_constexpr(cfg.tactic.tiles_per_warp):
                    self.process_tile(tensors, values[tile], shared, place, tile)
            self.launch_dependents("late")
            cute.arch.cp_async_bulk_wait_group(0, read=True)

    def allocate(self) -> Shared:
        cfg = self.config
        tactic = cfg.tactic
        smem = SmemAllocator()
        parts, buffers = MMA_ROWS // PART_ROWS, cfg.buffers_per_warp
        tiles = cute.make_layout(
            (cfg.K, (PART_ROWS, parts), buffers, tactic.warps),
            stride=(1, (cfg.K, cfg.part_stride), parts * cfg.part_stride, buffers * parts * cfg.part_stride),
        )
        matrices = len(cfg.chunks) * MATRICES_PER_CHUNK * MATRIX_FLOATS

        def floats(size):
            return smem.allocate_tensor(Float32, cute.make_layout(size), 16)

        # Barriers, whose size is no multiple of 16 bytes, come last, so that there are no gaps.
        shared = Shared(
            tiles=smem.allocate_tensor(NUMERIC[cfg.state_dtype], tiles, 128),
            kq=allocate_tokens(cfg, smem),
            pairs=floats(cfg.pairs_floats) if cfg.pairs_floats else None,
            matrices=floats(matrices),
            gate=floats(cfg.T * GATE_STRIDE),
            mbars=smem.allocate_array(Int64, tactic.warps * tactic.tiles_per_warp),
        )
        allocate_slack(cfg, smem)
        return shared

    # Global memory

    @cute.jit
    def store_slot(self, tensors, slot, row, shared, place, buffer):
        """`store_rows` to a pool slot; a negative slot is skipped."""
        if slot >= 0:
            self.store_rows(tensors.state[slot, place.hv, None, None], row, shared, place, buffer)

    @cute.jit
    def store_token(self, tensors, t, row, shared, place, buffer):
        """Start every store of the state after token t (static) that the call asks for."""
        cfg = self.config
        if cutlass.const_expr(cfg.intermediate == "buffer"):
            matrix = tensors.intermediate[place.request, t, place.hv, None, None]
            self.store_rows(matrix, row, shared, place, buffer)
        if cutlass.const_expr(cfg.intermediate == "scatter"):
            self.store_slot(tensors, Int64(tensors.scatter[place.request, t]), row, shared, place, buffer)
        elif cutlass.const_expr(cfg.update_state and t + 1 == cfg.T):
            self.store_slot(tensors, place.write_slot, row, shared, place, buffer)
        cute.arch.cp_async_bulk_commit_group()

    # One token

    @cute.jit
    def single_token(self, tensors, v, shared, place, tile):
        """The only token of the call on one tile, with plain arithmetic: every lane of a row has its sums."""
        cfg = self.config
        row = self.tile_row(place, tile)
        rows = [row + place.row_in_tile(half) for half in range(2)]
        cute.arch.mbarrier_wait(shared.mbars + place.warp * cfg.tactic.tiles_per_warp + tile, 0)
        s = self.load_tile(shared, place, tile)
        self.launch_dependents("early")
        p, r = (self.row_sums(s, shared, place, is_q) for is_q in (False, True))
        beta, decay, k_scale, q_scale, qk = (
            self.gate(shared, 0, x) for x in (BETA, DECAY, K_SCALE, Q_SCALE, QK)
        )
        u = [beta * (v[2 * half].to(Float32) - decay * k_scale * p[half]) for half in range(2)]
        if place.t == 0:
            for half in cutlass.range_constexpr(2):
                o = q_scale * (decay * r[half] + qk * k_scale * u[half])
                tensors.output[place.request, 0, place.hv, rows[half]] = o.to(tensors.output.element_type)
        if cutlass.const_expr(cfg.update_state or cfg.stores_every_state):
            self.advance(s, [x * k_scale for x in u], shared, place, decay, 0, 0)
            self.stage_tile(s, shared, place, tile, None)
            self.store_token(tensors, 0, row, shared, place, tile)

    def row_sums(self, s, shared, place, is_q):
        """S k (or S q) of token 0 for rows g and g + 8."""
        total = [Float32(0.0), Float32(0.0)]
        for column, at in self.quads(place.t):
            token = self.token_pointer(shared, self.token_offset(is_q, 0, 0))
            x = load_values(token + cute.assume(column, divby=4), token.value_type, 4)
            for e in range(4):
                total = [total[half] + s[half][at + e] * x[e] for half in range(2)]
        for step in (1, 2):
            total = [x + cute.arch.shuffle_sync_bfly(x, step) for x in total]
        return total

    # Chunks of tokens

    @cute.jit
    def chunk_matrices(self, shared, place, c):
        """One warp: from the products k.k and q.k of chunk c, the matrices that turn w into u and o."""
        base = MATRICES_PER_CHUNK * c * MATRIX_FLOATS
        self.pair_products(shared, place, c, base + LOWER * MATRIX_FLOATS, base + QUERY * MATRIX_FLOATS)
        cute.arch.sync_warp()
        self.invert(shared, place, c)

    def pair_products(self, shared, place, c, lower, query):
        """Write L and QUERY[t, j] = D(t, j) scale q_t.k_j (j <= t) of chunk c, zero elsewhere."""
        cfg = self.config
        t0, n = cfg.chunks[c]
        g, t = place.g, place.t
        mine = cutlass.min(g, n - 1)
        key = self.token_pointer(shared, self.token_offset(False, c, mine))
        products = self.key_products(key, key.value_type, shared, place, c)
        beta, k_scale, q_scale = (self.gate(shared, t0 + mine, x) for x in (BETA, K_SCALE, Q_SCALE))
        for e in range(2):
            j = 2 * t + e
            other = t0 + cutlass.min(j, n - 1)
            decay = cute.math.exp(
                self.gate(shared, t0 + mine, LOG_DECAY) - self.gate(shared, other, LOG_DECAY)
            )
            decay = decay * self.gate(shared, other, K_SCALE)
            at = CHUNK_TOKENS * g + j
            kk, qk = products[e] * beta * k_scale * decay, products[2 + e] * q_scale * decay
            shared.matrices[lower + at] = select((j < g) & (g < n), kk, Float32(0.0))
            shared.matrices[query + at] = select((j <= g) & (g < n), qk, Float32(0.0))

    @cute.jit
    def process_tile(self, tensors, v, shared, place, tile):
        """All tokens of the call on one tile. The first tile also waits for the chunk matrices."""
        cfg = self.config
        cute.arch.mbarrier_wait(shared.mbars + place.warp * cfg.tactic.tiles_per_warp + tile, 0)
        operand = self.load_operand(shared, place, tile)
        s = None if cfg.bf16_products else operand
        self.launch_dependents("early")
        for c in cutlass.range_constexpr(len(cfg.chunks)):
            place, row = self.tile_place(place, tile)
            if cutlass.const_expr(c >= cfg.early_chunks):
                v = [*v, self.load_v(tensors, place, row, c)]
            if cutlass.const_expr(c == 0):
                products = self.operand_products(operand, shared, place, c)
            else:
                products = self.state_products(s, shared, place, c, False)
            if cutlass.const_expr(tile == 0 and c == 0):
                cute.arch.sync_threads()
            u, o = self.solve(products, v[c], shared, place, c)
            self.store_output(tensors, o, place, row, c)
            if cutlass.const_expr(cfg.stores_every_state):
                if cutlass.const_expr(s is None):
                    s = self.load_tile(shared, place, tile)
                for j in cutlass.range_constexpr(cfg.chunks[c][1]):
                    place, row = self.tile_place(place, tile)
                    self.store_step(tensors, s, u, shared, place, tile, c, j)
            elif cutlass.const_expr(cfg.update_state or c + 1 < len(cfg.chunks)):
                if cutlass.const_expr(c == 0 and (s is None or len(cfg.chunks) == 1)):
                    # Read again: until here no registers hold it.
                    cute.arch.sync_warp()
                    s = self.load_tile(shared, place, tile)
                self.advance_chunk(s, u, shared, place, c)
        if cutlass.const_expr(cfg.update_state and not cfg.stores_every_state):
            self.stage_tile(s, shared, place, tile, None)
            self.store_token(tensors, cfg.T - 1, row, shared, place, tile)

    def tile_place(self, place, tile):
        """(where the warp works, first row of its tile); see `KernelConfig.saves_registers`."""
        if self.config.saves_registers:
            request, hv, row = (opaque(x) for x in (place.request, place.hv, place.row))
            place = replace(place, request=request, hv=hv, row=row, lane=cute.arch.lane_idx())
        return place, self.tile_row(place, tile)

    def store_step(self, tensors, s, u, shared, place, tile, c, j):
        """Advance s past token j of chunk c and store it; stores alternate between two buffers."""
        t = self.config.chunks[c][0] + j
        self.advance(
            s, self.token_update(u, shared, place, t, j), shared, place, self.gate(shared, t, DECAY), c, j
        )
        stored = tile * self.config.T + t
        buffer = tile if stored % 2 == 0 else self.config.tactic.tiles_per_warp
        self.stage_tile(s, shared, place, buffer, 1 if stored > 0 else None)
        self.store_token(tensors, t, self.tile_row(place, tile), shared, place, buffer)

    def token_update(self, u, shared, place, t, j):
        """u_j for rows g and g + 8 times the factor of k_j, from the lane of the row that has it."""
        source = (place.lane & ~3) + j // 2
        factor = self.gate(shared, t, K_SCALE)
        return [cute.arch.shuffle_sync(u[2 * half + j % 2], source) * factor for half in range(2)]

    def advance(self, s, u, shared, place, decay, c, j):
        """S <- decay S + u k_j^T for token j of chunk c, in place."""
        for column, at in self.quads(place.t):
            token = self.token_pointer(shared, self.token_offset(False, c, j))
            k = load_values(token + cute.assume(column, divby=4), token.value_type, 4)
            for half in range(2):
                for e in range(4):
                    s[half][at + e] = decay * s[half][at + e] + u[half] * k[e]

    def advance_chunk(self, s, u, shared, place, c):
        """S <- D(end) S + sum_j D(end, j) u_j k_j^T over chunk c, in place."""
        t0, n = self.config.chunks[c]
        g, t = place.g, place.t
        end = t0 + n - 1
        decay = self.gate(shared, end, CHUNK_DECAY)
        weights = [
            cute.math.exp(self.gate(shared, end, LOG_DECAY) - self.gate(shared, x, LOG_DECAY))
            * self.gate(shared, x, K_SCALE)
            for x in self.lane_tokens(place, c)
        ]
        if self.packed(c):
            u = [select(t < 2, x, Float32(0.0)) for x in u]
        a_parts = parts(as_operand([u[x] * weights[x % 2] for x in range(4)]), False)
        pair = (t0 // 2 + cutlass.min(t, (n - 1) // 2)) * self.config.pairs_stride
        for column, at in self.quads(g // 2):
            k = load_shared(shared.pairs, pair + (2 * column + 4 * (g % 2)), 4)
            for h in (0, 2):
                places = [(half, at + h + e) for half in range(2) for e in range(2)]
                acc = [decay * s[half][x] for half, x in places]
                acc = mma_split(acc, a_parts, parts(k[h : h + 2], self.exact_io))
                for (half, x), value in zip(places, acc, strict=True):
                    s[half][x] = value

"""Fold the pending tokens of a speculative cache into the states of the pool, or into states elsewhere.

The maths is in `ring`. Grid: (V / rows per block * HV / H, H, B). A request whose slot is padding leaves the
pool as it is, and is given zeros elsewhere.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from .config import MMA_ROWS, WARP_LANES
from .fragments import is_slot
from .ring import Cache, RingTiles
from .speculative import allocate
from .tiles import Place, with_dynamic_rows


class Fold(RingTiles):
    """The kernel of a `SpeculativeConfig` of mode "commit" or "materialize"; calling it (traced) launches."""

    @cute.jit
    def __call__(
        self, state_pool, state_indices, keys, updates, gates, k_scale, cursor, live, num_accepted,
        accepted_nodes, states, stream,
    ):  # fmt: skip
        cfg = self.config
        state, states = with_dynamic_rows(state_pool), with_dynamic_rows(states)
        self.kernel(
            state, state_indices, keys, updates, gates, k_scale, cursor, live, num_accepted, accepted_nodes,
            states,
        ).launch(
            grid=self.grid(state.shape[1], keys.shape[2], state_indices.shape[0]),
            block=(cfg.tactic.threads, 1, 1),
            stream=stream,
            min_blocks_per_mp=cfg.blocks_per_sm,
            preferred_smem_carveout=cfg.smem_carveout_percent,
            use_pdl=cfg.pdl,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self, state, state_indices, keys, updates, gates, k_scale, cursor, live, num_accepted, accepted_nodes,
        states,
    ):  # fmt: skip
        cfg = self.config
        v_block, head, hv, _, request = self.block_place()
        tid, _, _ = cute.arch.thread_idx()
        warp, lane = cute.arch.make_warp_uniform(tid // WARP_LANES), tid % WARP_LANES
        cache = Cache(keys, updates, gates, k_scale, cursor, live)
        shared = allocate(cfg)
        block_row = v_block * cfg.tactic.rows
        row = block_row + warp * cfg.tactic.tiles_per_warp * MMA_ROWS
        if cutlass.const_expr(cfg.pdl):
            cute.arch.griddepcontrol_wait()
            self.launch_dependents("start")
        slot = self.read_slot(state_indices, request, state.shape[0])
        self.init_ring_barrier(shared, tid)  # while the slot is on its way
        cute.arch.sync_threads()
        self.init_barriers(shared, warp, lane)
        place = Place(request, hv, slot, row, warp, lane)
        if not is_slot(slot, state.shape[0]):
            if cutlass.const_expr(cfg.mode == "materialize"):
                self.store_zeros(states, shared, place)
        else:
            if cutlass.const_expr(cfg.mode == "materialize"):
                self.start_loads(state[slot, hv, None, None], shared, place)
            ring = self.load_ring(cache, slot)
            accepted = self.accept(ring, self.load_accepted(num_accepted, accepted_nodes, place))
            pending = self.pending(accepted, slot, head)
            pending_gate, pending_scale = self.fetch_pending(
                cache, accepted, slot, head, block_row, shared, place
            )
            if warp == 0:
                self.stage_weights(pending_gate, pending_scale, pending, shared, lane)
            cute.arch.sync_threads()
            cute.arch.mbarrier_wait(self.ring_barrier(shared), 0)
            if cutlass.const_expr(cfg.mode == "materialize"):
                self.fold(states[request, hv, None, None], pending, shared, place)
            else:
                if tid == 0:
                    self.move_cursor(cache, self.count_reader(cache, slot), pending, True, Int32(0))
                if pending.count > 0:
                    self.start_loads(state[slot, hv, None, None], shared, place)
                    self.fold(state[slot, hv, None, None], pending, shared, place)
        self.launch_dependents("late")
        cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def fold(self, target, pending, shared, place):
        """Store the folded tiles of this warp, which are being loaded, to `target` [V, K]."""
        cfg = self.config
        for tile in cutlass.range_constexpr(cfg.tactic.tiles_per_warp):
            cute.arch.mbarrier_wait(shared.mbars + place.warp * cfg.tactic.tiles_per_warp + tile, 0)
            self.store_advanced(target, pending, shared, place, tile)

    @cute.jit
    def store_zeros(self, states, shared, place):
        """Store zeros to the request's rows of this warp."""
        cfg = self.config
        columns = cfg.K // 4
        zeros = [[Float32(0.0)] * columns for _ in range(2)]
        for tile in cutlass.range_constexpr(cfg.tactic.tiles_per_warp):
            self.stage_tile(zeros, shared, place, tile, None)
            target = states[place.request, place.hv, None, None]
            self.store_rows(target, self.tile_row(place, tile), shared, place, tile)
            cute.arch.cp_async_bulk_commit_group()

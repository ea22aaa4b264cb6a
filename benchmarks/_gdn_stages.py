"""gdn-mtp's kernels with stages left out, whose results are wrong, and an empty kernel: for timing alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cutlass
import cutlass.cute as cute
from cute_kernels import CuteFunction
from cutlass import Float32, Int64
from cutlass.cute.runtime import make_fake_stream
from gdn_mtp.cute.compile import FUNCTION
from gdn_mtp.cute.config import MMA_ROWS, WARP_LANES, KernelConfig
from gdn_mtp.cute.config_speculative import SpeculativeConfig
from gdn_mtp.cute.fragments import read_index
from gdn_mtp.cute.kernel import GatedDeltaRule, Tensors
from gdn_mtp.cute.prefetch import among_first, out_of_the_way
from gdn_mtp.cute.speculative import Verify, allocate
from gdn_mtp.cute.tiles import Place
from gdn_mtp.cute.trace import arguments, rows

# Of a call, kernels that move states alone, by the stage left out: through registers or not, by index or not.
STATES_ALONE = {"tokens": (True, True), "registers": (False, True), "index": (False, False)}
STEP_STAGES = ("arithmetic", "all but states read")


@dataclass(frozen=True)
class StagesConfig:
    """A kernel's configuration, and the stage that is left out; of a call with all before it.

    Of a call: "arithmetic", and "tokens", which is q, k, v, the gates and the output; "registers", through
    which states pass on their way from load to store; "index", which is read to find them; "everything": one
    block that does nothing. Of a step: "arithmetic"; "all but states read". As many blocks share a
    multiprocessor as of the whole kernel of a call; of a step it may be more, as fewer registers are used.
    """

    kernel: KernelConfig | SpeculativeConfig
    without: str


class WithoutArithmetic(GatedDeltaRule):
    """Moves everything, but stores the states as they were, and v as output."""

    def chunk_matrices(self, shared, place, c):
        pass

    @cute.jit
    def single_token(self, tensors, v, shared, place, tile):
        self.process_tile(tensors, [v], shared, place, tile)

    @cute.jit
    def process_tile(self, tensors, v, shared, place, tile):
        cfg = self.config
        row = self.tile_row(place, tile)
        cute.arch.mbarrier_wait(shared.mbars + place.warp * cfg.tactic.tiles_per_warp + tile, 0)
        s = self.load_tile(shared, place, tile)
        self.launch_dependents("early")
        if cutlass.const_expr(tile == 0 and cfg.T > 1):
            cute.arch.sync_threads()
        for c in cutlass.range_constexpr(len(cfg.chunks)):
            self.store_output(tensors, v[c], place, row, c)
        self.store_states(tensors, s, shared, place, row, tile)

    @cute.jit
    def store_states(self, tensors, s, shared, place, row, tile):
        """Store s, or where it is None what the buffer has, as often and where the call asks for it."""
        cfg = self.config
        count = cfg.tactic.tiles_per_warp
        if cutlass.const_expr(cfg.stores_every_state):
            for t in cutlass.range_constexpr(cfg.T):
                stored = tile * cfg.T + t
                buffer = tile if stored % 2 == 0 or s is None else count
                if cutlass.const_expr(s is not None):
                    self.stage_tile(s, shared, place, buffer, 1 if stored > 0 else None)
                self.store_token(tensors, t, row, shared, place, buffer)
        elif cutlass.const_expr(cfg.update_state):
            if cutlass.const_expr(s is not None):
                self.stage_tile(s, shared, place, tile, None)
            self.store_token(tensors, cfg.T - 1, row, shared, place, tile)


class StatesAlone(WithoutArithmetic):
    """Moves the states and nothing else: through registers or not, of slots that an index names or not."""

    def __init__(self, config: KernelConfig, registers: bool, index: bool) -> None:
        super().__init__(config)
        self.registers, self.index = registers, index

    @cute.kernel
    def kernel(
        self, q, k, v, a, b, A_log, dt_bias, scale, state, state_indices, write_indices,
        intermediate_states, ssm_state_indices, output,
    ):  # fmt: skip
        cfg = self.config
        v_block, _, hv, _, request = self.block_place()
        tid, _, _ = cute.arch.thread_idx()
        warp, lane = cute.arch.make_warp_uniform(tid // WARP_LANES), tid % WARP_LANES
        tensors = Tensors(q, k, v, state, intermediate_states, ssm_state_indices, output)
        shared = self.allocate()
        row = (v_block * cfg.tactic.warps + warp) * cfg.tactic.tiles_per_warp * MMA_ROWS
        indices = state_indices if self.index else None
        self.init_barriers(shared, warp, lane)
        if cutlass.const_expr(cfg.pdl):
            if cutlass.const_expr(cfg.prefetch) and out_of_the_way(cfg, cfg.tactic.ahead):
                self.prefetch_state(state, indices, Place(request, hv, None, row, warp, lane))
            cute.arch.griddepcontrol_wait()
            self.launch_dependents("start")
        slot = Int64(request)
        if cutlass.const_expr(indices is not None):
            slot = read_index(indices, request)
        place = Place(request, hv, slot, row, warp, lane)
        if slot >= 0:
            self.start_loads(state[slot, hv, None, None], shared, place)
            for tile in cutlass.range_constexpr(cfg.tactic.tiles_per_warp):
                self.move(tensors, shared, place, tile)
            self.launch_dependents("late")
            cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def move(self, tensors, shared, place, tile):
        """Load a tile and store it."""
        cute.arch.mbarrier_wait(shared.mbars + place.warp * self.config.tactic.tiles_per_warp + tile, 0)
        s = None
        if cutlass.const_expr(self.registers):
            s = self.load_tile(shared, place, tile)
        self.launch_dependents("early")
        self.store_states(tensors, s, shared, place, self.tile_row(place, tile), tile)


class WithoutEverything(GatedDeltaRule):
    """Takes the arguments of a call and does nothing, in one block, launched with the same attributes."""

    def grid(self, value_heads, key_heads, requests):
        return 1, 1, 1

    @cute.kernel
    def kernel(
        self, q, k, v, a, b, A_log, dt_bias, scale, state, state_indices, write_indices,
        intermediate_states, ssm_state_indices, output,
    ):  # fmt: skip
        pass


class VerifyWithoutArithmetic(Verify):
    """Moves everything, but folds states as they were, and writes v as output and as update."""

    def make_matrices(self, pending, count, shared, place):
        cute.arch.mbarrier_wait(self.ring_barrier(shared), 0)

    @cute.jit
    def process_tile(self, tensors, cache, v, pending, window, count, fold, shared, place, tile):
        cfg = self.config
        row = self.tile_row(place, tile)
        cute.arch.mbarrier_wait(shared.mbars + place.warp * cfg.tactic.tiles_per_warp + tile, 0)
        self.launch_dependents("early")
        if cutlass.const_expr(tile == 0):
            cute.arch.sync_threads()
        for c in cutlass.range_constexpr(len(cfg.chunks)):
            values = [x.to(Float32) for x in v[c]]
            self.store_output(tensors, values, place, row, c)
            self.record_updates(values, cache, pending, window, count, place, row, c)
        if fold:
            s = self.load_tile(shared, place, tile)
            matrix = tensors.state[pending.slot, place.hv, None, None]
            self.stage_tile(s, shared, place, tile, None)
            self.store_rows(matrix, row, shared, place, tile)
            cute.arch.cp_async_bulk_commit_group()


class StatesRead(Verify):
    """Reads the states and nothing else, and writes nothing."""

    @cute.kernel
    def kernel(
        self, q, k, v, a, b, A_log, dt_bias, scale, state, state_indices, keys, updates, gates, k_scale,
        cursor, live, num_accepted, accepted_nodes, num_tokens, parent_indices, fold_above, output,
    ):  # fmt: skip
        cfg = self.config
        v_block, _, hv, _, request = self.block_place()
        tid, _, _ = cute.arch.thread_idx()
        warp, lane = cute.arch.make_warp_uniform(tid // WARP_LANES), tid % WARP_LANES
        shared = allocate(cfg)
        row = (v_block * cfg.tactic.warps + warp) * cfg.tactic.tiles_per_warp * MMA_ROWS
        self.init_barriers(shared, warp, lane)
        if cutlass.const_expr(cfg.pdl):
            if among_first(cfg.prefetching_blocks):
                self.prefetch_state(state, state_indices, Place(request, hv, None, row, warp, lane))
            cute.arch.griddepcontrol_wait()
            self.launch_dependents("start")
        slot = read_index(state_indices, request)
        place = Place(request, hv, slot, row, warp, lane)
        if slot >= 0:
            self.start_loads(state[slot, hv, None, None], shared, place)
            for tile in cutlass.range_constexpr(cfg.tactic.tiles_per_warp):
                cute.arch.mbarrier_wait(shared.mbars + warp * cfg.tactic.tiles_per_warp + tile, 0)
                self.launch_dependents("early")
            self.launch_dependents("late")


class Empty:
    """A kernel of one thread that takes a tensor and does nothing."""

    @cute.jit
    def __call__(self, x, stream):
        self.kernel(x).launch(grid=(1, 1, 1), block=(1, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, x):
        pass


def _kernel(config: StagesConfig) -> Any:
    if isinstance(config.kernel, SpeculativeConfig):
        assert config.without in STEP_STAGES
        without = VerifyWithoutArithmetic if config.without == "arithmetic" else StatesRead
        return without(config.kernel)
    whole = config.kernel
    limited = replace(whole, tactic=replace(whole.tactic, max_blocks_per_sm=whole.blocks_per_sm))
    if config.without == "arithmetic":
        return WithoutArithmetic(limited)
    if config.without == "everything":
        return WithoutEverything(limited)
    return StatesAlone(limited, *STATES_ALONE[config.without])


def _trace(config: StagesConfig, options: str) -> Any:
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(_kernel(config), *arguments(config.kernel), stream, options=options)


def _trace_empty(config: object, options: str) -> Any:
    return cute.compile(
        Empty(), rows(Float32, (1,)), make_fake_stream(use_tvm_ffi_env_stream=True), options=options
    )


_SOURCES = (*FUNCTION.sources, Path(__file__))
STAGES = CuteFunction("gated_delta_rule_stages", _trace, _SOURCES)
EMPTY = CuteFunction("empty", _trace_empty, _SOURCES)

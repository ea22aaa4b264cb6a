"""P = softmax2(scale_log2 * X @ W^T) over rows, X [M, K], W [N, K], P [M, N], all bf16: a small SM100 kernel.

softmax2 is with base 2: 2^(s - max) / sum. N is one tile, so a thread holds a whole row of scores.

A cluster of two CTAs shares one MMA of 256 rows; each CTA has 128 of them in its tensor memory. Warps 0 to 3
are the epilogue, warp 4 issues MMAs (in the leader CTA), warp 5 loads. Tiles of 256 rows go round the
clusters. Rows past M are zeros from TMA and are not stored.

The kernel is plain on purpose: it waits nowhere without need, but for what the pipelines of the DSL add (see
mutations.py), which makes it the reference for mutations. `can_implement` has its limits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
import cutlass.utils as utils
import cutlass.utils.blackwell_helpers as sm100_utils
from cutlass import BFloat16, Float32, Int32, Int64
from cutlass._mlir.dialects import nvvm
from cutlass.cute.nvgpu import cpasync, tcgen05
from cutlass.cutlass_dsl import dsl_user_op
from ptx_emulator import compile_cute

CLUSTER_CTAS = 2
TILE_M = 256
TILE_K = 64
EPILOGUE_COLUMNS = 32
EPILOGUE_WARPS = 4
MMA_WARP = 4
LOAD_WARP = 5
THREADS = 192
TMEM_BARRIER = 1
STORE_BARRIER = 2


@dataclass(frozen=True)
class GemmSoftmaxConfig:
    """What the kernel is compiled for. `num_clusters` run side by side and take tiles in turn."""

    N: int = 128
    load_stages: int = 3
    acc_stages: int = 2
    num_clusters: int = 2

    def can_implement(self, K: int) -> str | None:
        """Why a problem is refused, or None."""
        if self.N not in (64, 128, 256):
            return f"N = {self.N}, must be 64, 128 or 256"
        if self.N * self.acc_stages > 512:
            return (
                f"{self.acc_stages} accumulators of {self.N} columns do not fit 512 columns of tensor memory"
            )
        if K % 8:
            return f"K = {K}, must be a multiple of 8"
        return None


@dsl_user_op
def tcgen05_before_thread_sync(*, loc: Any = None, ip: Any = None) -> None:
    """Orders tensor memory accesses of this thread before its next arrival at a barrier."""
    nvvm.tcgen05_fence(nvvm.Tcgen05FenceKind.BEFORE_THREAD_SYNC, loc=loc, ip=ip)


@dsl_user_op
def tcgen05_after_thread_sync(*, loc: Any = None, ip: Any = None) -> None:
    """Orders tensor memory accesses of this thread after the barrier it has waited for."""
    nvvm.tcgen05_fence(nvvm.Tcgen05FenceKind.AFTER_THREAD_SYNC, loc=loc, ip=ip)


class GemmSoftmax:
    """The kernel for one configuration."""

    def __init__(self, config: GemmSoftmaxConfig) -> None:
        self.config = config
        self.mma_tiler = (TILE_M, config.N, TILE_K)
        self.epilogue_tile = (TILE_M // CLUSTER_CTAS, EPILOGUE_COLUMNS)
        self.num_subtiles = config.N // EPILOGUE_COLUMNS

    @cute.jit
    def __call__(self, mX: cute.Tensor, mW: cute.Tensor, mP: cute.Tensor, scale_log2: Float32):
        """Layouts, tensor maps, launch. mX [M, K], mW [N, K], mP [M, N]."""
        config = self.config
        tiled_mma = sm100_utils.make_trivial_tiled_mma(
            BFloat16,
            BFloat16,
            tcgen05.OperandMajorMode.K,
            tcgen05.OperandMajorMode.K,
            Float32,
            tcgen05.CtaGroup.TWO,
            self.mma_tiler[:2],
        )
        x_layout = sm100_utils.make_smem_layout_a(tiled_mma, self.mma_tiler, BFloat16, config.load_stages)
        w_layout = sm100_utils.make_smem_layout_b(tiled_mma, self.mma_tiler, BFloat16, config.load_stages)
        p_layout = sm100_utils.make_smem_layout_epi(
            BFloat16, utils.LayoutEnum.ROW_MAJOR, self.epilogue_tile, self.num_subtiles
        )
        cluster_layout = cute.tiled_divide(cute.make_layout((CLUSTER_CTAS, 1, 1)), (tiled_mma.thr_id.shape,))
        load_op = sm100_utils.cluster_shape_to_tma_atom_A((CLUSTER_CTAS, 1), tiled_mma.thr_id)
        tma_x, tma_tensor_x = cute.nvgpu.make_tiled_tma_atom_A(
            load_op,
            mX,
            cute.slice_(x_layout, (None, None, None, 0)),
            self.mma_tiler,
            tiled_mma,
            cluster_layout.shape,
        )
        load_op = sm100_utils.cluster_shape_to_tma_atom_B((CLUSTER_CTAS, 1), tiled_mma.thr_id)
        tma_w, tma_tensor_w = cute.nvgpu.make_tiled_tma_atom_B(
            load_op,
            mW,
            cute.slice_(w_layout, (None, None, None, 0)),
            self.mma_tiler,
            tiled_mma,
            cluster_layout.shape,
        )
        tma_p, tma_tensor_p = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileS2GOp(),
            mP,
            cute.slice_(p_layout, (None, None, 0)),
            self.epilogue_tile,
        )
        stage_bytes = cute.size_in_bytes(BFloat16, cute.slice_(x_layout, (None, None, None, 0)))
        stage_bytes += cute.size_in_bytes(BFloat16, cute.slice_(w_layout, (None, None, None, 0)))
        self.tx_bytes = stage_bytes * CLUSTER_CTAS
        self.kernel(
            tiled_mma,
            tma_x,
            tma_tensor_x,
            tma_w,
            tma_tensor_w,
            tma_p,
            tma_tensor_p,
            cluster_layout,
            x_layout,
            w_layout,
            p_layout,
            cute.ceil_div(cute.size(mX, mode=[0]), TILE_M),
            scale_log2,
        ).launch(
            grid=[CLUSTER_CTAS, config.num_clusters, 1],
            block=[THREADS, 1, 1],
            cluster=[CLUSTER_CTAS, 1, 1],
        )

    @cute.kernel
    def kernel(
        self,
        tiled_mma: cute.TiledMma,
        tma_x: cute.CopyAtom,
        mX: cute.Tensor,
        tma_w: cute.CopyAtom,
        mW: cute.Tensor,
        tma_p: cute.CopyAtom,
        mP: cute.Tensor,
        cluster_layout: cute.Layout,
        x_layout: cute.ComposedLayout,
        w_layout: cute.ComposedLayout,
        p_layout: cute.ComposedLayout,
        num_tiles: Int32,
        scale_log2: Float32,
    ):
        """Shared memory, barriers and roles."""
        config = self.config
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())

        @cute.struct
        class Storage:
            load_mbars: cute.struct.MemRange[Int64, config.load_stages * 2]
            acc_mbars: cute.struct.MemRange[Int64, config.acc_stages * 2]
            tmem_free_mbar: Int64
            tmem_address: Int32

        smem = utils.SmemAllocator()
        storage = smem.allocate(Storage)
        load_pipeline = pipeline.PipelineTmaUmma.create(
            barrier_storage=storage.load_mbars.data_ptr(),
            num_stages=config.load_stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 1),
            tx_count=self.tx_bytes,
            cta_layout_vmnk=cluster_layout,
            defer_sync=True,
        )
        acc_pipeline = pipeline.PipelineUmmaAsync.create(
            barrier_storage=storage.acc_mbars.data_ptr(),
            num_stages=config.acc_stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
            consumer_group=pipeline.CooperativeGroup(
                pipeline.Agent.Thread, EPILOGUE_WARPS * cute.arch.WARP_SIZE * CLUSTER_CTAS
            ),
            cta_layout_vmnk=cluster_layout,
            defer_sync=True,
        )
        tmem = utils.TmemAllocator(
            storage.tmem_address.ptr,
            barrier_for_retrieve=pipeline.NamedBarrier(
                barrier_id=TMEM_BARRIER, num_threads=(EPILOGUE_WARPS + 1) * cute.arch.WARP_SIZE
            ),
            allocator_warp_id=0,
            is_two_cta=True,
            two_cta_tmem_dealloc_mbar_ptr=storage.tmem_free_mbar.ptr,
        )
        pipeline.pipeline_init_arrive(cluster_shape_mn=(CLUSTER_CTAS, 1), is_relaxed=True)
        sX = smem.allocate_tensor(BFloat16, x_layout.outer, byte_alignment=1024, swizzle=x_layout.inner)
        sW = smem.allocate_tensor(BFloat16, w_layout.outer, byte_alignment=1024, swizzle=w_layout.inner)
        sP = smem.allocate_tensor(BFloat16, p_layout.outer, byte_alignment=1024, swizzle=p_layout.inner)
        acc_shape = tiled_mma.partition_shape_C(self.mma_tiler[:2])
        acc_layout = tiled_mma.make_fragment_C(cute.append(acc_shape, config.acc_stages)).layout
        pipeline.pipeline_init_wait(cluster_shape_mn=(CLUSTER_CTAS, 1))

        if warp == LOAD_WARP:
            self.load(tiled_mma, tma_x, mX, tma_w, mW, sX, sW, load_pipeline, rank, num_tiles)
        if warp == MMA_WARP:
            tmem.wait_for_alloc()
            tAcc = cute.make_tensor(tmem.retrieve_ptr(Float32), acc_layout)
            k_tiles = cute.ceil_div(cute.size(mX, mode=[1]), TILE_K)
            self.mma(tiled_mma, sX, sW, tAcc, load_pipeline, acc_pipeline, rank, num_tiles, k_tiles)
        if warp < EPILOGUE_WARPS:
            tmem.allocate(config.N * config.acc_stages)
            tmem.wait_for_alloc()
            tmem_ptr = tmem.retrieve_ptr(Float32)
            tAcc = cute.make_tensor(tmem_ptr, acc_layout)
            self.epilogue(tiled_mma, tma_p, mP, sP, tAcc, acc_pipeline, rank, warp, num_tiles, scale_log2)
            tmem.relinquish_alloc_permit()
            tmem.free(tmem_ptr)

    @cute.jit
    def load(
        self,
        tiled_mma: cute.TiledMma,
        tma_x: cute.CopyAtom,
        mX: cute.Tensor,
        tma_w: cute.CopyAtom,
        mW: cute.Tensor,
        sX: cute.Tensor,
        sW: cute.Tensor,
        load_pipeline: pipeline.PipelineTmaUmma,
        rank: Int32,
        num_tiles: Int32,
    ):
        """Owns sX, sW while empty. Waits on empty stages. Signals full stages. Does not own tensor memory."""
        thr_mma = tiled_mma.get_slice(rank)
        gX = cute.local_tile(mX, cute.slice_(self.mma_tiler, (None, 0, None)), (None, None))
        gW = cute.local_tile(mW, cute.slice_(self.mma_tiler, (0, None, None)), (None, None))
        one_cta = cute.make_layout(1)
        tXsX, tXgX = cpasync.tma_partition(
            tma_x, 0, one_cta, cute.group_modes(sX, 0, 3), cute.group_modes(thr_mma.partition_A(gX), 0, 3)
        )
        tWsW, tWgW = cpasync.tma_partition(
            tma_w, 0, one_cta, cute.group_modes(sW, 0, 3), cute.group_modes(thr_mma.partition_B(gW), 0, 3)
        )
        k_tiles = cute.size(gX, mode=[3])
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.config.load_stages)
        _, tile, _ = cute.arch.block_idx()
        while tile < num_tiles:
            for k_tile in cutlass.range(k_tiles, unroll=1):
                load_pipeline.producer_acquire(state)
                full = load_pipeline.producer_get_barrier(state)
                cute.copy(tma_x, tXgX[None, tile, k_tile], tXsX[None, state.index], tma_bar_ptr=full)
                cute.copy(tma_w, tWgW[None, 0, k_tile], tWsW[None, state.index], tma_bar_ptr=full)
                state.advance()
            tile += self.config.num_clusters
        load_pipeline.producer_tail(state)

    @cute.jit
    def mma(
        self,
        tiled_mma: cute.TiledMma,
        sX: cute.Tensor,
        sW: cute.Tensor,
        tAcc: cute.Tensor,
        load_pipeline: pipeline.PipelineTmaUmma,
        acc_pipeline: pipeline.PipelineUmmaAsync,
        rank: Int32,
        num_tiles: Int32,
        k_tiles: Int32,
    ):
        """Owns empty accumulators. Waits on full stages, empty accumulators. Signals the reverse of both."""
        rX = tiled_mma.make_fragment_A(sX)
        rW = tiled_mma.make_fragment_B(sW)
        full = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.config.load_stages)
        empty = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.config.acc_stages)
        _, tile, _ = cute.arch.block_idx()
        while tile < num_tiles:
            if rank == 0:
                acc_pipeline.producer_acquire(empty)
                tcgen05_after_thread_sync()
                acc = tAcc[None, None, None, empty.index]
                tiled_mma.set(tcgen05.Field.ACCUMULATE, False)
                for _ in cutlass.range(k_tiles, unroll=1):
                    load_pipeline.consumer_wait(full)
                    for k_block in cutlass.range_constexpr(cute.size(rX, mode=[2])):
                        block = (None, None, k_block, full.index)
                        cute.gemm(tiled_mma, acc, rX[block], rW[block], acc)
                        tiled_mma.set(tcgen05.Field.ACCUMULATE, True)
                    load_pipeline.consumer_release(full)
                    full.advance()
                acc_pipeline.producer_commit(empty)
            empty.advance()
            tile += self.config.num_clusters
        acc_pipeline.producer_tail(empty)

    @cute.jit
    def epilogue(
        self,
        tiled_mma: cute.TiledMma,
        tma_p: cute.CopyAtom,
        mP: cute.Tensor,
        sP: cute.Tensor,
        tAcc: cute.Tensor,
        acc_pipeline: pipeline.PipelineUmmaAsync,
        rank: Int32,
        warp: Int32,
        num_tiles: Int32,
        scale_log2: Float32,
    ):
        """Owns sP, a row per thread. Waits on full accumulators. Signals empty ones. Does not own sX, sW."""
        thread, _, _ = cute.arch.thread_idx()
        rows = TILE_M // CLUSTER_CTAS
        load_op = sm100_utils.get_tmem_load_op(
            (rows, self.config.N, TILE_K),
            utils.LayoutEnum.ROW_MAJOR,
            BFloat16,
            Float32,
            self.epilogue_tile,
            True,
        )
        subtiles = cute.flat_divide(tAcc[((None, None), 0, 0, None)], self.epilogue_tile)
        tmem_copy = tcgen05.make_tmem_copy(load_op, subtiles[None, None, 0, 0, 0])
        thr_tmem = tmem_copy.get_slice(thread)
        tTtAcc = thr_tmem.partition_S(subtiles)
        gP = cute.local_tile(mP, self.epilogue_tile, (None, None))
        row_shape = thr_tmem.partition_D(gP[None, None, 0, 0]).shape
        rS = cute.make_rmem_tensor((*row_shape, self.num_subtiles), Float32)
        store_op = sm100_utils.get_smem_store_op(utils.LayoutEnum.ROW_MAJOR, BFloat16, Float32, tmem_copy)
        smem_copy = cute.make_tiled_copy_D(store_op, tmem_copy)
        tPsP = smem_copy.get_slice(thread).partition_D(sP)
        bSsP, bSgP = cpasync.tma_partition(
            tma_p, 0, cute.make_layout(1), cute.group_modes(sP, 0, 2), cute.group_modes(gP, 0, 2)
        )
        threads = EPILOGUE_WARPS * cute.arch.WARP_SIZE
        store_barrier = pipeline.NamedBarrier(barrier_id=STORE_BARRIER, num_threads=threads)
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.config.acc_stages)
        _, tile, _ = cute.arch.block_idx()
        while tile < num_tiles:
            acc_pipeline.consumer_wait(state)
            tcgen05_after_thread_sync()
            for subtile in cutlass.range_constexpr(self.num_subtiles):
                part = (None, None, None, subtile)
                cute.copy(tmem_copy, tTtAcc[None, None, None, 0, subtile, state.index], rS[part])
            cute.arch.fence_view_async_tmem_load()
            tcgen05_before_thread_sync()
            acc_pipeline.consumer_release(state)
            state.advance()

            scores = rS.load() * scale_log2
            row_max = scores.reduce(cute.ReductionOp.MAX, Float32(-float("inf")), 0)
            exponentials = cute.math.exp2(scores - row_max, fastmath=True)
            row_sum = exponentials.reduce(cute.ReductionOp.ADD, Float32(0.0), 0)
            rS.store(exponentials * (1.0 / row_sum))

            if warp == 0:
                cute.arch.cp_async_bulk_wait_group(0, read=True)
            store_barrier.arrive_and_wait()
            for subtile in cutlass.range_constexpr(self.num_subtiles):
                part = (None, None, None, subtile)
                rP = cute.make_rmem_tensor(row_shape, BFloat16)
                rP.store(rS[part].load().to(BFloat16))
                cute.copy(smem_copy, smem_copy.retile(rP), tPsP[None, None, None, subtile])
            cute.arch.fence_proxy("async.shared", space="cta")
            store_barrier.arrive_and_wait()
            if warp == 0:
                with cute.arch.elect_one():
                    for subtile in cutlass.range_constexpr(self.num_subtiles):
                        row_tile = tile * CLUSTER_CTAS + rank
                        cute.copy(tma_p, bSsP[None, subtile], bSgP[None, row_tile, subtile])
                    cute.arch.cp_async_bulk_commit_group()
            tile += self.config.num_clusters
        if warp == 0:
            cute.arch.cp_async_bulk_wait_group(0, read=False)


def compile_gemm_softmax(config: GemmSoftmaxConfig, arch: str = "sm_100a") -> Any:
    """The compiled function `(X, W, P, scale_log2)` for contiguous matrices."""
    M, K, N = cute.sym_int32(), cute.sym_int32(divisibility=8), cute.sym_int32(divisibility=8)

    def matrix(*shape: Any) -> Any:
        return cute.runtime.make_fake_compact_tensor(BFloat16, shape, stride_order=(1, 0), assumed_align=16)

    return compile_cute(
        GemmSoftmax(config), matrix(M, K), matrix(N, K), matrix(M, N), Float32(1.0), arch=arch
    )

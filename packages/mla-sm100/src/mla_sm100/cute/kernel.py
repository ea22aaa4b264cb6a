"""MLA decode on tcgen05 tensor cores: SM100, SM103 and SM110.

For a row (token, head) of a request with query q = (q_latent, q_rope) and the keys k it sees
    s_k = softmax_scale * (q_latent . c_latent_k + q_rope . k_rope_k)
    out = output_scale * sum_k softmax(s)_k c_latent_k        lse = log sum_k exp(s_k)
The rows of a request are folded into M: 128 of them on a pair of CTAs, or 64 on one. Keys are read in tiles
of as many as rows, by page. Warps 0 to 3 are softmax, then come mma, keys, values and queries, one warp each.
A pair holds half of the keys and, apart from them, half of the latent elements of all keys; a single CTA
reads values from its keys.
"""

from __future__ import annotations

import math
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8
from cutlass.cute.nvgpu import cpasync, tcgen05
from cutlass.memory import SmemAllocator

from mla_sm100.config import (
    BARRIER_BYTES,
    CHUNK_BYTES,
    CHUNK_ROW_BYTES,
    CHUNK_ROWS,
    KV_LORA_RANK,
    LOAD_K_WARP,
    LOAD_Q_WARP,
    LOAD_V_WARP,
    MMA_WARP,
    QK_ROPE_HEAD_DIM,
    SOFTMAX_WARPS,
    THREADS,
    TMEM_COLS,
    DecodeConfig,
)

from . import tmem
from .block import LEADER, VECTOR_BYTES, WARP_LANES, Barriers, Block, stages, store_vector, zeros
from .combine import THREADS as COMBINE_THREADS
from .combine import Combine
from .load import ROW_VECTORS, ROWS_PER_COPY, Loads, PagedCopies, PagedCopy
from .mma import Mmas
from .outputs import NUMERIC, Outputs
from .schedule import Schedule
from .softmax import EXCHANGE_FLOATS, Softmax

LOG2_E = math.log2(math.e)
SMALLEST_SCALE = 2.0**-126  # of the logits: changes none, even of float32's largest scores
CHUNK_ALIGN_BYTES = 1024  # of a chunk: the swizzled pattern repeats after that
HALF_WARP_ROWS = 16  # rows of a single CTA that a softmax warp has


class MlaDecode:
    """The kernel for one configuration."""

    def __init__(self, config: DecodeConfig) -> None:
        self.config = config
        self.loads = Loads(config)
        self.mmas = Mmas(config)
        self.softmax = Softmax(config)
        self.combine = Combine(config)

    @cute.jit
    def __call__(
        self,
        mQ: cute.Tensor,
        mKV: cute.Tensor,
        mTables: cute.Tensor,
        mSeqLens: cute.Tensor,
        mCumSeqLensQ: Any,
        softmax_scale: Any,
        output_scale: Any,
        mO: cute.Tensor,
        mLSE: Any,
        mWorkspace: Any,
        q_len: Int32,
        num_splits: Int32,
        tiles_per_split: Int32,
        num_clusters: Int32,
        stream: cuda.CUstream,
    ):
        """Tensor maps, partial results, launch; shapes as in `mla_core.decode`.

        mWorkspace: o_partial float32 [num_splits, batch * q_len * num_heads, 512], then lse_partial.
        """
        config = self.config
        num_heads = cute.size(mQ, mode=[cute.rank(mQ) - 2])
        schedule = (num_heads, q_len, num_splits, tiles_per_split, num_clusters)
        group = tcgen05.CtaGroup.TWO if config.pair else tcgen05.CtaGroup.ONE
        pages = cute.make_tensor(mKV.iterator, cute.select(mKV.layout, mode=[1, 2, 0]))
        latent = self.make_copy(pages, config.chunk_elements, group)
        rope = self.make_copy(pages, QK_ROPE_HEAD_DIM, group)
        own_latent = self.make_copy(pages, config.chunk_elements, tcgen05.CtaGroup.ONE)
        o_partial, lse_partial = None, None
        if cutlass.const_expr(config.split):
            rows = cute.size(mSeqLens, mode=[0]) * q_len * num_heads
            o_partial = cute.make_tensor(
                cute.recast_ptr(mWorkspace.iterator, dtype=Float32),
                cute.make_layout(
                    (num_splits, rows, KV_LORA_RANK), stride=(Int64(rows) * KV_LORA_RANK, KV_LORA_RANK, 1)
                ),
            )
            lse_partial = cute.make_tensor(
                o_partial.iterator + Int64(num_splits) * rows * KV_LORA_RANK,
                cute.make_layout((num_splits, rows), stride=(Int64(rows), 1)),
            )
        self.kernel(
            mQ,
            latent,
            rope,
            own_latent,
            cute.size(mKV, mode=[0]),
            mTables,
            mSeqLens,
            mCumSeqLensQ,
            softmax_scale,
            output_scale,
            mO,
            mLSE,
            o_partial,
            lse_partial,
            schedule,
        ).launch(
            grid=[num_clusters * config.cluster_size, 1, 1],
            block=[THREADS, 1, 1],
            cluster=[config.cluster_size, 1, 1],
            smem=config.smem_bytes,
            stream=stream,
            use_pdl=config.pdl,
        )
        if cutlass.const_expr(config.split):
            self.combine_kernel(
                mSeqLens, mCumSeqLensQ, output_scale, mO, mLSE, o_partial, lse_partial, schedule
            ).launch(
                grid=[cute.size(mSeqLens, mode=[0]) * q_len * num_heads, 1, 1],
                block=[COMBINE_THREADS, 1, 1],
                stream=stream,
                use_pdl=config.pdl,
            )

    @cute.kernel
    def combine_kernel(
        self,
        mSeqLens: cute.Tensor,
        mCumSeqLensQ: Any,
        output_scale: Any,
        mO: cute.Tensor,
        mLSE: Any,
        o_partial: cute.Tensor,
        lse_partial: cute.Tensor,
        schedule: Any,
    ):
        """The second launch where keys are split."""
        if cutlass.const_expr(self.config.pdl):
            cute.arch.griddepcontrol_wait()
        outputs = Outputs(mO, mLSE, o_partial, lse_partial, self.scalar(output_scale))
        self.combine.run(Schedule(self.config, mSeqLens, mCumSeqLensQ, *schedule), outputs)

    def make_copy(self, pages: Any, columns: int, group: tcgen05.CtaGroup) -> tuple[cute.CopyAtom, Any]:
        """A TMA copy of `box_keys` keys by `columns` elements, and the cache as it sees it."""
        kinds = {128: tcgen05.SmemLayoutAtomKind.K_SW128, 64: tcgen05.SmemLayoutAtomKind.K_SW64}
        atom = tcgen05.make_smem_layout_atom(kinds[columns * self.config.element_bytes], pages.element_type)
        box = (self.config.box_keys, columns)
        layout = cute.tile_to_shape(atom, box, order=(0, 1))
        made = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(group), pages, cute.append(layout, cute.make_layout(1)), (*box, 1)
        )
        return made[0], made[1]

    @cute.kernel
    def kernel(
        self,
        mQ: cute.Tensor,
        latent: Any,
        rope: Any,
        own_latent: Any,
        num_pages: Int32,
        mTables: cute.Tensor,
        mSeqLens: cute.Tensor,
        mCumSeqLensQ: Any,
        softmax_scale: Any,
        output_scale: Any,
        mO: cute.Tensor,
        mLSE: Any,
        o_partial: Any,
        lse_partial: Any,
        schedule: Any,
    ):
        """Storage, barriers, tensor memory; then each warp has its role."""
        config = self.config
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        rank, cluster = Int32(0), cute.arch.block_idx()[0]
        if cutlass.const_expr(config.pair):
            rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
            cluster = cute.arch.block_idx()[0] // config.cluster_size
        smem = SmemAllocator()
        barriers = Barriers.allocate(smem, config)
        tmem_address = smem.allocate_array(Int32, 1)
        exchange = smem.allocate_tensor(Float32, cute.make_layout((EXCHANGE_FLOATS,)))
        chunk_bytes = config.smem_bytes - BARRIER_BYTES
        chunks = smem.allocate_array(Uint8, chunk_bytes, byte_alignment=CHUNK_ALIGN_BYTES)
        block = Block(config, rank, cluster, barriers, chunks)
        units = Schedule(config, mSeqLens, mCumSeqLensQ, *schedule)
        active_warps = Int32(SOFTMAX_WARPS)
        if cutlass.const_expr(not config.pair):
            rows = units.num_heads * units.q_len
            active_warps = cutlass.min(SOFTMAX_WARPS, cute.ceil_div(rows, HALF_WARP_ROWS))
        if warp == MMA_WARP:
            with cute.arch.elect_one():
                self.init_barriers(barriers, active_warps)
            cute.arch.alloc_tmem(TMEM_COLS, tmem_address, is_two_cta=config.pair)
            cute.arch.relinquish_tmem_alloc_permit(is_two_cta=config.pair)
        if warp < SOFTMAX_WARPS:
            self.clear_queries(block, units.used_rows)
        if cutlass.const_expr(not config.pair):
            self.clear_probabilities(block, warp, active_warps)
        tmem.before_thread_sync()
        self.sync_cluster()
        tmem.after_thread_sync()
        tmem_base = tmem_address.load()
        if cutlass.const_expr(config.pdl):
            cute.arch.griddepcontrol_wait()

        if warp == LOAD_K_WARP:
            self.loads.keys(block, units, self.partition(block, latent, rope, own_latent), mTables, num_pages)
        if cutlass.const_expr(config.pair):
            if warp == LOAD_V_WARP:
                self.loads.values(
                    block, units, self.partition(block, latent, rope, own_latent), mTables, num_pages
                )
        if warp == LOAD_Q_WARP:
            self.loads.queries(block, units, mQ)
        if warp == MMA_WARP:
            if rank == LEADER:
                with cute.arch.elect_one():
                    self.mmas.run(block, units, tmem_base, self.scalar(softmax_scale) < 0.0)
        if warp < active_warps:
            scale = self.scalar(softmax_scale)
            # Not 0, which times the -inf of keys that are not seen would be NaN.
            magnitude = cute.arch.fmax(cute.arch.fmax(scale, -scale), SMALLEST_SCALE)
            outputs = Outputs(mO, mLSE, o_partial, lse_partial, self.scalar(output_scale))
            self.softmax.run(
                block, units, mTables, outputs, exchange, tmem_base, magnitude * LOG2_E, active_warps
            )
        self.sync_cluster()
        if warp == MMA_WARP:
            pointer = cute.arch.retrieve_tmem_ptr(Float32, 16, tmem_address)
            cute.arch.dealloc_tmem(pointer, TMEM_COLS, is_two_cta=config.pair)

    def scalar(self, scale: Any) -> Float32:
        """A scale given by value or in memory."""
        return scale if isinstance(scale, Float32) else scale[0]

    def init_barriers(self, barriers: Barriers, active_warps: Int32) -> None:
        """Arrivals per phase of every barrier; by one thread."""
        config = self.config
        ctas = config.cluster_size
        arrivals = {
            "q_full": ctas,
            "s_empty": active_warps * ctas,
            "p_full": active_warps * ctas,
        }
        for name, count in stages(config).items():
            for stage in range(count):
                cute.arch.mbarrier_init(getattr(barriers, name) + stage, arrivals.get(name, 1))
        cute.arch.mbarrier_init_fence()

    @cute.jit
    def clear_queries(self, block: Block, used_rows: Int32):
        """Zero the rows of queries that no unit has: an MMA reads them, though nobody its result."""
        thread, _, _ = cute.arch.thread_idx()
        zero = zeros()
        first_row = cute.ceil_div(used_rows, ROWS_PER_COPY) * ROWS_PER_COPY
        row_vectors = self.loads.rope_row_bytes // VECTOR_BYTES
        stride = SOFTMAX_WARPS * WARP_LANES
        for vector in cutlass.range(
            first_row * row_vectors + thread, CHUNK_ROWS * row_vectors, stride, unroll=1
        ):
            store_vector(block.chunks + vector * VECTOR_BYTES, zero)
        for vector in cutlass.range(
            first_row * ROW_VECTORS + thread, CHUNK_ROWS * ROW_VECTORS, stride, unroll=1
        ):
            for chunk in cutlass.range_constexpr(1, self.config.chunks):
                store_vector(block.chunks + (chunk * CHUNK_BYTES + vector * VECTOR_BYTES), zero)
        cute.arch.fence_proxy("async.shared", space="cta")

    @cute.jit
    def clear_probabilities(self, block: Block, warp: Int32, active_warps: Int32):
        """Zero the rows of P that no softmax warp writes."""
        if (warp >= active_warps) & (warp < SOFTMAX_WARPS):
            zero = zeros()
            row_bytes = self.config.probability_row_bytes
            first = block.p_chunk * CHUNK_BYTES + warp * (HALF_WARP_ROWS * row_bytes)
            vectors = HALF_WARP_ROWS * row_bytes // VECTOR_BYTES
            for vector in cutlass.range(cute.arch.lane_idx(), vectors, WARP_LANES, unroll=1):
                store_vector(block.chunks + (first + vector * VECTOR_BYTES), zero)
            cute.arch.fence_proxy("async.shared", space="cta")

    def sync_cluster(self) -> None:
        """All threads of the cluster."""
        if self.config.pair:
            cute.arch.cluster_arrive(aligned=True)
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

    def partition(self, block: Block, latent: Any, rope: Any, own_latent: Any) -> PagedCopies:
        """The copies with their sources and the chunks that they fill."""
        return PagedCopies(
            self.paged_copy(block, *latent, self.config.chunk_elements),
            self.paged_copy(block, *rope, QK_ROPE_HEAD_DIM),
            self.paged_copy(block, *own_latent, self.config.chunk_elements),
        )

    def paged_copy(self, block: Block, atom: cute.CopyAtom, pages: Any, columns: int) -> PagedCopy:
        """One kind of copy, partitioned."""
        config = self.config
        dtype = NUMERIC[config.dtype]
        row_bytes = columns * config.element_bytes
        swizzle = cute.make_swizzle(3 if row_bytes == CHUNK_ROW_BYTES else 2, 4, 3)
        num_chunks = (config.smem_bytes - BARRIER_BYTES) // CHUNK_BYTES
        layout = cute.make_layout(
            (config.box_keys, columns, CHUNK_ROWS // config.box_keys, num_chunks),
            stride=(columns, 1, config.box_keys * columns, CHUNK_BYTES // config.element_bytes),
        )
        destination = cute.make_tensor(cute.recast_ptr(block.chunks, swizzle, dtype=dtype), layout)
        source = cute.local_tile(pages, (config.box_keys, columns, 1), (None, None, None))
        destination, source = cpasync.tma_partition(
            atom,
            0,
            cute.make_layout(1),
            cute.group_modes(destination, 0, 2),
            cute.group_modes(source, 0, 3),
        )
        return PagedCopy(atom, source, destination)

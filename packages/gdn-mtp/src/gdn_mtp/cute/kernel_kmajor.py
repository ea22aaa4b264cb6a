"""Gated delta rule for one token with a K-major state [B, HV, K, V], updated in place; SM90 and newer.

    p = S^T k      u = beta (v - d p)      o = scale (d S^T q + (q.k) u)      S <- d S + k u^T
A block owns `columns` columns of a head's state: bulk copies bring its rows to shared memory and back, and
each thread owns one word, a column or two, of a run of K / groups rows, so that only sums cross threads.
Grid: (V / columns, HV, B).
"""

from __future__ import annotations

from functools import reduce
from operator import add

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int64
from cutlass.memory import SmemAllocator

from gdn_mtp.problem import L2NORM_EPSILON

from .config import GATE_COLUMNS, L2_LINE_BYTES, WARP_LANES
from .config_kmajor import THREADS, KMajorConfig
from .fragments import (
    NUMERIC,
    bulk_load,
    bulk_prefetch_l2,
    bulk_store,
    dot,
    load_word,
    prefetch_l2,
    store_vector,
    unpack,
)
from .gates import BETA, DECAY, K_SCALE, Q_SCALE, QK, load_gates, stage_gates
from .tiles import in_first_wave


class GatedDeltaRuleKMajor:
    """The kernel of one `KMajorConfig`; calling it (traced) launches. Indices and intermediates are None."""

    def __init__(self, config: KMajorConfig):
        self.config = config

    @cute.jit
    def __call__(
        self, q, k, v, a, b, A_log, dt_bias, scale, state, state_indices, write_indices,
        intermediate_states, ssm_state_indices, output, stream,
    ):  # fmt: skip
        cfg = self.config
        self.kernel(q, k, v, a, b, A_log, dt_bias, scale, state, output).launch(
            grid=(cfg.V // cfg.columns, v.shape[2], v.shape[0]),
            block=(THREADS, 1, 1),
            stream=stream,
            min_blocks_per_mp=cfg.blocks_per_sm,
            preferred_smem_carveout=cfg.smem_carveout_percent,
            use_pdl=cfg.pdl,
        )

    @cute.kernel
    def kernel(self, q, k, v, a, b, A_log, dt_bias, scale, state, output):
        cfg = self.config
        v_block, hv, request = cute.arch.block_idx()
        tid, _, _ = cute.arch.thread_idx()
        smem = SmemAllocator()
        s_state = smem.allocate_tensor(NUMERIC[cfg.state_dtype], cute.make_layout((cfg.columns, cfg.K)), 128)
        mbar = smem.allocate_array(Int64, 1)
        s_kq = smem.allocate_tensor(Float32, cute.make_layout((cfg.K, 2)), 16)
        s_sums = smem.allocate_tensor(Float32, cute.make_layout((cfg.columns, cfg.groups, 2)), 16)
        s_gate = smem.allocate_tensor(Float32, cute.make_layout(GATE_COLUMNS), 16)
        column, group = tid % cfg.row_words * cfg.word_columns, tid // cfg.row_words
        first_column = v_block * cfg.columns
        head = hv // (v.shape[2] // q.shape[2])
        matrix = state[request, hv, None, None]
        if tid == 0:
            cute.arch.mbarrier_init(mbar, 1)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        if cutlass.const_expr(cfg.pdl):
            if in_first_wave(cfg):
                self.prefetch(matrix, (q, k), v, (a, b), request, head, hv, first_column)
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
        if tid == 0:
            cute.arch.mbarrier_arrive_and_expect_tx(mbar, cfg.tile_bytes)
        for i in cutlass.range_constexpr(-(-cfg.K // THREADS)):
            row = tid + i * THREADS
            if row < cfg.K:
                source = matrix[row, None].iterator + first_column
                bulk_load(s_state[None, row].iterator, source, cfg.row_bytes, mbar)
        if cutlass.const_expr(cfg.tensor_scale):
            scale = scale[0]
        places = [first_column + column + x for x in range(cfg.word_columns)]
        values = [v[request, 0, hv, x] for x in places]
        gates = load_gates(a, b, A_log, dt_bias, request, hv, 0)
        self.stage(q, k, gates, scale, s_kq, s_gate, request, head)
        cute.arch.sync_threads()
        cute.arch.mbarrier_wait(mbar, 0)
        run = cfg.K // cfg.groups
        rows = [group * run + i for i in range(run)]
        words = [s_state[None, row].iterator + cute.assume(column, divby=cfg.word_columns) for row in rows]
        s = [load_word(word) for word in words]
        sums = self.column_sums([unpack(word, s_state.element_type) for word in s], s_kq, rows)
        if cutlass.const_expr(cfg.groups > 1):
            for x in cutlass.range_constexpr(cfg.word_columns):
                for e in cutlass.range_constexpr(2):
                    s_sums[column + x, group, e] = sums[x][e]
            cute.arch.sync_threads()
            sums = [
                [reduce(add, [s_sums[column + x, i, e] for i in range(cfg.groups)]) for e in range(2)]
                for x in range(cfg.word_columns)
            ]
        beta, decay, k_scale, q_scale, qk = (s_gate[x] for x in (BETA, DECAY, K_SCALE, Q_SCALE, QK))
        u = [beta * (values[x].to(Float32) - decay * k_scale * sums[x][0]) for x in range(cfg.word_columns)]
        if group == 0:
            for x in cutlass.range_constexpr(cfg.word_columns):
                o = q_scale * (decay * sums[x][1] + qk * k_scale * u[x])
                output[request, 0, hv, places[x]] = o.to(output.element_type)
        u = [x * k_scale for x in u]
        for word, before, row in zip(words, s, rows, strict=True):
            self.advance(word, unpack(before, s_state.element_type), u, decay, s_kq[row, 0])
        cute.arch.fence_view_async_shared()
        cute.arch.sync_threads()
        for i in cutlass.range_constexpr(-(-cfg.K // THREADS)):
            row = tid + i * THREADS
            if row < cfg.K:
                destination = matrix[row, None].iterator + first_column
                bulk_store(destination, s_state[None, row].iterator, cfg.row_bytes)
        cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def prefetch(self, matrix, kq, v, gates, request, head, hv, first_column):
        """Bring what the block will read to L2 while the previous grid still runs: L2 is coherent."""
        cfg = self.config
        tid, _, _ = cute.arch.thread_idx()
        for i in cutlass.range_constexpr(-(-cfg.K // THREADS)):
            row = tid + i * THREADS
            if row < cfg.K:
                bulk_prefetch_l2(matrix[row, None].iterator + first_column, cfg.row_bytes)
        if tid == 0:
            for x in kq:
                step = L2_LINE_BYTES * 8 // x.element_type.width
                for column in cutlass.range_constexpr(0, cfg.K, step):
                    prefetch_l2(x[request, 0, head, None].iterator + column)
            prefetch_l2(v[request, 0, hv, None].iterator + first_column)
            for x in gates:
                prefetch_l2(x[request, 0, None].iterator + hv)

    def advance(self, word, s, u, decay, k):
        """Write d s + u k, a thread's columns of a row, to shared memory at `word`."""
        store_vector(word, [decay * x + y * k for x, y in zip(s, u, strict=True)], word.value_type)

    def column_sums(self, s, s_kq, rows):
        """[S^T k, S^T q] of each column of a thread, over its rows; s: by row and column."""
        sums = [[Float32(0.0), Float32(0.0)] for _ in s[0]]
        for values, row in zip(s, rows, strict=True):
            kq = [s_kq[row, e] for e in range(2)]
            for total, value in zip(sums, values, strict=True):
                for e in range(2):
                    total[e] += value * kq[e]
        return sums

    @cute.jit
    def stage(self, q, k, gates, scale, s_kq, s_gate, request, head):
        """The first warp writes k, q as given, their factors, q.k and the gates to shared memory."""
        cfg = self.config
        tid, _, _ = cute.arch.thread_idx()
        if tid < WARP_LANES:
            columns = [tid + WARP_LANES * j for j in range(cfg.K // WARP_LANES)]
            kx, qx = ([x[request, 0, head, c].to(Float32) for c in columns] for x in (k, q))
            for j in cutlass.range_constexpr(len(columns)):
                s_kq[columns[j], 0] = kx[j]
                s_kq[columns[j], 1] = qx[j]
            k_scale, q_scale = Float32(1.0), scale
            if cutlass.const_expr(cfg.use_qk_l2norm):
                k_scale = cute.math.rsqrt(cute.arch.warp_reduction_sum(dot(kx, kx)) + L2NORM_EPSILON)
                q_scale = cute.math.rsqrt(cute.arch.warp_reduction_sum(dot(qx, qx)) + L2NORM_EPSILON) * scale
            qk = cute.arch.warp_reduction_sum(dot(kx, qx))
            stage_gates(gates, s_gate, tid, 1)
            if tid == 0:
                s_gate[K_SCALE] = k_scale
                s_gate[Q_SCALE] = q_scale
                s_gate[QK] = qk

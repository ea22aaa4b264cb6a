"""Gated delta rule for one token with a K-major state [B, HV, K, V], updated in place; SM90 and newer.

    p = S^T k      u = beta (v - d p)      o = scale (d S^T q + (q.k) u)      S <- d S + k u^T
A block owns `columns` columns of a head's state: bulk copies bring its rows to shared memory and back, and
each thread owns one column of a run of K / groups rows, so that only the sums of a column cross threads.
Grid: (V / columns, HV, B).
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int64
from cutlass.memory import SmemAllocator

from gdn_mtp.problem import L2NORM_EPSILON

from .config import GATE_COLUMNS, WARP_LANES
from .config_kmajor import THREADS, KMajorConfig
from .fragments import NUMERIC, bulk_load, bulk_store, dot
from .gates import BETA, DECAY, K_SCALE, Q_SCALE, QK, load_gates, stage_gates


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
        column, group = tid % cfg.columns, tid // cfg.columns
        first_column = v_block * cfg.columns
        if tid == 0:
            cute.arch.mbarrier_init(mbar, 1)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        if cutlass.const_expr(cfg.pdl):
            cute.arch.griddepcontrol_wait()
        matrix = state[request, hv, None, None]
        if tid == 0:
            cute.arch.mbarrier_arrive_and_expect_tx(mbar, cfg.tile_bytes)
        for i in cutlass.range_constexpr(-(-cfg.K // THREADS)):
            row = tid + i * THREADS
            if row < cfg.K:
                source = matrix[row, None].iterator + first_column
                bulk_load(s_state[None, row].iterator, source, cfg.columns * cfg.state_bytes, mbar)
        if cutlass.const_expr(cfg.tensor_scale):
            scale = scale[0]
        v_mine = v[request, 0, hv, first_column + column]
        self.stage(
            q,
            k,
            load_gates(a, b, A_log, dt_bias, request, hv, 0),
            scale,
            s_kq,
            s_gate,
            request,
            hv // (v.shape[2] // q.shape[2]),
        )
        cute.arch.sync_threads()
        cute.arch.mbarrier_wait(mbar, 0)
        run = cfg.K // cfg.groups
        s = [s_state[column, group * run + i].to(Float32) for i in range(run)]
        p, r = Float32(0.0), Float32(0.0)
        for i in cutlass.range_constexpr(run):
            p += s[i] * s_kq[group * run + i, 0]
            r += s[i] * s_kq[group * run + i, 1]
        if cutlass.const_expr(cfg.groups > 1):
            s_sums[column, group, 0] = p
            s_sums[column, group, 1] = r
            cute.arch.sync_threads()
            p, r = Float32(0.0), Float32(0.0)
            for i in cutlass.range_constexpr(cfg.groups):
                p += s_sums[column, i, 0]
                r += s_sums[column, i, 1]
        beta, decay, k_scale, q_scale, qk = (s_gate[x] for x in (BETA, DECAY, K_SCALE, Q_SCALE, QK))
        u = beta * (v_mine.to(Float32) - decay * k_scale * p)
        if group == 0:
            o = q_scale * (decay * r + qk * k_scale * u)
            output[request, 0, hv, first_column + column] = o.to(output.element_type)
        u = u * k_scale
        for i in cutlass.range_constexpr(run):
            updated = decay * s[i] + u * s_kq[group * run + i, 0]
            s_state[column, group * run + i] = updated.to(s_state.element_type)
        cute.arch.fence_view_async_shared()
        cute.arch.sync_threads()
        if cutlass.const_expr(cfg.pdl):
            cute.arch.griddepcontrol_launch_dependents()
        for i in cutlass.range_constexpr(-(-cfg.K // THREADS)):
            row = tid + i * THREADS
            if row < cfg.K:
                destination = matrix[row, None].iterator + first_column
                bulk_store(destination, s_state[None, row].iterator, cfg.columns * cfg.state_bytes)
        cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0, read=True)

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

"""Gated delta rule for one token with a K-major state [B, HV, K, V], updated in place; SM90 and newer.

    p = S^T k      u = beta (v - d p)      o = scale (d S^T q + (q.k) u)      S <- d S + k u^T
A block owns `columns` columns of a head's state, in registers from the load to the store. A thread has 16
bytes of every row of its group; the rows are dealt out among the groups, so only sums cross threads.
Grid: (V / columns, HV, B).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32
from cutlass.memory import SmemAllocator

from gdn_mtp.problem import L2NORM_EPSILON

from .config import GATE_COLUMNS, WARP_LANES
from .config_kmajor import AHEAD, KMajorConfig
from .fragments import NUMERIC, dot, load_shared, load_words, opaque, store_vector, unpack
from .gates import BETA, DECAY, K_SCALE, Q_SCALE, QK, load_gates, stage_gates
from .prefetch import bulk_prefetch_l2, out_of_the_way, prefetch_tokens
from .tiles import Place

SUM_VECTOR = 4  # float32 sums of a 16-byte access


@dataclass(frozen=True)
class Shared:
    """A block's shared memory, float32."""

    kq: Any  # k, q of every row side by side, as given
    sums: Any  # [warps, 2, columns]
    update: Any  # [columns]: u times the factor of k
    gate: Any  # [GATE_COLUMNS]


class GatedDeltaRuleKMajor:
    """The kernel of one `KMajorConfig`; calling it (traced) launches. Indices and intermediates are None."""

    def __init__(self, config: KMajorConfig):
        self.config = config
        self.state_dtype = NUMERIC[config.state_dtype]

    @cute.jit
    def __call__(
        self, q, k, v, a, b, A_log, dt_bias, scale, state, initial_state_indices, output_state_indices,
        intermediate_states_buffer, ssm_state_indices, output, stream,
    ):  # fmt: skip
        cfg = self.config
        self.kernel(q, k, v, a, b, A_log, dt_bias, scale, state, output).launch(
            grid=(cfg.V // cfg.tactic.columns, v.shape[2], v.shape[0]),
            block=(cfg.threads, 1, 1),
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
        shared = self.allocate()
        group = tid // cfg.row_threads
        column = tid % cfg.row_threads * cfg.vector_elements
        first_column = v_block * cfg.tactic.columns
        head = hv // (v.shape[2] // q.shape[2])
        matrix = state[request, hv, None, None]
        if cutlass.const_expr(cfg.pdl):
            if tid < WARP_LANES:
                here = Place(request, hv, None, first_column, 0, tid)
                prefetch_tokens(cfg, (q, k), v, (a, b), (A_log, dt_bias), here, head)
            if out_of_the_way(cfg, AHEAD):
                self.prefetch_state(matrix, v_block)
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
        at = cute.assume(first_column + column, divby=cfg.vector_elements)
        words = [load_words(self.vector_pointer(matrix, group, i, at)) for i in range(cfg.tactic.rows)]
        if cutlass.const_expr(cfg.tensor_scale):
            scale = scale[0]
        columns = [tid + first for first in range(0, cfg.tactic.columns, cfg.threads)]
        values = [v[request, 0, hv, first_column + cutlass.min(x, cfg.tactic.columns - 1)] for x in columns]
        gates = load_gates(a, b, A_log, dt_bias, request, hv, 0)
        self.stage(q, k, gates, scale, shared, request, head)
        cute.arch.sync_threads()
        self.share_sums(self.warp_sums(words, shared, group), shared, column)
        cute.arch.sync_threads()
        for x, value in zip(columns, values, strict=True):
            self.solve(value, shared, x, output[request, 0, hv, None], first_column)
        cute.arch.sync_threads()
        u = self.load_update(shared, column)
        group = opaque(group)  # else the addresses of all loads would be held
        decay = shared.gate[DECAY]
        for i, row_words in enumerate(words):
            key = shared.kq[2 * self.row(group, i)]
            after = [decay * x + key * y for x, y in zip(self.values(row_words), u, strict=True)]
            store_vector(self.vector_pointer(matrix, group, i, at), after, self.state_dtype)

    def allocate(self) -> Shared:
        cfg = self.config
        smem = SmemAllocator()

        def floats(count):
            return smem.allocate_tensor(Float32, cute.make_layout(count), 16)

        return Shared(
            kq=floats(2 * cfg.K),
            sums=floats(cfg.sums_floats),
            update=floats(cfg.tactic.columns),
            gate=floats(GATE_COLUMNS),
        )

    def row(self, group, i):
        """The row of the state that is number i of a group."""
        return group + self.config.groups * i

    def vector_pointer(self, matrix, group, i, column):
        """Where in `matrix` [K, V] the 16 bytes from `column` on are, of row number i of a group."""
        return matrix[self.row(group, i), None].iterator + column

    def values(self, words):
        """16 bytes of the state as float32 values."""
        return [x for word in words for x in unpack(word, self.state_dtype)]

    @cute.jit
    def prefetch_state(self, matrix, v_block):
        """Bring a share of the rows of `matrix` [K, V] to L2, if they lie one behind the other.

        The blocks of a head come at the same time, and rows in one piece come faster than their own columns.
        """
        cfg = self.config
        tid, _, _ = cute.arch.thread_idx()
        rows = cfg.K * cfg.tactic.columns // cfg.V
        if tid == 0 and matrix.stride[0] == cfg.V:
            bulk_prefetch_l2(matrix[v_block * rows, None].iterator, rows * cfg.V * cfg.state_bytes)

    def warp_sums(self, words, shared, group):
        """[S^T k, S^T q] of each column of a thread, over the rows of its warp."""
        cfg = self.config
        p, r = ([Float32(0.0)] * cfg.vector_elements for _ in range(2))
        for i, row_words in enumerate(words):
            key, query = load_shared(shared.kq, 2 * self.row(group, i), 2)
            s = self.values(row_words)
            p = [total + x * key for total, x in zip(p, s, strict=True)]
            r = [total + x * query for total, x in zip(r, s, strict=True)]
        for step in cfg.shuffle_steps:
            p, r = ([x + cute.arch.shuffle_sync_bfly(x, step) for x in sums] for sums in (p, r))
        return [p, r]

    @cute.jit
    def share_sums(self, sums, shared, column):
        """Write what `warp_sums` gave to shared memory."""
        cfg = self.config
        tid, _, _ = cute.arch.thread_idx()
        if tid % WARP_LANES < cfg.row_threads:
            for which in cutlass.range_constexpr(2):
                at = self.sums_offset(tid // WARP_LANES, which, column)
                for e in cutlass.range_constexpr(0, cfg.vector_elements, SUM_VECTOR):
                    target = shared.sums.iterator + cute.assume(at + e, divby=SUM_VECTOR)
                    store_vector(target, sums[which][e : e + SUM_VECTOR], Float32)

    def sums_offset(self, warp, which, column):
        """Where in `Shared.sums` the sum of a warp for a column is, S^T k (which = 0) or S^T q (1)."""
        return (2 * warp + which) * self.config.tactic.columns + column

    @cute.jit
    def solve(self, v, shared, column, output, first_column):
        """The update u of a column of the block, to shared memory, and its output; v is the column's."""
        cfg = self.config
        if column < cfg.tactic.columns:
            p, r = (
                reduce(add, [shared.sums[self.sums_offset(warp, which, column)] for warp in range(cfg.warps)])
                for which in range(2)
            )
            beta, decay, k_scale, q_scale, qk = (shared.gate[x] for x in (BETA, DECAY, K_SCALE, Q_SCALE, QK))
            u = beta * (v.to(Float32) - decay * k_scale * p) * k_scale
            output[first_column + column] = (q_scale * (decay * r + qk * u)).to(output.element_type)
            shared.update[column] = u

    def load_update(self, shared, column):
        """u times the factor of k, of each column of a thread."""
        return [
            x
            for e in range(0, self.config.vector_elements, SUM_VECTOR)
            for x in load_shared(shared.update, column + e, SUM_VECTOR)
        ]

    @cute.jit
    def stage(self, q, k, gates, scale, shared, request, head):
        """The first warp writes k, q as given, their factors, q.k and the gates to shared memory."""
        cfg = self.config
        tid, _, _ = cute.arch.thread_idx()
        if tid < WARP_LANES:
            columns = [tid + WARP_LANES * j for j in range(cfg.K // WARP_LANES)]
            kx, qx = ([x[request, 0, head, c].to(Float32) for c in columns] for x in (k, q))
            for j in cutlass.range_constexpr(len(columns)):
                shared.kq[2 * columns[j]] = kx[j]
                shared.kq[2 * columns[j] + 1] = qx[j]
            k_scale, q_scale = Float32(1.0), scale
            if cutlass.const_expr(cfg.use_qk_l2norm):
                k_scale = cute.math.rsqrt(cute.arch.warp_reduction_sum(dot(kx, kx)) + L2NORM_EPSILON)
                q_scale = cute.math.rsqrt(cute.arch.warp_reduction_sum(dot(qx, qx)) + L2NORM_EPSILON) * scale
            qk = cute.arch.warp_reduction_sum(dot(kx, qx))
            stage_gates(gates, shared.gate, tid, 1)
            if tid == 0:
                shared.gate[K_SCALE] = k_scale
                shared.gate[Q_SCALE] = q_scale
                shared.gate[QK] = qk
                shared.gate[GATE_COLUMNS - 1] = Float32(0.0)  # is read with the others, 16 bytes at once

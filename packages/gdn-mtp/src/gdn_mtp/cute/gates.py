"""Gates of the tokens: decay g = -exp(A_log) softplus(a + dt_bias) and beta = sigmoid(b), once per block."""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32

from .config import CHUNK_TOKENS, GATE_COLUMNS
from .fragments import select

# Columns of the table [T, GATE_COLUMNS] in shared memory. LOG_DECAY and CHUNK_DECAY accumulate from the start
# of the chunk; K_SCALE and Q_SCALE are what k and q are multiplied with; QK is q.k of a single token.
LOG_DECAY, DECAY, BETA, CHUNK_DECAY, K_SCALE, Q_SCALE, QK = range(7)

SOFTPLUS_LINEAR_ABOVE = 20.0


class GateInputs(NamedTuple):
    """float32 values of one token and value head."""

    a: Any
    b: Any
    a_log: Any
    dt_bias: Any


def load_gates(a, b, A_log, dt_bias, request, hv, t) -> GateInputs:
    """a, b [B, T, HV] of token t; A_log, dt_bias [HV]."""
    return GateInputs(
        *(x.to(Float32) for x in (a[request, t, hv], b[request, t, hv], A_log[hv], dt_bias[hv]))
    )


@cute.jit
def stage_gates(gates, table, lane, num_tokens):
    """Write the decays and beta of token `lane` to `table`; `num_tokens` (static) is at most a warp."""
    x = gates.a + gates.dt_bias
    softplus = select(x > SOFTPLUS_LINEAR_ABOVE, x, cute.math.log(1.0 + cute.math.exp(x)))
    log_decay = -cute.math.exp(gates.a_log) * softplus
    total = log_decay
    for i in cutlass.range_constexpr(CHUNK_TOKENS.bit_length() - 1):
        before = cute.arch.shuffle_sync_up(total, 1 << i)
        total = select(lane % CHUNK_TOKENS >= (1 << i), total + before, total)
    if lane < num_tokens:
        row = lane * GATE_COLUMNS
        table[row + LOG_DECAY] = total
        table[row + DECAY] = cute.math.exp(log_decay)
        table[row + BETA] = 1.0 / (1.0 + cute.math.exp(-gates.b))
        table[row + CHUNK_DECAY] = cute.math.exp(total)

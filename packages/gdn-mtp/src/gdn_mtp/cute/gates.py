"""Gates of the tokens: decay g = -exp(A_log) softplus(a + dt_bias) and beta = sigmoid(b), once per block."""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from .config import CHUNK_TOKENS, GATE_STRIDE, LOWEST_LOG_DECAY
from .fragments import opaque, select

# Columns of a table in shared memory, whose rows, one for each token, are GATE_STRIDE floats apart. LOG_DECAY
# and CHUNK_DECAY accumulate from the start of the chunk; K_SCALE and Q_SCALE are what k and q are multiplied
# with; QK is q.k of a single token.
LOG_DECAY, DECAY, BETA, CHUNK_DECAY, K_SCALE, Q_SCALE, QK = range(7)
PATH = DECAY  # in a table of `stage_path_gates`: the bits of an int32, one for each token on the path

SOFTPLUS_LINEAR_ABOVE = 20.0


class GateInputs(NamedTuple):
    """Values of one token and value head, as given: converting them would wait for them."""

    a: Any
    b: Any
    a_log: Any
    dt_bias: Any


def load_gates(a, b, A_log, dt_bias, request, hv, t) -> GateInputs:
    """a, b [B, T, HV] of token t; A_log, dt_bias [HV]."""
    return GateInputs(a[request, Int64(t), hv], b[request, Int64(t), hv], A_log[hv], dt_bias[hv])


def no_gates(gates) -> GateInputs:
    """Any values, for a warp that needs none; `gates` are the tensors a, b, A_log, dt_bias.

    Were they constants, the compiler would convert the other warp's gates where it loads them, and wait for
    them there.
    """
    unknown = opaque(Int32(0)).bitcast(Float32)
    return GateInputs(*(unknown.to(x.element_type) for x in gates))


@cute.jit
def stage_gates(gates, table, lane, num_tokens):
    """Write the decays and beta of token `lane` to `table`; `num_tokens` (static) is at most a warp."""
    log_decay = token_log_decay(gates)
    total = log_decay
    for i in cutlass.range_constexpr(CHUNK_TOKENS.bit_length() - 1):
        before = cute.arch.shuffle_sync_up(total, 1 << i)
        total = select(lane % CHUNK_TOKENS >= (1 << i), total + before, total)
    if lane < num_tokens:
        row = lane * GATE_STRIDE
        table[row + LOG_DECAY] = total
        table[row + DECAY] = cute.math.exp(log_decay)
        table[row + BETA] = token_beta(gates)
        table[row + CHUNK_DECAY] = cute.math.exp(total)


@cute.jit
def stage_path_gates(gates, parent, table, lane, num_tokens):
    """Write LOG_DECAY and CHUNK_DECAY along the path from the root, the token included, PATH and BETA.

    parent: of token `lane` in a tree (anything that is no earlier token: a root), None for a chain. Returns
    the token's own log decay.
    """
    log_decay = token_log_decay(gates)
    total = log_decay
    steps = (num_tokens - 1).bit_length()
    path = (Int32(2) << lane) - 1
    if cutlass.const_expr(parent is None):
        for i in cutlass.range_constexpr(steps):
            before = cute.arch.shuffle_sync_up(total, 1 << i)
            total = select(lane >= (1 << i), total + before, total)
    else:
        # After step i, `total` and `path` cover 2^(i + 1) tokens and `above` is the next one up, or negative.
        above = select((parent < lane) & (lane < num_tokens), parent, Int32(-1))
        path = Int32(1) << lane
        for _ in cutlass.range_constexpr(steps):
            source = cutlass.max(above, 0)
            sums, paths, next_above = (cute.arch.shuffle_sync(x, source) for x in (total, path, above))
            total = select(above >= 0, total + sums, total)
            path = select(above >= 0, path | paths, path)
            above = select(above >= 0, next_above, above)
    if lane < num_tokens:
        row = lane * GATE_STRIDE
        table[row + LOG_DECAY] = total
        table[row + PATH] = path.bitcast(Float32)
        table[row + BETA] = token_beta(gates)
        table[row + CHUNK_DECAY] = cute.math.exp(total)
    return log_decay


def token_log_decay(gates):
    """g = -exp(A_log) softplus(a + dt_bias), or what is low enough to forget everything; NaN stays.

    Decays between tokens are made from differences of sums of g. A lower one would leave no digits of the
    others in them, and an infinite one nothing but NaN.
    """
    x = gates.a.to(Float32) + gates.dt_bias.to(Float32)
    softplus = select(x > SOFTPLUS_LINEAR_ABOVE, x, cute.math.log(1.0 + cute.math.exp(x)))
    log_decay = -cute.math.exp(gates.a_log.to(Float32)) * softplus
    return select(log_decay < LOWEST_LOG_DECAY, Float32(LOWEST_LOG_DECAY), log_decay)


def token_beta(gates):
    """sigmoid(b)"""
    return 1.0 / (1.0 + cute.math.exp(-gates.b.to(Float32)))

"""What the V-major kernels share: tokens of a call in shared memory, and chunks of them against state tiles.

The chunk form, its operands and how lanes own them are in `kernel`.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from gdn_mtp.problem import L2NORM_EPSILON

from .config import (
    CHUNK_TOKENS,
    GATE_STRIDE,
    MATRICES_PER_CHUNK,
    MATRIX_FLOATS,
    MMA_ROWS,
    WARP_LANES,
    TokenTiles,
)
from .fragments import (
    dot,
    is_slot,
    load_shared,
    load_values,
    load_words,
    mma_bf16,
    mma_split,
    parts,
    read_index,
    select,
)
from .gates import BETA, CHUNK_DECAY, K_SCALE, Q_SCALE, QK
from .prefetch import bulk_prefetch_l2
from .tiles import TileCopies

# Matrices of a chunk in shared memory, [8, 8] each: L and q.k, in whose places come what turns w into u and
# what turns w into o.
LOWER, QUERY = SOLVE, READ = range(MATRICES_PER_CHUNK)


class TokenChunks(TileCopies):
    """The tokens of a call, in chunks of eight, and their products with tiles of the state."""

    def __init__(self, config: TokenTiles) -> None:
        super().__init__(config)
        self.exact_io = config.io_dtype != "float32"
        self.exact_state = config.state_dtype != "float32"

    def launch_dependents(self, here):
        """Let the next grid be scheduled, if `here` is where in the kernel the tactic has it."""
        if self.config.pdl and self.config.tactic.trigger == here:
            cute.arch.griddepcontrol_launch_dependents()

    # Global memory

    @cute.jit
    def prefetch_state(self, state, state_indices, place):
        """Bring this warp's rows of the state to L2.

        A state index may still change: it is used where it is a slot at all, and read again.
        """
        cfg = self.config
        slot = Int64(place.request)
        if cutlass.const_expr(state_indices is not None):
            slot = read_index(state_indices, place.request)
        if is_slot(slot, state.shape[0]):
            matrix = state[slot, place.hv, None, None]
            rows = cfg.tactic.tiles_per_warp * MMA_ROWS
            if cutlass.const_expr(not cfg.tactic.row_copies):
                if place.lane == 0:
                    bulk_prefetch_l2(matrix[place.row, None].iterator, rows * cfg.row_bytes)
            else:
                if place.lane < MMA_ROWS:
                    for tile in cutlass.range_constexpr(cfg.tactic.tiles_per_warp):
                        row = place.row + tile * MMA_ROWS + place.lane
                        bulk_prefetch_l2(matrix[row, None].iterator, cfg.row_bytes)

    def load_tokens(self, tensors, place, head, group=0):
        """This warp's tokens of a group as (k, q) pairs of K / 32 values a lane, clamped where it owns none.

        Values are as given: converting them would wait for them.
        """
        cfg = self.config
        tokens = []
        for i in cfg.token_groups[group]:
            t = cutlass.min(place.warp + i * cfg.tactic.warps, cfg.T - 1)
            columns = [place.lane + WARP_LANES * j for j in range(cfg.K // WARP_LANES)]
            row = (place.request, Int64(t), Int64(head))
            tokens.append(tuple([x[(*row, c)] for c in columns] for x in (tensors.k, tensors.q)))
        return tokens

    def load_v(self, tensors, place, row, c):
        """v of chunk c, as given: (row g, token 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)."""
        tokens = self.lane_tokens(place, c)
        rows = [row + place.row_in_tile(half) for half in range(2)]
        return [tensors.v[place.request, Int64(t), Int64(place.hv), r] for r in rows for t in tokens]

    def load_values(self, tensors, place, tile):
        """`load_v` of the early chunks for a tile of this warp."""
        row = self.tile_row(place, tile)
        return [self.load_v(tensors, place, row, c) for c in range(self.config.early_chunks)]

    @cute.jit
    def store_output(self, tensors, o, place, row, c):
        """Write o, in accumulator layout (packed: lanes t = 2, 3), of the tokens that exist."""
        t0, n = self.config.chunks[c]
        first = 2 * place.t
        if cutlass.const_expr(self.packed(c)):
            first = select(place.t < 2, Int32(n), 2 * place.t - 4)
        output = tensors.output[place.request, None, Int64(place.hv), None]
        for e in cutlass.range_constexpr(2):
            if first + e < n:
                for half in cutlass.range_constexpr(2):
                    value = o[2 * half + e].to(output.element_type)
                    output[Int64(t0 + first + e), row + place.row_in_tile(half)] = value

    @cute.jit
    def zero_output(self, tensors, place):
        """Write zeros to the rows of this warp for every token."""
        cfg = self.config
        rows = cfg.tactic.tiles_per_warp * MMA_ROWS
        for i in cutlass.range_constexpr(-(-cfg.T * rows // WARP_LANES)):
            e = place.lane + WARP_LANES * i
            if e < cfg.T * rows:
                zero = tensors.output.element_type(0.0)
                tensors.output[place.request, Int64(e // rows), Int64(place.hv), place.row + e % rows] = zero

    # Shared memory

    def token_offset(self, is_q, c, x):
        """Offset in shared.kq of k (or q) of token x (static or traced) of chunk c."""
        cfg = self.config
        token = cfg.chunks[c][0] + x + (cfg.T if is_q else 0)
        return token * cfg.token_stride + cfg.token_skew(x)

    def token_pointer(self, shared, offset):
        """k or q of a token, which lies at `offset` of shared.kq."""
        return shared.kq.iterator + cute.assume(offset, divby=4)

    @cute.jit
    def stage_tokens(self, tokens, scale, shared, place, group=0):
        """Write this warp's tokens of a group to shared memory as given, and the factors that scale them."""
        cfg = self.config
        for i in cutlass.range_constexpr(len(tokens)):
            t = place.warp + cfg.token_groups[group][i] * cfg.tactic.warps
            if t < cfg.T:
                token = [[value.to(Float32) for value in x] for x in tokens[i]]
                for is_q in cutlass.range_constexpr(2):
                    x = token[is_q]
                    staged = tokens[i][is_q] if cfg.bf16_tokens else x
                    offset = (t + is_q * cfg.T) * cfg.token_stride + cfg.token_skew(t & (CHUNK_TOKENS - 1))
                    for j in cutlass.range_constexpr(len(x)):
                        shared.kq[offset + place.lane + WARP_LANES * j] = staged[j]
                    if cutlass.const_expr(is_q == 0 and shared.pairs is not None):
                        self.stage_pairs(x, t, shared, place)
                    factor = Float32(1.0)
                    if cutlass.const_expr(cfg.use_qk_l2norm):
                        squares = cute.arch.warp_reduction_sum(dot(x, x))
                        factor = cute.math.rsqrt(squares + L2NORM_EPSILON, approx=True, ftz=True)
                    if cutlass.const_expr(is_q == 1):
                        factor = factor * scale
                    if place.lane == is_q:
                        shared.gate[t * GATE_STRIDE + K_SCALE + is_q] = factor
                if cutlass.const_expr(cfg.T == 1):
                    qk = cute.arch.warp_reduction_sum(dot(*token))
                    if place.lane == 0:
                        shared.gate[QK] = qk

    @cute.jit
    def stage_pairs(self, k, t, shared, place):
        """Write k of token t beside its neighbour's; of a last token without one, to both places."""
        cfg = self.config
        lane = place.lane
        column = (lane & ~3) + 2 * (lane % 2) + lane // 2 % 2
        offset = t // 2 * cfg.pairs_stride + 2 * column + t % 2
        for j in cutlass.range_constexpr(len(k)):
            shared.pairs[offset + 2 * WARP_LANES * j] = k[j]
        if t + 1 == cfg.T and t % 2 == 0:
            for j in cutlass.range_constexpr(len(k)):
                shared.pairs[offset + 2 * WARP_LANES * j + 1] = k[j]

    def gate(self, shared, t, column):
        return shared.gate[t * GATE_STRIDE + column]

    # Chunks of tokens

    def quads(self, t):
        """(column, index in s[half]) of each run of four columns that lane position t has."""
        vec = self.config.vector_elements
        return [
            ((4 * i + t) * vec + 4 * quad, vec * i + 4 * quad)
            for i in range(self.config.K // (4 * vec))
            for quad in range(vec // 4)
        ]

    def packed(self, c):
        """Whether k and q of chunk c share one operand: rows 0 to 3 are k of its tokens, rows 4 to 7 q."""
        return self.config.chunks[c][1] <= CHUNK_TOKENS // 2

    def lane_tokens(self, place, c):
        """The two tokens of chunk c whose values this lane has in an accumulator, clamped to the chunk."""
        t0, n = self.config.chunks[c]
        first = 2 * (place.t % 2 if self.packed(c) else place.t)
        return [t0 + cutlass.min(first + e, n - 1) for e in range(2)]

    @cute.jit
    def invert(self, shared, place, c):
        """One warp: from L and QUERY of chunk c, the matrices that turn w into u and o, in their places.

        SOLVE = (I + L)^-1 and READ = QUERY (I + L)^-1; packed, SOLVE is [[(I + L)^-1, 0], [READ, I]] in
        blocks of four tokens. Each group of eight lanes makes one or two rows of READ.
        """
        n = self.config.chunks[c][1]
        half = CHUNK_TOKENS // 2
        base = MATRICES_PER_CHUNK * c * MATRIX_FLOATS
        lower, query = solve, read = base + LOWER * MATRIX_FLOATS, base + QUERY * MATRIX_FLOATS
        column, group = place.lane % CHUNK_TOKENS, place.lane // CHUNK_TOKENS
        x = []
        for i in cutlass.range_constexpr(n):
            solved = select(column == i, Float32(1.0), Float32(0.0))
            for j in cutlass.range_constexpr(i):
                solved = solved - shared.matrices[lower + CHUNK_TOKENS * i + j] * x[j]
            x.append(solved)
        if cutlass.const_expr(self.packed(c)):
            x += [Float32(0.0)] * (half - n)
            unit = select(column == group + half, Float32(1.0), Float32(0.0))
            rows = [(solve + CHUNK_TOKENS * (group + half), unit + self.query_row(shared, query, group, x))]
        else:
            x += [Float32(0.0)] * (CHUNK_TOKENS - n)
            own = [2 * group + e for e in range(2)]
            rows = [(read + CHUNK_TOKENS * i, self.query_row(shared, query, i, x)) for i in own]
        cute.arch.sync_warp()
        if place.lane < CHUNK_TOKENS:
            for i in cutlass.range_constexpr(len(x)):
                shared.matrices[solve + CHUNK_TOKENS * i + column] = x[i]
        for first, value in rows:
            shared.matrices[first + column] = value

    def query_row(self, shared, query, row, x):
        """What row `row` of QUERY makes of a column x."""
        first = query + CHUNK_TOKENS * row
        count = CHUNK_TOKENS // 2
        parts_of_row = [load_shared(shared.matrices, first + i, count) for i in range(0, len(x), count)]
        return dot(x, [value for part in parts_of_row for value in part])

    def load_operand(self, shared, place, buffer):
        """A tile as `operand_products` takes it."""
        load = self.load_tile_words if self.config.bf16_products else self.load_tile
        return load(shared, place, buffer)

    def operand_products(self, operand, shared, place, c):
        """`state_products` of a tile that `load_operand` gave."""
        if self.config.bf16_products:
            return self.bf16_state_products(operand, shared, place, c)
        return self.state_products(operand, shared, place, c, self.exact_state)

    def state_products(self, s, shared, place, c, exact_state):
        """[S k_j, S q_j] of chunk c in accumulator layout: tokens 2t and 2t + 1 of rows g and g + 8.

        exact_state: whether tf32 holds s exactly, as it does bfloat16 from memory, but not what has advanced.
        Packed, it is one accumulator: lanes t = 0, 1 have S k_j of tokens 2t and 2t + 1, lanes t = 2, 3 have
        S q_j of tokens 2t - 4 and 2t - 3.
        """
        operands = self.token_operands(shared, place, c)
        chains = [[[Float32(0.0)] * 4 for _ in range(4)] for _ in operands]
        for column, at in self.quads(place.t):
            b = [load_values(x + cute.assume(column, divby=4), x.value_type, 4) for x in operands]
            for e in (0, 2):
                x = at + e
                a_parts = parts([s[0][x], s[1][x], s[0][x + 1], s[1][x + 1]], exact_state)
                for i in range(len(operands)):
                    b_parts = parts(b[i][e : e + 2], self.exact_io)
                    for low, a_part in enumerate(a_parts):
                        chains[i][e + low] = mma_split(chains[i][e + low], [a_part], b_parts[: 2 - low])
        return [sum_chains(x) for x in chains]

    def bf16_state_products(self, words, shared, place, c):
        """`state_products` of a tile as it is in memory."""
        operands = self.token_operands(shared, place, c)
        chains = [[[Float32(0.0)] * 4 for _ in range(2)] for _ in operands]
        for i, column in self.runs(place.t):
            rows = [x[4 * i : 4 * i + 4] for x in words]
            for x, pointer in zip(chains, operands, strict=True):
                add_products_bf16(x, i, rows, self.load_run(pointer + column))
        return [sum_chains(x) for x in chains]

    def token_operands(self, shared, place, c):
        """k and q of the token whose products this lane brings; packed, only one of them."""
        g = place.g
        mine = cutlass.min(g % 4 if self.packed(c) else g, self.config.chunks[c][1] - 1)
        offsets = [self.token_offset(False, c, mine), self.token_offset(True, c, mine)]
        if self.packed(c):
            offsets = [select(g < 4, *offsets)]
        return [self.token_pointer(shared, offset) for offset in offsets]

    def key_products(self, key, dtype, shared, place, c):
        """k_g.x_j and q_g.x_j of chunk c as an accumulator; `key` points to x_g, of `dtype`."""
        mine = cutlass.min(place.g, self.config.chunks[c][1] - 1)
        k, q = (self.token_pointer(shared, self.token_offset(x, c, mine)) for x in (False, True))
        if self.config.bf16_tokens:
            return self.bf16_key_products(key, k, q, place)
        chains = [[Float32(0.0)] * 4 for _ in range(4)]
        for i in range(self.config.K // 16):
            column = cute.assume(16 * i + 4 * place.t, divby=4)
            own_k, own_q = (load_values(x + column, x.value_type, 4) for x in (k, q))
            x = load_values(key + column, dtype, 4)
            for e in (0, 2):
                a_parts = parts([own_k[e], own_q[e], own_k[e + 1], own_q[e + 1]], self.exact_io)
                chain = (2 * i + e // 2) % 4
                chains[chain] = mma_split(chains[chain], a_parts, parts(x[e : e + 2], self.exact_io))
        return sum_chains(chains)

    def bf16_key_products(self, key, k, q, place):
        """`key_products` of bfloat16 keys at `key`, and k and q."""
        chains = [[Float32(0.0)] * 4 for _ in range(2)]
        for i, column in self.runs(place.t):
            rows = [self.load_run(x + column) for x in (k, q)]
            add_products_bf16(chains, i, rows, self.load_run(key + column))
        return sum_chains(chains)

    def runs(self, t):
        """(number, first column) of each run of columns, a vector of the state, that lane position t has."""
        vec = self.config.vector_elements
        return [(i, cute.assume(vec * (4 * i + t), divby=vec)) for i in range(self.config.K // (4 * vec))]

    def load_run(self, pointer):
        """A run of bfloat16 columns, two values a register."""
        return load_words(pointer, self.config.vector_elements // 2)

    def solve(self, products, v, shared, place, c):
        """(u, o) of chunk c as accumulators; packed, both are one, laid out as the products are."""
        return self.apply(self.weigh(products, v, shared, place, c), shared, place, c)

    def weigh(self, products, v, shared, place, c):
        """[w, D(t) scale S q_t] of chunk c as accumulators; packed, one, laid out as the products are."""
        tokens = self.lane_tokens(place, c)
        w, o = [None] * 4, [None] * 4
        for e in range(2):
            beta, decay, k_scale, q_scale = (
                self.gate(shared, tokens[e], x) for x in (BETA, CHUNK_DECAY, K_SCALE, Q_SCALE)
            )
            for x in (e, 2 + e):
                w[x] = beta * (v[x].to(Float32) - decay * k_scale * products[0][x])
                o[x] = decay * q_scale * products[-1][x]
        if self.packed(c):
            return [[select(place.t < 2, w[x], o[x]) for x in range(4)]]
        return [w, o]

    def apply(self, weighed, shared, place, c):
        """(u, o) of chunk c from what `weigh` gave; packed, both are one."""
        matrix = MATRICES_PER_CHUNK * c
        a_parts = parts(as_operand(weighed[0]), False)
        u = mma_split([Float32(0.0)] * 4, a_parts, self.matrix_parts(shared, place, matrix + SOLVE))
        if self.packed(c):
            return u, u
        return u, mma_split(weighed[1], a_parts, self.matrix_parts(shared, place, matrix + READ))

    def matrix_parts(self, shared, place, matrix):
        """Matrix number `matrix` (M, [8, 8]) as the second operand that gives M w from w."""
        offset = matrix * MATRIX_FLOATS
        values = load_shared(shared.matrices, offset + (CHUNK_TOKENS * place.g + 2 * place.t), 2)
        return parts(values, False)


def add_products_bf16(chains, run, rows, columns):
    """Add to accumulators in turn the products of a run of columns: of rows g and g + 8 with token g."""
    steps = len(columns) // 2
    for e in range(steps):
        chain = (run * steps + e) % len(chains)
        a = [row[x] for x in (2 * e, 2 * e + 1) for row in rows]
        chains[chain] = mma_bf16(chains[chain], a, columns[2 * e : 2 * e + 2])


def sum_chains(chains):
    """Two or four accumulators added up."""
    if len(chains) > 2:
        chains = [sum_chains(chains[:2]), sum_chains(chains[2:])]
    return [x + y for x, y in zip(*chains, strict=True)]


def as_operand(acc):
    """An accumulator over tokens (2t, 2t + 1) as a first operand whose contraction index runs over tokens."""
    return [acc[0], acc[2], acc[1], acc[3]]

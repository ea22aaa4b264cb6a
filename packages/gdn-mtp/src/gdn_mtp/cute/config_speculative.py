"""What a specialisation of the speculative kernels is compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .config import (
    CHUNK_TOKENS,
    GATE_COLUMNS,
    MATRICES_PER_CHUNK,
    MATRIX_FLOATS,
    WARP_LANES,
    Tactic,
    TokenTiles,
)

Mode = Literal["verify", "commit", "materialize"]
Accept = Literal["none", "counts", "nodes"]

MAX_CAPACITY = WARP_LANES  # a lane of a warp for each token of a ring


@dataclass(frozen=True)
class SpeculativeConfig(TokenTiles):
    """A specialisation of the kernel for pending tokens, dtypes by their torch names (`bfloat16`).

    mode: "verify" takes T new tokens and folds where it is due, "commit" folds, "materialize" writes the
    folded state elsewhere; T is 0 in the last two.
    capacity: tokens of a ring. accept: what says which tokens of the last window are accepted, their count,
    the indices of the nodes, or nothing (the window is dropped).
    variable_tokens: requests have a number of tokens each. tree: tokens have parents. debug: misuse traps.
    """

    mode: Mode
    T: int
    K: int
    V: int
    capacity: int
    io_dtype: str
    gate_dtype: str
    dt_bias_dtype: str
    out_dtype: str
    state_dtype: str
    index_dtype: str
    use_qk_l2norm: bool
    accept: Accept
    variable_tokens: bool
    tree: bool
    tensor_scale: bool
    debug: bool
    pdl: bool
    tactic: Tactic

    @property
    def pending_chunks(self) -> int:
        """Chunks that the pending tokens of a verify fill at most: its own tokens fit beside them."""
        return -(-(self.capacity - self.T) // CHUNK_TOKENS)

    @property
    def buffers_per_warp(self) -> int:
        """Tile buffers of a warp, one per tile."""
        return self.tactic.tiles_per_warp

    def pending_matrix(self, p: int, c: int) -> int:
        """Number of the first of two matrices: products of pending chunk p's keys with chunk c's k and q."""
        return MATRICES_PER_CHUNK * len(self.chunks) + 2 * (p * len(self.chunks) + c)

    @property
    def cross_matrix(self) -> int:
        """Number of the first of two matrices: L and QUERY of the second chunk's tokens with the first's."""
        return self.pending_matrix(self.pending_chunks, 0)

    @property
    def num_matrices(self) -> int:
        """Matrices in shared memory."""
        if self.mode != "verify":
            return 0
        return self.cross_matrix + 2 * (len(self.chunks) - 1)

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a block: tiles and barriers, tables of the pending, k and q, matrices, gates."""
        tiles = self.tactic.warps * self.tactic.tiles_per_warp * (self.buffer_bytes + 8)
        floats = 2 * WARP_LANES * self.tactic.warps + self.num_matrices * MATRIX_FLOATS
        floats += self.T * (2 * self.token_stride + GATE_COLUMNS)
        return tiles + 4 * floats

    @property
    def warps_per_sm(self) -> int:
        """168 or 255 registers per thread, enough for the compiler to spill none."""
        return 8 if len(self.chunks) > 1 else 12

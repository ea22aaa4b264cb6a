"""What a specialisation of the speculative kernels is compiled for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from gdn_mtp.speculative.problem import Accept, Mode

from .config import (
    CHUNK_TOKENS,
    GATE_STRIDE,
    MATRICES_PER_CHUNK,
    MATRIX_FLOATS,
    MBARRIER_BYTES,
    WARP_LANES,
    Tactic,
    TokenTiles,
)

RING_WEIGHTS = WARP_LANES + 4
REQUEST_WORDS = 4
FEW_WARPS = 20  # on a multiprocessor; docs/speed.md, "Blocks on an SM", has what is different with more


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
    smem_optin_bytes: int
    tactic: Tactic

    def __post_init__(self) -> None:
        assert self.ring_rows > 0, "a ring has room for a window beside the new one"
        assert self.tactic.ahead is None, "is of calls alone"
        assert self.warps & (self.warps - 1) == 0, "warps share pending chunks out by a mask"

    @property
    def bf16_tokens(self) -> bool:
        return self.io_dtype == "bfloat16"

    @property
    def pending_chunks(self) -> int:
        """Chunks that the pending tokens of a verify fill at most: its own tokens fit beside them."""
        return -(-self.ring_rows // CHUNK_TOKENS)

    @property
    def buffers_per_warp(self) -> int:
        """Tile buffers of a warp, one per tile."""
        return self.tactic.tiles_per_warp

    @property
    def ring_rows(self) -> int:
        """Pending tokens that a block has room for."""
        return self.capacity - self.T

    @property
    def io_bytes(self) -> int:
        """Bytes of an element of k."""
        return 4 if self.io_dtype == "float32" else 2

    @property
    def key_bytes(self) -> int:
        """Bytes of a key."""
        return self.K * self.io_bytes

    @property
    def update_bytes(self) -> int:
        """Bytes of a block's rows of u."""
        return 4 * self.tactic.rows

    @property
    def key_stride(self) -> int:
        """Elements from one pending key to the next in shared memory; the slack avoids bank conflicts."""
        return self.K + self.key_slack_bytes // self.io_bytes

    @property
    def key_slack_bytes(self) -> int:
        """Beside bfloat16 states keys are read in vectors of 16 bytes, beside others in shorter ones."""
        return 16 if self.bf16_products else 32

    @property
    def updates_floats(self) -> int:
        """Shared memory of the rows of u of all pending tokens."""
        return int(self.update_offset(self.ring_rows - 1)) + self.tactic.rows

    @property
    def ring_bytes(self) -> int:
        """Shared memory of the pending tokens; the slack does not follow the last."""
        keys = self.ring_rows * self.key_stride * self.io_bytes - self.key_slack_bytes
        return keys + 4 * self.updates_floats

    def update_offset(self, rank: Any) -> Any:
        """Floats before the rows of u of a pending token in shared memory; also of a traced integer.

        Pairs of tokens start in banks 0, 4, 16 and 20, and so on again: a warp reads two rows a lane, of
        every other of eight tokens, and those of odd g are eight banks after those of even g.
        """
        return self.tactic.rows * rank + 4 * (rank >> 1 & 1) + 16 * (rank >> 2)

    @property
    def matrices_per_product(self) -> int:
        """Matrices of the products of one chunk's k and q with other keys: packed, one has both."""
        return 1 if self.T <= CHUNK_TOKENS // 2 else 2

    def pending_matrix(self, p: int, c: int) -> int:
        """Number of the first matrix of products of pending chunk p's keys with chunk c's k and q."""
        number = p * len(self.chunks) + c
        return MATRICES_PER_CHUNK * len(self.chunks) + self.matrices_per_product * number

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
    def used_smem_bytes(self) -> int:
        """What a block uses: tiles, k and q, matrices, gates, its request, pending tokens, barriers."""
        floats = REQUEST_WORDS + RING_WEIGHTS + self.num_matrices * MATRIX_FLOATS + self.T * GATE_STRIDE
        barriers = MBARRIER_BYTES * (self.warps * self.tactic.tiles_per_warp + 1)
        return self.tiles_bytes + self.token_bytes + 4 * floats + self.ring_bytes + barriers

    @property
    def renews_lane(self) -> bool:
        """Whether each further tile of a warp asks the hardware for the lane again.

        Addresses of such a tile are then made when it is due. From the lane that there is, the compiler makes
        them early and holds them, for which there are no registers.
        """
        return len(self.chunks) > 1 and self.state_dtype == "float32"

    @property
    def many_warps(self) -> bool:
        """Whether so many warps are to share a multiprocessor that registers and L2 lines are scarce."""
        return self.blocks_per_sm * self.warps > FEW_WARPS

    @property
    def one_reader(self) -> bool:
        """Whether one warp of a block reads slot and cursor, and shares them, or each does for itself.

        All blocks read the same few cache lines, one after the other.
        """
        return self.many_warps

    @property
    def prefetching_blocks(self) -> int:
        """Blocks per multiprocessor that bring their states to L2 while the previous grid ends.

        The others have the memory read once that grid has ended and the former are at work.
        """
        return max(1, min(FEW_WARPS // self.warps, self.blocks_per_sm))

    @property
    def is_twin(self) -> bool:
        cap = self.tactic.max_blocks_per_sm
        if cap is None:
            return False
        unlimited = replace(self, tactic=replace(self.tactic, max_blocks_per_sm=None))
        # `blocks_per_sm` fit at least, and more if the compiler takes fewer registers than it may.
        return unlimited.blocks_per_sm < cap or self.blocks_by_smem(self.used_smem_bytes) <= cap

    @property
    def warps_per_sm(self) -> int:
        cap = self.tactic.max_blocks_per_sm
        return self.most_warps_per_sm if cap is None else min(self.most_warps_per_sm, cap * self.warps)

    @property
    def most_warps_per_sm(self) -> int:
        """Leaves 72 to 255 registers per thread, so that the compiler spills none; without a limit."""
        if len(self.chunks) > 1:
            warps = 16 if self.bf16_products else 8
        elif self.tactic.tiles_per_warp > 1:
            warps = 12 if self.tree else 16
        else:
            warps = 16
            if self.bf16_products and self.mode == "verify":
                warps = 28
                if self.T > CHUNK_TOKENS // 2 and (self.debug or self.K < 128):
                    warps = 20
                elif self.debug or self.tactic.row_copies:
                    warps = 24
        return warps - 4 if self.tactic.row_copies and warps > 8 else warps

"""What a specialisation of the K-major kernel is compiled for."""

from __future__ import annotations

from dataclasses import dataclass

from kernel_dispatch import Arch

from gdn_mtp.problem import GatedDeltaRuleProblem

from .config import GATE_COLUMNS, WARP_LANES, Config, fields_of

THREADS = 128
WORD_BYTES = 4


@dataclass(frozen=True)
class KMajorConfig(Config):
    """A specialisation of the K-major kernel.

    columns: columns of the state (V index) per thread block.
    """

    columns: int

    @classmethod
    def of(cls, problem: GatedDeltaRuleProblem, columns: int, arch: Arch) -> KMajorConfig:
        return cls(**fields_of(cls, problem, arch, columns=columns))

    @property
    def word_columns(self) -> int:
        """Columns of a thread, side by side in one word."""
        return WORD_BYTES // self.state_bytes

    @property
    def row_words(self) -> int:
        """Words in a block's part of a row, each of another thread."""
        return self.columns // self.word_columns

    @property
    def groups(self) -> int:
        """Threads that share columns, each with a run of K / groups rows."""
        return THREADS // self.row_words

    @property
    def row_bytes(self) -> int:
        """Bytes of a block's part of a row."""
        return self.columns * self.state_bytes

    @property
    def tile_bytes(self) -> int:
        """Bytes of a block's part of the state."""
        return self.K * self.row_bytes

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a block: its part of the state, the barrier, k and q, partial sums, gates."""
        sums = 2 * self.columns * self.groups
        return self.tile_bytes + 8 + 4 * (2 * self.K + sums + GATE_COLUMNS)

    @property
    def warps(self) -> int:
        return THREADS // WARP_LANES

    @property
    def warps_per_sm(self) -> int:
        """80 to 168 registers per thread, enough for the compiler to spill none."""
        if self.K // self.groups > 32:
            return 16 if self.word_columns == 1 else 12
        return 24 if self.K <= 128 else 20

"""What a specialisation of the K-major kernel is compiled for."""

from __future__ import annotations

from dataclasses import dataclass

from kernel_dispatch import Arch

from gdn_mtp.problem import GatedDeltaRuleProblem

from .config import GATE_COLUMNS, WARP_LANES, Config, fields_of

THREADS = 128


@dataclass(frozen=True)
class KMajorConfig(Config):
    """A specialisation of the K-major kernel.

    columns: columns of the state (V index) per thread block; THREADS / columns threads share one.
    """

    columns: int

    @classmethod
    def of(cls, problem: GatedDeltaRuleProblem, columns: int, arch: Arch) -> KMajorConfig:
        return cls(**fields_of(cls, problem, arch, columns=columns))

    @property
    def groups(self) -> int:
        """Threads that share a column, each with a run of K / groups rows."""
        return THREADS // self.columns

    @property
    def tile_bytes(self) -> int:
        """Bytes of a block's part of the state."""
        return self.K * self.columns * self.state_bytes

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a block: its part of the state, the barrier, k and q, partial sums, gates."""
        return self.tile_bytes + 8 + 4 * (2 * self.K + 2 * THREADS + GATE_COLUMNS)

    @property
    def warps(self) -> int:
        return THREADS // WARP_LANES

    @property
    def warps_per_sm(self) -> int:
        """80 registers per thread, 128 where a thread holds more than 32 rows."""
        return 24 if self.K // self.groups <= 32 else 16

"""What a specialisation of the K-major kernel is compiled for."""

from __future__ import annotations

from dataclasses import dataclass

from kernel_dispatch import Arch

from gdn_mtp.problem import GatedDeltaRuleProblem

from .config import GATE_COLUMNS, WARP_LANES, Config, fields_of

REGISTERS_PER_SM = 65536
AHEAD = 1  # as `Tactic.ahead`: 2 % faster than 0 at B = 16 on an H100, November 2026


@dataclass(frozen=True)
class KMajorTactic:
    """How thread blocks divide a head's state.

    columns: columns of the state (V index) per block. rows: rows of which a thread has 16 bytes each.
    """

    columns: int
    rows: int

    @property
    def name(self) -> str:
        """`c64r16`"""
        return f"c{self.columns}r{self.rows}"


@dataclass(frozen=True)
class KMajorConfig(Config):
    """A specialisation of the K-major kernel."""

    tactic: KMajorTactic

    @classmethod
    def of(cls, problem: GatedDeltaRuleProblem, tactic: KMajorTactic, arch: Arch) -> KMajorConfig:
        return cls(**fields_of(cls, problem, arch, tactic=tactic))

    @property
    def row_threads(self) -> int:
        """Threads side by side in a block's part of a row."""
        return self.tactic.columns // self.vector_elements

    @property
    def groups(self) -> int:
        """Groups of threads that the rows are dealt out among."""
        return self.K // self.tactic.rows

    @property
    def threads(self) -> int:
        return self.row_threads * self.groups

    @property
    def warps(self) -> int:
        return self.threads // WARP_LANES

    @property
    def rows_may_lie_apart(self) -> bool:
        return True

    @property
    def shuffle_steps(self) -> tuple[int, ...]:
        """Distances between lanes of a warp that share columns, each with other rows."""
        doublings = (WARP_LANES // self.row_threads).bit_length() - 1
        return tuple(self.row_threads << i for i in range(doublings))

    @property
    def sums_floats(self) -> int:
        """Sums of all warps in shared memory: two for each column."""
        return self.warps * 2 * self.tactic.columns

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a block: k and q, sums, u, gates."""
        return 4 * (2 * self.K + self.sums_floats + self.tactic.columns + GATE_COLUMNS)

    @property
    def registers(self) -> int:
        """Registers of a thread, enough for the compiler to spill none: four for each row and the rest."""
        return 4 * self.tactic.rows + (64 if self.state_bytes == 4 else 88)

    @property
    def warps_per_sm(self) -> int:
        return REGISTERS_PER_SM // (WARP_LANES * self.registers)

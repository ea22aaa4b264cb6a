"""The CuTe DSL kernels as `kernel_dispatch` sees them: the tactics of a problem, and how to prepare one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from kernel_dispatch import Arch

from gdn_mtp.problem import GatedDeltaRuleProblem

from .compile import load
from .config import CHUNK_TOKENS, MMA_ROWS, Config, KernelConfig, Tactic
from .config_kmajor import KMajorConfig

# Every tactic of the V-major kernel. On an H100 80GB HBM3 (2026-11-21), of 1, 2, 4 and 8 warps and 1, 2 and 4
# tiles no other was the fastest for any batch.
TACTICS = {
    tactic.name: tactic
    for tactic in (
        Tactic(1, 1),
        Tactic(2, 1),
        Tactic(4, 1),
        Tactic(4, 2),
        Tactic(1, 1, row_copies=True),
        Tactic(2, 1, row_copies=True),
        Tactic(4, 1, row_copies=True),
    )
}
KMAJOR_COLUMNS = {"c32": 32, "c64": 64}
MAX_KMAJOR_RUN = 64  # rows of the state that a thread of the K-major kernel holds in registers

# (tiles of 16 rows per SM, at most, tactic), by (more than four tokens, every state stored)
HEURISTIC: dict[tuple[bool, bool], tuple[tuple[float, str], ...]] = {
    (False, False): ((24, "w2t1"), (float("inf"), "w4t1")),
    (True, False): ((24, "w2t1"), (float("inf"), "w4t1")),
    (False, True): ((float("inf"), "w1t1"),),
    (True, True): ((4, "w2t1r"), (float("inf"), "w4t1r")),
}
KMAJOR_HEURISTIC: tuple[tuple[float, str], ...] = ((24.0, "c32"), (float("inf"), "c64"))


class GatedDeltaRuleKernels:
    """The kernels behind the provider `cute`; none needs a workspace."""

    def workspace_nbytes(self, problem: GatedDeltaRuleProblem, arch: Arch) -> int:
        """None is needed."""
        return 0

    def tactics(self, problem: GatedDeltaRuleProblem, arch: Arch) -> Sequence[str]:
        """The tactics that fit, the heuristic's choice first."""
        fitting = [name for name in self._names(problem) if self._fits(problem, arch, name)]
        tiles_per_sm = problem.B * problem.HV * problem.V / MMA_ROWS / arch.sm_count
        if problem.state_layout == "kv":
            rows = KMAJOR_HEURISTIC
        else:
            rows = HEURISTIC[problem.T > CHUNK_TOKENS // 2, problem.intermediate != "none"]
        preferred = next(name for limit, name in rows if tiles_per_sm <= limit)
        if preferred not in fitting and f"{preferred}r" in fitting:
            preferred = f"{preferred}r"
        return sorted(fitting, key=lambda name: name != preferred)

    def prepare(
        self, problem: GatedDeltaRuleProblem, arch: Arch, device: torch.device, tactic: str
    ) -> Callable[..., None]:
        """The launcher of one tactic, compiled first if it is not in the compile cache."""
        return load(self.config(problem, arch, tactic), arch.name)

    def _names(self, problem: GatedDeltaRuleProblem) -> Sequence[str]:
        return tuple(KMAJOR_COLUMNS if problem.state_layout == "kv" else TACTICS)

    def config(self, problem: GatedDeltaRuleProblem, arch: Arch, tactic: str) -> Config:
        """What the kernel of one tactic is compiled for."""
        if problem.state_layout == "kv":
            return KMajorConfig.of(problem, KMAJOR_COLUMNS[tactic], arch.supports_pdl)
        return KernelConfig.of(problem, TACTICS[tactic], arch.supports_pdl)

    def _fits(self, problem: GatedDeltaRuleProblem, arch: Arch, name: str) -> bool:
        config = self.config(problem, arch, name)
        if config.smem_bytes > arch.smem_optin_bytes:
            return False
        if isinstance(config, KMajorConfig):
            return problem.V % config.columns == 0 and config.K // config.groups <= MAX_KMAJOR_RUN
        assert isinstance(config, KernelConfig)
        if problem.state_rows != "contiguous" and not config.tactic.row_copies:
            return False
        return problem.V % config.tactic.rows == 0


KERNELS = GatedDeltaRuleKernels()

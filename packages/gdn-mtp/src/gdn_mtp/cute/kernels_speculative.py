"""The speculative kernels as `kernel_dispatch` sees them: the tactics of a problem, and preparing one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from kernel_dispatch import Arch

from gdn_mtp.speculative.problem import SpeculativeProblem

from .compile import FUNCTION
from .config import CHUNK_TOKENS, MMA_ROWS, Tactic
from .config_speculative import SpeculativeConfig

# `bench_gdn_spec.py --tactics` times them.
TACTICS = {
    tactic.name: tactic
    for tactic in (
        Tactic(4, 1),
        Tactic(4, 2),
        Tactic(2, 1, row_copies=True),
        Tactic(4, 1, row_copies=True),
        Tactic(4, 1, trigger="early"),
        Tactic(2, 1, trigger="start"),
        Tactic(2, 2, trigger="start"),
        Tactic(4, 1, trigger="start"),
        Tactic(4, 2, trigger="start"),
    )
}

# (tiles of 16 rows per SM, at most, tactic) by regime: H100 80GB HBM3, November 2026, 16 key and 32 value
# heads, batches of 1, 4, 32, 64 and 256
NO_LIMIT = float("inf")
HEURISTIC: dict[str, tuple[tuple[float, str], ...]] = {
    "short": ((NO_LIMIT, "w4t1s"),),
    "long": ((16, "w4t1s"), (NO_LIMIT, "w4t2s")),
}


def regime(problem: SpeculativeProblem) -> str:
    """The key of a problem in `HEURISTIC`: "long" where a block does much beside moving the state."""
    short = problem.state_dtype == torch.float32 and problem.T <= CHUNK_TOKENS // 2
    return "short" if short or problem.mode != "verify" else "long"


class SpeculativeKernels:
    """The kernels behind the provider `cute`; none needs a workspace."""

    def workspace_nbytes(self, problem: SpeculativeProblem, arch: Arch) -> int:
        """None is needed."""
        return 0

    def tactics(self, problem: SpeculativeProblem, arch: Arch) -> Sequence[str]:
        """The tactics that fit, the heuristic's choice first."""
        fitting = [name for name in TACTICS if self._fits(problem, arch, name)]
        tiles_per_sm = problem.B * problem.HV * problem.V / MMA_ROWS / arch.sm_count
        preferred = next(name for limit, name in HEURISTIC[regime(problem)] if tiles_per_sm <= limit)
        if preferred not in fitting:
            preferred = next((name for name in fitting if name.startswith(preferred[:2])), preferred)
        return sorted(fitting, key=lambda name: name != preferred)

    def prepare(
        self, problem: SpeculativeProblem, arch: Arch, device: torch.device, tactic: str
    ) -> Callable[..., None]:
        """The launcher of one tactic, compiled first if it is not in the compile cache."""
        launcher = FUNCTION.load(self.config(problem, arch, tactic), arch.name)
        if problem.mode != "commit":
            return launcher
        return lambda *tensors: launcher(*tensors, None)  # writes no states elsewhere

    def config(self, problem: SpeculativeProblem, arch: Arch, tactic: str) -> SpeculativeConfig:
        """What the kernel of one tactic is compiled for."""
        values: dict[str, Any] = {
            "pdl": arch.supports_pdl,
            "tactic": TACTICS[tactic],
            "sm_count": arch.sm_count,
        }
        for field in fields(SpeculativeConfig):
            if field.name not in values:
                value = getattr(problem, field.name)
                is_dtype = isinstance(value, torch.dtype)
                values[field.name] = str(value).removeprefix("torch.") if is_dtype else value
        return SpeculativeConfig(**values)

    def _fits(self, problem: SpeculativeProblem, arch: Arch, name: str) -> bool:
        config = self.config(problem, arch, name)
        if config.smem_bytes > arch.smem_optin_bytes:
            return False
        if problem.state_rows != "contiguous" and not config.tactic.row_copies:
            return False
        return problem.V % config.tactic.rows == 0


KERNELS = SpeculativeKernels()

"""The CuTe DSL kernels as `kernel_dispatch` sees them: the tactics of a problem, and how to prepare one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields

import torch
from kernel_dispatch import Arch

from gdn_mtp.problem import GatedDeltaRuleProblem, short_dtype
from gdn_mtp.speculative.problem import SpeculativeProblem

from .compile import FUNCTION
from .config import MMA_ROWS, Config, KernelConfig, Tactic
from .config_kmajor import KMajorConfig, KMajorTactic
from .config_speculative import SpeculativeConfig

# Every tactic of the V-major kernel; `bench_gdn_mtp.py --tactics` times them.
TACTICS = {
    tactic.name: tactic
    for tactic in (
        Tactic(1, 1, row_copies=True),
        Tactic(2, 1, row_copies=True),
        Tactic(4, 1, row_copies=True),
        Tactic(4, 1, trigger="early"),
        Tactic(2, 1, trigger="start"),
        Tactic(2, 1, trigger="start", ahead=2),
        Tactic(2, 1, trigger="start", ahead=2, max_blocks_per_sm=4),
        Tactic(2, 1, trigger="start", ahead=2, max_blocks_per_sm=7),
        Tactic(4, 1, trigger="start"),
        Tactic(4, 1, trigger="start", ahead=1),
        Tactic(4, 1, trigger="start", ahead=1, max_blocks_per_sm=2),
        Tactic(4, 1, trigger="start", ahead=2),
        Tactic(2, 1, evict_first=True),
        Tactic(4, 1, evict_first=True),
        Tactic(4, 2, evict_first=True),
        Tactic(4, 2, trigger="early", evict_first=True, ahead=1),
    )
}
# Every tactic of the K-major kernel
KMAJOR_TACTICS = {
    tactic.name: tactic for tactic in (KMajorTactic(64, 8), KMajorTactic(64, 16), KMajorTactic(128, 16))
}

# By the states that a call stores, for T of at most: for tiles of 16 rows per SM of at most: a tactic. From
# times on an H100 of T up to 8: benchmarks/results/gdn_mtp-h100-tactics. Another GPU only counts by its SMs;
# `kernel_dispatch.autotune` times its own.
NO_LIMIT = float("inf")
Rows = Mapping[float, str]
HEURISTIC: dict[str, dict[float, Rows]] = {
    "final fp32 state": {
        1: {NO_LIMIT: "w2t1sa2b4"},
        5: {3: "w2t1sa2b7", 6: "w4t1s", 12: "w2t1sa2b4", 300: "w2t1sa2b7", NO_LIMIT: "w2t1sa2b4"},
        7: {6: "w4t1s", 12: "w2t1sa2b4", 300: "w2t1sa2", NO_LIMIT: "w2t1sa2b4"},
        NO_LIMIT: {6: "w4t1s", 12: "w2t1sa2b4", NO_LIMIT: "w4t1sa1"},
    },
    "final bf16 state": {
        1: {12: "w4t1sa1b2", NO_LIMIT: "w4t1sa2"},
        4: {12: "w4t1s", 20: "w4t1sa2", 50: "w4t2efa1", NO_LIMIT: "w4t1sa2"},
        NO_LIMIT: {12: "w4t1s", 20: "w4t1sa1", 50: "w4t2efa1", NO_LIMIT: "w4t1sa1"},
    },
    "every fp32 state": {
        6: {4: "w2t1s", 8: "w2t1f", 40: "w4t2f", NO_LIMIT: "w4t1e"},
        NO_LIMIT: {4: "w4t1s", 8: "w2t1f", 100: "w4t2f", NO_LIMIT: "w4t1e"},
    },
    "every bf16 state": {
        6: {4: "w4t1s", 16: "w4t1f", 40: "w4t2f", NO_LIMIT: "w4t1e"},
        NO_LIMIT: {4: "w4t1s", 16: "w4t1f", 100: "w4t2f", NO_LIMIT: "w4t1e"},
    },
}
# For tiles of 16 rows per SM of at most: a tactic of K-major states, from
# benchmarks/results/gdn_mtp-h100-kmajor
KMAJOR_HEURISTIC: dict[torch.dtype, Rows] = {
    torch.float32: {3: "c64r16", 10: "c128r16", NO_LIMIT: "c64r16"},
    torch.bfloat16: {3: "c64r8", 10: "c128r16", 20: "c64r8", NO_LIMIT: "c128r16"},
}


def heuristic_rows(problem: GatedDeltaRuleProblem) -> Rows:
    """What `HEURISTIC` has for the states that a problem stores, and for its T."""
    stored = "final" if problem.intermediate == "none" else "every"
    by_tokens = HEURISTIC[f"{stored} {short_dtype(problem.state_dtype)} state"]
    return next(rows for limit, rows in by_tokens.items() if limit >= problem.T)


class GatedDeltaRuleKernels:
    """The kernels behind the provider `cute`; none needs a workspace."""

    def workspace_nbytes(self, problem: GatedDeltaRuleProblem, arch: Arch, tactic: str | None = None) -> int:
        """None is needed."""
        return 0

    def tactics(self, problem: GatedDeltaRuleProblem, arch: Arch) -> Sequence[str]:
        """The tactics that fit, the heuristic's choice first."""
        if problem.state_layout == "kv":
            return ranked_kmajor(problem, arch)
        configs = {name: KernelConfig.of(problem, tactic, arch) for name, tactic in TACTICS.items()}
        return ranked(problem, arch, configs, heuristic_rows(problem))

    def prepare(
        self, problem: GatedDeltaRuleProblem, arch: Arch, device: torch.device, tactic: str
    ) -> Callable[..., None]:
        """The launcher of one tactic, compiled first if it is not in the compile cache."""
        return FUNCTION.load(self.config(problem, arch, tactic), arch.name)

    def config(self, problem: GatedDeltaRuleProblem, arch: Arch, tactic: str) -> Config:
        """What the kernel of one tactic is compiled for."""
        if problem.state_layout == "kv":
            return KMajorConfig.of(problem, KMAJOR_TACTICS[tactic], arch)
        return KernelConfig.of(problem, TACTICS[tactic], arch)


def ranked_kmajor(problem: GatedDeltaRuleProblem, arch: Arch) -> Sequence[str]:
    """The K-major tactics that fit, the heuristic's choice first; others of a dtype are slower or spill."""
    rows = KMAJOR_HEURISTIC[problem.state_dtype]
    _, preferred = heuristic_row(problem, arch, rows)
    names = set(rows.values())
    fitting = [name for name, x in KMAJOR_TACTICS.items() if name in names and problem.V % x.columns == 0]
    return sorted(fitting, key=lambda name: name != preferred)


def ranked(
    problem: GatedDeltaRuleProblem | SpeculativeProblem,
    arch: Arch,
    configs: Mapping[str, KernelConfig | SpeculativeConfig],
    rows: Rows,
) -> Sequence[str]:
    """The tactics whose configurations fit, the heuristic's choice first, or what is nearest to it."""
    _, preferred = heuristic_row(problem, arch, rows)
    wanted = configs[preferred].tactic

    def distance(name: str) -> tuple[int, int]:
        tactic = configs[name].tactic
        others = sum(getattr(tactic, x.name) != getattr(wanted, x.name) for x in fields(tactic))
        return abs(tactic.warps - wanted.warps), others

    fitting = [name for name, config in configs.items() if _fits(problem, arch, config)]
    return sorted(fitting, key=distance)


def heuristic_row(
    problem: GatedDeltaRuleProblem | SpeculativeProblem, arch: Arch, rows: Rows
) -> tuple[float, str]:
    """The row that holds for a problem: the first whose limit is not exceeded."""
    tiles_per_sm = problem.B * problem.HV * problem.V / MMA_ROWS / arch.sm_count
    return next((limit, tactic) for limit, tactic in rows.items() if limit >= tiles_per_sm)


def _fits(
    problem: GatedDeltaRuleProblem | SpeculativeProblem, arch: Arch, config: KernelConfig | SpeculativeConfig
) -> bool:
    if config.smem_bytes > arch.smem_optin_bytes or not config.has_registers or config.is_twin:
        return False
    if problem.state_rows != "contiguous" and not config.tactic.row_copies:
        return False
    return problem.V % config.tactic.rows == 0


KERNELS = GatedDeltaRuleKernels()

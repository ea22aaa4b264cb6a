"""The CuTe DSL kernels as `kernel_dispatch` sees them: the tactics of a problem, and how to prepare one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields

import torch
from kernel_dispatch import Arch

from gdn_mtp.problem import GatedDeltaRuleProblem
from gdn_mtp.speculative.problem import SpeculativeProblem

from .compile import FUNCTION
from .config import MMA_ROWS, Config, KernelConfig, Tactic
from .config_kmajor import KMajorConfig, KMajorTactic
from .config_speculative import SpeculativeConfig

# Every tactic of the V-major kernel; `bench_gdn_mtp.py --tactics` times them.
TACTICS = {
    tactic.name: tactic
    for tactic in (
        *[Tactic(w, t, trigger=tr, ahead=a, max_blocks_per_sm=b)
          for w, t, tr, a, b in (
          (4,1,"start",None,None),(4,1,"early",None,None),(4,1,"early",1,None),(4,2,"early",None,None),(4,1,"start",None,2),
          (4,1,"start",1,None),(4,1,"start",2,None),(4,1,"start",1,2),(4,1,"start",1,3),
          (2,1,"start",None,None),(2,1,"start",1,None),(2,1,"start",2,None),(2,1,"start",3,None),(2,1,"start",2,4),(2,1,"start",1,3),(2,1,"start",6,None),(2,1,"start",2,7),
          (4,2,"start",None,None),(4,2,"start",1,None),(4,2,"start",2,None),(4,2,"early",1,None))],
        Tactic(1,1,row_copies=True),Tactic(2, 1, row_copies=True), Tactic(4, 1, row_copies=True),
        Tactic(2,1,evict_first=True),Tactic(4,1,evict_first=True),Tactic(4,2,evict_first=True),
        Tactic(2,1,trigger="early",evict_first=True,ahead=2),Tactic(4,1,trigger="early",evict_first=True,ahead=1),Tactic(4,2,trigger="early",evict_first=True,ahead=1),
        Tactic(4,1,trigger="start",evict_first=True,ahead=1),Tactic(4,2,trigger="start",evict_first=True,ahead=1),
    )
}
# Every tactic of the K-major kernel
KMAJOR_TACTICS = {
    tactic.name: tactic for tactic in (KMajorTactic(64, 8), KMajorTactic(64, 16), KMajorTactic(128, 16))
}

# (tiles of 16 rows per SM, at most, tactic) by regime, from times on an H100: benchmarks/results/
# gdn_mtp-h100-tactics. Another GPU only counts by its SMs; `kernel_dispatch.autotune` times its own.
NO_LIMIT = float("inf")
HEURISTIC: dict[str, tuple[tuple[float, str], ...]] = {
    "final state, one token": ((8, "w2t1s"), (20, "w4t1e"), (NO_LIMIT, "w4t1sa1b2")),
    "final state, few tokens": ((8, "w4t1s"), (20, "w4t1e"), (300, "w4t1e"), (NO_LIMIT, "w4t1sb2")),
    "final state, 5 or 8 tokens": ((4, "w4t1s"), (8, "w2t1s"), (300, "w4t1sa1"), (NO_LIMIT, "w4t1sb2")),
    "final state, many tokens": (
        (4, "w4t1s"),
        (8, "w2t1s"),
        (16, "w4t2s"),
        (300, "w4t1e"),
        (NO_LIMIT, "w4t1sb2"),
    ),
    "final bf16 state, one token": ((20, "w4t1s"), (40, "w4t2e"), (NO_LIMIT, "w4t1s")),
    "final bf16 state, few tokens": ((20, "w4t1s"), (40, "w4t2e"), (NO_LIMIT, "w4t1s")),
    "final bf16 state, 5 or 8 tokens": (
        (8, "w4t1s"),
        (20, "w4t1sa1"),
        (40, "w4t2e"),
        (100, "w4t1sa1"),
        (NO_LIMIT, "w4t1s"),
    ),
    "final bf16 state, many tokens": ((8, "w4t1s"), (20, "w4t2s"), (40, "w4t2e"), (NO_LIMIT, "w4t1s")),
    "every state, few tokens": ((4, "w2t1s"), (8, "w2t1f"), (40, "w4t2f"), (NO_LIMIT, "w4t1e")),
    "every state, many tokens": ((4, "w4t1s"), (8, "w2t1f"), (100, "w4t2f"), (NO_LIMIT, "w4t1e")),
    "every bf16 state, few tokens": ((4, "w4t1s"), (16, "w4t1f"), (40, "w4t2f"), (NO_LIMIT, "w4t1e")),
    "every bf16 state, many tokens": ((4, "w4t1s"), (16, "w4t1f"), (100, "w4t2f"), (NO_LIMIT, "w4t1e")),
}
# What the regimes call T, by what is stored. With the final state alone, three blocks per SM are faster
# with 5 and 8 tokens, and slower with 6 and 7; more than 8 have not been timed.
TOKENS = {
    "final": {1: "one token", 2: "few tokens", 3: "few tokens", 4: "few tokens"}
    | dict.fromkeys((5, 8), "5 or 8 tokens"),
    "every": dict.fromkeys(range(1, 7), "few tokens"),
}
# The same as `HEURISTIC` for K-major states, from benchmarks/results/gdn_mtp-h100-kmajor
KMAJOR_HEURISTIC: dict[torch.dtype, tuple[tuple[float, str], ...]] = {
    torch.float32: ((400, "c64r16"), (NO_LIMIT, "c128r16")),
    torch.bfloat16: ((32, "c64r8"), (NO_LIMIT, "c128r16")),
}


def regime(problem: GatedDeltaRuleProblem) -> str:
    """The key of a problem in `HEURISTIC`."""
    stored = "final" if problem.intermediate == "none" else "every"
    bf16 = "bf16 " if problem.state_dtype == torch.bfloat16 else ""
    return f"{stored} {bf16}state, {TOKENS[stored].get(problem.T, 'many tokens')}"


class GatedDeltaRuleKernels:
    """The kernels behind the provider `cute`; none needs a workspace."""

    def workspace_nbytes(self, problem: GatedDeltaRuleProblem, arch: Arch) -> int:
        """None is needed."""
        return 0

    def tactics(self, problem: GatedDeltaRuleProblem, arch: Arch) -> Sequence[str]:
        """The tactics that fit, the heuristic's choice first."""
        if problem.state_layout == "kv":
            return ranked_kmajor(problem, arch)
        configs = {name: KernelConfig.of(problem, tactic, arch) for name, tactic in TACTICS.items()}
        return ranked(problem, arch, configs, HEURISTIC[regime(problem)])

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
    heuristic = KMAJOR_HEURISTIC[problem.state_dtype]
    _, preferred = heuristic[heuristic_row(problem, arch, heuristic)]
    names = {name for _, name in heuristic}
    fitting = [name for name, x in KMAJOR_TACTICS.items() if name in names and problem.V % x.columns == 0]
    return sorted(fitting, key=lambda name: name != preferred)


def ranked(
    problem: GatedDeltaRuleProblem | SpeculativeProblem,
    arch: Arch,
    configs: Mapping[str, KernelConfig | SpeculativeConfig],
    heuristic: Sequence[tuple[float, str]],
) -> Sequence[str]:
    """The tactics whose configurations fit, the heuristic's choice first, or what is nearest to it."""
    _, preferred = heuristic[heuristic_row(problem, arch, heuristic)]
    wanted = configs[preferred].tactic

    def distance(name: str) -> tuple[int, int]:
        tactic = configs[name].tactic
        others = sum(getattr(tactic, x.name) != getattr(wanted, x.name) for x in fields(tactic))
        return abs(tactic.warps - wanted.warps), others

    fitting = [name for name, config in configs.items() if _fits(problem, arch, config)]
    return sorted(fitting, key=distance)


def heuristic_row(
    problem: GatedDeltaRuleProblem | SpeculativeProblem, arch: Arch, heuristic: Sequence[tuple[float, str]]
) -> int:
    """The number of the row of a regime that holds for a problem: the first whose limit is not exceeded."""
    tiles_per_sm = problem.B * problem.HV * problem.V / MMA_ROWS / arch.sm_count
    return next(row for row, (limit, _) in enumerate(heuristic) if tiles_per_sm <= limit)


def _fits(
    problem: GatedDeltaRuleProblem | SpeculativeProblem, arch: Arch, config: KernelConfig | SpeculativeConfig
) -> bool:
    if config.smem_bytes > arch.smem_optin_bytes or not config.has_registers or config.has_idle_cap:
        return False
    if problem.state_rows != "contiguous" and not config.tactic.row_copies:
        return False
    return problem.V % config.tactic.rows == 0


KERNELS = GatedDeltaRuleKernels()

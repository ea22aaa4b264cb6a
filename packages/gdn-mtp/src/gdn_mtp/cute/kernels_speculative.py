"""The speculative kernels as `kernel_dispatch` sees them: the tactics of a problem, and preparing one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from kernel_dispatch import Arch

from gdn_mtp.speculative.problem import SpeculativeProblem

from .compile import FUNCTION
from .config import CHUNK_TOKENS, Tactic, fields_of
from .config_speculative import SpeculativeConfig
from .kernels import NO_LIMIT, Rows, ranked

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
        *(Tactic(4, 1, trigger="start", max_blocks_per_sm=x) for x in (4, 5, 6, 7)),
        Tactic(4, 2, trigger="start"),
    )
}

# By regime, for tiles of 16 rows per SM of at most: a tactic. From times on an H100: benchmarks/results/
# gdn_spec-h100-tactics, but for one chunk at most, runs without a record (docs/speed.md, "Blocks on an SM")
HEURISTIC: dict[str, Rows] = {
    "fold": {NO_LIMIT: "w4t1s"},
    "one chunk": {NO_LIMIT: "w4t1sb4"},
    "half a chunk, bf16 state": {
        16: "w4t1s", 20: "w4t1sb5", 24: "w4t1sb6", 28: "w4t1sb7", 32: "w4t1s", 48: "w4t1sb6", 100: "w4t1sb7",
        NO_LIMIT: "w4t1s",
    },
    "one chunk, bf16 state": {
        8: "w4t1sb5", 16: "w4t1sb4", 20: "w4t1sb5", 24: "w4t1sb6", 28: "w4t1s", 36: "w4t1sb5", 64: "w4t1sb6",
        NO_LIMIT: "w4t1s",
    },
    "many chunks": {8: "w4t1s", NO_LIMIT: "w4t2s"},
    "many chunks, bf16 state": {100: "w4t1s", NO_LIMIT: "w4t2s"},
}  # fmt: skip


def regime(problem: SpeculativeProblem) -> str:
    """The key of a problem in `HEURISTIC`: of a verify by its tokens and the dtype of its states."""
    if problem.mode != "verify":
        return "fold"
    chunks = "many chunks" if problem.T > CHUNK_TOKENS else "one chunk"
    if problem.state_dtype != torch.bfloat16:
        return chunks
    return f"{'half a chunk' if 2 * problem.T <= CHUNK_TOKENS else chunks}, bf16 state"


class SpeculativeKernels:
    """The kernels behind the provider `cute`; none needs a workspace."""

    def workspace_nbytes(self, problem: SpeculativeProblem, arch: Arch, tactic: str | None = None) -> int:
        """None is needed."""
        return 0

    def tactics(self, problem: SpeculativeProblem, arch: Arch) -> Sequence[str]:
        """The tactics that fit, the heuristic's choice first."""
        configs = {name: self.config(problem, arch, name) for name in TACTICS}
        return ranked(problem, arch, configs, HEURISTIC[regime(problem)])

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
        return SpeculativeConfig(**fields_of(SpeculativeConfig, problem, arch, tactic=TACTICS[tactic]))


KERNELS = SpeculativeKernels()

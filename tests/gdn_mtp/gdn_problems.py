"""Problems of Qwen3-Next's sizes for tests of the kernels: what is chosen for them, compiled and run."""

from __future__ import annotations

from dataclasses import replace

import torch
from gdn_mtp.cute.kernels import HEURISTIC
from gdn_mtp.problem import GatedDeltaRuleProblem
from gdn_support import BF16, FP32
from kernel_dispatch import Arch

PROBLEM = GatedDeltaRuleProblem(
    B=8, T=4, H=16, HV=32, K=128, V=128,
    io_dtype=BF16, gate_dtype=BF16, dt_bias_dtype=FP32, out_dtype=BF16, state_dtype=FP32, state_layout="vk",
    use_qk_l2norm=True, update_state=True, intermediate="none", index_dtype=torch.int32,
    separate_write_indices=False,
)  # fmt: skip
KMAJOR = replace(PROBLEM, T=1, state_layout="kv", index_dtype=None)
FEW, SOME, MEDIUM, MANY = 1, 4, 16, 512  # batches whose tactics differ, from each other and from that of 8
HOPPER = Arch.from_name("sm_90a")
ARCHS = ("sm_90a", "sm_100a", "sm_103a", "sm_110a", "sm_120a", "sm_121a")
TACTICS_OF_HEURISTIC = {
    name for by_tokens in HEURISTIC.values() for rows in by_tokens.values() for name in rows.values()
}


def problem(**changes: object) -> GatedDeltaRuleProblem:
    """`PROBLEM` with some fields changed."""
    return replace(PROBLEM, **changes)

"""Gated DeltaNet decode and multi-token verify: `S <- exp(g) S + beta (v - exp(g) S k) k^T`, `o = scale S q`.

Importing this package neither touches CUDA nor imports a kernel language.
"""

from gdn_mtp.__about__ import __version__
from gdn_mtp.api import (
    gated_delta_rule_decode,
    gated_delta_rule_decode_pretranspose,
    gated_delta_rule_mtp,
)
from gdn_mtp.plans import Plan, plan
from gdn_mtp.problem import GatedDeltaRuleProblem
from gdn_mtp.reference import ReferenceResult, gated_delta_rule_reference
from gdn_mtp.speculative import (
    CommitPlan,
    MaterializePlan,
    SpeculativeCache,
    SpeculativePlan,
    SpeculativeProblem,
    VerifyPlan,
    commit,
    materialize,
    verify,
)

__all__ = [
    "CommitPlan",
    "GatedDeltaRuleProblem",
    "MaterializePlan",
    "Plan",
    "ReferenceResult",
    "SpeculativeCache",
    "SpeculativePlan",
    "SpeculativeProblem",
    "VerifyPlan",
    "__version__",
    "commit",
    "gated_delta_rule_decode",
    "gated_delta_rule_decode_pretranspose",
    "gated_delta_rule_mtp",
    "gated_delta_rule_reference",
    "materialize",
    "plan",
    "verify",
]

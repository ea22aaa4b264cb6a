"""Verify, accept and commit speculative tokens by compact updates instead of a state after every token."""

from gdn_mtp.speculative.api import commit, materialize, verify
from gdn_mtp.speculative.cache import CacheTensors, SpeculativeCache
from gdn_mtp.speculative.folding import FoldPolicy
from gdn_mtp.speculative.plans import CommitPlan, MaterializePlan, SpeculativePlan, VerifyPlan
from gdn_mtp.speculative.problem import SpeculativeProblem
from gdn_mtp.speculative.reference import SpeculativeReference

__all__ = [
    "CacheTensors",
    "CommitPlan",
    "FoldPolicy",
    "MaterializePlan",
    "SpeculativeCache",
    "SpeculativePlan",
    "SpeculativeProblem",
    "SpeculativeReference",
    "VerifyPlan",
    "commit",
    "materialize",
    "verify",
]

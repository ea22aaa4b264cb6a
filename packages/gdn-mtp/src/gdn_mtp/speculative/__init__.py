"""Verify, accept and commit speculative tokens by compact updates instead of a state after every token."""

from gdn_mtp.speculative.api import commit, materialize, verify
from gdn_mtp.speculative.cache import CacheTensors, SpeculativeCache
from gdn_mtp.speculative.folding import FoldPolicy
from gdn_mtp.speculative.problem import SpeculativeProblem
from gdn_mtp.speculative.reference import SpeculativeReference

__all__ = [
    "CacheTensors",
    "FoldPolicy",
    "SpeculativeCache",
    "SpeculativeProblem",
    "SpeculativeReference",
    "commit",
    "materialize",
    "verify",
]

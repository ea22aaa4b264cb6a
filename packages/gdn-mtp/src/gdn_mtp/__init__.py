"""Gated DeltaNet decode and multi-token verify."""

from gdn_mtp.__about__ import __version__
from gdn_mtp.problem import GatedDeltaRuleProblem

__all__ = ["GatedDeltaRuleProblem", "__version__"]

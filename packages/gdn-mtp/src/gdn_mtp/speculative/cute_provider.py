"""Registers the CuTe DSL kernels, for SM90 and newer; imports no kernel code and no compiler."""

from importlib.util import find_spec

from kernel_dispatch import Arch, Kernel, Provider

from gdn_mtp.cute_provider import ARCHS
from gdn_mtp.speculative.problem import SpeculativeProblem

HEAD_DIMS = (64, 128)
MAX_TOKENS = 16
KERNELS = "gdn_mtp.cute.kernels_speculative"


def _supports(problem: SpeculativeProblem, arch: Arch) -> str | None:
    if find_spec(KERNELS) is None:
        return f"this version has no {KERNELS}"
    for name in ("K", "V"):
        if getattr(problem, name) not in HEAD_DIMS:
            return f"{name} = {getattr(problem, name)}, the kernels have {', '.join(map(str, HEAD_DIMS))}"
    if problem.T > MAX_TOKENS:
        return f"T = {problem.T}, the kernels take at most {MAX_TOKENS} tokens"
    if problem.B > 65535 or problem.HV > 65535:
        return f"B = {problem.B}, HV = {problem.HV}, a grid has at most 65535 of each"
    if problem.state_rows == "any":
        return "the rows of the state are not 16-byte aligned"
    return None


def _load() -> Kernel:
    raise NotImplementedError


PROVIDER = Provider(name="cute", archs=ARCHS, supports=_supports, load=_load, priority=10)

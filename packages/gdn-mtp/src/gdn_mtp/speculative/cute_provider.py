"""Registers the CuTe DSL kernels, for SM90 and newer; imports no kernel code and no compiler."""

from kernel_dispatch import Arch, Kernel, Provider

from gdn_mtp.cute_provider import ARCHS, MAX_GRID
from gdn_mtp.speculative.problem import SpeculativeProblem

HEAD_DIMS = (64, 128)
MAX_TOKENS = 16


def _supports(problem: SpeculativeProblem, arch: Arch) -> str | None:
    for name in ("K", "V"):
        if getattr(problem, name) not in HEAD_DIMS:
            return f"{name} = {getattr(problem, name)}, the kernels have {', '.join(map(str, HEAD_DIMS))}"
    if problem.T > MAX_TOKENS:
        return f"T = {problem.T}, the kernels take at most {MAX_TOKENS} tokens"
    for name in ("B", "H"):
        if getattr(problem, name) > MAX_GRID:
            return f"{name} = {getattr(problem, name)}, the kernels take at most {MAX_GRID}"
    if problem.state_rows == "any":
        return "the rows of the state are not 16-byte aligned"
    return None


def _load() -> Kernel:
    from gdn_mtp.cute.kernels_speculative import KERNELS

    return KERNELS


PROVIDER = Provider(name="cute", archs=ARCHS, supports=_supports, load=_load, priority=10)

"""Registers the CuTe DSL kernels, for SM90 and newer; imports no kernel code and no compiler."""

from kernel_dispatch import Arch, Kernel, Provider

from gdn_mtp.problem import GatedDeltaRuleProblem

ARCHS = ("sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121")
HEAD_DIMS = (64, 128, 256)
MAX_TOKENS = 16
MAX_GRID = 65535  # blocks in the second and third dimension of a grid


def _supports(problem: GatedDeltaRuleProblem, arch: Arch) -> str | None:
    for name in ("K", "V"):
        if getattr(problem, name) not in HEAD_DIMS:
            return f"{name} = {getattr(problem, name)}, the kernels have {', '.join(map(str, HEAD_DIMS))}"
    if problem.T > MAX_TOKENS:
        return f"T = {problem.T}, the kernels take at most {MAX_TOKENS} tokens"
    heads = "HV" if problem.state_layout == "kv" else "H"
    for name in ("B", heads):
        if getattr(problem, name) > MAX_GRID:
            return f"{name} = {getattr(problem, name)}, the kernels take at most {MAX_GRID}"
    if problem.state_rows == "any":
        return "the rows of the state or of the intermediate states are not 16-byte aligned"
    if problem.state_layout == "kv":
        if problem.T > 1 or problem.intermediate != "none" or problem.index_dtype is not None:
            return "a K-major state is taken for T = 1 without state indices or intermediate states"
        if not problem.update_state:
            return "a K-major state is always updated"
    return None


def _load() -> Kernel:
    from gdn_mtp.cute.kernels import KERNELS

    return KERNELS


PROVIDER = Provider(name="cute", archs=ARCHS, supports=_supports, load=_load, priority=10)

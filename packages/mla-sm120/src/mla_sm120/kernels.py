"""The kernels as `kernel_dispatch` sees them: workspace, tactics, and how one is prepared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from kernel_dispatch import Arch, as_arch
from mla_core import DecodeProblem

from .config import DTYPE_UNITS, Division, Part, parts, tactics
from .launch import Launcher, Launchers, combine_name
from .load import find_cubin, load_kernel


class DecodeKernels:
    """The kernels behind the providers `sm120`, `sm121` and `sm90`."""

    def workspace_nbytes(self, problem: DecodeProblem, arch: Arch, tactic: str | None = None) -> int:
        """Partial results of a tactic; without one, of the tactic that needs the most."""
        names = tactics(problem) if tactic is None else (tactic,)
        needed = (part for name in names for part in parts(problem, arch, name))
        return max(part.division.partials.workspace_bytes for part in needed)

    def tactics(self, problem: DecodeProblem, arch: Arch) -> Sequence[str]:
        """The tile that fits the rows first.

        `-c2` has clusters of two blocks that merge their results; `-whole` does not split a request's keys,
        `-tail` divides requests that are left after whole waves as a call of their own.
        """
        return tactics(problem)

    def prepare(
        self, problem: DecodeProblem, arch: Arch, device: torch.device, tactic: str
    ) -> Callable[..., None]:
        """The launcher of a tactic. Loads its cubins, which are compiled first if there are none.

        Where `device` is no GPU of `arch`, as when kernels are compiled ahead, they are not loaded, and the
        launcher raises RuntimeError.
        """
        found = parts(problem, arch, tactic)
        if not torch.cuda.is_available() or as_arch(device).base != arch.base:
            units = {DTYPE_UNITS[problem.q_dtype]}
            units |= {"combine" for part in found if part.division.num_partials > 1}
            for unit in sorted(units):
                find_cubin(unit, arch.target)
            return partial(_refuse, f"mla-sm120: was prepared for {arch.target}, and {device} is no such GPU")
        return launchers(found, arch, device)


def launchers(parts_of_one: Sequence[Part], arch: Arch, device: torch.device) -> Launcher | Launchers:
    """What launches the parts of one call."""
    one, *others = (launcher(part.problem, part.division, arch, device, part.first) for part in parts_of_one)
    return Launchers((one, *others)) if others else one


def launcher(
    problem: DecodeProblem, division: Division, arch: Arch, device: torch.device, first_request: int = 0
) -> Launcher:
    """What launches a problem that is divided so. Loads the kernels, which are compiled first if need be.

    first_request: of a call, where the problem is the part of it that begins there.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    decode = load_kernel(DTYPE_UNITS[problem.q_dtype], division.kernel_name, arch.target, index)
    combine = None
    if division.num_partials > 1:
        name = combine_name(problem, division.num_partials, arch.sm_count)
        combine = load_kernel("combine", name, arch.target, index)
    pdl = arch.supports_pdl if problem.enable_pdl is None else problem.enable_pdl
    return Launcher(problem, division, decode, combine, index, pdl, first_request)


def _refuse(reason: str, *arguments: object) -> None:
    """What stands for a launcher where there is none."""
    raise RuntimeError(reason)


KERNELS = DecodeKernels()

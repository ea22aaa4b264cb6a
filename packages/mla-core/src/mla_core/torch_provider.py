"""Registration of the provider `torch`, the default where no kernel applies; imports no kernel code."""

from __future__ import annotations

from kernel_dispatch import Arch, Kernel, Provider

from .problem import DecodeProblem


def supports(problem: DecodeProblem, arch: Arch) -> str | None:
    """None, or why the problem is declined: only a required programmatic dependent launch is."""
    if problem.enable_pdl:
        return "enable_pdl=True, but PyTorch's own kernels cannot be launched as programmatic dependents"
    return None


def load() -> Kernel:
    """Import the implementation."""
    from .torch_kernel import TorchKernel

    return TorchKernel()


PROVIDER = Provider(name="torch", archs=("any",), supports=supports, load=load, priority=0)

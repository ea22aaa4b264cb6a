"""Registers the PyTorch implementation, which runs every problem on every device; imports no kernel code."""

from kernel_dispatch import Arch, Kernel, Provider

from gdn_mtp.speculative.problem import SpeculativeProblem


def _supports(problem: SpeculativeProblem, arch: Arch) -> str | None:
    return None


def _load() -> Kernel:
    from gdn_mtp.speculative.torch_kernel import KERNEL

    return KERNEL


PROVIDER = Provider(name="torch", archs=("any",), supports=_supports, load=_load, priority=0)

"""Registers the kernels for SM100, SM103 and SM110; imports no kernel code and no compiler."""

from kernel_dispatch import Kernel, Provider

from .config import can_implement

ARCHS = ("sm_100", "sm_103", "sm_110")  # B200 and GB200, B300 and GB300, Jetson Thor


def _load() -> Kernel:
    from .kernels import KERNELS

    return KERNELS


SM100 = Provider(name="sm100", archs=ARCHS, supports=can_implement, load=_load, priority=10)

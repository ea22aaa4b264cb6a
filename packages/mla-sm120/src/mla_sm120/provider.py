"""Registers the kernels for SM120, SM121 and, from the same sources, SM90; imports no CUDA library."""

from __future__ import annotations

from collections.abc import Callable

import torch
from kernel_dispatch import Arch, Kernel, Provider
from mla_core import DecodeProblem

from .config import objection

# Compute capability -> (GPUs, the first CUDA that compiles for it and runs it).
GPUS = {
    "sm_120": ("RTX PRO 6000 Blackwell and RTX 50 series", (12, 8)),
    "sm_121": ("DGX Spark (GB10)", (13, 0)),
    "sm_90": ("H100, H200 and GH200", (12, 8)),
}


def _needs(base: str) -> str:
    products, (major, minor) = GPUS[base]
    return f"compute capability {base[3:-1]}.{base[-1]}: {products}; CUDA {major}.{minor} or newer"


def _supports(base: str) -> Callable[[DecodeProblem, Arch], str | None]:
    def supports(problem: DecodeProblem, arch: Arch) -> str | None:
        _, needed = GPUS[base]
        version = torch.version.cuda  # None where PyTorch has no CUDA, which `explain` may be asked on
        if version is not None and tuple(int(part) for part in version.split(".")[:2]) < needed:
            return f"is for {_needs(base)}; this PyTorch has CUDA {version}"
        return objection(problem, arch)

    return supports


def _load() -> Kernel:
    from .kernels import KERNELS

    return KERNELS


def _provider(name: str, base: str) -> Provider:
    return Provider(
        name=name, archs=(base,), supports=_supports(base), load=_load, priority=10, needs=_needs(base)
    )


SM120 = _provider("sm120", "sm_120")
SM121 = _provider("sm121", "sm_121")
SM90 = _provider("sm90", "sm_90")

"""GPU architectures: compute capability, and the few hardware figures that planning and tuning read.

An `Arch` comes from a device (measured figures) or from a name (nominal figures of one product), so that
planning, compiling and `explain` work for a GPU that is not there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from .errors import ArgumentError, ArgumentTypeError

_KIB = 1024
_MIB = 1024 * 1024

# Opt-in shared memory per thread block: the capacity of an SM less the 1 KiB that CUDA reserves per block
# (CUDA programming guide, table of technical specifications per compute capability).
_SMEM_8_0_BYTES = 163 * _KIB
_SMEM_100_KIB_PARTS_BYTES = 99 * _KIB  # 8.6, 8.9 and 12.x
_SMEM_228_KIB_PARTS_BYTES = 227 * _KIB  # 9.0, 10.x and 11.0

# (major, minor) -> SMs, opt-in shared memory bytes, L2 bytes, memory GB/s of one product per architecture.
_NOMINAL: dict[tuple[int, int], tuple[int, int, int, int]] = {
    (8, 0): (108, _SMEM_8_0_BYTES, 40 * _MIB, 1555),  # A100 SXM4 40 GB, NVIDIA A100 whitepaper
    (8, 6): (82, _SMEM_100_KIB_PARTS_BYTES, 6 * _MIB, 936),  # GeForce RTX 3090, NVIDIA GA102 whitepaper
    (8, 9): (128, _SMEM_100_KIB_PARTS_BYTES, 72 * _MIB, 1008),  # GeForce RTX 4090, NVIDIA Ada whitepaper
    (9, 0): (132, _SMEM_228_KIB_PARTS_BYTES, 50 * _MIB, 3352),  # H100 SXM5, NVIDIA H100 whitepaper
    (10, 0): (148, _SMEM_228_KIB_PARTS_BYTES, 126 * _MIB, 8000),  # B200: NVIDIA Blackwell tuning guide (L2)
    # B300: only "up to 160 SMs" is published for the full chip; the figures of B200 stand in for the product.
    (10, 3): (148, _SMEM_228_KIB_PARTS_BYTES, 126 * _MIB, 8000),
    # Jetson AGX Thor: driver query, NVIDIA forum 356355
    (11, 0): (20, _SMEM_228_KIB_PARTS_BYTES, 32 * _MIB, 273),
    # GeForce RTX 5090, NVIDIA RTX Blackwell whitepaper
    (12, 0): (170, _SMEM_100_KIB_PARTS_BYTES, 96 * _MIB, 1792),
    (12, 1): (48, _SMEM_100_KIB_PARTS_BYTES, 24 * _MIB, 273),  # GB10 (DGX Spark), NVIDIA at Hot Chips 2025
}

_NAME = re.compile(r"sm_(?P<major>[1-9][0-9]?)(?P<minor>[0-9])(?P<suffix>[af]?)")
_FIRST_MAJOR_WITH_SUFFIX = {"a": 9, "f": 10}


@dataclass(frozen=True)
class Arch:
    """One GPU architecture, or the CPU.

    name: "sm_90a", "sm_121a" or "cpu".
    suffix: "a" (architecture-specific features), "f" (family-specific) or "".
    smem_optin_bytes: the most shared memory that one thread block may ask for.
    memory_gb_s: peak bandwidth of its memory, 1e9 bytes per second.
    The CPU has major 0, no shared memory, no figures of L2 and bandwidth, and counts as one SM.
    """

    name: str
    major: int
    minor: int
    suffix: str
    sm_count: int
    smem_optin_bytes: int
    l2_bytes: int
    memory_gb_s: float

    @property
    def base(self) -> str:
        """The name without its suffix, as providers list it: "sm_90", "sm_121" or "cpu"."""
        return f"sm_{self.major}{self.minor}" if self.is_gpu else self.name

    @property
    def target(self) -> str:
        """What to compile for: the name, with the suffix that a device of it has where the name has none."""
        return self.name if self.suffix else f"{self.name}{_device_suffix(self.major)}"

    @property
    def is_gpu(self) -> bool:
        """False for the CPU only."""
        return self.major > 0

    @property
    def supports_pdl(self) -> bool:
        """Whether programmatic dependent launch (griddepcontrol) exists: compute capability 9.0 and newer."""
        return self.major >= 9

    def __str__(self) -> str:
        if not self.is_gpu:
            return self.name
        return (
            f"{self.name} ({self.sm_count} SMs, {self.smem_optin_bytes // _KIB} KiB shared memory per block, "
            f"{self.l2_bytes / _MIB:.3g} MiB L2, {self.memory_gb_s:.0f} GB/s)"
        )

    @staticmethod
    def from_name(name: str) -> Arch:
        """The architecture called `name` with the nominal figures of one named product.

        `name` is "cpu", or "sm_" with the compute capability and an optional suffix: "sm_80", "sm_90a",
        "sm_100f". Raises ArgumentError naming `arch` for an unknown name or a suffix that does not exist.
        """
        if name == "cpu":
            return _CPU
        match = _NAME.fullmatch(name)
        capability = (int(match["major"]), int(match["minor"])) if match else None
        if match is None or capability not in _NOMINAL:
            known = ", ".join(_device_name(*known_capability) for known_capability in _NOMINAL)
            raise ArgumentError("arch", f"{name!r} is unknown, expected one of {known} or cpu")
        suffix = match["suffix"]
        if suffix and capability[0] < _FIRST_MAJOR_WITH_SUFFIX[suffix]:
            raise ArgumentError("arch", f"{name!r} does not exist, expected {name.removesuffix(suffix)!r}")
        return Arch(name, *capability, suffix, *_NOMINAL[capability])

    @staticmethod
    def from_device(device: torch.device) -> Arch:
        """The architecture of `device` with measured figures; cached per CUDA device index.

        A CUDA device without an index means the current one. From compute capability 9.0 on the name ends in
        "a", since a kernel built for a device in hand may use everything the device has. Raises ArgumentError
        naming `device` if it is neither an NVIDIA GPU nor the CPU, or where no GPU is available.
        """
        if device.type == "cpu":
            return _CPU
        if device.type != "cuda" or torch.version.hip is not None:
            raise ArgumentError("device", f"{device} is not supported, expected an NVIDIA GPU or the CPU")
        if not torch.cuda.is_available():
            raise ArgumentError("device", f"{device}, but no CUDA device is available")
        return _cuda_arch(torch.cuda.current_device() if device.index is None else device.index)


_CPU = Arch("cpu", major=0, minor=0, suffix="", sm_count=1, smem_optin_bytes=0, l2_bytes=0, memory_gb_s=0)


def as_arch(arch: Arch | str | torch.device | None) -> Arch:
    """`arch` as an Arch: a str is a name ("sm_121a", "cpu"), None the current CUDA device or else the CPU."""
    if isinstance(arch, Arch):
        return arch
    if isinstance(arch, str):
        return Arch.from_name(arch)
    if isinstance(arch, torch.device):
        return Arch.from_device(arch)
    if arch is None:
        return Arch.from_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    raise ArgumentTypeError("arch", f"{type(arch).__name__}, expected Arch, str, torch.device or None")


@cache
def _cuda_arch(index: int) -> Arch:
    properties: Any = torch.cuda.get_device_properties(index)  # the stubs lack shared_memory_per_block_optin
    return Arch(
        _device_name(properties.major, properties.minor),
        major=properties.major,
        minor=properties.minor,
        suffix=_device_suffix(properties.major),
        sm_count=properties.multi_processor_count,
        smem_optin_bytes=properties.shared_memory_per_block_optin,
        l2_bytes=properties.L2_cache_size,
        memory_gb_s=_memory_gb_s(properties),
    )


def _memory_gb_s(properties: Any) -> float:
    """Two transfers of the bus a clock; the nominal figure where PyTorch is too old to say that.

    Nor does the driver say it of memory that the GPU shares with the CPU.
    """
    clock_khz, bus_bits = (getattr(properties, name, 0) for name in ("memory_clock_rate", "memory_bus_width"))
    if clock_khz and bus_bits and not properties.is_integrated:
        return float(2 * clock_khz * 1e3 * bus_bits / 8 / 1e9)
    *_, nominal = _NOMINAL.get((properties.major, properties.minor), (0,))
    return nominal


def _device_name(major: int, minor: int) -> str:
    return f"sm_{major}{minor}{_device_suffix(major)}"


def _device_suffix(major: int) -> str:
    return "a" if major >= _FIRST_MAJOR_WITH_SUFFIX["a"] else ""

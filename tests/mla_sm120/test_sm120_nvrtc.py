"""What NVRTC makes of the sources where there is no cubin of a wheel."""

from __future__ import annotations

from pathlib import Path

import pytest
from kernel_testing import cubin_resources
from mla_sm120 import load, sources

LAUNCH_REGISTERS = 168  # as nvcc gives kernels of 64 rows: with fewer their warps would wait for ever
# Bytes of stack for SM120 and SM121 by NVRTC 13.5, where nvcc 13.0 needs none.
STACK = {"combine": 160, "decode_e4m3": 8}


def nvrtc() -> tuple[int, int] | None:
    """The version of NVRTC, None without it."""
    try:
        return load._nvrtc_version()
    except RuntimeError:
        return None


@pytest.mark.skipif(nvrtc() is None, reason="needs nvidia-cuda-nvrtc")
@pytest.mark.parametrize("arch", ["sm_90a", "sm_120a", "sm_121a"])
@pytest.mark.parametrize("unit", sources.UNITS)
def test_kernels_have_registers_enough(
    unit: str, arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if arch == "sm_121a" and nvrtc() < (13, 0):
        pytest.skip("SM121 needs CUDA 13")
    monkeypatch.setenv("KERNEL_DISPATCH_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv(load.OPTIONS_VARIABLE, raising=False)
    found = cubin_resources(load.compiled_cubin(unit, arch).read_bytes())
    assert found.stack_bytes <= (0 if arch == "sm_90a" else STACK.get(unit, 0))
    if unit != "combine":
        assert found.registers == LAUNCH_REGISTERS

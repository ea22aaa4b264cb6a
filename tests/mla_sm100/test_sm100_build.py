"""What the compiler makes of the kernels for every architecture: registers, stack, memory, instructions."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from kernel_dispatch import Arch
from kernel_testing import cubin_resources
from mla_sm100.config import SMEM_LIMIT_BYTES, THREADS, DecodeConfig
from mla_sm100.kernels import FUNCTION

ARCHS = ("sm_100a", "sm_103a", "sm_110a")
REGISTERS_PER_SM = 65536
OUT_DTYPES = {"bf16": "bf16", "fp16": "fp16", "e4m3": "bf16"}
PLAIN = DecodeConfig("bf16", "bf16", 64, pair=True)
CONFIGS = [
    DecodeConfig(dtype, OUT_DTYPES[dtype], 64, pair, return_lse=True, split=True, pdl=True)
    for dtype, pair in itertools.product(OUT_DTYPES, (True, False))
]
VARIANTS = [
    PLAIN,
    replace(PLAIN, page_size=16, split=True),
    replace(PLAIN, page_size=128, ragged=True, softmax_scale_is_tensor=True, output_scale_is_tensor=True),
    replace(PLAIN, pair=False, page_size=32, out_dtype="e4m3", ragged=True, split=True, pdl=True),
    replace(PLAIN, dtype="e4m3", out_dtype="e4m3", page_size=128),
    replace(PLAIN, dtype="e4m3", out_dtype="fp16", pair=False, page_size=16, output_scale_is_tensor=True),
]


def id_of(value: DecodeConfig | str) -> str:
    if isinstance(value, str):
        return value
    flags = [name for name, is_set in vars(value).items() if is_set is True]
    return "-".join([value.dtype, value.out_dtype, f"p{value.page_size}", *flags])


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("config", CONFIGS + VARIANTS, ids=id_of)
def test_everything_stays_in_registers(config: DecodeConfig, arch: str) -> None:
    """No stack frame, hence no spills; the registers of a block fit an SM."""
    resources = cubin_resources(FUNCTION.compiled(config, arch).cubin.read_bytes())
    assert resources.stack_bytes == 0
    assert resources.registers * THREADS <= REGISTERS_PER_SM
    assert config.smem_bytes <= SMEM_LIMIT_BYTES <= Arch.from_name(arch).smem_optin_bytes


@pytest.mark.parametrize("config", CONFIGS + VARIANTS, ids=id_of)
def test_instructions(config: DecodeConfig) -> None:
    ptx = FUNCTION.compiled(config, "sm_100a").ptx.read_text()
    kind = "kind::f8f6f4" if config.dtype == "e4m3" else "kind::f16"
    group, other = ("cta_group::2", "cta_group::1") if config.pair else ("cta_group::1", "cta_group::2")
    assert f"tcgen05.mma.{group}.{kind}" in ptx
    assert f"tcgen05.mma.{other}" not in ptx
    assert f"tcgen05.alloc.{group}" in ptx
    assert "tcgen05.ld." in ptx
    assert "cp.async.bulk.tensor" in ptx
    assert "ex2.approx" in ptx
    assert "mma.sync" not in ptx
    assert ptx.count(".visible .entry") == 1 + config.split
    assert ("griddepcontrol.wait" in ptx) == config.pdl
    assert ("griddepcontrol.launch_dependents" in ptx) == config.pdl

"""Runs a few lines of PTX on arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from emulator_recording import TYPES
from ptx_emulator.machine import LoadedModule, Machine, Result
from ptx_emulator.options import Options

_PRELUDE = """.version 8.8
.target {target}
.address_size 64
.extern .shared .align 1024 .b8 smem[];
{globals}
.visible .entry kernel({parameters}) {directives}
{{
.reg .pred %p<64>;
.reg .b16 %rs<64>;
.reg .b32 %r<512>;
.reg .f32 %f<512>;
.reg .b64 %rd<64>;
.reg .f64 %fd<64>;
.reg .b128 %rq<8>;
{loads}
mov.u32 %r1, %tid.x;
mul.wide.u32 %rd0, %r1, 4;
{body}
ret;
}}
"""


def kernel_text(
    body: str, num_arrays: int, target: str = "sm_90a", module_scope: str = "", directives: str = ""
) -> str:
    """A module with one kernel.

    `%rd1`, `%rd2`, … hold the arrays' addresses, `%r1` is %tid.x, `%rd0` is 4 * %tid.x.
    """
    names = [f"array{n}" for n in range(1, num_arrays + 1)]
    return _PRELUDE.format(
        target=target,
        globals=module_scope,
        directives=directives,
        parameters=", ".join(f".param .u64 {name}" for name in names),
        loads="\n".join(f"ld.param.u64 %rd{n}, [{name}];" for n, name in enumerate(names, 1)),
        body=body,
    )


def run_kernel(
    body: str,
    *arrays: np.ndarray | torch.Tensor,
    grid: tuple[int, int, int] = (1, 1, 1),
    block: tuple[int, int, int] = (32, 1, 1),
    cluster: tuple[int, int, int] = (1, 1, 1),
    target: str = "sm_90a",
    shared_bytes: int = 0,
    globals: str = "",
    directives: str = "",
    checks: bool = True,
    expect_reports: bool = False,
    initialised: bool = True,
    **options: Any,
) -> Result:
    """Runs a kernel body on arrays, which it changes in place.

    Args:
        expect_reports: return findings in `Result.reports` instead of raising them.
        initialised: False: reading of the arrays what the kernel has not written is a finding.
        options: of `Options`.
    """
    machine = Machine(target, Options(checks=checks, **options))
    module = LoadedModule(kernel_text(body, len(arrays), target, globals, directives), target)
    machine.attach(module)
    params = b""
    for number, array in enumerate(arrays, 1):
        memory = _bytes(array)
        address = memory.ctypes.data
        TYPES[address] = str(array.dtype).removeprefix("torch.")
        machine.add_range(f"array{number}", address, memory.nbytes, initialised=initialised)
        params += address.to_bytes(8, "little")
    machine.enqueue(module.kernel(), grid, block, cluster, shared_bytes, params)
    result = machine.synchronize()
    if not expect_reports:
        result.raise_reports()
    return result


def _bytes(array: np.ndarray | torch.Tensor) -> np.ndarray:
    """The memory of an array as bytes, not a copy."""
    if isinstance(array, torch.Tensor):
        assert array.is_contiguous()
        return array.reshape(-1).view(torch.uint8).numpy()
    assert array.flags.c_contiguous
    return array.reshape(-1).view(np.uint8)


def reports_of(body: str, *arrays: np.ndarray, **options: Any) -> str:
    """The reports of a kernel that has some, one a line."""
    result = run_kernel(body, *arrays, expect_reports=True, **options)
    return "\n".join(f"{report.kind}: {report.message}" for report in result.reports)

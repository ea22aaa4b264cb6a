"""How many registers a thread starts with, and whether a block of such threads fits a multiprocessor."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from ptx_emulator.options import MAX_REGISTERS, MIN_REGISTERS

_UNIT = 8  # registers per thread, that of a warp's allocation
_QUARTERS = 4  # of a multiprocessor, each with its own register file; warps are dealt out evenly
_OF_QUARTER = 16384 // 32  # registers per thread, of a quarter that runs one warp


def launch_registers(
    directives: Mapping[str, tuple[int, ...]], max_registers: int | None = None
) -> int | None:
    """Registers per thread of a kernel with `setmaxnreg`, as ptxas 13.0 gives them.

    They are the maximum, whatever the kernel needs. None: the maximum is not known, and ptxas drops
    `setmaxnreg` with a warning. That is so without `.maxnreg`, without both `.minnctapersm` and the size of
    the block, and without a maximum for the module, which does not count where the kernel has the size of
    the block alone.

    Args:
        directives: of the kernel, such as `maxnreg`.
        max_registers: of the module, the option `--maxrregcount` of ptxas.
    """
    threads = prod(directives.get("reqntid") or directives.get("maxntid") or (0,))
    blocks = prod(directives.get("minnctapersm") or (0,))
    limits = []
    if directives.get("maxnreg"):
        limits.append(directives["maxnreg"][0])
    if threads and blocks:
        limits.append(_OF_QUARTER // _warps_of_quarter(threads, blocks) // _UNIT * _UNIT)
    if max_registers is not None and not threads and not limits:
        limits.append(max_registers)
    return max(MIN_REGISTERS, min(MAX_REGISTERS, *limits)) if limits else None


def fits(registers: int, threads: int) -> bool:
    """Whether a block can be launched with so many registers per thread."""
    return -(-registers // _UNIT) * _UNIT * _warps_of_quarter(threads) <= _OF_QUARTER


def _warps_of_quarter(threads: int, blocks: int = 1) -> int:
    """The most warps that a quarter of a multiprocessor has of some blocks."""
    return -(-(-(-threads // 32) * blocks) // _QUARTERS)

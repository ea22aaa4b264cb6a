"""How launches are to be run."""

from __future__ import annotations

from dataclasses import dataclass

from ptx_emulator.errors import EmulatorError
from ptx_emulator.reports import KINDS

MIN_REGISTERS, MAX_REGISTERS = 24, 255  # that a thread may be launched with, of a kernel with setmaxnreg
WARP_POLICIES = {"fair": 0, "greedy": 1, "random": 2}
ASYNC_POLICIES = {"prompt": 0, "eager": 1, "late": 2, "random": 3}
SCHEDULES = {
    "fair": ("fair", "prompt"),
    "greedy": ("greedy", "eager"),
    "late": ("fair", "late"),
    "greedy-late": ("greedy", "late"),
    "random": ("random", "random"),
}


@dataclass(frozen=True)
class Options:
    """How launches are run.

    Args:
        checks: whether accesses are checked for races and for reads of what nobody wrote; costs two to four
            times the time. Bounds, alignment, barriers, divergence and deadlock are always checked.
        schedule: one of `SCHEDULES`, or a pair `(warps, asyncs)`.
        seed: of a random schedule; the same seed repeats it.
        workers: OS threads over which clusters are spread; one per core by default. The order within a
            cluster does not depend on it.
        trace: whether a timeline is recorded, in `Result.timeline`.
        early_dependents: whether a grid launched with programmatic stream serialization starts as early as
            its predecessor allows, or only when that has completed.
        allow: kinds of findings that go to `Result.allowed` and are never raised, such as `tcgen05-order`:
            the fences that the PTX ISA asks for behind an mbarrier, and that published kernels leave out.
        max_registers: registers per thread where neither `.maxnreg` nor `.minnctapersm` of the kernel says
            it, as ptxas is told by `--maxrregcount`. Without any of the three, `setmaxnreg` has no effect.
        strict: whether findings are raised as EmulationError; otherwise they are in `Result.reports`.
        progress: whether a bar on stderr shows how many clusters have run, on runs that take more than a few
            seconds; None: where that is a terminal.

    Raises:
        EmulatorError: an unknown schedule or kind of finding, no workers, or registers that a thread cannot
            have.
    """

    checks: bool = True
    schedule: str | tuple[str, str] = "fair"
    seed: int = 0
    workers: int | None = None
    trace: bool = False
    early_dependents: bool = True
    allow: tuple[str, ...] = ()
    max_registers: int | None = None
    strict: bool = True
    progress: bool | None = None

    def __post_init__(self) -> None:
        pair = self.policies
        if len(pair) != 2 or pair[0] not in WARP_POLICIES or pair[1] not in ASYNC_POLICIES:
            raise EmulatorError(
                f"schedule: {self.schedule!r} is none of {', '.join(SCHEDULES)}, nor a pair of one of "
                f"{', '.join(WARP_POLICIES)} and one of {', '.join(ASYNC_POLICIES)}"
            )
        unknown = sorted(set(self.allow) - set(KINDS))
        if unknown:
            raise EmulatorError(
                f"allow: {unknown[0]!r} is not a kind of finding; those are {', '.join(KINDS)}"
            )
        if self.workers is not None and self.workers < 1:
            raise EmulatorError(f"workers: {self.workers}, at least 1 is needed")
        if self.max_registers is not None and not MIN_REGISTERS <= self.max_registers <= MAX_REGISTERS:
            raise EmulatorError(
                f"max_registers: {self.max_registers}, a thread has {MIN_REGISTERS} to {MAX_REGISTERS}"
            )

    @property
    def policies(self) -> tuple[str, str]:
        """Of warps and of asynchronous operations."""
        if isinstance(self.schedule, tuple):
            return self.schedule
        return SCHEDULES.get(self.schedule, (self.schedule, ""))

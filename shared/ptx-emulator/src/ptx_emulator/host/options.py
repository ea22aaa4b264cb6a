"""How a run is to be emulated."""

from __future__ import annotations

from dataclasses import dataclass

from ptx_emulator.machine import Machine


@dataclass(frozen=True)
class Options:
    """How launches are run.

    Args:
        checks: whether races and reads of what nobody wrote are looked for; costs two to four times the time.
        schedule: `fair`, `greedy`, `late`, `greedy-late` or `random`, or a pair `(warps, asyncs)`.
        seed: of a random schedule; the same seed repeats it.
        workers: OS threads; one per core by default.
        trace: whether a timeline is recorded, in `Result.timeline`.
        early_dependents: whether a grid launched with programmatic stream serialization starts as early as
            its predecessor allows, or only when that has completed.
        allow: kinds of findings that are put into `Result.allowed` and never raised; see `Machine`.
        strict: whether findings are raised as EmulationError; otherwise they are in `Result.reports`.
        progress: whether a bar shows how many clusters have run.
    """

    checks: bool = True
    schedule: str | tuple[str, str] = "fair"
    seed: int = 0
    workers: int | None = None
    trace: bool = False
    early_dependents: bool = True
    allow: tuple[str, ...] = ()
    strict: bool = True
    progress: bool = False

    def machine(self, device: str) -> Machine:
        """A machine of the architecture `device` that runs like this."""
        return Machine(
            device,
            checks=self.checks,
            schedule=self.schedule,
            seed=self.seed,
            workers=self.workers,
            trace=self.trace,
            early_dependents=self.early_dependents,
            allow=self.allow,
        )
